"""Kills runs at random moments, starts them again, and compares them with runs left alone.

python scripts/soak.py [--kills N] [CASE ...]
"""

import argparse
import itertools
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torchvision.datasets import FakeData

sys.path.insert(0, str(ROOT := Path(__file__).resolve().parent.parent))
import checkpoint
from commands import open_streams
from mlm import prepare
from workers import leave_with_parent

RUN_IMAGES = (
    "main.py", "--data-path", "{data}/images", "--output_dir", "{run}", "--resume", "auto",
    "--model", "lion_tiny_patch16_224", "--mask_type", "Selective", "--order", "S",
    "--input-size", "16", "--model-kwargs", "patch_size=4", "embed_dim=16", "depth=2",
    "num_heads=2", "--batch-size", "8", "--epochs", "8", "--warmup-epochs", "1", "--lr", "0.05",
    "--drop-path", "0.3", "--model-ema-decay", "0.9", "--num_workers", "1", "--device", "cpu",
)  # fmt: skip
RUN_TEXT = (
    "-m", "mlm.pretrain", "mlm/configs/tiny.yaml", "data={data}/text", "output={run}",
    "resume=auto", "device=cpu", "steps=600", "eval_every=60", "save_every=20", "length=16",
    "micro_batch=4", "global_batch=8", "model.hidden_size=16", "model.intermediate_size=16",
    "model.hidden_dropout_prob=0.1",
)  # fmt: skip
TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d",
            "--rdzv_endpoint=localhost:0")  # fmt: skip
LAUNCHERS = {"1": (), "2": TORCHRUN, "restarts": (*TORCHRUN, "--max-restarts=3")}
PROGRAMS = {"images": RUN_IMAGES, "text": RUN_TEXT}
CASES = [f"{program}-{launcher}" for program in PROGRAMS for launcher in LAUNCHERS]
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
LONGEST = 600  # seconds of a run, and
ENDING = 180  # of a rank whose launcher has ended, which it may yet have to import PyTorch to see


def make_data(folder: Path) -> None:
    """Noisy images of three classes, and token shards of Python's help."""
    for split, count in (("train", 240), ("val", 24)):
        for number, (image, label) in enumerate(FakeData(count, (3, 20, 20), 3)):
            place = folder / "images" / split / f"class{label}"
            place.mkdir(parents=True, exist_ok=True)
            image.save(place / f"{number}.png")
    (folder / "topics.txt").write_text("\n\n".join(topics.values()), encoding="utf-8")
    options = ("--train-tokenizer", "2000", "--eval-share", "0.05")
    prepare.main([str(folder / "topics.txt"), "--output", str(folder / "text"), *options])


class Job:
    """A command in a process, its output in a file, and the ranks that it started."""

    def __init__(self, case: str, data: Path, run: Path) -> None:
        program, launcher = case.split("-")
        command = [part.format(data=data, run=run) for part in PROGRAMS[program]]
        self.launched = bool(LAUNCHERS[launcher])
        self.output = Path(f"{run}.output")
        self.known: set[int] = set()
        with self.output.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, *LAUNCHERS[launcher], *command],
                cwd=ROOT, stdout=file, stderr=file, start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"}, preexec_fn=leave_with_parent,
            )  # fmt: skip

    def ranks(self) -> list[int]:
        if not self.launched:
            return [self.process.pid]
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        with suppress(OSError):
            self.known.update(found := [int(pid) for pid in children.read_bytes().split()])
            return found
        return []

    def ended(self, seconds: float) -> bool:
        """Whether it ends within that time."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        return self.process.poll() is not None

    def trains(self) -> bool:
        """Whether it begins to train; False if it ends before."""
        while not self.ended(0.05):
            if re.search(r"Step: |Epoch: \[", self.output.read_text(errors="replace")):
                return True
        return False

    def disturb(self, chance: random.Random, start: float, rest: float) -> str | None:
        """Kills it, or a rank of it, at a random moment: what was done, None if it ended before.

        `start` is how many seconds it takes to begin, `rest` how many it may train then.
        """
        if in_training := chance.random() < 0.8:
            self.trains()
        if self.ended(chance.uniform(0, rest if in_training else start)):
            return None
        number, ranks = chance.choice(SIGNALS), self.ranks()
        target = chance.choice([self.process.pid, *chance.sample(ranks, min(len(ranks), 1))])
        with suppress(ProcessLookupError):
            os.kill(target, number)
        return f"{number.name} to {'a rank' if target in ranks else 'the launcher'}"

    def require_end(self) -> int:
        """Its exit code; RuntimeError if it, or a rank that it leaves behind, goes on too long."""
        self.ranks()
        in_time = self.ended(LONGEST)
        end = time.monotonic() + ENDING
        while any(map(alive, self.known)):
            if not in_time or time.monotonic() > end:
                for pid in filter(alive, [self.process.pid, *self.known]):
                    os.kill(pid, signal.SIGKILL)
                raise RuntimeError(f"it did not end in time: see {self.output}")
            time.sleep(0.1)
        return self.process.returncode


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rsplit(b")", 1)[1].split()[0] != b"Z"
    except OSError:
        return False


def run_whole(case: str, folder: Path) -> tuple[Path, float, float]:
    """A run left alone: its folder, and the seconds before it trains and after."""
    began = time.monotonic()
    job = Job(case, folder, run := folder / f"{case}-whole")
    job.trains()
    start = time.monotonic() - began
    if job.require_end():
        raise RuntimeError(f"it failed: see {job.output}")
    return run, start, time.monotonic() - began - start


def soak(case: str, kills: int, chance: random.Random, folder: Path) -> Counter:
    """Kills runs of a case that often in all; returns what was done.

    Raises RuntimeError if a run fails by itself or does not end, AssertionError if it ends with
    other weights than one left alone.
    """
    whole, start, rest = run_whole(case, folder)
    done: Counter[str] = Counter()
    for number in itertools.count():
        run, code = folder / f"{case}-{number}", None
        while code != 0:
            job, before = Job(case, folder, run), done.total()
            while done.total() < kills and (what := job.disturb(chance, start, rest / 2)):
                done[what] += 1
            code = job.require_end()
            if code and done.total() == before:
                raise RuntimeError(f"it failed by itself: see {job.output}")
        require_same(run, whole)
        if done.total() == kills:
            return done


def require_same(run: Path, whole: Path) -> None:
    """Raises AssertionError if the weights, their average and the optimiser are not equal."""
    saved, expected = (checkpoint.load(folder / "checkpoint.pth") for folder in (run, whole))
    for name in ("model", "model_ema"):
        assert_equal(saved.get(name), expected.get(name))
    assert_equal(saved["optimizer"]["state"], expected["optimizer"]["state"])


assert_equal = partial(torch.testing.assert_close, rtol=0, atol=0)


def main(arguments: Sequence[str] | None = None) -> None:
    open_streams()
    parser = argparse.ArgumentParser("soak", description=__doc__)
    parser.add_argument("cases", nargs="*", default=CASES, help=", ".join(CASES), metavar="CASE")
    parser.add_argument("--kills", type=int, default=20, help="of each case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="new folder to keep the runs in")
    options = parser.parse_args(arguments)
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"there is no case {', '.join(unknown)}: choose of {', '.join(CASES)}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.output or Path(temporary)
        folder.mkdir(parents=True, exist_ok=not options.output)
        make_data(folder)
        for case in options.cases:
            began = time.monotonic()
            done = soak(case, options.kills, random.Random(f"{options.seed} {case}"), folder)
            told = ", ".join(f"{count} {what}" for what, count in sorted(done.items()))
            print(f"{case}: equal in {time.monotonic() - began:.0f} s after {told}", flush=True)


if __name__ == "__main__":
    main()
