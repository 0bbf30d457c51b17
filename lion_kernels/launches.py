"""Launches of a call, recorded for each layout of its tensors and then repeated.

Triton's own way to a launch looks at every argument, which takes longer than small kernels run.
What it finds depends on shapes, dtypes, alignment and options alone: later calls put the addresses
of their tensors into the arguments that were recorded.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from lion_kernels import tuning

ALIGNMENT = 512  # bytes; Triton asks for 16
MOST_RECORDINGS = 1024


class Launches:
    """Launches kernels, and keeps what is needed to repeat them with other tensors."""

    def __init__(self, tensors: Sequence[Tensor | None]):
        self.tensors = [t for t in tensors if t is not None]
        self.scratch: list[Tensor] = []
        self.steps: list[tuple[Any, tuple[int, ...], list[Any]]] = []

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor for the time of the call."""
        self.scratch.append(self.tensors[0].new_empty(shape, dtype=dtype))
        return self.scratch[-1]

    def launch(self, kernel: triton.JITFunction, grid: tuple[int, ...], **arguments: Any) -> None:
        """`arguments` by name, launch options among them."""
        compiled = kernel[grid](**arguments)
        values = [arguments[name] for name in kernel.arg_names]
        self.steps.append((compiled, (*grid, 1, 1)[:3], values))

    def recording(self) -> "Recording | None":
        """None where it could not be repeated: interpreted, or of tensors that overlap."""
        ranges, scratch = [], 0
        for i, tensor in enumerate(self.tensors):
            ranges.append((tensor.data_ptr(), tensor.nbytes, i, 0))
        for tensor in self.scratch:
            ranges.append((tensor.data_ptr(), tensor.nbytes, len(self.tensors), scratch))
            scratch += triton.cdiv(tensor.nbytes, ALIGNMENT) * ALIGNMENT
        ranges = sorted(r for r in ranges if r[1] > 0)
        overlap = any(a[0] + a[1] > b[0] for a, b in zip(ranges, ranges[1:], strict=False))
        if overlap or any(compiled is None for compiled, *_ in self.steps):
            return None
        steps = []
        for compiled, grid, values in self.steps:
            pointers = [i for i, value in enumerate(values) if isinstance(value, Tensor)]
            slots = [(i, *_place(values[i], ranges)) for i in pointers if values[i].numel()]
            steps.append(
                (compiled[grid], [0 if isinstance(v, Tensor) else v for v in values], slots)
            )
        return Recording(steps, scratch)


def _place(tensor: Tensor, ranges: list[tuple[int, int, int, int]]) -> tuple[int, int]:
    """Which of a call's tensors this one lies in, and at what byte."""
    address = tensor.data_ptr()
    return next(
        (i, offset + address - start)
        for start, size, i, offset in ranges
        if start <= address < start + size
    )


@dataclass
class Recording:
    """Of each launch: what runs it, its arguments with 0 for tensors, and these by
    (place among the arguments, tensor of the call, byte); the last tensor is scratch."""

    steps: list[tuple[Callable, list[Any], list[tuple[int, int, int]]]]
    scratch: int  # bytes

    def repeat(self, like: Tensor, addresses: list[int]) -> None:
        workspace = like.new_empty(self.scratch, dtype=torch.uint8)
        addresses = [*addresses, workspace.data_ptr()]
        for run, values, slots in self.steps:
            values = values.copy()
            for place, i, offset in slots:
                values[place] = addresses[i] + offset
            run(*values)


_recordings: dict[Any, Recording | None] = {}


def run(schedule: Callable, tensors: Sequence[Tensor | None], options: tuple[Any, ...]) -> None:
    """Launches what `schedule(launches, tensors, options)` launches, of contiguous `tensors`."""
    given = [t for t in tensors if t is not None]
    addresses = [t.data_ptr() for t in given]
    aligned = not any(address % 16 for address in addresses)
    layout = tuple(None if t is None else (t.shape, t.dtype) for t in tensors)
    # `make_plan` is replaced to tune it.
    key = (schedule, tuning.make_plan, given[0].device, layout, options)
    recording = _recordings.get(key) if aligned else None
    if recording is not None:
        return recording.repeat(given[0], addresses)
    launches = Launches(tensors)
    schedule(launches, tensors, options)
    if aligned:
        if len(_recordings) >= MOST_RECORDINGS:
            _recordings.clear()
        _recordings[key] = launches.recording()
