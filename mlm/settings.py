"""Settings of a command: a YAML file, and `key=value` arguments over it."""

import argparse
import dataclasses
import difflib
import types
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

import yaml

from errors import UserError
from intervals import outside

T = TypeVar("T")


class UniqueKeyLoader(yaml.SafeLoader):
    """Of two values for one key YAML itself keeps the last, without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value]
        if twice := [name for name in names if names.count(name) > 1]:
            raise yaml.YAMLError(f"the key {twice[0]} is there twice")
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Raises UserError if the file cannot be read, is no mapping, or has a key twice."""
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), UniqueKeyLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = str(getattr(error, "strerror", None) or error).replace("\n", " ")
        raise UserError(f"cannot read the settings {path}: {reason}") from error
    if not isinstance(content, dict):
        raise UserError(f"The settings {path} are no mapping of keys to values.")
    return content


def override(settings: dict[str, Any], arguments: Sequence[str]) -> dict[str, Any]:
    """`settings` with `key=value` or `section.key=value` arguments put in."""
    settings = {k: dict(v) if isinstance(v, dict) else v for k, v in settings.items()}
    for argument in arguments:
        name, equals, text = argument.partition("=")
        if not equals:
            raise UserError(f"Settings are given as key=value, not {argument!r}.")
        *sections, key = name.split(".")
        place = settings
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise UserError(f"{section} in {argument!r} is no section of settings.")
        try:
            place[key] = yaml.safe_load(text)
        except (ValueError, RecursionError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"The value in {argument!r} is no YAML: {reason}") from error
    return settings


def settings_parser(
    name: str, description: str, example: str, sections: dict[str, type]
) -> argparse.ArgumentParser:
    """Takes a YAML file and `key=value` arguments; `--help` lists the keys of the sections.

    A section is a dataclass of `setting` fields, under the prefix that its keys have.
    """
    lines = [line for prefix, kind in sections.items() for line in _described(kind, prefix)]
    parser = argparse.ArgumentParser(
        name,
        description=description,
        epilog="\n".join(["settings, with their defaults:", *lines]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help=f"YAML file, such as {example}")
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help="over those of the file; listed below"
    )
    return parser


def _described(kind: type, prefix: str) -> list[str]:
    """A line for each field that says what it means."""
    lines = []
    for field in dataclasses.fields(kind):
        if meaning := field.metadata.get("help"):
            shown = f"{prefix}{field.name}={_shown_default(field)}"
            lines.append(f"  {shown:34} {meaning}")
    return lines


def _shown_default(field: dataclasses.Field) -> str:
    """As a `key=value` argument gives it; VALUE where one must be given."""
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    if default is dataclasses.MISSING:
        return "VALUE"
    text = yaml.safe_dump(default, default_flow_style=True).removesuffix("\n...\n").strip()
    return text if default != "" else ""


def typed(kind: type[T], values: dict[str, Any], source: str) -> T:
    """The dataclass `kind` from `values`: known keys and values of their types only."""
    if not isinstance(values, dict):
        raise UserError(f"{source} is no mapping of keys to values.")
    fields = {field.name: field for field in dataclasses.fields(cast(Any, kind))}
    checked = check(get_type_hints(kind), values, source)
    required = (dataclasses.MISSING, dataclasses.MISSING)
    missing = [
        name
        for name, field in fields.items()
        if (field.default, field.default_factory) == required and checked.get(name, "") == ""
    ]
    if missing:
        raise UserError(f"{source} lacks {', '.join(missing)}: give {missing[0]}=VALUE.")
    return kind(**checked)


def check(hints: dict[str, Any], values: dict[str, Any], source: str) -> dict[str, Any]:
    """`values` as the types that `hints` give their keys."""
    for key in values:
        if key not in hints:
            raise UserError(f"Unknown key {key!r} in {source}{_suggestion(key, hints)}")
    return {key: _convert(value, hints[key], key, source) for key, value in values.items()}


def check_ranges(settings: object, intervals: dict[str, str], place: str = "") -> None:
    """Raises UserError for a number, or one in a list, that is outside of its interval.

    `place` says, behind a setting's name, where it stands.
    """
    for name, interval in intervals.items():
        value = getattr(settings, name)
        if value is None:  # which its type allows
            continue
        for number in value if isinstance(value, list) else [value]:
            if not isinstance(number, int | float):
                raise UserError(f"{name}{place} must hold numbers, not {number!r}.")
            if wrong := outside(number, interval):
                raise UserError(f"{name}{place} {wrong}.")


def _suggestion(key: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(key), known, n=1)
    return f": did you mean {close[0]}?" if close else f": it takes {', '.join(known)}."


def _convert(value: Any, hint: Any, key: str, source: str) -> Any:
    hints = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kinds = [get_origin(kind) or kind for kind in hints]
    if float in kinds and not isinstance(value, bool) and value is not None:
        try:  # YAML takes 1e-5, without a point, for a word
            return int(value) if int in kinds and int(value) == float(value) else float(value)
        except (TypeError, ValueError):
            pass
    elif any(type(value) is kind for kind in kinds):
        items = get_args(hint) if list in kinds else ()
        if wrong := [item for item in value if type(item) not in items] if items else ():
            raise UserError(
                f"{key} in {source} must be a list of {items[0].__name__}, not of {wrong[0]!r}."
            )
        return value
    elif value is None and type(None) in kinds:
        return None
    elif value is None and str in kinds:  # as in output=
        return ""
    names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
    raise UserError(f"{key} in {source} must be {names}, not {value!r}.")
