"""Training for one epoch and evaluation; knows no model and no data set by name."""

import logging
import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.utils import ModelEmaV3, distribute_bn
from torch import Tensor, nn
from torch.utils.data import Dataset

import checkpoint
from journal import Mean, Progress
from optimization import clip_gradients
from processes import Interrupted, StopSignal, World
from urls import without_secrets
from utils import digest, fingerprint, seed_everything

logger = logging.getLogger(__name__)

BatchTransform = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
LOG_INTERVAL = 10  # steps between two lines; on a GPU the host waits for the device only then
METERS = ("lr", "loss", "grad_norm")
# A GradScaler begins at 2**16 and halves its scale with each step that it skips: 32 in a row.
LEAST_SCALE = 2.0**-16


@dataclass
class Position:
    """Where training stands: in `epoch`, `step` optimiser steps of it done."""

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
        """Goes on where `saved` was written; a file with weights alone restores these.

        The schedule stays as it is: timm's are functions of the position. Raises ValueError if
        `saved` is of another model or optimiser.
        """
        checkpoint.load_weights(self.model, checkpoint.weights_of(saved, source=source), source)
        if self.ema:
            average = saved.get("model_ema") or self.model.state_dict()
            checkpoint.load_weights(self.ema.module, average, source)
        if "optimizer" not in saved or "epoch" not in saved:
            logger.info("%s holds weights alone: training starts at its beginning.", source)
            return
        try:
            checkpoint.load_optimizer(self.optimizer, saved["optimizer"])
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"The optimiser state of {source} does not fit ({error}): resume with the --opt "
                "and the arguments of its run, or start from its weights with --finetune."
            ) from error
        if self.scaler.is_enabled() and saved.get("scaler"):
            self.scaler.load_state_dict(saved["scaler"])
        self.position = Position(saved["epoch"] + 1, saved.get("step", 0), saved.get("meters", []))
        self.max_accuracy = saved.get("max_accuracy", 0.0)
        logger.info("Resumed from %s: %s", source, self.position)


def require_same(
    world: World, data: dict[str, Dataset], model: nn.Module, position: Position | None = None
) -> None:
    """Raises ValueError if the processes found other images or weights, or stand elsewhere."""
    if world.size == 1:
        return
    facts = {"their number of classes": len(next(iter(data.values())).classes)}
    for name, images in data.items():
        facts[f"their number of {name} images"] = len(images)
        facts[f"the names or labels of their {name} images"] = fingerprint(images)
    if position:
        facts["where they stand"] = f"epoch {position.epoch}, step {position.step}"
    facts["their weights"] = digest(model)
    world.peers.agree(facts, "give them the same data and checkpoints")


def looks_every_step(device: torch.device) -> bool:
    """On a GPU a look makes the host wait for the device."""
    return device.type == "cpu"


class StepCheck:
    """All processes together see whether their steps are finite, and whether to stop.

    Called before each optimiser step, it looks there on the CPU; on a GPU only where `look` says
    so, then at all steps since the last look. No checkpoint may be written without one.
    """

    def __init__(self, world: World, stop: StopSignal | None, advice: str) -> None:
        self.world, self.stop, self.advice = world, stop, advice
        self.every_step = looks_every_step(world.device)
        self.broken = torch.zeros((), dtype=torch.bool, device=world.device)

    def __call__(
        self,
        loss: Tensor,
        norm: Tensor,
        *,
        look: bool,
        where: str,
        lr: float,
        scaler: torch.amp.GradScaler | None = None,
    ) -> bool:
        """Whether any process was told to stop, as far as it looks.

        A `scaler` that is enabled skips steps whose gradient norm is not finite by itself. Raises
        FloatingPointError, naming `where` it is, on all processes if any is not finite.
        """
        told = bool(self.stop)  # in every step, for then it listens anew
        scaled = scaler is not None and scaler.is_enabled()
        self.broken |= ~loss.isfinite() if scaled else ~(loss.isfinite() & norm.isfinite())
        if not (look or self.every_step):
            return False
        collapsed = scaled and scaler.get_scale() <= LEAST_SCALE
        flags = torch.stack([self.broken, *map(self.broken.new_tensor, (told, collapsed))]).int()
        broken, stopping, collapsed = self.world.reduce(flags, dist.ReduceOp.MAX).tolist()
        if broken or collapsed:
            problem = f"Loss {loss.item()} or gradient norm {norm.item()} is not finite"
            if collapsed:
                problem = f"Gradients are not finite at a loss scale of {scaler.get_scale():.3g}"
            raise FloatingPointError(
                f"{problem} ({where}, rank {self.world.rank}, learning rate {lr:.3g}); the last "
                f"checkpoint is untouched. {self.advice}"
            )
        return bool(stopping)


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
) -> tuple[dict[str, float], float]:
    """What is left of the `steps` of an epoch; returns means over the epoch and images/s.

    A step takes `accumulate` batches of `loader`, which starts at `position`; `position` is moved
    on. `set_lr(epoch, step)` comes before each step, `after_step()` after it.

    Raises Interrupted after a step when `stop` was signalled to any process, and
    FloatingPointError, on all processes together, when a loss or gradient norm is not finite: on
    the CPU before the optimiser step, on a GPU within `LOG_INTERVAL` steps, and before it leaves.
    """
    model.train(train_mode)
    device, epoch = world.device, position.epoch
    saved = position.meters[world.rank] if position.meters else {}
    meters = {name: Mean(device, *saved.get(name, ())) for name in METERS}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    progress = Progress(
        f"Epoch: [{epoch}]", steps, images_per_step,
        start=position.step, interval=LOG_INTERVAL, show=world.is_main,
    )  # fmt: skip
    check = StepCheck(world, stop, "Try a lower --lr, --clip-grad 1 or --no-amp.")
    batches = iter(loader)
    stopping = False
    while position.step < steps and not stopping:
        step = position.step
        seed_everything(seed, epoch, step, world.rank)
        set_lr(epoch, step)
        loss = torch.zeros((), device=device)
        for part in range(accumulate):
            samples, targets = (x.to(device, non_blocking=True) for x in next(batches))
            samples, targets = batch_transform(samples, targets)
            with without_sync(model) if part < accumulate - 1 else nullcontext():
                with autocast(device, amp_dtype):
                    part_loss = criterion(samples, model(samples), targets) / accumulate
                scaler.scale(part_loss).backward()
            loss += part_loss.detach()
        scaler.unscale_(optimizer)
        norm = clip_gradients(parameters, clip_grad)
        lr = optimizer.param_groups[0]["lr"]
        where, look = f"epoch {epoch}, step {step}", progress.due(step)
        stopping = check(loss, norm, look=look, where=where, lr=lr, scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        after_step()
        for name, value in zip(METERS, (lr, loss, norm), strict=True):
            meters[name].update(value)
        shown = {"lr": lr, "loss": loss, "grad_norm": norm} if progress.due(step) else {}
        progress.update(step, **shown)
        position.step += 1
    images_per_second = progress.close()
    if position.step == steps > progress.start and world.size > 1:
        distribute_bn(model, world.size)  # each process has averages of its own batches
    position.meters = world.gather({name: meter.state() for name, meter in meters.items()})
    if stopping:
        raise Interrupted
    return {name: meter.over(world) for name, meter in meters.items()}, images_per_second


def train_and_save(
    one_epoch: Callable[[], tuple[dict[str, float], float]],
    position: Position,
    save: Callable[[], None],
    at_end: bool = True,
) -> tuple[dict[str, float], float]:
    """`one_epoch()`, saved when it is interrupted, and `at_end` so that an evaluation may fail.

    An epoch that had ended before is not saved again.
    """
    begun = position.step
    try:
        result = one_epoch()
    except Interrupted:
        save()
        raise
    if at_end and position.step > begun:
        save()
    return result


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    world: World,
    images: int,
    amp_dtype: torch.dtype | None = None,
    stop: StopSignal | None = None,
    per_class: Tensor | None = None,
) -> tuple[dict[str, float], float]:
    """Loss, top-1 and top-5 accuracy (in %) over all processes' shards, and images/s.

    `images` is the size of the whole set. `per_class`, zeros `[K, 2]` on the device, receives each
    class's images and how many of them are classified correctly. Raises, on all processes together,
    Interrupted when `stop` was signalled to any, and FloatingPointError if the loss is not finite.
    """
    model.eval()
    # loss, top-1, top-5, images, stopped
    sums = torch.zeros(5, dtype=torch.float64, device=world.device)
    per_step = math.ceil(images / max(len(loader), 1))
    progress = Progress("Test:", len(loader), per_step, interval=LOG_INTERVAL, show=world.is_main)
    for step, (samples, targets) in enumerate(loader):
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
    images_per_second = images / progress.seconds()  # also where a process has none of them
    require_finite(loss)
    stats = {"loss": loss / count, "acc1": 100 * top1 / count, "acc5": 100 * top5 / count}
    logger.info("* Acc@1 %.3f Acc@5 %.3f loss %.3f", stats["acc1"], stats["acc5"], stats["loss"])
    return stats, images_per_second


def require_finite(loss: float) -> None:
    """Raises FloatingPointError for a loss of an evaluation that is not finite."""
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"The loss of the evaluation is {loss}: the weights, or what is computed from them, "
            "are not finite. Use an earlier checkpoint, or evaluate in float32."
        )


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def without_sync(model: nn.Module) -> object:
    return model.no_sync() if hasattr(model, "no_sync") else nullcontext()
