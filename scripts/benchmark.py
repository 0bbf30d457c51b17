"""Measure LION beside softmax attention, in presets and parts.

Presets are tables: `speed`, with the parts mixer, training and inference; `paper`, the paper's
table; `resolution`, memory and time of inference by resolution; `text`, pre-training of language
models; `loops`, the entry points (the part main is main.py, pretrain is mlm.pretrain) beside their
bare steps and loaders. The part host is Python's time for a layer. Models have random weights and
see random images. Cases take their turns in every round. Ratios are to the fastest backend of
PyTorch's attention.
"""

import argparse
import math
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from errors import UserError
from journal import provenance
from models_lion import FORMATS
from processes import init_distributed
from scripts.bench import loops, paper, report
from scripts.bench.cases import (
    ATTENTION,
    HOST,
    MAIN,
    MODELS,
    PARTS,
    PRETRAIN,
    SCALES,
    TEXT,
    Case,
    Preset,
    default_precision,
    make_cases,
    presets,
)
from scripts.bench.entry import ROOT
from scripts.bench.measure import choose_backend, measure

COMPILE = {"none": "", "blocks": "blocks", "model": "model"}
CONFIGS = [str(ROOT / "mlm" / "configs" / f"{name}-base.yaml")
           for name in ("bert", "lion-lit", "lion-d", "lion-s", "hydra")]  # fmt: skip
# What each preset's report has, beside the table of all cases, and its picture.
TABLES = {"paper": paper.paper_table, "resolution": paper.resolution_table,
          "loops": loops.loop_table}  # fmt: skip
PICTURES = {"speed": report.draw_ratios, "text": report.draw_ratios, "paper": paper.draw_paper,
            "resolution": paper.draw_resolution}  # fmt: skip


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--preset", choices=presets("cpu"), default="speed", help="default: %(default)s")
    add("--parts", nargs="+", choices=PARTS, help="default: those of the preset; main and pretrain "
        "are of the preset loops, text is of text")  # fmt: skip
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--sizes", nargs="+", metavar="SIZE[xBATCH]", help="pixels; of the mixer and text, tokens")
    add("--scales", nargs="+", choices=SCALES, help="of the models; default: tiny, on a GPU base")
    add("--models", nargs="+", choices=MODELS, help="beside the ViT")
    add("--formats", nargs="+", choices=FORMATS, help="of LION; RNN in inference alone")
    add("--backends", nargs="+", choices=ATTENTION, help="of softmax attention")
    add("--precision", choices=["float32", "amp", "bfloat16"], help="default: float32 on the CPU, "
        "on a GPU amp to train and bfloat16 (weights, too) otherwise")  # fmt: skip
    add("--compile", nargs="+", choices=COMPILE, default=["none"], help="several are measured each")
    add("--chunk-size", type=int, default=64, help="default: %(default)s, the fastest on a CPU")
    add("--threads", type=int, default=1, help="of the CPU; several wait for other processes")
    add("--repeats", type=int, help="turns of each case, at most")
    add("--seconds", type=float, help="for each case; one run is made in any case")
    add("--stop-after", type=float, default=math.inf, metavar="SECONDS",
        help="nothing new is begun then")  # fmt: skip
    add("--output", type=Path, help="folder for NAME.md, NAME.csv and NAME.png; NAME is benchmark, "
        "or that of another preset")  # fmt: skip
    add("--from-csv", type=Path, metavar="CSV", help="report what was measured before")
    text = parser.add_argument_group("language models (text, pretrain)")
    text.add_argument("--configs", nargs="+", default=CONFIGS, metavar="CONFIG",
        help="of mlm.pretrain, with key=value for all")  # fmt: skip
    entry = parser.add_argument_group("entry points (main, pretrain)")
    add = entry.add_argument
    add("--data-path", type=Path, help="ImageFolder, or folder of mlm.prepare; default: made up")
    add("--processes", nargs="+", type=int, default=[1], help="by torchrun (default: 1)")
    add("--steps", type=int, default=100, help="that are timed (default: %(default)s)")
    add("--warm-up", type=int, default=30, help="steps before (default: %(default)s)")
    add("--workers", type=int, help="of the loaders; default: the cores, divided by the processes")
    add("--extra", nargs=argparse.REMAINDER, default=[], help="arguments for the entry point")
    return parser


def choose_preset(options: argparse.Namespace) -> str:
    """The preset that the parts are of: each part is of one, but those that a preset names."""
    parts = set(options.parts or ())
    for name, own in (("loops", {"main", "pretrain"}), ("text", {TEXT}), (HOST, {HOST})):
        if parts & own:
            if parts - own:
                raise UserError(f"measure {' and '.join(sorted(parts & own))} in a run of their "
                                 f"own, without {sorted(parts - own)[0]}")  # fmt: skip
            return name
    return options.preset


def choose_cases(options: argparse.Namespace, preset: Preset, device: torch.device) -> list[Case]:
    """What the options ask for. ValueError for what there is not."""
    card = cpu_name() if device.type == "cpu" else torch.cuda.get_device_name(device)
    compiled = [COMPILE[how] for how in options.compile]
    cases = []
    for part in options.parts or preset.chosen:
        if part not in preset.parts:
            raise UserError(f"the preset has no part {part}: choose of {', '.join(preset.parts)}")
        defaults = preset.parts[part]
        blank = Case(
            device.type, card, options.precision or default_precision(device.type, part), "", "",
            0, 0, 0, "", "", options.chunk_size,
        )  # fmt: skip
        common = {"sizes": options.sizes, "processes": options.processes,
                  "compiled": compiled if part != "mixer" else [""]}  # fmt: skip
        if part in (TEXT, "pretrain"):
            from scripts.bench.text import text_cases  # its libraries take seconds to import

            cases += text_cases(part, defaults, blank, options.configs, **common)
            continue
        scale = "tiny" if device.type == "cpu" else "base"
        cases += make_cases(
            part, defaults, blank, scales=options.scales or [scale], models=options.models,
            formats=options.formats, backends=options.backends, **common,
        )  # fmt: skip
    return cases


def measure_all(
    cases: Sequence[Case], options: argparse.Namespace, preset: Preset
) -> Iterator[list[Case]]:
    """What is measured so far, after each group."""
    deadline = time.perf_counter() + options.stop_after
    repeats = options.repeats or preset.repeats
    seconds = preset.seconds if options.seconds is None else options.seconds
    done = []
    if cases[0].step in (MAIN, PRETRAIN):
        cores = (os.cpu_count() or 1) // max(options.processes)
        workers = max(cores, 1) if options.workers is None else options.workers
        with tempfile.TemporaryDirectory() as folder:
            setting = loops.Setting(Path(folder), options.data_path, options.warm_up, options.steps,
                                    workers, repeats, seconds, options.extra)  # fmt: skip
            for case in loops.measure_loops(cases, setting, deadline):
                done.append(case)
                yield done
        return
    for _, group in groupby(cases, key=lambda case: case.group):
        group = list(group)
        if group[0].compiled and time.perf_counter() < deadline:
            choose_backend(group)
        measure(group, repeats, seconds, deadline)
        done += group
        yield done


def measured(
    cases: Sequence[Case], options: argparse.Namespace, preset: Preset, stem: Path | None
) -> list[Case]:
    """All cases with their results, which are in the CSV as soon as there are some."""
    start = time.perf_counter()
    for done in measure_all(cases, options, preset):
        last = done[-1]
        print(f"{report.title_of(last)}, {last.label}, {last.tokens} tokens: done after "
              f"{time.perf_counter() - start:.0f} s", file=sys.stderr)  # fmt: skip
        if stem:
            report.write_csv(stem.with_suffix(".csv"), done)
    return done


def report_of(name: str, cases: Sequence[Case], facts: dict[str, str]) -> str:
    """The whole report in markdown."""
    conditions = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    tables = [TABLES.get(name, report.summary)(cases)]
    tables += [report.table(cases)] if name != "loops" else []
    return "\n\n".join([conditions, *tables])


def host_table(device: torch.device) -> str:
    """Microseconds of a layer's forward and backward call, each until it returns."""
    from scripts.bench.host_time import host_time

    times = host_time(device=device.type)
    lines = [[name, *(f"{part:.0f}" for part in taken), f"{sum(taken) / sum(base):.2f}"]
             for base in [next(iter(times.values()))] for name, taken in times.items()]  # fmt: skip
    return report.rows(("layer", " forward, µs", " backward, µs", " / softmax"), lines)


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    return names[0] if names else platform.machine()


def check(options: argparse.Namespace, preset: str) -> None:
    """Raises UserError for numbers and parts that make no sense."""
    numbers = (options.chunk_size, options.threads, options.steps, options.warm_up,
               *options.processes, 1 if options.repeats is None else options.repeats)  # fmt: skip
    if min(numbers) < 1:
        raise UserError(
            "chunk size, threads, steps, warm-up, processes and repeats must be at least 1"
        )
    if preset != "loops" and options.processes != [1]:
        raise UserError("--processes is of the parts main and pretrain: leave it out")
    if preset == "loops" and options.precision == "bfloat16":
        raise UserError("entry points train with --precision amp or float32")
    if preset == "paper" and options.parts and "training" not in options.parts:
        raise UserError("the preset paper divides by training steps: add the part training")
    if options.data_path and not options.data_path.is_dir():
        raise UserError(f"--data-path {options.data_path} is no folder: choose another")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = get_args_parser()
    options = parser.parse_args(arguments)
    try:
        name = choose_preset(options)
        check(options, name)
        device = init_distributed(options.device).device
        if name == HOST:
            return print(host_table(device))
        preset = presets(device.type)[name]
        before = report.read_csv(options.from_csv) if options.from_csv else None
        cases = before or choose_cases(options, preset, device)
        if options.output:
            options.output.mkdir(parents=True, exist_ok=True)
    except (UserError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    torch.set_num_threads(options.threads)
    stem = options.output / ("benchmark" if name == "speed" else name) if options.output else None
    facts = {"device": cases[0].card}
    if before:
        facts["figures"] = str(options.from_csv)  # of whatever versions measured them
    else:
        threads = {"threads": str(options.threads)} if device.type == "cpu" else {}
        facts = {**provenance(), **facts, **threads}
    if not before:
        cases = measured(cases, options, preset, stem)
    text = report_of(name, cases, facts)
    print(text)
    if stem:
        stem.with_suffix(".md").write_text(text + "\n")
        if name in PICTURES:
            PICTURES[name](cases).savefig(stem.with_suffix(".png"))
    if any(case.note.startswith("failed") for case in cases):
        sys.exit(1)


if __name__ == "__main__":
    main()
