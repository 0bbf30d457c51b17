"""What users did wrong, told apart from what is wrong in the program."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from opcode import opmap
from pathlib import Path
from types import TracebackType

USED_UP = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # open files, or memory


class UserError(ValueError):
    """A mistake in what a user gave: one sentence that says what is wrong and how to mend it.

    Commands print it and exit with code 2, where any other error ends with its traceback. The
    installed modules (the models and kernels) raise plain ValueError, as libraries do.
    """


@contextmanager
def as_user_error() -> Iterator[None]:
    """Around a call with values that users gave: a ValueError that refuses them becomes theirs."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        if is_bug(error):
            raise
        raise UserError(str(error)) from error


@contextmanager
def told_as(what: str, remedy: str) -> Iterator[None]:
    """Around a call that refuses values by errors of any kind: they become `what (why): remedy`."""
    try:
        yield
    except Exception as error:
        if is_bug(error):
            raise
        raise UserError(f"{what} ({one_line(error)}): {remedy}.") from error


def is_bug(error: Exception) -> bool:
    """Whether what was called failed in this repository, instead of refusing a value.

    Its modules refuse by `raise`, as libraries do, but timm's models in ways of their own. To be
    asked where the error is caught.
    """
    steps = [step for step in _steps(error.__traceback__) if _file(step) != __file__]
    called = [step for step in steps[1:] if _is_own(step) or "/timm/" in _file(step)]
    if not called or not _is_own(called[-1]):
        return False
    return steps[-1].tb_frame.f_code.co_code[steps[-1].tb_lasti] != opmap["RAISE_VARARGS"]


def _steps(step: TracebackType | None) -> Iterator[TracebackType]:
    while step:
        yield step
        step = step.tb_next


def _file(step: TracebackType) -> str:
    return step.tb_frame.f_code.co_filename


def _is_own(step: TracebackType) -> bool:
    path = Path(_file(step))
    return path.is_relative_to(Path(__file__).parent) and "site-packages" not in path.parts


def sentence(error: UserError) -> str:
    """Its sentence; of one in a loader's worker, without the traceback that PyTorch adds."""
    kind = type(error)
    return str(error).rpartition(f"{kind.__module__}.{kind.__qualname__}: ")[2].strip()


def one_line(error: Exception) -> str:
    """All that an error says; its kind if that is nothing."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def first_line(error: Exception) -> str:
    """What an error says before its details; its kind if that is nothing."""
    return str(error).strip().partition("\n")[0].strip() or type(error).__name__
