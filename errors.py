"""What users did wrong, told apart from what is wrong in the program."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

USED_UP = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # open files, or memory


class UserError(ValueError):
    """A mistake in what a user gave: one sentence that says what is wrong and how to mend it.

    Commands print it and exit with code 2, where any other error ends with its traceback. The
    installed modules (the models and kernels) raise plain ValueError, as libraries do.
    """


@contextmanager
def as_user_error() -> Iterator[None]:
    """Around a call to a library with values that users gave: its ValueError becomes theirs."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


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
