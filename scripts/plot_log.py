"""Draw the loss, accuracy and learning rate of one or several runs from their log.txt files."""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# For each panel its curves: the key in the log, the name in the legend, the line style.
PANELS = {
    "Loss": (("train_loss", "train", ":"), ("test_loss", "test", "-")),
    "Top-1 accuracy (%)": (("test_acc1", "test", "-"), ("test_ema_acc1", "EMA", "--")),
    "Learning rate": (("train_lr", "learning rate", "-"),),
}


def read_log(path: Path) -> list[dict]:
    """The epochs in a log, in order; of an epoch that a resumed run repeated, the last.

    Raises:
        ValueError: the log cannot be read or holds no finished epoch.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    epochs = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            epochs[record["step" if "step" in record else "epoch"]] = record
        except (ValueError, TypeError, KeyError) as error:
            if number < len(lines):  # the last line may be half-written
                raise ValueError(f"line {number} of {path} is not the JSON of an epoch") from error
    if not epochs:
        raise ValueError(f"{path} holds no finished epoch yet")
    return [epochs[epoch] for epoch in sorted(epochs)]


def run_names(paths: Sequence[Path]) -> list[str]:
    """The folder of each log, or its whole path where two folders share a name."""
    folders = [path.resolve().parent.name for path in paths]
    count = Counter(folders)
    return [f if count[f] == 1 else str(path) for f, path in zip(folders, paths, strict=True)]


def label(name: str, epochs: Sequence[dict]) -> str:
    """A run's line in the legend: its name, size and best accuracy, as far as they are logged."""
    parts = [name]
    if "n_parameters" in epochs[-1]:
        parts.append(f"{epochs[-1]['n_parameters'] / 1e6:.1f} M parameters")
    if accuracies := [epoch["test_acc1"] for epoch in epochs if "test_acc1" in epoch]:
        parts.append(f"best top-1 {max(accuracies):.1f} %")
    return ", ".join(parts)


def draw_panel(axes: Axes, title: str, runs: Sequence[Sequence[dict]]) -> None:
    """Draw the curves of one panel, a colour for each run and a line style for each quantity."""
    styles = []
    for key, name, style in PANELS[title]:
        logged = [[epoch for epoch in epochs if key in epoch] for epochs in runs]
        for index, epochs in enumerate(logged):
            axes.plot(
                [epoch["epoch"] for epoch in epochs],
                [epoch[key] for epoch in epochs],
                linestyle=style,
                marker="." if len(epochs) == 1 else None,
                color=COLOURS[index % len(COLOURS)],
            )
        if any(logged):
            styles.append(Line2D([], [], color="0.3", linestyle=style, label=name))
    if len(styles) > 1:
        axes.legend(handles=styles, frameon=False)
    axes.set_title(title, loc="left")
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def draw(logs: dict[str, list[dict]]) -> Figure:
    """Draw the runs, given as epochs by name, into one figure."""
    figure = Figure(figsize=(13, 4.2 + 0.25 * len(logs)), dpi=120, layout="constrained")
    figure.get_layout_engine().set(wspace=0.06)
    for axes, title in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        draw_panel(axes, title, list(logs.values()))
    runs = [
        Line2D([], [], color=COLOURS[i % len(COLOURS)], linewidth=3, label=label(name, epochs))
        for i, (name, epochs) in enumerate(logs.items())
    ]
    figure.legend(handles=runs, loc="outside upper left", frameon=False)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("logs", metavar="LOG", nargs="+", type=Path, help="log.txt of a run")
    parser.add_argument("--output", default="curves.png", type=Path, help="the picture to write")
    options = parser.parse_args(arguments)
    try:
        logs = [read_log(path) for path in options.logs]
        figure = draw(dict(zip(run_names(options.logs), logs, strict=True)))
        figure.savefig(options.output)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
