"""The soak of random kills: that it ends with equal weights, and would notice if not."""

from pathlib import Path

import pytest
import torch
from helpers import assert_ends_with_parent

import checkpoint
from scripts import soak


@pytest.mark.long
@pytest.mark.parametrize("case", soak.CASES)
def test_killed_runs_end_with_equal_weights(case, tmp_path, capsys):
    soak.main([case, "--kills", "2", "--output", str(tmp_path / "runs")])
    assert f"{case}: equal in " in capsys.readouterr().out


def state(value: float) -> dict:
    moments = {0: {"step": torch.tensor(3.0), "exp_avg": torch.tensor([value])}}
    optimizer = {"state": moments, "param_groups": []}
    weights = {"head.weight": torch.tensor([0.5])}
    return {"model": weights, "model_ema": weights, "optimizer": optimizer}


@pytest.mark.parametrize("name", ["model", "model_ema", "optimizer"])
def test_a_single_bit_is_noticed(name, tmp_path):
    whole, run, other = state(1.0), state(1.0), state(1.0)
    if name == "optimizer":
        other = state(1.0 + 2**-23)
    else:
        other[name] = {"head.weight": torch.tensor([0.5 + 2**-24])}
    for folder, saved in (("whole", whole), ("run", run), ("other", other)):
        (tmp_path / folder).mkdir()
        checkpoint.save(saved, tmp_path / folder / "checkpoint.pth")
    soak.require_same(tmp_path / "run", tmp_path / "whole")
    with pytest.raises(AssertionError):
        soak.require_same(tmp_path / "other", tmp_path / "whole")


def test_a_run_that_fails_by_itself_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(soak.PROGRAMS, "images", ("-c", "raise SystemExit(3)"))
    with pytest.raises(RuntimeError, match="failed: see"):
        soak.run_whole("images-1", tmp_path)


def start_run(folder: Path) -> None:
    soak.PROGRAMS["images"] = ("-c", "import time; time.sleep(99)")
    job = soak.Job("images-1", folder, folder / "run")
    (folder / "pid").write_text(str(job.process.pid))
    job.require_end()


def test_a_soak_that_is_killed_leaves_no_run(tmp_path):
    assert_ends_with_parent(start_run, tmp_path)


def test_unknown_case(capsys):
    with pytest.raises(SystemExit) as ended:
        soak.main(["images-3"])
    assert ended.value.code == 2
    assert "choose of images-1, images-2" in capsys.readouterr().err
