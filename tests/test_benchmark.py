"""The benchmark: its cases, turns, tables and pictures, on tiny models and a CPU."""

import csv
import inspect
import math
import os
import re
import sys
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise, product

import pytest
import timm
import torch
from helpers import ROOT

import lion_kernels
from errors import UserError
from scripts import benchmark
from scripts.bench import measure, paper, report, steps
from scripts.bench.cases import (
    BACKWARD,
    FORWARD,
    GRAPHS,
    INFERENCE,
    LAYER_BACKWARD,
    LAYER_FORWARD,
    LIONS,
    MODELS,
    NO_MIXING,
    TRAINING,
    Case,
    make_cases,
    presets,
)

STEPS = (FORWARD, BACKWARD, TRAINING, INFERENCE)
CONFIG = str(ROOT / "mlm" / "configs" / "bert-base.yaml")
SMALL = ("model.hidden_size=16", "model.num_hidden_layers=1", "model.num_attention_heads=2",
         "model.intermediate_size=16", "model.vocab_size=50", "model.format=Chunk")  # fmt: skip
BLANK = Case("cpu", "a card", "float32", "", "", 0, 0, 0, "", "", 4)


def make_case(step=INFERENCE, model="LION-S♮", form="Chunk", **values):
    pixels, tokens = (0, 10) if "mixer" in step else (32, 5)
    case = replace(BLANK, step=step, scale="tiny", pixels=pixels, tokens=tokens, batch=2)
    return replace(case, model=model, form=form, **values)


@pytest.fixture
def no_processes(monkeypatch):
    """Memory is that of nothing: it would take a process for each case."""
    monkeypatch.setattr(measure, "in_new_process", lambda *_: 2**20)


def tables_of(markdown):
    """The tables of a report, each a list of rows of cells."""
    blocks = re.findall(r"(?:^\|.*\n?)+", markdown, re.MULTILINE)
    return [[[cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines()]
            for block in blocks]  # fmt: skip


def called(capsys, folder, options):
    """What a run printed, and its cases."""
    arguments = f"--device cpu --repeats 1 --seconds 0.01 --output {folder} {options}"
    benchmark.main(arguments.split())
    printed = capsys.readouterr().out
    (file,) = folder.glob("*.csv")
    assert file.with_suffix(".md").read_text() == printed
    return printed, report.read_csv(file)


@pytest.mark.parametrize(
    ("name", "formats"), [("training", ["Chunk"]), ("inference", ["RNN", "Chunk"])]
)
def test_speed(tmp_path, capsys, no_processes, name, formats):
    options = f"--preset {name} --sizes 32x2 --models LION-S♮ --formats RNN Chunk"
    printed, cases = called(capsys, tmp_path, options)
    labels = ["ViT, SDPA flash", *(f"LION-S♮, {form}" for form in formats)]
    assert [(case.step, case.label) for case in cases] == [(name, label) for label in labels]
    summary, table = tables_of(printed)
    assert "- threads: 1" in printed
    for row, case in zip(table[2:], cases, strict=True):
        ratio = f"{case.seconds / cases[0].seconds:.2f}"
        assert row[3:6] == [case.label, f"{case.seconds * 1e3:.3f}", ratio]
        assert case.seconds > 0
        assert case.runs >= 1
        assert row[8] == "1.0"
    assert summary[3] == [labels[1], ", ".join(table[3][4:6])]
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert cases[-1].card == benchmark.cpu_name()
    assert "LION-S" in printed
    again = tmp_path / "again"
    benchmark.main(["--preset", name, "--from-csv", str(tmp_path / f"{name}.csv"),
                    "--output", str(again)])  # fmt: skip
    assert tables_of(capsys.readouterr().out) == tables_of(printed)
    assert (again / f"{name}.png").exists()


@pytest.mark.slow
def test_paper(tmp_path, capsys, no_processes):
    options = "--preset paper --sizes 32x1 --models Hydra LION-S♮ DeiT"
    printed, cases = called(capsys, tmp_path, options)
    _, _, *table = tables_of(printed)[0]
    both = ("explicit softmax", "SDPA flash")
    softmax = [f"{model}, {attention}" for model in ("ViT", "DeiT") for attention in both]
    labels = [*softmax[:2], "Hydra", "LION-S♮, Attention", *softmax[2:]]
    assert [row[0] for row in table] == labels
    training = [case for case in cases if case.step == TRAINING]
    for row, case in zip(table, training, strict=True):
        over = [case.seconds / other.seconds for other in training[:2]]
        assert row[1:5] == [f"{case.parameters:,}", f"{case.seconds * 1e3:.1f}",
                            *(f"{ratio:.2f}" for ratio in over)]  # fmt: skip
        assert float(row[5]) > 0
        assert row[6] == "1"
    assert [row[7:] for row in table] == [
        ["1", "70.2"], ["", ""], ["", ""], ["3.83", "73.5"], ["1", "72.2"], ["", ""],
    ]  # fmt: skip
    assert [row[1] for row in table[2:4]] == ["7,267,456", "5,693,488"]
    axes = paper.draw_paper(cases).axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == labels
    assert benchmark.cpu_name() in axes.get_title(loc="left")
    assert "float32" in axes.get_title(loc="left")


@pytest.mark.slow
def test_resolution(tmp_path, capsys, no_processes):
    options = "--preset resolution --sizes 32x1 48x1 --models LION-D"
    printed, cases = called(capsys, tmp_path, options)
    memory, times = tables_of(printed)[:2]
    assert memory[0] == ["GB", "32 px, batch 1", "48 px, batch 1"]
    assert times[0][0] == "ms"
    labels = ["ViT, SDPA", "ViT, explicit softmax",
              *(f"LION-D, {format}" for format in ("Attention", "RNN", "Chunk"))]  # fmt: skip
    assert [row[0] for row in times[2:]] == labels == [row[0] for row in memory[2:7]]
    assert times[2][2] == f"{cases[5].seconds * 1e3:,.2f}"
    assert (tmp_path / "resolution.png").exists()


def test_the_papers_memory_is_beside_its_resolutions():
    cases = [make_case(model="Vim", form="", pixels=p, bytes=5 * 10**8) for p in (64, 1248)]
    cases += [make_case(model="Vim", form="", pixels=2496, note="out of memory")]
    memory = tables_of(paper.resolution_table(cases))[0]
    assert memory[2] == ["Vim", "0.50", "0.50", "out of memory"]
    assert memory[-1][1:] == ["", "12.3", "49.0"]


def test_a_picture_shows_every_line_and_explains_its_cross():
    cases = [make_case(model="LION-D", form=form, seconds=1.0, bytes=1, pixels=pixels)
             for form in ("Attention", "RNN", "Chunk") for pixels in paper.PIXELS]  # fmt: skip
    cases += [make_case(model="Vim", form="", seconds=1.0, bytes=1, pixels=1024),
              make_case(model="Vim", form="", pixels=1248, note="out of memory")]  # fmt: skip
    figure = paper.draw_resolution(cases)
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    widths = [lines[label].get_linewidth() for label in list(lines)[:3]]
    assert widths == sorted(widths, reverse=True)
    assert len(set(widths)) == 3
    assert len({str(lines[label].get_linestyle()) for label in list(lines)[:3]}) == 2
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend[-1] == "out of memory at the next size"
    assert figure.get_suptitle() == "a card; float32"
    figure.draw_without_rendering()
    ticks = figure.axes[0].get_xticklabels()
    ends = [tick.get_window_extent().x1 for tick in ticks]
    apart = min(b - a for a, b in pairwise(ends)) * math.sin(math.radians(ticks[0].get_rotation()))
    assert apart >= ticks[0].get_fontsize() * figure.dpi / 72, "labels are parallel lines of text"


def test_text(tmp_path, capsys, no_processes):
    configs = " ".join(["--configs", CONFIG, CONFIG.replace("bert", "lion-s"), *SMALL])
    printed, cases = called(capsys, tmp_path, f"--preset text --sizes 32x2 40x1 {configs}")
    assert [(case.label, case.tokens, case.batch) for case in cases] == [
        ("bert-base, SDPA", 32, 2), ("lion-s-base", 32, 2),
        ("bert-base, SDPA", 40, 1), ("lion-s-base", 40, 1),
    ]  # fmt: skip
    table = tables_of(printed)[-1]
    assert table[2][5] == table[4][5] == "1.00"
    assert table[2][6] == f"{64 / cases[0].seconds:,.0f}", "tokens/s"
    assert all(case.parameters > 0 for case in cases)


def test_the_figures_of_the_docs_are_those_of_their_pictures():
    docs = (ROOT / "docs" / "benchmarks.md").read_text()
    figures = ROOT / "docs" / "figures"
    for table in tables_of(paper.resolution_table(report.read_csv(figures / "resolution.csv"))):
        for label, *cells in table[2:]:
            assert label.startswith("*paper") or f"| {' | '.join([label, *cells])} |" in docs
    (table, *_) = tables_of(paper.paper_table(report.read_csv(figures / "paper.csv")))
    for _, parameters, step, *_, inference, peak, time, top1 in table[2:]:
        ends = f"| {inference} | {peak} | {time} | {top1} |".replace("  ", " ")
        assert any(f"{parameters} | {step} |" in line and line.endswith(ends)
                   for line in docs.splitlines()), (step, ends)  # fmt: skip


def test_fastest_softmax_is_the_base():
    slow, fast = (make_case(model="ViT", form=f, seconds=s) for f, s in (("flash", 4), ("math", 2)))
    written = make_case(model="ViT", form="explicit", seconds=1.0)
    gone = make_case(model="ViT", form="cudnn", note="out of memory")
    cases = [slow, fast, written, gone, make_case(seconds=1.0, bytes=3)]
    assert [row[5] for row in tables_of(report.table(cases))[0][2:]] == [
        "2.00", "1.00", "0.50", "", "0.50"]  # fmt: skip
    assert "| ViT, SDPA cudnn | out of memory |" in report.summary(cases)
    assert "| LION-S♮, Chunk | 1000.000, 0.50 |" in report.summary(cases)


def a_step(case):
    return steps.Step(case, run=None, context=None, held=0)


def record_turns(monkeypatch, seconds):
    """Turns take what `seconds` gives for a case and how often it has run; the cases that ran."""
    ran = []

    def begin(step):
        form = step.case.form
        ran.append(form)
        return lambda: seconds(form, ran.count(form))

    monkeypatch.setattr(measure, "begin", begin)
    return ran


def test_each_round_runs_the_cases_that_have_time_left(monkeypatch):
    slow, fast = make_case(form="Attention", seconds=8.0), make_case(seconds=1.0)
    ran = record_turns(monkeypatch, lambda name, n: 8.0 if name == "Attention" else float(n))
    measure.take_turns([a_step(case) for case in (slow, fast)], 3, budget=17)
    assert ran == ["Attention", "Chunk", "Attention", "Chunk", "Chunk"]
    assert (slow.seconds, slow.runs) == (8, 2)
    assert (fast.seconds, fast.runs) == (2, 3)


def test_a_case_without_time_keeps_its_first_run(monkeypatch):
    case = make_case(seconds=5.0, runs=1)
    ran = record_turns(monkeypatch, lambda *_: 1.0)
    measure.take_turns([a_step(case)], 3, budget=4)
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
def test_failures_are_noted(monkeypatch, no_processes, error, note):
    def prepare(case):
        raise error

    monkeypatch.setattr(measure, "prepare", prepare)
    cases = [make_case(), make_case(model="LION-Lit")]
    measure.measure(cases, repeats=1, budget=1)
    assert [case.note for case in cases] == [note, note]


def test_a_case_that_fails_in_a_turn_has_no_time(monkeypatch):
    case = make_case(seconds=5.0, runs=1)

    def begin(step):
        if ran:
            raise TypeError("a bug")
        ran.append(case)
        return lambda: 1.0

    ran = []
    monkeypatch.setattr(measure, "begin", begin)
    measure.take_turns([a_step(case)], 3, budget=20)
    assert case.note == "failed: TypeError"
    assert math.isnan(case.seconds)


@pytest.mark.slow
def test_a_process_that_the_system_ends_was_out_of_memory():
    case = make_case()
    with measure.noting_failure(case):
        measure.in_new_process(os._exit, 1)
    assert case.note == "out of memory"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere freed memory hides peaks")
@pytest.mark.slow
def test_memory_holds_the_gradients():
    case = make_case(TRAINING, "LION-Lit")
    weights = sum(p.nbytes for p in steps.build(case).parameters())
    held = measure.in_new_process(measure.peak_bytes, case)
    assert 3.9 * weights < held < 5 * weights


def test_backend_that_the_cpu_lacks():
    case = make_case(FORWARD, "ViT", "cudnn")
    with measure.noting_failure(case), (step := steps.prepare(case)).context():
        step.run()
    assert case.note == "not available"


def test_softmax_is_written_out_where_asked():
    fused = {form: {m.fused_attn for m in steps.build(make_case(model="DeiT", form=form)).modules()
                    if hasattr(m, "fused_attn")}
             for form in ("explicit", "math")}  # fmt: skip
    assert fused == {"explicit": {False}, "math": {True}}


@pytest.mark.parametrize(
    ("step", "precision"),
    [*((step, "amp") for step in STEPS), (FORWARD, "bfloat16"), (INFERENCE, "bfloat16")],
)
@pytest.mark.parametrize("model", ["ViT", "LION-S♮", "LION-D", "LION-Lit"])
def test_steps_in_lower_precision(model, step, precision):
    case = make_case(step, model, "flash" if model == "ViT" else "Chunk", precision=precision)
    prepared = steps.prepare(case)
    with prepared.context():
        output = prepared.run()
    if step in (FORWARD, INFERENCE):
        assert output.dtype == torch.bfloat16
        assert output.isfinite().all()
    if step == TRAINING:
        assert prepared.held > 3 * 4 * case.parameters  # and AdamW's moments


@pytest.mark.parametrize("model", LIONS)
def test_mixer_is_that_of_the_models(model, monkeypatch):
    """It calls the kernels as a layer does, on tensors of the same shapes."""
    signature, calls = inspect.signature(lion_kernels.mix), []

    def mix(*arguments, **options):
        bound = signature.bind(*arguments, **options)
        bound.apply_defaults()
        calls.append(bound.arguments)
        return arguments[0][..., :192]

    monkeypatch.setattr(lion_kernels, "mix", mix)
    monkeypatch.setattr(lion_kernels, "available", lambda *_: True)
    steps.prepare(make_case(LAYER_FORWARD, model, "Attention")).run()
    steps.prepare(make_case(FORWARD, model, "kernels", tokens=5)).run()
    for name, value in calls[0].items():
        other = calls[1][name]
        if name in ("projected", "decay") and value is not None:
            value, other = value.shape, other.shape
        assert torch.equal(value, other) if torch.is_tensor(value) else value == other, name


@pytest.mark.parametrize("model", ["ViT", "LION-S♮", "LION-D", "LION-Lit"])
@pytest.mark.parametrize("step", [LAYER_FORWARD, LAYER_BACKWARD])
def test_steps_of_a_layer(model, step):
    case = make_case(step, model, "default" if model == "ViT" else "Attention")
    prepared = steps.prepare(case)
    output = prepared.run()
    width, weights = 192, 4 * 192**2
    if step == LAYER_FORWARD:
        assert output.shape == (2, 5, width)
        assert output.requires_grad
    else:
        assert output[0].shape == (2, 5, width)
        assert all(g.isfinite().all() for g in output)
    assert weights < case.parameters < 1.1 * weights


def test_a_layer_is_timed_by_the_hosts_clock(monkeypatch):
    called = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: called.append("idle"))
    case = make_case(LAYER_BACKWARD, device="cuda", iterations=2)
    step = steps.Step(case, lambda: called.append("run"), nullcontext, held=0)
    assert measure.begin(step)() > 0
    assert called == ["idle", "run", "run"]


def test_no_mixing():
    attention = timm.layers.Attention(12, num_heads=3, qkv_bias=True)
    x = torch.randn(2, 5, 12)
    expected = attention.proj(attention.qkv(x)[..., 24:])
    torch.testing.assert_close(steps.NoMixing(attention)(x), expected)
    model = steps.build(make_case(model=NO_MIXING))
    assert all(isinstance(block.attn, steps.NoMixing) for block in model.blocks)


@pytest.mark.parametrize("how", ["blocks", GRAPHS])
@pytest.mark.parametrize("step", [TRAINING, INFERENCE])
def test_compiled(step, how):
    case = make_case(step, "LION-Lit", compiled=how)
    with torch.compiler.set_stance("force_eager"):
        steps.prepare(case).run()


def cases_of(preset, **options):
    blank = replace(BLANK, device="cuda", precision="")
    return make_cases(presets("cuda")[preset], blank, **{"scales": ["base"], **options})


def test_training_on_a_gpu_fills_it_at_every_size():
    training = cases_of("training", scales=["tiny", "base"])
    assert len(training) == 2 * 4 * (3 + 1 + 5)
    assert {(c.pixels, c.batch) for c in training if c.scale == "base"} == {
        (224, 128), (384, 48), (512, 24), (1024, 4)}  # fmt: skip
    assert {c.batch for c in training if c.scale == "tiny"} == {512, 192, 96, 16}
    assert {c.precision for c in training} == {"amp"}


def test_mixers_have_sizes_in_tokens():
    mixer = cases_of("mixer", sizes=["197", "50x7"])
    assert len(mixer) == 2 * 2 * (4 + 5)
    assert {(c.tokens, c.batch) for c in mixer} == {(197, 256), (50, 7)}
    assert {c.precision for c in mixer} == {"bfloat16"}


def test_layers_run_forward_and_with_gradients():
    host = cases_of("host", models=["LION-D"], sizes=["224", "112x2"])
    assert [(c.step, c.tokens, c.batch, c.label) for c in host] == [
        (step, tokens, batch, label) for tokens, batch in ((197, 1), (50, 2))
        for step in (LAYER_FORWARD, LAYER_BACKWARD)
        for label in ("ViT, SDPA", "LION-D, Attention")
    ]  # fmt: skip
    assert {c.precision for c in host} == {"bfloat16"}


def test_inference_on_a_gpu_is_in_all_formats():
    inference = cases_of("inference", models=["LION-Lit"], sizes=["2496"])
    assert {(c.tokens, c.batch, c.form) for c in inference if c.model == "LION-Lit"} == {
        (24337, 64, format) for format in ("Attention", "RNN", "Chunk")}  # fmt: skip


def test_the_papers_models_are_measured():
    assert set(paper.TRAINED) == {c.model for c in cases_of("paper")}
    assert set(MODELS) == {*paper.TRAINED, NO_MIXING}


def test_mixers_and_layers_are_those_of_vit_and_lion():
    for name in ("mixer", "host"):
        with pytest.raises(UserError, match="are those of ViT and LION, not of Vim"):
            cases_of(name, models=["Vim"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["mixer", "host", "training", "inference"])
def test_on_a_gpu(tmp_path, name):
    whole = name in ("training", "inference")
    command = (
        f"--device cuda --preset {name} --scales tiny --sizes 32x2 --repeats 2 --models LION-S♮ "
        f"--compile none {'blocks' if whole else ''} --output {tmp_path}"
    )
    benchmark.main(command.split())
    measured = [case for case in report.read_csv(tmp_path / f"{name}.csv") if not case.note]
    found = {(case.step, case.compiled) for case in measured if case.model == "LION-S♮"}
    compiled = ("", "blocks") if whole else ("",)
    assert found == set(product(presets("cuda")[name].steps, compiled))
    assert all(case.seconds > 0 and case.bytes > 0 for case in measured)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--sizes 40", "a size must be a multiple of 16 pixels, 32 at least, not 40"),
        ("--preset resolution --sizes 16", "a size must be a multiple of 16 .* not 16"),
        ("--sizes 32y4", "a size is SIZE or SIZExBATCH, each at least 1, not '32y4'"),
        ("--sizes 32x0", "a size is SIZE or SIZExBATCH, each at least 1, not '32x0'"),
        ("--repeats 0", "steps, .* must be at least 1"),
        ("--device nonsense", ".*nonsense.*"),
        ("--output {file}", ".*File exists.*"),
        ("--preset mixer", "the preset mixer needs a GPU, whose .*: choose another"),
        ("--preset host", "the preset host needs a GPU, whose .*: choose another"),
        ("--preset mixer --compile blocks", "mixers and layers are not compiled: leave .* out"),
        ("--preset host --precision amp", "mixers and layers have --precision bfloat16 or .*"),
        ("--preset text --compile graphs", "language models have no CUDA graphs: leave .* out"),
        ("--processes 2", "--processes is of the presets main and pretrain: leave it out"),
        ("--preset main --data-path {file}", "--data-path .* is no folder: choose another"),
        ("--preset main --precision bfloat16", "entry points train with --precision amp or .*"),
        ("--preset text --configs absent.yaml", "cannot read the settings absent.yaml: No such.*"),
        ("--preset text --configs model.mixer=lion-s", "give at least one configuration .*"),
        (f"--preset text --configs {CONFIG} model.mixr=a", "Unknown key 'mixr' in the section .*"),
        ("--from-csv {file}", ".*holds no case: measure some first"),
        (f"--from-csv {CONFIG}", ".* is no CSV of this script .*"),
    ],
)  # fmt: skip
def test_bad_input(tmp_path, capsys, arguments, message):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(["--device", "cpu", *arguments.format(file=file).split()])
    assert stopped.value.code == 2
    assert re.fullmatch(f"error: {message}\n", capsys.readouterr().err)


def test_the_csv_has_every_field(tmp_path):
    case = make_case(seconds=0.1, runs=3, bytes=5, parameters=7, busy=0.5, note="a note")
    report.write_csv(tmp_path / "cases.csv", [case])
    (again,) = report.read_csv(tmp_path / "cases.csv")
    assert repr(again) == repr(case)
    with (tmp_path / "cases.csv").open(newline="") as file:
        assert next(csv.DictReader(file))["card"] == "a card"
