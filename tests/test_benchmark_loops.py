"""The entry points in the benchmark: what they are given, what they tell, in small runs."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
from helpers import long, make_image_folder
from test_benchmark import BLANK, CONFIG, SMALL, make_case, tables_of

from arguments import get_args_parser
from scripts.bench import entry, loops
from scripts.bench.cases import GRAPHS, PRETRAIN, TEXT, TRAINING, make_cases, presets


def a_setting(folder, **values):
    values = {"data": None, "warm_up": 1, "steps": 2, "workers": 0, "repeats": 1, "seconds": 0.01,
              **values}  # fmt: skip
    return loops.Setting(folder, **values)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, long(2)])
def test_main_runs_and_tells(tmp_path, processes):
    case = make_case(loops.MAIN, "LION-S♮", "Attention", processes=processes)
    result = loops.run_entry(case, a_setting(tmp_path, extra=["--mixup", "0"]))
    assert not result.note
    assert result.seconds > 0
    assert 0 < result.busy <= 1
    assert result.bytes > 100 * 2**20, "the process's"
    loader = loops.run_entry(replace(case, model=loops.LOADER, form=""), a_setting(tmp_path))
    assert not loader.note
    assert loader.seconds < result.seconds


@pytest.mark.slow
@pytest.mark.long
def test_pretrain_runs_and_tells(tmp_path):
    configs = [CONFIG, *(word for word in SMALL if "vocab" not in word)]
    (case,) = make_cases(presets("cpu")["pretrain"], BLANK, configs=configs, sizes=["16x2"])
    result = loops.run_entry(case, a_setting(tmp_path))
    assert not result.note
    assert result.seconds > 0
    assert 0 < result.busy <= 1
    step, loader = loops.with_companions([case])[1::-1]
    assert step.step == TEXT
    assert not loops.run_entry(loader, a_setting(tmp_path)).note


@pytest.mark.slow
def test_what_stops_an_entry_point_is_noted(tmp_path, capsys):
    case = make_case(loops.MAIN, "ViT", "default")
    result = loops.run_entry(case, a_setting(tmp_path, extra=["--lr", "-1"]))
    assert result.note.startswith("failed: ")
    assert "--lr" in result.note


@pytest.mark.slow
def test_data_of_too_few_steps_are_noted(tmp_path, capfd):
    setting = a_setting(tmp_path, data=make_image_folder(tmp_path / "data", train=18))
    result = loops.run_entry(make_case(loops.MAIN, loops.LOADER, ""), setting)
    assert result.note == "failed: an epoch has fewer than 13 steps"


def test_main_gets_what_the_case_says(tmp_path, monkeypatch):
    monkeypatch.setattr(loops, "make_images", lambda folder, count: folder.mkdir())
    case = make_case(loops.MAIN, "LION-S♮", "Chunk", compiled="blocks", processes=2, drop_path=0.2)
    words = " ".join(loops.main_arguments(case, a_setting(tmp_path)))
    for part in ("--model lion_tiny_patch16_224", "--mask_type Selective", "--order S",
                 "--format Chunk", "--chunk_size 4", "--batch-size 2", "--torchcompile",
                 "--input-size 32", "--no-amp", "--drop-path 0.2",
                 f"--data-path {tmp_path}/images-52"):  # fmt: skip
        assert part in words
    assert "--torchcompile-mode" not in words
    graphs = loops.main_arguments(replace(case, compiled=GRAPHS), a_setting(tmp_path))
    assert "--torchcompile-mode reduce-overhead --" in " ".join(graphs)
    assert "--torchcompile" in graphs
    (data,) = tmp_path.iterdir()
    assert data.name == "images-52", "2 images for each of 2 processes and 13 steps"
    loops.main_arguments(replace(case, batch=20), a_setting(tmp_path))
    assert (tmp_path / "images-768").exists(), "520, and what an epoch is rounded down from"


def test_pretrain_gets_a_configuration_whose_name_has_spaces(tmp_path):
    (tmp_path / "text").mkdir()
    case = make_case(PRETRAIN, "a model", "", config="'a model.yaml' lr=1", compiled="blocks")
    words = loops.pretrain_arguments(case, a_setting(tmp_path))
    assert words[:2] == ["a model.yaml", "lr=1"]
    assert "compile=True" in words


def test_the_progress_lines_tell_what_waits_for_data(tmp_path, monkeypatch):
    def run(command, **_):
        output = command[command.index("scripts.bench.entry") + 1]
        facts = {"seconds": 0.5, "busy": 0.6, "bytes": 7}
        (tmp_path / output).write_text(json.dumps(facts))
        lines = [f"Epoch: [0]  [ {i}/9]  loss: 1  img/s: 9  data: {i}0%" for i in (9, 2, 3)]
        return SimpleNamespace(stdout="\n".join(lines), stderr="", returncode=0)

    monkeypatch.setattr(loops.subprocess, "run", run)
    case = loops.run_entry(make_case(loops.MAIN, "ViT", "default"), a_setting(tmp_path))
    assert case.data_wait == pytest.approx(0.25), "of the second half"
    bare = replace(case, step=TRAINING, seconds=0.4, busy=math.nan, data_wait=math.nan)
    first, second = tables_of(loops.loop_table([bare, case]))[0][2:]
    assert first[5:11] == ["400.0", "1.00", "5", "", "", ""]
    assert second[5:11] == ["500.0", "1.25", "4", "25%", "15%", "60%"]


def test_bare_steps_drop_blocks_as_main_does():
    (main,) = make_cases(presets("cpu")["main"], BLANK, scales=["tiny"], models=["ViT"])
    assert main.drop_path == get_args_parser().get_default("drop_path")
    assert {case.drop_path for case in loops.with_companions([main])} == {main.drop_path}


def test_entry_points_have_their_companions_in_turn():
    cases = [
        make_case(loops.MAIN, model, "default", compiled=how, processes=count)
        for how, count in (("", 1), ("blocks", 1), ("", 2))
        for model in ("ViT", "LION-D")
    ]
    found = loops.with_companions(cases)
    assert [(c.step, c.model, c.compiled, c.processes) for c in found] == [
        (loops.MAIN, loops.LOADER, "", 1),
        (TRAINING, "ViT", "", 1), (loops.MAIN, "ViT", "", 1),
        (TRAINING, "LION-D", "", 1), (loops.MAIN, "LION-D", "", 1),
        (TRAINING, "ViT", "blocks", 1), (loops.MAIN, "ViT", "blocks", 1),
        (TRAINING, "LION-D", "blocks", 1), (loops.MAIN, "LION-D", "blocks", 1),
        (loops.MAIN, loops.LOADER, "", 2),
        (loops.MAIN, "ViT", "", 2), (loops.MAIN, "LION-D", "", 2),
    ]  # fmt: skip


def test_a_case_stays_itself_with_its_results():
    case = make_case(loops.MAIN, "ViT", "default")
    assert replace(case, seconds=float("nan"), busy=0.5) == case != replace(case, processes=2)


def test_the_device_is_busy_while_anything_runs():
    trace = [{"cat": cat, "ts": ts, "dur": dur} for cat, ts, dur in (
        ("kernel", 0, 10), ("kernel", 5, 10), ("gpu_memcpy", 7, 2), ("cuda_runtime", 0, 90),
        ("kernel", 50, 1), ("user_annotation", 0, 99))]  # fmt: skip
    assert entry.busy_seconds([*trace, {"ph": "M"}]) == pytest.approx(16e-6)


def test_images_are_made(tmp_path):
    loops.make_images(tmp_path / "images", 30, distinct=3, classes=2)
    train = sorted((tmp_path / "images" / "train").glob("*/*.jpg"))
    assert len(train) == 30
    assert len({path.resolve() for path in train}) == 3
    assert 20_000 < train[0].stat().st_size < 300_000, "as photographs"
