"""Sentence tasks: their settings, their TSV files and their metrics."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from scipy.stats import spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from errors import UserError
from files import is_folder_name, require_file
from mlm.fields import setting
from mlm.settings import check_ranges

logger = logging.getLogger(__name__)

METRICS: dict[str, Callable[[list, list], float]] = {
    "accuracy": accuracy_score,
    "f1": f1_score,
    "matthews": matthews_corrcoef,
    "spearman": lambda labels, outputs: float(spearmanr(labels, outputs).statistic),
}
LEAST_WHOLE = 0.99  # share of a file's rows; with less, the file is another than the settings say
RANGES = {"batch": "[1, inf)", "epochs": "[1, inf)", "weight_decay": "[0, inf)",
          "seeds": "[0, 4294967296)"}  # fmt: skip
REGRESSION = ("spearman",)  # metrics of tasks whose labels are numbers


@dataclass(frozen=True)
class Task:
    """One sentence task."""

    train: str = setting("TSV file in the folder data")
    eval: list[str] = setting("TSV files in the folder data")
    text: list[str] = setting("columns of text, one or two")
    label: str = setting("column of the labels")
    metrics: list[str] = setting(", ".join(METRICS))
    batch: int = setting("examples of a step")
    epochs: int = setting("times over the training file")
    weight_decay: float = setting("of a step at the peak learning rate")
    seeds: list[int] = setting("one job each")
    header: list[str] = setting("names of the columns, where the files have none", factory=list)
    start: str | None = setting("task whose model it starts from", None)
    precision: str = setting("bf16 or fp32, on a GPU", "bf16")

    def check(self, name: str) -> None:
        """Raises UserError for values that make no sense."""
        if not is_folder_name(name):
            raise UserError(f"The task {name!r} is no name of a folder: rename it.")
        unknown = [metric for metric in self.metrics if metric not in METRICS]
        if unknown or not self.metrics:
            raise UserError(
                f"Unknown metrics {unknown} of {name}: choose from {', '.join(METRICS)}."
            )
        if self.regression and set(self.metrics) - set(REGRESSION):
            raise UserError(
                f"metrics of {name} mix those of values and those of classes: give one kind."
            )
        if len(self.text) not in (1, 2):
            raise UserError(f"{name} must have one or two text columns, not {len(self.text)}.")
        if self.precision not in ("bf16", "fp32"):
            raise UserError(f"precision of {name} must be bf16 or fp32, not {self.precision!r}.")
        if min(len(self.eval), len(self.seeds)) < 1:
            raise UserError(f"eval and seeds of {name} must not be empty.")
        for what, values in (("seeds", self.seeds), ("eval", [Path(f).stem for f in self.eval])):
            if len(set(values)) < len(values):
                raise UserError(f"{what} of {name} must differ in their names, not {values}.")
        check_ranges(self, RANGES, f" of {name}")

    def check_labels(self, examples: "Examples", path: Path) -> None:
        """Raises UserError for labels of a file that the metrics, or training, make nothing of."""
        if self.regression:
            if len(set(examples.labels)) < 2:
                raise UserError(f"{path} has no two different labels, without which there is no "
                                 "correlation.")  # fmt: skip
        elif len(examples.classes) < 2:
            raise UserError(f"{path} has examples of one class alone, {examples.classes[0]!r}.")
        elif "f1" in self.metrics and len(examples.classes) > 2:
            raise UserError(
                f"f1 is a metric of two classes, and {path} has {len(examples.classes)} "
                f"({', '.join(examples.classes[:5])}): choose accuracy or matthews."
            )

    @property
    def regression(self) -> bool:
        return any(metric in REGRESSION for metric in self.metrics)


@dataclass(frozen=True)
class Examples:
    """Texts, one or two each, and labels: numbers of `classes`, or values if there are none."""

    texts: list[tuple[str, ...]]
    labels: list[float]
    classes: list[str]


def read_examples(folder: Path, name: str, task: Task, classes: list[str] | None) -> Examples:
    """The examples of a TSV file; `classes` None takes the labels in it for the classes.

    Raises UserError if a column or value is missing or wrong.
    """
    path = folder / name
    header, rows = _read_rows(path, task.header)
    missing = [column for column in (*task.text, task.label) if column not in header]
    if missing:
        raise UserError(
            f"{path} has no column {', '.join(map(repr, missing))}, only: {', '.join(header)}."
        )
    places, place = [header.index(column) for column in task.text], header.index(task.label)
    whole = [row for row in rows if len(row) > max(*places, place)]
    if len(whole) < LEAST_WHOLE * len(rows) or not whole:
        raise UserError(
            f"{path} has {len(whole)} whole examples in {len(rows)} rows: the others have too few "
            "columns."
        )
    if len(whole) < len(rows):  # there are such in QQP
        logger.warning("%s: %d rows with too few columns left out", path, len(rows) - len(whole))
    texts = [tuple(row[p] for p in places) for row in whole]
    labels = [row[place] for row in whole]
    if task.regression:
        return Examples(texts, [_number(label, path) for label in labels], [])
    classes = sorted(set(labels)) if classes is None else classes
    unknown = sorted(set(labels) - set(classes))
    if unknown:
        raise UserError(f"{path} has labels that the training file lacks: {', '.join(unknown)}.")
    return Examples(texts, [classes.index(label) for label in labels], classes)


def _read_rows(path: Path, header: list[str]) -> tuple[list[str], list[list[str]]]:
    """The header and the rows; quotes mean nothing in GLUE's files."""
    try:
        require_file(path)
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            rows = [line.rstrip("\r\n").split("\t") for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read the examples {path}: {reason}") from error
    if header:
        return header, rows
    if not rows:
        raise UserError(f"{path} is empty.")
    return rows[0], rows[1:]


def _number(label: str, path: Path) -> float:
    try:
        number = float(label)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{path} has the label {label!r}, which is no finite number.")
    return number


def score(task: Task, labels: list[float], outputs: list[float]) -> dict[str, float]:
    """The task's metrics in %: of numbers of classes, or values. Equal outputs correlate by 0."""
    scores = {metric: 100 * float(METRICS[metric](labels, outputs)) for metric in task.metrics}
    return {metric: value if math.isfinite(value) else 0.0 for metric, value in scores.items()}
