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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from errors import UserError
from files import replacing
from processes import World
from urls import without_secrets

logger = logging.getLogger(__name__)

TEXT = {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""}


class Mean:
    """Running mean that stays on the device until it is read."""

    def __init__(self, device: torch.device, total: float = 0.0, count: int = 0) -> None:
        self.total = torch.tensor(total, dtype=torch.float64, device=device)
        self.count = count

    def update(self, value: Tensor | float) -> None:
        self.total += value
        self.count += 1

    def state(self) -> tuple[float, int]:
        return self.total.item(), self.count

    def over(self, world: World) -> float:
        """Mean over the updates of all processes."""
        sums = torch.stack([self.total, torch.full_like(self.total, self.count)])
        total, count = world.reduce(sums).tolist()
        return total / max(count, 1)


class Progress:
    """A bar with images/s and time left on a terminal, else a plain line every `interval` steps.

    `images` counts the images, or what `unit` says, of one step over all processes.
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
    ) -> None:
        self.header, self.steps, self.images, self.start = header, steps, images, start
        self.interval, self.unit = interval, unit
        self.began = time.perf_counter()
        self.lap_start, self.lap_began = start, self.began
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

    def update(self, step: int, **values: Tensor | float) -> None:
        """Step `step` is done; `values` are shown if it is due."""
        self.bar.update(self.images)
        if not self.due(step):
            return
        text = "  ".join(f"{name}: {value:.4g}" for name, value in values.items())
        self.bar.set_postfix_str(text, refresh=False)
        if self.bar.disable:
            rate = (step + 1 - self.start) / self.seconds()
            eta = timedelta(seconds=int((self.steps - step - 1) / rate))
            logger.info(
                "%s  [%*d/%d]  eta: %s  %s  %s/s: %.1f",
                self.header, len(str(self.steps)), step, self.steps, eta, text, self.unit,
                rate * self.images,
            )  # fmt: skip

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The block's time does not count."""
        began = time.perf_counter()
        yield
        pause = time.perf_counter() - began
        self.began += pause
        self.lap_began += pause

    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self.began

    def speed(self, done: int) -> float:
        """Images/s since the start, after `done` steps."""
        return (done - self.start) * self.images / self.seconds()

    def lap(self, done: int) -> float:
        """Images/s since the last lap, or the start, after `done` steps."""
        now = time.perf_counter()
        speed = (done - self.lap_start) * self.images / (now - self.lap_began)
        self.lap_start, self.lap_began = done, now
        return speed

    def close(self) -> float:
        """Ends the display; returns images/s since the start."""
        self.bar.close()
        return self.speed(self.steps)


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
        self.board = SummaryWriter(str(self.folder), purge_step=first_epoch)

    def write(self, stats: dict[str, Any], **speeds: float) -> None:
        """Adds a record: one line of JSON, and every number to TensorBoard, `speeds` there only."""
        if self.folder is None:
            return
        with (self.folder / "log.txt").open("a") as file:
            file.write(to_json(stats) + "\n")
        for name, value in {**stats, **speeds}.items():
            if name not in (self.clock, "n_parameters"):
                self.board.add_scalar(name.replace("_", "/", 1), value, stats[self.clock])
        self.board.flush()

    def _drop_from(self, epoch: int, log: Path) -> None:
        if not log.exists():
            return
        text = log.read_text(encoding="utf-8", errors="backslashreplace")
        lines = text.splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("\n")]
        with replacing(log) as file:
            file.writelines(line for line in whole if self._epoch_of(line) < epoch)

    def _epoch_of(self, line: str) -> float:
        """Before all epochs for what is no record: notes and blank lines of the user's stay."""
        try:
            return float(json.loads(line)[self.clock])
        except (ValueError, TypeError, KeyError):
            return -math.inf


def require_writable(folder: Path, world: World, argument: str = "--output_dir") -> None:
    """Raises UserError on all processes if the main one cannot write to `folder`.

    What is made to find out is removed again. `argument` is the user's name of the folder.
    """
    problem = _obstacle(folder) if world.is_main else None
    if problem := world.gather(problem)[0]:
        raise UserError(f"{argument} {folder} {problem}")


def _obstacle(folder: Path) -> str | None:
    """Why nothing can be written to a folder, None if it can."""
    missing = []
    try:
        if not str(folder).isprintable():
            return "is no plain UTF-8: choose another name."
        if folder.exists() and not folder.is_dir():
            return "is a file: choose a folder."
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
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
