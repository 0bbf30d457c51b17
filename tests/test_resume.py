"""A run that is interrupted at any point and resumed equals the run that never was, bit for bit."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import (
    ROOT,
    TINY,
    Ranks,
    assert_same_run,
    call_main,
    rendezvous,
    slow,
    torchrun,
    wait_for,
)

import checkpoint
import main

# The default recipe: mixup, cutmix, RandAugment, erasing, repeated augmentation, drop path, EMA
RECIPE = (*TINY, "--epochs", "3", "--lr", "0.05", "--warmup-epochs", "1", "--drop-path", "0.3",
          "--model-ema-decay", "0.9", "--mask_type", "Selective", "--order", "S")  # fmt: skip
STEPS = 15


def finish(root: Path, data_path: Path, *options: object, size: int = 1) -> Path:
    """Runs to the end, in processes of its own; returns the output folder."""
    arguments = (*RECIPE, "--data-path", data_path, "--output_dir", root / "run", *options)
    ranks = Ranks(root, *arguments, size=size)
    assert ranks.wait() == [0] * size, ranks.errors()
    return root / "run"


@pytest.fixture(scope="module")
def whole(data_path, tmp_path_factory) -> Path:
    return finish(tmp_path_factory.mktemp("whole"), data_path)


@pytest.fixture(scope="module")
def whole_on_two_ranks(data_path, tmp_path_factory) -> Path:
    return finish(tmp_path_factory.mktemp("whole"), data_path, size=2)


def signal_at(monkeypatch, owner: object, name: str, call: int, number: signal.Signals) -> None:
    """This process receives a signal at the given call of a function, counted from 1."""
    function, calls = getattr(owner, name), 0

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)


@pytest.mark.parametrize(
    ("owner", "name", "call", "epoch", "step", "number", "workers"),
    [
        (main.MovingAverage, "update", 4, 0, 5, signal.SIGTERM, (0, 2)),
        slow(main.MovingAverage, "update", STEPS + 4, 1, 5, signal.SIGTERM, (2, 0)),
        slow(main.MovingAverage, "update", STEPS, 0, STEPS, signal.SIGINT, (0, 0)),
        (main, "evaluate", 3, 1, STEPS, signal.SIGTERM, (2, 0)),
        slow(main, "evaluate", 6, 2, STEPS, signal.SIGTERM, (0, 2)),
        (main.checkpoint, "save", 2, 1, 1, signal.SIGTERM, (0, 0)),
    ],
    ids=["first epoch", "training", "last step", "evaluation", "last evaluation", "saving"],
)
def test_signal(
    owner, name, call, epoch, step, number, workers, run, whole, data_path, tmp_path, monkeypatch
):
    arguments = (*RECIPE, "--data-path", data_path, "--output_dir", tmp_path)
    before, after = workers
    with monkeypatch.context() as patch:
        signal_at(patch, owner, name, call, number)
        ended = run(*arguments, "--num_workers", before)
    assert (ended.code, ended.err) == (128 + number, "")
    assert f"Stopped at epoch {epoch}, step {step}: go on by --resume auto\n" in ended.out
    saved = checkpoint.load(tmp_path / "checkpoint.pth")
    assert (saved["epoch"] + 1, saved["step"]) == (epoch, step)
    assert run(*arguments, "--num_workers", after, "--resume", "auto").code == 0
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize("size", [1, slow(2)])
def test_kill_after_an_epoch(size, request, data_path, tmp_path):
    whole = request.getfixturevalue("whole" if size == 1 else "whole_on_two_ranks")
    log = tmp_path / "run" / "log.txt"
    arguments = (*RECIPE, "--data-path", data_path, "--output_dir", tmp_path / "run")
    ranks = Ranks(tmp_path, *arguments, size=size)
    wait_for(lambda: log.exists() and log.read_text().count("\n") == 1)
    ranks.kill()
    assert log.read_text().count("\n") < 3
    assert_same_run(finish(tmp_path, data_path, "--resume", "auto", size=size), whole)


def call_in_evaluation(patch: pytest.MonkeyPatch, call: int, action: Callable[[], None]) -> None:
    """`action` comes in the given evaluation, counted from 1; each epoch has one of the average."""
    evaluate, calls = main.evaluate, []

    def counted(*args, **kwargs):
        calls.append(None)
        if len(calls) == call:
            action()
        return evaluate(*args, **kwargs)

    patch.setattr(main, "evaluate", counted)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise OSError("an image cannot be read")


def killed_rank(rank: int, folder: Path, call: int, *arguments: object) -> None:
    call_in_evaluation(pytest.MonkeyPatch(), call, die)
    call_main(*arguments)


@pytest.mark.parametrize("call", [slow(3), 6])
def test_an_evaluation_that_fails_costs_no_epoch(
    call, run, whole, data_path, tmp_path, monkeypatch
):
    arguments = (*RECIPE, "--data-path", data_path, "--output_dir", tmp_path)
    with monkeypatch.context() as patch:
        call_in_evaluation(patch, call, fail)
        with pytest.raises(OSError, match="an image cannot be read"):
            run(*arguments)
    saved = checkpoint.load(tmp_path / "checkpoint.pth")
    assert (saved["epoch"] + 1, saved["step"]) == ((call - 1) // 2, STEPS)
    assert run(*arguments, "--resume", "auto").code == 0
    assert_same_run(tmp_path, whole)
    before = checkpoint.load(tmp_path / "checkpoint.previous.pth")
    assert (before["epoch"], before["step"]) == (1, 0), "that of the epoch before"


@pytest.mark.slow
def test_kill_in_an_evaluation(whole, data_path, tmp_path):
    arguments = (*RECIPE, "--data-path", data_path, "--output_dir", tmp_path / "run")
    ranks = Ranks(tmp_path, 4, *arguments, size=1, function=killed_rank)
    assert ranks.wait() == [-signal.SIGKILL], ranks.errors()
    saved = checkpoint.load(tmp_path / "run" / "checkpoint.pth")
    assert (saved["epoch"] + 1, saved["step"]) == (1, STEPS)
    assert_same_run(finish(tmp_path, data_path, "--resume", "auto"), whole)


@pytest.mark.parametrize("logged", [False, slow(True)])
def test_a_crash_around_a_line_of_the_log_neither_loses_nor_repeats_it(
    logged, run, whole, data_path, tmp_path, monkeypatch
):
    write, calls = main.Journal.write, []

    def crashing(*args, **speeds):
        calls.append(None)
        if len(calls) != 2 or logged:
            write(*args, **speeds)
        if len(calls) == 2:
            raise OSError("the power fails")

    arguments = (*RECIPE, "--data-path", data_path, "--output_dir", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(main.Journal, "write", crashing)
        with pytest.raises(OSError, match="the power fails"):
            run(*arguments)
    assert (tmp_path / "log.txt").read_text().count("\n") == 1 + logged
    assert run(*arguments, "--resume", "auto").code == 0
    assert_same_run(tmp_path, whole)


@pytest.mark.slow
def test_statistics_of_a_batch_norm_are_shared_before_an_evaluation_is_left(data_path, tmp_path):
    """Two processes, of which each has averages of its own batches."""
    arguments = (*TINY, "--model", "test_resnet", "--model-kwargs", "--input-size", "32",
                 "--data-path", data_path, "--no-model-ema", "--output_dir")  # fmt: skip
    for folder, call in (("whole", 9), ("run", 1)):
        ranks = Ranks(tmp_path, call, *arguments, tmp_path / folder, function=stopped_rank)
        assert ranks.wait() == [0 if call == 9 else 143] * 2, ranks.errors()
    ranks = Ranks(tmp_path, *arguments, tmp_path / "run", "--resume", "auto")
    assert ranks.wait() == [0, 0], ranks.errors()
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def stopped_rank(rank: int, folder: Path, call: int, *arguments: object) -> None:
    call_in_evaluation(pytest.MonkeyPatch(), call, lambda: os.kill(os.getpid(), signal.SIGTERM))
    call_main(*arguments, "--dist_url", rendezvous(folder))


def test_a_stopped_run_without_a_folder_promises_nothing(run, data_path, monkeypatch):
    signal_at(monkeypatch, main.MovingAverage, "update", 4, signal.SIGTERM)
    ended = run(*RECIPE, "--data-path", data_path)
    assert ended.code == 143
    assert "Stopped at epoch 0, step 5: unsaved, without --output_dir\n" in ended.out


def test_notes_in_a_log_stay(whole, run, data_path, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    log = folder / "log.txt"
    notes = b'\nfrom here on node 7\n[1]\n{"epoch": "?"}\ncaf\xe9\n'
    log.write_bytes(log.read_bytes() + notes + b'{"epoch": 9}\n{"epoch": 1, "tra')
    ended = run(*RECIPE, "--data-path", data_path, "--output_dir", folder, "--resume", "auto")
    assert ended.code == 0, ended.err
    kept = notes.replace(b"\xe9", rb"\xe9").decode()
    assert log.read_text() == (whole / "log.txt").read_text() + kept


@pytest.mark.slow
@pytest.mark.parametrize("reached", ["Epoch: [0]", "Test:"], ids=["training", "evaluation"])
def test_torchrun_is_told_to_end(reached, whole_on_two_ranks, data_path, tmp_path):
    arguments = (*RECIPE, "--data-path", data_path, "--output_dir", tmp_path / "run",
                 "--num_workers", "1")  # fmt: skip
    command = torchrun("torch.distributed.run", ROOT / "main.py", *arguments)
    output = tmp_path / "output"
    with output.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        wait_for(lambda: reached in output.read_text())
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) != 0
    stopped = r"^Stopped at epoch \d, step \d+: go on by --resume auto$"
    assert re.search(stopped, output.read_text(), re.M)
    assert_same_run(finish(tmp_path, data_path, "--resume", "auto", size=2), whole_on_two_ranks)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_torchrun_starts_again_after_the_death_of_a_rank(
    victim, whole_on_two_ranks, data_path, tmp_path
):
    arguments = (*RECIPE, "--data-path", data_path, "--output_dir", tmp_path / "run",
                 "--resume", "auto")  # fmt: skip
    command = torchrun("torch.distributed.run", "--max-restarts=1", ROOT / "main.py", *arguments)
    saved, output = tmp_path / "run" / "checkpoint.pth", tmp_path / "output"
    with output.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        wait_for(saved.exists)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        os.kill(int(children.split()[victim]), signal.SIGKILL)
        assert process.wait(120) == 0, output.read_text()
    assert "Resumed from" in output.read_text()
    assert_same_run(tmp_path / "run", whole_on_two_ranks)


def test_unreadable_checkpoint(whole, run, data_path, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    os.truncate(folder / "checkpoint.pth", 1000)
    arguments = (*RECIPE, "--data-path", data_path, "--output_dir", folder)
    ended = run(*arguments, "--resume", "auto")
    assert ended.code == 0
    assert "falling back to the checkpoint before it" in ended.out
    assert_same_run(folder, whole)


def test_a_finished_run_has_nothing_left_to_do(whole, run, data_path, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    ended = run(*RECIPE, "--data-path", data_path, "--output_dir", folder, "--resume", "auto")
    assert ended.code == 0
    assert "Epoch: [" not in ended.out
    assert_same_run(folder, whole)


def test_an_epoch_ends_with_the_steps_it_began_with(run, data_path, tmp_path, monkeypatch):
    arguments = (*RECIPE, "--data-path", data_path, "--output_dir", tmp_path / "run", "--resume",
                 "auto")  # fmt: skip
    with monkeypatch.context() as patch:
        signal_at(patch, main.MovingAverage, "update", 4, signal.SIGTERM)
        run(*arguments)
    refused = r"main\.py: error: .*checkpoint\.pth was saved in the middle of an epoch, .*\({}\)\."
    ended = run(*arguments, "--batch-size", "16", "--seed", "3")
    reason = "batch_size: checkpoint 8, now 16; seed: checkpoint 0, now 3"
    assert ended.code == 2
    assert re.match(refused.format(reason), ended.err)
    ranks = Ranks(tmp_path, *arguments)
    assert ranks.wait() == [2, 2]
    assert re.match(refused.format("processes: checkpoint 1, now 2"), ranks.errors())


def test_the_best_accuracy_so_far_is_kept(whole, run, data_path, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    saved = checkpoint.load(folder / "checkpoint.previous.pth")
    checkpoint.save(saved | {"max_accuracy": 101.0}, folder / "checkpoint.pth")
    best = (folder / "best_checkpoint.pth").read_bytes()
    arguments = (*RECIPE, "--data-path", data_path, "--output_dir", folder)
    assert "Max accuracy: 101.00%" in run(*arguments, "--resume", "auto").out
    assert (folder / "best_checkpoint.pth").read_bytes() == best


def test_auto_begins_where_there_is_nothing_to_resume(whole, run, data_path, tmp_path):
    arguments = (*RECIPE, "--data-path", data_path, "--output_dir", tmp_path / "new")
    assert run(*arguments, "--resume", "auto").code == 0
    assert_same_run(tmp_path / "new", whole)


def test_weights_alone_start_a_run_from_its_beginning(whole, run, data_path, tmp_path):
    weights = checkpoint.load(whole / "checkpoint.pth")["model"]
    torch.save({"model": weights}, tmp_path / "weights.pth")
    arguments = (*RECIPE, "--data-path", data_path, "--resume", tmp_path / "weights.pth")
    ended = run(*arguments, "--epochs", "1", "--lr", "0", "--min-lr", "0", "--warmup-lr", "0",
                "--output_dir", tmp_path / "run")  # fmt: skip
    assert ended.code == 0
    assert "holds weights alone: training starts at its beginning" in ended.out
    saved = checkpoint.load(tmp_path / "run" / "checkpoint.pth")
    for name, tensor in saved["model"].items():
        assert tensor.equal(weights[name])
        assert torch.allclose(saved["model_ema"][name], weights[name])


def test_a_signal_counts_though_a_compiler_took_its_handler():
    code = """
import ctypes, os, signal
from processes import StopSignal

stop = StopSignal()
ctypes.CDLL(None).signal(signal.SIGTERM, 0)  # the default, as LLVM's handler leaves it for a while
assert not stop
os.kill(os.getpid(), signal.SIGTERM)
assert stop
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
