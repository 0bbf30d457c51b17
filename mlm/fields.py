"""Fields of settings that say what they mean."""

from dataclasses import MISSING, field
from typing import Any


def setting(meaning: str, default: Any = MISSING, *, factory: Any = MISSING) -> Any:
    """A field of a dataclass, with a meaning for `--help`; without a default it must be given."""
    options = {"default": default} if factory is MISSING else {"default_factory": factory}
    return field(**options, metadata={"help": meaning})
