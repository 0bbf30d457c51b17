"""Trains a table of models, with several seeds each, and reports the accuracy of the last epoch.

    python scripts/compare.py RECIPE --data-path DATA --output FOLDER [-- main.py arguments]

RECIPE is a YAML file with the `arguments` of main.py that all runs share, `seeds`, and `models`,
whose own arguments stand by their names. Several runs at once share each GPU. Called again it goes
on where every run stands, so that the whole can be spread over many short leases of a machine: with
`--minutes 9`, runs that have not ended by then save and leave, and once speeds are known only runs
start that can end. `--report` trains nothing and writes comparison.md and comparison.png.
"""

import argparse
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import yaml  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

import main as training  # noqa: E402
from errors import UserError, as_user_error  # noqa: E402
from processes import StopSignal  # noqa: E402
from scripts.plot_log import COLOURS, read_log  # noqa: E402

# Exit codes of a run that was told to leave: once it had saved, and before there was anything.
STOPPED = tuple(
    code for number in (signal.SIGTERM, signal.SIGINT) for code in (128 + number, -number)
)


@dataclass(frozen=True)
class Run:
    """One model with one seed: what main.py is told, where it writes, and its epochs."""

    model: str
    seed: int
    arguments: tuple[str, ...]
    folder: Path
    epochs: int

    def __str__(self) -> str:
        return f"{self.model}, seed {self.seed}"

    @property
    def log(self) -> list[dict]:
        with as_user_error():
            return read_log(self.folder / "log.txt") if (self.folder / "log.txt").exists() else []

    @property
    def leases(self) -> list[dict]:
        """Of each time that the run was started: `epochs` trained, `seconds` and runs at once."""
        file = self.folder / "leases.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    @property
    def is_finished(self) -> bool:
        return bool(self.log) and self.log[-1]["epoch"] == self.epochs - 1

    @property
    def has_begun(self) -> bool:
        return (self.folder / "checkpoint.pth").exists()

    @property
    def done(self) -> int:
        """Epochs that need no repetition."""
        return len(self.log) if self.has_begun or self.is_finished else 0


@dataclass
class Started:
    run: Run
    process: subprocess.Popen
    slot: int
    done: int
    began: float = field(default_factory=time.monotonic)


def read_recipe(
    path: Path,
    output: Path,
    *,
    models: Sequence[str] = (),
    seeds: Sequence[int] = (),
    more: Sequence[str] = (),
    vary: Sequence[str] = (),
) -> list[Run]:
    """The runs of a recipe, those of the first seed first.

    `models` and `seeds` choose some; `more` are arguments for all. `vary` is an argument's name and
    its values, each of which makes a model of its own.

    Raises:
        UserError: the recipe or an argument of main.py in it is wrong, or a folder holds a run
            with other arguments.
    """
    try:
        recipe = yaml.safe_load(path.read_text())
        table = {str(name): shlex.split(text) for name, text in recipe["models"].items()}
        common, own_seeds = shlex.split(recipe["arguments"]), recipe["seeds"]
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is no recipe ({' '.join(str(error).split())}): it needs arguments, seeds and "
            "models."
        ) from error
    if unknown := [name for name in models if name not in table]:
        raise UserError(f"{path} has no model {unknown[0]}: it has {', '.join(table)}.")
    if wrong := [name for name in table if not re.fullmatch(r"[\w.+-]+", name)]:
        raise UserError(f"The model {wrong[0]!r} is no name of a folder: rename it in {path}.")
    variants = [(f",{vary[0]}={v}", (f"--{vary[0]}", v)) for v in vary[1:]] or [("", ())]
    runs = []
    chosen = itertools.product(seeds or own_seeds, models or table, variants)
    for seed, name, (suffix, varied) in chosen:
        arguments = (*common, *table[name], *more, *varied)
        args = training.get_args_parser().parse_args(arguments)
        training.check_args(args)
        folder = output / f"{name}{suffix}" / f"seed{seed}"
        runs.append(Run(f"{name}{suffix}", seed, arguments, folder, args.epochs))
    for run in runs:
        check_same_arguments(run)
    return runs


def check_same_arguments(run: Run) -> None:
    file = run.folder / "arguments.txt"
    if file.exists() and file.read_text() != shlex.join(run.arguments):
        raise UserError(
            f"{run.folder} holds a run with other arguments ({file.name}): choose another --output "
            "or remove it."
        )


class Scheduler:
    """Runs that train at once, `concurrent` of them on each GPU (or on the CPU), for a time."""

    def __init__(
        self,
        runs: Sequence[Run],
        data_path: str,
        *,
        concurrent: int,
        seconds: float,
        keep_checkpoints: bool = False,
    ) -> None:
        self.runs = runs
        self.data_path = data_path
        self.gpus = torch.cuda.device_count()
        self.slots = set(range(concurrent * max(1, self.gpus)))
        self.seconds = seconds
        self.end = time.monotonic() + seconds
        self.keep_checkpoints = keep_checkpoints
        self.started: list[Started] = []
        self.failed: list[Run] = []

    def work(self) -> None:
        """Until all is finished, nothing more fits into the time, or a signal comes."""
        stop = StopSignal()
        waiting = [run for run in self.runs if not run.is_finished]
        waiting.sort(key=lambda run: not run.has_begun)
        try:
            while not stop and time.monotonic() < self.end:
                self.collect()
                while (slots := self.free_slots()) and (run := self.next_that_fits(waiting)):
                    waiting.remove(run)
                    self.start(run, min(slots))
                if not self.started:
                    break
                time.sleep(0.2)
        finally:
            for started in self.started:
                started.process.send_signal(signal.SIGTERM)
            for started in self.started:
                started.process.wait()
            self.collect()

    def free_slots(self) -> set[int]:
        return self.slots - {started.slot for started in self.started}

    def next_that_fits(self, waiting: Sequence[Run]) -> Run | None:
        left = self.end - time.monotonic()
        for run in waiting:
            needed = self.estimate(run)
            # What is too long for one lease is spread over several.
            if needed <= left or (needed > self.seconds and left > self.seconds / 2):
                return run
        return None

    def estimate(self, run: Run) -> float:
        """Seconds that a run still needs, as others of its model, else the slowest, took."""
        speeds = {}
        for other in self.runs:
            leases = [lease for lease in other.leases if lease["epochs"]]
            speeds.setdefault(other.model, []).extend(
                lease["seconds"] / lease["epochs"] for lease in leases
            )
        known = speeds[run.model] or [max(times) for times in speeds.values() if times]
        return (run.epochs - run.done) * max(known, default=0.0)

    def start(self, run: Run, slot: int) -> None:
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / "arguments.txt").write_text(shlex.join(run.arguments))
        command = [sys.executable, str(ROOT / "main.py"), *run.arguments, "--seed", str(run.seed),
                   "--data-path", self.data_path, "--output_dir", str(run.folder),
                   "--resume", "auto"]  # fmt: skip
        if self.gpus:
            command += ["--device", f"cuda:{slot % self.gpus}"]
        threads = max(1, (os.cpu_count() or 1) // len(self.slots))
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        with (run.folder / "output.txt").open("a") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        self.started.append(Started(run, process, slot, run.done))
        print(f"{run}: from epoch {run.done}", flush=True)

    def collect(self) -> None:
        """Notes the runs that have ended."""
        for started in [s for s in self.started if s.process.poll() is not None]:
            self.started.remove(started)
            run, code = started.run, started.process.returncode
            seconds = time.monotonic() - started.began
            epochs = max(len(run.log) - started.done, 0)
            lease = {"epochs": epochs, "seconds": round(seconds, 1), "at_once": len(self.slots)}
            with (run.folder / "leases.jsonl").open("a") as file:
                file.write(json.dumps(lease) + "\n")
            if run.is_finished:
                if not self.keep_checkpoints:
                    for checkpoint in run.folder.glob("*.pth"):
                        checkpoint.unlink()
                print(f"{run}: finished, top-1 {run.log[-1]['test_acc1']:.2f} %", flush=True)
            elif code in STOPPED:
                print(f"{run}: stopped in epoch {len(run.log)}", flush=True)
            else:
                self.failed.append(run)
                print(f"{run}: ended with {code}, see {run.folder}/output.txt", flush=True)


def finished_by_model(runs: Sequence[Run]) -> dict[str, list[Run]]:
    finished = {}
    for run in runs:
        if run.is_finished:
            finished.setdefault(run.model, []).append(run)
    return finished


def last_accuracies(runs: Sequence[Run]) -> list[float]:
    return [run.log[-1]["test_acc1"] for run in runs]


def table(runs: Sequence[Run]) -> str:
    """Markdown: mean and standard deviation over the seeds of the last epoch's top-1 accuracy."""
    lines = ["| model | parameters | top-1 | seeds | minutes |", "|---|--:|--:|---|--:|"]
    for model, finished in finished_by_model(runs).items():
        accuracies = last_accuracies(finished)
        spread = f" ± {stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
        minutes = mean(sum(lease["seconds"] for lease in run.leases) for run in finished) / 60
        seeds = ", ".join(f"{accuracy:.2f}" for accuracy in accuracies)
        parameters = finished[0].log[-1]["n_parameters"]
        lines.append(
            f"| {model} | {parameters:,} | {mean(accuracies):.2f}{spread} | {seeds} "
            f"| {minutes:.1f} |"
        )
    return "\n".join(lines)


def draw(runs: Sequence[Run]) -> Figure:
    """Accuracy of the last epoch, a row for each model: points for seeds, a bar for their mean."""
    finished = finished_by_model(runs)
    figure = Figure(figsize=(8, 1.2 + 0.3 * len(finished)), dpi=120, layout="constrained")
    axes = figure.subplots()
    for row, same in enumerate(finished.values()):
        accuracies = last_accuracies(same)
        axes.plot(accuracies, [row] * len(same), "o", color=COLOURS[0], alpha=0.6)
        axes.plot([mean(accuracies)], [row], "|", color=COLOURS[1], markersize=14, mew=2)
    axes.set_yticks(range(len(finished)), list(finished))
    axes.invert_yaxis()
    axes.set_xlabel("top-1 accuracy of the last epoch (%)")
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def report(runs: Sequence[Run], output: Path) -> None:
    """Writes comparison.md and comparison.png. Raises UserError if no run is finished."""
    finished = [run for run in runs if run.is_finished]
    if not finished:
        raise UserError(f"{output} holds no finished run of this recipe yet.")
    facts = yaml.safe_load((finished[0].folder / "args.yaml").read_text())
    at_once = sorted({lease["at_once"] for run in finished for lease in run.leases})
    conditions = [
        f"- {len(finished)} of {len(runs)} runs, {finished[0].epochs} epochs",
        f"- {' or '.join(map(str, at_once))} runs at once, which the minutes depend on",
        *(f"- {key}: {facts[key]}" for key in ("device", "torch", "timm", "commit")),
    ]
    text = "\n".join(conditions) + "\n\n" + table(runs) + "\n"
    (output / "comparison.md").write_text(text)
    draw(runs).savefig(output / "comparison.png")
    print(text)


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("recipe", type=Path)
    add("--output", type=Path, required=True, help="folder for a folder of each run")
    add("--data-path", default="", help="as main.py takes it")
    add("--models", nargs="+", default=[], help="names in the recipe, instead of all")
    add("--seeds", nargs="+", default=[], type=int, help="instead of those in the recipe")
    add("--vary", nargs="+", default=[], metavar=("ARGUMENT", "VALUE"),
        help="each model with each value of main.py's argument, as in lr 5e-4 1e-3")  # fmt: skip
    add("--concurrent", default=1, type=int, help="runs at once on each GPU, or on the CPU")
    add("--minutes", default=float("inf"), type=float, help="then runs save and leave")
    add("--keep-checkpoints", action="store_true", help="of finished runs, too")
    add("--report", action="store_true", help="train nothing, write the table and the plot")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = get_args_parser()
    # argparse itself loses what follows -- behind an option.
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    args, more = parser.parse_args(arguments[:end]), arguments[end + 1 :]
    try:
        if args.concurrent < 1 or not args.minutes > 0:
            raise UserError("--concurrent must be at least 1, and --minutes above 0.")
        runs = read_recipe(args.recipe, args.output, models=args.models, seeds=args.seeds,
                           more=more, vary=args.vary)  # fmt: skip
        if args.report:
            report(runs, args.output)
            return
    except UserError as error:
        parser.exit(2, f"compare.py: error: {error}\n")
    scheduler = Scheduler(
        runs,
        args.data_path,
        concurrent=args.concurrent,
        seconds=60 * args.minutes,
        keep_checkpoints=args.keep_checkpoints,
    )
    scheduler.work()
    finished = sum(run.is_finished for run in runs)
    print(f"{finished} of {len(runs)} runs are finished")
    if scheduler.failed:
        parser.exit(1, f"compare.py: error: {len(scheduler.failed)} runs failed.\n")


if __name__ == "__main__":
    main()
