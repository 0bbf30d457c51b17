import math
from itertools import product
from pathlib import Path

import pytest
import timm
import torch
from helpers import TINY, Ranks, count_reduction, make_image_folder, rendezvous, same
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import models_lion  # noqa: F401  (registers the models)
from compilation import compile_in_place
from engine import Position, evaluate, train_one_epoch
from losses import DistillationLoss
from models_lion import FEATURE_MAPS, FORMATS
from processes import Interrupted, World, init_distributed, meet
from samplers import ShardSampler

# mask, order, format and the parts of a batch that gradients are accumulated over
VARIANTS = [
    *product(FEATURE_MAPS, ("Normal", "S"), FORMATS, (1,)),
    *product(FEATURE_MAPS, ("Normal", "S"), ("Attention",), (2,)),
]
CPU = World()
STEPS, BATCH, CLASSES = 4, 8, 5


def images(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(count, 3, 16, 16, generator=generator)
    return samples, torch.randint(CLASSES, (count,), generator=generator)


def small_model(mask="Selective", order="S", format="Attention", **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "lion_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2,
        num_classes=CLASSES, mask_type=mask, order=order, format=format, chunk_size=5, **kwargs,
    )  # fmt: skip


def batches(world: World, accumulate: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """This process's share of `STEPS` times the same `BATCH` images, in `accumulate` parts."""
    parts = [part[world.rank :: world.size].chunk(accumulate) for part in images(BATCH)]
    return list(zip(*parts, strict=True)) * STEPS


def train(model: nn.Module, world: World = CPU, *, position=None, accumulate=1, **kwargs):
    if world.size > 1 and not isinstance(model, DistributedDataParallel):
        model = DistributedDataParallel(model)
    defaults = {
        "criterion": DistillationLoss(nn.CrossEntropyLoss()),
        "loader": batches(world, accumulate),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        "steps": STEPS,
        "set_lr": lambda epoch, step: None,
        "scaler": torch.amp.GradScaler("cpu", enabled=False),
    }
    return train_one_epoch(
        model, position=position or Position(), world=world, images_per_step=BATCH,
        batch_transform=lambda samples, targets: (samples, targets),
        accumulate=accumulate, **{**defaults, **kwargs},
    )  # fmt: skip


class Breaking(nn.Module):
    """Cross-entropy, that from call `step` on is not finite, and maybe its gradient neither."""

    def __init__(self, step: int, *, gradient: bool):
        super().__init__()
        self.left, self.gradient = step, gradient

    def forward(self, samples, outputs, targets):
        self.left -= 1
        loss = nn.functional.cross_entropy(outputs, targets)
        if self.left >= 0:
            return loss
        return loss * math.inf if self.gradient else loss + math.nan


class StopAt:
    """A stop signal that is there from the `calls`-th look on."""

    def __init__(self, calls: float):
        self.left = calls

    def __bool__(self):
        self.left -= 1
        return self.left < 0


# Over two processes


def everything_on_two_ranks(rank: int, folder: Path) -> None:
    """Each process writes what it found, so that processes are started only once."""
    world = init_distributed("cpu", meet(rendezvous(folder)))
    found = {"variants": {}}
    for *variant, accumulate in VARIANTS:
        model = small_model(*variant)
        stats, _ = train(model, world, accumulate=accumulate)
        found["variants"][*variant, accumulate] = model.state_dict(), stats["loss"]
    found["reductions"] = {}
    for accumulate in (1, 2, 4):
        model, calls = DistributedDataParallel(small_model()), []
        model.register_comm_hook(calls, count_reduction)
        train(model, world, accumulate=accumulate)
        found["reductions"][accumulate] = len(calls)
    for gradient in (False, True):
        model = small_model()
        try:
            train(model, world, criterion=Breaking(2 if rank else STEPS, gradient=gradient))
        except FloatingPointError as error:
            found["broken", gradient] = model.state_dict(), str(error)
    position, model = Position(), small_model()
    try:
        train(model, world, position=position, stop=StopAt(2 if rank else math.inf))
    except Interrupted:
        found["stopped"] = model.state_dict(), position.step, len(position.meters)
    found["scores"] = [score(small_model(), count, world) for count in (1, 2, 21, 24)]
    found["per class"] = scores_of_classes(world)
    try:
        score(small_model(), 21, world, stop=StopAt(1 if rank else math.inf))
    except Interrupted:
        found["evaluation stopped"] = True
    model = nn.Sequential(nn.Flatten(), nn.LazyLinear(CLASSES), nn.BatchNorm1d(CLASSES))
    model(images(2)[0] + rank)  # statistics of its own, as a moving average has
    score(model, 21, world)
    found["statistics"] = model[2].running_mean
    torch.save(found, folder / f"found{rank}.pth")


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    ranks = Ranks(tmp_path_factory.mktemp("ranks"), function=everything_on_two_ranks)
    assert ranks.wait() == [0, 0], ranks.errors(0) + ranks.errors(1)
    return [torch.load(ranks.folder / f"found{rank}.pth") for rank in (0, 1)]


@pytest.mark.parametrize(("mask", "order", "format", "accumulate"), VARIANTS)
def test_two_ranks_and_accumulation_train_like_one_large_batch(
    mask, order, format, accumulate, found
):
    (weights, loss), other = (part["variants"][mask, order, format, accumulate] for part in found)
    assert same((weights, loss), other)
    model = small_model(mask, order, format)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    stats, _ = train(model)
    assert loss == pytest.approx(stats["loss"], rel=1e-5)
    for name, expected in model.named_parameters():
        assert torch.allclose(weights[name], expected, rtol=1e-4, atol=1e-5), name
        assert not expected.equal(before[name]), f"{name} was not trained"


def test_gradients_are_averaged_once_a_step_whatever_its_parts(found):
    assert [part["reductions"] for part in found] == [dict.fromkeys((1, 2, 4), STEPS)] * 2


@pytest.mark.parametrize("gradient", [False, True], ids=["loss", "loss and gradient"])
def test_what_is_not_finite_on_one_rank_stops_both_before_the_step(gradient, found):
    model = small_model()
    train(model, steps=2)
    for rank, part in enumerate(found):
        weights, message = part["broken", gradient]
        assert f"is not finite (epoch 0, step 2, rank {rank}, learning rate 0.1)" in message
        assert all(torch.allclose(weights[n], w, atol=1e-5) for n, w in model.state_dict().items())


def test_a_signal_to_one_rank_stops_both_after_the_same_step(found):
    assert same(found[0]["stopped"], found[1]["stopped"])
    weights, step, ranks = found[0]["stopped"]
    assert (step, ranks) == (3, 2)
    model = small_model()
    train(model, steps=3)
    assert all(torch.allclose(weights[n], w, atol=1e-5) for n, w in model.state_dict().items())


def test_a_signal_to_one_rank_stops_the_evaluation_of_both(found):
    assert [part.get("evaluation stopped") for part in found] == [True, True]


def test_ranks_score_the_same_statistics_of_batches(found):
    assert found[0]["statistics"].abs().sum() > 0
    assert same(*(f["statistics"] for f in found))


def test_evaluation_counts_every_image_once_over_ranks(found):
    assert found[0]["scores"] == found[1]["scores"]
    for count, stats in zip((1, 2, 21, 24), found[0]["scores"], strict=True):
        alone = score(small_model(), count)
        assert (stats["acc1"], stats["acc5"]) == (alone["acc1"], alone["acc5"])
        assert stats["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    for part in found:
        assert same(part["per class"], scores_of_classes(CPU))
        assert part["per class"][:, 0].sum() == 21


# Evaluation


def score(model: nn.Module, count: int, world: World = CPU, **kwargs) -> dict[str, float]:
    sampler = ShardSampler(count, num_replicas=world.size, rank=world.rank)
    loader = DataLoader(TensorDataset(*images(count)), batch_size=4, sampler=sampler)
    return evaluate(model, loader, world=world, images=count, **kwargs)[0]


def test_a_compiled_model_is_evaluated_as_it_is_written():
    model, counter = small_model(), CompileCounter()
    expected = score(model, 21)
    compile_in_place(model, counter)
    assert score(model, 21) == expected
    assert counter.frame_count == 0
    model(images(2)[0])
    assert counter.frame_count == 1


def scores_of_classes(world: World) -> torch.Tensor:
    per_class = torch.zeros(CLASSES, 2, dtype=torch.float64)
    score(small_model(), 21, world, per_class=per_class)
    return per_class


def test_more_ranks_than_images(tmp_path):
    data = make_image_folder(tmp_path / "images", train=3, test=3)
    ranks = Ranks(tmp_path, *TINY, "--data-path", data, "--eval", size=4)
    assert ranks.wait() == [0] * 4
    assert "Accuracy of the network on the 3 test images" in ranks.printed(0)


@pytest.mark.parametrize("classes", [2, 3, 5, 10])
def test_accuracy_and_loss(classes):
    """The model returns its samples, so these are the logits."""
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(50, classes, generator=generator)
    labels = torch.randint(classes, (50,), generator=generator)
    loader = DataLoader(TensorDataset(logits, labels), batch_size=7)
    stats, rate = evaluate(nn.Identity(), loader, world=CPU, images=50)
    ranks, losses = [], []
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        ranks.append(sorted(row, reverse=True).index(row[label]))
        losses.append(math.log(sum(math.exp(x - row[label]) for x in row)))
    assert stats["acc1"] == 100 * sum(rank < 1 for rank in ranks) / 50
    assert stats["acc5"] == 100 * sum(rank < 5 for rank in ranks) / 50
    assert stats["loss"] == pytest.approx(sum(losses) / 50, rel=1e-6)
    assert rate > 0


def test_evaluation_switches_dropout_off_and_leaves_the_weights_alone():
    model = small_model(drop_path_rate=0.9, drop_rate=0.9).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert score(model, 21) == score(model, 21)
    assert same(model.state_dict(), before)


def test_a_signal_stops_the_evaluation():
    with pytest.raises(Interrupted):
        score(small_model(), 21, stop=StopAt(2))


# Training in one process


def test_what_is_called_at_each_step():
    called = []
    position = Position(epoch=3, step=1)
    train(
        small_model(), position=position,
        set_lr=lambda epoch, step: called.append((epoch, step)),
        after_step=lambda: called.append(position.step),
    )  # fmt: skip
    assert called == [(3, 1), 1, (3, 2), 2, (3, 3), 3]
    assert (position.epoch, position.step) == (3, 4)


def test_means_over_the_epoch_are_those_of_all_steps_across_an_interruption():
    rates = [0.1, 0.2, 0.05, 0.3]

    def run(model: nn.Module, position: Position, stop: StopAt | None = None) -> dict[str, float]:
        optimizer = torch.optim.SGD(model.parameters(), lr=1)

        def set_lr(epoch: int, step: int) -> None:
            optimizer.param_groups[0]["lr"] = rates[step]

        return train(model, position=position, optimizer=optimizer, set_lr=set_lr, stop=stop)[0]

    uninterrupted = run(small_model(), Position())
    position, model = Position(), small_model()
    with pytest.raises(Interrupted):
        run(model, position, StopAt(1))
    assert position.step == 2
    assert run(model, position) == uninterrupted
    assert uninterrupted["lr"] == pytest.approx(sum(rates) / 4)

    losses, model = [], small_model()
    samples, targets = images(BATCH)
    for lr in rates:  # plain gradient descent
        loss = nn.functional.cross_entropy(model(samples), targets)
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= lr * gradient
    assert uninterrupted["loss"] == pytest.approx(sum(losses) / 4, rel=1e-5)


def test_a_clipped_step_has_the_length_asked_for():
    model = small_model()
    before = nn.utils.parameters_to_vector(model.parameters()).detach()
    stats, _ = train(model, steps=1, clip_grad=0.01)
    after = nn.utils.parameters_to_vector(model.parameters()).detach()
    assert (after - before).norm().item() == pytest.approx(0.1 * 0.01, rel=1e-3)
    assert stats["grad_norm"] > 0.1, "the norm logged is that before clipping"


@pytest.mark.parametrize("train_mode", [True, False])
def test_train_mode(train_mode):
    model = small_model(drop_path_rate=0.5)
    train(model, steps=1, train_mode=train_mode)
    assert all(module.training == train_mode for module in model.modules())


def test_random_draws_depend_on_the_position_alone():
    def last_step(position: Position) -> torch.Tensor:
        model = small_model(drop_path_rate=0.5, drop_rate=0.5)
        train(model, position=position, steps=3, seed=1)
        return nn.utils.parameters_to_vector(model.parameters())

    assert last_step(Position(0, 2)).equal(last_step(Position(0, 2)))
    assert not last_step(Position(0, 2)).equal(last_step(Position(1, 2)))
