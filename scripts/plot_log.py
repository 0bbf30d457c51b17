"""Draw the loss, accuracy and learning rate of runs of main.py or mlm.pretrain from their logs."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from errors import UserError, as_user_error
from files import require_place

# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# What counts the records of main.py and of mlm.pretrain, and for each panel its curves: the key in
# the log, the name in the legend, the line style.
PANELS = {
    "epoch": {
        "Loss": (("train_loss", "train", ":"), ("test_loss", "test", "-")),
        "Top-1 accuracy (%)": (("test_acc1", "test", "-"), ("test_ema_acc1", "EMA", "--")),
        "Learning rate": (("train_lr", "learning rate", "-"),),
    },
    "step": {
        "Loss of masked tokens": (("train_loss", "train", ":"), ("eval_loss", "held out", "-")),
        "Accuracy of masked tokens (%)": (("eval_accuracy", "held out", "-"),),
        "Learning rate": (("train_lr", "learning rate", "-"),),
    },
}
ACCURACIES = {"epoch": ("test_acc1", "top-1"), "step": ("eval_accuracy", "accuracy")}


def read_log(path: Path) -> list[dict]:
    """The records of a log in order, of an epoch or step that was repeated the last.

    `path` is a log.txt or the folder of a run. Raises UserError if the log cannot be read, or has
    both epochs and steps.
    """
    path = path / "log.txt" if path.is_dir() else path
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    found = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            found[clock_of([record]), record[clock_of([record])]] = record
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            if number < len(lines):  # the last line may be half-written
                raise UserError(
                    f"line {number} of {path} is not the JSON of an epoch or step: "
                    "give a log.txt that a training has written"
                ) from error
    if len({clock for clock, _ in found}) > 1:
        raise UserError(f"{path} has lines of main.py and of mlm.pretrain: draw one run at a time")
    return [found[key] for key in sorted(found)]


def clock_of(records: Sequence[dict]) -> str:
    """What counts the records of a run: epochs, or steps of the optimiser."""
    return "epoch" if "epoch" in records[0] else "step"


def run_names(paths: Sequence[Path]) -> list[str]:
    """The folder of each log, or its whole path where two folders share a name."""
    folders = [(p if p.is_dir() else p.parent).resolve().name for p in paths]
    count = Counter(folders)
    return [f if count[f] == 1 else str(path) for f, path in zip(folders, paths, strict=True)]


def label(name: str, records: Sequence[dict]) -> str:
    """A run's line in the legend: its name, size and best accuracy, as far as they are logged."""
    parts = [name.replace("$", r"\$")]  # which would begin a formula
    if "n_parameters" in records[-1]:
        parts.append(f"{rounded(records[-1]['n_parameters'])} parameters")
    key, accuracy = ACCURACIES[clock_of(records)]
    if accuracies := [record[key] for record in records if key in record]:
        parts.append(f"best {accuracy} {max(accuracies):.1f} %")
    return ", ".join(parts)


def rounded(count: int) -> str:
    """5686540 is 5.7 M, 12345 is 12.3 k."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return str(count)


def draw_panel(axes: Axes, title: str, runs: Sequence[Sequence[dict]], clock: str) -> None:
    """Draw the curves of one panel, a colour for each run and a line style for each quantity."""
    styles = []
    for key, name, style in PANELS[clock][title]:
        logged = [[record for record in run if key in record] for run in runs]
        for index, run in enumerate(logged):
            axes.plot(
                [record[clock] for record in run],
                [record[key] for record in run],
                linestyle=style,
                marker="." if len(run) == 1 else None,
                color=COLOURS[index % len(COLOURS)],
            )
        if any(logged):
            styles.append(Line2D([], [], color="0.3", linestyle=style, label=name))
    if len(styles) > 1:
        axes.legend(handles=styles, frameon=False)
    axes.set_title(title, loc="left")
    axes.set_xlabel(clock)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def draw(logs: dict[str, list[dict]]) -> Figure:
    """Draw the runs, given as records by name, into one figure.

    Raises UserError for runs of main.py beside those of mlm.pretrain.
    """
    clock, *others = dict.fromkeys(map(clock_of, logs.values()))
    if others:
        raise UserError("runs of main.py and of mlm.pretrain have other curves: draw them apart")
    panels = PANELS[clock]
    figure = Figure(figsize=(13, 4.2 + 0.25 * len(logs)), dpi=120, layout="constrained")
    figure.get_layout_engine().set(wspace=0.06)
    for axes, title in zip(figure.subplots(1, len(panels)), panels, strict=True):
        draw_panel(axes, title, list(logs.values()), clock)
    runs = [
        Line2D([], [], color=COLOURS[i % len(COLOURS)], linewidth=3, label=label(name, records))
        for i, (name, records) in enumerate(logs.items())
    ]
    figure.legend(handles=runs, loc="outside upper left", frameon=False)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "logs", metavar="LOG", nargs="+", type=Path, help="log.txt of a run, or its folder"
    )
    parser.add_argument(
        "--output", default="curves.png", type=Path, help="the picture (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    try:
        require_place(options.output)
        logs = [read_log(path) for path in options.logs]
        for path, records in zip(options.logs, logs, strict=True):
            if not records:
                raise UserError(f"{path} holds no finished epoch or step yet")
        figure = draw(dict(zip(run_names(options.logs), logs, strict=True)))
        with as_user_error():  # endings that are no format
            figure.savefig(options.output)
    except (UserError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
