"""One run in a folder at a time."""

import errno
import fcntl
import logging
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from errors import UserError
from processes import World

logger = logging.getLogger(__name__)

NAME = ".run.lock"
PATIENCE = 10.0  # seconds that a run which is just ending has to leave
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def only_run_in(folder: Path, world: World, argument: str = "--output_dir") -> Iterator[None]:
    """Keeps other runs out of `folder` while the block lasts, or until the main process dies.

    What is made for it is removed again: the lock, and folders where nothing else is left.
    `argument` is the user's name of the folder. Raises UserError on all processes if another run,
    which is named, stays in it.
    """
    made, lock, problem = [], None, None
    if world.is_main:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        lock, problem = _take(folder / NAME)
    try:
        if problem := world.gather(problem)[0]:
            raise UserError(f"{argument} {folder} {problem}")
        yield
    finally:
        if lock is not None:
            (folder / NAME).unlink(missing_ok=True)
            os.close(lock)
        for path in made:
            with suppress(OSError):
                path.rmdir()


def _take(path: Path) -> tuple[int | None, str | None]:
    """The open and locked file, or why there is none.

    A lock of the process, not of the open file: loader workers that outlive a killed run, as they
    do for seconds, do not hold it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            return None, f"cannot be locked ({path.name}: {error.strerror}): remove that file."
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in UNSUPPORTED:
                logger.warning("%s has no locks: start no second run in it.", path.parent)
                return file, None
            if time.monotonic() > deadline:
                with os.fdopen(file, errors="backslashreplace") as holder:
                    return None, _occupied(holder.read())
        else:
            if _is_at(file, path):
                os.truncate(file, 0)
                os.write(file, _this_process().encode(errors="backslashreplace"))
                return file, None
        os.close(file)
        time.sleep(0.1)


def _is_at(file: int, path: Path) -> bool:
    """Whether an open file is still the one at `path`: the run before may have removed it."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}: {shlex.join(sys.argv)}"


def _occupied(holder: str) -> str:
    return (
        f"is in use by another run ({holder or 'of unknown process'}): wait until it ends, stop "
        "it, or choose another folder."
    )
