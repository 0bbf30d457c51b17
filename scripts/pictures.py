"""Pictures of a trace, in colour maps that the colour-blind can read by lightness."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from scripts.traces import Choice, Trace

ATTENTION, DECAY, STEPS = "magma", "cividis", "viridis"  # colour maps
MARK = "#56B4E9"  # of the query
PANEL = 1.75  # inches
DPI = 130


def attention(trace: Trace, choice: Choice) -> Figure:
    title = f"Effective attention of the patch in row {choice.query[0]}, column {choice.query[1]}"
    figure, axes = _panels(trace, choice.layers, [f"head {head}" for head in choice.heads], title)
    for layer, row in zip(choice.layers, axes, strict=True):
        for head, panel in zip(choice.heads, row[1:], strict=True):
            shown = _draw_attention(panel, trace, layer, head, choice.query)
            _add_scale(panel, shown)
        _draw_image(row[0], trace)
        _mark(row[0], trace, choice.query)
    return figure


def gates(trace: Trace, choice: Choice) -> Figure:
    number = len(trace.curves)
    columns = [(head, curve) for head in choice.heads for curve in range(number)]
    names = [f"head {h}" + f", curve {c + 1}" * (number > 1) for h, c in columns]
    figure, axes = _panels(trace, choice.layers, names, "Decays (gates) over the image")
    for layer, row in zip(choice.layers, axes, strict=True):
        _draw_image(row[0], trace)
        for (head, curve), panel in zip(columns, row[1:], strict=True):
            shown = _draw_gates(panel, trace, layer, head, curve)
    figure.colorbar(shown, ax=axes, fraction=0.015, pad=0.01, label="decay, 1 forgets nothing")
    return figure


def decays(trace: Trace, choice: Choice) -> Figure:
    figure = Figure(figsize=(_decays_width(trace), 0.36 * len(trace.weights) + 1.5), dpi=DPI,
                    layout="constrained")  # fmt: skip
    panel = figure.subplots()
    _draw_decays(panel, trace, fontsize=7)
    return figure


def curves(trace: Trace, choice: Choice) -> Figure:
    number = len(trace.curves)
    figure = Figure(figsize=(3 * number + 0.8, 3.4), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, number, squeeze=False)[0]
    for curve, panel in enumerate(panels):
        lines = _draw_curve(panel, trace, curve)
    figure.suptitle(f"Order {trace.order}, each curve read both ways", fontsize=11)
    figure.colorbar(lines, ax=panels, fraction=0.03, pad=0.02, label="step")
    return figure


def overview(trace: Trace, choice: Choice) -> Figure:
    """A row of what the model has learned, and one of what it does with this image."""
    layer, number = choice.layers[-1], min(len(trace.curves), 2)
    heads = choice.heads[: 3 if trace.selective else 6]
    gates = _varying_gates(trace, layer, choice.heads)[: 1 + number]
    widths = [1] * (1 + number) + [1.5] * (trace.decays is not None)
    count = len(heads) + len(gates)
    figure = Figure(figsize=(max(2.44 * sum(widths), 1.83 * count), 4.7), dpi=DPI,
                    layout="constrained")  # fmt: skip
    upper, lower = figure.subfigures(2, 1, height_ratios=[1.25, 1])
    panels = upper.subplots(1, len(widths), width_ratios=widths)
    _draw_image(panels[0], trace)
    _mark(panels[0], trace, choice.query)
    panels[0].set_title(f"{trace.prediction}\n(query marked)", fontsize=9)
    for curve in range(number):
        _draw_curve(panels[1 + curve], trace, curve)
    if trace.decays is not None:
        _draw_decays(panels[-1], trace, fontsize=6)
    panels = lower.subplots(1, count, squeeze=False)[0]
    for head, panel in zip(heads, panels, strict=False):
        shown = _draw_attention(panel, trace, layer, head, choice.query)
        panel.set_title(f"attention in layer {layer}\nhead {head}", fontsize=9)
        _add_scale(panel, shown)
    for (head, curve), panel in zip(sorted(gates), panels[len(heads) :], strict=True):
        shown = _draw_gates(panel, trace, layer, head, curve)
        panel.set_title(f"decays in layer {layer}\nhead {head}, curve {curve + 1}", fontsize=9)
        _add_scale(panel, shown)
    return figure


def _varying_gates(trace: Trace, layer: int, heads: list[int]) -> list[tuple[int, int]]:
    """Head and curve of the gates of `heads`, first what varies most over the image."""
    if not trace.selective:
        return []
    spread = trace.decays[layer - 1].std(-1)  # [curves, heads]
    places = [(head, curve) for head in dict.fromkeys(heads) for curve in range(len(spread))]
    return sorted(places, key=lambda place: -spread[place[1], place[0] - 1])


def _panels(
    trace: Trace, layers: list[int], names: list[str], title: str
) -> tuple[Figure, np.ndarray]:
    """A row for each layer: the image, and an empty panel for each name."""
    size = ((len(names) + 1) * PANEL + 1, len(layers) * PANEL + 0.9)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    axes = figure.subplots(len(layers), len(names) + 1, squeeze=False)
    for panel, name in zip(axes[0], [trace.prediction, *names], strict=True):
        panel.set_title(name, fontsize=8)
    for layer, row in zip(layers, axes, strict=True):
        row[0].set_ylabel(f"layer {layer}", fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure, axes


def _draw_image(panel: Axes, trace: Trace) -> None:
    panel.imshow(trace.pixels.numpy(), interpolation="nearest", extent=_extent(trace))
    panel.set(xticks=[], yticks=[])


def _draw_over_image(panel: Axes, trace: Trace, values: Tensor, **options) -> AxesImage:
    """`values` `[rows, columns]` in colours, and the image's outlines over them."""
    shown = panel.imshow(values.numpy(), extent=_extent(trace), interpolation="nearest", **options)
    grey = trace.pixels.mean(-1).numpy()
    height, width = grey.shape
    rows, columns = trace.grid
    x = (np.arange(width) + 0.5) * columns / width
    y = (np.arange(height) + 0.5) * rows / height
    if grey.max() > grey.min():
        level = (grey.max() + grey.min()) / 2
        outlines = panel.contour(x, y, grey, levels=[level], colors="white", linewidths=0.7)
        outlines.set_path_effects([withStroke(linewidth=1.4, foreground="black")])
    panel.set(xticks=[], yticks=[])
    return shown


def _draw_attention(
    panel: Axes, trace: Trace, layer: int, head: int, query: tuple[int, int]
) -> AxesImage:
    weights = trace.attention_of(layer, head, query)
    norm = PowerNorm(0.5, vmin=0, vmax=float(weights.max()))
    shown = _draw_over_image(panel, trace, weights, cmap=ATTENTION, norm=norm)
    _mark(panel, trace, query)
    return shown


def _draw_gates(panel: Axes, trace: Trace, layer: int, head: int, curve: int) -> AxesImage:
    values = trace.decays[layer - 1, curve, head - 1].view(trace.grid)
    return _draw_over_image(panel, trace, values, cmap=DECAY, vmin=0, vmax=1)


def _draw_decays(panel: Axes, trace: Trace, fontsize: int) -> None:
    means = trace.decays.mean(-1)  # [depth, curves, heads]
    depth, number, heads = means.shape
    table = means.transpose(1, 2).flatten(1).numpy()
    panel.imshow(table, cmap=DECAY, vmin=0, vmax=1, aspect="auto")
    for layer, row in enumerate(table):
        for place, value in enumerate(row):
            colour = "white" if value < 0.5 else "black"
            panel.text(place, layer, f"{value:.2f}", ha="center", va="center", color=colour,
                       fontsize=fontsize)  # fmt: skip
    names = [f"{head + 1}" + f"·{curve + 1}" * (number > 1)
             for head in range(heads) for curve in range(number)]  # fmt: skip
    panel.set_xticks(range(len(names)), names, fontsize=fontsize)
    panel.set_yticks(range(depth), range(1, depth + 1), fontsize=fontsize)
    panel.set_xlabel("head" + "·curve" * (number > 1), fontsize=8)
    panel.set_ylabel("layer", fontsize=8)
    panel.set_title("decays" + ", mean over the image" * trace.selective, fontsize=9)


def _draw_curve(panel: Axes, trace: Trace, curve: int) -> LineCollection:
    _draw_image(panel, trace)
    panel.images[0].set_alpha(0.35)
    visited = trace.curves[curve].numpy()
    rows, columns = np.divmod(visited, trace.grid[1])
    points = np.stack([columns + 0.5, rows + 0.5], axis=1)
    lines = LineCollection(np.stack([points[:-1], points[1:]], axis=1), cmap=STEPS, linewidths=2.2)
    lines.set_array(np.arange(1, len(visited)))
    panel.add_collection(lines)
    panel.plot(*points[0], "o", color="black", markersize=4)
    panel.set_title(f"curve {curve + 1} (from the dot)", fontsize=9)
    return lines


def _add_scale(panel: Axes, shown: AxesImage) -> None:
    scale = panel.figure.colorbar(shown, ax=panel, fraction=0.046, pad=0.03)
    scale.locator = MaxNLocator(4)
    scale.ax.tick_params(labelsize=6)


def _mark(panel: Axes, trace: Trace, query: tuple[int, int]) -> None:
    row, column = query
    panel.add_patch(Rectangle((column - 1, row - 1), 1, 1, fill=False, edgecolor=MARK, linewidth=2))


def _extent(trace: Trace) -> tuple[float, float, float, float]:
    """Axes in patches, rows downwards."""
    rows, columns = trace.grid
    return 0, columns, rows, 0


def _decays_width(trace: Trace) -> float:
    _, number, heads, _ = trace.decays.shape
    return max(3.2, 0.45 * number * heads + 1.2)
