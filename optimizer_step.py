"""One optimiser step, as all training takes it, and the look at whether it is finite."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from operator import add
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from compilation import begin_step
from optimization import clip_gradients, learning_rate
from processes import StopSignal, World
from utils import seed_everything

# A GradScaler begins at 2**16 and halves its scale with each step that it skips: 32 in a row.
LEAST_SCALE = 2.0**-16

Reading = tuple[float, float]  # loss and gradient norm of a step


class OptimizerStep:
    """Steps of an optimiser over all processes, each from the mean of their gradients.

    `model` is as `World.distributed` returns it. `stop` was signalled to some process once
    `stopping` is true, which all see after the same step. `advice` is what to try where a step is
    not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        world: World,
        *,
        seed: int = 0,
        accumulate: int = 1,
        clip_grad: float | None = None,
        scaler: torch.amp.GradScaler | None = None,
        stop: StopSignal | None = None,
        advice: str = "",
    ) -> None:
        self.model, self.optimizer, self.world = model, optimizer, world
        self.seed, self.accumulate, self.clip_grad = seed, accumulate, clip_grad
        self.scaler = scaler or torch.amp.GradScaler(world.device.type, enabled=False)
        self.check = StepCheck(world, self.scaler, stop, advice)
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.stopping = False

    def __call__(
        self,
        batches: Iterator[Any],
        loss_of: Callable[[Any], Tensor],
        *,
        look: bool,
        **position: int,
    ) -> list[Reading]:
        """The readings of the steps that the host looked at, this one the last.

        There are none where it did not look: on a GPU, without `look`. The loss of the step is the
        sum of `loss_of(batch)` over the next `accumulate` of `batches`. All random numbers, those
        of `batches` too, are a function of `position`, the seed and the rank.

        Raises FloatingPointError, on all processes together and before the weights change, if a
        step that is looked at is not finite on any.
        """
        seed_everything(self.seed, *position.values(), self.world.rank)
        begin_step()  # not for each part: gradients are outputs, too
        loss = reduce(add, self._backward(batches, loss_of))
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.parameters, self.clip_grad)
        where = ", ".join(f"{name} {value}" for name, value in position.items())
        lr = learning_rate(self.optimizer)
        readings, self.stopping = self.check(loss, norm, look=look, where=where, lr=lr)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return readings

    def _backward(
        self, batches: Iterator[Any], loss_of: Callable[[Any], Tensor]
    ) -> Iterator[Tensor]:
        """Adds up the gradients, of which the last part takes the mean over processes."""
        for part in range(self.accumulate):
            batch = next(batches)
            last = part == self.accumulate - 1
            with nullcontext() if last else without_sync(self.model):
                loss = loss_of(batch)
                self.scaler.scale(loss).backward()
            yield loss.detach()


class StepCheck:
    """All processes together see whether their steps are finite, and whether to stop.

    Called before each optimiser step, it looks there on the CPU; on a GPU only where `look` says
    so, then at all steps since the last look: until then nothing is launched for it, and the host
    does not wait. No checkpoint may be written without one.
    """

    def __init__(
        self, world: World, scaler: torch.amp.GradScaler, stop: StopSignal | None, advice: str
    ) -> None:
        self.world, self.scaler, self.stop, self.advice = world, scaler, stop, advice
        self.every_step = looks_every_step(world.device)
        self.unread: list[Tensor] = []

    def __call__(
        self, loss: Tensor, norm: Tensor, *, look: bool, where: str, lr: float
    ) -> tuple[list[Reading], bool]:
        """What was read of the steps since the last look, and whether any process has to stop.

        A scaler that is enabled skips steps whose gradient norm is not finite by itself. Raises
        FloatingPointError, naming `where` it is, on all processes if any is not finite.
        """
        stop = bool(self.stop)  # in every step: reading it sets its handlers again
        self.unread += [loss, norm]
        if not (look or self.every_step):
            return [], False
        values = torch.stack(self.unread).tolist()
        self.unread.clear()
        readings = list(zip(values[::2], values[1::2], strict=True))
        scaled = self.scaler.is_enabled()
        finite = map(math.isfinite, values[::2] if scaled else values)
        collapsed = scaled and self.scaler.get_scale() <= LEAST_SCALE
        flags = torch.tensor([not all(finite), stop, collapsed], dtype=torch.int)
        flags = self.world.reduce(flags.to(self.world.device), dist.ReduceOp.MAX)
        broken, stopping, collapsed = flags.tolist()
        if broken or collapsed:
            raise FloatingPointError(
                f"{self._problem(readings, collapsed)} ({where}, rank {self.world.rank}, learning "
                f"rate {lr:.3g}); the last checkpoint is untouched. {self.advice}"
            )
        return readings, bool(stopping)

    def _problem(self, readings: list[Reading], collapsed: int) -> str:
        if collapsed:
            scale = self.scaler.get_scale()
            return f"Gradients are not finite at a loss scale of {scale:.3g}"
        broken = (pair for pair in readings if not all(map(math.isfinite, pair)))
        loss, norm = next(broken, readings[-1])
        return f"Loss {loss} or gradient norm {norm} is not finite"


def looks_every_step(device: torch.device) -> bool:
    """On a GPU a look makes the host wait for the device."""
    return device.type == "cpu"


def without_sync(model: nn.Module) -> AbstractContextManager:
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()
