"""Every command that the README and the guides show runs, in a small form."""

import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from helpers import MODEL, ROOT, long, slow, weights

import pretrained
import publishing

GUIDES = (
    "README.md",
    "docs/training.md",
    "docs/own-data.md",
    "docs/formats.md",
    "docs/evidence.md",
)
TEXT = "".join((ROOT / page).read_text() for page in GUIDES)
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, re.DOTALL)
LINES = [line for kind, block in BLOCKS if kind == "bash" for line in block.splitlines()]
# Those of language models have tests of their own, other programs need none.
OWN = ("python ", "torchrun ", "bash ", "source ")
COMMANDS = [x for x in dict.fromkeys(LINES) if x.startswith(OWN) and "text" not in x]
LONG = ("scripts/benchmark.py", "distill", "finetune_384")
# Python of one process, which can be this one: most of a short process's time goes to imports.
QUICK = ("main.py --eval", "run_with_submitit", "plot_log", "predict.py")
# What is done with the trained model in demo/.
TRAINED = ("predict.py", "visualize.py", "export.py")
# Those that set up a machine: this test runs in one of them, and the others take minutes.
SETTING_UP = ("scripts/quickstart.sh", "scripts/test.sh", "scripts/environment.sh")
SMALL = (*MODEL, "--input-size", "16", "--batch-size", "8", "--epochs", "1", "--num_workers", "0",
         "--device", "cpu", "--mixup", "0", "--cutmix", "0")  # fmt: skip
JOB = SimpleNamespace(job_id="7")


class Executor:
    def __init__(self, **_: object) -> None: ...

    def update_parameters(self, **parameters: object) -> None:
        assert parameters["nodes"] == 2

    def submit(self, job: Callable[[], None]) -> SimpleNamespace:
        job()
        return JOB


SUBMITIT = SimpleNamespace(
    AutoExecutor=Executor,
    JobEnvironment=lambda: JOB,
    helpers=SimpleNamespace(
        TorchDistributedEnvironment=lambda: SimpleNamespace(export=lambda: None)
    ),
)


@pytest.fixture(scope="module")
def places(tmp_path_factory, data_path) -> dict[str, str]:
    """What the README's names stand for here."""
    root = tmp_path_factory.mktemp("readme")
    options = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    for name, variant in (("lion", {"mask_type": "Selective", "order": "S"}), ("plain", {})):
        model = timm.create_model("lion_tiny_patch16_224", num_classes=3, **variant, **options)
        torch.save({"model": model.state_dict()}, root / f"{name}.pth")
    teacher = timm.create_model("test_resnet", num_classes=3)
    torch.save({"model": teacher.state_dict()}, root / "teacher.pth")
    (root / "log.txt").write_text(
        '{"train_loss": 1.0, "train_lr": 0.1, "test_loss": 1.0, "test_acc1": 50.0, '
        '"test_acc5": 90.0, "epoch": 0, "n_parameters": 1}\n'
    )
    return {
        "/outputpath/log.txt": str(root / "log.txt"),
        "--finetune checkpoint.pth": f"--finetune {root}/plain.pth",
        "/outputpath CHECKPOINT": f"/outputpath {root}/lion.pth",
        " checkpoint.pth": f" {root}/lion.pth",
        "PATH_OR_URL": str(root / "teacher.pth"),
        "regnety_160": "test_resnet",
        "/datapath": str(data_path),
        "--nproc_per_node=4": "--nproc_per_node=2",
    }


def is_quick(line: str) -> bool:
    return any(name in line for name in (*SETTING_UP, *QUICK))


def case(line: str) -> Any:
    if is_quick(line):
        return line
    in_readme = line in (ROOT / "README.md").read_text()
    return slow(line) if in_readme and not any(name in line for name in LONG) else long(line)


@pytest.mark.parametrize("line", [case(line) for line in COMMANDS])
def test_command(line, places, tmp_path, ending, monkeypatch):
    line = line.split("  #")[0].strip()
    if any(name in line for name in SETTING_UP):
        assert Path(ROOT, line.split()[1]).exists()
        return
    for name, here in places.items():
        line = line.replace(name, here)
    line = line.replace("/outputpath", str(tmp_path / "run")).replace("jobs/%j", f"{tmp_path}/%j")
    for name in ("curves.png", "predictions.csv", "pictures", "lion.onnx"):
        line = line.replace(f"--output {name}", f"--output {tmp_path / name}")
    words = shlex.split(line)
    if "benchmark" in line:
        words += ["--device", "cpu", "--scales", "tiny", "--sizes", "32x1", "--models", "LION-S♮"]
        words += ["--repeats", "1", "--compile", "none"]
    elif "distill_cifar10" in line:  # its arguments are for two kinds of model
        words += SMALL[len(MODEL) :]
    elif "compare.py" in line:
        own, _, more = line.partition(" -- ")
        words = [*shlex.split(own), "--seeds", "0"]
        words += [] if "--models" in words else ["--models", "lion-s-curves"]
        words += ["--", *shlex.split(more), *SMALL]
        words += ["--torchcompile", "eager", "--torchcompile-mode", "default"]
    elif not any(name in line for name in ("plot_log", *TRAINED)):
        words += SMALL
    if words[0] == "bash" and "distill_cifar10" not in line:  # compiled for speed on GPUs
        words += ["--torchcompile", "eager", "--teacher-model", "test_resnet"]
    monkeypatch.chdir(ROOT)
    if is_quick(line):
        monkeypatch.setattr(sys, "path", sys.path[:])  # scripts add to it
        monkeypatch.setitem(sys.modules, "submitit", SUBMITIT)
        monkeypatch.setattr(sys, "argv", words[1:])
        ended = ending(runpy.run_path, words[1], run_name="__main__")
        assert not ended.code, ended
        assert not ended.err, ended
        return check(line, words, ended.out, tmp_path)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "GPUS": "2",
        "SEEDS": "0",
    }
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    check(line, words, done.stdout, tmp_path)


def check(line: str, words: list[str], printed: str, folder: Path) -> None:
    if "--output_dir" in line and "--eval" not in line:
        assert weights(folder / "run")
    if any(name in line for name in TRAINED):
        assert (folder / Path(words[words.index("--output") + 1]).name).exists()
    if "compare.py" in line:
        assert re.search(r"^(\d+) of \1 runs are finished$", printed, re.MULTILINE)
    if "distill_cifar10" in line:
        scores = dict(row.split(":") for row in printed.splitlines()[-4:])
        assert list(scores) == ["teacher", "none", "hard", "soft"]
        assert "head_dist.weight" in weights(folder / "run" / "soft-0")


def test_python(trained, data_path, tmp_path):
    publishing.save_for_hf(pretrained.load(trained), tmp_path)
    places = {"/outputpath": str(tmp_path), "/datapath": str(data_path)}
    for code in [block for kind, block in BLOCKS if kind == "python"]:
        for name, here in places.items():
            code = code.replace(name, here)
        names = {}
        exec(code, names)
        if "logits" in names:
            assert names["logits"].shape == (1, 1000)
        else:
            assert 0.4 < names["right"] / len(names["images"]) <= 1
