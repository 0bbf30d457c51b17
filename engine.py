"""Training for one epoch and evaluation; knows no model and no data set by name."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3, distribute_bn
from torch import Tensor, nn

import checkpoint
from errors import UserError
from journal import Mean, Progress
from optimization import learning_rate, load_optimizer
from optimizer_step import OptimizerStep, Reading
from processes import Interrupted, StopSignal, World
from urls import without_secrets
from utils import digest, fingerprint

logger = logging.getLogger(__name__)


class Batches(Protocol):
    """Batches of images and labels, of known number."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...

    def __len__(self) -> int: ...


BatchTransform = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
LOG_INTERVAL = 10  # steps between log lines; on a GPU the host waits for the device only then


@dataclass
class Position:
    """Progress of training: `step` optimiser steps of `epoch` are done."""

    epoch: int = 0
    step: int = 0
    meters: list[dict[str, tuple[float, int]]] = field(default_factory=list)  # of every process


@dataclass
class Run:
    """What a checkpoint saves and restores: weights, optimiser, schedule and position."""

    model: nn.Module
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scaler: torch.amp.GradScaler
    position: Position
    facts: dict[str, Any] = field(default_factory=dict)  # what else a checkpoint holds
    max_accuracy: float = 0.0

    def state(self, settings: dict[str, Any]) -> dict[str, Any]:
        """DeiT's keys (`epoch` is the last one finished) and the position in the epoch after it."""
        return {
            "model": self.model.state_dict(),
            "model_ema": self.ema.module.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.scheduler.state_dict() if self.scheduler else None,
            "scaler": self.scaler.state_dict(),
            "epoch": self.position.epoch - 1,
            "step": self.position.step,
            "meters": self.position.meters,
            "max_accuracy": self.max_accuracy,
            "args": without_secrets(settings),
            **self.facts,
        }

    def restore(self, saved: dict[str, Any], source: str) -> None:
        """Resumes from `saved`; a file with weights alone restores only these.

        The schedule is unchanged: timm's are functions of the position. Raises UserError if
        `saved` is from another model or optimiser.
        """
        checkpoint.load_weights(self.model, checkpoint.weights_of(saved, source=source), source)
        if self.ema:
            average = saved.get("model_ema") or self.model.state_dict()
            checkpoint.load_weights(self.ema.module, average, source)
        if "optimizer" not in saved or "epoch" not in saved:
            logger.info("%s holds weights alone: training starts at its beginning.", source)
            return
        load_optimizer(self.optimizer, saved["optimizer"], source)
        if saved.get("step", 0) > self.facts.get("steps", math.inf):
            raise UserError(
                f"{source} stands at step {saved['step']} of an epoch of {self.facts['steps']}: "
                "it is damaged, use an earlier one."
            )
        if self.scaler.is_enabled() and saved.get("scaler"):
            self.scaler.load_state_dict(saved["scaler"])
        self.position = Position(saved["epoch"] + 1, saved.get("step", 0), saved.get("meters", []))
        self.max_accuracy = saved.get("max_accuracy", 0.0)
        logger.info("Resumed from %s: %s", source, self.position)


class EpochMeans:
    """Means over the epoch's steps: learning rate, loss and gradient norm.

    They continue from the values that `position` holds for each process.
    """

    NAMES = ("lr", "loss", "grad_norm")

    def __init__(self, position: Position, world: World) -> None:
        saved = position.meters[world.rank] if position.meters else {}
        self.world = world
        self.means = {name: Mean(*saved.get(name, ())) for name in self.NAMES}
        self.last: dict[str, float] = {}

    def update(self, lr: float, readings: list[Reading]) -> None:
        """Adds a step's learning rate, and the readings of this and earlier steps."""
        self.means["lr"].update(lr)
        for loss, norm in readings:
            self.means["loss"].update(loss)
            if math.isfinite(norm):  # else a GradScaler skipped the step
                self.means["grad_norm"].update(norm)
            self.last = {"lr": lr, "loss": loss, "grad_norm": norm}

    def states(self) -> list[dict[str, tuple[float, int]]]:
        """The state of every process, for its position."""
        return self.world.gather({name: mean.state() for name, mean in self.means.items()})

    def over_processes(self) -> dict[str, float]:
        return {name: mean.over(self.world) for name, mean in self.means.items()}


def require_same(
    world: World, data: dict[str, Any], model: nn.Module, position: Position | None = None
) -> None:
    """Raises UserError if the processes differ in images, weights or position."""
    if world.size == 1:
        return
    facts: dict[str, Any] = {"their number of classes": len(next(iter(data.values())).classes)}
    for name, images in data.items():
        facts[f"their number of {name} images"] = len(images)
        facts[f"the names or labels of their {name} images"] = fingerprint(images)
    if position:
        facts["where they stand"] = f"epoch {position.epoch}, step {position.step}"
    facts["their weights"] = digest(model)
    world.peers.agree(facts, "give them the same data and checkpoints")


def train_one_epoch(
    model: nn.Module,
    criterion: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    position: Position,
    *,
    world: World,
    steps: int,
    images_per_step: int,
    epochs: int | None = None,
    set_lr: Callable[[int, int], None],
    batch_transform: BatchTransform,
    scaler: torch.amp.GradScaler,
    amp_dtype: torch.dtype | None = None,
    accumulate: int = 1,
    clip_grad: float | None = None,
    after_step: Callable[[], None] = lambda: None,
    train_mode: bool = True,
    seed: int = 0,
    stop: StopSignal | None = None,
) -> tuple[dict[str, float], dict[str, float]]:
    """Runs the rest of an epoch's `steps`; returns means over the epoch, and speeds.

    A step takes `accumulate` batches of `loader`, which starts at `position`; `position` is
    advanced. `set_lr(epoch, step)` is called before each step, `after_step()` after it. The time
    left is logged for all `epochs` of the run, if they are given.

    Raises Interrupted after a step when `stop` was signalled to any process, and
    FloatingPointError, on all processes together, when a loss or gradient norm is not finite: on
    the CPU before the optimiser step, on a GPU within `LOG_INTERVAL` steps and before returning.
    """
    model.train(train_mode)
    means = EpochMeans(position, world)
    progress = _progress(position, steps, images_per_step, epochs, world.is_main)
    take_step = OptimizerStep(
        model, optimizer, world, seed=seed, accumulate=accumulate, clip_grad=clip_grad,
        scaler=scaler, stop=stop, advice="Try a lower --lr, --clip-grad 1 or --no-amp.",
    )  # fmt: skip
    loss_of = _loss_function(
        model, criterion, batch_transform, world.device, amp_dtype, accumulate=accumulate
    )
    batches = progress.waiting_for(loader)
    while position.step < steps and not take_step.stopping:
        step = position.step
        set_lr(position.epoch, step)
        lr, look = learning_rate(optimizer), progress.due(step)
        readings = take_step(batches, loss_of, look=look, epoch=position.epoch, step=step)
        means.update(lr, readings)
        after_step()
        progress.update(step, **(means.last if look else {}))
        position.step += 1
    progress.close()
    speeds = progress.lap(position.step, "images")
    speeds["data_share"] = max(world.gather(speeds["data_share"]))  # all wait for the slowest
    position.meters = means.states()
    if take_step.stopping:
        raise Interrupted
    return means.over_processes(), speeds


def _progress(
    position: Position, steps: int, images: int, epochs: int | None, show: bool
) -> Progress:
    """Progress of an epoch of `steps` with `images` each, one of the run's `epochs` if given."""
    return Progress(
        f"Epoch: [{position.epoch}]", steps, images,
        start=position.step, interval=LOG_INTERVAL, show=show,
        steps_after=steps * (epochs - position.epoch - 1) if epochs else 0,
    )  # fmt: skip


def _loss_function(
    model: nn.Module,
    criterion: nn.Module,
    batch_transform: BatchTransform,
    device: torch.device,
    amp_dtype: torch.dtype | None,
    *,
    accumulate: int,
) -> Callable[[tuple[Tensor, Tensor]], Tensor]:
    """A batch's share of the loss of its step, which has `accumulate` batches."""

    def loss_of(batch: tuple[Tensor, Tensor]) -> Tensor:
        samples, targets = (x.to(device, non_blocking=True) for x in batch)
        samples, targets = batch_transform(samples, targets)
        with autocast(device, amp_dtype):
            return criterion(samples, model(samples), targets) / accumulate

    return loss_of


@torch.compiler.set_stance("force_eager")  # a ViT in CUDA graphs gave wrong logits
@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Batches,
    *,
    world: World,
    images: int,
    amp_dtype: torch.dtype | None = None,
    stop: StopSignal | None = None,
    per_class: Tensor | None = None,
) -> tuple[dict[str, float], float]:
    """Loss, top-1 and top-5 accuracy (in %) over all processes' shards, and images/s.

    The model runs eagerly, even if it is compiled (docs/evidence.md).
    `images` is the size of the whole set. `per_class`, zeros `[K, 2]` on the device, receives each
    class's number of images and of those classified correctly. Raises, on all processes together,
    Interrupted when `stop` was signalled to any, and FloatingPointError if the loss is not finite.
    """
    model.eval()
    if world.size > 1:
        distribute_bn(model, world.size)  # each process has the averages of its own batches
    # loss, top-1, top-5, images, stopped
    sums = torch.zeros(5, dtype=torch.float64, device=world.device)
    per_step = math.ceil(images / max(len(loader), 1))
    progress = Progress("Test:", len(loader), per_step, interval=LOG_INTERVAL, show=world.is_main)
    for step, (samples, targets) in enumerate(progress.waiting_for(loader)):
        if stop:
            break
        samples = samples.to(world.device, non_blocking=True)
        targets = targets.to(world.device, non_blocking=True)
        with autocast(world.device, amp_dtype):
            logits = model(samples).float()
        loss = F.cross_entropy(logits, targets, reduction="sum")
        ranked = logits.topk(min(5, logits.shape[1])).indices
        hits = ranked == targets[:, None]
        batch = (loss, hits[:, 0].sum(), hits.sum(), loss.new_tensor(len(targets)))
        sums[:4] += torch.stack([value.double() for value in batch])
        if per_class is not None:
            per_class.index_add_(
                0, targets, torch.stack([torch.ones_like(targets), hits[:, 0]], 1).double()
            )
        progress.update(step, **({"loss": loss / len(targets)} if progress.due(step) else {}))
    sums[4] = bool(stop)
    loss, top1, top5, count, stopped = world.reduce(sums).tolist()
    if per_class is not None:
        world.reduce(per_class)
    progress.close()
    if stopped:
        raise Interrupted
    images_per_second = images / progress.seconds()  # even if this process has none of them
    require_finite(loss)
    stats = {"loss": loss / count, "acc1": 100 * top1 / count, "acc5": 100 * top5 / count}
    logger.info("* Acc@1 %.3f Acc@5 %.3f loss %.3f", stats["acc1"], stats["acc5"], stats["loss"])
    return stats, images_per_second


def require_finite(loss: float) -> None:
    """Raises FloatingPointError if the loss of an evaluation is not finite."""
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"The loss of the evaluation is {loss}: the weights, or what is computed from them, "
            "are not finite. Use an earlier checkpoint, or evaluate in float32."
        )


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast(device.type, dtype, enabled=dtype is not None)
