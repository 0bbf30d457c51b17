"""Recipes, and the runs that they are made of."""

import itertools
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from errors import UserError, one_line
from files import is_folder_name, require_file
from mlm.settings import UniqueKeyLoader
from scripts.comparing.programs import DATA, PROGRAMS, Program
from scripts.plot_log import read_log

KEYS = ("arguments", "seeds", "models")
ARGUMENTS, SETTINGS, LEASES = "arguments.txt", "settings.yaml", "leases.jsonl"  # files of a run


@dataclass(frozen=True)
class Run:
    """One model with one seed: its program's arguments, where it writes, and its length."""

    program: Program
    family: str  # the model without what is varied
    model: str
    seed: int
    arguments: tuple[str, ...]
    folder: Path
    length: int  # epochs or steps
    fine_tune: tuple[str, ...] = ()
    plateau: float | None = None  # accuracy in % that says nothing of order

    def __str__(self) -> str:
        return f"{self.model}, seed {self.seed}"

    @property
    def description(self) -> str:
        """What is trained, as `arguments.txt` keeps it."""
        return "\n".join(map(shlex.join, filter(None, (self.arguments, self.fine_tune))))

    @property
    def settings(self) -> str:
        """What its configurations say, as `settings.yaml` keeps it; empty for main.py."""
        words = filter(None, (self.arguments, self.fine_tune))
        return yaml.safe_dump_all(filter(None, map(self.program.settings, words)))

    @property
    def files(self) -> dict[str, str]:
        """What tells its folder from another run's."""
        settings = {SETTINGS: self.settings} if self.settings else {}
        return {ARGUMENTS: self.description, **settings}

    @property
    def unit(self) -> str:
        """Of its length, and of what a lease has done."""
        return f"{self.program.clock}s"

    @property
    def log(self) -> list[dict]:
        return read_log(self.folder / "log.txt") if (self.folder / "log.txt").exists() else []

    @property
    def leases(self) -> list[dict]:
        """Of each time that the run was started: epochs or steps, `seconds` and runs at once."""
        file = self.folder / LEASES
        if not file.exists():
            return []
        try:
            leases = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            sum(lease["seconds"] + lease[self.unit] for lease in leases)  # are numbers
            return leases
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise UserError(f"{file} is damaged: remove it, only times are lost.") from error

    @property
    def seconds(self) -> float:
        return sum(lease["seconds"] for lease in self.leases)

    @property
    def trained(self) -> int:
        """Epochs or steps in the log."""
        return self.program.progress(self.log[-1]) if self.log else 0

    @property
    def is_finished(self) -> bool:
        return self.program.next_command(self, "", "") is None

    @property
    def has_begun(self) -> bool:
        return (self.folder / "checkpoint.pth").exists()

    @property
    def done(self) -> int:
        """Epochs or steps that need no repetition."""
        return self.trained if self.has_begun or self.is_finished else 0


def read_recipe(
    path: Path,
    output: Path,
    *,
    models: Sequence[str] = (),
    seeds: Sequence[int] = (),
    more: Sequence[str] = (),
    vary: Sequence[Sequence[str]] = (),
) -> list[Run]:
    """The runs of a recipe: those of the first seed, and of the first values of what varies, first.

    `models` and `seeds` choose some; `more` are arguments for all. `vary` holds names of arguments,
    each with its values, beside or instead of those in the recipe: all their combinations are
    models of their own.

    Raises:
        UserError: the recipe or an argument of the program in it is wrong, or a folder holds a run
            with other arguments.
    """
    recipe = _read(path)
    program, table = PROGRAMS[recipe["program"]], recipe["models"]
    if unknown := [name for name in models if name not in table]:
        raise UserError(f"{path} has no model {unknown[0]}: it has {', '.join(table)}.")
    varied_values = {**recipe["vary"], **{name: values for name, *values in vary}}
    if "seed" in varied_values:
        raise UserError("The seed is not varied: give --seeds, or seeds in the recipe.")
    seeds, models = seeds or recipe["seeds"], models or list(table)
    for what, values in (("seed", seeds), ("model", models), *varied_values.items()):
        _check_values(what, values)
    variants = _variants(varied_values, program)
    runs = []
    chosen = itertools.product(seeds, variants, models)
    for seed, (suffix, varied), name in chosen:
        arguments = (*recipe["arguments"], *table[name], *more, *varied)
        length = program.check(arguments, recipe["fine_tune"])
        model = f"{name}{suffix}"
        runs.append(Run(program, name, model, seed, arguments, output / model / f"seed{seed}",
                        length, recipe["fine_tune"], recipe["plateau"]))  # fmt: skip
    for run in runs:
        check_same_arguments(run)
    return runs


def _read(path: Path) -> dict[str, Any]:
    """Its keys, with the defaults of those that it may lack, and arguments as words."""
    try:
        require_file(path)
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"Cannot read the recipe {path}: {error.strerror or error}.") from error
    try:
        recipe = yaml.load(content.decode(), UniqueKeyLoader)
        defaults = {"program": "main.py", "fine_tune": "", "vary": {}, "plateau": None}
        if unknown := set(recipe) - {*defaults, *KEYS}:
            raise KeyError(f"unknown key {unknown.pop()}")
        recipe = {**defaults, **recipe}
        recipe["models"] = {str(n): tuple(shlex.split(t)) for n, t in recipe["models"].items()}
        lists = [recipe["seeds"], *recipe["vary"].values()]
        if wrong := [values for values in lists if not isinstance(values, list)]:
            raise TypeError(f"{wrong[0]!r} is no list of values")
        recipe["vary"] = {str(n): [*map(str, v)] for n, v in recipe["vary"].items()}
        for name in ("arguments", "fine_tune"):
            recipe[name] = tuple(shlex.split(recipe[name]))
    except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError,
            RecursionError) as error:  # fmt: skip
        raise UserError(
            f"{path} is no recipe ({one_line(error)}): it needs arguments, seeds and models."
        ) from error
    plateau = recipe["plateau"]
    if plateau is not None and type(plateau) not in (int, float):
        raise UserError(f"The plateau in {path} must be a number, not {plateau!r}.")
    if str(recipe["program"]) not in PROGRAMS:
        raise UserError(
            f"{path} has no program {recipe['program']!r}: choose one of {', '.join(PROGRAMS)}."
        )
    if wrong := [name for name in recipe["models"] if not is_folder_name(name)]:
        raise UserError(f"The model {wrong[0]!r} is no name of a folder: rename it in {path}.")
    return recipe


def _check_values(what: str, values: Sequence[Any]) -> None:
    """Raises UserError for values that are no seeds, or that would give runs the same folder."""
    if not values:
        raise UserError(f"Give at least one {what}.")
    if twice := [value for value in values if list(values).count(value) > 1]:
        raise UserError(f"The {what} {twice[0]} is there twice: give each once.")
    for value in values:
        if what == "seed" and not (type(value) is int and 0 <= value < 2**32):
            raise UserError(f"A seed must be a whole number from 0 to 2**32 - 1, not {value!r}.")
        if "/" in str(value):
            raise UserError(f"The {what} {value} would name a folder of runs: give it no /.")


def _variants(vary: dict[str, list[str]], program: Program) -> list[tuple[str, tuple[str, ...]]]:
    """Of all combinations of values: what they add to a model's name, and to its arguments."""
    choices = itertools.product(*([(name, v) for v in values] for name, values in vary.items()))
    return [
        (
            "".join(f",{name}={value}" for name, value in chosen),
            tuple(word for name, value in chosen for word in program.option(name, value)),
        )
        for chosen in choices
    ]


def check_same_arguments(run: Run) -> None:
    for name, now in run.files.items():
        file = run.folder / name
        if file.is_file() and file.read_text(encoding="utf-8") != now:
            raise UserError(
                f"{run.folder} holds a run with other {file.stem} ({name}): choose another "
                "--output or remove it."
            )


def check_data(runs: Sequence[Run], data_path: str) -> None:
    """Raises UserError if there is nothing at a path that settings give as `$DATA/...`."""
    for word in {word for run in runs for word in (*run.arguments, *run.fine_tune)}:
        path = Path(word.partition("=")[2].replace(DATA, data_path))
        if DATA in word and not (data_path and path.exists()):
            raise UserError(f"{word} needs --data-path, the folder of get_text.sh: no {path}.")
