"""An argument parser whose options have ranges, groups, and a help that shows every default."""

import argparse
import os
import re
from collections.abc import Callable
from functools import partial
from typing import Any

from timm.utils import ParseKwargs

from errors import UserError
from intervals import in_words, outside

METAVARS: dict[type | None, str] = {int: "N", float: "X", None: "TEXT"}


class OptionFormatter(argparse.HelpFormatter):
    """Prints each option once, under the name it was added by, with one metavar."""

    def __init__(self, prog: str, names: dict[str, tuple[str, ...]]) -> None:
        super().__init__(prog, max_help_position=28, width=100)
        self.names = names

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = ", ".join(self.names[action.dest])
        if action.nargs == 0:
            return names
        metavar = self._get_default_metavar_for_optional(action)
        return f"{names} {self._format_args(action, metavar)}"


class ArgumentParser(argparse.ArgumentParser):
    """Accepts `--foo-bar` and `--foo_bar` alike, and knows which numbers an argument takes.

    `within="[0, 1)"` in `add_argument` is the interval of its numbers, kept in `intervals` for
    `check_ranges`. What it parses has `given`, the names of the arguments that were given.
    """

    def __init__(self, prog: str, **options: Any) -> None:
        self.intervals: dict[str, str] = {}
        self.names: dict[str, tuple[str, ...]] = {}  # by destination, as options were added
        super().__init__(
            prog, formatter_class=partial(OptionFormatter, names=self.names), **options
        )
        # argparse itself takes -1e-4 and -inf for options.
        self._negative_number_matcher = re.compile(r"-(\d|\.\d|inf$)")

    def in_group(self, title: str) -> tuple[Callable[..., argparse.Action], Callable[..., None]]:
        """`add_argument` and `add_switch` for a group of the help."""
        group = self.add_argument_group(title)
        return partial(self.add_argument, group=group), partial(self.add_switch, group=group)

    def add_argument(  # type: ignore[override]  # no option is without a word
        self,
        *names: str,
        help: str,
        within: str | None = None,
        otherwise: str | None = None,
        group: Any = None,
        **kwargs: Any,
    ) -> argparse.Action:
        """`otherwise` is what the help says in the place of the default."""
        shown = names
        for name in [n for n in names if n.startswith("--")]:
            other = "--" + name[2:].replace("-", "_")
            dashed = "--" + name[2:].replace("_", "-")
            names += tuple(n for n in (other, dashed) if n not in names)
        takes_text = "action" not in kwargs and "choices" not in kwargs
        if takes_text and (kind := kwargs.get("type")) in METAVARS:
            kwargs.setdefault("metavar", METAVARS[kind])
        if kwargs.get("metavar") in ("PATH", "FOLDER"):  # shells leave the ~ of --name=~/run to us
            kwargs.setdefault("type", os.path.expanduser)
        add = group.add_argument if group else super().add_argument
        action = add(*names, help=help, **kwargs)
        self.names[action.dest] = shown
        described = in_words(within) if within else ""
        default = "" if action.default is argparse.SUPPRESS else _default(action, otherwise)
        action.help = f"{help}{', ' * bool(described)}{described}{default}"
        if within:
            self.intervals[action.dest] = within
        return action

    def add_switch(self, name: str, default: bool, help: str, group: Any = None) -> None:
        """`--name` and `--no-name`."""
        dest = name.replace("-", "_")
        self.add_argument(f"--{name}", f"--no-{name}", dest=dest, action=Switch, default=default,
                          help=help, group=group)  # fmt: skip

    def parse_known_args(self, args=None, namespace=None):
        parsed, rest = super().parse_known_args(args, namespace)
        # A default is only set where there is no value yet, so what stays absent was not given.
        absent = object()
        blank = argparse.Namespace(**dict.fromkeys(vars(parsed), absent))
        super().parse_known_args(args, blank)
        parsed.given = [name for name, value in vars(blank).items() if value is not absent]
        return parsed, rest


def _default(action: argparse.Action, otherwise: str | None) -> str:
    value = action.default
    if otherwise is not None:
        text = otherwise
    elif isinstance(value, bool):
        text = "on" if value else "off"
    elif value in (None, "", [], {}):
        text = "none"
    elif isinstance(value, list):
        text = " ".join(map(str, value))
    else:
        text = f"{value:g}" if isinstance(value, float) else str(value)
    return f" (default: {text})".replace("%", "%%")


class Switch(argparse.Action):
    def __init__(self, option_strings: list[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **kwargs)

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, not option_string.startswith(("--no-", "--no_")))


class KeyValues(ParseKwargs):
    def __call__(self, parser, namespace, values, option_string=None):
        keys = [value.partition("=")[0] for value in values]
        if wrong := [value for value in values if value.find("=") < 1]:
            parser.error(f"{option_string} takes KEY=VALUE, not {wrong[0]!r}")
        if twice := [key for key in keys if keys.count(key) > 1]:
            parser.error(f"{option_string} has {twice[0]} twice: give it once")
        super().__call__(parser, namespace, values, option_string)


def true_or_false(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected True or False, not {text!r}")
    return text.lower() == "true"


def check_ranges(parser: ArgumentParser, args: argparse.Namespace) -> None:
    """Raises UserError for the first number that is outside of its argument's interval."""
    for name, interval in parser.intervals.items():
        value = getattr(args, name)
        for number in value if isinstance(value, list | tuple) else [value]:
            if number is not None and (wrong := outside(number, interval)):
                raise UserError(f"{parser.names[name][0]} {wrong}.")
