"""The benchmark of the language models: a row for each case, and what is told of bad input."""

import re
from dataclasses import replace

import pytest
import torch
from helpers import ROOT

from mlm import benchmark

CONFIGS = [str(ROOT / "mlm" / "configs" / f"{name}-base.yaml")
           for name in ("bert", "lion-lit", "lion-d", "lion-s", "hydra")]  # fmt: skip
SMALL = ["model.hidden_size=16", "model.num_hidden_layers=1", "model.num_attention_heads=2",
         "model.intermediate_size=16", "model.vocab_size=50", "model.format=Chunk",
         "device=cpu"]  # fmt: skip


def test_table(ending):
    sizes = ("--lengths", "32", "600", "--tokens", "64", "--seconds", "0.02")
    ended = ending(benchmark.main, [*CONFIGS, *SMALL, *sizes])
    assert ended.code == 0, ended.err
    assert ended.out.startswith("device: CPU; torch: ")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]]
            for line in ended.out.splitlines() if line.startswith("|")]  # fmt: skip
    assert rows[0][3:] == ["tokens/s", "/ bert-base", "peak GiB"]
    names = [f"{name}-base" for name in ("bert", "lion-lit", "lion-d", "lion-s", "hydra")]
    assert [row[:3] for row in rows[2:]] == [
        *(["32", "2", name] for name in names),
        *(["600", "1", name] for name in names),
    ]
    for row in rows[2:]:
        speed, share, memory = (float(cell.replace(",", "")) for cell in row[3:])
        assert speed > 0 and share > 0 and 0 <= memory < 4
    assert rows[2][4] == rows[7][4] == "1.00"


def test_a_case_that_fails_is_a_row(monkeypatch):
    (case,) = benchmark.make_cases(CONFIGS[:1], SMALL, [8], 8)
    for error, reason in (
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (RuntimeError("No available kernel.\nAborting"), "No available kernel."),
    ):
        monkeypatch.setattr(benchmark, "_training", lambda *_, e=error: (_ for _ in ()).throw(e))
        failed = benchmark.measure(case, 1, threads=1)
        assert benchmark.row(failed, [failed]) == f"| 8 | 1 | bert-base | {reason} | |  |"


def test_attention_of_one_backend():
    (case,) = benchmark.make_cases(CONFIGS[:1], SMALL, [8], 8)
    measured = benchmark.measure(replace(case, backend="MATH"), 0.01, threads=1)
    assert measured.speed > 0 and not measured.failure


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.yaml"], "cannot read the settings absent.yaml: No such"),
        (["model.mixer=lion-s"], "Give a config, and at least 1 token"),
        ([CONFIGS[0], "model.mixr=lion-s"], "Unknown key 'mixr' in the section model"),
        ([CONFIGS[0], "--tokens", "0"], "at least 1 token, thread and length"),
    ],
    ids=str,
)
def test_bad_input(arguments, message, ending):
    ended = ending(benchmark.main, arguments)
    assert ended.code == 2
    assert re.match(f"mlm.benchmark: error: .*{message}", ended.err.splitlines()[-1]), ended.err
