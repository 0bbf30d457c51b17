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

TRACED = 10
COMPUTING = {"kernel", "gpu_memcpy", "gpu_memset", "cpu_op"}  # of Chrome's trace; cpu_op on a CPU


class MeanColour(nn.Linear):
    """A linear classifier of the mean pixel: a step of next to nothing, the loop around it left."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.mean((2, 3)))


default_cfgs = generate_default_cfgs({"mean_colour": {}})


@register_model
def mean_colour(pretrained: bool = False, num_classes: int = 1000, **_: object) -> MeanColour:
    return MeanColour(3, num_classes)


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
        self.output, self.warm_up, self.steps = output, warm_up, steps
        self.step = 0

    def __call__(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self.step += 1
        timed = self.step - self.warm_up
        if timed not in (0, self.steps, self.steps + TRACED):
            return
        cuda = optimizer.param_groups[0]["params"][0].is_cuda
        if cuda:
            torch.cuda.synchronize()
        passed = time.perf_counter()
        if timed == self.steps:
            self.seconds = (passed - self.began) / self.steps
            self.profile = profile(activities=[ProfilerActivity.CUDA if cuda
                                               else ProfilerActivity.CPU])  # fmt: skip
            self.profile.start()
        elif timed > self.steps:
            self.profile.stop()
            self.write(passed - self.began, cuda)
        self.began = time.perf_counter()

    def write(self, traced: float, cuda: bool) -> None:
        if os.environ.get("RANK", "0") != "0":
            return
        with tempfile.TemporaryDirectory() as folder:
            self.profile.export_chrome_trace(f"{folder}/trace.json")
            trace = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        facts = {"seconds": self.seconds, "busy": busy_seconds(trace) / traced,
                 "bytes": torch.cuda.max_memory_allocated() if cuda else resident}  # fmt: skip
        self.output.write_text(json.dumps(facts))


def main(output: str, warm_up: str, steps: str, name: str, *arguments: str) -> None:
    register_optimizer_step_post_hook(Watch(Path(output), int(warm_up), int(steps)))
    sys.argv = [name, *arguments]
    runpy.run_module(name.removesuffix(".py"), run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
