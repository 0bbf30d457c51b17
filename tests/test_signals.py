"""Signals that stop a run, and jobs of Slurm that are queued again."""

import multiprocessing
import os
import pickle
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import (
    ROOT,
    TINY,
    Ranks,
    assert_same_run,
    call_main,
    is_running,
    signal_in_step,
    slow,
    wait_for,
)
from torch.utils.data import DataLoader

import checkpoint
import main
from processes import STOP_SIGNALS, StopSignal
from workers import ignore_signals

SHORT = (*TINY, "--batch-size", "24", "--epochs", "2", "--model-ema-decay", "0.9")
STEPS = 5


@pytest.fixture(scope="module")
def whole(data_path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    call_main(*SHORT, "--data-path", data_path, "--output_dir", folder)
    return folder


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGHUP, slow(signal.SIGUSR1), slow(signal.SIGUSR2)]
)
def test_a_run_saves_and_its_workers_survive(number, whole, run, data_path, tmp_path, monkeypatch):
    """Slurm and terminals signal the workers of the loader, too."""
    update, calls = main.MovingAverage.update, []

    def counted(*args, **kwargs):
        calls.append(None)
        if len(calls) == 1:
            for process in (*multiprocessing.active_children(), SimpleNamespace(pid=os.getpid())):
                os.kill(process.pid, number)
        return update(*args, **kwargs)

    arguments = (*SHORT, "--data-path", data_path, "--output_dir", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(main.MovingAverage, "update", counted)
        ended = run(*arguments, "--num_workers", "1")
    assert (ended.code, ended.err) == (128 + number, "")
    assert "Stopped at epoch 0, step 2: go on by --resume auto\n" in ended.out
    assert run(*arguments, "--resume", "auto").code == 0
    assert_same_run(tmp_path, whole)


def test_workers_ignore_what_stops_a_run(ending):  # which restores the handlers
    ignore_signals(0)
    assert all(signal.getsignal(number) is signal.SIG_IGN for number in STOP_SIGNALS)
    assert set(STOP_SIGNALS) >= {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1}


def loading(_rank: int, folder: Path) -> None:
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([])
    options = {"num_workers": 1, "multiprocessing_context": server}
    batches = iter(DataLoader(range(100), worker_init_fn=ignore_signals, **options))
    next(batches)
    (folder / "worker").write_text(str(batches._workers[0].pid))
    (folder / "ready").touch()
    time.sleep(600)


def test_workers_end_with_a_run_that_is_killed(tmp_path):
    """Those of a fork server, too, which is their parent in the place of the run."""
    run = Ranks(tmp_path, size=1, function=loading)
    wait_for((run.folder / "ready").exists)
    worker = int((run.folder / "worker").read_text())
    run.kill()
    wait_for(lambda: not is_running(worker), seconds=15)


def test_a_second_ctrl_c_ends_at_once(ending):  # which restores the handlers
    stop = StopSignal()
    os.kill(os.getpid(), signal.SIGINT)
    assert stop
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.slow
def test_nohup_is_respected():
    code = """
import os, signal
from processes import StopSignal

signal.signal(signal.SIGHUP, signal.SIG_IGN)
stop = StopSignal()
os.kill(os.getpid(), signal.SIGHUP)
assert not stop
os.kill(os.getpid(), signal.SIGUSR1)
os.kill(os.getpid(), signal.SIGTERM)
assert stop and stop.exit_code == 128 + signal.SIGUSR1  # the first one counts
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# Jobs of Slurm


class DelayedSubmission:
    def __init__(self, function: object) -> None:
        self.function = function


def slurm(monkeypatch, restarts: int, rank: int = 0) -> SimpleNamespace:
    """submitit as it is on a node: on SIGUSR2 it asks for the job to queue again, and does so."""
    helpers = SimpleNamespace(
        TorchDistributedEnvironment=lambda: SimpleNamespace(export=lambda: None),
        DelayedSubmission=DelayedSubmission,
    )
    environment = SimpleNamespace(job_id="7")
    fake = SimpleNamespace(helpers=helpers, JobEnvironment=lambda: environment)
    monkeypatch.setitem(sys.modules, "submitit", fake)
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
    node = SimpleNamespace(queue=[])

    def checkpoint_and_try_requeue(number: int, _frame: object) -> None:
        assert number == signal.SIGUSR2
        if rank == 0:
            node.queue.append(vars(node.job.checkpoint().function.args))
            sys.exit(-1)

    signal.signal(signal.SIGUSR2, checkpoint_and_try_requeue)
    signal.signal(signal.SIGTERM, lambda *_: None)  # as submitit does
    return node


def job(data_path: Path, *options: object) -> object:
    script = runpy.run_path(str(ROOT / "scripts" / "run_with_submitit.py"))
    words = [str(word) for word in (*SHORT, "--data-path", data_path, *options)]
    return script["Job"](script["get_args_parser"]().parse_args(words))


def start_of_another_run(data_path: Path, tmp_path: Path) -> tuple[str, Path]:
    call_main(*SHORT, "--data-path", data_path, "--output_dir", tmp_path / "a", "--epochs", "1")
    return "--resume", tmp_path / "a" / "checkpoint.pth"


@pytest.mark.parametrize("start", ["new", "checkpoint", "overwrite"])
def test_a_job_is_queued_again_and_goes_on(start, ending, whole, data_path, tmp_path, monkeypatch):
    options = ["--job_dir", tmp_path / "%j"]
    step = STEPS + 2
    if start == "checkpoint":
        options += start_of_another_run(data_path, tmp_path)
        step = 2
    if start == "overwrite":
        call_main(*SHORT, "--data-path", data_path, "--output_dir", tmp_path / "7")
        options += ["--overwrite"]
    node = slurm(monkeypatch, restarts=0)
    node.job = job(data_path, *options)
    with monkeypatch.context() as patch:
        signal_in_step(patch, step, signal.SIGUSR2)
        assert ending(node.job).code == -1
    saved = checkpoint.load(tmp_path / "7" / "checkpoint.pth")
    assert (saved["epoch"] + 1, saved["step"]) == (1, 3)
    (arguments,) = node.queue
    node = slurm(monkeypatch, restarts=1)
    node.job = job(data_path)
    node.job.args.__dict__.update(pickle.loads(pickle.dumps(arguments)))
    assert ending(node.job).code == 0
    if start != "checkpoint":
        assert_same_run(tmp_path / "7", whole)
    assert checkpoint.load(tmp_path / "7" / "checkpoint.pth")["epoch"] == 1


def test_other_ranks_and_other_signals_queue_nothing(ending, data_path, tmp_path, monkeypatch):
    """Another rank must not fail, for Slurm would end the job before rank 0 has queued it again."""
    for number, rank, code in ((signal.SIGUSR2, 1, 0), (signal.SIGTERM, 0, 143)):
        node = slurm(monkeypatch, restarts=0, rank=rank)
        node.job = job(data_path, "--job_dir", tmp_path / str(rank))
        with monkeypatch.context() as patch:
            signal_in_step(patch, 2, number)
            assert ending(node.job).code == code
        assert node.queue == []
