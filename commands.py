"""How commands run, log, and report errors."""

import io
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from errors import UserError, sentence
from processes import Peers, meet
from urls import without_secrets
from workers import shared_memory_errors


class DiscreetFormatter(logging.Formatter):
    """Plain lines, in which URLs have no secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return without_secrets(super().format(record))


class Unbreakable:
    """A standard stream whose reader may leave: what cannot be written is lost, work goes on.

    The first loss is reported on standard error, unless the reader closed the pipe.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.reported = False

    def write(self, text: str) -> int:
        with self._reporting_losses():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._reporting_losses():
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    @contextmanager
    def _reporting_losses(self) -> Iterator[None]:
        try:
            yield
        except (BrokenPipeError, ValueError):  # ValueError of a closed stream
            pass
        except OSError as error:
            if not self.reported and self is not sys.stderr:
                self.reported = True
                print(f"Standard output is lost from here on ({error}).", file=sys.stderr)


def open_streams() -> None:
    """Makes standard output and error Unbreakable; they exist, even if the shell closed them.

    To be called before any file is opened, which would get the number of a stream that is closed,
    and with it what libraries write there.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number: this one
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, for good
        if isinstance(stream, io.TextIOWrapper):  # names of files need not be UTF-8
            stream.reconfigure(errors="backslashreplace")
        if not isinstance(stream, Unbreakable):
            setattr(sys, name, Unbreakable(stream))


def setup_logging(is_main: bool) -> None:
    """Plain lines on standard output: all from the main process, only warnings from the others."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(DiscreetFormatter("%(message)s"))
    level = logging.INFO if is_main else logging.WARNING
    logging.basicConfig(level=level, handlers=[handler], force=True)


def run_command(
    name: str, build: Callable[[Peers], Callable[[], None]], dist_url: str = "env://"
) -> None:
    """Runs a command: `build(peers)` reads and checks everything, what it returns does the work.

    A UserError of `build` is one sentence on standard error, from the main process or from each
    whose error is another, and exit code 2. So is one of the work, such as a full disk, from the
    process that met it. A FloatingPointError of the work is one sentence, too, with exit code 1;
    every other error keeps its traceback. An error of one process ends all.
    """

    def tell(problem: str) -> None:
        print(without_secrets(f"{name}: error: {problem}"), file=sys.stderr, flush=True)

    open_streams()
    try:
        peers = meet(dist_url)
        setup_logging(peers.rank == 0)
    except UserError as error:
        tell(str(error))
        sys.exit(2)
    with peers.together(name):
        try:
            with shared_memory_errors():
                work = build(peers)
            peers.settle()
        except UserError as error:
            if peers.rank == 0:
                tell(str(error))
            if not peers.settle(str(error)):
                tell(f"{peers}: {error}")
            sys.exit(2)
        try:
            with shared_memory_errors():
                work()
        except UserError as error:
            peers.fail(2)
            tell(sentence(error) if peers.size == 1 else f"{peers}: {sentence(error)}")
            sys.exit(2)
        except FloatingPointError as error:
            tell(str(error))
            peers.fail(1)
            sys.exit(1)
