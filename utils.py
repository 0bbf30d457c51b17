"""How commands run and report errors, random seeds, and peak memory."""

import hashlib
import io
import logging
import math
import os
import random
import resource
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, Subset

from processes import Peers, meet
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


def run_command(
    name: str, build: Callable[[Peers], Callable[[], None]], dist_url: str = "env://"
) -> None:
    """Runs a command: `build(peers)` reads and checks everything, what it returns does the work.

    A ValueError of `build` is the user's: its sentence on standard error, from the main process,
    or from each whose error is another, and exit code 2. A FloatingPointError of the work is told
    likewise, with exit code 1. An error of one process ends all.
    """

    def tell(problem: str) -> None:
        print(without_secrets(f"{name}: error: {problem}"), file=sys.stderr, flush=True)

    try:
        peers = meet(dist_url)
        setup_logging(peers.rank == 0)
    except ValueError as error:
        tell(str(error))
        sys.exit(2)
    with peers.together(name):
        try:
            work = build(peers)
            peers.settle()
        except ValueError as error:
            if peers.rank == 0:
                tell(str(error))
            if not peers.settle(str(error)):
                tell(f"{peers}: {error}")
            sys.exit(2)
        try:
            work()
        except FloatingPointError as error:
            tell(str(error))
            sys.exit(1)


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
    seed_torch(words[2])


def seed_torch(seed: int) -> None:
    """Seeds the CPU and the current GPU.

    `torch.manual_seed` also prepares seeds of kinds of devices that are not in use, with a stack
    trace for each, and takes ten times as long.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(seed)
    elif torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)  # once it is initialised


def make_deterministic() -> None:
    """Operations give the same bits in each run, or raise RuntimeError if they cannot.

    To be called before anything is computed on a GPU.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # which nobody reads


def fingerprint(dataset: Dataset) -> str:
    """Tells apart data sets with other files, below wherever they are, labels or classes.

    Those that are downloaded are known by their classes and length: their files are verified.
    """
    if isinstance(dataset, Subset):
        dataset = dataset.dataset
    samples = getattr(dataset, "samples", [])
    where = len(os.path.commonprefix([path for path, _ in samples]))
    lines = [f"{path[where:]}\t{label}" for path, label in samples]
    text = "\n".join([*map(str, dataset.classes), str(len(dataset)), *lines])
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:8]


def digest(model: nn.Module) -> str:
    """A checksum of the weights, in eight hexadecimal digits."""
    value = 0
    for tensor in model.state_dict().values():
        value = zlib.crc32(
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy(), value
        )
    return f"{value:08x}"


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
