"""Measure LION beside softmax attention. Each preset is a table.

`training`, `inference` and, on a GPU, `mixer` are speed and memory of whole steps and of the mixer
alone; `host`, on a GPU, is Python's time for a layer; `paper` is the paper's table; `resolution`
memory and time of inference by resolution; `text` pre-training of language models; `main` and
`pretrain` are the entry points main.py and mlm.pretrain beside their bare steps and loaders. Models
have random weights and see random images. Cases take their turns in every round. Ratios are to the
fastest backend of PyTorch's attention.
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
from scripts.bench.cases import Case
from scripts.bench.measure import measure
from workers import usable_cores

CONFIGS = [str(bench.ROOT / "mlm" / "configs" / f"{name}-base.yaml")
           for name in ("bert", "lion-lit", "lion-d", "lion-s", "hydra")]  # fmt: skip
# What is printed of the cases of a preset, and its picture; the others have the report's own.
TABLES = {"paper": (paper.paper_table, report.table),
          "resolution": (paper.resolution_table, report.table),
          **dict.fromkeys(loops.PRESETS, (loops.loop_table,))}  # fmt: skip
PICTURES = {"paper": paper.draw_paper, "resolution": paper.draw_resolution}


def get_args_parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    own = "default: the preset's"
    add("--preset", choices=bench.presets("cuda"), default="inference", metavar="PRESET",
        help="%(choices)s (default: %(default)s)")  # fmt: skip
    add("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    add("--sizes", nargs="+", metavar="SIZE[xBATCH]",
        help=f"pixels; of the mixer and text, tokens ({own})")  # fmt: skip
    add("--scales", nargs="+", choices=SIZES, metavar="SCALE",
        help="of the models: %(choices)s (default: tiny, on a GPU base)")  # fmt: skip
    add("--models", nargs="+", choices=bench.MODELS, metavar="MODEL",
        help=f"beside the ViT: %(choices)s ({own})")  # fmt: skip
    add("--formats", nargs="+", choices=FORMATS, metavar="FORMAT",
        help=f"of LION: %(choices)s; RNN in inference alone ({own})")  # fmt: skip
    add("--backends", nargs="+", choices=bench.ATTENTION, metavar="BACKEND",
        help=f"of softmax attention: %(choices)s ({own})")  # fmt: skip
    add("--precision", choices=["float32", "amp", "bfloat16"], metavar="PRECISION",
        help="%(choices)s (default: float32 on the CPU, on a GPU amp to train and bfloat16, "
        "weights too, otherwise)")  # fmt: skip
    add("--compile", nargs="+", choices=("none", "blocks", bench.GRAPHS), default=["none"],
        metavar="HOW", help="%(choices)s; several are measured each; graphs: the whole model, "
        "with CUDA graphs (default: none)")  # fmt: skip
    add("--repeats", type=int, metavar="N", help=f"turns of each case, at most ({own})")
    add("--seconds", type=float, metavar="X",
        help=f"for each case; one run is made in any case ({own})")  # fmt: skip
    add("--output", type=Path, metavar="FOLDER",
        help="for PRESET.md, .csv and .png (default: none, the tables are printed)")  # fmt: skip
    add("--from-csv", type=Path, metavar="CSV", help="report what was measured before")
    add = parser.add_argument_group("language models (text, pretrain)").add_argument
    add("--configs", nargs="+", default=CONFIGS, metavar="CONFIG",
        help="of mlm.pretrain, with key=value for all (default: five in mlm/configs)")  # fmt: skip
    add = parser.add_argument_group("entry points (main, pretrain)").add_argument
    add("--data-path", type=Path, metavar="FOLDER",
        help="of class folders, or of mlm.prepare (default: made up)")  # fmt: skip
    add("--processes", nargs="+", type=int, default=[1], metavar="N",
        help="by torchrun (default: 1)")  # fmt: skip
    add("--steps", type=int, default=100, metavar="N", help="that are timed (default: %(default)s)")
    add("--warm-up", type=int, default=30, metavar="N", help="steps before (default: %(default)s)")
    add("--extra", nargs=REMAINDER, default=[], help="arguments for the entry point, "
        "which has as many workers as cores, divided by the processes")  # fmt: skip
    return parser


def check(options: Namespace) -> None:
    """Raises UserError for numbers and options that make no sense."""
    name, data, compiled = options.preset, options.data_path, options.compile
    alone, entry = name in ("mixer", "host"), name in loops.PRESETS
    numbers = (options.steps, options.warm_up, *options.processes,
               1 if options.repeats is None else options.repeats)  # fmt: skip
    mistakes = {
        "steps, warm-up, processes and repeats must be at least 1": min(numbers) < 1,
        "mixers and layers are not compiled: leave --compile out": alone and compiled != ["none"],
        "mixers and layers have --precision bfloat16 or float32":
            alone and options.precision == "amp",
        "--processes is of the presets main and pretrain: leave it out":
            not entry and options.processes != [1],
        "language models have no CUDA graphs: leave --compile graphs out":
            bench.GRAPHS in compiled and name in ("text", "pretrain"),
        "entry points train with --precision amp or float32":
            entry and options.precision == "bfloat16",
        f"--data-path {data} is no folder: choose another": data and not data.is_dir(),
    }  # fmt: skip
    if made := [message for message, wrong in mistakes.items() if wrong]:
        raise UserError(made[0])


def choose_cases(options: Namespace, device: torch.device) -> list[Case]:
    """What the options ask for. UserError for what there is not."""
    check(options)
    on_cpu, presets = device.type == "cpu", bench.presets(device.type)
    if options.preset not in presets:
        raise UserError(f"the preset {options.preset} needs a GPU, whose kernels or launches it "
                        "times: choose another")  # fmt: skip
    return bench.make_cases(
        presets[options.preset],
        Case(device.type, cpu_name() if on_cpu else torch.cuda.get_device_name(device),
             options.precision or ""),
        models=options.models, formats=options.formats, backends=options.backends,
        configs=options.configs, scales=options.scales or ["tiny" if on_cpu else "base"],
        sizes=options.sizes, processes=options.processes,
        compiled=["" if how == "none" else how for how in options.compile],
    )  # fmt: skip


def measured(cases: list[Case], options: Namespace, csv: Path | None) -> list[Case]:
    """All cases with their results, which are in the CSV as soon as there are some."""
    start, done, preset = time.perf_counter(), [], bench.presets(cases[0].device)[options.preset]
    repeats = options.repeats or preset.repeats
    seconds = preset.seconds if options.seconds is None else options.seconds
    print(f"{len(cases)} cases, told here as they are done:", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        if options.preset in loops.PRESETS:
            workers = max(usable_cores() // max(options.processes), 1)
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


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(rb"model name\s*: (.*)", info.read_bytes() if info.exists() else b"")
    return names[0].decode() if names else platform.machine()


def main(arguments: Sequence[str] | None = None) -> None:
    open_streams()
    parser = get_args_parser()
    options = parser.parse_args(arguments)
    try:
        device = init_distributed(options.device).device
        before = report.read_csv(options.from_csv) if options.from_csv else None
        cases = before or choose_cases(options, device)
        if options.output:
            options.output.mkdir(parents=True, exist_ok=True)
    except (UserError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    stem = options.output / options.preset if options.output else None
    facts = {"device": cases[0].card}
    if before:
        facts["figures"] = str(options.from_csv)  # of whatever versions measured them
    else:
        torch.set_num_threads(1)  # several wait for other processes
        facts = {**provenance(), **facts, "threads": "1"}
        cases = measured(cases, options, stem and stem.with_suffix(".csv"))
    tables = [write(cases) for write in TABLES.get(options.preset, (report.summary, report.table))]
    text = "\n\n".join(["\n".join(f"- {key}: {facts[key]}" for key in facts), *tables])
    print(text)
    if stem:
        stem.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
        if options.preset not in loops.PRESETS:
            draw = PICTURES.get(options.preset, report.draw_ratios)
            draw(cases).savefig(stem.with_suffix(".png"))
    if any(case.note.startswith("failed") for case in cases):
        sys.exit(1)


if __name__ == "__main__":
    main()
