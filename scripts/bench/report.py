"""Measured cases as CSV, tables in markdown and pictures."""

import csv
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

from errors import UserError
from files import replacing
from scripts.bench.cases import EXPLICIT, NO_MIXING, OUT_OF_MEMORY, Case, split

# Okabe and Ito's colours, which the colour-blind can tell apart, and two greys.
COLOURS = {"ViT": "0.1", NO_MIXING: "0.6", "Hydra": "#cc79a7", "Vim": "#d55e00",
           "LION-Lit": "#e69f00", "LION-D": "#56b4e9", "LION-D♮": "#0072b2",
           "LION-S": "#8fd175", "LION-S♮": "#007a5a"}  # fmt: skip
# Lines that coincide still show: wide below, narrow and broken above.
STYLES = {
    "Attention": {"linewidth": 6, "alpha": 0.45, "marker": "", "zorder": 1},
    "RNN": {"linewidth": 2.2, "linestyle": (0, (5, 2.5)), "marker": "s", "markersize": 8,
            "markerfacecolor": "none", "zorder": 3},
    "Chunk": {"linewidth": 1.5, "linestyle": (0, (1, 1.5)), "marker": "^", "markersize": 5,
              "color": "#00507a", "zorder": 3},
    "cudnn": {"linestyle": "--"}, "efficient": {"linestyle": ":"}, "math": {"linestyle": "-."},
    EXPLICIT: {"linestyle": "-."},
}  # fmt: skip
Quantity = tuple[str, Callable[[Case], float]]  # the name of an axis, and its values


def rows(header: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A table in markdown; columns whose name starts with a space are aligned to the right."""
    rule = ["--:" if name.startswith(" ") else "---" for name in header]
    cells = [[name.strip() for name in header], rule, *lines]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in cells)


def or_note(case: Case, *results: object) -> Sequence[object]:
    """Cells of a line: the results, or why there are none."""
    return (case.note, *[""] * (len(results) - 1)) if case.note else results


def number(value: float, pattern: str) -> str:
    return "" if math.isnan(value) else format(value, pattern)


def title_of(case: Case) -> str:
    compiled = f"compiled ({case.compiled})" if case.compiled else ""
    return ", ".join(filter(None, [case.step, case.scale, compiled]))


def bases(cases: Sequence[Case]) -> dict[tuple, Case]:
    """What groups are divided by: the first model, with the fastest of PyTorch's attention."""
    found = {}
    for key, group in split(cases, lambda case: case.group).items():
        usable = (c for c in group if c.model == group[0].model and c.form != EXPLICIT)
        working = (case for case in usable if not case.note)
        found[key] = min(working, key=lambda case: case.seconds, default=Case("", "", ""))
    return found


def ratios(case: Case, base: dict[tuple, Case]) -> tuple[float, float]:
    """Time and peak memory in those of the group's base."""
    other = base[case.group]
    return case.seconds / other.seconds, case.bytes / (other.bytes or math.nan)


def table(cases: Sequence[Case]) -> str:
    """Every case, with its ratios to the base of its group; speed is in images or tokens/s."""
    base = bases(cases)
    lines = []
    for case in cases:
        time, memory = ratios(case, base)
        results = or_note(
            case, f"{case.seconds * 1e3:.3f}", number(time, ".2f"), f"{case.rate:,.0f}", case.runs,
            f"{case.bytes / 2**20:.1f}", number(memory, ".2f"),
        )  # fmt: skip
        lines.append([title_of(case), f"{case.tokens:,}", case.batch, case.label, *results])
    return rows(("step", " tokens", " batch", "model", " ms", " / base", " per second", " runs",
                 " peak MiB", " / base"), lines)  # fmt: skip


def by_size(cases: Sequence[Case], title: str, cell: Callable[[Case], str]) -> str:
    """A line for each model, a column for each size."""
    size_of = lambda c: f" {c.pixels or c.tokens:,}{' px' * bool(c.pixels)}, batch {c.batch}"  # noqa: E731
    found = {(case.label, size_of(case)): case.note or cell(case) for case in cases}
    labels, sizes = map(dict.fromkeys, zip(*found, strict=True))
    lines = [[label, *(found.get((label, size), "") for size in sizes)] for label in labels]
    return rows([title, *sizes], lines)


def summary(cases: Sequence[Case]) -> str:
    """Time and its ratio to the base: a table by size for each step, scale and way to compile."""
    base = bases(cases)
    cell = lambda c: f"{c.seconds * 1e3:.3f}, {number(ratios(c, base)[0], '.2f')}"  # noqa: E731
    return "\n\n".join(by_size(group, f"{title}: ms, / base", cell)
                       for title, group in split(cases, title_of).items())  # fmt: skip


def write_csv(path: Path, cases: Sequence[Case]) -> None:
    with replacing(path, newline="") as file:
        writer = csv.DictWriter(file, fieldnames=asdict(cases[0]))
        writer.writeheader()
        writer.writerows(map(asdict, cases))


def read_csv(path: Path) -> list[Case]:
    """Raises UserError for what is no table of cases."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            cases = [Case(**{name: Case.__annotations__[name](text) for name, text in row.items()})
                     for row in csv.DictReader(file)]  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no CSV of this script ({error})") from error
    if not cases:
        raise UserError(f"{path} holds no case: measure some first")
    return cases


def conditions(cases: Sequence[Case]) -> str:
    """What a picture's numbers depend on."""
    seen = lambda name: ", ".join(dict.fromkeys(str(getattr(c, name)) for c in cases))  # noqa: E731
    return f"{seen('card')}; {seen('precision')}".replace("amp", "bfloat16 (mixed precision)")


def draw_ratios(cases: Sequence[Case]) -> Figure:
    """Time and memory over those of the base, a column of panels for each step and scale."""
    base = bases(cases)
    quantities = (("time / fastest softmax", lambda c: ratios(c, base)[0]),
                  ("peak memory / fastest softmax", lambda c: ratios(c, base)[1]))  # fmt: skip
    known = [q for q in quantities if not all(math.isnan(q[1](case)) for case in cases)]
    return draw_lines(split(cases, title_of), known or quantities, "tokens")


def draw_lines(groups: dict[str, list[Case]], quantities: Sequence[Quantity], size: str) -> Figure:
    """Quantities by `size`, tokens or pixels: a row of panels each; a column for each of groups."""
    panels = [(title, quantity) for quantity in quantities for title in groups]
    columns = len(groups) if len(groups) > 1 else len(quantities)
    lines = len(panels) // columns
    figure = Figure((4.4 * columns + 2.4, 3.4 * lines + 0.7), dpi=120, layout="constrained")
    legend, every = {}, list(chain(*groups.values()))
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes, (title, quantity) in zip(grid.flat, panels, strict=True):
        draw_panel(axes, groups[title], quantity, size)
        if quantity is quantities[0]:
            axes.set_title(title, loc="left", fontsize=10)
        legend |= {line.get_label(): line for line in axes.get_legend_handles_labels()[0]}
    if any(case.note == OUT_OF_MEMORY for case in every):
        cross = {"color": "0.3", "marker": "x", "markersize": 10, "linestyle": ""}
        legend["out of memory at the next size"] = Line2D([], [], **cross)
    figure.legend(legend.values(), legend, loc="outside right upper", frameon=False, fontsize=8,
                  handlelength=4)  # fmt: skip
    figure.suptitle(conditions(every), fontsize=10, x=0.01, ha="left")
    return figure


def draw_panel(axes: Axes, cases: Sequence[Case], quantity: Quantity, size: str) -> None:
    """A line for each model and form."""
    name, value = quantity
    for label, runs in split(cases, lambda case: case.label).items():
        style = {"color": COLOURS.get(runs[0].model), "marker": "."} | STYLES.get(runs[0].form, {})
        shown = [case for case in runs if not case.note and not math.isnan(value(case))]
        points = [(getattr(case, size), value(case)) for case in shown]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
        if points and any(case.note == OUT_OF_MEMORY for case in runs):
            axes.plot(*points[-1], "x", color=style["color"], markersize=13)
    ticks = sorted({getattr(case, size) for case in cases})
    axes.set(xscale="log", yscale="log", ylabel=name, axisbelow=True,
             xlabel=size.replace("pixels", "pixels per side of the image"))  # fmt: skip
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=45, ha="right",
                    rotation_mode="anchor", fontsize=8)  # fmt: skip
    axes.xaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    if high / low < 3:  # of which a logarithm shows few
        axes.set_yscale("linear")
    else:
        subs = (1, 2, 5) if high / low > 30 else (1, 1.5, 2, 3, 5, 7)
        axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set(major_formatter="{x:g}", minor_formatter=NullFormatter())
    axes.grid(color="0.92")
    axes.spines[["top", "right"]].set_visible(False)
