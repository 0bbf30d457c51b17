"""Runs an entry point and times its optimiser steps, in a process of its own.

    python -m scripts.bench.entry OUTPUT WARM_UP STEPS main.py|mlm.pretrain ARGUMENTS ...

After WARM_UP steps the next STEPS are timed, and TRACED more are recorded by PyTorch's profiler,
which tells how long the device computes. Rank 0 writes them to OUTPUT as JSON.
"""

import json
import os
import resource
import runpy
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[2]
TRACED = 10
COMPUTING = {"kernel", "gpu_memcpy", "gpu_memset", "cpu_op"}  # of Chrome's trace; cpu_op on a CPU


class MeanColour(nn.Module):
    """A linear classifier of the mean pixel: a step of next to nothing, the loop around it left."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.head = nn.Linear(3, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(images.mean((2, 3)))


default_cfgs = generate_default_cfgs({"mean_colour": {"input_size": (3, 224, 224)}})


@register_model
def mean_colour(pretrained: bool = False, num_classes: int = 1000, **_: object) -> MeanColour:
    return MeanColour(num_classes)


def busy_seconds(trace: Sequence[dict]) -> float:
    """How long at least one operation of the device ran, of the events of a Chrome trace."""
    spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in trace if e.get("cat") in COMPUTING)
    busy, reached = 0.0, -float("inf")
    for start, end in spans:
        busy += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return busy / 1e6


class Watch:
    """Called after every optimiser step."""

    def __init__(self, output: Path, warm_up: int, steps: int) -> None:
        self.output, self.first, self.last = output, warm_up, warm_up + steps
        self.step, self.times = 0, {}

    def __call__(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self.step += 1
        if self.step not in (self.first, self.last, self.last + TRACED):
            return
        cuda = optimizer.param_groups[0]["params"][0].is_cuda
        if cuda:
            torch.cuda.synchronize()
        self.times[self.step] = time.perf_counter()
        if self.step == self.last:
            self.profile = profile(activities=[ProfilerActivity.CUDA if cuda
                                               else ProfilerActivity.CPU])  # fmt: skip
            self.profile.start()
            self.trace_began = time.perf_counter()
        elif self.step > self.last:
            self.profile.stop()
            self.write(cuda)

    def write(self, cuda: bool) -> None:
        if os.environ.get("RANK", "0") != "0":
            return
        with tempfile.TemporaryDirectory() as folder:
            self.profile.export_chrome_trace(f"{folder}/trace.json")
            trace = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        facts = {
            "seconds": (self.times[self.last] - self.times[self.first]) / (self.last - self.first),
            "busy": busy_seconds(trace) / (self.times[self.last + TRACED] - self.trace_began),
            "bytes": torch.cuda.max_memory_allocated() if cuda else peak,
        }
        self.output.write_text(json.dumps(facts))


def main(output: str, warm_up: str, steps: str, name: str, *arguments: str) -> None:
    register_optimizer_step_post_hook(Watch(Path(output), int(warm_up), int(steps)))
    sys.argv = [name, *arguments]
    if name.endswith(".py"):
        runpy.run_path(str(ROOT / name), run_name="__main__")
    else:
        runpy.run_module(name, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
