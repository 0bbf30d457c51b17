"""What the tests of training share: small images, small runs, and their comparison."""

import multiprocessing
import os
import re
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from packaging.version import Version
from PIL import Image
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import checkpoint
import main

ROOT = Path(main.__file__).parent
MODEL = ("--model-kwargs", "patch_size=4", "embed_dim=16", "depth=2", "num_heads=2")
TINY = (*MODEL, "--model", "lion_tiny_patch16_224", "--input-size", "16", "--batch-size", "8",
        "--num_workers", "0", "--epochs", "1", "--device", "cpu")  # fmt: skip
VARIANT = ("--mask_type", "Selective", "--order", "S", "--pos_emb", "--mean", "0.2", "0.3", "0.4",
           "--mixup", "0", "--cutmix", "0", "--interpolation", "bilinear")  # fmt: skip

# Forks processes that have imported what takes long; clean ones, as it does nothing else.
processes = multiprocessing.get_context("forkserver")
IMPORTED = [
    "pytest", "timm.optim", "timm.scheduler", "torch._dynamo", "torch.utils.tensorboard",
    "transformers.modeling_layers", "sklearn.metrics",
]  # fmt: skip


def older(package: str, version: str) -> bool:
    """Whether another version of a package is installed, lower than this one."""
    return Version(metadata.version(package)) < Version(version)


def slow(*values: Any) -> Any:
    """A case to parametrize with, marked as slow."""
    return pytest.param(*values, marks=pytest.mark.slow)


def long(*values: Any) -> Any:
    """A case that runs by `-m long` alone."""
    return pytest.param(*values, marks=pytest.mark.long)


def slow_except(quick: Collection[tuple], cases: Iterable[tuple]) -> list:
    """`cases` to parametrize with, all but the `quick` ones marked as slow."""
    cases = list(cases)
    assert set(quick) < set(cases)
    return [pytest.param(*case) if case in quick else slow(*case) for case in cases]


def make_image_folder(root: Path, train: int = 120, test: int = 21) -> Path:
    """Noisy images of three classes, which differ in colour."""
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("val", test)):
        for i in range(count):
            pixels = generator.integers(0, 136, (20, 20, 3))
            pixels[..., i % 3] += 120
            folder = root / split / f"class{i % 3}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root


def call_main(*arguments: Any) -> None:
    main.main(main.get_args_parser().parse_args([str(argument) for argument in arguments]))


def refused(ended, message: str, folder: Path | None = None) -> None:
    """One sentence, exit code 2, and nothing done."""
    assert ended.code == 2, ended
    assert re.match(rf"main\.py: error: .*{message}", ended.err), ended.err
    assert ended.err.count("\n") == 1
    assert folder is None or not folder.exists()


class Ranks:
    """Processes with the environment that torchrun gives them, in a new `.folder` under `root`.

    Each runs `function(rank, folder, *arguments)`, by default main.py with these arguments.
    """

    def __init__(
        self,
        root: Path,
        *arguments: Any,
        size: int = 2,
        function: Callable[..., None] | None = None,
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(dir=root))
        what = (size, self.folder, function or _main, arguments)
        self.processes = [processes.Process(target=_rank, args=(r, *what)) for r in range(size)]
        for process in self.processes:
            process.start()

    def wait(self, seconds: float = 60) -> list[int | None]:
        """The exit codes; None for a process that had to be killed at the end of its time."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(end - time.monotonic(), 0))
        codes = [process.exitcode for process in self.processes]
        self.kill()
        return codes

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    def printed(self, rank: int = 0) -> str:
        output = self.folder / f"out{rank}"
        return output.read_text() if output.exists() else ""

    def errors(self, rank: int = 0) -> str:
        return (self.folder / f"err{rank}").read_text()


class Malicious:
    """Creates the file `proof` when unpickled without care."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple:
        return open, (str(self.proof), "w")


def rendezvous(folder: Path) -> str:
    """Where the ranks started in `folder` find each other."""
    return f"file://{folder}/rendezvous"


def count_reduction(calls: list, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """A hook of DistributedDataParallel that averages gradients as is done without one.

    Small models have one bucket, so `calls` grows by one with each averaging.
    """
    calls.append(bucket.index())
    return allreduce_hook(dist.group.WORLD, bucket)


def _main(rank: int, folder: Path, *arguments: Any) -> None:
    call_main(*arguments, "--dist_url", rendezvous(folder))


def _rank(rank: int, size: int, folder: Path, function: Callable, arguments: Sequence) -> None:
    for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
        target = os.open(folder / f"{name}{rank}", os.O_CREAT | os.O_WRONLY)
        os.dup2(target, stream.fileno())
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # for workers, as elsewhere: the default
    function(rank, folder, *arguments)


def signal_in_step(patch: pytest.MonkeyPatch, step: int, number: int = signal.SIGTERM) -> None:
    """This process receives a signal in the given optimiser step of main.py, counted from 1."""
    update, calls = main.MovingAverage.update, []

    def counted(*args, **kwargs):
        calls.append(None)
        if len(calls) == step:
            os.kill(os.getpid(), number)
        return update(*args, **kwargs)

    patch.setattr(main.MovingAverage, "update", counted)


def torchrun(module: str, *arguments: Any) -> list[str]:
    """The command by which `module` starts two processes of this machine."""
    launch = ("--nproc_per_node=2", "--master_addr=127.0.0.1", f"--master_port={free_port()}")
    return [sys.executable, "-m", module, *launch, *map(str, arguments)]


def assert_ends_with_parent(start: Callable[[Path], None], folder: Path) -> None:
    """`start(folder)`, which writes the number of a process to its file `pid`, is killed."""
    parent, pid = processes.Process(target=start, args=(folder,)), folder / "pid"
    parent.start()
    wait_for(lambda: pid.exists() and pid.read_text())
    parent.kill()
    wait_for(lambda: not is_running(int(pid.read_text())), 10)


def is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
    except OSError:
        return False


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def wait_for(happened: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def weights(folder: Path, key: str = "model") -> dict[str, torch.Tensor]:
    return checkpoint.load(folder / "checkpoint.pth")[key]


def same(a: Any, b: Any) -> bool:
    """Bit for bit, in nested containers."""
    if torch.is_tensor(a):
        return torch.is_tensor(b) and a.equal(b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_run(folder: Path, other: Path) -> None:
    """Everything that two runs leave is the same, but what they were asked."""
    for name in ("checkpoint.pth", "best_checkpoint.pth"):
        saved, expected = checkpoint.load(folder / name), checkpoint.load(other / name)
        assert saved.keys() == expected.keys()
        differing = [key for key in saved if not same(saved[key], expected[key])]
        assert [key for key in differing if key != "args"] == []
    assert (folder / "log.txt").read_text() == (other / "log.txt").read_text()


def write_image(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value,) * 3).save(path)
