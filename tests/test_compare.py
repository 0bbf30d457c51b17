"""Tables of models and seeds: spread over leases, resumed, and reported by their last epoch."""

import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from helpers import ROOT, TINY, assert_ends_with_parent, wait_for

from scripts import compare
from scripts.comparing import scheduling
from scripts.comparing.programs import PROGRAMS
from scripts.comparing.recipes import Run, read_recipe
from scripts.comparing.scheduling import Scheduler

LOG = {"train_loss": 1.0, "n_parameters": 1234}


def recipe(folder: Path, **changes) -> Path:
    path = folder / "recipe.yaml"
    content = {
        "arguments": shlex.join([*TINY, "--epochs", "2"]),
        "seeds": [0, 1],
        "models": {"lit": "--mask_type Lit", "d": "--mask_type Decay"},
        **changes,
    }
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def finish(run: Run, accuracies: list[float], seconds: float = 60) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    lines = [{**LOG, "epoch": e, "test_acc1": a} for e, a in enumerate(accuracies)]
    (run.folder / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lease = {"epochs": len(accuracies), "seconds": seconds, "at_once": 2}
    (run.folder / "leases.jsonl").write_text(json.dumps(lease) + "\n")
    (run.folder / "args.yaml").write_text(
        yaml.safe_dump(dict.fromkeys(("device", "torch", "timm", "commit"), "known"))
    )


def scheduler(runs: list[Run], seconds: float = 100) -> Scheduler:
    return Scheduler(runs, "", concurrent=2, seconds=seconds)


def test_runs_of_a_recipe(tmp_path):
    runs = read_recipe(recipe(tmp_path), tmp_path, more=("--lr", "1"))
    assert [str(run) for run in runs] == ["lit, seed 0", "d, seed 0", "lit, seed 1", "d, seed 1"]
    assert runs[1].folder == tmp_path / "d" / "seed0"
    assert runs[1].length == 2
    assert runs[1].arguments == (*TINY, "--epochs", "2", "--mask_type", "Decay", "--lr", "1")
    varied = read_recipe(
        recipe(tmp_path), tmp_path, models=["d"], seeds=[7], vary=[("lr", "1e-3", "2e-3")]
    )
    assert [str(run) for run in varied] == ["d,lr=1e-3, seed 7", "d,lr=2e-3, seed 7"]
    assert varied[1].arguments[-2:] == ("--lr", "2e-3")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": None}, "is no recipe .*it needs arguments, seeds and models"),
        ({"models": {"a/b": ""}}, "'a/b' is no name of a folder"),
        ({"models": {"a": "--lr -1"}}, "--lr must not be negative"),
        ({"models": {"a": "--model nonsense"}}, "There is no model 'nonsense'"),
        ({"models": {"a": "--help"}}, "A recipe trains: leave --help out"),
        ({"arguments": "--eval"}, "A recipe trains: leave --eval out"),
        ({"arguments": "--seed 3"}, "compare.py itself gives runs their seed: leave it out"),
        ({"vary": {"output_dir": ["x"]}}, "compare.py itself gives runs their output_dir"),
        ({"vary": {"seed": [1, 2]}}, "The seed is not varied: give --seeds"),
        ({"plateau": "abc"}, "The plateau in .* must be a number, not 'abc'"),
        ({"program": ["a"]}, r"has no program \['a'\]: choose one of main.py"),
        ({"models": {"..": ""}}, "The model '..' is no name of a folder"),
        ({"seeds": [1, 1]}, "The seed 1 is there twice: give each once"),
        ({"seeds": []}, "Give at least one seed"),
        ({"seeds": [-1]}, "A seed must be a whole number from 0 to .*, not -1"),
        ({"seeds": ["x"]}, "A seed must be a whole number from 0 to .*, not 'x'"),
        ({"seeds": "123"}, "is no recipe .'123' is no list of values"),
        ({"vary": {"batch-size": "64"}}, "is no recipe .'64' is no list of values"),
        ({"vary": {"lr": [1e-3, 1e-3]}}, "The lr 0.001 is there twice: give each once"),
        ({"vary": {"finetune": ["../a"]}}, "The finetune ../a would name a folder of runs"),
    ],
)
def test_wrong_recipes_are_refused_before_any_work(changes, message, tmp_path, ending):
    ended = ending(
        compare.main, [str(recipe(tmp_path, **changes)), "--output", str(tmp_path / "out")]
    )
    assert ended.code == 2
    assert not (tmp_path / "out").exists()
    assert ended.err.count("\n") == 1
    with pytest.raises(ValueError, match=message):
        read_recipe(recipe(tmp_path, **changes), tmp_path / "out")


@pytest.mark.parametrize(
    "text", ["[" * 1000, 'models: {a: "--aa \'x"}', "\0", "- a", "b\xff", "models: {a: b, a: c}"]
)
def test_files_that_are_no_recipe(text, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match="is no recipe .*it needs arguments, seeds and models"):
        read_recipe(path, tmp_path / "out")


def test_a_recipe_that_is_not_there(tmp_path):
    with pytest.raises(
        ValueError, match="Cannot read the recipe .*: No such file .*: check its name"
    ):
        read_recipe(tmp_path / "recipe.yaml", tmp_path / "out")


def test_unknown_models_and_other_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has no model x: it has lit, d"):
        read_recipe(recipe(tmp_path), tmp_path, models=["x"])
    run = read_recipe(recipe(tmp_path), tmp_path)[0]
    run.folder.mkdir(parents=True)
    (run.folder / "arguments.txt").write_text(shlex.join(run.arguments))
    read_recipe(recipe(tmp_path), tmp_path)
    with pytest.raises(ValueError, match="holds a run with other arguments"):
        read_recipe(recipe(tmp_path), tmp_path, more=("--lr", "1"))


def test_a_run_of_main_keeps_no_settings(tmp_path, monkeypatch):
    run = read_recipe(recipe(tmp_path), tmp_path)[0]
    monkeypatch.setattr(type(run.program), "next_command", lambda *_: ["true"])
    scheduler([run]).start(run, 0)
    assert {path.name for path in run.folder.iterdir()} == {"arguments.txt", "output.txt"}
    assert (run.folder / "arguments.txt").read_text() == shlex.join(run.arguments)


def test_only_what_can_end_in_the_time_starts(tmp_path):
    runs = read_recipe(recipe(tmp_path, seeds=[0, 1, 2]), tmp_path)
    lit, d = ([run for run in runs if run.model == name] for name in ("lit", "d"))
    assert scheduler(runs, 100).next_that_fits(runs) is runs[0]  # nothing is known yet
    finish(lit[0], [1, 2], seconds=90)
    assert scheduler(runs, 100).estimate(lit[1]) == 90
    assert scheduler(runs, 100).estimate(d[0]) == 90  # as the slowest that is known
    finish(d[0], [1, 2], seconds=60)
    assert scheduler(runs, 100).estimate(d[1]) == 60
    late = scheduler(runs, 100)
    late.end -= 30
    assert late.next_that_fits([lit[1], d[1]]) is d[1]
    late.end -= 30
    assert late.next_that_fits([lit[1], d[1]]) is None
    too_long = scheduler(runs, 50)  # for any lease: it is spread over several
    assert too_long.next_that_fits([d[1]]) is d[1]
    too_long.end -= 30
    assert too_long.next_that_fits([d[1]]) is None


def test_an_interrupted_run_needs_what_is_left(tmp_path):
    runs = read_recipe(recipe(tmp_path), tmp_path)
    finish(runs[0], [1, 2], seconds=60)
    finish(runs[2], [1], seconds=30)
    assert scheduler(runs).estimate(runs[2]) == 60  # without a checkpoint all
    (runs[2].folder / "checkpoint.pth").touch()
    assert scheduler(runs).estimate(runs[2]) == 30


def test_report_of_the_last_epoch(tmp_path, capsys):
    path = recipe(tmp_path)
    runs = read_recipe(path, tmp_path)
    finish(runs[0], [99, 60])  # never the best
    finish(runs[2], [99, 62])
    finish(runs[1], [50, 51])
    compare.main([str(path), "--output", str(tmp_path), "--report"])
    text = (tmp_path / "comparison.md").read_text()
    assert "| lit | 1,234 | 61.00 ± 1.41 | 60.00, 62.00 | 1.0 |" in text
    assert "| d | 1,234 | 51.00 | 51.00 | 1.0 |" in text
    assert "3 of 4 runs, 2 epochs" in text
    assert (tmp_path / "comparison.png").exists()


def test_arguments_for_all_runs_follow_two_dashes(tmp_path, ending):
    command = [str(recipe(tmp_path)), "--output", str(tmp_path / "out"), "--models", "d"]
    ended = ending(compare.main, [*command, "--", "--lr", "-1"])
    assert ended.code == 2
    assert "--lr must not be negative" in ended.err
    ended = ending(compare.main, [*command, "--lr", "-1"])
    assert ended.code == 2
    assert "unrecognized arguments: --lr" in ended.err


def test_report_without_a_finished_run(tmp_path, ending):
    ended = ending(compare.main, [str(recipe(tmp_path)), "--output", str(tmp_path), "--report"])
    assert ended.code == 2
    assert "holds no finished run of this recipe yet" in ended.err


def ending_with(code: int, monkeypatch) -> None:
    """Runs print a line and end with the code."""
    script = f"import sys; print('main.py: error: so it is.'); sys.exit({code})"
    monkeypatch.setattr(
        PROGRAMS["main.py"], "next_command", lambda *_: [sys.executable, "-c", script]
    )


def test_failures_are_told_and_the_others_go_on(tmp_path, ending, monkeypatch):
    ending_with(1, monkeypatch)
    ended = ending(compare.main, [str(recipe(tmp_path, seeds=[0])), "--output", str(tmp_path)])
    assert ended.code == 1
    for name in ("lit", "d"):
        assert f"{name}, seed 0: ended with 1, see {tmp_path}/{name}/seed0/output.txt" in ended.out
    assert "2 runs failed" in ended.err


def test_what_is_refused_at_the_start_ends_all(tmp_path, ending, monkeypatch):
    ending_with(2, monkeypatch)
    ended = ending(compare.main, [str(recipe(tmp_path, seeds=[0])), "--output", str(tmp_path)])
    assert ended.code == 2
    assert ended.err == "compare.py: error: lit, seed 0: main.py: error: so it is.\n"
    assert not (tmp_path / "d").joinpath("seed0", "output.txt").exists()


def test_what_is_refused_later_ends_itself(tmp_path, ending, monkeypatch):
    path = recipe(tmp_path, seeds=[0, 1])
    finish(read_recipe(path, tmp_path)[0], [1])
    ending_with(2, monkeypatch)
    ended = ending(compare.main, [str(path), "--output", str(tmp_path)])
    assert ended.code == 1
    assert "4 runs failed" in ended.err


@pytest.mark.slow
def test_a_model_that_cannot_be_built_is_told(tmp_path, ending, data_path):
    path = recipe(tmp_path, seeds=[0], models={"a": "--mask_type Lit --model-kwargs num_heads=7"})
    arguments = [str(path), "--output", str(tmp_path), "--data-path", str(data_path)]
    ended = ending(compare.main, arguments)
    assert ended.code == 2
    assert "a, seed 0: main.py: error: " in ended.err
    assert "cannot be built" in ended.err


@pytest.mark.long
def test_leases(tmp_path, data_path):
    """A signal stops all, which save; the next call ends what was begun and removes checkpoints."""
    out = tmp_path / "out"
    path = recipe(tmp_path, seeds=[0], arguments=shlex.join([*TINY, "--epochs", "6"]))
    command = [sys.executable, ROOT / "scripts/compare.py", path, "--output", out,
               "--data-path", data_path, "--concurrent", "2"]  # fmt: skip
    logs = [out / name / "seed0" / "log.txt" for name in ("lit", "d")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        wait_for(lambda: all(log.exists() and log.read_text() for log in logs), 300)
        process.send_signal(signal.SIGTERM)
        printed = process.communicate(timeout=60)[0]
    assert process.returncode == 0
    assert "0 of 2 runs are finished" in printed
    for log in logs:
        assert (log.parent / "checkpoint.pth").exists()
        assert 0 < log.read_text().count("\n") < 6
    began = time.monotonic()
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "2 of 2 runs are finished" in printed
    assert "from epoch 0" not in printed
    for log in logs:
        assert log.read_text().count("\n") == 6
        assert not list(log.parent.glob("*.pth"))
        leases = [json.loads(line) for line in (log.parent / "leases.jsonl").open()]
        assert [lease["at_once"] for lease in leases] == [2, 2]
        assert sum(lease["epochs"] for lease in leases) >= 6
        assert leases[1]["seconds"] <= time.monotonic() - began


def test_the_time_is_kept(tmp_path, data_path, ending):
    path = recipe(tmp_path, seeds=[0], arguments=shlex.join([*TINY, "--epochs", "1000"]))
    arguments = [path, "--output", tmp_path / "out", "--data-path", data_path, "--models", "d",
                 "--minutes", "0.02"]  # fmt: skip
    ended = ending(compare.main, [str(argument) for argument in arguments])
    assert ended.code == 0
    assert "d, seed 0: stopped in epoch 0\n0 of 1 runs are finished\n" in ended.out


def test_a_run_that_does_not_leave_is_killed(tmp_path, monkeypatch):
    (run,) = read_recipe(recipe(tmp_path), tmp_path, models=["lit"], seeds=[0])
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(99)"
    command = [sys.executable, "-c", deaf]
    monkeypatch.setattr(type(run.program), "next_command", lambda *_: command)
    monkeypatch.setattr(scheduling, "GRACE", 0.2)
    runs, began = scheduler([run], seconds=2), time.monotonic()
    runs.work()
    assert runs.failed == [run]
    assert time.monotonic() - began < 50


SLEEPER = "import os, sys, time; print(os.getpid(), file=open(sys.argv[1], 'w')); time.sleep(99)"


def schedule(folder: Path) -> None:
    (run,) = read_recipe(recipe(folder), folder, models=["lit"], seeds=[0])
    command = [sys.executable, "-c", SLEEPER, str(folder / "pid")]
    type(run.program).next_command = lambda *_: command
    scheduler([run]).work()


def test_runs_leave_when_the_comparison_is_killed(tmp_path):
    assert_ends_with_parent(schedule, tmp_path)


def test_what_a_kill_leaves_is_gone_on_with(tmp_path):
    (run,) = read_recipe(recipe(tmp_path), tmp_path, models=["lit"], seeds=[0])
    run.folder.mkdir(parents=True)
    (run.folder / "log.txt").touch()
    assert run.log == []
    assert run.trained == 0
    assert not run.is_finished


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [("leases.jsonl", '{"epochs": 1, "seco', "leases.jsonl is damaged: remove it"),
     ("leases.jsonl", "[]\n", "leases.jsonl is damaged: remove it"),
     ("log.txt", "note\n{}\n", "line 1 of .*log.txt is not the JSON of an epoch"),
     ("arguments.txt", None, "holds arguments.txt, which is no file"),
     ("output.txt", None, "holds output.txt, which is no file")],
)  # fmt: skip
def test_damaged_files_of_a_run_are_told(file, text, message, tmp_path, ending):
    path = tmp_path / "out" / "lit" / "seed0" / file
    path.parent.mkdir(parents=True)
    path.mkdir() if text is None else path.write_text(text)
    ended = ending(compare.main, [str(recipe(tmp_path)), "--output", str(tmp_path / "out")])
    assert ended.code == 2
    assert ended.err.count("\n") == 1
    assert re.match(f"compare.py: error: .*{message}", ended.err), ended.err


def test_recipes_of_the_repository(tmp_path):
    for path in (ROOT / "scripts" / "recipes").glob("*.yaml"):
        assert read_recipe(path, tmp_path)
