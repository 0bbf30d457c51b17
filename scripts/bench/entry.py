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
import time
from collections.abc import Generator, Sequence
from pathlib import Path

import torch
from timm.models import generate_default_cfgs, register_model
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.profiler import ProfilerActivity, profile

TRACED = 10
COMPUTING = {"kernel", "gpu_memcpy", "gpu_memset", "cpu_op"}  # of Chrome's trace; cpu_op on a CPU


default_cfgs = generate_default_cfgs({"mean_colour": {}})


def mean_colour(pretrained: bool = False, num_classes: int = 1000, **_: object) -> nn.Module:
    """A linear classifier of the mean pixel: a step of next to nothing, the loop around it left."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, num_classes))


def busy_seconds(trace: Sequence[dict]) -> float:
    """How long at least one operation of the device ran, of the events of a Chrome trace."""
    spans = sorted((e["ts"], e["ts"] + e["dur"]) for e in trace if e.get("cat") in COMPUTING)
    busy, reached = 0.0, -float("inf")
    for start, end in spans:
        busy += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return busy / 1e6


def now(cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def watch(output: Path, warm_up: int, steps: int) -> Generator[None, Optimizer, None]:
    """Is sent the optimiser after each of its steps, and goes on to the next."""
    for _ in range(warm_up):
        optimizer = yield
    cuda = optimizer.param_groups[0]["params"][0].is_cuda
    start = now(cuda)
    for _ in range(steps):
        yield
    seconds = (now(cuda) - start) / steps
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as traced:
        for _ in range(TRACED):
            yield
        now(cuda)
    if os.environ.get("RANK", "0") == "0":
        path = output.with_name("trace.json")
        traced.export_chrome_trace(str(path))
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        trace = json.loads(path.read_bytes())["traceEvents"]
        busy = busy_seconds(trace) / TRACED / seconds  # tracing makes Python slower, not a GPU
        facts = {"seconds": seconds, "busy": min(busy, 1.0),
                 "bytes": torch.cuda.max_memory_allocated() if cuda else resident}  # fmt: skip
        output.write_text(json.dumps(facts), encoding="utf-8")
    while True:
        yield


def main(output: str, warm_up: str, steps: str, name: str, *arguments: str) -> None:
    watching = watch(Path(output), int(warm_up), int(steps))
    next(watching)
    register_model(mean_colour)
    register_optimizer_step_post_hook(lambda optimizer, *_: watching.send(optimizer))
    sys.argv = [name, *arguments]
    try:
        runpy.run_module(name.removesuffix(".py"), run_name="__main__", alter_sys=True)
    finally:
        watching.close()  # a profiler that the interpreter's end closes crashes


if __name__ == "__main__":
    main(*sys.argv[1:])
