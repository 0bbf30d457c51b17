"""Measure LION beside softmax attention, in presets and parts.

Presets are tables: `speed`, with the parts mixer, training and inference; `paper`, the paper's
table; `resolution`, memory and time of inference by resolution; `text`, pre-training of language
models; `loops`, the entry points (the part main is main.py, pretrain is mlm.pretrain) beside their
bare steps and loaders. The part host is Python's time for a layer. Models have random weights and
see random images. Cases take their turns in every round. Ratios are to the fastest backend of
PyTorch's attention.
"""

import platform
import re
import sys
import tempfile
import time
from argparse import REMAINDER, ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from commands import open_streams
from errors import UserError
from journal import provenance
from models_lion import FORMATS, SIZES
from processes import init_distributed
from scripts.bench import cases as bench
from scripts.bench import loops, paper, report
from scripts.bench.cases import Case, Preset
from scripts.bench.measure import measure
from workers import usable_cores

CONFIGS = [str(bench.ROOT / "mlm" / "configs" / f"{name}-base.yaml")
           for name in ("bert", "lion-lit", "lion-d", "lion-s", "hydra")]  # fmt: skip
# What is printed of the cases of each preset, and its picture.
TABLES = {"paper": (paper.paper_table, report.table),
          "resolution": (paper.resolution_table, report.table),
          "loops": (loops.loop_table,)}  # fmt: skip
PICTURES = {"speed": report.draw_ratios, "text": report.draw_ratios, "paper": paper.draw_paper,
            "resolution": paper.draw_resolution}  # fmt: skip
# Presets of parts that are measured in a run of their own.
OWN = {"main": "loops", "pretrain": "loops", bench.TEXT: "text", bench.HOST: bench.HOST}


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--preset", choices=bench.presets("cpu"), default="speed", help="default: %(default)s")
    add("--parts", nargs="+", choices=bench.PARTS, help="default: those of the preset; main and "
        "pretrain are of the preset loops, text is of text")  # fmt: skip
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--sizes", nargs="+", metavar="SIZE[xBATCH]", help="pixels; of the mixer and text, tokens")
    add("--scales", nargs="+", choices=SIZES, help="of the models; default: tiny, on a GPU base")
    add("--models", nargs="+", choices=bench.MODELS, help="beside the ViT")
    add("--formats", nargs="+", choices=FORMATS, help="of LION; RNN in inference alone")
    add("--backends", nargs="+", choices=bench.ATTENTION, help="of softmax attention")
    add("--precision", choices=["float32", "amp", "bfloat16"], help="default: float32 on the CPU, "
        "on a GPU amp to train and bfloat16 (weights, too) otherwise")  # fmt: skip
    add("--compile", nargs="+", choices=("none", "blocks", "model", bench.GRAPHS), default=["none"],
        help="several are measured each; graphs: the model, with CUDA graphs")  # fmt: skip
    add("--chunk-size", type=int, default=64, help="default: %(default)s, the fastest on a CPU")
    add("--threads", type=int, default=1, help="of the CPU; several wait for other processes")
    add("--repeats", type=int, help="turns of each case, at most")
    add("--seconds", type=float, help="for each case; one run is made in any case")
    add("--output", type=Path, help="folder for NAME.md, NAME.csv and NAME.png; NAME is benchmark, "
        "or that of another preset")  # fmt: skip
    add("--from-csv", type=Path, metavar="CSV", help="report what was measured before")
    add = parser.add_argument_group("language models (text, pretrain)").add_argument
    add("--configs", nargs="+", default=CONFIGS, help="of mlm.pretrain, with key=value for all")
    add = parser.add_argument_group("entry points (main, pretrain)").add_argument
    add("--data-path", type=Path, help="ImageFolder, or folder of mlm.prepare; default: made up")
    add("--processes", nargs="+", type=int, default=[1], help="by torchrun (default: 1)")
    add("--steps", type=int, default=100, help="that are timed (default: %(default)s)")
    add("--warm-up", type=int, default=30, help="steps before (default: %(default)s)")
    add("--workers", type=int, help="of the loaders; default: the cores, divided by the processes")
    add("--extra", nargs=REMAINDER, default=[], help="arguments for the entry point")
    return parser


def choose_preset(options: Namespace) -> str:
    """The preset that was chosen, else that of parts which are measured in a run of their own."""
    parts = () if options.preset != "speed" else options.parts or ()
    return next((OWN[part] for part in parts if part in OWN), options.preset)


def check(options: Namespace, preset: str) -> None:
    """Raises UserError for numbers and parts that make no sense."""
    parts, data, known = options.parts or [], options.data_path, bench.presets("cpu")[preset].parts
    strangers = [part for part in parts if part not in known]
    numbers = (options.chunk_size, options.threads, options.steps, options.warm_up,
               *options.processes, 1 if options.repeats is None else options.repeats)  # fmt: skip
    mistakes = {
        f"the preset {preset} has no part {' and '.join(strangers)}: choose of {', '.join(known)}, "
        "or measure it in a run of its own": strangers,
        "chunk size, threads, steps, warm-up, processes and repeats must be at least 1":
            min(numbers) < 1,
        "--processes is of the parts main and pretrain: leave it out":
            preset != "loops" and options.processes != [1],
        "language models have no CUDA graphs: leave --compile graphs out":
            bench.GRAPHS in options.compile and (preset == bench.TEXT or "pretrain" in parts),
        "entry points train with --precision amp or float32":
            preset == "loops" and options.precision == "bfloat16",
        "the preset paper divides by training steps: add the part training":
            preset == "paper" and parts and bench.TRAINING not in parts,
        f"--data-path {data} is no folder: choose another": data and not data.is_dir(),
    }  # fmt: skip
    if made := [message for message, wrong in mistakes.items() if wrong]:
        raise UserError(made[0])


def choose_cases(options: Namespace, preset: Preset, device: torch.device) -> list[Case]:
    """What the options ask for. ValueError for what there is not."""
    on_cpu = device.type == "cpu"
    card = cpu_name() if on_cpu else torch.cuda.get_device_name(device)
    cases = []
    for part in options.parts or preset.chosen or preset.parts:
        default = "bfloat16" if part in ("mixer", bench.INFERENCE) else "amp"
        precision = options.precision or ("float32" if on_cpu else default)
        cases += bench.make_cases(
            part, preset.parts[part],
            Case(device.type, card, precision, chunk_size=options.chunk_size),
            models=options.models, formats=options.formats, backends=options.backends,
            configs=options.configs, scales=options.scales or ["tiny" if on_cpu else "base"],
            sizes=options.sizes, processes=options.processes,
            compiled=["" if how == "none" else how for how in options.compile],
        )  # fmt: skip
    return cases


def measured(cases: list[Case], options: Namespace, preset: Preset, csv: Path | None) -> list[Case]:
    """All cases with their results, which are in the CSV as soon as there are some."""
    start, done = time.perf_counter(), []
    repeats = options.repeats or preset.repeats
    seconds = preset.seconds if options.seconds is None else options.seconds
    with tempfile.TemporaryDirectory() as folder:
        if cases[0].step in (bench.MAIN, bench.PRETRAIN):
            cores = usable_cores() // max(options.processes)
            workers = max(cores, 1) if options.workers is None else options.workers
            setting = loops.Setting(Path(folder), options.data_path, options.warm_up, options.steps,
                                    workers, repeats, seconds, options.extra)  # fmt: skip
            groups = loops.measure_loops(cases, setting)
        else:
            together = bench.split(cases, lambda case: case.group).values()
            groups = (measure(group, repeats, seconds) for group in together)
        for group in groups:
            done += group
            last, passed = group[-1], time.perf_counter() - start
            print(f"{report.title_of(last)}, {last.label}, {last.tokens} tokens: done after "
                  f"{passed:.0f} s", file=sys.stderr)  # fmt: skip
            if csv:
                report.write_csv(csv, done)
    return done


def host_table(device: torch.device) -> str:
    """Microseconds of a layer's forward and backward call, each until it returns."""
    from scripts.bench.host_time import host_time

    times = host_time(device=device.type, rounds=300 if device.type == "cuda" else 20)
    base = sum(next(iter(times.values())))
    return report.rows(
        ("layer", " forward, µs", " backward, µs", " / softmax"),
        [[name, *(f"{part:.0f}" for part in taken), f"{sum(taken) / base:.2f}"]
         for name, taken in times.items()],
    )  # fmt: skip


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(rb"model name\s*: (.*)", info.read_bytes() if info.exists() else b"")
    return names[0].decode() if names else platform.machine()


def main(arguments: Sequence[str] | None = None) -> None:
    open_streams()
    parser = get_args_parser()
    options = parser.parse_args(arguments)
    try:
        name = choose_preset(options)
        check(options, name)
        device = init_distributed(options.device).device
        if name == bench.HOST:
            return print(host_table(device))
        preset = bench.presets(device.type)[name]
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
        facts = {**provenance(), **facts, "threads": str(options.threads)}
        cases = measured(cases, options, preset, stem and stem.with_suffix(".csv"))
    tables = [write(cases) for write in TABLES.get(name, (report.summary, report.table))]
    text = "\n\n".join(["\n".join(f"- {key}: {facts[key]}" for key in facts), *tables])
    print(text)
    if stem:
        stem.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
        if name in PICTURES:
            PICTURES[name](cases).savefig(stem.with_suffix(".png"))
    if any(case.note.startswith("failed") for case in cases):
        sys.exit(1)


if __name__ == "__main__":
    main()
