"""What users did wrong, told apart from what is wrong in the program."""

from collections.abc import Iterator
from contextlib import contextmanager


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
