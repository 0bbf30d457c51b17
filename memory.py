"""Peak memory of a block of code."""

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch


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
