"""The paper's table of image classification: time of a training step, and of inference with memory.

A step is forward, backward and AdamW on random images. Time is compared with a ViT whose softmax
attention is written out, as in the paper, and with one whose attention is the fastest of PyTorch's
(SDPA). The models take their turns in every round, so that a machine that slows down slows them
all. Memory is the weights and the most that inference holds beside them.
"""

import argparse
import copy
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from memory import peak_memory
from processes import init_distributed
from scripts.comparison import (
    EXPLICIT,
    MODELS,
    SIZES,
    attending,
    build,
    precision,
    seconds,
    weight_bytes,
    working_backends,
    write,
)

WARM_UP = 3
# Top-1 on ImageNet and the time of training divided by ViT's, on an A100 without FlashAttention.
PAPER = {
    "ViT": {"tiny": (70.2, 1), "small": (72.2, 1), "base": (77.9, 1)},
    "DeiT": {"tiny": (72.2, 1), "small": (79.8, 1), "base": (81.8, 1)},
    "Hydra": {"small": (78.6, 2.50), "base": (81.0, 2.51)},
    "Vim": {"tiny": (76.1, 9.48), "small": (80.3, 14.95), "base": (81.9, 10.86)},
    "LION-Lit": {"tiny": (68.9, 0.69), "small": (72.4, 0.74), "base": (74.7, 0.73)},
    "LION-D": {"tiny": (72.4, 1.48), "small": (73.5, 1.49), "base": (77.8, 1.39)},
    "LION-D♮": {"tiny": (74.2, 1.73), "small": (79.9, 1.66), "base": (80.2, 1.48)},
    "LION-S": {"tiny": (72.4, 2.05), "small": (74.0, 2.03), "base": (76.3, 1.46)},
    "LION-S♮": {"tiny": (73.5, 3.83), "small": (79.6, 2.72), "base": (79.9, 1.68)},
}


@dataclass
class Case:
    model: str
    attention: str  # EXPLICIT, one of the backends, or nothing: the model has no softmax
    parameters: int = 0
    step: float = math.nan  # seconds; NaN is out of memory
    inference: float = math.nan
    bytes: int = 0


@dataclass(frozen=True)
class Setting:
    size: str
    pixels: int
    batch: int
    device: torch.device
    compiled: bool
    repeats: int

    def __str__(self) -> str:
        kind = str(precision(self.device)).removeprefix("torch.")
        compiled = ", compiled" if self.compiled else ""
        return f"{self.size}, {self.pixels} px, batch size {self.batch}, {kind}{compiled}"

    def images(self) -> Tensor:
        return torch.randn(self.batch, 3, self.pixels, self.pixels, device=self.device)

    def ready(self, model: nn.Module) -> nn.Module:
        return torch.compile(model) if self.compiled else model


def training(model: nn.Module, case: Case, setting: Setting) -> Callable[[], None]:
    """The same step each time: the learning rate is 0."""
    cuda = setting.device.type == "cuda"
    images = setting.images()
    labels = torch.randint(model.num_classes, (setting.batch,), device=setting.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=cuda)
    forward = setting.ready(model.train())

    def step() -> None:
        with attending(case.attention):
            with torch.autocast(setting.device.type, torch.bfloat16, enabled=cuda):
                loss = F.cross_entropy(forward(images), labels)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def inference(model: nn.Module, case: Case, setting: Setting) -> Callable[[], None]:
    images = setting.images().to(precision(setting.device))
    forward = setting.ready(model)

    def run() -> None:
        with torch.inference_mode(), attending(case.attention):
            forward(images)

    return run


def medians(runs: Sequence[Callable[[], None]], setting: Setting, name: str) -> list[float]:
    """Seconds of each run, all in turn."""
    times = [[] for _ in runs]
    for _ in tqdm(range(WARM_UP + setting.repeats), desc=f"{name}, rounds", disable=None):
        for run, taken in zip(runs, times, strict=True):
            if not (taken and math.isnan(taken[-1])):
                taken.append(seconds(run, setting.device))
    return [t[-1] if math.isnan(t[-1]) else median(t[WARM_UP:]) for t in times]


def measure(cases: Sequence[Case], setting: Setting, steps_alone: bool = False) -> None:
    models = [
        build(case.model, setting.size, setting.pixels, case.attention).to(setting.device)
        for case in cases
    ]
    runs = [training(*pair, setting) for pair in zip(models, cases, strict=True)]
    for case, taken in zip(cases, medians(runs, setting, "training"), strict=True):
        case.step = taken
    if steps_alone:
        return
    models = [copy.deepcopy(model).eval().to(precision(setting.device)) for model in models]
    runs = [inference(*pair, setting) for pair in zip(models, cases, strict=True)]
    times = medians(runs, setting, "inference")
    for case, model, run, taken in zip(cases, models, runs, times, strict=True):
        with peak_memory(setting.device) as peak:
            seconds(run, setting.device)
        case.inference, case.bytes = taken, peak.bytes + weight_bytes(model)
        case.parameters = sum(p.numel() for p in model.parameters())


def make_cases(labels: Sequence[str], fastest: str) -> list[Case]:
    """ViT, which the others are divided by, first; models with softmax attention both ways."""
    cases = []
    for label in MODELS:
        if label in labels or label == "ViT":
            softmax = label in ("ViT", "DeiT")
            cases += [Case(label, a) for a in ((EXPLICIT, fastest) if softmax else ("",))]
    return cases


def table(cases: Sequence[Case], size: str) -> str:
    explicit, fastest = cases[:2]
    lines = [
        f"| model | attention | parameters | step, ms | / ViT, {EXPLICIT} "
        f"| / ViT, {fastest.attention} | inference, ms | peak, MiB "
        "| paper: time / ViT | paper: top-1 |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for c in cases:
        top1, time = PAPER[c.model].get(size, ("", ""))
        lines.append(
            f"| {c.model} | {c.attention} | {c.parameters:,} | {milliseconds(c.step)} "
            f"| {ratio(c.step, explicit.step)} | {ratio(c.step, fastest.step)} "
            f"| {milliseconds(c.inference)} | {c.bytes / 2**20:,.0f} | {time} | {top1} |"
        )
    return "\n".join(lines)


def milliseconds(taken: float) -> str:
    return "out of memory" if math.isnan(taken) else f"{taken * 1e3:.1f}"


def ratio(taken: float, vit: float) -> str:
    return "" if math.isnan(taken / vit) else f"{taken / vit:.2f}"


def plot(cases: Sequence[Case], setting: Setting, path: Path) -> None:
    """Steps of training divided by ViT's, here and in the paper."""
    explicit, fastest = cases[:2]
    shown = [c for c in cases if c.attention != fastest.attention or not c.attention]
    bars = {
        f"here, ViT with {EXPLICIT}": [c.step / explicit.step for c in shown],
        f"here, ViT with {fastest.attention}": [c.step / fastest.step for c in shown],
        "paper, A100": [PAPER[c.model].get(setting.size, (0, math.nan))[1] for c in shown],
    }
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    for i, (label, values) in enumerate(bars.items()):
        axes.bar([j + (i - 1) * 0.27 for j in range(len(shown))], values, 0.27, label=label)
    axes.set_xticks(range(len(shown)), [c.model for c in shown])
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_ylabel("time of a training step / ViT")
    axes.set_title(str(setting))
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parse(arguments: Sequence[str] | None) -> tuple[Setting, list[str], Path | None]:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--size", choices=SIZES, default="base", help="of the models (default: %(default)s)")
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), help="beside ViT")
    add("--image-size", type=int, default=224, help="pixels (default: %(default)s)")
    add("--batch-size", type=int, default=64, help="default: %(default)s")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--compile", action="store_true", help="the models, by torch.compile")
    add("--repeats", type=int, default=10, help="rounds (default: %(default)s)")
    add("--output", type=Path, help="folder for paper_table.md, .csv and .png")
    options = parser.parse_args(arguments)
    try:
        if min(options.batch_size, options.repeats) < 1:
            raise ValueError("batch size and repeats must be at least 1")
        with torch.device("meta"):
            build("ViT", options.size, options.image_size)
        device = init_distributed(options.device).device
        if options.output:
            options.output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    setting = Setting(
        options.size, options.image_size, options.batch_size, device, options.compile,
        options.repeats,
    )  # fmt: skip
    return setting, options.models, options.output


def main(arguments: Sequence[str] | None = None) -> None:
    setting, labels, folder = parse(arguments)
    backends = [Case("ViT", name) for name in working_backends(setting.device)]
    measure(backends, setting, steps_alone=True)
    fastest = min(backends, key=lambda case: (math.isnan(case.step), case.step))
    cases = make_cases(labels, fastest.attention)
    measure(cases, setting)
    choice = ", ".join(f"{case.attention} {milliseconds(case.step)}" for case in backends)
    facts = (
        f"Models: {setting}, median of {setting.repeats} rounds.",
        f"ViT's training step, ms: {choice}.",
    )
    tables = (*facts, table(cases, setting.size))
    write(folder, "paper_table", tables, [asdict(case) for case in cases])
    if folder:
        plot(cases, setting, folder / "paper_table.png")


if __name__ == "__main__":
    main()
