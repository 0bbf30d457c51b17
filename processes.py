"""The processes of a run: ranks and devices, agreement between them, and signals to stop."""

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """The processes of a run: this one's rank, their number, and the device it works on."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def reduce(self, values: Tensor, op: dist.ReduceOp = dist.ReduceOp.SUM) -> Tensor:
        """`values` reduced over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values, op)
        return values

    def gather(self, value: object) -> list:
        """`value` of every process, by rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process runs the block before the others do (to download, for instance)."""
        if not self.is_main:
            dist.barrier()
        try:
            yield
        finally:  # an error of the main process is for the others to find, too
            if self.is_main and self.size > 1:
                dist.barrier()


LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


def launched_as() -> tuple[int, int]:
    """This process's rank and the number of processes, as torchrun tells them; 0 and 1 without it.

    Raises ValueError if some of its variables are set and others are not, as when a shell still has
    those of another job, or if they are no rank.
    """
    found = {name: os.environ[name] for name in LAUNCHER if name in os.environ}
    if not found:
        return 0, 1
    missing = [name for name in LAUNCHER if name not in found]
    if missing:
        raise ValueError(
            f"The environment has {' and '.join(found)}, but not {' and '.join(missing)}: start "
            f"with torchrun, which sets all, or unset {' '.join(found)}."
        )
    try:
        rank, size, local = (int(found[name]) for name in LAUNCHER)
    except ValueError:
        rank = size = local = -1
    if not 0 <= local <= rank < size:
        given = ", ".join(f"{name}={value}" for name, value in found.items())
        raise ValueError(f"The environment has {given}, which is no rank: start with torchrun.")
    return rank, size


def end_with_launcher() -> None:
    """SIGTERM comes when torchrun dies, so that no process goes on without it (on Linux)."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))  # PR_SET_PDEATHSIG


def init_distributed(device: str = "auto", init_method: str = "env://") -> World:
    """Joins the processes that torchrun started, over NCCL on GPUs and gloo on CPUs.

    `device` is `auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:N`. Raises ValueError if it
    is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"--device {device} needs a CUDA GPU and none was found: use --device cpu."
        )
    rank, size = launched_as()
    end_with_launcher()
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        world = World(rank, size, torch.device(device))
        if world.device.type == "cuda":
            torch.cuda.set_device(world.device)
    except RuntimeError as error:
        raise ValueError(
            f"There is no device {device!r}: use --device auto, cpu, cuda or cuda:N."
        ) from error
    if world.device.type not in ("cpu", "cuda"):
        raise ValueError(f"Not made for {device!r}: use --device auto, cpu, cuda or cuda:N.")
    if size > 1:
        backend = "nccl" if world.device.type == "cuda" else "gloo"
        try:
            dist.init_process_group(backend, init_method=init_method, world_size=size, rank=rank)
        except RuntimeError as error:
            reason = str(error).split("\n")[0]
            raise ValueError(
                f"The processes cannot meet at --dist_url {init_method} ({reason}): use env:// "
                "with torchrun."
            ) from error
    return world


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class StopSignal:
    """Remembers the first of `STOP_SIGNALS`, so that a run can save before it leaves.

    Slurm sends SIGUSR1 or SIGUSR2, as it is told, before a time limit. SIGHUP comes when a terminal
    closes; under nohup it is ignored, and stays so.

    Asked, it also listens anew, for Triton's compiler puts LLVM's handlers in the place of others:
    these step aside at a first signal, but a second one meanwhile, as launchers send it, would end
    the process at once.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        self.numbers = [n for n in STOP_SIGNALS if not (nohup and n is signal.SIGHUP)]
        self._listen()

    def __bool__(self) -> bool:
        if self.received is None:
            self._listen()
        return self.received is not None

    @property
    def exit_code(self) -> int:
        """What a shell reports of a process that the signal ended."""
        return 128 + (self.received or signal.SIGTERM)

    def _listen(self) -> None:
        for number in self.numbers:
            signal.signal(number, self._remember)

    def _remember(self, number: int, _frame: object) -> None:
        self.received = self.received or signal.Signals(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C ends at once


class Interrupted(Exception):
    """A run was asked to stop, and stands where it can be saved."""
