"""Every argument's values are checked before any work, and what cannot run is refused by name."""

import argparse
import os
import re
import runpy
import sys
from types import SimpleNamespace

import pytest
import timm.optim
import torch
from helpers import MODEL, ROOT, TINY, older, refused

from argument_parser import ArgumentParser
from arguments import OF_GATES, check_args, check_optimizer, get_args_parser
from intervals import in_words
from models_timm import LION_OPTIONS

DEIT = dict(
    batch_size=64, epochs=300, bce_loss=False, unscale_lr=False, model="deit_base_patch16_224",
    input_size=224, drop=0.0, drop_path=0.1, model_ema=True, model_ema_decay=0.99996,
    model_ema_force_cpu=False, opt="adamw", opt_eps=1e-8, opt_betas=None, clip_grad=None,
    momentum=0.9, weight_decay=0.05, sched="cosine", lr=5e-4, lr_noise=None, lr_noise_pct=0.67,
    lr_noise_std=1.0, warmup_lr=1e-6, min_lr=1e-5, decay_epochs=30, warmup_epochs=5,
    cooldown_epochs=10, patience_epochs=10, decay_rate=0.1, color_jitter=0.3,
    aa="rand-m9-mstd0.5-inc1", smoothing=0.1, train_interpolation="bicubic", repeated_aug=True,
    train_mode=True, ThreeAugment=False, src=False, reprob=0.25, remode="pixel", recount=1,
    resplit=False, mixup=0.8, cutmix=1.0, cutmix_minmax=None, mixup_prob=1.0,
    mixup_switch_prob=0.5, mixup_mode="batch", teacher_model="regnety_160", teacher_path="",
    distillation_type="none", distillation_alpha=0.5, distillation_tau=1.0, cosub=False,
    finetune="", attn_only=False, data_path="/datasets01/imagenet_full_size/061417/",
    data_set="IMNET", inat_category="name", output_dir="", device="auto", seed=0, resume="",
    start_epoch=0, eval=False, eval_crop_ratio=0.875, dist_eval=False, num_workers=10,
    pin_mem=True, distributed=False, world_size=1, dist_url="env://",
)  # fmt: skip
LION = dict(
    pos_emb=False, cls_tok=False, mask_type="Decay", order="Normal", format="Attention",
    chunk_size=32,
)  # fmt: skip
CHOICES = dict(
    train_interpolation="random", mixup_mode="pair", distillation_type="soft", data_set="CIFAR",
    inat_category="genus", mask_type="Lit", order="S", format="RNN",
)  # fmt: skip

# Of every argument that takes numbers: some at the ends of what it takes, and some beyond.
NUMBERS = {
    "batch_size": ((1, 2), (0, -1)),
    "epochs": ((1,), (0, -1)),
    "grad_accum_steps": ((1,), (0, -1)),
    "input_size": ((1,), (0, -1)),
    "chunk_size": ((1,), (0, -1)),
    "drop": ((0, 0.99), (-0.1, 1)),
    "drop_path": ((0, 0.99), (-0.1, 1, 2)),
    "model_ema_decay": ((0, 1), (-0.1, 2)),
    "opt_eps": ((0, 1), (-1e-8,)),
    "opt_betas": (("0 0.99", "0.9 0.9 0.9"), ("0.9 1", "-0.1 0.9", "0.9", "0.9 0.9 0.9 0.9")),
    "clip_grad": ((0.01, 5), (-1, 0)),
    "momentum": ((0, 0.99), (-0.1, 1)),
    "weight_decay": ((0, 2), (-0.05,)),
    "gate_lr_scale": ((0, 10), (-1,)),
    "gate_weight_decay": ((0, 1), (-0.1,)),
    "layer_decay": ((0.1, 1), (0, -1, 1.1)),
    "lr": ((0, 2), (-5e-4,)),
    "lr_noise": (("0.5", "0 1"), ("-0.1", "0.5 1.1", "0.9 0.1", "0 0.5 1")),
    "lr_noise_pct": ((0.01, 1), (0, -1, 1.1)),
    "lr_noise_std": ((0, 2), (-1,)),
    "warmup_lr": ((0, 1), (-1e-6,)),
    "min_lr": ((0, 1), (-1e-5,)),
    "decay_epochs": ((0.5, 30), (0, -1)),
    "decay_milestones": (("1", "10 20 30"), ("0", "20 10")),
    "warmup_epochs": ((0, 5), (-1,)),
    "cooldown_epochs": ((0,), (-1,)),
    "patience_epochs": ((0,), (-1,)),
    "decay_rate": ((0.1, 2), (0, -0.1)),
    "color_jitter": ((0, 2), (-0.3,)),
    "smoothing": ((0, 0.99), (-0.1, 1)),
    "reprob": ((0, 1), (-0.1, 1.1)),
    "recount": ((1,), (0, -1)),
    "mixup": ((0, 8), (-0.8,)),
    "cutmix": ((0, 8), (-1,)),
    "cutmix_minmax": (("0 1",), ("0.5", "-0.1 1", "0 1.1", "0.8 0.2", "0 0.5 1")),
    "mixup_prob": ((0, 1), (-0.1, 1.1)),
    "mixup_switch_prob": ((0, 1), (-0.1, 1.1)),
    "distillation_alpha": ((0, 1), (-0.1, 1.1)),
    "distillation_tau": ((0.1, 10), (0, -1)),
    "eval_crop_ratio": ((0.1, 1), (0, -1, 1.1)),
    "mean": (("0 0.5 1",), ()),
    "std": (("0.1 0.5 1",), ("0 0.5 1", "-1 1 1")),
    "holdout": ((0, 5000), (-1,)),
    "eval_interval": ((1, 10), (0, -1)),
    "num_workers": ((0, 10), (-1,)),
    "start_epoch": ((0,), (-2, 300)),
    "seed": ((0, 2**32 - 1), (-1, 2**32)),
    "world_size": ((1,), (0, -1)),
}
WORDS = {
    "device": ("abacus", "cuda:x", "meta"),
    "torchcompile": ("nonsense",),
    "torchcompile_mode": ("nonsense", "default"),
    "aa": ("nonsense",),
    "order": ("nonsense",),
    "remode": ("nonsense",),
    "sched": ("nonsense", "plateau"),
    "opt": ("nonsense", "fusedlamb", "fusedadam", "bnbadamw8bit", "adahessian"),
    "model": ("nonsense", "vit_tiny_patch16_224.nonsense"),
    "resume": ("absent.pth",),
    "finetune": ("absent.pth",),
    "data_path": ("absent",),
}


NEW_SCHEDULES = () if older("timm", "1.0.31") else ("constant",)


def actions() -> list[argparse.Action]:
    return [action for action in get_args_parser()._actions if action.dest != "help"]


def spelled(name: str) -> str:
    """As --help spells the option."""
    return get_args_parser().names[name][0]


def parse(name: str, value: object, *more: str) -> argparse.Namespace:
    option = [f"--{name}", *str(value).split()]
    return get_args_parser().parse_args(["--model", "lion_tiny_patch16_224", *more, *option])


def test_home_folders_are_found_behind_an_equals_sign(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    paths = {"output_dir": "~/run", "resume": "~/a.pth", "finetune": "~/b.pth", "data_path": "~/c"}
    args = get_args_parser().parse_args([f"--{name}={path}" for name, path in paths.items()])
    assert {name: getattr(args, name) for name in paths} == {
        name: path.replace("~", "/home/me") for name, path in paths.items()
    }
    assert get_args_parser().parse_args(["--resume", "hf-hub:a/b~c"]).resume == "hf-hub:a/b~c"


def test_the_tables_hold_every_argument_that_is_no_choice_and_no_switch():
    numbers = {action.dest for action in actions() if action.type in (int, float)}
    assert set(NUMBERS) == numbers
    texts = [a for a in actions() if a.type in (None, os.path.expanduser)]
    words = {a.dest for a in texts if a.nargs != 0 and not a.choices}
    free = {"model_kwargs", "output_dir", "dist_url", "teacher_model", "teacher_path"}
    assert set(WORDS) | free == words  # those have tests of their own


@pytest.mark.parametrize(("name", "values"), [(name, good) for name, (good, _) in NUMBERS.items()])
def test_numbers_within_the_range(name, values):
    for value in values:
        check_args(parse(name, value, "--mixup", "0", "--cutmix", "0"))


@pytest.mark.parametrize(("name", "values"), [(name, bad) for name, (_, bad) in NUMBERS.items()])
def test_numbers_beyond_the_range(name, values):
    kind = next(action.type for action in actions() if action.dest == name)
    count = 3 if name in ("mean", "std") else 2 if name in ("opt_betas", "cutmix_minmax") else 1
    endless = [" ".join([text] * count) for text in ("nan", "inf", "-inf") if kind is float]
    for value in (*values, *endless):
        with pytest.raises(ValueError, match=f"{spelled(name)} |--{name} takes ") as caught:
            check_args(parse(name, value))
        assert "\n" not in str(caught.value)
    assert values or endless


@pytest.mark.parametrize(
    ("name", "word"), [(n, word) for n, words in WORDS.items() for word in words]
)
def test_words_that_name_nothing(name, word, run, data_path, tmp_path):
    arguments = (*TINY, "--data-path", data_path, "--output_dir", tmp_path / "run")
    ended = run(*arguments, f"--{name}", word)
    refused(ended, "", tmp_path / "run")
    assert word.split(".")[-1] in ended.err


@pytest.mark.parametrize("name", ["clip_grad", "model_ema_decay", "seed"])
def test_a_bad_number_ends_the_command(name, run, data_path, tmp_path):
    for evaluation in ((), ("--eval",)):
        arguments = (*TINY, "--data-path", data_path, "--output_dir", tmp_path / "run")
        ended = run(*arguments, *evaluation, f"--{name}", NUMBERS[name][1][0])
        refused(ended, f"{spelled(name)} must ", tmp_path / "run")


# Optimisers and schedules


@pytest.mark.slow
def test_every_optimiser_runs_or_is_refused_by_name():
    reasons = {}
    for name in timm.optim.list_optimizers():
        try:
            check_optimizer(parse("opt", name), torch.device("cpu"))
        except ValueError as error:
            reasons[name] = str(error)
    for name, reason in reasons.items():
        assert reason.startswith(f"--opt {name} cannot run here with these arguments (")
    refused_names = set(reasons)
    assert {"adahessian", "fusedlamb", "fusedsgd", "bnblion"} <= refused_names
    assert not {"adamw", "sgd", "momentum", "lamb", "lion", "muon", "adan"} & refused_names


@pytest.mark.parametrize(
    "name", ["cosine", "tanh", "step", "multistep", "poly", "none", *NEW_SCHEDULES]
)
def test_schedules_that_run(name):
    for more in ((), ("--sched-on-updates",), ("--lr-noise", "0.1", "0.9")):
        check_optimizer(parse("sched", name, *more), torch.device("cpu"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--opt", "adan", "--opt-betas", "0.9", "0.99"), "--opt adan cannot run here"),
        (("--opt", "lamb", "--opt-betas", "0.9", "0.9", "0.9"), "--opt lamb cannot run here"),
        (
            ("--sched", "wsd", "--decay-epochs", "40"),
            "--sched wsd cannot run .*"
            + ("decay_epochs" if NEW_SCHEDULES else "Unknown scheduler"),
        ),
        (("--cache", "--train-interpolation", "random"), "--cache has no --train-interpolation"),
        (("--model-kwargs", "input_size=8"), "input_size in --model-kwargs is no option"),
        (("--model-kwargs", "name=x"), "cannot be built with these arguments"),
        ((*MODEL, "in_chans=1"), "they have 3 channels, so leave in_chans out"),
        (("--no-aug", "--ThreeAugment", "--src"), "--no-aug leaves --ThreeAugment and --src with"),
        (("--no-aug", "--aa", "original"), "--no-aug leaves --aa without effect: leave out"),
        (("--ThreeAugment", "--reprob", "0.25"), "--ThreeAugment leaves --reprob without effect"),
        (("--bce-loss", "--smoothing", "0.1"), "--bce-loss leaves --smoothing without effect"),
        (("--sched", "step", "--decay-rate", "2"), r"--decay_rate must be in \(0, 1\]"),
        (("--start_epoch", "1"), "--start_epoch 1 leaves nothing to do of --epochs 1"),
    ],
)
def test_arguments_that_do_not_go_together(options, message, run, data_path, tmp_path):
    ended = run(*TINY, "--data-path", data_path, "--output_dir", tmp_path / "run", *options)
    refused(ended, message, tmp_path / "run")


@pytest.mark.parametrize(
    "options",
    [
        "--reprob 0.0 --smoothing 0.0 --bce-loss --color-jitter 0.3 --ThreeAugment --src",
        "--reprob 0.0 --smoothing 0.1 --color-jitter 0.3 --aa rand-m9-mstd0.5-inc1",
        "--no-aug --aa none --color-jitter 0 --reprob 0",
    ],
)
def test_arguments_of_deit_iii_and_those_that_are_off_go_together(options):
    check_args(get_args_parser().parse_args(options.split()))


@pytest.mark.parametrize("option", ["--nodes", "--ngpus", "--timeout", "--epochs"])
def test_a_job_that_cannot_run_is_not_queued(option, monkeypatch, ending):
    monkeypatch.setitem(sys.modules, "submitit", SimpleNamespace())
    path = ROOT / "scripts" / "run_with_submitit.py"
    script = runpy.run_path(str(path))
    args = script["get_args_parser"]().parse_args([option, "0"])
    ended = ending(script["submit"], args)
    assert ended.code == 2
    assert ended.err == f"run_with_submitit.py: error: {option} must be at least 1, not 0.\n"


# The output folder


@pytest.mark.parametrize("evaluation", [(), ("--eval",)], ids=["training", "evaluation"])
def test_an_output_folder_that_cannot_be_written_to(evaluation, run, data_path, tmp_path):
    (tmp_path / "file").touch()
    for folder in ("/proc/run", "/dev/null/run", tmp_path / "file" / "run", tmp_path / ("x" * 300)):
        ended = run(*TINY, "--data-path", data_path, "--output_dir", folder, *evaluation)
        refused(ended, r"--output_dir .* cannot be written to \(.*\): choose another folder")
        assert "Test:" not in ended.out
    assert os.listdir(tmp_path) == ["file"]


def test_a_failed_start_leaves_no_folder(run, data_path, tmp_path):
    ended = run(*TINY, "--data-path", data_path, "--output_dir", tmp_path / "a" / "b", "--aa", "?")
    refused(ended, "timm has no augmentation")
    assert list(tmp_path.iterdir()) == []


# Names of models


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("lion_tiny", ["lion_tiny_patch16_224", "lion_tiny_distilled_patch16_224"]),
        ("LION-base", ["lion_base_patch16_224", "lion_base_distilled_patch16_224"]),
        ("lion_medium_patch16_224", ["lion_tiny_patch16_224"]),
        ("hydra_tny", ["hydra_tiny_patch16_224"]),
        ("deit3_small", ["deit3_small_patch16_224"]),
        ("resnet-50", ["resnet50"]),
        ("efficientnetb0", ["efficientnet_b0"]),
    ],
)
@pytest.mark.parametrize("option", ["--model", "--teacher-model"])
def test_unknown_models_suggest_those_of_their_family(option, name, meant, run, data_path):
    teaching = ("--distillation-type", "hard", "--teacher-path", "x.pth")
    ended = run(*TINY, "--data-path", data_path, *teaching, option, name)
    refused(ended, f"There is no (teacher )?model '{name}': did you mean ")
    suggested = ended.err.split("did you mean ")[1].rstrip("?\n").split(" or ")
    assert set(meant) <= set(suggested)
    family = name.lower().replace("-", "_").split("_")[0]
    if family in ("lion", "hydra", "deit3"):
        assert all(model.startswith(family) for model in suggested)


# The help


def shown() -> dict[str, list[str]]:
    """Of every option that --help prints, by its first name: the paragraphs about it."""
    found = {}
    for part in re.split(r"\n  (?=-)", get_args_parser().format_help())[1:]:
        found.setdefault(part.split()[0].rstrip(","), []).append(" ".join(part.split()))
    return found


def test_the_help_prints_every_option_once_with_its_default():
    first = {dest: names[0] for dest, names in get_args_parser().names.items()}
    named = {first[action.dest]: action for action in actions()}
    printed = {name: texts for name, texts in shown().items() if name != "-h"}
    assert set(printed) == set(named)
    for name, (text, *others) in printed.items():
        starts = [part.split()[0].replace("_", "-") for part in text.split(", ")]
        spellings = [word for word in starts if word.startswith("--")]
        assert not others, f"{name} is printed twice"
        assert len(spellings) == len(set(spellings)), f"{name} is printed twice"
        told, _, default = named[name].help.removesuffix(")").rpartition(" (default: ")
        assert len(told.split(",")[0]) > 2, f"{name} has no words"
        assert default not in ("", "None", "True", "False"), name
        assert f"(default: {default})" in text


def test_the_default_of_a_number_is_told_as_it_is():
    numbers = [action for action in actions() if type(action.default) in (int, float)]
    for action in numbers:
        number = f"{action.default:g}"
        assert f"(default: {number}" in action.help or "else the model's" in action.help


def test_the_help_tells_lists_and_aliases_as_they_are_written():
    printed = shown()
    assert "(default: 90 180 270)" in printed["--decay-milestones"][0]
    assert "CIFAR is CIFAR100, INAT INAT18" in printed["--data-set"][0]


def test_the_help_is_in_groups_lions_first():
    groups = [g for g in get_args_parser()._action_groups if g._group_actions]
    assert [group.title for group in groups][:2] == ["options", "LION"]
    assert [action.dest for action in groups[0]._group_actions] == ["help"]
    lions = {action.dest for action in groups[1]._group_actions}
    assert lions == {*LION_OPTIONS, *OF_GATES, "plus"}


def test_an_option_without_a_word_is_refused():
    add, switch = ArgumentParser("x").in_group("a group")
    for missing in (lambda: add("--a"), lambda: switch("b", True)):
        with pytest.raises(TypeError, match="help"):
            missing()


@pytest.mark.parametrize(
    ("interval", "words"),
    [("[1, inf)", "at least 1"), ("(0, inf)", "above 0"), ("(0, 1]", "in (0, 1]"),
     ("(-inf, inf)", "")],
)  # fmt: skip
def test_intervals_in_words(interval, words):
    assert in_words(interval) == words


@pytest.mark.parametrize("word", ["--pin-mem", "--pin_mem", "--no-pin-mem", "--no_pin_mem"])
def test_a_switch(word):
    args = get_args_parser().parse_args([word])
    assert args.pin_mem is ("no" not in word)
    assert args.given == ["pin_mem"]


# Spellings and defaults


def parsed(*arguments: str):
    return get_args_parser().parse_args(arguments)


@pytest.mark.parametrize(("name", "default"), (DEIT | LION).items())
def test_arguments_in_both_spellings_with_their_defaults(name, default):
    assert getattr(parsed(), name) == default
    text = CHOICES.get(name, "7")
    for option in (f"--{name}", f"--{name.replace('_', '-')}"):
        given = [option] if isinstance(default, bool) else [option, text]
        value = getattr(parsed(*given), name)
        assert value is True if isinstance(default, bool) else value in (text, 7, [7])


@pytest.mark.parametrize("name", ["model-ema", "repeated-aug", "train-mode", "pin-mem", "amp"])
def test_switches_can_be_turned_off(name):
    dest = name.replace("-", "_")
    assert getattr(parsed(), dest) is True
    assert getattr(parsed(f"--no-{name}"), dest) is False
    assert getattr(parsed(f"--no_{dest}"), dest) is False


@pytest.mark.parametrize("name", ["pos_emb", "cls_tok"])
def test_flags_with_and_without_a_value(name, run):
    for option in (f"--{name}", f"--{name.replace('_', '-')}"):
        assert [getattr(parsed(*given), name) for given in (
            [option], [option, "True"], [option, "False"], [option, "--eval"], []
        )] == [True, True, False, True, False]  # fmt: skip
    refused = run(f"--{name}", "perhaps")
    assert refused.code == 2
    assert "expected True or False, not 'perhaps'" in refused.err


def test_other_arguments(run):
    given = parsed("--dr", "0.2", "--opt-betas", "0.9", "0.95", "--cutmix-minmax", "0.2", "0.8",
                   "--model-kwargs", "patch_size=4", "global_pool=token")  # fmt: skip
    assert given.decay_rate == 0.2
    assert given.opt_betas == [0.9, 0.95]
    assert given.cutmix_minmax == [0.2, 0.8]
    assert given.model_kwargs == {"patch_size": 4, "global_pool": "token"}
    abbreviated = run("--epoch", "1")
    assert abbreviated.code == 2
    assert "unrecognized arguments: --epoch" in abbreviated.err
