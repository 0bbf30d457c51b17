"""The programs that a recipe can name: their arguments, commands, logs and tables."""

import shutil
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from matplotlib.axes import Axes

from arguments import check_args, get_args_parser
from errors import UserError, as_user_error
from mlm import glue, pretrain
from mlm.modeling import LionBertConfig, LionBertForMaskedLM
from mlm.settings import check, override, read_yaml, typed
from mlm.tasks import Task
from scripts.plot_log import COLOURS

if TYPE_CHECKING:
    from scripts.comparing.recipes import Run

ROOT = Path(__file__).resolve().parent.parent.parent
DATA = "$DATA"  # stands for --data-path in the settings of the language models
FINE_TUNED = "fine_tuned"  # folder in that of a run


class Column(NamedTuple):
    """Of a table with a row for each model: what it says of the runs with all seeds."""

    title: str
    cell: Callable[[Sequence["Run"]], str]


class Program(Protocol):
    clock: str  # what counts the records of log.txt: epoch or step

    def check(self, arguments: Sequence[str], fine_tune: Sequence[str]) -> int:
        """How many epochs or steps a run has. Raises UserError for wrong arguments."""

    def settings(self, arguments: Sequence[str]) -> dict:
        """What the file that arguments begin with says, arguments included; {} without one."""

    def option(self, name: str, value: str) -> tuple[str, ...]:
        """The arguments that set one value."""

    def progress(self, record: dict) -> int:
        """Epochs or steps that are done at a record of log.txt."""

    def next_command(self, run: "Run", data_path: str, device: str) -> list[str] | None:
        """What a run has to do next; None when it is finished."""

    def tidy(self, run: "Run") -> None:
        """Removes the weights that a finished run has left."""

    def merit(self, run: "Run") -> float:
        """By which the better of two finished runs has more."""

    def summary(self, run: "Run") -> str:
        """How well a finished run did."""

    def columns(self, runs: Sequence["Run"]) -> list[Column]: ...

    def draw(self, axes: Axes, by_model: dict[str, list["Run"]]) -> None:
        """A picture of finished runs."""


def across_seeds(values: Sequence[float]) -> str:
    """Mean and, of several, standard deviation."""
    spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(values):.2f}{spread}"


def remove_checkpoints(folder: Path) -> None:
    for checkpoint in folder.glob("*.pth"):
        checkpoint.unlink()


def last(name: str) -> Callable[[Sequence["Run"]], str]:
    return lambda runs: across_seeds([run.log[-1][name] for run in runs])


PARAMETERS = Column("parameters", lambda runs: f"{runs[0].log[-1]['n_parameters']:,}")
MINUTES = Column("minutes", lambda runs: f"{mean(run.seconds for run in runs) / 60:.1f}")


class Images:
    """main.py: `--name value`; scored by the top-1 accuracy of the last epoch, never the best."""

    clock = "epoch"

    def check(self, arguments: Sequence[str], fine_tune: Sequence[str]) -> int:
        if fine_tune:
            raise UserError("main.py has no fine_tune: that is for program: mlm.pretrain.")
        if unfit := {"--help", "-h", "--eval"}.intersection(arguments):
            raise UserError(f"A recipe trains: leave {unfit.pop()} out of its arguments.")
        args = get_args_parser().parse_args(arguments)
        _check_free(args.given, ("seed", "output_dir", "resume", "data_path"))
        check_args(args)
        return args.epochs

    def settings(self, arguments: Sequence[str]) -> dict:
        return {}

    def option(self, name: str, value: str) -> tuple[str, ...]:
        return f"--{name}", value

    def progress(self, record: dict) -> int:
        return record["epoch"] + 1

    def next_command(self, run: "Run", data_path: str, device: str) -> list[str] | None:
        if run.trained == run.length:
            return None
        command = [sys.executable, str(ROOT / "main.py"), *run.arguments, "--seed", str(run.seed),
                   "--data-path", data_path, "--output_dir", str(run.folder),
                   "--resume", "auto"]  # fmt: skip
        return [*command, "--device", device] if device else command

    def tidy(self, run: "Run") -> None:
        remove_checkpoints(run.folder)

    def merit(self, run: "Run") -> float:
        return run.log[-1]["test_acc1"]

    def summary(self, run: "Run") -> str:
        return f"top-1 {run.log[-1]['test_acc1']:.2f} %"

    def columns(self, runs: Sequence["Run"]) -> list[Column]:
        seeds = Column("seeds", lambda runs: ", ".join(f"{self.merit(run):.2f}" for run in runs))
        return [PARAMETERS, Column("top-1", last("test_acc1")), seeds, MINUTES]

    def draw(self, axes: Axes, by_model: dict[str, list["Run"]]) -> None:
        """A row for each model: points for seeds, a bar for their mean."""
        for row, runs in enumerate(by_model.values()):
            accuracies = [self.merit(run) for run in runs]
            axes.plot(accuracies, [row] * len(runs), "o", color=COLOURS[0], alpha=0.6)
            axes.plot([mean(accuracies)], [row], "|", color=COLOURS[1], markersize=14, mew=2)
        axes.set_yticks(range(len(by_model)), list(by_model))
        axes.invert_yaxis()
        axes.set_xlabel("top-1 accuracy of the last epoch (%)")


class Text:
    """mlm.pretrain: a configuration and `key=value`; scored by the last loss on held-out text.

    With `fine_tune`, a configuration of mlm.glue and `key=value`, each run ends with these tasks.
    """

    clock = "step"

    def check(self, arguments: Sequence[str], fine_tune: Sequence[str]) -> int:
        settings = typed(pretrain.Settings, _settings(arguments), arguments[0])
        given = [word.partition("=")[0] for word in arguments]
        _check_free(given, ("seed", "output", "resume"))
        settings.check()
        options = check(LionBertConfig.__annotations__, settings.model, "the section model")
        with as_user_error(), torch.device("meta"):  # weights that take no memory
            LionBertForMaskedLM(LionBertConfig(**options))
        if fine_tune:
            tasks = typed(glue.Settings, _settings(fine_tune), fine_tune[0]).tasks
            for name, values in tasks.items():
                typed(Task, values, f"the task {name} of {fine_tune[0]}").check(name)
        return settings.steps

    def settings(self, arguments: Sequence[str]) -> dict:
        return _settings(arguments)

    def option(self, name: str, value: str) -> tuple[str, ...]:
        return (f"{name}={value}",)

    def progress(self, record: dict) -> int:
        return record["step"]

    def next_command(self, run: "Run", data_path: str, device: str) -> list[str] | None:
        if run.trained == run.length and self._scores(run) is not None:
            return None
        where = [f"device={device}"] if device else []
        if run.trained == run.length and (run.folder / "model").exists():
            name, words, output = "mlm.glue", run.fine_tune, run.folder / FINE_TUNED
            where += ["--model", str(run.folder / "model")]
        else:
            name, words, output = "mlm.pretrain", run.arguments, run.folder
            where += [f"seed={run.seed}", "resume=auto"]
        config, *settings = (word.replace(DATA, data_path) for word in words)
        return [sys.executable, "-m", name, str(ROOT / config), *settings, f"output={output}",
                *where]  # fmt: skip

    def tidy(self, run: "Run") -> None:
        remove_checkpoints(run.folder)
        folders = [run.folder / "model", *(run.folder / FINE_TUNED).glob("*/")]
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)

    def merit(self, run: "Run") -> float:
        return -run.log[-1]["eval_loss"]

    def summary(self, run: "Run") -> str:
        return "held-out loss {eval_loss:.3f}, accuracy {eval_accuracy:.2f} %".format(**run.log[-1])

    def columns(self, runs: Sequence["Run"]) -> list[Column]:
        columns = [PARAMETERS, Column("held-out loss", last("eval_loss")),
                   Column("accuracy, %", last("eval_accuracy"))]  # fmt: skip
        if (level := runs[0].plateau) is not None:
            columns.append(Column(f"above {level:g} % from step", _leaving))
        for task in self._scores(runs[0]):
            columns.append(Column(f"{task}, %", lambda runs, task=task: across_seeds(
                [self._scores(run)[task] for run in runs])))  # fmt: skip
        return [*columns, Column("tokens/s", _speed), MINUTES]

    def draw(self, axes: Axes, by_model: dict[str, list["Run"]]) -> None:
        """Loss on held-out text by steps, a colour for each model."""
        for number, (model, runs) in enumerate(by_model.items()):
            for run in runs:
                axes.plot(
                    [record["step"] for record in run.log],
                    [record["eval_loss"] for record in run.log],
                    color=COLOURS[number % len(COLOURS)],
                    linestyle=("-", "--", ":")[number // len(COLOURS) % 3],
                    label=model if run is runs[0] else None,
                )
        axes.set_xlabel("step")
        axes.set_ylabel("loss on held-out text (nats)")
        axes.legend(frameon=False)

    @staticmethod
    def _scores(run: "Run") -> dict[str, float] | None:
        """Of each task; None if they are outstanding."""
        if not run.fine_tune:
            return {}
        scores = glue.read_result(run.folder / FINE_TUNED / "results.json")
        return {name: score for name, score in scores.items() if name != "mean"} or None


def _check_free(given: Collection[str], own: Sequence[str]) -> None:
    """Raises UserError for arguments among those that each run gets from compare.py."""
    if taken := [name for name in own if name in given]:
        raise UserError(
            f"compare.py itself gives runs their {taken[0]}: leave it out of arguments."
        )


def _settings(words: Sequence[str]) -> dict:
    """Of a configuration's path in the repository and `key=value`; UserError for other words."""
    if not words or "=" in words[0]:
        raise UserError(
            f"{' '.join(words)!r} must begin with a file such as mlm/configs/tiny.yaml."
        )
    config, *settings = words
    return override(read_yaml(ROOT / config), settings)


def _leaving(runs: Sequence["Run"]) -> str:
    """The step of the first evaluation above the plateau, with each seed."""
    steps = []
    for run in runs:
        above = [r["step"] for r in run.log if r["eval_accuracy"] > run.plateau]
        steps.append(f"{above[0]:,}" if above else "never")
    return ", ".join(steps)


def _speed(runs: Sequence["Run"]) -> str:
    """The median over evaluations, as some intervals hold compilation or a start."""
    speeds = sorted(record["tokens_per_second"] for run in runs for record in run.log)
    return f"{speeds[len(speeds) // 2]:,.0f}"


PROGRAMS: dict[str, Program] = {"main.py": Images(), "mlm.pretrain": Text()}
