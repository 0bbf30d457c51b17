"""What a run leaves: means, progress lines, `log.txt`, TensorBoard, scores and provenance."""

import csv
import importlib.metadata
import json
import logging
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from errors import UserError
from files import replacing, writing
from processes import World
from urls import without_secrets

logger = logging.getLogger(__name__)

RUN_FILES = ("log.txt", "checkpoint.pth", "checkpoint.previous.pth", "best_checkpoint.pth")
# Of what commands write: they would not survive to find a folder in its place, or would wait for a
# pipe. `model` is the folder of mlm.pretrain.
SUFFIXES = {".pth", ".txt", ".yaml", ".json", ".jsonl", ".csv", ".md", ".png"}
FOLDERS = ("model",)
TEXT = {"errors": "backslashreplace", "newline": ""}


@dataclass
class Mean:
    """Running mean of numbers, in float64."""

    total: float = 0.0
    count: int = 0

    def update(self, value: float) -> None:
        self.total += value
        self.count += 1

    def state(self) -> tuple[float, int]:
        return self.total, self.count

    def over(self, world: World) -> float:
        """Mean over the updates of all processes."""
        sums = torch.tensor([self.total, self.count], dtype=torch.float64, device=world.device)
        total, count = world.reduce(sums).tolist()
        return total / max(count, 1)


class Mark(NamedTuple):
    """A moment in training: steps done, and seconds since some moment, in all and for data."""

    step: int
    seconds: float
    waited: float


class Pace(NamedTuple):
    """Images/s, or of what else a step has, and the share of time that waits for data."""

    speed: float
    waiting: float


class Progress:
    """A bar with images/s and time left on a terminal, else a plain line every `interval` steps.

    `images` counts the images, or what `unit` says, of one step over all processes. `steps_after`
    is how many steps of the run follow this bar's: then the time left of the run is shown, too.
    """

    def __init__(
        self,
        header: str,
        steps: int,
        images: int,
        *,
        start: int = 0,
        interval: int,
        show: bool,
        unit: str = "img",
        steps_after: int = 0,
    ) -> None:
        self.header, self.steps, self.images, self.start = header, steps, images, start
        self.interval, self.unit, self.steps_after = interval, unit, steps_after
        self.waited = self.pauses = 0.0
        self.began = self.lap_began = self.shown = self._mark(start)
        self.last = Pace(0.0, 0.0)
        self.bar = tqdm(
            desc=header,
            total=steps * images,
            initial=start * images,
            unit=unit,
            unit_scale=unit != "img",
            leave=False,
            disable=not (show and sys.stdout.isatty()),
            file=sys.stdout,
        )

    def due(self, step: int) -> bool:
        return step % self.interval == 0 or step == self.steps - 1

    def waiting_for(self, batches: Iterable) -> Iterator:
        """`batches`; the time until each one is there counts as waiting.

        Their iterator, which may draw random numbers, is made here and not at the first batch.
        """
        return self._timed(iter(batches))

    def _timed(self, batches: Iterator) -> Iterator:
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - began
            if batch is None:
                return
            yield batch

    def update(self, step: int, **values: Tensor | float) -> None:
        """Step `step` is done; `values` are shown if it is due."""
        self.bar.update(self.images)
        if not self.due(step):
            return
        done = step + 1
        self.last, self.shown = self._since(self.shown, done), self._mark(done)
        shown = "  ".join(f"{name}: {value:.4g}" for name, value in values.items())
        waiting = f"data: {self.last.waiting:.0%}"
        left = f" (run {self._time_of(self._run_left(done))})" if self.steps_after else ""
        self.bar.set_postfix_str(f"{shown}  {waiting}{left}", refresh=False)
        if self.bar.disable:
            speed = self.speed(done)
            eta = self._time_of((self.steps - done) * self.images / speed)
            logger.info(
                "%s  [%*d/%d]  eta: %s%s  %s  %s/s: %.1f (mean %.1f)  %s",
                self.header, len(str(self.steps)), step, self.steps, eta, left, shown, self.unit,
                self.last.speed, speed, waiting,
            )  # fmt: skip

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The block's time does not count."""
        began = time.perf_counter()
        yield
        self.pauses += time.perf_counter() - began

    def seconds(self) -> float:
        """Since the start."""
        return self._mark(self.start).seconds - self.began.seconds

    def speed(self, done: int) -> float:
        """Images/s since the start, after `done` steps."""
        return self._since(self.began, done).speed

    def lap(self, done: int, name: str) -> dict[str, float]:
        """Speeds since the last lap, or the start, after `done` steps, in `name` (images, say)."""
        mean, self.lap_began = self._since(self.lap_began, done), self._mark(done)
        speeds = {
            f"{name}_per_second": mean.speed,
            f"{name}_per_second_last": self.last.speed,  # of the last interval
            "data_share": mean.waiting,
        }
        left = {"hours_left": self._run_left(done) / 3600} if done > self.start else {}
        return speeds | left

    def close(self) -> None:
        """Ends the display."""
        self.bar.close()

    def _run_left(self, done: int) -> float:
        """Seconds until the end of the run, evaluations left out, after `done` steps."""
        return (self.steps - done + self.steps_after) * self.images / self.speed(done)

    def _mark(self, step: int) -> Mark:
        return Mark(step, time.perf_counter() - self.pauses, self.waited)

    def _since(self, mark: Mark, done: int) -> Pace:
        now = self._mark(done)
        seconds = now.seconds - mark.seconds
        images = (done - mark.step) * self.images
        return Pace(images / seconds, (now.waited - mark.waited) / seconds)

    @staticmethod
    def _time_of(seconds: float) -> timedelta:
        return timedelta(seconds=int(seconds))


class Journal:
    """`log.txt`, TensorBoard and `args.yaml` in a run's folder; silent where the folder is None.

    `first_epoch` is where the run goes on: what a killed run logged from there on is dropped.
    `clock` names what counts the records, where it is not epochs.
    """

    def __init__(
        self,
        folder: str | Path | None,
        facts: dict[str, Any],
        first_epoch: int,
        clock: str = "epoch",
    ) -> None:
        self.clock = clock
        self.folder = Path(folder) if folder else None
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.folder / "args.yaml", **TEXT) as file:
            yaml.safe_dump(without_secrets(facts), file, sort_keys=False)
        self._drop_from(first_epoch, self.folder / "log.txt")
        with writing(self.folder):
            self.board = SummaryWriter(str(self.folder), purge_step=first_epoch)

    def write(self, stats: dict[str, Any], **speeds: float) -> None:
        """Adds a record: one line of JSON, and every number to TensorBoard, `speeds` there only."""
        if self.folder is None:
            return
        with writing(self.folder / "log.txt"), (self.folder / "log.txt").open("a") as file:
            file.write(to_json(stats) + "\n")
        with writing(self.folder):
            for name, value in {**stats, **speeds}.items():
                if name not in (self.clock, "n_parameters"):
                    self.board.add_scalar(name.replace("_", "/", 1), value, stats[self.clock])
            self.board.flush()

    def _drop_from(self, epoch: int, log: Path) -> None:
        if not log.exists():
            return
        *lines, last = log.read_text(encoding="utf-8", errors="backslashreplace").split("\n")
        if self._epoch_of(last) > -math.inf:  # whole, or a kill has cut it off
            lines.append(last)
        with replacing(log) as file:
            file.writelines(f"{line}\n" for line in lines if self._epoch_of(line) < epoch)

    def _epoch_of(self, line: str) -> float:
        """Before all epochs for what is no record: notes and blank lines of the user's stay."""
        try:
            return float(json.loads(line)[self.clock])
        except (ValueError, TypeError, KeyError, RecursionError):
            return -math.inf


def require_writable(folder: Path, world: World, argument: str = "--output_dir") -> None:
    """Raises UserError on all processes if the main one cannot write to `folder`.

    What is made to find out is removed again. `argument` is the user's name of the folder.
    """
    problem = _obstacle(folder) if world.is_main else None
    if problem := world.gather(problem)[0]:
        shown = folder if str(folder).isprintable() else ascii(str(folder))
        raise UserError(f"{argument} {shown} {problem}")


def _obstacle(folder: Path) -> str | None:
    """Why nothing can be written to a folder, None if it can."""
    missing = []
    try:
        if not str(folder).isprintable():
            return "is no plain UTF-8 in one line: choose another name."
        if folder.exists() and not folder.is_dir():
            return "is a file: choose a folder."
        for path in folder.iterdir() if folder.exists() else ():
            if SUFFIXES.intersection(path.suffixes) and not path.is_file():
                return f"holds {path.name}, which is no file: move it elsewhere."
            if path.name in FOLDERS and not path.is_dir():
                return f"holds {path.name}, which is no folder: move it elsewhere."
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as probe:
            probe.write(bytes(2**16))  # a full disk has room for an empty file
            probe.flush()
            return None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        return f"cannot be written to ({reason}): choose another folder."
    finally:
        for path in missing:
            with suppress(OSError, ValueError):
                path.rmdir()


def write_scores(
    folder: Path, facts: dict[str, Any], classes: list[str], per_class: list[list[float]]
) -> None:
    """`eval.json`, and `per_class.csv` with class, images, correct and accuracy in %.

    Bytes of class names that are no UTF-8 are written as \\udcXX.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "eval.json", **TEXT) as file:
        file.write(to_json(without_secrets(facts), indent=2) + "\n")
    with replacing(folder / "per_class.csv", **TEXT) as file:
        rows = csv.writer(file)
        rows.writerow(["class", "images", "correct", "acc1"])
        for name, (images, correct) in zip(classes, per_class, strict=True):
            rows.writerow(
                [name, int(images), int(correct), round(100 * correct / max(images, 1), 3)]
            )


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON of nested dicts and lists; numbers that are not finite, which it has not, are null."""
    return json.dumps(_finite_or_none(value), indent=indent, allow_nan=False)


def _finite_or_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite_or_none(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite_or_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def provenance() -> dict[str, str]:
    """What a result depends on beside the arguments: versions, git commit, command, hardware."""
    packages = ("torch", "torchvision", "timm", "numpy")
    git = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
    ]
    commit = _output_of(git, otherwise="unknown")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {
        "command": " ".join(sys.argv),
        "commit": commit,
        "python": sys.version.split()[0],
        **{name: importlib.metadata.version(name) for name in packages},
        "device": device,
    }


def _output_of(command: list[str], otherwise: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return otherwise
