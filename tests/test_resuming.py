"""Settings that change when a run goes on: taken up and said, refused, or free."""

import json
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
from helpers import ROOT, TINY, VARIANT, call_main, refused, signal_in_step, slow, weights

import checkpoint
from arguments import get_args_parser
from resuming import RULES, Rule

LIT = (*TINY, "--mask_type", "Lit", "--batch-size", "40")  # no weight tells its heads
FACTS = {"images", "processes"}  # what is compared beside the arguments
# Of every argument: what a resumed run is given instead of what the run was given.
OTHERS = {
    "model": "lion_tiny_distilled_patch16_224", "mask_type": "Decay", "order": "S",
    "pos_emb": "True", "cls_tok": "True", "plus": "gate", "decay_init": "multiscale",
    "model_kwargs": "patch_size=4 embed_dim=16 depth=2 num_heads=4",
    "distillation_type": "hard --teacher-path {teacher} --teacher-model test_resnet",
    "opt": "lamb", "layer_decay": "0.5", "attn_only": "", "gate_lr_scale": "2",
    "gate_weight_decay": "0.1", "holdout": "4",
    "batch_size": "4", "grad_accum_steps": "2", "repeated_aug": None, "seed": "1",
    "data_set": "CIFAR10", "inat_category": "genus",
    "epochs": "3", "lr": "1e-2", "unscale_lr": "", "sched": "step", "sched_on_updates": "",
    "lr_noise": "0.5", "lr_noise_pct": "0.5", "lr_noise_std": "0.5", "warmup_lr": "1e-7",
    "min_lr": "1e-7", "decay_epochs": "3", "decay_milestones": "1 2", "warmup_epochs": "1",
    "cooldown_epochs": "1", "patience_epochs": "1", "decay_rate": "0.2",
    "opt_eps": "1e-7", "opt_betas": "0.8 0.9", "clip_grad": "1", "momentum": "0.8",
    "weight_decay": "0.1", "bce_loss": "", "smoothing": "0.2", "cosub": "", "drop": "0.1",
    "drop_path": "0.2", "train_mode": None, "model_ema": None, "model_ema_decay": "0.9",
    "format": "RNN", "chunk_size": "8", "amp": None, "amp_dtype": "float16",
    "distillation_alpha": "0.1", "distillation_tau": "2", "teacher_model": "resnet18",
    "teacher_path": "x.pth --distillation-type none",
    "data_path": "{copy}", "cache": "", "deterministic": "", "eval_interval": "2",
    "input_size": "20", "eval_crop_ratio": "1", "crop_mode": "squash",
    "interpolation": "nearest", "mean": "0 0 0", "std": "1 1 1", "no_aug": "",
    "color_jitter": "0.1", "aa": "none", "train_interpolation": "bilinear", "ThreeAugment": "",
    "src": "", "reprob": "0", "remode": "const", "recount": "2", "mixup": "0", "cutmix": "0",
    "cutmix_minmax": "0.1 0.2", "mixup_prob": "0.5", "mixup_switch_prob": "0.1",
    "mixup_mode": "elem",
    "model_ema_force_cpu": "", "resplit": "", "finetune": "{run}/checkpoint.pth",
    "num_workers": "1", "pin_mem": None, "output_dir": "{copy}/new --resume {run}/checkpoint.pth",
    "overwrite": "", "resume": "{own}/checkpoint.pth", "start_epoch": "0", "dist_eval": "",
    "device": "auto", "torchcompile": "eager", "channels_last": "", "distributed": "",
    "torchcompile_mode": "default --torchcompile eager",
    "world_size": "2", "dist_url": "env://?",
}  # fmt: skip
GATED = ("--mask_type", "Selective")
OF_GATES = {"gate_lr_scale", "gate_weight_decay", "decay_init"}
EVALUATION = {"eval", "use_ema"}
# Other data have other classes, which are refused; of more held-out images some are known.
ELSEWHERE = {"data_set", "inat_category", "holdout"}


@pytest.fixture(scope="module")
def places(data_path, tmp_path_factory) -> dict[str, Path]:
    """A finished run, one that was stopped in mid-epoch, and what options name."""
    root = tmp_path_factory.mktemp("runs")
    shared = (*LIT, "--data-path", data_path)
    call_main(*shared, "--output_dir", root / "run")
    call_main(*shared, *GATED, "--output_dir", root / "gated")
    with pytest.MonkeyPatch.context() as patch:
        signal_in_step(patch, 2)
        with pytest.raises(SystemExit):
            call_main(*shared, "--output_dir", root / "stopped")
    shutil.copytree(data_path, root / "copy")
    teacher = timm.create_model("test_resnet", num_classes=3).state_dict()
    torch.save({"model": teacher}, root / "teacher.pth")
    return {name: root / name for name in ("run", "gated", "stopped", "copy")}


def option(name: str, places: dict[str, Path]) -> list[str]:
    value = OTHERS[name]
    if value is None:
        return [f"--no-{name.replace('_', '-')}"]
    return [
        f"--{name}",
        *value.format(teacher=places["run"].parent / "teacher.pth", **places).split(),
    ]


@pytest.fixture
def resumed(places, run, data_path, tmp_path):
    """`resumed(which, *options)`: a copy of a run goes on."""

    def go(which: str, *options: object):
        folder = shutil.copytree(places[which], tmp_path / which, dirs_exist_ok=True)
        shared = (*LIT, "--data-path", data_path, "--output_dir", folder)
        return run(*shared, "--resume", "auto", *options)

    return go


def test_every_argument_has_a_rule_and_a_test():
    arguments = {action.dest for action in get_args_parser()._actions} - {"help"}
    assert set(RULES) == arguments | FACTS
    assert set(OTHERS) == arguments - EVALUATION


SAID = r"Going on from .*checkpoint\.pth with another setting: (\w+): checkpoint .*, now .*"


MAY_CHANGE = {name for name, rule in RULES.items() if rule in (Rule.FREE, Rule.TAKEN_UP)}
WITH_TOKEN = {"distillation_type"}  # in a test of its own: the model needs a distillation token


@pytest.mark.parametrize("name", sorted(MAY_CHANGE - EVALUATION - WITH_TOKEN))
def test_settings_that_may_change(name, places, resumed, tmp_path):
    which, *mask = ("gated", *GATED) if name in OF_GATES else ("run",)
    ended = resumed(which, *mask, *option(name, {**places, "own": tmp_path / which}))
    assert ended.code == 0, ended.err
    assert re.findall(SAID, ended.out) == ([name] if RULES[name] is Rule.TAKEN_UP else [])


def test_a_teacher_may_come_later_to_a_model_with_its_token(places, run, data_path, tmp_path):
    shared = (*LIT, "--data-path", data_path, "--output_dir", tmp_path)
    token = ("--model", "lion_tiny_distilled_patch16_224")
    assert run(*shared, *token).code == 0
    teacher = option("distillation_type", places)
    ended = run(*shared, *token, *teacher, "--resume", "auto", "--epochs", "2")
    assert ended.code == 0
    assert "distillation_type: checkpoint none, now hard" in ended.out
    ended = run(*shared, *token, "--eval", "--resume", tmp_path / "checkpoint.pth")
    assert ended.code == 0, ended.err
    without = (*LIT, "--data-path", data_path, "--output_dir", places["run"], *teacher)
    ended = run(*without, "--resume", "auto")
    assert ended.code == 2
    assert "is of another model: " in ended.err


@pytest.mark.parametrize("name", [n for n, r in RULES.items() if r is Rule.OPTIMIZER])
def test_settings_that_the_optimiser_depends_on(name, places, resumed):
    which = ("gated", *GATED) if name in OF_GATES else ("run",)
    ended = resumed(*which, *option(name, places))
    refused(ended, rf"optimiser state of .* does not fit \({name}: checkpoint .*, now .*\): resume")


@pytest.mark.parametrize("evaluation", [(), ("--eval",)], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", [n for n, r in RULES.items() if r is Rule.MODEL])
def test_settings_that_the_weights_depend_on(name, evaluation, places, resumed):
    ended = resumed("run", *option(name, places), *evaluation)
    refused(ended, rf"is of another model: {name}: checkpoint .*, now ")


def test_held_out_images_that_were_trained_on_are_not_scored(places, run, data_path, tmp_path):
    arguments = (*TINY, "--data-path", data_path)
    assert run(*arguments, "--holdout", "20", "--output_dir", tmp_path).code == 0
    resume = ("--eval", "--resume", tmp_path / "checkpoint.pth")
    for holdout in ("20", "5", "0"):
        assert run(*arguments, *resume, "--holdout", holdout).code == 0
    message = "was trained with --holdout 20, so it knows images that --holdout 21 holds out: hold"
    refused(run(*arguments, *resume, "--holdout", "21"), message)


def test_images_that_were_trained_on_are_not_held_out_later(trained, run, data_path, tmp_path):
    arguments = (*TINY, *VARIANT, "--data-path", data_path, "--epochs", "3")
    message = "was trained with --holdout 0, so it knows images that --holdout 20 holds out"
    later = (*arguments, "--holdout", "20", "--output_dir", tmp_path / "run")
    refused(run(*later, "--resume", trained), message, tmp_path / "run")
    ended = run(*later, "--epochs", "1", "--finetune", trained)
    assert ended.code == 0
    assert f"{message}, if it was trained on this data." in ended.out
    fewer = run(*arguments, "--resume", tmp_path / "run" / "checkpoint.pth", "--epochs", "2",
                "--output_dir", tmp_path / "all")  # fmt: skip
    assert fewer.code == 0
    assert "holdout: checkpoint 20, now 0" in fewer.out


def test_the_best_is_that_of_a_folder_and_of_one_evaluation(trained, run, data_path, tmp_path):
    """An accuracy that cannot be reached does not keep a new folder without its best checkpoint."""
    reached = {**checkpoint.load(trained), "max_accuracy": 101.0}
    checkpoint.save(reached, tmp_path / "reached.pth")
    arguments = (*TINY, *VARIANT, "--data-path", data_path, "--epochs", "3")
    ended = run(*arguments, "--resume", tmp_path / "reached.pth", "--output_dir", tmp_path / "new")
    assert ended.code == 0
    assert (tmp_path / "new" / "best_checkpoint.pth").exists()
    (tmp_path / "old").mkdir()
    shutil.copy(tmp_path / "reached.pth", tmp_path / "old" / "checkpoint.pth")
    resume = ("--resume", "auto", "--output_dir", tmp_path / "old")
    assert "Max accuracy: 101.00%" in run(*arguments, *resume).out
    ended = run(*arguments, *resume, "--epochs", "4", "--interpolation", "nearest")
    assert ended.code == 0
    assert "Max accuracy: 101.00%" not in ended.out
    assert (tmp_path / "old" / "best_checkpoint.pth").exists()


def test_a_step_behind_the_end_of_its_epoch_is_damage(trained, run, data_path, tmp_path):
    checkpoint.save({**checkpoint.load(trained), "step": 10**6}, tmp_path / "beyond.pth")
    ended = run(*TINY, *VARIANT, "--data-path", data_path, "--epochs", "2", "--resume",
                tmp_path / "beyond.pth", "--output_dir", tmp_path / "run")  # fmt: skip
    refused(ended, "beyond.pth stands at step 1000000 of an epoch of 15: it is damaged")


def test_heads_and_pooling_are_told_in_any_checkpoint_with_settings(places, run, data_path):
    """Their weights have the same shapes."""
    shared = (*LIT, "--data-path", data_path, "--eval", "--resume")
    for kwargs in ("num_heads=4", "num_heads=2 global_pool=max"):
        kwargs = f"patch_size=4 embed_dim=16 depth=2 {kwargs}".split()
        ended = run(*shared, places["run"] / "best_checkpoint.pth", "--model-kwargs", *kwargs)
        refused(ended, "is of another model: model_kwargs: checkpoint {.*'num_heads': 2}, now {")


@pytest.mark.parametrize("name", [n for n, r in RULES.items() if r is Rule.BETWEEN_EPOCHS
                                  and n not in ELSEWHERE | FACTS])  # fmt: skip
def test_settings_that_may_change_after_an_epoch(name, places, resumed):
    ended = resumed("run", *option(name, places))
    assert ended.code == 0
    assert re.findall(SAID, ended.out) == [name]
    ended = resumed("stopped", *option(name, places))
    refused(ended, rf".*saved in the middle of an epoch, .* \({name}: checkpoint .*, now .*\)\.")


def test_other_images_may_come_after_an_epoch(places, resumed, tmp_path):
    data = shutil.copytree(places["copy"], tmp_path / "data")
    for number in range(40):
        shutil.copy(data / "train/class0/0.png", data / f"train/class0/copy{number}.png")
    ended = resumed("run", "--data-path", data, "--epochs", "2")
    assert ended.code == 0
    assert set(re.findall(SAID, ended.out)) == {"data_path", "images", "epochs"}
    assert "[3/4]" in ended.out
    ended = resumed("stopped", "--data-path", data)
    refused(ended, r".*in the middle of an epoch, .*\(images: checkpoint 120, now 160\)")


@pytest.mark.parametrize("by_step", [(), ("--sched-on-updates",)], ids=["by epoch", "by step"])
@pytest.mark.parametrize("stopped", [slow(None), 4], ids=["epoch's end", "mid-epoch"])
def test_a_new_schedule_is_that_of_a_run_which_had_it_all_along(
    by_step, stopped, run, data_path, tmp_path, monkeypatch
):
    shared = (*TINY, "--data-path", data_path, "--batch-size", "40", "--unscale-lr", *by_step,
              "--warmup-epochs", "1")  # fmt: skip
    new = ("--epochs", "4", "--lr", "1e-2", "--weight-decay", "0.2", "--opt-betas", "0.8", "0.9")
    assert run(*shared, *new, "--output_dir", tmp_path / "whole").code == 0
    folder = ("--output_dir", tmp_path / "run")
    with monkeypatch.context() as patch:
        if stopped:
            signal_in_step(patch, stopped)
        run(*shared, *folder, "--epochs", "2" if stopped else "1", "--lr", "1e-3")
    assert run(*shared, *new, *folder, "--resume", "auto").code == 0
    rates = [[json.loads(line)["train_lr"] for line in (tmp_path / name / "log.txt").open()]
             for name in ("run", "whole")]  # fmt: skip
    assert rates[0][2 if stopped else 1 :] == rates[1][2 if stopped else 1 :]
    if stopped and not by_step:  # two of three steps had the old rate, half-way down
        assert rates[0][1] == pytest.approx((2 * (1e-3 + 1e-5) / 2 + rates[1][1]) / 3)
    groups = [weights(tmp_path / name, "optimizer")["param_groups"] for name in ("run", "whole")]
    assert groups[0] == groups[1]
    assert checkpoint.load(tmp_path / "run/checkpoint.pth")["args"]["lr"] == 1e-2


def test_epochs_that_are_done_cannot_be_taken_back(run, data_path, tmp_path):
    shared = (*TINY, "--data-path", data_path, "--batch-size", "40", "--output_dir", tmp_path)
    assert run(*shared, "--epochs", "2").code == 0
    before = (tmp_path / "log.txt").read_text()
    refused(run(*shared, "--resume", "auto"), "has 2 epochs behind it: raise --epochs 1")
    assert (tmp_path / "log.txt").read_text() == before


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("--weight-decay", "0"), ("--weight-decay", "0.1")),
        (("--opt", "rmsprop", "--momentum", "0"), ("--opt", "rmsprop", "--momentum", "0.9")),
    ],
    ids=["weight decay", "momentum"],
)
def test_optimisers_that_cannot_take_it_up(before, after, run, data_path, tmp_path):
    shared = (*TINY, "--data-path", data_path, "--batch-size", "40", "--output_dir", tmp_path)
    assert run(*shared, *before).code == 0
    ended = run(*shared, *after, "--resume", "auto", "--epochs", "2")
    refused(ended, r"--opt .* cannot go on from .* with these arguments \(.*\): give --momentum")


def test_the_docs_have_the_rule_of_every_argument():
    text = (ROOT / "docs/reliability.md").read_text()
    table = text.split("## Changing settings on resume")[1].split("\n## ")[0]
    rows = [line.split("|")[1:4] for line in table.splitlines() if line.startswith("| **")]
    found = {name: rule.strip(" *") for rule, _, names in rows
             for name in re.findall(r"`-*([\w-]+)`", names)}  # fmt: skip
    titles = {"taken up": Rule.TAKEN_UP, "after an epoch": Rule.BETWEEN_EPOCHS, "free": Rule.FREE,
              "refused: model": Rule.MODEL, "refused: optimiser": Rule.OPTIMIZER}  # fmt: skip
    assert {name.replace("-", "_"): titles[rule] for name, rule in found.items()} == RULES
