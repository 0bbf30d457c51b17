"""Fused optimisers, the moving average, clipping and seeds: fast ways to the same numbers."""

import copy
import io
import random

import numpy as np
import pytest
import timm
import torch
from kernel_cases import gpu
from timm.utils import ModelEmaV3
from torch import nn

from optimization import (
    MovingAverage,
    can_be_fused,
    clip_gradients,
    create_optimizer,
    load_optimizer,
)
from utils import seed_everything

CPU = torch.device("cpu")


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 2, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3)
    )


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    model(torch.randn(5, 3, 3, 3, generator=generator).to(device)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


# Optimisers


@pytest.mark.parametrize(
    ("name", "fused"),
    [("adamw", True), ("AdamW", True), ("adam", True), ("sgd", True), ("momentum", True),
     ("lookahead_adamw", True), ("lamb", False), ("adagrad", False), ("nadamw", False)],
)  # fmt: skip
def test_which_optimisers_can_be_fused(name, fused):
    assert can_be_fused(name) is fused


def test_an_optimiser_is_fused_on_a_gpu_alone(monkeypatch):
    options = {"opt": "adamw", "lr": 0.1, "weight_decay": 0.1}
    for device, fused in (("cuda", True), ("cpu", None)):
        optimizer = create_optimizer(small_model(), torch.device(device), **options)
        assert [group["fused"] for group in optimizer.param_groups] == [fused] * 2
    create_optimizer(small_model(), torch.device("cuda"), opt="lamb")


def test_a_checkpoint_without_a_fused_optimiser_goes_on_fused():
    model = small_model()
    earlier = torch.optim.AdamW(model.parameters(), lr=0.1)
    step(model, earlier, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.2, fused=True)
    seen = []
    optimizer.register_load_state_dict_pre_hook(
        lambda _, state: seen.extend(group["fused"] for group in state["param_groups"])
    )
    load_optimizer(optimizer, earlier.state_dict(), "a file")
    assert seen == [True], "the state is loaded as that of a fused optimiser"
    assert [(g["lr"], g["fused"]) for g in optimizer.param_groups] == [(0.2, True)]
    assert all(state["step"] == 1 for state in optimizer.state.values())


def test_a_loaded_state_is_laid_out_as_the_weights_are():
    model = small_model()
    earlier = torch.optim.AdamW(model.parameters())
    step(model, earlier, 0)
    saved = copy.deepcopy(earlier.state_dict())
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    load_optimizer(optimizer, saved, "a file")
    for number, parameter in enumerate(model.parameters()):
        loaded = optimizer.state[parameter]["exp_avg"]
        assert loaded.stride() == parameter.stride()
        assert loaded.equal(saved["state"][number]["exp_avg"])


def test_a_state_of_more_or_fewer_groups_is_refused():
    model = small_model()
    groups = [{"params": [parameter]} for parameter in model.parameters()]
    for own, other in ((1, 2), (2, 1)):
        state = torch.optim.AdamW(copy.deepcopy(groups[:other])).state_dict()
        with pytest.raises(ValueError, match="parameter group"):
            load_optimizer(torch.optim.AdamW(groups[:own]), state, "a file")


# bitsandbytes and APEX are packages of their own, Adahessian differentiates twice.
@pytest.mark.parametrize(
    "name", [n for n in timm.optim.list_optimizers(exclude_filters=["bnb*", "fused*"])
             if n != "adahessian"] + ["lookahead_adamw", "lookahead_sgd"],
)  # fmt: skip
def test_every_optimiser_goes_on_with_the_same_bits(name):
    model = small_model()
    optimizer = create_optimizer(model, CPU, opt=name, lr=1e-2, weight_decay=0.1)
    for seed in range(8):  # no multiple of the steps that Lookahead counts
        step(model, optimizer, seed)
    resumed = copy.deepcopy(model)
    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    again = create_optimizer(resumed, CPU, opt=name, lr=1e-2, weight_decay=0.1)
    saved.seek(0)
    load_optimizer(again, torch.load(saved), "a file")
    for seed in range(8, 16):
        for one, its_optimizer in ((model, optimizer), (resumed, again)):
            seed_everything(seed)
            step(one, its_optimizer, seed)
    for one, other in zip(resumed.parameters(), model.parameters(), strict=True):
        assert one.equal(other)


def test_an_optimiser_keeps_its_own_random_numbers():
    model = small_model()
    optimizer = create_optimizer(model, CPU, opt="kron", lr=1e-2)
    for seed in range(3):
        step(model, optimizer, seed)
    saved = copy.deepcopy(optimizer.state_dict())
    again = create_optimizer(small_model(), CPU, opt="kron", lr=1e-2)
    assert again.state_dict()["rng_state"] != saved["rng_state"]
    load_optimizer(again, saved, "a file")
    assert again.state_dict()["rng_state"] == saved["rng_state"]


@gpu
@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "lookahead_adamw"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_fused_steps_go_on_from_others(name, channels_last):
    device, expected = torch.device("cuda"), small_model().cuda()
    plain = timm.optim.create_optimizer_v2(expected, opt=name, lr=1e-3, weight_decay=0.1)
    step(expected, plain, 0)
    model = copy.deepcopy(expected)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    fused = create_optimizer(model, device, opt=name, lr=1e-3, weight_decay=0.1)
    load_optimizer(fused, copy.deepcopy(plain.state_dict()), "a file")
    for seed in range(1, 8):
        step(expected, plain, seed)
        step(model, fused, seed)
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


# The moving average


def test_the_moving_average_is_timms():
    model = small_model()
    average, expected = MovingAverage(model, decay=0.9), ModelEmaV3(model, decay=0.9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for seed in range(4):
        step(model, optimizer, seed)
        average.update(model)
        expected.update(model)
    assert expected.module.state_dict()["1.num_batches_tracked"] == 4
    for name, value in expected.module.state_dict().items():
        assert average.module.state_dict()[name].equal(value), name
        assert value.equal(model.state_dict()[name]) == (value.dtype == torch.int64), name


def test_the_moving_average_goes_on_from_loaded_weights():
    model, other = small_model(), small_model()
    average = MovingAverage(model, decay=0.5)
    average.update(model)
    for tensor in other.state_dict().values():
        tensor.fill_(2)
    average.module.load_state_dict(other.state_dict())
    weight = model[0].weight.detach().clone()
    average.update(model)
    torch.testing.assert_close(average.module[0].weight.detach(), (weight + 2) / 2)


# Gradients


@pytest.mark.parametrize("clip", [None, 0.1, 100.0])
def test_clipping_is_that_of_torch(clip):
    parameters = [nn.Parameter(torch.randn(4, 3)) for _ in range(3)] + [nn.Parameter(torch.ones(1))]
    others = copy.deepcopy(parameters)
    for one, other in zip(parameters[:3], others, strict=False):
        one.grad = torch.randn(4, 3)
        other.grad = one.grad.clone()
    norm = nn.utils.clip_grad_norm_(others, clip or float("inf"))
    assert clip_gradients(parameters, clip).equal(norm)
    for one, other in zip(parameters[:3], others, strict=False):
        assert one.grad.equal(other.grad)
    assert parameters[3].grad is None


# Seeds


def test_a_seed_gives_the_numbers_that_torch_gives():
    seed_everything(1, 2, 3)
    drawn = torch.rand(3), np.random.rand(3).tolist(), random.random()
    words = np.random.SeedSequence((1, 2, 3)).generate_state(3).tolist()
    torch.manual_seed(words[2])
    assert torch.rand(3).equal(drawn[0])
    torch.randn(1)  # of a pair, whose other half a seed has to forget
    seed_everything(1, 2, 3)
    assert (np.random.rand(3).tolist(), random.random()) == drawn[1:]
    seed_everything(1, 2, 4)
    assert not torch.rand(3).equal(drawn[0])


@gpu
def test_a_seed_gives_the_numbers_that_torch_gives_on_a_gpu():
    torch.zeros(1, device="cuda")
    words = np.random.SeedSequence((1, 2)).generate_state(3).tolist()
    torch.manual_seed(words[2])
    expected = torch.rand(3, device="cuda")
    seed_everything(1, 2)
    assert torch.rand(3, device="cuda").equal(expected)
