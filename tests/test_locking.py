"""A second run in a folder is refused, and a crash leaves the folder free."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import ROOT, TINY, Ranks, call_main, is_running, refused, wait_for

import checkpoint
import locking
import main
from mlm import glue, prepare, pretrain
from processes import World
from scripts import compare

THIS_PROCESS = World()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(locking, "PATIENCE", 0)


@pytest.fixture(scope="module")
def held(tmp_path_factory) -> Iterator[Path]:
    """A folder that another process holds."""
    folder = tmp_path_factory.mktemp("held")
    ranks = Ranks(folder, folder / "run", size=1, function=holding)
    wait_for((ranks.folder / "ready").exists)
    yield folder / "run"
    ranks.kill()


@pytest.fixture
def other(tmp_path) -> Iterator[Callable[..., Ranks]]:
    """`other(function, *arguments)` starts a process and waits until it has the lock."""
    started = []

    def start(function: Callable[..., None], *arguments: object) -> Ranks:
        started.append(Ranks(tmp_path, *arguments, size=1, function=function))
        wait_for((started[-1].folder / "ready").exists)
        return started[-1]

    yield start
    for ranks in started:
        ranks.kill()


def stuck_in_evaluation(_rank: int, folder: Path, *arguments: object) -> None:
    def evaluate(*args, **kwargs):
        (folder / "ready").touch()
        time.sleep(600)

    pytest.MonkeyPatch().setattr(main, "evaluate", evaluate)
    call_main(*arguments)


def holding(_rank: int, folder: Path, target: Path) -> None:
    with locking.only_run_in(target, THIS_PROCESS):
        (folder / "ready").touch()
        time.sleep(600)


@pytest.mark.slow
def test_a_second_run_is_refused_until_the_first_is_dead(run, other, data_path, tmp_path):
    folder = tmp_path / "run"
    arguments = (*TINY, "--data-path", data_path, "--output_dir", folder, "--num_workers", "1")
    first = other(stuck_in_evaluation, *arguments)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for options in (("--resume", "auto"), ("--overwrite",), ()):
        ended = run(*arguments, *options)
        pid = first.processes[0].pid
        refused(ended, rf"run is in use by another run \(process {pid} on .*: .*\): wait until")
    assert run(*arguments, "--eval", "--resume", "auto").code == 0, "a score harms nothing"
    (folder / "eval.json").unlink(), (folder / "per_class.csv").unlink()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    first.kill()
    ended = run(*arguments, "--resume", "auto")
    assert ended.code == 0, ended.err
    assert (folder / "log.txt").read_text().count("\n") == 1
    assert checkpoint.load(folder / "checkpoint.pth")["epoch"] == 0
    assert not (folder / locking.NAME).exists()


def holding_beside_a_worker(_rank: int, folder: Path, target: Path) -> None:
    with locking.only_run_in(target, THIS_PROCESS):
        if worker := os.fork():
            (folder / "worker").write_text(str(worker))
            (folder / "ready").touch()
        time.sleep(600)


@pytest.mark.slow
def test_a_worker_that_outlives_its_run_holds_no_lock(other, tmp_path):
    first = other(holding_beside_a_worker, tmp_path / "run")
    first.kill()
    worker = int((first.folder / "worker").read_text())
    try:
        with locking.only_run_in(tmp_path / "run", THIS_PROCESS):
            assert is_running(worker)
    finally:
        os.kill(worker, signal.SIGKILL)


COMMANDS = {
    "pretrain": (pretrain, "mlm/configs/tiny.yaml", "data=CORPUS", "output=RUN", "device=cpu"),
    "glue": (glue, "mlm/configs/glue.yaml", "data=none", "output=RUN", "device=cpu",
             "--model", "none"),
    "prepare": (prepare, "requirements.txt", "--output", "RUN", "--train-tokenizer", "100"),
    "compare": (compare, "scripts/recipes/cifar10.yaml", "--output", "RUN"),
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_other_commands_have_folders_of_their_own_too(command, ending, held, corpus, monkeypatch):
    monkeypatch.setattr(glue, "build_jobs", lambda *_: [])
    module, file, *words = COMMANDS[command]
    words = [w.replace("RUN", str(held)).replace("CORPUS", str(corpus)) for w in words]
    ended = ending(module.main, [str(ROOT / file), *words])
    assert ended.code == 2, ended.err
    assert "run is in use by another run (process " in ended.err, ended.err


def test_a_run_that_is_ending_is_waited_for(run, other, data_path, tmp_path, monkeypatch):
    monkeypatch.setattr(locking, "PATIENCE", 30)
    lock, process = locking.fcntl.lockf, other(holding, tmp_path / "run").processes[0]

    def tried(*args):
        try:
            return lock(*args)
        except OSError:
            process.kill()  # after the first try
            raise

    monkeypatch.setattr(locking.fcntl, "lockf", tried)
    arguments = (*TINY, "--data-path", data_path, "--output_dir", tmp_path / "run")
    assert run(*arguments).code == 0


def test_a_lock_that_is_a_link_is_not_followed(run, data_path, tmp_path):
    (tmp_path / "precious").write_text("text")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / locking.NAME).symlink_to(tmp_path / "precious")
    ended = run(*TINY, "--data-path", data_path, "--output_dir", tmp_path / "run")
    refused(ended, r"run cannot be locked \(\.run\.lock: .*\): remove that file")
    assert (tmp_path / "precious").read_text() == "text"


def test_where_there_are_no_locks_it_is_said(run, data_path, tmp_path, monkeypatch):
    def lockf(*_):
        raise OSError(locking.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locking.fcntl, "lockf", lockf)
    ended = run(*TINY, "--data-path", data_path, "--output_dir", tmp_path / "run")
    assert ended.code == 0
    assert "run has no locks: start no second run in it." in ended.out


def test_a_lock_that_the_run_before_removed_is_taken_anew(tmp_path, monkeypatch):
    """Between opening and locking: who comes third must find the lock at its name."""
    lock, removed = locking.fcntl.lockf, []

    def tried(*args):
        if not removed:
            removed.append((tmp_path / locking.NAME).unlink())
        return lock(*args)

    monkeypatch.setattr(locking.fcntl, "lockf", tried)
    with locking.only_run_in(tmp_path, THIS_PROCESS):
        assert f"process {os.getpid()} on " in (tmp_path / locking.NAME).read_text()


def test_folders_that_were_made_for_it_are_removed(tmp_path):
    with locking.only_run_in(tmp_path / "a" / "b", THIS_PROCESS):
        assert os.listdir(tmp_path / "a" / "b") == [locking.NAME]
    assert os.listdir(tmp_path) == []
