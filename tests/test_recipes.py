"""Recipes take paths as the caller's shell does, from whatever folder they are called."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

# In the place of the programs: where they run, and the arguments that name files.
STUB = """#!/bin/sh
echo "$PWD"
for word; do case "$word" in */*) [ -e "$word" ] || echo "absent: $word";; esac; done
"""


@pytest.mark.parametrize(
    ("recipe", "arguments"),
    [
        ("cifar10.sh", "my/data my/run --finetune my/weights.pth"),
        ("imagenet.sh", "my/data my/run --teacher-path my/weights.pth"),
        ("distill.sh", "my/data my/run my/weights.pth"),
        ("finetune_384.sh", "my/data my/run my/weights.pth"),
        ("distill_cifar10.sh", "my/data my/run --finetune my/weights.pth"),
    ],
)
def test_relative_paths_are_the_callers(recipe, arguments, tmp_path):
    for program in ("torchrun", "python3"):
        stub = tmp_path / "bin" / program
        stub.parent.mkdir(exist_ok=True)
        stub.write_text(STUB)
        stub.chmod(0o755)
    here = tmp_path / "here"
    for folder in ("data", "run/teacher"):
        (here / "my" / folder).mkdir(parents=True)
    for file in ("my/weights.pth", "my/run/teacher/checkpoint.pth"):
        (here / file).touch()
    for seed in (1, 2, 3):
        for kind in ("none", "hard", "soft"):
            (here / "my" / "run" / f"{kind}-{seed}").mkdir()
    environment = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    script = os.path.relpath(ROOT / "scripts" / recipe, here)
    done = subprocess.run(["bash", script, *arguments.split()], cwd=here, env=environment,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    printed = set(done.stdout.splitlines())
    assert {Path(line) for line in printed} == {here}


@pytest.mark.parametrize(
    ("recipe", "needs", "takes"),
    [("cifar10", 2, None), ("demo_checkpoint", 1, None), ("distill", 3, None),
     ("distill_cifar10", 2, None), ("finetune_384", 3, None), ("get_text", 0, 1),
     ("imagenet", 2, None), ("quickstart", 0, 1)],
)  # fmt: skip
def test_recipes_tell_their_usage(recipe, needs, takes, tmp_path):
    def call(*arguments):
        command = ["bash", ROOT / "scripts" / f"{recipe}.sh", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)

    asked = call("--help")
    assert asked.returncode == 0
    assert f"bash scripts/{recipe}.sh" in asked.stdout
    wrong = [["--absent", *["folder"] * needs]]
    if needs:
        wrong.append(["folder"] * (needs - 1))
    if takes:
        wrong.append(["folder"] * (takes + 1))
    for bad in wrong:
        done = call(*bad)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: ")
        assert done.stderr.endswith(asked.stdout)
    assert not list(tmp_path.iterdir())


PROGRAMS = [p for p in sorted((ROOT / "scripts").glob("*.py")) if "__main__" in p.read_text()]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.name)
def test_programs_tell_their_usage(program, monkeypatch, capsys):
    for option, code in (("--help", None), ("--absent", 2)):
        monkeypatch.setattr(sys, "argv", [str(program), option])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(program), run_name="__main__")
        told = capsys.readouterr()
        assert (ended.value.code or None) == code
        assert (told.err if code else told.out).startswith("usage: ")
