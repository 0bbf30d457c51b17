"""Entry points in steady state, run by `entry.py`, beside their bare steps and loaders alone."""

import json
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
from PIL import Image

from compilation import CUDA_GRAPHS
from scripts.bench.cases import BARE, GRAPHS, MAIN, OUT_OF_MEMORY, ROOT, Case
from scripts.bench.entry import TRACED
from scripts.bench.measure import in_new_process, measure
from scripts.bench.report import number, or_note, rows

PRESETS = ("main", "pretrain")
LOADER = "loader alone"  # the entry point with a model of next to no time
# What the progress lines say of the time in which a step waits for its batch, in percent.
DATA_WAIT = re.compile(r"\bdata: ([\d.]+) ?%")
SMALLEST = ("model.hidden_size=16", "model.num_hidden_layers=1", "model.num_attention_heads=1",
            "model.intermediate_size=16")  # fmt: skip


class Setting(NamedTuple):
    """How entry points run: `folder` is for their data, where `data` names none."""

    folder: Path
    data: Path | None
    warm_up: int
    steps: int
    workers: int
    repeats: int
    seconds: float
    extra: Sequence[str] = ()

    @property
    def total(self) -> int:
        return self.warm_up + self.steps + TRACED


def measure_loops(cases: Sequence[Case], setting: Setting) -> Iterator[list[Case]]:
    """Bare steps, the entry points and their loaders alone, each in turn with its results."""
    for case in with_companions(cases):
        if case.step in BARE.values():
            yield in_new_process(measure, [case], setting.repeats, setting.seconds)
        else:
            yield [run_entry(case, setting)]


def with_companions(cases: Sequence[Case]) -> list[Case]:
    """With a bare step before each entry point, if it is new, and a loader alone by processes."""
    found, known = [], set()
    for case in cases:
        companions = [replace(case, step=BARE[case.step], processes=1)]
        if case.processes not in known and not case.compiled:
            companions.insert(0, replace(case, model=LOADER, form=""))
        known.add(case.processes)
        found += [c for c in companions if c not in found]
        found.append(case)
    return found


def run_entry(case: Case, setting: Setting) -> Case:
    """The case with its results, or with the last line of what it said as a note."""
    arguments = (main_arguments if case.step == MAIN else pretrain_arguments)(case, setting)
    output = setting.folder / "steps.json"
    output.unlink(missing_ok=True)
    entry = ("-m", "scripts.bench.entry", output, setting.warm_up, setting.steps, case.step)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
                case.processes) if case.processes > 1 else ()  # fmt: skip
    command = [sys.executable, *map(str, (*launcher, *entry)), *arguments, *setting.extra]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if not output.exists():
        print(done.stderr, file=sys.stderr)
        said = [line for line in done.stderr.splitlines() if re.search("[Ee]rror: ", line)]
        few = f"an epoch has fewer than {setting.total} steps"
        said.append(f"exit code {done.returncode}" if done.returncode else few)
        memory = "OutOfMemoryError" in done.stderr
        return replace(case, note=OUT_OF_MEMORY if memory else f"failed: {said[0]}")
    waits = [float(share) / 100 for share in DATA_WAIT.findall(done.stdout)] or [math.nan]
    later = waits[len(waits) // 2 :]  # the first lines have the start in them
    return replace(case, **json.loads(output.read_bytes()), runs=1, data_wait=fmean(later))


def main_arguments(case: Case, setting: Setting) -> list[str]:
    images = case.batch * case.processes * setting.total
    if images > 256:  # an epoch of main.py has a multiple of that
        images = math.ceil(images / 256) * 256
    data = setting.data or setting.folder / f"images-{images}"
    if not data.exists():
        make_images(data, images)
    model, options = ("mean_colour", {}) if case.model == LOADER else case.in_timm
    graphs = {"torchcompile-mode": CUDA_GRAPHS[0]} if case.compiled == GRAPHS else {}
    words = {"model": model, "data-set": "IMNET", "data-path": data, "input-size": case.pixels,
             "batch-size": case.batch, "drop-path": case.drop_path, "epochs": 1,
             "warmup-epochs": 0, "device": case.device, "num_workers": setting.workers,
             **options, **graphs}  # fmt: skip
    flags = ["--torchcompile"] * bool(case.compiled) + ["--no-amp"] * (case.precision == "float32")
    return [*chain(*((f"--{key}", str(value)) for key, value in words.items())), *flags]


def pretrain_arguments(case: Case, setting: Setting) -> list[str]:
    data = setting.data or setting.folder / "text"
    if not data.exists():
        make_text(data)
    words = {"data": data, "length": case.tokens, "micro_batch": case.batch, "workers":
             setting.workers, "global_batch": case.batch * case.processes, "steps": setting.total,
             "eval_every": setting.total, "device": case.device, "output": "",
             "compile": bool(case.compiled)}  # fmt: skip
    smallest = SMALLEST if case.model == LOADER else ()
    return [*shlex.split(case.config), *smallest, *(f"{k}={v}" for k, v in words.items())]


def make_images(folder: Path, count: int, distinct: int = 64, classes: int = 10) -> None:
    """JPEGs with the spectrum and size of photographs, each under many names: training images."""
    generator = np.random.default_rng(0)
    (folder / "distinct").mkdir(parents=True)
    for i in range(distinct):
        pixels = np.full((375, 500, 3), 128.0)
        for octave in range(1, 9):  # amplitudes fall with the frequency
            noise = generator.integers(0, 256, (3 << octave, 4 << octave, 3), dtype=np.uint8)
            image = Image.fromarray(noise).resize((500, 375), Image.Resampling.BICUBIC)
            pixels += (np.asarray(image, dtype=float) - 128) * 1.2 / octave**2
        picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        picture.save(folder / "distinct" / f"{i}.jpg", quality=92)
    for split, images in (("train", count), ("val", classes)):
        for i in range(images):
            path = folder / split / f"class{i % classes}" / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to((folder / "distinct" / f"{i % distinct}.jpg").resolve())


def make_text(folder: Path, words: int = 30_517, documents: int = 2000) -> None:
    """Token shards of random words from a vocabulary of BERT's size."""
    names = [f"w{i:x}" for i in range(words)]
    chosen = np.random.default_rng(0).choice(names, (documents, 300))
    folder.mkdir(parents=True)
    vocabulary, text = folder / "vocab.txt", folder / "words.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *names, ""]))
    text.write_text("\n\n".join(map(" ".join, chosen)))
    command = [sys.executable, "-m", "mlm.prepare", text, "--tokenizer", vocabulary,
               "--output", folder]  # fmt: skip
    subprocess.run(list(map(str, command)), cwd=ROOT, check=True, capture_output=True)


def loop_table(cases: Sequence[Case]) -> str:
    """Entry points and their companions; time that neither computes nor waits is Python's."""
    key = lambda case: (case.model, case.compiled, case.tokens, case.batch)  # noqa: E731
    bare_steps = {key(case): case.seconds for case in cases if case.step in BARE.values()}
    lines = []
    for case in cases:
        name = f"bare step ({case.step})" if case.step in BARE.values() else case.step
        ratio = case.seconds / bare_steps.get(key(case), math.nan)
        python = max(1 - case.busy - np.nan_to_num(case.data_wait), 0)  # NaN if that is unknown
        results = or_note(
            case, f"{case.seconds * 1e3:.1f}", number(ratio, ".2f"), f"{case.rate:,.0f}",
            *(number(share, ".0%") for share in (case.data_wait, python, case.busy)),
            f"{case.bytes / 2**20:,.0f}",
        )  # fmt: skip
        how = case.compiled or "no"
        lines.append([name, case.processes, how, case.batch, case.model, *results])
    return rows(("step", " processes", "compiled", " batch", "model", " ms", " / bare step",
                 " per second", " waits for data", " for Python", " for the device",
                 " peak MiB"), lines)  # fmt: skip
