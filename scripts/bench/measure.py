"""Time and peak memory of cases, each of which takes its turn in every round.

So a machine that slows down slows them all. On a GPU time is that between two CUDA events around
several iterations; the mixer's default inputs are larger than the L2 cache. On the CPU memory is
measured in a process for each case.
"""

import ctypes
import gc
import multiprocessing
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from math import nan
from statistics import median
from timeit import timeit
from typing import Any

import torch

from scripts.bench import cases as bench
from scripts.bench.cases import OUT_OF_MEMORY, Case
from scripts.bench.steps import Step, images, prepare
from utils import peak_memory
from workers import end_with_parent

TURN = 0.02  # seconds that a turn takes at least: short cases get several iterations
# Notes by what errors say: of memory, on a GPU, on the CPU and of a process that the system ended;
# and of a backend that the device or the shape rules out.
NOTES = {"out of memory": OUT_OF_MEMORY, "can't allocate memory": OUT_OF_MEMORY,
         "terminated abruptly": OUT_OF_MEMORY, "No available kernel": "not available",
         "No viable backend": "not available"}  # fmt: skip

# Forks processes from one that has imported the libraries and done nothing else.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["timm", "torch.utils.tensorboard"])


def measure(cases: list[Case], repeats: int, budget: float) -> list[Case]:
    """Fills in the results of a group of cases, which is returned.

    Time is the median of `repeats` turns, or of as many as fit into `budget` seconds for each case.
    Where not even one fits, it is that of the first run.
    """
    steps = []
    for case in cases:
        with noting_failure(case):
            alone = in_new_process(peak_bytes, case) if case.device == "cpu" else 0
            steps.append(first_run(case))
            case.bytes = alone or case.bytes
    take_turns(steps, repeats, budget)
    steps.clear()
    images.cache_clear()
    gc.collect()
    torch.cuda.empty_cache()
    if cases[0].compiled:
        torch._dynamo.reset()
    return cases


def peak_bytes(case: Case) -> int:
    first_run(case)
    return case.bytes


def first_run(case: Case) -> Step:
    """After a warm-up, one run; it gives peak memory and how many iterations make a turn."""
    step = prepare(case)
    few = {"batch": 1, "tokens": 5, "pixels": min(case.pixels, 2 * bench.PATCH)}
    slow = case.device == "cpu" and not case.compiled  # it warms up on a few patches
    begin(prepare(replace(case, **few)) if slow else step)()
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)  # glibc keeps freed memory, in which a peak could hide
    with peak_memory(torch.device(case.device)) as peak:
        case.seconds = begin(step)()
    case.runs, case.bytes = 1, step.held + peak.bytes
    case.iterations = max(1, min(100, round(TURN / case.seconds)))
    return step


def take_turns(steps: Sequence[Step], repeats: int, budget: float) -> None:
    for _ in range(repeats):
        begun = []
        for step in steps:
            if step.fits(budget):
                with noting_failure(step.case):
                    begun.append((step, begin(step)))
        for step, read in begun:  # a GPU is still at work
            step.taken.append(read())
    for step in steps:
        if step.taken and not step.case.note:
            step.case.seconds = median(step.taken) / step.case.iterations
            step.case.runs = len(step.taken)


def begin(step: Step) -> Callable[[], float]:
    """Runs a turn; what is returned waits for its end and gives its seconds.

    Those of a layer are the host's, begun with an idle GPU: they end with the last launch.
    """
    on_cpu = step.case.device == "cpu"
    with step.context():
        if on_cpu or step.case.step in bench.LAYER:
            idle = "pass" if on_cpu else torch.cuda.synchronize
            taken = timeit(step.run, idle, number=step.case.iterations)
            return lambda: taken
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(step.case.iterations):
            step.run()
        end.record()

    def read() -> float:
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return read


def in_new_process(function: Callable, *arguments: object) -> Any:
    """What it returns there, with as many threads as here."""
    with ProcessPoolExecutor(1, mp_context=processes, initializer=end_with_parent) as fresh:
        fresh.submit(torch.set_num_threads, torch.get_num_threads())
        return fresh.submit(function, *arguments).result()


@contextmanager
def noting_failure(case: Case) -> Iterator[None]:
    """A case that fails is reported as such, and the others go on."""
    try:
        yield
    except Exception as error:
        case.note = next((note for words, note in NOTES.items() if words in str(error)), "")
        if not case.note:
            traceback.print_exc()
            case.note = f"failed: {type(error).__name__}"
        case.seconds = nan
