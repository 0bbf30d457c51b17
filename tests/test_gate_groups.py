"""Decays and gates that learn at their own rate and with their own weight decay."""

import pytest
import torch
from helpers import TINY, refused, weights

import checkpoint
import main

SELECTIVE = (*TINY, "--mask_type", "Selective", "--order", "S", "--no-model-ema")


def built(*options: str) -> tuple[torch.nn.Module, torch.optim.Optimizer, main.Run]:
    args = main.get_args_parser().parse_args([*SELECTIVE, *options])
    main.check_args(args)
    world = main.World()
    model = main.build_model(args, 3, 16)
    run = main.build_run(args, world, model, 10, {})
    if run.scheduler:
        run.scheduler.step(0)
        run.scheduler.step_update(0)
    return model, run.optimizer, run


def settings(model, optimizer, field: str) -> dict[str, float]:
    """Of every parameter, by name."""
    names = {p: name for name, p in model.named_parameters()}
    return {names[p]: g[field] for g in optimizer.param_groups for p in g["params"]}


def is_gate(name: str) -> bool:
    return ".a_i" in name or ".a2_i" in name


@pytest.mark.parametrize(
    "more", [(), ("--layer-decay", "0.5"), ("--sched-on-updates",), ("--sched", "none")]
)
def test_gates_have_their_own_rate_and_decay(more):
    plain, options = built(*more), ("--gate-lr-scale", "3", "--gate-weight-decay", "0.5")
    apart = built(*more, *options)
    for field in ("lr", "weight_decay"):
        before, after = (settings(*run[:2], field) for run in (plain, apart))
        assert before.keys() == after.keys() == dict(plain[0].named_parameters()).keys()
        for name in before:
            expected = before[name]
            if is_gate(name) and field == "lr":
                expected *= 3
            elif is_gate(name) and expected:  # biases have none
                assert name.endswith("weight")
                expected = 0.5
            assert after[name] == pytest.approx(expected), (field, name)
    assert apart[1].param_groups[0]["lr"] == plain[1].param_groups[0]["lr"]  # what is logged


def test_rates_without_a_schedule_are_those_of_its_peak():
    options = ("--layer-decay", "0.5", "--gate-lr-scale", "3")
    constant = settings(*built(*options, "--sched", "none")[:2], "lr")
    assert constant == pytest.approx(settings(*built(*options, "--warmup-epochs", "0")[:2], "lr"))
    assert constant["blocks.0.mlp.fc1.weight"] == constant["blocks.1.mlp.fc1.weight"] / 2


def test_decays_are_gates_too():
    model, optimizer, _ = built("--mask_type", "Decay", "--gate-lr-scale", "0")
    rates = settings(model, optimizer, "lr")
    assert {name for name, rate in rates.items() if rate == 0} == set(filter(is_gate, rates))


@pytest.mark.parametrize("mask", ["Decay", "Selective"])
@pytest.mark.parametrize("weight_decay", ["0", "0.05"])
def test_the_decay_of_gates_is_their_own(mask, weight_decay):
    """Also where nothing else has any, and for LION-D's decays, which are vectors."""
    options = ("--mask_type", mask, "--weight-decay", weight_decay)
    before = settings(*built(*options)[:2], "weight_decay")
    after = settings(*built(*options, "--gate-weight-decay", "0.5")[:2], "weight_decay")
    own = {name for name in before if is_gate(name) and not name.endswith("bias")}
    assert own
    assert after == {**before, **dict.fromkeys(own, 0.5)}


def test_training_with_a_rate_of_zero_leaves_gates_alone(run, data_path, tmp_path):
    options = (*SELECTIVE, "--data-path", data_path, "--warmup-epochs", "0")
    for name, more in (("frozen", ("--gate-lr-scale", "0")), ("free", ())):
        folder = tmp_path / name
        assert run(*options, *more, "--lr", "0.01", "--output_dir", folder).code == 0
        args = main.get_args_parser().parse_args(list(map(str, options)))
        main.seed_everything(args.seed)
        start = main.build_model(args, 3, 16).state_dict()
        moved = {n for n, t in weights(folder).items() if not t.equal(start[n])}
        assert any(map(is_gate, moved)) == (name == "free")
        assert "head.weight" in moved
    frozen = tmp_path / "frozen"
    more = ("--gate-lr-scale", "0", "--epochs", "2", "--resume", "auto")
    assert run(*options, *more, "--output_dir", frozen).code == 0
    assert checkpoint.load(frozen / "checkpoint.pth")["epoch"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--model vit_tiny_patch16_224 --gate-lr-scale 2", "takes no --gate-lr-scale"),
        ("--mask_type Lit --gate-weight-decay 0", "Lit has no gates: leave --gate-weight-decay"),
        ("--mask_type Lit --decay-init long", "Lit has no gates: leave --decay-init"),
    ],
)
def test_without_gates_there_is_nothing_to_set_apart(options, message, run, data_path, tmp_path):
    ended = run(*TINY, *options.split(), "--data-path", data_path, "--output_dir", tmp_path / "x")
    refused(ended, message, tmp_path / "x")
