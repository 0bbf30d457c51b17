"""What ranks tell each other: which start they are of, an error of one alone, what differs."""

import itertools
import os
import re
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import (
    ROOT,
    TINY,
    Ranks,
    call_main,
    free_port,
    is_running,
    rendezvous,
    same,
    torchrun,
    wait_for,
)
from test_mlm_pretrain import short

import checkpoint
import processes
from commands import run_command
from errors import UserError
from mlm import pretrain
from processes import Peers, World, init_distributed, meet

HOST = re.escape(socket.gethostname())


def on_threads(function, size: int = 2) -> list:
    """What `function(rank)` returns on every rank of a process."""
    results = [None] * size

    def call(rank: int) -> None:
        results[rank] = function(rank)

    threads = [threading.Thread(target=call, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
        time.sleep(0.1)  # so that the first could take what it finds
    for thread in threads:
        thread.join(20)
    return results


def test_a_second_start_has_a_name_of_its_own():
    store = dist.HashStore()
    names = [on_threads(lambda rank: processes._attempt(store, rank, 2)) for _ in range(3)]
    names += [on_threads(lambda rank: processes._attempt(store, 1 - rank, 2))]
    assert all(len(set(pair)) == 1 and pair[0] for pair in names)
    assert len({name for name, _ in names}) == len(names)


def test_gathered_values_are_not_kept():
    store = dist.HashStore()

    def gather(rank: int) -> list[list]:
        peers = Peers(rank, 2, store)
        return [peers.gather((rank, number)) for number in range(5)]

    expected = [[(0, number), (1, number)] for number in range(5)]
    assert on_threads(gather) == [expected, expected]
    assert store.num_keys() == 2


class Watched:
    """A store in which another process acts between two looks at it."""

    def __init__(self, store: dist.Store, looks: int, act) -> None:
        self.store, self.looks, self.act = store, looks, act

    def check(self, keys: list[str]) -> bool:
        found = self.store.check(keys)
        self.looks -= 1
        if self.looks == 0:
            self.act()
        return found

    def __getattr__(self, name: str):
        return getattr(self.store, name)


@pytest.mark.parametrize("looks", [1, 2, 3])
def test_a_value_that_was_told_before_a_failure_counts(looks):
    store = dist.HashStore()
    other = Peers(1, 2, store)
    act = lambda: (other.gather("theirs"), other.fail(2))  # noqa: E731
    assert Peers(0, 2, Watched(store, looks, act)).gather("ours") == ["ours", "theirs"]


# Errors of one rank alone


def failing(rank: int, folder: Path, where: str, meanwhile: str) -> None:
    """Rank 1 fails in a phase of a command, and rank 0 is somewhere `meanwhile`."""
    # Only a process that looks at nothing has to be waited for.
    processes.PATIENCE = 1.5 if meanwhile in ("build", "work") else 100

    def at(place: str, peers: Peers) -> None:
        if rank == 1 and where.startswith(place):
            kinds = {"build": UserError, "work": ValueError, "work, finite": FloatingPointError}
            raise kinds[where]("this one alone")
        if rank == 0 and place == meanwhile:
            time.sleep(100)  # as in a collective operation of NCCL

    def build(peers: Peers):
        at("build", peers)
        if meanwhile == "gather":
            peers.gather(None)
        init_distributed("cpu", peers)

        def work() -> None:
            at("work", peers)
            dist.barrier()

        return work

    run_command("command", build, rendezvous(folder))


@pytest.mark.parametrize("meanwhile", ["build", "gather", "settled"])
def test_a_users_error_of_one_rank_ends_all(meanwhile, tmp_path):
    ranks = Ranks(tmp_path, "build", meanwhile, function=failing)
    assert ranks.wait() == [2, 2], ranks.errors(1)
    assert ranks.errors(0) == ""
    assert re.fullmatch(rf"command: error: rank 1 on {HOST}: this one alone\n", ranks.errors(1))


@pytest.mark.parametrize("meanwhile", ["work", "barrier"])
def test_an_error_of_one_rank_in_its_work_ends_all(meanwhile, tmp_path):
    ranks = Ranks(tmp_path, "work", meanwhile, function=failing)
    assert ranks.wait() == [1, 1], ranks.errors(1)
    assert ranks.errors(0) == ""
    assert ranks.errors(1).startswith("Traceback")
    last = ranks.errors(1).splitlines()[-1]
    assert re.fullmatch(rf"command: error: rank 1 on {HOST}: ValueError\('this one alone'\)", last)


def test_what_one_rank_finds_not_finite_ends_all(tmp_path):
    ranks = Ranks(tmp_path, "work, finite", "work", function=failing)
    assert ranks.wait() == [1, 1], ranks.errors(1)
    assert ranks.errors(1) == "command: error: this one alone\n"


def without_data(rank: int, folder: Path, command: str, data: Path) -> None:
    path = "absent" if rank else data
    if command == "mlm.pretrain":
        short(path, folder / "run", dist_url=rendezvous(folder))
    else:
        call_main(*TINY, "--data-path", path, "--dist_url", rendezvous(folder))


@pytest.mark.parametrize("command", ["main.py", "mlm.pretrain"])
def test_data_that_one_rank_lacks(command, data_path, corpus, tmp_path):
    data = corpus if command == "mlm.pretrain" else data_path
    ranks = Ranks(tmp_path, command, data, function=without_data)
    assert ranks.wait() == [2, 2], ranks.errors(1)
    assert ranks.errors(0) == ""
    reason = "The data folder absent does not exist|no tokeniser in absent"
    assert re.match(rf"{command}: error: rank 1 on {HOST}: .*({reason})", ranks.errors(1))


def waiting(rank: int, folder: Path, port: int) -> None:
    def build(peers: Peers):
        return lambda: ((folder / f"works{rank}").touch(), time.sleep(100))

    run_command("command", build, f"tcp://127.0.0.1:{port}")


def test_ranks_end_when_the_process_is_killed_that_holds_them_together(tmp_path):
    ranks = Ranks(tmp_path, free_port(), function=waiting)
    wait_for(lambda: all((ranks.folder / f"works{rank}").exists() for rank in (0, 1)))
    ranks.processes[0].kill()
    assert ranks.wait(30) == [-signal.SIGKILL, 1]
    assert re.search(rf"\nrank 1 on {HOST}: the launcher was killed", ranks.errors(1))


WAITING = f"""
import os, sys, time
from pathlib import Path

sys.path.insert(0, {str(ROOT)!r})
from commands import run_command


def build(peers):
    return lambda: (Path(f"works{{peers.rank}}").write_text(str(os.getpid())), time.sleep(100))


run_command("command", build)
"""


@pytest.mark.slow
def test_ranks_end_when_torchrun_is_killed(tmp_path):
    script, output = tmp_path / "waiting.py", tmp_path / "output"
    script.write_text(WAITING)
    command = torchrun("torch.distributed.run", script)
    works = [tmp_path / f"works{rank}" for rank in (0, 1)]
    with (
        output.open("w") as file,
        subprocess.Popen(command, cwd=tmp_path, stdout=file, stderr=file) as launcher,
    ):
        wait_for(lambda: all(path.exists() and path.read_text() for path in works))
        launcher.kill()
    ranks = [int(path.read_text()) for path in works]
    try:
        wait_for(lambda: not any(map(is_running, ranks)), 30)
    finally:
        for rank in filter(is_running, ranks):
            os.kill(rank, signal.SIGKILL)
    for rank in (0, 1):
        assert f"rank {rank} on {socket.gethostname()}: the launcher was" in output.read_text()


def test_a_process_does_not_wait_long_for_a_launcher_that_is_gone(monkeypatch):
    monkeypatch.setattr(processes, "LAUNCHED", 0.5)
    monkeypatch.setattr(processes, "MEETING", 20)
    variables = {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": free_port(), "TORCHELASTIC_USE_AGENT_STORE": True}  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    began = time.monotonic()
    with pytest.raises(ValueError, match="cannot meet the others"):
        processes.meet()
    assert time.monotonic() - began < 10


def ended(rank: int, folder: Path, ending: str) -> None:
    def build(peers: Peers):
        init_distributed("cpu", peers)

        def work() -> None:
            match ending:
                case "stop":
                    raise SystemExit(143)
                case "not finite":
                    raise FloatingPointError
                case "error":
                    raise RuntimeError

        return work

    try:
        run_command("command", build, rendezvous(folder))
    finally:
        assert not dist.is_initialized()
        (folder / f"left{rank}").touch()


@pytest.mark.parametrize("ending", ["end", "stop", "not finite", "error"])
def test_the_group_of_processes_is_left_whichever_way(ending, tmp_path):
    ranks = Ranks(tmp_path, ending, function=ended)
    ranks.wait()
    assert all((ranks.folder / f"left{rank}").exists() for rank in (0, 1)), ranks.errors()


def full_disk_on_one(rank: int, folder: Path) -> None:
    def work() -> None:
        if rank == 0:
            raise UserError("cannot write log.txt")
        time.sleep(60)  # as in a collective operation

    run_command("command", lambda _: work, rendezvous(folder))


def test_a_users_error_of_one_rank_in_its_work_is_a_sentence(tmp_path):
    ranks = Ranks(tmp_path, function=full_disk_on_one)
    assert ranks.wait(30) == [2, 2]
    told = f"command: error: rank 0 on {socket.gethostname()}: cannot write log.txt\n"
    assert (ranks.errors(0), ranks.errors(1)) == (told, "")


def not_finite_on_one(rank: int, folder: Path, corpus: Path) -> None:
    forward = pretrain.LionBertForMaskedLM.forward
    calls = itertools.count()

    def broken(*args, **kwargs):
        result = forward(*args, **kwargs)
        if rank == 1 and next(calls) == 5:
            result.loss = result.loss + float("nan")  # its gradient is finite
        return result

    pretrain.LionBertForMaskedLM.forward = broken
    settings = {"save_every": 1, "eval_every": 100, "steps": 100}
    short(corpus, folder / "run", dist_url=rendezvous(folder), **settings)


def test_a_pretraining_loss_that_is_not_finite_on_one_rank_ends_both(corpus, tmp_path):
    ranks = Ranks(tmp_path, corpus, function=not_finite_on_one)
    assert ranks.wait() == [1, 1], ranks.errors(1)
    for number in (0, 1):
        assert f"not finite (step 5, rank {number}, " in ranks.errors(number)
    saved = checkpoint.load(ranks.folder / "run" / "checkpoint.pth")
    assert 0 < saved["step"] < 6
    assert all(tensor.isfinite().all() for tensor in saved["model"].values())


# One after the other


def in_turns(rank: int, folder: Path) -> None:
    """Two nodes of two processes each."""
    world = World(rank, 4, torch.device("cpu"), meet(rendezvous(folder)))
    os.environ["LOCAL_RANK"] = str(rank % 2)
    with world.main_first():
        time.sleep(0.1 if rank % 2 == 0 else 0)
        with (folder / "order").open("a") as order:
            order.write(f"{rank} ")


def test_the_main_process_is_first_and_then_one_of_each_node(tmp_path):
    ranks = Ranks(tmp_path, size=4, function=in_turns)
    assert ranks.wait() == [0] * 4, ranks.errors()
    assert (ranks.folder / "order").read_text() in ("0 2 1 3 ", "0 2 3 1 ")


# Sums over processes


def stepping(rank: int, folder: Path) -> None:
    """The weights of two runs of four steps, one of which is wrapped anew in the middle."""
    world = init_distributed("cpu", meet(rendezvous(folder)))
    runs = []
    for parts in ([4], [2, 2]):
        torch.manual_seed(0)
        layers = [torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU()) for _ in range(4)]
        model = torch.nn.Sequential(*layers)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for steps in parts:
            wrapped = world.distributed(model)
            assert all(p.grad is None for p in model.parameters())
            for _ in range(steps):
                samples = torch.randn(8, 64) + rank
                wrapped(samples).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        runs.append(model.state_dict())
    torch.save(runs, folder / f"runs{rank}.pth")


def test_a_new_start_rounds_sums_over_three_ranks_alike(tmp_path):
    ranks = Ranks(tmp_path, size=3, function=stepping)
    assert ranks.wait() == [0, 0, 0], ranks.errors()
    runs = [torch.load(ranks.folder / f"runs{rank}.pth") for rank in range(3)]
    assert same(runs[0], runs[1])
    assert same(runs[0], runs[2])
    assert same(*runs[0])


@pytest.mark.parametrize(
    ("layer", "sent"), [(torch.nn.BatchNorm1d(3), True), (torch.nn.Linear(3, 3), False)]
)
def test_buffers_are_sent_where_batches_change_them(layer, sent, monkeypatch):
    layer.register_buffer("curves", torch.arange(3))
    made = []

    def wrap(model, **options):
        made.append(options)
        return model

    monkeypatch.setattr(processes, "DistributedDataParallel", wrap)
    World(size=2).distributed(layer)
    assert made == [{"broadcast_buffers": sent}]
