"""Processes, devices, random states, meters and progress: what training and evaluation share."""

import csv
import importlib.metadata
import io
import json
import logging
import math
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import numpy as np
import torch
import torch.distributed as dist
import yaml
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

logger = logging.getLogger(__name__)


# ------------------------------------------------------------------------- processes and devices


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


def setup_logging(is_main: bool) -> None:
    """Plain lines on standard output: all from the main process, only warnings from the others."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files need not be UTF-8
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(
        level=logging.INFO if is_main else logging.WARNING,
        format="%(message)s",
        stream=sys.stdout,
        force=True,
    )


class StopSignal:
    """Remembers SIGTERM and SIGINT, so that a run can save before it leaves.

    Asked, it also listens anew, for Triton's compiler puts LLVM's handlers in the place of others:
    these step aside at a first signal, but a second one meanwhile, as launchers send it, would end
    the process at once.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
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
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number: int, _frame: object) -> None:
        self.received = signal.Signals(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C ends at once


class Interrupted(Exception):
    """A run was asked to stop, and stands where it can be saved."""


# ------------------------------------------------------------------------------- random states


def seed_everything(*entropy: int) -> None:
    """Seeds Python, numpy and torch by a mix of `entropy`.

    Called with (seed, epoch, step, rank) at every step, it makes dropout, stochastic depth and
    mixup pure functions of the position in training: a resumed run needs no saved random states.
    """
    words = np.random.SeedSequence(entropy).generate_state(3).tolist()
    random.seed(words[0])
    np.random.seed(words[1])
    torch.manual_seed(words[2])


# ----------------------------------------------------------------------------- meters and progress


class Mean:
    """Running mean that stays on the device until it is read."""

    def __init__(self, device: torch.device, total: float = 0.0, count: int = 0) -> None:
        self.total = torch.tensor(total, dtype=torch.float64, device=device)
        self.count = count

    def update(self, value: Tensor | float) -> None:
        self.total += value
        self.count += 1

    def state(self) -> tuple[float, int]:
        return self.total.item(), self.count

    def over(self, world: World) -> float:
        """Mean over the updates of all processes."""
        sums = torch.stack([self.total, torch.full_like(self.total, self.count)])
        total, count = world.reduce(sums).tolist()
        return total / max(count, 1)


class Progress:
    """A bar with images/s and time left on a terminal, else a plain line every `interval` steps.

    `images` counts the images, or what `unit` says, of one step over all processes.
    """

    def __init__(
        self,
        header: str,
        steps: int,
        images: int,
        *,
        start: int = 0,
        interval: int,
        show: bool,
        unit: str = "img",
    ) -> None:
        self.header, self.steps, self.images, self.start = header, steps, images, start
        self.interval, self.unit = interval, unit
        self.began = time.perf_counter()
        self.lap_start, self.lap_began = start, self.began
        self.bar = tqdm(
            desc=header,
            total=steps * images,
            initial=start * images,
            unit=unit,
            unit_scale=unit != "img",
            leave=False,
            disable=not (show and sys.stdout.isatty()),
            file=sys.stdout,
        )

    def due(self, step: int) -> bool:
        return step % self.interval == 0 or step == self.steps - 1

    def update(self, step: int, **values: Tensor | float) -> None:
        """Step `step` is done; `values` are shown if it is due."""
        self.bar.update(self.images)
        if not self.due(step):
            return
        text = "  ".join(f"{name}: {value:.4g}" for name, value in values.items())
        self.bar.set_postfix_str(text, refresh=False)
        if self.bar.disable:
            rate = (step + 1 - self.start) / self.seconds()
            eta = timedelta(seconds=int((self.steps - step - 1) / rate))
            logger.info(
                "%s  [%*d/%d]  eta: %s  %s  %s/s: %.1f",
                self.header, len(str(self.steps)), step, self.steps, eta, text, self.unit,
                rate * self.images,
            )  # fmt: skip

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The block's time does not count."""
        began = time.perf_counter()
        yield
        pause = time.perf_counter() - began
        self.began += pause
        self.lap_began += pause

    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self.began

    def speed(self, done: int) -> float:
        """Images/s since the start, after `done` steps."""
        return (done - self.start) * self.images / self.seconds()

    def lap(self, done: int) -> float:
        """Images/s since the last lap, or the start, after `done` steps."""
        now = time.perf_counter()
        speed = (done - self.lap_start) * self.images / (now - self.lap_began)
        self.lap_start, self.lap_began = done, now
        return speed

    def close(self) -> float:
        """Ends the display; returns images/s since the start."""
        self.bar.close()
        return self.speed(self.steps)


@contextmanager
def peak_memory(device: torch.device) -> Iterator[SimpleNamespace]:
    """Measures `.bytes`, the most memory the block held above what was held at its start.

    Allocated memory on a GPU, resident memory of the process on the CPU (exact on Linux; elsewhere
    what an earlier peak hides is not seen).
    """
    result = SimpleNamespace(bytes=0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        yield result
        result.bytes = torch.cuda.max_memory_allocated(device) - start
        return
    start = _resident_peak(reset=True)
    yield result
    result.bytes = _resident_peak() - start


def _resident_peak(reset: bool = False) -> int:
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# ------------------------------------------------------------------------------ a run's folder


class Journal:
    """`log.txt`, TensorBoard and `args.yaml` in a run's folder; silent where the folder is None.

    `first_epoch` is where the run goes on: what a killed run logged from there on is dropped.
    `clock` names what counts the records, where it is not epochs.
    """

    def __init__(
        self,
        folder: str | Path | None,
        facts: dict[str, Any],
        first_epoch: int,
        clock: str = "epoch",
    ) -> None:
        self.clock = clock
        self.folder = Path(folder) if folder else None
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with _replacing(self.folder / "args.yaml") as file:
            yaml.safe_dump(facts, file, sort_keys=False)
        self._drop_from(first_epoch)
        self.board = SummaryWriter(str(self.folder), purge_step=first_epoch)

    def write(self, stats: dict[str, Any], **speeds: float) -> None:
        """Adds a record: one line of JSON, and every number to TensorBoard, `speeds` there only."""
        if self.folder is None:
            return
        with (self.folder / "log.txt").open("a") as file:
            file.write(json.dumps(stats) + "\n")
        for name, value in {**stats, **speeds}.items():
            if name not in (self.clock, "n_parameters"):
                self.board.add_scalar(name.replace("_", "/", 1), value, stats[self.clock])
        self.board.flush()

    def _drop_from(self, epoch: int) -> None:
        log = self.folder / "log.txt"
        if not log.exists():
            return
        lines = log.read_text().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        temporary = log.with_name(".log.txt.saving")
        temporary.write_text("".join(ln for ln in whole if json.loads(ln)[self.clock] < epoch))
        os.replace(temporary, log)


def require_writable(folder: Path, world: World, argument: str = "--output_dir") -> None:
    """Raises ValueError on all processes if the main one cannot write to `folder`.

    What is made to find out is removed again. `argument` is the user's name of the folder.
    """
    problem = _obstacle(folder) if world.is_main else None
    if problem := world.gather(problem)[0]:
        raise ValueError(f"{argument} {folder} {problem}")


def _obstacle(folder: Path) -> str | None:
    """Why nothing can be written to a folder, None if it can."""
    missing = []
    try:
        if not str(folder).isprintable():
            return "is no plain UTF-8: choose another name."
        if folder.exists() and not folder.is_dir():
            return "is a file: choose a folder."
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            return None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        return f"cannot be written to ({reason}): choose another folder."
    finally:
        for path in missing:
            with suppress(OSError, ValueError):
                path.rmdir()


def write_scores(
    folder: Path, facts: dict[str, Any], classes: list[str], per_class: list[list[float]]
) -> None:
    """`eval.json`, and `per_class.csv` with class, images, correct and accuracy in %.

    Bytes of class names that are no UTF-8 are written as \\udcXX.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _replacing(folder / "eval.json") as file:
        file.write(json.dumps(facts, indent=2) + "\n")
    with _replacing(folder / "per_class.csv") as file:
        rows = csv.writer(file)
        rows.writerow(["class", "images", "correct", "acc1"])
        for name, (images, correct) in zip(classes, per_class, strict=True):
            rows.writerow(
                [name, int(images), int(correct), round(100 * correct / max(images, 1), 3)]
            )


@contextmanager
def _replacing(path: Path) -> Iterator[TextIO]:
    """A file that takes the place of `path` when it is whole."""
    temporary = path.with_name(f".{path.name}.saving")
    try:
        with temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def provenance() -> dict[str, str]:
    """What a result depends on beside the arguments: versions, git commit, command, hardware."""
    packages = ("torch", "torchvision", "timm", "numpy")
    git = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
    ]
    commit = _output_of(git, otherwise="unknown")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {
        "command": " ".join(sys.argv),
        "commit": commit,
        "python": sys.version.split()[0],
        **{name: importlib.metadata.version(name) for name in packages},
        "device": device,
    }


def _output_of(command: list[str], otherwise: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return otherwise


# ------------------------------------------------------------------------------ the command line


def run_command(name: str, build: Callable[[], Callable[[], None]]) -> None:
    """Runs a command: `build()` reads and checks everything, what it returns does the work.

    A ValueError of `build` is the user's: its sentence on standard error, from the main process,
    and exit code 2. A FloatingPointError of the work is told likewise, with exit code 1.
    """
    is_main = True
    try:
        is_main = launched_as()[0] == 0
        setup_logging(is_main)
        work = build()
    except ValueError as error:
        if is_main:
            print(f"{name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    try:
        work()
    except FloatingPointError as error:
        sys.exit(f"{name}: error: {error}")
    if dist.is_initialized():
        dist.destroy_process_group()


def outside(number: float, interval: str) -> str | None:
    """What is wrong with a number that is not in an interval such as "[0, 1)"; None if it is."""
    low, high = map(float, interval[1:-1].split(","))
    above = number >= low if interval[0] == "[" else number > low
    below = number <= high if interval[-1] == "]" else number < high
    if above and below:
        return None
    if not math.isfinite(number):
        return f"must be a finite number, not {number}"
    if interval == "[0, inf)":
        return f"must not be negative, but is {number}"
    if high == math.inf:
        return f"must be {'at least' if interval[0] == '[' else 'above'} {low:g}, not {number}"
    if interval[0] + interval[-1] == "()":
        return f"must be between {low:g} and {high:g}, not {number}"
    return f"must be in {interval}, not {number}"
