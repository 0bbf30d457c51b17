"""Time and peak memory of inference against the resolution of the images.

Memory is the weights and the most that inference holds beside them. A model that has run out of
memory, has met an operation that takes no tensor so large, or would take longer than its time, is
not run at larger resolutions.
"""

import argparse
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from memory import peak_memory
from models_lion import FORMATS
from processes import init_distributed
from scripts.comparison import (
    EXPLICIT,
    MODELS,
    SIZES,
    build,
    precision,
    seconds,
    weight_bytes,
    write,
)

logger = logging.getLogger(__name__)
LIONS = [label for label in MODELS if label.startswith("LION")]
OUT_OF_MEMORY = "out of memory"
# GB of base models for 64 images on an A100 of 80 GB; resolutions here are multiples of 16.
PAPER = {
    "ViT, explicit softmax": (0.40, 2.44, 8.35, 27.8, 58.5, OUT_OF_MEMORY),
    "Hydra": (1.05, 5.46, 11.3, 21.9, 32.5, OUT_OF_MEMORY),
    "Vim": (0.85, 4.36, 9.0, 17.4, 25.8, OUT_OF_MEMORY),
    "LION, RNN": (0.62, 2.11, 4.26, 8.25, 12.3, 49.0),
}
PAPER_PIXELS = (224, 512, 736, 1024, 1248, 2496)


@dataclass
class Case:
    model: str
    form: str  # of attention in a ViT, the format of a LION
    pixels: int
    tokens: int = 0
    seconds: float = math.nan
    runs: int = 0
    bytes: int = 0
    note: str = ""  # why there is no time

    @property
    def label(self) -> str:
        return f"{self.model}, {self.form}" if self.form else self.model


def forms(lion: str) -> list[tuple[str, str]]:
    """Models and their forms; `lion` is one of MODELS."""
    others = [("ViT", "SDPA"), ("ViT", EXPLICIT), ("Hydra", ""), ("Vim", "")]
    return others + [(lion, format) for format in FORMATS]


def sweep(cases: Sequence[Case], model: nn.Module, setting: argparse.Namespace) -> None:
    """The resolutions of one model, from small to large."""
    previous = None
    for case in tqdm(cases, desc=cases[0].label, disable=None, leave=False):
        model.set_input_size((case.pixels, case.pixels))
        case.tokens = model.patch_embed.num_patches + model.num_prefix_tokens
        if previous and previous.note:
            case.note = previous.note
        elif previous and previous.seconds * case.tokens / previous.tokens > setting.seconds:
            case.note = f"longer than {setting.seconds:g} s"
        else:
            try:
                measure(case, model, setting)
            except RuntimeError as error:  # often "only tensors of less than 2^31 elements"
                logger.warning("%s, %d px: %s", case.label, case.pixels, error)
                case.note = "an operation fails"
        previous = case


def measure(case: Case, model: nn.Module, setting: argparse.Namespace) -> None:
    """Warms up, for kernels may be compiled, then runs up to `repeats` times while time is left."""
    device, dtype = setting.device, precision(setting.device)
    images = torch.randn(setting.batch_size, 3, case.pixels, case.pixels, device=device)
    images = images.to(dtype)
    run = partial(model, images)
    with torch.inference_mode():
        with peak_memory(device) as peak:
            first = seconds(run, device)
        if math.isnan(first):
            case.note = OUT_OF_MEMORY
            return
        taken = [seconds(run, device)]
        while len(taken) < setting.repeats and sum(taken) + taken[-1] <= setting.seconds:
            taken.append(seconds(run, device))
    case.seconds, case.runs = median(taken), len(taken)
    case.bytes = peak.bytes + images.nbytes + weight_bytes(model)


def table(cases: Sequence[Case], quantity: str, setting: argparse.Namespace) -> str:
    """A line for each model, a column for each resolution; for memory the paper's lines, too."""
    unit, scale = ("ms", 1e3) if quantity == "seconds" else ("GB", 1e-9)
    rows = {unit: [f"{pixels} px" for pixels in setting.sizes], "---": ["--:"] * len(setting.sizes)}
    for c in cases:
        rows.setdefault(c.label, []).append(c.note or f"{getattr(c, quantity) * scale:,.2f}")
    if quantity == "bytes":
        for label, values in PAPER.items():
            known = dict(zip(PAPER_PIXELS, values, strict=True))
            cells = [str(known.get(pixels, "")) for pixels in setting.sizes]
            rows[f"paper, base, batch size 64: {label}"] = cells
    return "\n".join(f"| {' | '.join([first, *cells])} |" for first, cells in rows.items())


def plot(cases: Sequence[Case], setting: argparse.Namespace, path: Path) -> None:
    """Memory and time; a cross is the largest resolution of a model that ran out of memory."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for axes, quantity, unit in (panels[0], "bytes", 1e9), (panels[1], "seconds", 1):
        for label in dict.fromkeys(case.label for case in cases):
            shown = [c for c in cases if c.label == label and c.runs]
            values = [getattr(c, quantity) / unit for c in shown]
            (line,) = axes.plot([c.pixels for c in shown], values, marker="o", label=label)
            if shown and any(c.note == OUT_OF_MEMORY for c in cases if c.label == label):
                axes.plot(shown[-1].pixels, values[-1], "x", color=line.get_color(), markersize=14)
        axes.set(xscale="log", yscale="log", xlabel="pixels per side of the image")
        axes.set_xticks(setting.sizes, [str(pixels) for pixels in setting.sizes])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("peak memory, GB")
    panels[1].set_ylabel("time, s")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right", fontsize="small")
    figure.suptitle(f"Inference, {setting.size}, batch size {setting.batch_size}")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--size", choices=SIZES, default="base", help="of the models (default: %(default)s)")
    add("--lion", choices=LIONS, default="LION-D", help="default: %(default)s")
    add("--chunk-size", type=int, default=64, help="of LION's Chunk (default: %(default)s)")
    add("--sizes", nargs="+", type=int, default=list(PAPER_PIXELS), help="of images, in pixels")
    add("--batch-size", type=int, default=64, help="default: %(default)s")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--repeats", type=int, default=5, help="of each case, at most (default: %(default)s)")
    add("--seconds", type=float, default=10, help="for each case (default: %(default)s)")
    add("--output", type=Path, help="folder for memory_vs_resolution.md, .csv and .png")
    options = parser.parse_args(arguments)
    try:
        if min(options.batch_size, options.repeats, options.chunk_size) < 1:
            raise ValueError("batch size, chunk size and repeats must be at least 1")
        options.sizes = sorted(set(options.sizes))
        with torch.device("meta"):
            for pixels in options.sizes:
                build("ViT", options.size, pixels)
        options.device = init_distributed(options.device).device
        if options.output:
            options.output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    setting = parse(arguments)
    cases = []
    for name, form in forms(setting.lion):
        model = build(name, setting.size, setting.sizes[0], form)
        if form in FORMATS:
            model.set_format(form, setting.chunk_size)
        model = model.eval().to(setting.device, precision(setting.device))
        rows = [Case(name, form, pixels) for pixels in setting.sizes]
        sweep(rows, model, setting)
        cases += rows
    kind = str(precision(setting.device)).removeprefix("torch.")
    tables = [
        f"Models: {setting.size}, batch size {setting.batch_size}, {kind}; "
        f"chunk size {setting.chunk_size}.",
        *(table(cases, quantity, setting) for quantity in ("bytes", "seconds")),
    ]
    write(setting.output, "memory_vs_resolution", tables, [asdict(case) for case in cases])
    if setting.output:
        plot(cases, setting, setting.output / "memory_vs_resolution.png")


if __name__ == "__main__":
    main()
