"""Measured cases as CSV, markdown and a picture."""

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from matplotlib.figure import Figure

from scripts.bench.cases import NAMES, SOFTMAX, Case
from scripts.bench.targets import verdicts

COLOURS = {
    SOFTMAX: "0.2", "no mixing": "0.6", "Lit": "#e69f00", "Decay-Normal": "#56b4e9",
    "Decay-S": "#0072b2", "Selective-Normal": "#8fd175", "Selective-S": "#007a5a",
}  # fmt: skip
STYLES = {"Attention": ":", "RNN": "--"}  # the rest is drawn solid


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
        results = (f"{case.seconds * 1e3:.{2 if case.seconds < 0.1 else 1}f}", f"{time:.2f}",
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
    """Of targets for what was measured; empty if there are none."""
    lines = []
    for verdict in verdicts(cases):
        case, target = verdict.case, verdict.target
        bounds = [f"at least {target.low:.3g}"] if target.low else []
        bounds += [f"at most {target.high:.3g}"] if math.isfinite(target.high) else []
        what = f"{name_of(case)} {case.format}".strip()
        cells = (title_of(case), size_of(case), what, verdict.text, ", ".join(bounds))
        lines.append([*cells, "met" if verdict.met else "**missed**"])
    header = ("step", " size", "model", "measured", "target", "verdict")
    return rows(header, lines) if lines else ""


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
    grid = figure.subplots(2, len(titles), sharex="col", squeeze=False)
    handles = {}
    for (row, quantity), (column, title) in (
        (a, b) for a in enumerate(("time", "peak memory")) for b in enumerate(titles)
    ):
        axes = grid[row][column]
        series = {}
        for case in cases:
            if title_of(case) == title and not math.isnan(ratios(case, base)[row]):
                series.setdefault((case.variant, case.format), []).append(case)
        for (variant, format), points in series.items():
            label = f"{name_of(points[0])} {format}".strip()
            (line,) = axes.plot(
                [case.tokens for case in points],
                [ratios(case, base)[row] for case in points],
                color=COLOURS[variant], linestyle=STYLES.get(format, "-"), marker=".",
                alpha=0.5 if variant == SOFTMAX else 1,
            )  # fmt: skip
            handles.setdefault(label, line)
        axes.axhline(1, color="0.7", linewidth=0.8, zorder=0)
        axes.set(xscale="log", yscale="log", ylabel=f"{quantity} / softmax" if not column else "")
        axes.grid(color="0.92")
        axes.spines[["top", "right"]].set_visible(False)
        if row == 0:
            axes.set_title(title, loc="left", fontsize=10)
        else:
            axes.set_xlabel("tokens")
    figure.legend(handles.values(), handles, loc="outside right upper", frameon=False, fontsize=8)
    return figure
