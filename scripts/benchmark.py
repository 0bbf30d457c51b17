"""Measure time and peak memory of LION's formats beside timm's ViT.

Whole models with random weights run on one float32 image. Every case takes its turn in every round,
so that a machine that slows down slows them all; memory is measured in a process for each case.
"""

import argparse
import csv
import math
import multiprocessing
import platform
import re
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from pathlib import Path
from statistics import median

import timm
import torch
from timm.models import is_model_in_modules
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from curves import ORDERS
from models_lion import FEATURE_MAPS, FORMATS
from utils import init_distributed, peak_memory, provenance

# Mask and order of LION's mixer; Lit has no decay and therefore no order.
VARIANTS = ("Lit", *(f"{m}-{order}" for m in FEATURE_MAPS if m != "Lit" for order in ORDERS))
VIT = "ViT"
# Sentence, format and tokens of two cases, what of the first is divided by the second's, range.
CLAIMS = (
    ("Chunk at 4,097 tokens is {:.1f} times faster than Attention (claimed: at least 4)",
     ("Attention", 4097), ("Chunk", 4097), "seconds", (4, math.inf)),
    ("Chunk takes {:.2f} times as long at 4,097 tokens as at 1,025 (claimed: at most 5)",
     ("Chunk", 4097), ("Chunk", 1025), "seconds", (0, 5)),
    ("RNN's peak memory at 4,097 tokens is {:.3f} of Attention's (claimed: below 0.25)",
     ("RNN", 4097), ("Attention", 4097), "bytes", (0, 0.25)),
)  # fmt: skip

# Forks processes from one that has imported the libraries and done nothing else.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["timm", "torch.utils.tensorboard"])


@dataclass
class Case:
    step: str  # inference, or training: forward and backward
    pixels: int
    tokens: int
    model: str
    variant: str  # one of VARIANTS, or VIT
    format: str
    chunk_size: int
    seconds: float = math.nan  # the median of the runs
    runs: int = 0
    bytes: int = 0


@cache
def build(name: str, variant: str, device: torch.device) -> nn.Module:
    mask, _, order = variant.partition("-")
    options = {} if variant == VIT else {"mask_type": mask, "order": order or "Normal"}
    return timm.create_model(name, dynamic_img_size=True, **options).to(device)


def make_cases(
    steps: Sequence[str], sizes: Sequence[int], names: dict[str, str], chunk_size: int
) -> list[Case]:
    """The cases of models given by variant; ValueError for a size that they cannot take."""
    cases = []
    for step, pixels, (variant, name) in product(steps, sizes, names.items()):
        model = build(name, variant, torch.device("cpu"))
        patch_size = model.patch_embed.patch_size[0]
        if pixels % patch_size:
            raise ValueError(f"a size must be a multiple of {patch_size} pixels, not {pixels}")
        tokens = (pixels // patch_size) ** 2 + model.num_prefix_tokens
        for format in ["SDPA"] if variant == VIT else FORMATS:
            if (step, format) != ("training", "RNN"):
                cases.append(Case(step, pixels, tokens, name, variant, format, chunk_size))
    return cases


def run(case: Case, device: torch.device, warm_up: bool = False) -> float:
    """Seconds of one step; to warm up, of one on a few patches, which take little memory."""
    model = build(case.model, case.variant, device)
    if case.variant != VIT:
        model.set_format(case.format, case.chunk_size)
    training = case.step == "training"
    pixels = 2 * model.patch_embed.patch_size[0] if warm_up else case.pixels
    x = torch.randn(1, 3, pixels, pixels, device=device)
    synchronize = torch.cuda.synchronize if x.is_cuda else lambda: None
    synchronize()
    start = time.perf_counter()
    with torch.inference_mode(not training):
        logits = model.train(training)(x)
    if training:
        logits.mean().backward()
    synchronize()
    taken = time.perf_counter() - start
    model.zero_grad()
    return taken


def peak_bytes(case: Case, device: torch.device, threads: int) -> int:
    torch.set_num_threads(threads)
    run(case, device, warm_up=True)
    with peak_memory(device) as peak:
        run(case, device)
    return peak.bytes


def measure_memory(cases: Sequence[Case], device: torch.device, threads: int) -> None:
    for case in tqdm(cases, desc="memory, cases", disable=None):
        with ProcessPoolExecutor(1, mp_context=processes) as fresh:
            case.bytes = fresh.submit(peak_bytes, case, device, threads).result()


def measure_time(cases: Sequence[Case], device: torch.device, repeats: int, budget: float) -> None:
    """Runs each case `repeats` times, or as often (at least once) as fits into `budget` seconds.

    The first run at full size counts only where it is the only one.
    """
    times = [[] for _ in cases]
    for case in cases:
        run(case, device, warm_up=True)
    for _ in tqdm(range(repeats + 1), desc="time, rounds", disable=None):
        for case, taken in zip(cases, times, strict=True):
            if not taken or sum(taken) + taken[-1] <= budget:
                taken.append(run(case, device))
                counted = taken[1:] or taken
                case.seconds, case.runs = median(counted), len(counted)


def table(cases: Sequence[Case]) -> str:
    """Markdown, with the ratios to the ViT of the same step and size."""
    lines = [
        "| step | tokens | model | format | ms | / ViT | runs | peak MiB | / ViT |",
        "|---|--:|---|---|--:|--:|--:|--:|--:|",
    ]
    vits = {(c.step, c.pixels): c for c in cases if c.variant == VIT}
    for c in cases:
        vit = vits[c.step, c.pixels]
        name = c.model if c is vit else f"LION {c.variant}"
        lines.append(
            f"| {c.step} | {c.tokens:,} | {name} | {c.format} "
            f"| {c.seconds * 1e3:.1f} | {c.seconds / vit.seconds:.2f} | {c.runs} "
            f"| {c.bytes / 2**20:.1f} | {c.bytes / (vit.bytes or math.nan):.2f} |"
        )
    return "\n".join(lines)


def claims(cases: Sequence[Case]) -> str:
    """A line for each claim about two cases that were measured."""
    lines = []
    found = {(c.step, c.variant, c.format, c.tokens): c for c in cases}
    for step, variant in dict.fromkeys((c.step, c.variant) for c in cases):
        for sentence, first, second, quantity, (low, high) in CLAIMS:
            pair = [found.get((step, variant, *key)) for key in (first, second)]
            if all(pair):
                value = getattr(pair[0], quantity) / getattr(pair[1], quantity)
                verdict = "met" if low <= value <= high else "missed"
                lines.append(f"- {step}, LION {variant}: {sentence.format(value)}: {verdict}")
    return "\n".join(lines)


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    return names[0] if names else platform.machine()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--model", default="lion_tiny_patch16_224", help="LION (default: %(default)s)")
    add("--vit", default="vit_tiny_patch16_224", help="timm's ViT (default: %(default)s)")
    add("--sizes", nargs="+", type=int, default=[512, 1024], help="of the image, in pixels")
    add("--masks", nargs="+", choices=[*VARIANTS, "all"], default=["Decay-Normal", "Selective-S"])
    add("--chunk-size", type=int, default=64, help="default: %(default)s, the fastest on a CPU")
    add("--train", action="store_true", help="measure a training step, too, but not of RNN")
    add("--threads", type=int, default=1, help="of the CPU; several wait for other processes")
    add("--repeats", type=int, default=10, help="of each case, at most")
    add("--seconds", type=float, default=60, help="for each case; one run is made in any case")
    add("--output", type=Path, help="folder for benchmark.md and benchmark.csv")
    options = parser.parse_args(arguments)
    try:
        if min(options.chunk_size, options.threads, options.repeats, *options.sizes) < 1:
            raise ValueError("sizes, chunk size, threads and repeats must be at least 1")
        for name, module in (options.model, "models_lion"), (options.vit, "vision_transformer"):
            if not is_model_in_modules(name, [module]):
                raise ValueError(f"{name} is not a model of {module}")
        device = init_distributed(options.device).device
        variants = VARIANTS if "all" in options.masks else options.masks
        names = {VIT: options.vit, **dict.fromkeys(variants, options.model)}
        steps = ["inference", "training"] if options.train else ["inference"]
        cases = make_cases(steps, options.sizes, names, options.chunk_size)
        if options.output:
            options.output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    torch.set_num_threads(options.threads)
    measure_memory(cases, device, options.threads)
    measure_time(cases, device, options.repeats, options.seconds)
    facts = provenance()
    if device.type == "cpu":
        facts["device"] = f"{cpu_name()}, threads: {options.threads}"
    conditions = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    report = "\n\n".join([conditions, table(cases), claims(cases)])
    print(report)
    if options.output:
        (options.output / "benchmark.md").write_text(report + "\n")
        with (options.output / "benchmark.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=asdict(cases[0]))
            writer.writeheader()
            writer.writerows(map(asdict, cases))


if __name__ == "__main__":
    main()
