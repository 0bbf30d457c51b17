import csv
import math
import re
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import timm
import torch

from scripts import benchmark
from scripts.bench import measure, report, steps, targets
from scripts.bench.cases import (
    BACKENDS,
    BACKWARD,
    FORWARD,
    NO_MIXING,
    SOFTMAX,
    VARIANTS,
    Case,
    make_cases,
)

SCRIPT = Path(benchmark.__file__).resolve()
STEPS = (FORWARD, BACKWARD, "training", "inference")


def make_case(step="inference", variant="Selective-S", format="Chunk", **values):
    pixels, tokens = (0, 10) if "mixer" in step else (32, 5)
    case = Case("cpu", "float32", step, "tiny", pixels, tokens, 2, variant, format, 4)
    return replace(case, **values)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What a small run of all parts printed, and the folder of its files."""
    folder = tmp_path_factory.mktemp("benchmark")
    command = (
        "--device cpu --threads 1 --parts mixer training inference --sizes 32x2 --chunk-size 4 "
        "--masks Selective-S --formats RNN Chunk --repeats 2 --seconds 1 --output results"
    )
    finished = subprocess.run(
        [sys.executable, SCRIPT, *command.split()],
        cwd=folder, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return finished.stdout, folder / "results"


def rows_of(markdown):
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    header, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    return [row for row in rows if len(row) == len(header)]


@pytest.mark.slow
def test_every_case_is_in_the_table(results):
    printed, folder = results
    assert (folder / "benchmark.md").read_text() == printed
    expected = []
    for step, tokens, formats, softmax in (
        (FORWARD, "32", ["Chunk"], "SDPA"),
        (BACKWARD, "32", ["Chunk"], "SDPA"),
        ("training", "5", ["Chunk"], "timm ViT"),
        ("inference", "5", ["RNN", "Chunk"], "timm ViT"),
    ):
        start = [f"{step}, tiny", tokens, "2"]
        expected.append([*start, softmax, "flash"])
        expected += [[*start, "no mixing", ""]] if step == "training" else []
        expected += [[*start, "LION-S♮", format] for format in formats]
    assert [row[:5] for row in rows_of(printed)] == expected
    assert "threads: 1" in printed and "--chunk-size 4" in printed
    assert re.search(r"- torch: \d", printed) and re.search(r"- timm: \d", printed)


@pytest.mark.slow
def test_ratios_are_those_of_the_csv(results):
    printed, folder = results
    with (folder / "benchmark.csv").open(newline="") as file:
        records = list(csv.DictReader(file))
    softmax = {r["step"]: r for r in records if r["variant"] == SOFTMAX}
    for row, r in zip(rows_of(printed), records, strict=True):
        other = softmax[r["step"]]
        assert row[5] == f"{float(r['seconds']) * 1e3:.2f}" and float(r["seconds"]) > 0
        ratio = f"{float(r['seconds']) / float(other['seconds']):.2f}"
        assert row[6] == ratio and f" {ratio} |" in printed
        assert row[7] == r["runs"] and 1 <= int(r["runs"]) <= 2
        assert row[8] == f"{int(r['bytes']) / 2**20:.1f}"
        assert row[9] == f"{int(r['bytes']) / int(other['bytes']):.2f}"


@pytest.mark.slow
def test_picture(results):
    assert (results[1] / "benchmark.png").read_bytes().startswith(b"\x89PNG")


def test_the_files_of_a_small_run(tmp_path, capsys):
    command = (
        "--device cpu --threads 1 --parts inference --sizes 32x1 --masks Lit --formats Chunk "
        f"--repeats 1 --seconds 0.1 --output {tmp_path}"
    )
    benchmark.main(command.split())
    printed = capsys.readouterr().out
    assert (tmp_path / "benchmark.md").read_text() == printed
    assert [row[3:5] for row in rows_of(printed)] == [["timm ViT", "flash"], ["LION-Lit", "Chunk"]]
    with (tmp_path / "benchmark.csv").open(newline="") as file:
        records = list(csv.DictReader(file))
    assert all(float(r["seconds"]) > 0 and int(r["bytes"]) > 0 for r in records)
    assert (tmp_path / "benchmark.png").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(tmp_path):
    command = (
        "--device cuda --parts mixer training inference --scales tiny --sizes 32x2 --repeats 2 "
        f"--masks Selective-S --compile none blocks --output {tmp_path}"
    )
    benchmark.main(command.split())
    with (tmp_path / "benchmark.csv").open(newline="") as file:
        records = list(csv.DictReader(file))
    measured = [r for r in records if not r["note"]]
    found = {(r["step"], r["compiled"]) for r in measured if r["variant"] == "Selective-S"}
    models = product(("training", "inference"), ("", "blocks"))
    assert found == {(FORWARD, ""), (BACKWARD, ""), *models}
    assert all(float(r["seconds"]) > 0 and int(r["bytes"]) > 0 for r in measured)


def test_fastest_softmax_is_the_base():
    slow, fast = (make_case(variant=SOFTMAX, seconds=s, format=f)
                  for s, f in ((4.0, "flash"), (2.0, "cudnn")))  # fmt: skip
    gone = make_case(variant=SOFTMAX, format="math", note="out of memory")
    lion = make_case(seconds=1.0, bytes=3)
    cases = [slow, fast, gone, lion]
    assert [row[6] for row in rows_of(report.table(cases))] == ["2.00", "1.00", "", "0.50"]
    assert "2000.00 ms (cudnn)" in report.summary(cases)
    assert "| LION-S♮ | Chunk | 0.50 |" in report.summary(cases)
    assert report.draw(cases).axes
    assert "out of memory" in report.table(cases)


def test_targets():
    def case(format, tokens, seconds, memory=0):
        return make_case(variant="Lit", format=format, tokens=tokens, pixels=tokens,
                         seconds=seconds, bytes=memory)  # fmt: skip

    cases = [
        case("Chunk", 1025, 1.0),
        case("Chunk", 4097, 5.1),
        case("Attention", 4097, 25.5, memory=400),
        case("RNN", 4097, 99.0, memory=90),
    ]
    faster, growth, memory = targets.verdicts(cases)
    assert str(faster) == "5 (≥ 4)" and faster.met
    assert str(growth) == "5.1 (≤ 5)" and not growth.met
    assert str(memory) == "0.225 (≤ 0.25)" and memory.met
    table = report.targets_table(cases)
    assert "4,097 px: 5.1 (≤ 5) | **missed** at 4,097 px |" in table and "| met |" in table
    assert targets.verdicts(cases[2:3]) == [] and report.targets_table(cases[2:3]) == ""


def test_targets_on_a_gpu():
    common = {"device": "cuda", "scale": "base", "pixels": 224}
    training = {**common, "step": "training"}
    cases = [
        make_case(**training, variant=SOFTMAX, format="flash", seconds=1.0, bytes=8),
        make_case(**training, variant=SOFTMAX, format="cudnn", seconds=0.8, bytes=8),
        make_case(**training, variant="Lit", format="Attention", seconds=0.76, bytes=8),
        make_case(**common, format="RNN", batch=64, seconds=1.0, bytes=10**9),
    ]
    time, memory, gigabytes = targets.verdicts(cases)
    assert time.value == pytest.approx(0.95) and not time.met  # Lit: 0.90
    assert memory.value == 1 and memory.met
    assert str(gigabytes) == "1 (≤ 0.62)" and not gigabytes.met


def record_turns(monkeypatch, seconds):
    """Turns take what `seconds` gives for a case and how often it has run; the cases that ran."""
    ran = []

    def begin(case, step):
        ran.append(case.format)
        return lambda: seconds(case.format, ran.count(case.format))

    monkeypatch.setattr(measure, "begin", begin)
    return ran


def test_each_round_runs_the_cases_that_have_time_left(monkeypatch):
    slow, fast = make_case(format="Attention", seconds=8.0), make_case(seconds=1.0)
    ran = record_turns(monkeypatch, lambda name, n: 8.0 if name == "Attention" else float(n))
    measure.take_turns([measure.Turns(case, None) for case in (slow, fast)], 3, budget=17)
    assert ran == ["Attention", "Chunk", "Attention", "Chunk", "Chunk"]
    assert (slow.seconds, slow.runs) == (8, 2)
    assert (fast.seconds, fast.runs) == (2, 3)


def test_a_case_without_time_keeps_its_first_run(monkeypatch):
    case = make_case(seconds=5.0, runs=1)
    ran = record_turns(monkeypatch, lambda *_: 1.0)
    measure.take_turns([measure.Turns(case, None)], 3, budget=4)
    assert (case.seconds, case.runs, ran) == (5, 1, [])


@pytest.mark.parametrize(
    ("error", "note"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory"),
        (RuntimeError("No available kernel. Aborting execution."), "not available"),
        (TypeError("a bug"), "failed: TypeError"),
    ],
)
def test_failures_are_noted(monkeypatch, error, note):
    def prepare(case):
        raise error

    monkeypatch.setattr(measure, "prepare", prepare)
    monkeypatch.setattr(measure, "in_new_process", lambda case: 1)
    cases = [make_case(), make_case(variant="Lit")]
    measure.measure(cases, repeats=1, budget=1)
    assert [case.note for case in cases] == [note, note]
    measure.measure(late := [make_case()], repeats=1, budget=1, deadline=-math.inf)
    assert late[0].note == "no time left"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere freed memory hides peaks")
def test_memory_holds_the_gradients():
    case = make_case("training", "Lit")
    weights = sum(p.nbytes for p in steps.build(case).parameters())
    assert 3.9 * weights < measure.in_new_process(case) < 5 * weights


def test_backend_that_the_cpu_lacks():
    case = make_case(FORWARD, SOFTMAX, "cudnn")
    with measure.noting_failure(case), (step := steps.prepare(case)).context():
        step.run()
    assert case.note == "not available"


@pytest.mark.parametrize(
    ("step", "precision"),
    [*((step, "amp") for step in STEPS), (FORWARD, "bfloat16"), ("inference", "bfloat16")],
)
@pytest.mark.parametrize("variant", [SOFTMAX, "Selective-S", "Decay-Normal", "Lit"])
def test_steps_in_lower_precision(variant, step, precision):
    case = make_case(step, variant, "flash" if variant == SOFTMAX else "Chunk", precision=precision)
    prepared = steps.prepare(case)
    with prepared.context():
        output = prepared.run()
    if step in (FORWARD, "inference"):
        assert output.dtype == torch.bfloat16 and output.isfinite().all()
    if step == "training":
        parameters = steps.build(case).parameters()
        assert prepared.held > 3 * 4 * sum(p.numel() for p in parameters)  # and AdamW's moments


@pytest.mark.parametrize("variant", VARIANTS)
def test_mixer_is_that_of_the_kernels(variant):
    case = make_case(BACKWARD, variant, tokens=13, batch=1)
    plain, leaves = steps.lion_mixer(case)
    in_interpreter, _ = steps.lion_mixer(replace(case, format="kernels"))
    for leaf in leaves:
        leaf.requires_grad_()
    outputs = [mix(*leaves) for mix in (plain, in_interpreter)]
    torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-3)
    gradients = [torch.autograd.grad(y.square().sum(), leaves) for y in outputs]
    torch.testing.assert_close(*gradients, atol=1e-3, rtol=1e-2)


def test_no_mixing():
    attention = timm.layers.Attention(12, num_heads=3, qkv_bias=True)
    x = torch.randn(2, 5, 12)
    expected = attention.proj(attention.qkv(x)[..., 24:])
    torch.testing.assert_close(steps.NoMixing(attention)(x), expected)
    model = steps.build(make_case(variant=NO_MIXING))
    assert all(isinstance(block.attn, steps.NoMixing) for block in model.blocks)


@pytest.mark.parametrize("how", ["blocks", "model"])
@pytest.mark.parametrize("step", ["training", "inference"])
def test_compiled(step, how):
    case = make_case(step, "Lit", compiled=how)
    with torch.compiler.set_stance("force_eager"):
        steps.prepare(case).run()


def test_a_compiled_group_has_the_fastest_backend(monkeypatch):
    seconds = {"flash": 2.0, "cudnn": 1.0, "math": 3.0}

    def fake(probes, **_):
        for probe in probes:
            assert (probe.step, probe.compiled, probe.pixels) == (BACKWARD, "", 0)
            probe.seconds = seconds.get(probe.format, math.nan)
            probe.note = "" if probe.format in seconds else "not available"

    monkeypatch.setattr(measure, "measure", fake)
    cases = [make_case("training", SOFTMAX, name, compiled="model") for name in BACKENDS]
    measure.choose_backend([*cases, make_case("training", compiled="model")])
    slower = measure.ONLY_FASTEST
    assert [case.note for case in cases] == [slower, "", "not available", slower]


def test_cases_of_a_gpu():
    assert list(VARIANTS) == ["Lit", "Decay-Normal", "Decay-S", "Selective-Normal", "Selective-S"]
    training = make_cases("training", "cuda", VARIANTS, scales=["tiny", "base"])
    assert len(training) == 2 * 4 * (3 + 1 + 5)
    assert {(c.pixels, c.batch) for c in training if c.scale == "base"} == {
        (224, 128), (384, 48), (512, 24), (1024, 4)}  # fmt: skip
    assert {c.batch for c in training if c.scale == "tiny"} == {512, 192, 96, 16}
    mixer = make_cases("mixer", "cuda", VARIANTS, scales=["base"], sizes=["197", "50x7"])
    assert len(mixer) == 2 * 2 * (4 + 5)
    assert {(c.tokens, c.batch) for c in mixer} == {(197, 256), (50, 7)}
    inference = make_cases("inference", "cuda", ["Lit"], scales=["base"], sizes=["2496"])
    assert {(c.tokens, c.batch, c.format) for c in inference if c.variant == "Lit"} == {
        (24337, 64, format) for format in ("Attention", "RNN", "Chunk")}  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--sizes 40", "error: a size must be a multiple of 16 pixels, not 40"),
        ("--sizes 32y4", "error: a size is SIZE or SIZExBATCH, not '32y4'"),
        ("--sizes 32x0", "error: a size and its batch must be at least 1, not '32x0'"),
        ("--chunk-size 0", "error: chunk size, threads and repeats must be at least 1"),
        ("--repeats 0", "error: chunk size, threads and repeats must be at least 1"),
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
