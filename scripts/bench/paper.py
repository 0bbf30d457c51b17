"""The paper's figures, and its tables and pictures with what is measured here beside them."""

import math
from collections.abc import Sequence

from matplotlib.figure import Figure

from scripts.bench import report
from scripts.bench.cases import EXPLICIT, INFERENCE, OUT_OF_MEMORY, SOFTMAX, TRAINING, Case, split

# Top-1 on ImageNet and the time of training divided by ViT's, on an A100 without FlashAttention.
TRAINED = {
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
# GB of base models for 64 images on an A100 of 80 GB; resolutions here are multiples of 16.
PIXELS = (224, 512, 736, 1024, 1248, 2496)
MEMORY = {
    "ViT, explicit softmax": (0.40, 2.44, 8.35, 27.8, 58.5, OUT_OF_MEMORY),
    "Hydra": (1.05, 5.46, 11.3, 21.9, 32.5, OUT_OF_MEMORY),
    "Vim": (0.85, 4.36, 9.0, 17.4, 25.8, OUT_OF_MEMORY),
    "LION, RNN": (0.62, 2.11, 4.26, 8.25, 12.3, 49.0),
}


def steps_of(cases: Sequence[Case]) -> tuple[list[Case], Case, Case]:
    """Training steps, of softmax explicit and the fastest; and those of the two ViTs."""
    steps = [case for case in cases if case.step == TRAINING]
    vits = [case for case in steps if case.model == "ViT"]
    explicit = next((case for case in vits if case.form == EXPLICIT), vits[0])
    fastest = min(vits[::-1], key=lambda c: (c.form == EXPLICIT, bool(c.note), c.seconds))
    kept = [c for c in steps if c.model not in SOFTMAX or c.form in (EXPLICIT, fastest.form)]
    return kept, explicit, fastest


def trained(case: Case) -> tuple[float, float]:
    """The paper's top-1 and time over the ViT's; its ViT and DeiT have no fused attention."""
    known = {} if case.model in SOFTMAX and case.form != EXPLICIT else TRAINED[case.model]
    return known.get(case.scale, (math.nan, math.nan))


def paper_table(cases: Sequence[Case]) -> str:
    """A table for each group of training steps, with its inference."""
    return "\n\n".join(map(group_table, split(cases, lambda case: case.group[1:]).values()))


def group_table(cases: Sequence[Case]) -> str:
    steps, explicit, fastest = steps_of(cases)
    header = ("model", " parameters", " step, ms", f" / {explicit.label}", f" / {fastest.label}",
              " inference, ms", " peak, MiB", " paper: time / ViT", " paper: top-1")  # fmt: skip
    runs = {case.label: case for case in cases if case.step == INFERENCE}
    lines = []
    for case in steps:
        run = runs.get(case.label, case)
        top1, time = trained(case)
        lines.append([
            case.label, f"{case.parameters:,}" if case.parameters else "",
            case.note or f"{case.seconds * 1e3:.1f}",
            *(report.number(case.seconds / vit.seconds, ".2f") for vit in (explicit, fastest)),
            *report.or_note(run, f"{run.seconds * 1e3:.1f}", f"{run.bytes / 2**20:,.0f}"),
            report.number(time, ""), report.number(top1, ""),
        ])  # fmt: skip
    return report.rows(header, lines)


def draw_paper(cases: Sequence[Case]) -> Figure:
    """Steps of training divided by the ViT's, here and in the paper: of the first group."""
    first = next(case.group for case in cases if case.step == TRAINING)
    steps, explicit, fastest = steps_of([case for case in cases if case.group == first])
    bars = [
        (f"here / {explicit.label}", "0.35", [c.seconds / explicit.seconds for c in steps]),
        (f"here / {fastest.label}", "#56b4e9", [c.seconds / fastest.seconds for c in steps]),
        ("paper (A100) / its ViT", "#e69f00", [trained(case)[1] for case in steps]),
    ]
    figure = Figure(figsize=(8.5, 0.5 * len(steps) + 1.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for i, (name, colour, values) in enumerate(bars):
        places = [j + (i - 1) * 0.27 for j in range(len(steps))]
        drawn = axes.barh(places, values, 0.27, label=name, color=colour)
        axes.bar_label(drawn, fmt="%.2f", fontsize=7, padding=2)
    axes.set_yticks(range(len(steps)), [case.label for case in steps])
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.axvline(1, color="0.7", linewidth=0.8, zorder=0)
    axes.set_xlabel("time of a training step / that of the ViT")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    size = f"{explicit.scale}, {explicit.pixels} px, batch size {explicit.batch}"
    axes.set_title(f"{size}\n{report.conditions(steps)}", fontsize=10, loc="left")
    return figure


def resolution_table(cases: Sequence[Case]) -> str:
    """Memory, with the paper's, and time of inference by resolution."""
    memory = report.by_size(cases, "GB", lambda case: f"{case.bytes / 1e9:.2f}")
    sizes = dict.fromkeys(case.pixels for case in cases)
    for label, values in MEMORY.items():
        known = dict(zip(PIXELS, values, strict=True))
        cells = (str(known.get(pixels, "")) for pixels in sizes)
        memory += f"\n| *paper, base, batch 64: {label}* | {' | '.join(cells)} |"
    return memory + "\n\n" + report.by_size(cases, "ms", lambda c: f"{c.seconds * 1e3:,.2f}")


def draw_resolution(cases: Sequence[Case]) -> Figure:
    title = f"inference, {cases[0].scale}, batch size {cases[0].batch}"
    quantities = (("peak memory, GB", lambda c: c.bytes / 1e9), ("time, s", lambda c: c.seconds))
    return report.draw_lines({title: cases}, quantities, "pixels")
