import contextlib
import io
import json
import math
import multiprocessing
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import yaml
from helpers import MODEL, ROOT, TINY, Ranks, call_main, make_image_folder, same, torchrun, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.utils import parameters_to_vector

import checkpoint
import loaders
import main
import models_timm

# The published commands

SMALL = (*MODEL, "--input-size", "16", "--epochs", "1", "--num_workers", "1", "--device", "cpu")
ACCURACY = r"\d+\.\d{3}"
LINES = (
    r"Effective batch size 16 \(8 per process x 2 processes x 1 accumulation steps\), "
    r"learning rate 1\.56\de-05",
    r"number of params: \d+",
    r"Start training for 1 epochs",
    r"Epoch: \[0\]  \[0/7\]  eta: .*  lr: .*  loss: .*  "
    r"img/s: \d+\.\d \(mean \d+\.\d\)  data: \d+%",
    rf"\* Acc@1 {ACCURACY} Acc@5 {ACCURACY} loss {ACCURACY}",
    r"Accuracy of the network on the 21 test images: \d+\.\d%",
    r"Max accuracy: \d+\.\d\d%",
    r"Training time \d+:\d\d:\d\d",
)


def called(command: list[str], folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "options"),
    [
        (("torch.distributed.run",), ()),
        (
            ("torch.distributed.launch", "--use_env"),
            ("--mask_type", "Decay", "--order", "S", "--format", "Attention"),
        ),
    ],
    ids=["torchrun", "launch"],
)
def test_training_commands(module, options, data_path, tmp_path):
    arguments = ("--model", "lion_base_patch16_224", "--batch-size", "8", "--data-path", data_path,
                 "--output_dir", tmp_path / "run", *options, *SMALL)  # fmt: skip
    ended = called(torchrun(*module, ROOT / "main.py", *arguments), tmp_path)
    assert ended.returncode == 0, ended.stderr
    for line in LINES:
        assert re.search(rf"^{line}$", ended.stdout, re.M), line
    assert ended.stdout.count("Max accuracy") == 1
    assert (tmp_path / "run" / "checkpoint.pth").exists()


@pytest.mark.slow
def test_evaluation_command(run, data_path, tmp_path):
    shared = ("--model", "lion_tiny_patch16_224", "--mask_type", "Selective", "--order", "S",
              "--data-path", data_path)  # fmt: skip
    learns = ("--lr", "3e-3", "--unscale-lr", "--warmup-epochs", "0", "--epochs", "2")
    trained = run(*TINY, *shared, *learns, "--output_dir", tmp_path)
    assert trained.code == 0
    *_, expected = (tmp_path / "log.txt").read_text().splitlines()
    printed = re.compile(rf"\* Acc@1 ({ACCURACY}) Acc@5 ({ACCURACY}) loss ({ACCURACY})")
    evaluate = ("--eval", "--resume", "checkpoint.pth", *shared, "--format", "Chunk", *SMALL)
    ended = called([sys.executable, str(ROOT / "main.py"), *map(str, evaluate)], tmp_path)
    assert ended.returncode == 0, ended.stderr
    for line in (
        r"Accuracy of the network on the 21 test images: \d+\.\d%",
        r"Evaluation took .* s \(.* images/s\), peak memory \d+ MiB",
    ):
        assert re.search(rf"^{line}$", ended.stdout, re.M), line
    scores = [printed.search(ended.stdout).groups()]
    for format in ("Attention", "RNN"):
        arguments = ("--eval", "--resume", tmp_path / "checkpoint.pth", "--format", format)
        scores.append(printed.search(run(*TINY, *shared, *arguments).out).groups())
    stats = json.loads(expected)
    wanted = tuple(f"{stats[name]:.3f}" for name in ("test_acc1", "test_acc5", "test_loss"))
    assert scores == [wanted] * 3
    assert stats["test_acc1"] > 50


def test_evaluation_of_a_data_set_without_a_checkpoint(run):
    ended = run(*TINY, "--eval", "--data-set", "DEMO", "--input-size", "28", "--batch-size", "256")
    assert ended.code == 0
    assert "Accuracy of the network on the 2000 test images:" in ended.out


# What a run leaves

LOGGED = [
    *("train_lr", "train_loss", "train_grad_norm"),
    *("test_loss", "test_acc1", "test_acc5", "test_ema_loss", "test_ema_acc1", "test_ema_acc5"),
    *("epoch", "n_parameters"),
]


def logged(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


@pytest.fixture(scope="module")
def left(data_path, tmp_path_factory) -> SimpleNamespace:
    """A run of two epochs: its folder, its log and what it printed."""
    folder, out = tmp_path_factory.mktemp("left") / "new" / "run", io.StringIO()
    with contextlib.redirect_stdout(out):
        call_main(*TINY, "--data-path", data_path, "--output_dir", folder, "--epochs", "2")
    return SimpleNamespace(folder=folder, log=logged(folder), out=out.getvalue())


def test_the_log_of_a_run(left):
    assert "Epoch: [0]  [14/15]" in left.out, "an epoch of fewer than 256 images is whole"
    assert [list(epoch) for epoch in left.log] == [LOGGED] * 2
    assert [epoch["epoch"] for epoch in left.log] == [0, 1]
    assert all(math.isfinite(value) for epoch in left.log for value in epoch.values())


def test_the_checkpoints_of_a_run(left):
    saved = checkpoint.load(left.folder / "checkpoint.pth")
    deit = {"model", "optimizer", "lr_scheduler", "epoch", "model_ema", "scaler", "args"}
    assert deit <= saved.keys()
    assert saved["epoch"] == 1
    assert type(saved["args"]) is dict
    assert saved["args"]["batch_size"] == 8
    assert sum(t.numel() for t in saved["model"].values()) == left.log[0]["n_parameters"]
    assert checkpoint.load(left.folder / "checkpoint.previous.pth")["epoch"] == 0


def test_the_best_checkpoint_of_a_run(left):
    best = checkpoint.load(left.folder / "best_checkpoint.pth")
    accuracies = [epoch["test_acc1"] for epoch in left.log]
    assert accuracies[best["epoch"]] == best["max_accuracy"] == max(accuracies)
    assert f"Max accuracy: {max(accuracies):.2f}%" in left.out


def test_the_facts_of_a_run(left):
    facts = yaml.safe_load((left.folder / "args.yaml").read_text())
    assert facts["args"] == checkpoint.load(left.folder / "checkpoint.pth")["args"]
    assert facts["world_size"] == 1
    assert torch.__version__.startswith(facts["torch"])
    assert {"timm", "commit", "command"} <= facts.keys()


def test_the_curves_of_a_run(left):
    board = EventAccumulator(str(left.folder)).Reload()
    speeds = ("images_per_second", "images_per_second_last", "data_share", "hours_left")
    tags = {name.replace("_", "/", 1) for name in LOGGED[:-2]} | {f"train/{s}" for s in speeds}
    assert set(board.Tags()["scalars"]) == tags
    ema = [(event.step, event.value) for event in board.Scalars("test/ema_loss")]
    assert ema == [(i, pytest.approx(epoch["test_ema_loss"])) for i, epoch in enumerate(left.log)]


def test_without_an_output_folder_nothing_is_written(run, data_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*TINY, "--data-path", data_path).code == 0
    assert list(tmp_path.iterdir()) == []


def test_overwrite_starts_anew(run, data_path, tmp_path):
    arguments = (*TINY, "--data-path", data_path, "--output_dir", tmp_path)
    run(*arguments, "--epochs", "2")
    assert run(*arguments, "--overwrite").code == 0
    assert len(logged(tmp_path)) == 1
    assert not (tmp_path / "checkpoint.previous.pth").exists()


# Training options: runs of a few plain steps

PLAIN = (*TINY, "--batch-size", "40", "--opt", "momentum", "--momentum", "0", "--weight-decay", "0",
         "--lr", "0.1", "--unscale-lr", "--warmup-epochs", "0", "--mixup", "0", "--cutmix", "0",
         "--drop-path", "0", "--reprob", "0")  # fmt: skip


@pytest.fixture
def trained(run, data_path, tmp_path):
    """`trained(*options)` runs main.py with `PLAIN` arguments and returns its folder."""
    folders = []

    def train(*options: object) -> Path:
        folders.append(tmp_path / f"run{len(folders)}")
        ended = run(*PLAIN, "--data-path", data_path, "--output_dir", folders[-1], *options)
        assert ended.code == 0, ended.err
        return folders[-1]

    return train


def initial_weights(trained, *options: str) -> dict[str, torch.Tensor]:
    return weights(trained("--lr", "0", "--min-lr", "0", *options))


def close(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[n], b[n], atol=1e-5) for n in a)


@pytest.mark.parametrize(
    "options",
    [
        ("--model", "deit_base_patch16_224", "--ThreeAugment", "--bce-loss"),
        ("--model", "vit_tiny_patch16_224", "--src", "--cosub", "--drop-path", "0.5"),
        ("--model", "regnetx_002", "--model-kwargs", "--input-size", "32"),
        ("--torchcompile", "eager", "--channels-last", "--layer-decay", "0.7"),
        ("--pos_emb", "--cls_tok", "--mask_type", "Lit", "--format", "RNN"),
        ("--mixup", "0.8", "--cutmix-minmax", "0.2", "0.8", "--mixup-mode", "elem"),
        ("--mixup", "0.8", "--mixup-mode", "pair", "--opt-betas", "0.9", "0.99", "--opt", "adamw"),
        ("--no-aug", "--no-repeated-aug", "--sched", "none"),
        ("--no-train-mode", "--no-repeated-aug", "--aa", "none", "--model-ema-decay", "0.9"),
    ],
    ids=lambda options: " ".join(options[:2]),
)
def test_options_and_other_models(options, trained):
    (epoch,) = logged(trained(*options))
    assert all(math.isfinite(value) for value in epoch.values())
    assert epoch["train_grad_norm"] > 0
    assert 0 <= epoch["test_acc1"] <= 100


@pytest.mark.slow
def test_compiled_blocks_train_as_others_do_on_two_ranks(data_path, tmp_path):
    options = (*PLAIN, "--model", "vit_tiny_patch16_224", "--data-path", data_path, "--batch-size",
               "10", "--grad-accum-steps", "2")  # fmt: skip
    compiler = ("--torchcompile", "eager")
    for name, more in {"eager": (), "compiled": compiler,
                       "depth": (*compiler, "--drop-path", "0.3")}.items():  # fmt: skip
        ranks = Ranks(tmp_path, *options, *more, "--output_dir", tmp_path / name)
        assert ranks.wait() == [0, 0], ranks.errors()
    compiled, expected, dropped = (weights(tmp_path / n) for n in ("compiled", "eager", "depth"))
    assert list(compiled) == list(expected) == list(dropped)
    assert not close(dropped, expected), "blocks are dropped"
    assert all(torch.allclose(compiled[n], expected[n], atol=1e-6) for n in expected)


@pytest.mark.slow
def test_accumulated_batches_and_two_ranks_equal_one_large_batch(trained, data_path, tmp_path):
    whole = trained("--batch-size", "20", "--mask_type", "Selective", "--order", "S")
    half = (*PLAIN, "--mask_type", "Selective", "--order", "S", "--batch-size", "10",
            "--data-path", data_path)  # fmt: skip
    parts = trained(*half[len(PLAIN) :], "--grad-accum-steps", "2")
    ranks = Ranks(tmp_path, *half, "--output_dir", tmp_path / "ranks")
    assert ranks.wait() == [0, 0], ranks.errors()
    for folder in (parts, tmp_path / "ranks"):
        assert close(weights(folder), weights(whole))
        assert close(weights(folder, "model_ema"), weights(whole, "model_ema"))
        (epoch,), (expected,) = logged(folder), logged(whole)
        assert epoch == pytest.approx(expected, rel=1e-4)
        assert epoch["test_acc1"] == expected["test_acc1"]


def test_the_learning_rate_is_scaled_by_the_effective_batch(run, data_path):
    arguments = ("--batch-size", "20", "--grad-accum-steps", "3", "--lr", "0.256", "--opt", "sgd")
    line = r"Effective batch size 60 \(20 .* x 1 .* x 3 .*\), learning rate (.*)"
    for options, lr in (((), "0.03"), (("--unscale-lr",), "0.256")):
        ended = run(*TINY, "--data-path", data_path, *arguments, *options)
        assert re.search(line, ended.out)[1] == lr


def cosine(t: float, end: float, warmup: float) -> float:
    """From 1e-3 up to 1e-1 by `warmup`, down to 1e-2 at `end`."""
    if t < warmup:
        return 1e-3 + (1e-1 - 1e-3) * t / warmup
    return 1e-2 + (1e-1 - 1e-2) * (1 + math.cos(math.pi * t / end)) / 2


@pytest.mark.parametrize("by_step", [False, True])
def test_learning_rate_schedule(by_step, trained):
    shape = ("--warmup-lr", "1e-3", "--min-lr", "1e-2", "--warmup-epochs", "2", "--epochs", "4")
    log = logged(trained(*shape, *(["--sched-on-updates"] if by_step else [])))
    steps = 3
    for t, epoch in enumerate(log):
        expected = cosine(t, 4, 2)
        if by_step:
            rates = [cosine(t * steps + step, 4 * steps, 2 * steps) for step in range(steps)]
            expected = sum(rates) / steps
        assert epoch["train_lr"] == pytest.approx(expected)


def test_moving_average(trained):
    one_step = ("--batch-size", "120")
    before, after = initial_weights(trained), weights(trained(*one_step))
    averages = {
        decay: weights(trained(*one_step, "--model-ema-decay", decay), "model_ema")
        for decay in (0, 0.75, 1)
    }
    assert not close(before, after)
    assert close(averages[0], after)
    assert close(averages[1], before)
    assert close(averages[0.75], {n: 0.75 * before[n] + 0.25 * after[n] for n in before})


def test_moving_average_is_evaluated_and_can_be_turned_off(trained, run, data_path):
    options = ("--model-ema-decay", "0.9", "--epochs", "2")
    folder, on_cpu = trained(*options), trained(*options, "--model-ema-force-cpu")
    assert same(weights(folder, "model_ema"), weights(on_cpu, "model_ema"))
    resume = ("--eval", "--resume", folder / "checkpoint.pth", "--data-path", data_path)
    *_, stats = logged(folder)
    for options, prefix in (((), "test_"), (("--use-ema",), "test_ema_")):
        assert f"loss {stats[f'{prefix}loss']:.3f}" in run(*TINY, *resume, *options).out
    assert stats["test_loss"] != stats["test_ema_loss"]

    without = trained("--no-model-ema")
    assert weights(without, "model_ema") is None
    assert [name for name in logged(without)[0] if "ema" in name] == []


def test_clipped_gradients(trained):
    before = initial_weights(trained)
    after = weights(trained("--batch-size", "120", "--clip-grad", "0.01"))
    change = parameters_to_vector([after[name] - before[name] for name in before])
    assert change.norm().item() == pytest.approx(0.1 * 0.01, rel=1e-2)


def test_attn_only_leaves_the_rest_as_it_was(trained):
    before = initial_weights(trained, "--pos_emb")
    folder = trained("--pos_emb", "--attn-only", "--weight-decay", "0.1")
    after = weights(folder)
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed == {n for n in before if ".attn." in n or n.startswith(("head.", "pos_embed"))}
    assert logged(folder)[0]["n_parameters"] == sum(before[name].numel() for name in changed)


def test_attn_only_trains_a_classifier_of_any_name():
    model = timm.create_model("skresnet18", num_classes=3)
    models_timm.train_attention_alone(model, "skresnet18")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"fc.weight", "fc.bias"} <= trained
    assert all(".attn." in name for name in trained - {"fc.weight", "fc.bias"})


def test_attn_only_trains_the_pool_before_the_classifier():
    model = timm.create_model("lion_tiny_patch16_224", depth=1, img_size=32, global_pool="map")
    models_timm.train_attention_alone(model, "lion_tiny_patch16_224")
    assert all(p.requires_grad for p in model.attn_pool.parameters())


def test_attn_only_needs_attention(run, data_path):
    options = ("--model", "test_resnet", "--attn-only", "--model-kwargs")
    ended = run(*TINY, *options, "--data-path", data_path)
    assert ended.code == 2
    assert "test_resnet has no attention to train: leave --attn" in ended.err


@pytest.mark.parametrize(
    ("options", "loss"),
    [
        ((), math.log(3)),
        (("--smoothing", "0"), math.log(3)),
        (("--mixup", "0.8"), math.log(3)),
        (("--bce-loss",), math.log(2)),
        (("--bce-loss", "--cutmix", "1"), math.log(2)),
        (("--cosub", "--drop-path", "0.1", "--mixup", "0.8"), math.log(2)),
    ],
)
def test_each_loss_begins_at_that_of_ignorance(options, loss, trained):
    (epoch,) = logged(trained("--lr", "1e-6", *options))
    assert epoch["train_loss"] == pytest.approx(loss, rel=0.05)


@pytest.mark.parametrize(("options", "most"), [((), 3), (("--bce-loss",), 2)])
def test_binary_cross_entropy_sees_two_classes_in_two_images(options, most, trained, monkeypatch):
    """Label smoothing would make all classes present."""
    present = []

    def loss(outputs, targets):
        present.append(targets.gt(0).sum(1).max().item())
        return outputs.mean()

    monkeypatch.setattr(main, "build_base_loss", lambda **_: loss)
    trained("--mixup", "0.8", *options)
    assert max(present) == most


def test_augmentation_arguments_arrive(data_path, run, monkeypatch):
    received = {}

    def note(build):
        def noting(**kwargs):
            received.update(kwargs)
            return build(**kwargs)

        return noting

    for module, name in ((loaders, "build_train_transform"), (main, "build_batch_transform"),
                         (loaders, "build_normalization")):  # fmt: skip
        monkeypatch.setattr(module, name, note(getattr(module, name)))
    wanted = dict(
        color_jitter=0.1, aa="original", train_interpolation="bilinear", reprob=0.5,
        remode="const", recount=2, mixup=0.3, cutmix=0.4, mixup_prob=0.5, mixup_switch_prob=0.6,
        mixup_mode="pair", smoothing=0.2,
    )  # fmt: skip
    given = [text for name, value in wanted.items() for text in (f"--{name}", value)]
    arguments = (*TINY, "--data-path", data_path, *given, "--src", "--cosub",
                 "--cutmix-minmax", "0.2", "0.8")  # fmt: skip
    assert run(*arguments).code == 0
    names = {"train_interpolation": "interpolation", "mixup_prob": "prob", "mixup_mode": "mode",
             "mixup_switch_prob": "switch_prob"}  # fmt: skip
    expected = {names.get(name, name): value for name, value in wanted.items()} | {
        "input_size": 16, "three_augment": False, "simple_random_crop": True,
        "cutmix_minmax": [0.2, 0.8], "cosub": True, "num_classes": 3,
    }  # fmt: skip
    assert {name: received[name] for name in expected} == expected
    for option, three in (("--ThreeAugment", True), ("--no-aug", None)):
        received.clear()
        assert run(*TINY, "--data-path", data_path, option).code == 0
        assert (received.get("three_augment"), received["reprob"]) == (three, 0)


@pytest.mark.parametrize("more", [(), ("--cache",)])
def test_workers_of_an_evaluation_start_before_a_compiler(more, run, data_path, monkeypatch):
    decoders = []

    def forking(self):
        decoders.append("worker")
        started(self)

    def compiling(*arguments, **options):
        decoders.append("compiler")

    started = multiprocessing.process.BaseProcess.start
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", forking)
    monkeypatch.setattr(main, "compile_in_place", compiling)
    arguments = (*TINY, "--data-path", data_path, "--torchcompile", "eager", "--num_workers", "1")
    assert run(*arguments, *more).code == 0
    assert decoders == ["worker", "compiler", "worker"], "of evaluation, and of training"


def test_three_images_are_enough(run, tmp_path):
    data = make_image_folder(tmp_path / "data", train=3, test=3)
    ended = run(*TINY, "--data-path", data, "--batch-size", "2", "--output_dir", tmp_path / "run")
    assert ended.code == 0
    assert len(logged(tmp_path / "run")) == 1


def test_an_evaluation_without_a_checkpoint_says_so(run, data_path):
    ended = run("--eval", *TINY, "--data-path", data_path)
    assert ended.code == 0
    assert "No --resume: these are the weights that lion_tiny_patch16_224 is built" in ended.out


def test_milestones_of_the_schedule(run, data_path, tmp_path):
    options = ("--sched", "multistep", "--decay-milestones", "2", "3", "--warmup-epochs", "0")
    options += ("--lr", "0.01", "--unscale-lr", "--epochs", "3", "--output_dir", tmp_path / "run")
    assert run(*TINY, *options, "--data-path", data_path).code == 0
    lines = (tmp_path / "run" / "log.txt").read_text().splitlines()
    rates = [json.loads(line)["train_lr"] for line in lines]
    assert rates == pytest.approx([0.01, 0.001, 0.0001])
