"""Bad input gives one clear sentence and exit code 2, before any work."""

import re
import shutil

import pytest
import torch
from helpers import TINY, Malicious, Ranks, refused

import checkpoint
import main
from mlm import glue, pretrain


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--data-path", "absent"), "data folder absent does not exist"),
        (("--model", "lion_tny_patch16_224"), "no model 'lion_tny.*did you mean lion_tiny_patch16"),
        (("--chunk_size", "0"), "--chunk_size must be at least 1, not 0"),
        (("--batch-size", "0"), "--batch-size must be at least 1, not 0"),
        (("--epochs", "0"), "--epochs must be at least 1, not 0"),
        (("--batch-size", "122"), "draws 122 images per process, but an epoch .* has only 120"),
        (("--grad-accum-steps", "16"), "draws 128 images per process, but an epoch .* only 120"),
        (("--batch-size", "7"), "--batch-size 7 must be even"),
        (("--use-ema",), "--use-ema goes with --eval"),
        (("--eval", "--use-ema"), "--use-ema goes with --eval --resume"),
        (("--eval", "--finetune", "x.pth"), "--eval scores --resume, not --finetune: give"),
        (("--resume", "auto", "--output_dir", ""), "--resume auto needs the --output_dir"),
        (("--resume", "absent.pth"), "cannot read the checkpoint absent.pth: No such file"),
        (("--eval", "--resume", "absent.pth"), "cannot read the checkpoint absent.pth"),
        (("--cosub", "--distillation-type", "hard"), "exclude each other"),
        (("--cosub", "--drop-path", "0"), "give --drop-path above 0"),
        (("--cosub", "--no-train-mode"), "leave --no-train-mode out"),
        (("--model-kwargs", "mask_type=Lit"), "give --mask_type"),
        (("--model-kwargs", "drop_path_rate=0.5"), "give --drop-path"),
        (("--device", "abacus"), "no device 'abacus'"),
        (("--aa", "nonsense"), "no augmentation 'nonsense'"),
        (("--opt", "nonsense"), "Optimizer nonsense not found"),
        (("--sched", "nonsense"), "Unknown scheduler 'nonsense'"),
        (("--drop-path", "2"), r"--drop-path must be in \[0, 1\), not 2.0"),
        (("--start_epoch", "-2"), "--start_epoch must not be negative, but is -2"),
        (("--opt-betas", "0.9"), "--opt-betas takes two numbers, not one"),
        (("--cutmix-minmax", "0.5"), "--cutmix-minmax takes two numbers, not one"),
        (("--sched", "plateau"), "--sched plateau is deprecated"),
        (("--torchcompile", "nonsense"), "no compiler 'nonsense'"),
        (("--torchcompile", "--torchcompile-mode", "x"), "no --torchcompile-mode 'x': use default"),
        (
            ("--torchcompile-mode", "reduce-overhead"),
            "mode reduce-overhead goes with --torchcompile",
        ),
        (("--torchcompile", "eager", "--torchcompile-mode", "reduce-overhead"), "has no modes"),
        (("--model-kwargs", "patch=4"), "cannot be built .*'patch'"),
        (("--model-kwargs", "embed_dim=10"), "width 10 is not divisible by 3 heads"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_arguments(options, message, run, data_path, tmp_path):
    folder = tmp_path / "run"
    ended = run(*TINY, "--data-path", data_path, "--output_dir", folder, *options)
    refused(ended, message, folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model-kwargs", "depth"), "--model-kwargs takes KEY=VALUE, not 'depth'"),
        (("--model-kwargs", "=3"), "--model-kwargs takes KEY=VALUE, not '=3'"),
        (("--model-kwargs", "depth=1", "depth=2"), "--model-kwargs has depth twice: give it once"),
        *(
            (
                ("--model-kwargs", f"{name}={value}"),
                f"{name} in --model-kwargs must be a whole number",
            )
            for name, value in (
                ("depth", "0"),
                ("depth", "none"),
                ("embed_dim", "1.5"),
                ("num_heads", "True"),
                ("patch_size", "-1"),
            )
        ),
        (("--pos_emb", "maybe"), "expected True or False, not 'maybe'"),
    ],
)
def test_arguments_that_do_not_parse(options, message, run):
    ended = run(*TINY, *options)
    assert ended.code == 2
    assert message in ended.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_gpu_that_is_not_there(run, data_path, tmp_path):
    ended = run(
        *TINY, "--data-path", data_path, "--output_dir", tmp_path / "run", "--device", "cuda"
    )
    refused(ended, "--device cuda needs a CUDA GPU and none was found", tmp_path / "run")


def test_a_file_for_the_data_folder(run, data_path):
    file = data_path / "train" / "class0" / "0.png"
    refused(run(*TINY, "--data-path", file), f"The data folder {file} is a file: check --data-path")


@pytest.mark.parametrize("split", ["train", "val"])
def test_empty_class_folder(split, run, data_path, tmp_path):
    data = shutil.copytree(data_path, tmp_path / "data")
    for part in ("train", "val"):
        (data / part / "zebra").mkdir()
    if split == "val":
        shutil.copy(data / "train" / "class0" / "0.png", data / "train" / "zebra")
    ended = run(*TINY, "--data-path", data, "--output_dir", tmp_path / "run")
    refused(ended, f"class folder .*{split}/zebra has no images", tmp_path / "run")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_an_evaluation_cannot_read(workers, run, data_path, tmp_path):
    data = shutil.copytree(data_path, tmp_path / "data")
    (data / "val" / "class0" / "0.png").write_bytes(b"")
    ended = run(*TINY, "--data-path", data, "--eval", "--num_workers", workers)
    refused(ended, "Cannot read the image .*val/class0/0.png: cannot identify image")


def test_output_folder_of_another_run(run, data_path, tmp_path):
    arguments = (*TINY, "--data-path", data_path, "--output_dir", tmp_path / "run")
    assert run(*arguments).code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    refused(run(*arguments), r"holds another run \(.*checkpoint.pth.*--resume auto.*--overwrite")
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    (tmp_path / "file").touch()
    refused(run(*arguments, "--output_dir", tmp_path / "file"), "file is a file: choose a folder")


def test_a_checkpoint_of_another_run_leaves_the_one_in_the_folder(run, data_path, tmp_path):
    shared = (*TINY, "--data-path", data_path)
    for name, seed in (("run", "0"), ("other", "1")):
        assert run(*shared, "--seed", seed, "--output_dir", tmp_path / name).code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    arguments = (*shared, "--output_dir", tmp_path / "run", "--epochs", "2", "--resume")
    other = tmp_path / "other" / "checkpoint.pth"
    refused(run(*arguments, other), "run holds another run .* choose another --output_dir")
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    assert run(*arguments, tmp_path / "run" / "best_checkpoint.pth").code == 0, "its own"
    assert (tmp_path / "run" / "log.txt").read_text().count("\n") == 2
    assert run(*arguments, other, "--overwrite", "--epochs", "3").code == 0
    assert (tmp_path / "run" / "log.txt").read_text().count("\n") == 2, (
        "epochs 1 and 2 of the other"
    )


def test_an_evaluation_needs_the_checkpoint_that_it_is_to_score(run, data_path, tmp_path):
    ended = run(*TINY, "--data-path", data_path, "--eval", "--resume", "auto",
                "--output_dir", tmp_path)  # fmt: skip
    refused(ended, "holds no checkpoint to evaluate: give --resume PATH")


def test_checkpoint_of_another_model(run, data_path, tmp_path):
    shared = (*TINY, "--data-path", data_path)
    assert run(*shared, "--output_dir", tmp_path).code == 0
    saved = tmp_path / "checkpoint.pth"
    arguments = (*shared, "--resume", saved, "--output_dir", tmp_path / "new")
    for options in ((), ("--eval",)):
        ended = run(*arguments, *options, "--mask_type", "Selective", "--pos_emb", "--cls_tok")
        differences = (
            "mask_type: checkpoint Decay, now Selective; "
            "pos_emb: checkpoint False, now True; cls_tok: checkpoint False, now True"
        )
        refused(ended, f"{saved} is of another model: {differences}")
    weights = tmp_path / "weights.pth"
    torch.save(checkpoint.load(saved)["model"], weights)
    ended = run(*shared, "--eval", "--resume", weights, "--mask_type", "Selective")
    first, *lines = ended.err.splitlines()
    assert ended.code == 2
    assert first.startswith(f"main.py: error: {weights} is of another model: ")
    assert "missing in the file: blocks.0.attn.a_i.weight [2, 16]" in lines
    assert "not in the model: blocks.0.attn.a_i [2]" in lines
    other = ("--opt", "lamb", "--layer-decay", "0.7")
    refused(run(*arguments, *other), "optimiser state of .* does not fit")
    saved.write_bytes(saved.read_bytes()[:1000])
    refused(run(*arguments), f"cannot load the checkpoint {saved}: it is truncated, corrupt")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "options",
    [
        ("--resume",),
        ("--eval", "--resume"),
        ("--finetune",),
        ("--distillation-type", "hard", "--teacher-model", "deit_tiny_patch16_224",
         "--teacher-path"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_malicious_checkpoint_runs_nothing(options, run, data_path, tmp_path):
    path, proof = tmp_path / "weights.pth", tmp_path / "proof"
    torch.save({"model": {}, "args": Malicious(proof)}, path)
    arguments = (*TINY, "--data-path", data_path, "--output_dir", tmp_path / "run")
    refused(run(*arguments, *options, path), f"{path}: .* because they could run code")
    assert not proof.exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_error_under_two_ranks_is_told_once(tmp_path):
    ranks = Ranks(tmp_path, *TINY, "--data-path", "absent", "--output_dir", tmp_path / "run")
    assert ranks.wait() == [2, 2]
    assert ranks.errors(0) == (
        "main.py: error: The data folder absent does not exist: check --data-path.\n"
    )
    assert ranks.errors(1) == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "variables, message",
    [
        ({"RANK": "1"}, "has RANK, but not WORLD_SIZE and LOCAL_RANK: .* or unset RANK"),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "has WORLD_SIZE and LOCAL_RANK, but not RANK"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK=2, .*SIZE=2, .* no process"),
        ({"RANK": "a", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK=a, .* name no process"),
    ],
)
@pytest.mark.parametrize("command", ["main", "pretrain", "glue"])
def test_variables_that_no_launcher_set(command, variables, message, run, ending, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if command == "main":
        return refused(run(*TINY, "--data-path", "absent"), message)
    module = {"pretrain": pretrain, "glue": glue}[command]
    ended = ending(module.main, ["absent.yaml", *(["--model", "absent"] if module is glue else [])])
    assert ended.code == 2, ended
    assert re.search(message, ended.err), ended


def test_a_loss_that_is_not_finite_ends_the_run(run, data_path, tmp_path, monkeypatch):
    arguments = (*TINY, "--data-path", data_path, "--output_dir", tmp_path, "--batch-size", "40")
    assert run(*arguments).code == 0
    before = (tmp_path / "checkpoint.pth").read_bytes()
    monkeypatch.setattr(main, "build_base_loss", lambda **_: lambda outputs, _: outputs.sum() / 0)
    ended = run(*arguments, "--epochs", "2", "--resume", "auto")
    assert ended.code == 1
    assert re.match(r"main\.py: error: Loss .* not finite \(epoch 1, step 0, rank 0", ended.err)
    assert (tmp_path / "checkpoint.pth").read_bytes() == before
