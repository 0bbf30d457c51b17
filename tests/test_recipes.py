"""Recipes take paths as the caller's shell does, from whatever folder they are called."""

import os
import subprocess
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
