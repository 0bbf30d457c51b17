"""How commands run and report errors, random seeds, and peak memory."""

import io
import logging
import math
import random
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist

from processes import launched_as
from urls import without_secrets


class DiscreetFormatter(logging.Formatter):
    """Plain lines, in which URLs have no secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return without_secrets(super().format(record))


def setup_logging(is_main: bool) -> None:
    """Plain lines on standard output: all from the main process, only warnings from the others."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files need not be UTF-8
            stream.reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(DiscreetFormatter("%(message)s"))
    level = logging.INFO if is_main else logging.WARNING
    logging.basicConfig(level=level, handlers=[handler], force=True)


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
            print(f"{name}: error: {without_secrets(str(error))}", file=sys.stderr)
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


def seed_everything(*entropy: int) -> None:
    """Seeds Python, numpy and torch by a mix of `entropy`.

    Called with (seed, epoch, step, rank) at every step, it makes dropout, stochastic depth and
    mixup pure functions of the position in training: a resumed run needs no saved random states.
    """
    words = np.random.SeedSequence(entropy).generate_state(3).tolist()
    random.seed(words[0])
    np.random.seed(words[1])
    torch.manual_seed(words[2])


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
