"""Signals and ends of processes that work for another one: of data loaders, or of jobs."""

import atexit
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import Any

from errors import UserError
from processes import STOP_SIGNALS

_LIBC, _PR_SET_PDEATHSIG = ctypes.CDLL(None), 1
PATIENCE = 600.0  # seconds for a batch: what a worker that hangs would make a run wait for ever


def worker_options(count: int) -> dict[str, Any]:
    """Of a DataLoader with `count` workers, but at most one for each CPU core of this process.

    Processes of a node share the cores that they may use. A worker that hangs ends the run with a
    RuntimeError, so that it can be started again.
    """
    launched = os.environ.get("LOCAL_WORLD_SIZE", "")  # by torchrun
    processes = max(int(launched), 1) if launched.isdecimal() else 1
    workers = min(count, max(1, usable_cores() // processes))
    timeout = PATIENCE if workers else 0
    return {"num_workers": workers, "worker_init_fn": ignore_signals, "timeout": timeout}


def usable_cores() -> int:
    """CPU cores that this process may use, which schedulers and containers limit."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def shared_memory_errors() -> Iterator[None]:
    """Around what loads data: PyTorch's error of workers that lack shared memory is the user's."""
    try:
        yield
    except RuntimeError as error:
        if "shared memory" not in str(error):
            raise
        raise UserError(
            "The processes that load data are out of shared memory (/dev/shm): give it more, as by "
            "docker's --shm-size=8g, or use fewer workers or smaller batches."
        ) from error


def ignore_signals(worker_id: int) -> None:
    """`worker_init_fn` of a loader: its workers outlive the signals that stop a run.

    Launchers and terminals signal all processes at once, but the training process still needs
    its workers to finish the step and save. They end with their loader or their process.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    # PyTorch's workers ask for the parent's number, which is not the run's with a fork server.
    threading.Thread(target=_end_after_parent, daemon=True).start()


@atexit.register
def _kill_workers() -> None:
    """End workers that an exception kept alive: Python would send them SIGTERM, and wait."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises for a killed worker
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def end_with_parent() -> None:
    """Initializer of a pool: its processes end when the one that made it does, even by a kill.

    They leave Ctrl-C, which a terminal sends to all, to that one.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_after_parent, daemon=True).start()


def leave_with_parent() -> None:
    """`preexec_fn` of a command: it gets SIGTERM when the process that started it ends (on Linux).

    So a run whose parent is killed saves and leaves.
    """
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _end_after_parent() -> None:
    if parent := multiprocessing.parent_process():
        wait([parent.sentinel])
        os._exit(1)
