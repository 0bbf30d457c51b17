"""Seeds and deterministic operations, fingerprints of data and weights, and peak memory."""

import hashlib
import os
import random
import resource
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Subset


def seed_everything(*entropy: int) -> None:
    """Seeds Python, numpy and torch by a mix of `entropy`.

    Called with (seed, epoch, step, rank) at every step, it makes dropout, stochastic depth and
    mixup pure functions of the position in training: a resumed run needs no saved random states.
    """
    seed = seed_host(*entropy)
    if torch.cuda.is_initialized():
        torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(seed)
    elif torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)  # once it is initialised


def seed_host(*entropy: int) -> int:
    """Seeds Python, numpy and torch's CPU generator by a mix of `entropy`; returns torch's seed.

    `torch.manual_seed` would also prepare seeds of all kinds of devices, with a stack trace for
    each, which takes ten times as long.
    """
    words = np.random.SeedSequence(entropy).generate_state(3).tolist()
    random.seed(words[0])
    np.random.seed(words[1])
    torch.default_generator.manual_seed(words[2])
    return words[2]


def make_deterministic() -> None:
    """Operations give the same bits in each run, or raise RuntimeError if they cannot.

    To be called before anything is computed on a GPU.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    deterministic: Any = torch.utils.deterministic
    deterministic.fill_uninitialized_memory = False  # which nobody reads


def fingerprint(dataset: Any) -> str:
    """Tells apart data sets with other files, below wherever they are, labels or classes.

    Those that are downloaded are known by their classes and length: their files are verified.
    """
    if isinstance(dataset, Subset):
        dataset = dataset.dataset
    known = hasattr(dataset, "sample")
    samples = [dataset.sample(index) for index in range(len(dataset))] if known else []
    where = len(os.path.commonprefix([path for path, _ in samples]))  # noqa: RUF071 (characters)
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
            Path("/proc/self/clear_refs").write_bytes(b"5")
        status = Path("/proc/self/status").read_bytes()
        return int(status.split(b"VmHWM:")[1].split()[0]) * 1024
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
