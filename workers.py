"""What the workers of data loaders need, beside the data."""

import atexit
import multiprocessing
import signal


def ignore_signals(worker_id: int) -> None:
    """`worker_init_fn` of a loader: its workers outlive SIGTERM and SIGINT.

    Launchers and terminals signal all processes at once, but the training process still needs
    its workers to finish the step and save. They end with their loader or their process.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@atexit.register
def _kill_workers() -> None:
    """End workers that an exception kept alive: Python would send them SIGTERM, and wait."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises for a killed worker
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
