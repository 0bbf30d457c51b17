import csv
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts import benchmark
from scripts.benchmark import Case

SCRIPT = Path(benchmark.__file__).resolve()
VIT, LION = "vit_tiny_patch16_224", "lion_tiny_patch16_224"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What a small run printed, and the folder of its files."""
    folder = tmp_path_factory.mktemp("benchmark")
    command = (
        "--device cpu --threads 1 --sizes 32 48 --masks Selective-S --train --chunk-size 4 "
        "--repeats 2 --seconds 1 --output results"
    )
    finished = subprocess.run(
        [sys.executable, SCRIPT, *command.split()],
        cwd=folder, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return finished.stdout, folder / "results"


def rows_of(markdown):
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    header, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    assert all(len(row) == len(header) for row in rows)
    return rows


def test_every_case_is_in_the_table(results):
    printed, folder = results
    assert (folder / "benchmark.md").read_text() == printed
    expected = []
    for step, formats in (("inference", ["Attention", "RNN", "Chunk"]),
                          ("training", ["Attention", "Chunk"])):  # fmt: skip
        for tokens in ("5", "10"):
            expected.append([step, tokens, VIT, "SDPA"])
            expected += [[step, tokens, "LION Selective-S", format] for format in formats]
    assert [row[:4] for row in rows_of(printed)] == expected
    assert "threads: 1" in printed and "--chunk-size 4" in printed
    assert re.search(r"- torch: \d", printed) and re.search(r"- timm: \d", printed)


def test_ratios_are_those_of_the_csv(results):
    printed, folder = results
    with (folder / "benchmark.csv").open(newline="") as file:
        records = list(csv.DictReader(file))
    vits = {(r["step"], r["pixels"]): r for r in records if r["variant"] == "ViT"}
    for row, r in zip(rows_of(printed), records, strict=True):
        vit = vits[r["step"], r["pixels"]]
        assert [row[0], row[1], row[3]] == [r["step"], r["tokens"], r["format"]]
        assert row[4] == f"{float(r['seconds']) * 1e3:.1f}" and float(r["seconds"]) > 0
        assert row[5] == f"{float(r['seconds']) / float(vit['seconds']):.2f}"
        assert row[6] == r["runs"] and 1 <= int(r["runs"]) <= 2
        assert row[7] == f"{int(r['bytes']) / 2**20:.1f}"
        assert row[8] == f"{int(r['bytes']) / (int(vit['bytes']) or math.nan):.2f}"


def make_case(format, tokens, seconds=math.nan, memory=0):
    return Case("inference", 0, tokens, LION, "Lit", format, 32, seconds, 1, memory)


def test_claims():
    cases = [
        make_case("Chunk", 1025, 1.0),
        make_case("Chunk", 4097, 5.1),
        make_case("Attention", 4097, 25.5, memory=400),
        make_case("RNN", 4097, 99.0, memory=90),
    ]
    faster, growth, memory = benchmark.claims(cases).splitlines()
    assert "is 5.0 times faster" in faster and faster.endswith(": met")
    assert "takes 5.10 times" in growth and growth.endswith(": missed")
    assert "is 0.225 of" in memory and memory.endswith(": met")
    assert benchmark.claims(cases[2:3]) == ""


def test_each_round_runs_the_cases_that_have_time_left(monkeypatch):
    slow, fast = make_case("Attention", 4097), make_case("Chunk", 4097)
    ran = []

    def run(case, device, warm_up=False):
        if warm_up:
            return 100.0
        ran.append(case)
        return 8.0 if case is slow else float(ran.count(fast))

    monkeypatch.setattr(benchmark, "run", run)
    benchmark.measure_time([slow, fast], torch.device("cpu"), repeats=3, budget=17)
    assert ran == [slow, fast, slow, fast, fast, fast]
    assert (slow.seconds, slow.runs) == (8, 1)
    assert (fast.seconds, fast.runs) == (3, 3)  # of 1, 2, 3 and 4 without the first


def test_a_case_without_time_runs_once(monkeypatch):
    case = make_case("RNN", 4097)
    monkeypatch.setattr(benchmark, "run", lambda *_, **__: 5.0)
    benchmark.measure_time([case], torch.device("cpu"), repeats=3, budget=0)
    assert (case.seconds, case.runs) == (5, 1)


def test_variants():
    names = dict.fromkeys(benchmark.VARIANTS, LION)
    assert list(names) == ["Lit", "Decay-Normal", "Decay-S", "Selective-Normal", "Selective-S"]
    cases = benchmark.make_cases(["inference"], [32], names, chunk_size=8)
    assert len(cases) == 15 and all(case.tokens == 5 for case in cases)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--sizes 40", "error: a size must be a multiple of 16 pixels, not 40"),
        ("--chunk-size 0", "error: sizes, chunk size, threads and repeats must be at least 1"),
        ("--model deit_tiny", "error: deit_tiny is not a model of models_lion"),
        ("--vit resnet18", "error: resnet18 is not a model of vision_transformer"),
        ("--device nonsense", "error: .*nonsense.*"),
        ("--output {file}", "error: .*File exists.*"),
    ],
)
def test_bad_input(tmp_path, capsys, arguments, message):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(arguments.format(file=file).split())
    assert stopped.value.code == 2
    assert re.fullmatch(f"{message}\n", capsys.readouterr().err)
