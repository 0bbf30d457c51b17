"""The processes of a run: ranks and devices, agreement between them, and signals to stop."""

import os
import pickle
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from errors import UserError, first_line

POLL = 0.02  # seconds between two looks for what others have set
PATIENCE = 10.0  # seconds for the others to end, once a process has failed
MEETING = 1800.0  # seconds in which all processes have to start
LAUNCHED = 30.0  # seconds to find a launcher's store, which is there before it starts processes
CPU = torch.device("cpu")


class PeerFailed(Exception):
    """Another process has failed, and tells why."""


class Peers:
    """What the processes of a run tell each other through a store.

    Unlike a collective operation of NCCL or gloo, it needs no device and does not wait for a
    process that has failed.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: dist.Store | None = None) -> None:
        self.rank, self.size = rank, size
        self.store: Any = store  # torch declares text alone, but takes bytes, too
        self._rounds = 0
        self._ended = threading.Event()

    def gather(self, value: Any) -> list[Any]:
        """`value`, which can be pickled, of every process, by rank.

        Raises PeerFailed once another process has failed.
        """
        if self.size == 1:
            return [value]
        self._rounds += 1
        self.store.set(f"round {self._rounds}/{self.rank}", pickle.dumps(value))
        keys = self._keys(f"round {self._rounds}")
        self._wait_for(keys)
        if self._rounds > 1:  # which all have read, as they have come to this one
            self.store.delete_key(f"round {self._rounds - 1}/{self.rank}")
        return [pickle.loads(self.store.get(key)) for key in keys]

    def agree(self, facts: dict[str, Any], remedy: str) -> None:
        """Raises UserError, on all processes, if they do not have the same `facts`."""
        everywhere = self.gather((socket.gethostname(), facts))
        names = dict.fromkeys(name for _, theirs in everywhere for name in theirs)
        differing = []
        for name in names:
            ranks = defaultdict(list)
            for rank, (host, theirs) in enumerate(everywhere):
                ranks[str(theirs.get(name))].append(f"rank {rank} on {host}")
            if len(ranks) > 1:
                sides = "; ".join(f"{_listed(who)}: {value}" for value, who in ranks.items())
                differing.append(f"{name} ({sides})")
        if differing:
            raise UserError(f"The processes differ in {', '.join(differing)}: {remedy}.")

    def fail(self, code: int) -> None:
        """Tells the others that this process ends with `code`, for an error of its own."""
        if self.size > 1:
            self.store.set("failed", str(code))

    def failure(self) -> int | None:
        """The exit code of a process that has failed, None if there is none."""
        if self.size > 1 and self.store.check(["failed"]):
            return int(self.store.get("failed"))
        return None

    def settle(self, problem: str = "") -> bool:
        """Waits until all are ready. With a `problem`, tells whether the main process has the same.

        Raises PeerFailed if another process has one.
        """
        if self.size == 1:
            return True
        if problem:
            self.fail(2)
        self.store.set(f"verdict/{self.rank}", problem)
        keys = self._keys("verdict")
        if problem:
            _until(lambda: self.store.check(keys[:1]), PATIENCE)
            return self.store.check(keys[:1]) and self.store.get(keys[0]).decode() == problem
        self._wait_for(keys)
        if self.failure() is not None:
            raise PeerFailed
        return True

    @contextmanager
    def together(self, command: str) -> Iterator[None]:
        """All processes end within seconds once one fails in the block, which tells its error."""
        if self.size == 1:
            yield
            return
        threading.Thread(target=self._end_with_others, daemon=True).start()
        try:
            yield
        except Exception as error:
            code = self.failure()  # else the error is but the lost connection to that process
            if code is None:
                code = 1
                self.fail(code)
                traceback.print_exc()
                print(f"{command}: error: {self}: {error!r}", file=sys.stderr, flush=True)
            sys.exit(code)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            self._leave()
            self._ended.set()

    def __str__(self) -> str:
        return f"rank {self.rank} on {socket.gethostname()}"

    def _wait_for(self, keys: list[str]) -> None:
        """Raises PeerFailed if a key will never be there because its process has failed."""
        while True:
            # Read first: a process may fail just after it has set its key, and the keys then count.
            failed = self.failure() is not None
            if self.store.check(keys):
                return
            if failed:
                self.store.set(f"verdict/{self.rank}", "")
                raise PeerFailed
            time.sleep(POLL)

    def _keys(self, name: str) -> list[str]:
        return [f"{name}/{rank}" for rank in range(self.size)]

    def _end_with_others(self) -> None:
        """Ends a process that hangs, in a collective operation say, when another has failed.

        Also one whose launcher was killed, which would write where the next start does.
        """
        while not self._ended.wait(0.5):
            try:
                code = self.failure()
            except RuntimeError:
                print(
                    f"{self}: the launcher was killed, or the main process, which had no launcher.",
                    file=sys.stderr,
                )
                os._exit(1)
            if code is not None and not self._ended.wait(PATIENCE):
                os._exit(code)

    def _leave(self) -> None:
        """The main process, which may hold the store, is the last to leave."""
        try:
            self.store.set(f"left/{self.rank}", "")
            if self.rank == 0:
                seconds = PATIENCE if self.failure() is None else 1
                _until(lambda: self.store.check(self._keys("left")), seconds)
        except RuntimeError:
            return


def _until(happened: Callable[[], bool], seconds: float = float("inf")) -> bool:
    """Whether it happened within that time."""
    end = time.monotonic() + seconds
    while not (done := happened()) and time.monotonic() < end:
        time.sleep(POLL)
    return done


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


@dataclass(frozen=True)
class World:
    """The processes of a run: this one's rank, their number, and the device it works on."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU
    peers: Peers = field(default_factory=Peers)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def reduce(self, values: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """`values` reduced over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values, op)
        return values

    def gather(self, value: object) -> list:
        """`value` of every process, by rank."""
        return self.peers.gather(value)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process runs the block first, then one of every node, then the others.

        So what is downloaded is there for the rest of the node, whether nodes share a disk or not.
        """
        turn = 0 if self.is_main else 1 if os.environ.get("LOCAL_RANK") == "0" else 2
        for _ in range(turn):
            self.peers.gather(None)
        yield
        for _ in range(turn, 2):
            self.peers.gather(None)

    def distributed(self, model: nn.Module) -> nn.Module:
        """`model` with the mean of all processes' gradients.

        DistributedDataParallel arranges the gradients anew in its second step, which changes how
        sums over more than two processes are rounded. A backward pass before the first step, of
        all parameters in their order, leaves nothing to arrange: a resumed run rounds alike.
        """
        if self.size == 1:
            return model
        parameters = [p for p in model.parameters() if p.requires_grad]
        # Whole numbers, such as curves, stay alike; statistics of batches have to be made so.
        differ = any(buffer.is_floating_point() for buffer in model.buffers())
        # Without device_ids, which would want inputs.
        wrapped = DistributedDataParallel(model, broadcast_buffers=differ)
        model.forward = lambda: sum(p.sum() for p in parameters)
        wrapped().backward()
        del model.forward
        model.zero_grad(set_to_none=True)
        return wrapped


LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


def launched_as() -> tuple[int, int]:
    """This process's rank and the number of processes, as torchrun tells them; 0 and 1 without it.

    Raises UserError if some of its variables are set and others are not, as when a shell still has
    those of another job, or if they do not name one of the processes.
    """
    found = {name: os.environ[name] for name in LAUNCHER if name in os.environ}
    if not found:
        return 0, 1
    missing = [name for name in LAUNCHER if name not in found]
    if missing:
        raise UserError(
            f"The environment has {' and '.join(found)}, but not {' and '.join(missing)}: start "
            f"with torchrun, which sets all, or unset {' '.join(found)}."
        )
    try:
        rank, size, local = (int(found[name]) for name in LAUNCHER)
    except ValueError:
        rank = size = local = -1
    if not 0 <= local <= rank < size:
        given = ", ".join(f"{name}={value}" for name, value in found.items())
        raise UserError(f"{given} in the environment name no process: start with torchrun.")
    return rank, size


def meet(dist_url: str = "env://") -> Peers:
    """Meets the processes that torchrun started.

    Raises UserError if its variables are incomplete, or if the processes do not find each other.
    """
    rank, size = launched_as()
    if size == 1:
        return Peers(rank, size)
    has_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    limit = timedelta(seconds=LAUNCHED if has_launcher else MEETING)
    try:
        store, _, _ = next(dist.rendezvous(dist_url, rank, size, timeout=limit))
        store.set_timeout(timedelta(seconds=MEETING))
        return Peers(rank, size, dist.PrefixStore(_attempt(store, rank, size), store))
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"Rank {rank} on {socket.gethostname()} cannot meet the others at --dist_url "
            f"{dist_url} ({first_line(error)}): use env:// with torchrun."
        ) from error


def _attempt(store: dist.Store, rank: int, size: int) -> str:
    """A name, the same on all processes, for this start of them.

    A launcher that starts them again keeps the store, in which the first start left its keys. The
    number of the restart would not do: each node counts its own.
    """
    store.set(f"start/{rank}", own := uuid.uuid4().hex)
    starts = [f"start/{r}" for r in range(size)]

    def called() -> list[str]:
        return store.get("starts").decode().split() if store.check(["starts"]) else []

    def complete() -> bool:
        if rank == 0 and store.check(starts):
            store.set("starts", " ".join(store.get(key).decode() for key in starts))
        names = called()
        if names[rank : rank + 1] != [own]:
            return False
        store.set(f"{names[0]}/here/{rank}", "")
        return rank > 0 or store.check([f"{own}/here/{r}" for r in range(size)])

    if not _until(complete, MEETING):
        raise RuntimeError(f"not all came in {MEETING / 60:.0f} minutes")
    return called()[0]


def init_distributed(device: str = "auto", peers: Peers | None = None) -> World:
    """The processes of a run, or `peers`, over NCCL on GPUs and gloo on CPUs.

    `device` is `auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:N`. Raises UserError if it
    is not there.
    """
    peers = peers or meet()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device} needs a CUDA GPU and none was found: use --device cpu.")
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        world = World(peers.rank, peers.size, torch.device(device), peers)
        if world.device.type == "cuda":
            torch.cuda.set_device(world.device)
    except RuntimeError as error:
        raise UserError(
            f"There is no device {device!r}: use --device auto, cpu, cuda or cuda:N."
        ) from error
    if world.device.type not in ("cpu", "cuda"):
        raise UserError(f"{device!r} is not supported: use --device auto, cpu, cuda or cuda:N.")
    if world.size > 1:
        peers.gather(None)  # all have found their devices
        cuda = world.device.type == "cuda"
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=dist.PrefixStore("group", peers.store),
            rank=world.rank,
            world_size=world.size,
            device_id=world.device if cuda else None,
        )
    return world


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class StopSignal:
    """Remembers the first of `STOP_SIGNALS`, so that a run can save before it leaves.

    Slurm can be asked to send SIGUSR1 or SIGUSR2 before a time limit. SIGHUP comes when a terminal
    closes; under nohup it is ignored, and stays so.

    Asking it installs its handlers again: Triton's compiler replaces them by LLVM's, which remove
    themselves after one signal, so that a second one, as launchers send it, would kill the process.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        self.numbers = [n for n in STOP_SIGNALS if not (nohup and n is signal.SIGHUP)]
        self._listen()

    def __bool__(self) -> bool:
        if self.received is None:
            self._listen()
        return self.received is not None

    @property
    def exit_code(self) -> int:
        """What a shell reports of a process that the signal ended."""
        return 128 + (self.received or signal.SIGTERM)

    def _listen(self) -> None:
        for number in self.numbers:
            signal.signal(number, self._remember)

    def _remember(self, number: int, _frame: object) -> None:
        self.received = self.received or signal.Signals(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C ends at once


class Interrupted(Exception):
    """A run was asked to stop, and stands where it can be saved."""
