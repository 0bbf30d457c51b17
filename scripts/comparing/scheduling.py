"""Runs that share the GPUs of a machine, for a time."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from errors import UserError
from files import replacing
from processes import STOP_SIGNALS, StopSignal
from scripts.comparing.programs import ROOT
from scripts.comparing.recipes import LEASES, Run
from workers import leave_with_parent, usable_cores

# Exit codes of a run that was sent a signal: after it saved, and before there was what to save.
STOPPED = tuple(code for number in STOP_SIGNALS for code in (128 + number, -number))
REFUSED = 2  # the exit code for what a user did wrong: at the start, most likely in all runs
GRACE = 90.0  # seconds in which runs that are sent a signal save


@dataclass
class Started:
    run: Run
    process: subprocess.Popen
    slot: int
    done: int
    began: float = field(default_factory=time.monotonic)


class Scheduler:
    """Runs that train at once, `concurrent` of them on each GPU (or on the CPU), for a time."""

    def __init__(
        self,
        runs: Sequence[Run],
        data_path: str,
        *,
        concurrent: int,
        seconds: float,
        keep_checkpoints: bool = False,
    ) -> None:
        self.runs = runs
        self.data_path = data_path
        self.gpus = torch.cuda.device_count()
        self.slots = set(range(concurrent * max(1, self.gpus)))
        self.seconds = seconds
        self.end = time.monotonic() + seconds
        self.keep_checkpoints = keep_checkpoints
        self.started: list[Started] = []
        self.failed: list[Run] = []

    def work(self) -> None:
        """Until all is finished, nothing more fits into the time, or a signal comes.

        Raises UserError if a run is refused before any has trained.
        """
        stop = StopSignal()
        waiting = [run for run in self.runs if not run.is_finished]
        waiting.sort(key=lambda run: not run.has_begun)
        try:
            while not stop and time.monotonic() < self.end:
                for run, slot in self.collect():
                    self.start(run, slot)
                while (slots := self.free_slots()) and (run := self.next_that_fits(waiting)):
                    waiting.remove(run)
                    self.start(run, min(slots))
                if not self.started:
                    break
                time.sleep(0.2)
        finally:
            self.end_all()
            self.collect()

    def end_all(self) -> None:
        """Signals all runs to leave, and kills those that do not."""
        for started in self.started:
            started.process.send_signal(signal.SIGTERM)
        end = time.monotonic() + GRACE
        for started in self.started:
            try:
                started.process.wait(max(end - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                started.process.kill()
                started.process.wait()

    def free_slots(self) -> set[int]:
        return self.slots - {started.slot for started in self.started}

    def next_that_fits(self, waiting: Sequence[Run]) -> Run | None:
        left = self.end - time.monotonic()
        for run in waiting:
            needed = self.estimate(run)
            # What is too long for one lease is spread over several.
            if needed <= left or (needed > self.seconds and left > self.seconds / 2):
                return run
        return None

    def estimate(self, run: Run) -> float:
        """Seconds that a run still needs, as others of its model, else the slowest, took."""
        speeds = {}
        for other in self.runs:
            count = sum(lease[other.unit] for lease in other.leases)
            speeds.setdefault(other.family, []).extend([other.seconds / count] if count else [])
        known = speeds[run.family] or [max(times) for times in speeds.values() if times]
        return (run.length - run.done) * max(known, default=0.0)

    def start(self, run: Run, slot: int) -> None:
        """Starts what a run has to do next."""
        run.folder.mkdir(parents=True, exist_ok=True)
        for name, text in run.files.items():
            with replacing(run.folder / name) as file:
                file.write(text)
        device = f"cuda:{slot % self.gpus}" if self.gpus else ""
        threads = str(max(1, usable_cores() // len(self.slots)))
        shares = dict.fromkeys(("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"), threads)
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = {**shares, **os.environ, "PYTHONPATH": path}
        command = run.program.next_command(run, self.data_path, device)
        with (run.folder / "output.txt").open("a") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, env=environment,
                                       preexec_fn=leave_with_parent)  # fmt: skip
        self.started.append(Started(run, process, slot, run.done))
        print(f"{run}: from {run.program.clock} {run.done}", flush=True)

    def collect(self) -> list[tuple[Run, int]]:
        """Notes the processes that have ended; gives the runs, with their slots, that go on."""
        going_on = []
        for started in [s for s in self.started if s.process.poll() is not None]:
            self.started.remove(started)
            run, code = started.run, started.process.returncode
            self.note(started)
            if run.is_finished:
                if not self.keep_checkpoints:
                    run.program.tidy(run)
                print(f"{run}: finished, {run.program.summary(run)}", flush=True)
            elif code in STOPPED:
                print(f"{run}: stopped in {run.program.clock} {run.trained}", flush=True)
            elif code == 0 and run.done > started.done:
                going_on.append((run, started.slot))
            else:
                self.failed.append(run)
                print(f"{run}: ended with {code}, see {run.folder}/output.txt", flush=True)
                if code == REFUSED and not any(other.trained for other in self.runs):
                    lines = (run.folder / "output.txt").read_text("utf-8", "replace").splitlines()
                    raise UserError(f"{run}: {lines[-1] if lines else 'it was refused'}")
        return going_on

    def note(self, started: Started) -> None:
        lease = {
            started.run.unit: max(started.run.trained - started.done, 0),
            "seconds": round(time.monotonic() - started.began, 1),
            "at_once": len(self.slots),
        }
        leases = (*started.run.leases, lease)
        with replacing(started.run.folder / LEASES) as file:
            file.writelines(json.dumps(one) + "\n" for one in leases)
