"""Time and peak memory of cases, each of which takes its turn in every round.

So a machine that slows down slows them all. On a GPU time is that between two CUDA events around
several iterations; the mixer's default inputs are larger than the L2 cache. On the CPU memory is
measured in a process for each case.
"""

import ctypes
import gc
import math
import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from statistics import median
from timeit import timeit
from typing import Any

import torch

from scripts.bench import cases as bench
from scripts.bench.cases import OUT_OF_MEMORY, Case, split
from scripts.bench.steps import Step, images, prepare
from utils import peak_memory
from workers import end_with_parent

TURN = 0.02  # seconds that a turn takes at least: short cases get several iterations
OUT_OF_TIME, ONLY_FASTEST = "no time left", "slower alone, not compiled"
# Notes by what errors say: of memory, on a GPU, on the CPU and of a process that the system ended;
# and of a backend that the device or the shape rules out.
NOTES = {"out of memory": OUT_OF_MEMORY, "can't allocate memory": OUT_OF_MEMORY,
         "terminated abruptly": OUT_OF_MEMORY, "No available kernel": "not available",
         "No viable backend": "not available"}  # fmt: skip

# Forks processes from one that has imported the libraries and done nothing else.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["timm", "torch.utils.tensorboard"])


@dataclass
class Turns:
    """The turns that a case has taken, in seconds."""

    case: Case
    step: Step
    taken: list[float] = field(default_factory=list)

    def fits(self, budget: float) -> bool:
        """Whether there is time for another one; the first run tells how long that takes."""
        turn = self.taken[-1] if self.taken else self.case.seconds * self.case.iterations
        return not self.case.note and sum(self.taken) + turn <= budget


def measure_groups(
    cases: Sequence[Case], repeats: int, seconds: float, deadline: float
) -> Iterator[list[Case]]:
    """Each group with its results; see `measure`."""
    for group in split(cases, lambda case: case.group).values():
        if group[0].compiled and time.perf_counter() < deadline:
            choose_backend(group)
        measure(group, repeats, seconds, deadline)
        yield group


def measure(cases: Sequence[Case], repeats: int, budget: float, deadline: float = math.inf) -> None:
    """Fills in the results of a group of cases.

    Time is the median of `repeats` turns, or of as many as fit into `budget` seconds for each case.
    Where not even one fits, it is that of the first run. No case is begun after `deadline`, as
    `time.perf_counter` counts.
    """
    turns = []
    for case in cases:
        if time.perf_counter() > deadline:
            case.note = case.note or OUT_OF_TIME
        if not case.note:
            with noting_failure(case):
                turns.append(first_run(case))
    take_turns(turns, repeats, budget)
    turns.clear()
    images.cache_clear()
    gc.collect()
    torch.cuda.empty_cache()
    if cases[0].compiled:
        torch._dynamo.reset()


def first_run(case: Case) -> Turns:
    """After a warm-up, one run; it gives peak memory and how many iterations make a turn."""
    on_cpu = case.device == "cpu"
    alone = in_new_process(peak_bytes, case, torch.get_num_threads()) if on_cpu else 0
    step = prepare(case)
    peak = run_once(case, step)
    case.runs, case.bytes, case.parameters = 1, alone or peak, step.parameters
    case.iterations = max(1, min(100, round(TURN / case.seconds)))
    return Turns(case, step)


def peak_bytes(case: Case, threads: int) -> int:
    torch.set_num_threads(threads)
    return run_once(case, prepare(case))


def run_once(case: Case, step: Step) -> int:
    """Fills in the time of a run, after a warm-up; returns the bytes held at its peak."""
    warm_up(case, step)
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)  # glibc keeps freed memory, in which a peak could hide
    with peak_memory(torch.device(case.device)) as peak:
        case.seconds = begin(case, step)()
    return step.held + peak.bytes


def warm_up(case: Case, step: Step) -> None:
    """The step itself on a GPU, or where it compiles; else a quick one, on a few patches."""
    if case.device == "cpu" and not case.compiled:
        few = min(case.pixels, 2 * bench.PATCH)
        step = prepare(replace(case, batch=1, tokens=5, pixels=few))
    begin(case, step)()


def take_turns(turns: Sequence[Turns], repeats: int, budget: float) -> None:
    for _ in range(repeats):
        begun = []
        for turn in turns:
            if turn.fits(budget):
                with noting_failure(turn.case):
                    begun.append((turn.taken, begin(turn.case, turn.step)))
        for taken, read in begun:  # a GPU is still at work
            taken.append(read())
    for turn in turns:
        if turn.taken and not turn.case.note:
            turn.case.seconds = median(turn.taken) / turn.case.iterations
            turn.case.runs = len(turn.taken)


def begin(case: Case, step: Step) -> Callable[[], float]:
    """Runs a turn; what is returned waits for its end and gives its seconds."""
    with step.context():
        if case.device == "cpu":
            taken = timeit(step.run, number=case.iterations)
            return lambda: taken
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(case.iterations):
            step.run()
        end.record()

    def read() -> float:
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return read


def in_new_process(function: Callable, *arguments: object) -> Any:
    with ProcessPoolExecutor(1, mp_context=processes, initializer=end_with_parent) as fresh:
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
        case.seconds = math.nan


def choose_backend(cases: Sequence[Case]) -> None:
    """Of a compiled group, keeps the softmax cases whose backend is the fastest by the mixer alone.

    To compile all takes minutes.
    """
    alone = {"step": bench.BACKWARD, "pixels": 0, "compiled": ""}
    probes = {case.form: replace(case, **alone) for case in cases if case.form in bench.BACKENDS}
    if len(probes) < 2 or cases[0].step not in (bench.TRAINING, bench.INFERENCE):
        return
    measure(list(probes.values()), repeats=5, budget=1)
    working = [probe for probe in probes.values() if not probe.note]
    fastest = min(working, key=lambda probe: probe.seconds, default=None)
    for case in cases:
        probe = probes.get(case.form)
        if probe and probe is not fastest:
            case.note = probe.note or ONLY_FASTEST
