"""Measure LION beside softmax attention: the mixer alone, training steps, inference in all formats.

Whole models have random weights and see random images. Ratios are to the fastest backend of
PyTorch's attention, which takes its turn in every round. Defaults depend on the device (see
`scripts/bench/cases.py`).
"""

import argparse
import platform
import re
import sys
import time
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from journal import provenance
from models_lion import FORMATS
from processes import init_distributed
from scripts.bench import report
from scripts.bench.cases import BACKENDS, HEADS, PARTS, VARIANTS, Case, make_cases
from scripts.bench.measure import choose_backend, measure

COMPILE = {"none": "", "blocks": "blocks", "model": "model"}
# What is measured of each device by default: scale, masks, turns, seconds for a case.
EFFORT = {"cpu": ("tiny", ("Decay-Normal", "Selective-S"), 10, 60),
          "cuda": ("base", VARIANTS, 15, 3)}  # fmt: skip


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--parts", nargs="+", choices=PARTS, default=["inference"], help="default: inference")
    add("--sizes", nargs="+", metavar="SIZE[xBATCH]", help="pixels; for the mixer, tokens")
    add("--scales", nargs="+", choices=HEADS, help="of the models; default: tiny, on a GPU base")
    add("--masks", nargs="+", choices=[*VARIANTS, "all"], help="mask and order")
    add("--formats", nargs="+", choices=FORMATS, help="of LION; RNN in inference alone")
    add("--backends", nargs="+", choices=BACKENDS, help="of softmax attention")
    add("--precision", choices=["float32", "amp", "bfloat16"], help="default: float32 on the CPU, "
        "on a GPU amp to train and bfloat16 (weights, too) otherwise")  # fmt: skip
    add("--compile", nargs="+", choices=COMPILE, default=["none"], help="several are measured each")
    add("--chunk-size", type=int, default=64, help="default: %(default)s, the fastest on a CPU")
    add("--threads", type=int, default=1, help="of the CPU; several wait for other processes")
    add("--repeats", type=int, help="turns of each case, at most")
    add("--seconds", type=float, help="for each case; one run is made in any case")
    add("--stop-after", type=float, default=float("inf"), metavar="SECONDS",
        help="nothing new is begun then")  # fmt: skip
    add("--output", type=Path, help="folder for benchmark.md, benchmark.csv and benchmark.png")
    return parser


def choose_cases(options: argparse.Namespace, device: str) -> list[Case]:
    """What the options ask for. ValueError for what there is not."""
    scale, masks, _, _ = EFFORT[device]
    masks = options.masks or masks
    cases = []
    for part in options.parts:
        cases += make_cases(
            part,
            device,
            VARIANTS if "all" in masks else masks,
            scales=options.scales or [scale],
            sizes=options.sizes,
            formats=options.formats,
            backends=options.backends,
            precision=options.precision,
            compiled=[COMPILE[how] for how in options.compile] if part != "mixer" else [""],
            chunk_size=options.chunk_size,
        )
    return cases


def run(cases: Sequence[Case], options: argparse.Namespace, facts: dict[str, str]) -> None:
    """Measures the groups and writes what there is after each of them."""
    device = cases[0].device
    repeats, seconds = EFFORT[device][2:]
    deadline = time.perf_counter() + options.stop_after
    done = []
    for group in [list(group) for _, group in groupby(cases, key=lambda case: case.group)]:
        start = time.perf_counter()
        if group[0].compiled and start < deadline:
            choose_backend(group)
        seconds = options.seconds if options.seconds is not None else seconds
        measure(group, options.repeats or repeats, seconds, deadline)
        taken = time.perf_counter() - start
        print(f"{report.title_of(group[0])}, {group[0].tokens} tokens: {taken:.1f} s",
              file=sys.stderr)  # fmt: skip
        done += group
        if options.output:
            report.write_csv(options.output / "benchmark.csv", done)
            (options.output / "benchmark.md").write_text(report.text(facts, done) + "\n")


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    return names[0] if names else platform.machine()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = get_args_parser()
    options = parser.parse_args(arguments)
    try:
        if (
            min(
                options.chunk_size,
                options.threads,
                1 if options.repeats is None else options.repeats,
            )
            < 1
        ):
            raise ValueError("chunk size, threads and repeats must be at least 1")
        device = init_distributed(options.device).device
        cases = choose_cases(options, device.type)
        if options.output:
            options.output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    torch.set_num_threads(options.threads)
    facts = provenance()
    if device.type == "cpu":
        facts["device"] = f"{cpu_name()}, threads: {options.threads}"
    run(cases, options, facts)
    print(report.text(facts, cases))
    if options.output:
        report.draw(cases).savefig(options.output / "benchmark.png")
    if any(case.note.startswith("failed") for case in cases):
        sys.exit(1)


if __name__ == "__main__":
    main()
