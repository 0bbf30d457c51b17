"""What a run tells of its pace: throughput, the share that waits for data, and the time left."""

import logging
import re
from types import SimpleNamespace

import pytest

import journal
from journal import Progress


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """`clock.now`, in seconds, is what the time seems to be."""
    clock = SimpleNamespace(now=1000.0)
    fake = SimpleNamespace(perf_counter=lambda: clock.now)
    monkeypatch.setattr(journal, "time", fake)
    return clock


@pytest.fixture
def told(caplog):
    """The fields of the last line."""
    caplog.set_level(logging.INFO)
    pattern = (
        r".*eta: (?P<eta>[^ ]+)(?: \(run (?P<run>[^)]*)\))?  .*"
        r"img/s: (?P<last>\S+) \(mean (?P<mean>\S+)\)  data: (?P<data>\S+)%"
    )
    return lambda: re.fullmatch(pattern, caplog.messages[-1]).groupdict()


def slow_loader(clock, seconds: float, count: int):
    for number in range(count):
        clock.now += seconds
        yield number


def advance(progress, clock, batches, steps, seconds: float) -> None:
    for step in steps:
        next(batches)
        clock.now += seconds
        progress.update(step, loss=1.0)


def test_an_interval_is_told_beside_the_mean(clock, told):
    progress = Progress("Epoch: [0]", 40, 8, interval=10, show=False, steps_after=60)
    batches = progress.waiting_for(slow_loader(clock, 1, 40))
    advance(progress, clock, batches, range(11), 3)
    assert told() == {"eta": "0:01:56", "run": "0:05:56", "last": "2.0", "mean": "2.0",
                      "data": "25"}  # fmt: skip
    advance(progress, clock, batches, range(11, 21), 0)  # after 44 s, and 54 s now
    line = told()
    assert (line["last"], line["data"]) == ("8.0", "100")
    assert float(line["mean"]) == pytest.approx(21 * 8 / 54, abs=0.05)
    assert line["eta"] == f"0:00:{int(19 * 54 / 21)}"
    assert line["run"] == f"0:03:{int(79 * 54 / 21) - 180:02}"


def test_a_bar_of_the_whole_run_has_one_time_left(clock, told):
    progress = Progress("Step:", 20, 8, interval=10, show=False)
    advance(progress, clock, progress.waiting_for(range(20)), range(11), 2)
    assert told()["run"] is None
    assert told()["data"] == "0"


def test_laps_and_pauses(clock):
    progress = Progress("Step:", 40, 8, interval=10, show=False)
    batches = progress.waiting_for(slow_loader(clock, 1, 40))
    advance(progress, clock, batches, range(11), 3)
    with progress.paused():
        clock.now += 1000
    first = progress.lap(11, "tokens")
    assert first == {"tokens_per_second": 2.0, "tokens_per_second_last": 2.0, "data_share": 0.25,
                     "hours_left": 29 * 4 / 3600}  # fmt: skip
    advance(progress, clock, batches, range(11, 21), 1)
    second = progress.lap(21, "tokens")
    assert second["tokens_per_second"] == second["tokens_per_second_last"] == 4.0
    assert second["data_share"] == 0.5


def test_a_lap_without_steps_has_no_time_left(clock):
    progress = Progress("Step:", 40, 8, start=3, interval=10, show=False)
    clock.now += 1
    lap = progress.lap(3, "images")
    assert lap["images_per_second"] == 0
    assert "hours_left" not in lap
