"""The paper's table and memory against resolution, on small images and a CPU."""

import csv
import math
import re
import subprocess
import sys

import pytest
import torch
from helpers import ROOT

from scripts import comparison, memory_vs_resolution, paper_table

CPU = torch.device("cpu")


def called(script, folder, options):
    """What a script printed on a CPU, and its rows."""
    common = ("--device", "cpu", "--size", "tiny", "--batch-size", "1", "--output", folder)
    command = [sys.executable, ROOT / "scripts" / f"{script}.py", *common, *options.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (folder / f"{script}.md").read_text() == done.stdout
    assert (folder / f"{script}.png").stat().st_size > 10_000
    with (folder / f"{script}.csv").open(newline="") as file:
        return done.stdout, list(csv.DictReader(file))


def cells(markdown):
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_paper_table(tmp_path):
    options = "--image-size 32 --repeats 1 --models Hydra LION-S♮ DeiT"
    printed, rows = called("paper_table", tmp_path, options)
    assert "Models: tiny, 32 px, batch size 1, float32, median of 1 rounds." in printed
    header, _, *table = cells(printed)
    assert all(len(line) == len(header) == 10 for line in table)
    fastest = header[5].removeprefix("/ ViT, ")
    assert re.search(rf"ViT's training step, ms: .*{fastest} \d", printed)
    softmax = ["explicit softmax", fastest]
    expected = [*(["ViT", a] for a in softmax), *(["DeiT", a] for a in softmax)]
    assert [line[:2] for line in table] == [*expected, ["Hydra", ""], ["LION-S♮", ""]]
    explicit, sdpa = (float(row["step"]) for row in rows[:2])
    for line, row in zip(table, rows, strict=True):
        step = float(row["step"])
        assert line[3:6] == [f"{step * 1e3:.1f}", f"{step / explicit:.2f}", f"{step / sdpa:.2f}"]
        assert float(line[6]) > 0 and line[7] == f"{int(row['bytes']) / 2**20:,.0f}"
        assert int(row["bytes"]) >= 4 * int(row["parameters"]), "the weights count"
    assert [line[8:] for line in table[2:]] == [["1", "72.2"]] * 2 + [["", ""], ["3.83", "73.5"]]
    assert [line[2] for line in table[-2:]] == ["7,267,456", "5,693,488"]


@pytest.mark.slow
def test_memory_vs_resolution(tmp_path):
    options = "--sizes 64 32 --repeats 1 --lion LION-D --chunk-size 4 --seconds 100"
    printed, rows = called("memory_vs_resolution", tmp_path, options)
    labels = ["ViT, SDPA", "ViT, explicit softmax", "Hydra", "Vim",
              *(f"LION-D, {format}" for format in ("Attention", "RNN", "Chunk"))]  # fmt: skip
    lines = cells(printed)
    memory, times = lines[: len(labels) + 6], lines[len(labels) + 6 :]
    for line, unit in (memory, "GB"), (times, "ms"):
        assert line[0] == [unit, "32 px", "64 px"]
        assert [cells[0] for cells in line[2 : 2 + len(labels)]] == labels
    assert all(line[0].startswith("paper, base") for line in memory[2 + len(labels) :])
    assert [(row["pixels"], row["tokens"], row["runs"]) for row in rows] == [
        ("32", "5", "1"), ("64", "17", "1"),
    ] * len(labels)  # fmt: skip
    assert times[2][2] == f"{float(rows[1]['seconds']) * 1e3:,.2f}"


def test_the_papers_memory_is_beside_its_resolutions():
    setting = memory_vs_resolution.parse(["--device", "cpu", "--sizes", "1248", "2496", "64"])
    cases = [memory_vs_resolution.Case("Vim", "", pixels, bytes=5 * 10**8) for pixels in (64, 1248)]
    cases += [memory_vs_resolution.Case("Vim", "", 2496, note="out of memory")]
    lines = cells(memory_vs_resolution.table(cases, "bytes", setting))
    assert lines[2] == ["Vim", "0.50", "0.50", "out of memory"]
    assert lines[-1][1:] == ["", "12.3", "49.0"]


def test_larger_images_are_not_run_without_memory_or_time(monkeypatch):
    options = "--device cpu --batch-size 1 --repeats 3 --seconds 1 --sizes"
    setting = memory_vs_resolution.parse([*options.split(), "32", "48", "64"])
    model = comparison.build("ViT", "tiny", 32)

    def swept(*taken):
        remaining = iter(taken)

        def seconds(*_):
            now = next(remaining)
            if now is None:
                raise RuntimeError("too many elements")
            return now

        monkeypatch.setattr(memory_vs_resolution, "seconds", seconds)
        cases = [memory_vs_resolution.Case("ViT", "", pixels) for pixels in setting.sizes]
        memory_vs_resolution.sweep(cases, model, setting)
        assert next(remaining, None) is None
        return [(case.runs, case.note) for case in cases]

    nan, late = math.nan, (0, "longer than 1 s")
    assert swept(9.0, 0.1, 0.2, 0.3, 0.5, 0.6) == [(3, ""), (1, ""), late]
    assert swept(0.1, 0.2, 0.3, 0.3, nan)[1:] == [(0, "out of memory")] * 2
    assert swept(9.0, 3.0) == [(1, ""), late, late]
    assert swept(None) == [(0, "an operation fails")] * 3


def test_no_time_without_memory():
    def too_large():
        raise torch.OutOfMemoryError

    assert math.isnan(comparison.seconds(too_large, CPU))
    cases = [
        paper_table.Case("ViT", a, step=s) for a, s in (("explicit softmax", 2.0), ("SDPA", 1.0))
    ]
    cases += [paper_table.Case("Hydra", ""), paper_table.Case("Vim", "", step=3.0)]
    rows = cells(paper_table.table(cases, "base"))
    assert rows[4][3:6] == ["out of memory", "", ""] and rows[5][3:6] == ["3000.0", "1.50", "3.00"]


def test_rounds_take_turns_and_leave_out_what_has_no_memory(monkeypatch):
    order = []

    def seconds(run, _):
        order.append(run)
        return {"small": float(len(order)), "large": math.nan}[run]

    monkeypatch.setattr(paper_table, "seconds", seconds)
    setting = paper_table.parse(["--device", "cpu", "--repeats", "2"])[0]
    times = paper_table.medians(["large", "small"], setting, "")
    assert order == ["large", *["small"] * 5]
    assert math.isnan(times[0]) and times[1] == 5.5  # of rounds 4 and 5


def test_softmax_is_written_out_where_asked():
    fused = {
        attention: [m.fused_attn for m in comparison.build("DeiT", "tiny", 32, attention).modules()
                    if hasattr(m, "fused_attn")]
        for attention in ("explicit softmax", "SDPA math")
    }  # fmt: skip
    assert fused == {"explicit softmax": [False] * 12, "SDPA math": [True] * 12}
    assert "SDPA math" in comparison.working_backends(CPU)
    assert "SDPA efficient" not in comparison.working_backends(CPU)


def test_every_model_of_the_paper_has_its_figures():
    assert list(paper_table.PAPER) == list(comparison.MODELS)


@pytest.mark.parametrize("script", [paper_table, memory_vs_resolution])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--image-size 40", "images must be a multiple of 16 pixels wide, 32 at least, not 40"),
        ("--image-size 16", "images must be a multiple of 16 pixels wide, 32 at least, not 16"),
        ("--batch-size 0", "batch size.* must be at least 1"),
        ("--device nonsense", ".*nonsense.*"),
        ("--output {file}", ".*File exists.*"),
    ],
)
def test_bad_input(script, tmp_path, capsys, arguments, message):
    file = tmp_path / "file"
    file.touch()
    if script is memory_vs_resolution:
        arguments = arguments.replace("--image-size", "--sizes 32")
    with pytest.raises(SystemExit) as stopped:
        script.main(arguments.format(file=file).split())
    assert stopped.value.code == 2
    assert re.fullmatch(f"error: {message}\n", capsys.readouterr().err)
