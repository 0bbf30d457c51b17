"""Measured cases as CSV, markdown and a picture."""

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from scripts.bench.cases import NAMES, SOFTMAX, Case
from scripts.bench.targets import verdicts

COLOURS = {
    SOFTMAX: "0.2", "no mixing": "0.6", "Lit": "#e69f00", "Decay-Normal": "#56b4e9",
    "Decay-S": "#0072b2", "Selective-Normal": "#8fd175", "Selective-S": "#007a5a",
}  # fmt: skip
STYLES = {"Attention": ":", "RNN": "--", "cudnn": "--", "efficient": ":", "math": "-."}


def baselines(cases: Iterable[Case]) -> dict[tuple, Case]:
    """The fastest softmax attention of each group."""
    found = {}
    for case in cases:
        if case.variant == SOFTMAX and not case.note:
            found[case.group] = min(found.get(case.group, case), case, key=lambda c: c.seconds)
    return found


def rows(header: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A table in markdown; columns whose name starts with a space are aligned to the right."""
    rule = ["--:" if name.startswith(" ") else "---" for name in header]
    cells = [[name.strip() for name in header], rule, *lines]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in cells)


def name_of(case: Case) -> str:
    return "SDPA" if case.variant == SOFTMAX and not case.pixels else NAMES[case.variant]


def size_of(case: Case) -> str:
    return f"{case.pixels:,} px" if case.pixels else f"{case.tokens:,}"


def title_of(case: Case) -> str:
    parts = [case.step, case.scale]
    return ", ".join([*parts, f"compiled ({case.compiled})"] if case.compiled else parts)


def table(cases: Sequence[Case]) -> str:
    """Every case, with its ratios to the fastest softmax attention of its group."""
    header = ("step", " tokens", " batch", "model", "format", " ms", " / softmax", " runs",
              " peak MiB", " / softmax")  # fmt: skip
    base = baselines(cases)
    lines = []
    for case in cases:
        start = [title_of(case), f"{case.tokens:,}", case.batch, name_of(case), case.format]
        if case.note:
            lines.append([*start, case.note, "", "", "", ""])
            continue
        time, memory = ratios(case, base)
        results = (f"{case.seconds * 1e3:.2f}", f"{time:.2f}",
                   case.runs, f"{case.bytes / 2**20:.1f}", f"{memory:.2f}")  # fmt: skip
        lines.append([*start, *results])
    return rows(header, lines)


def ratios(case: Case, base: dict[tuple, Case]) -> tuple[float, float]:
    """Time and peak memory in those of the group's fastest softmax attention."""
    other = base.get(case.group)
    if case.note or other is None:
        return math.nan, math.nan
    return case.seconds / other.seconds, case.bytes / (other.bytes or math.nan)


def summary(cases: Sequence[Case]) -> str:
    """Time over that of the fastest softmax attention: a table by size for each step and model."""
    base = baselines(cases)
    tables = []
    for title in dict.fromkeys(map(title_of, cases)):
        shown = [case for case in cases if title_of(case) == title]
        sizes = list(dict.fromkeys((size_of(c), c.batch) for c in shown))
        values = {}
        for case in shown:
            if case.variant != SOFTMAX:
                row = values.setdefault((name_of(case), case.format), {})
                row[size_of(case), case.batch] = case.note or f"{ratios(case, base)[0]:.2f}"
        softmax = {(size_of(c), c.batch): f"{c.seconds * 1e3:.2f} ms ({c.format})"
                   for c in base.values() if title_of(c) == title}  # fmt: skip
        first = name_of(next(c for c in shown if c.variant == SOFTMAX))
        lines = [[first, "", *(softmax.get(size, "") for size in sizes)]]
        lines += [[*key, *(row.get(size, "") for size in sizes)] for key, row in values.items()]
        header = [title, "format", *(f" {size}, batch {batch}" for size, batch in sizes)]
        tables.append(rows(header, lines))
    return "\n\n".join(tables)


def targets_table(cases: Sequence[Case]) -> str:
    """Of targets for what was measured, a line for several sizes; empty if there are none."""
    found = {}
    for verdict in verdicts(cases):
        case = verdict.case
        model = f"{name_of(case)} {case.format}".strip()
        found.setdefault((title_of(case), model, verdict.target.text), []).append(verdict)
    lines = []
    for key, group in found.items():
        missed = [size_of(v.case) for v in group if not v.met]
        values = ", ".join(f"{size_of(v.case)}: {v}" for v in group)
        lines.append([*key, values, f"**missed** at {', '.join(missed)}" if missed else "met"])
    return rows(("step", "model", "in", "measured (target)", "verdict"), lines) if lines else ""


def text(facts: dict[str, str], cases: Sequence[Case]) -> str:
    """The whole report in markdown."""
    conditions = "\n".join(f"- {name}: {value}" for name, value in facts.items())
    parts = [conditions, table(cases), summary(cases), targets_table(cases)]
    return "\n\n".join(filter(None, parts))


def write_csv(path: Path, cases: Sequence[Case]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=asdict(cases[0]))
        writer.writeheader()
        writer.writerows(map(asdict, cases))


def draw(cases: Sequence[Case]) -> Figure:
    """Ratios to softmax attention by tokens, a column of panels for each step and model."""
    base = baselines(cases)
    titles = list(dict.fromkeys(map(title_of, cases)))
    size = (4.2 * len(titles) + 1.8, 7)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    lines = {}
    for column, title in zip(figure.subplots(2, len(titles), squeeze=False).T, titles, strict=True):
        shown = [case for case in cases if title_of(case) == title]
        for row, axes in enumerate(column):
            lines |= draw_panel(axes, shown, [ratios(case, base)[row] for case in shown])
        column[0].set_title(title, loc="left", fontsize=10)
        column[1].set_xlabel("tokens")
        if title == titles[0]:
            column[0].set_ylabel("time / fastest softmax")
            column[1].set_ylabel("peak memory / fastest softmax")
    figure.legend(lines.values(), lines, loc="outside right upper", frameon=False, fontsize=8)
    return figure


def draw_panel(axes: Axes, cases: Sequence[Case], values: Sequence[float]) -> dict[str, object]:
    """A line for each model and format; returns them by what they show."""
    series = {}
    for case, value in zip(cases, values, strict=True):
        if not math.isnan(value):
            points = series.setdefault((case.variant, case.format), [])
            points.append((case.tokens, value))
    lines = {}
    for (variant, format), points in series.items():
        label = f"{'softmax' if variant == SOFTMAX else NAMES[variant]} {format}".strip()
        style = {"linestyle": STYLES.get(format, "-"), "color": COLOURS[variant], "marker": "."}
        (lines[label],) = axes.plot(*zip(*points, strict=True), **style)
    axes.set(xscale="log", yscale="log")
    ticks = sorted({case.tokens for case in cases})
    axes.set_xticks(ticks, [f"{tokens:,}" for tokens in ticks], rotation=30, fontsize=8)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.7), max(high, 1.4))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return lines
