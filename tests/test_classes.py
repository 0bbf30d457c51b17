"""Class names are kept with what was learnt of them, and other classes are refused."""

import csv
import json
import os
import shutil
from pathlib import Path

import pytest
import timm
import torch
from helpers import TINY, call_main, make_image_folder, refused, weights

import checkpoint
from journal import write_scores

NAMES = ["class0", "class1", "class2"]


@pytest.fixture(scope="module")
def trained(data_path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    call_main(*TINY, "--data-path", data_path, "--output_dir", folder, "--batch-size", "40")
    return folder


def renamed(data_path: Path, root: Path, old: str, new: str | bytes) -> Path:
    """A copy of the images, in which one class has another name."""
    folder = shutil.copytree(data_path, root / "renamed")
    for split in ("train", "val"):
        path = os.fsencode(folder / split)
        os.rename(os.path.join(path, old.encode()), os.path.join(path, os.fsencode(new)))
    return folder


def test_they_are_in_every_checkpoint_and_score(trained, run, data_path, tmp_path):
    for name in ("checkpoint.pth", "best_checkpoint.pth"):
        assert checkpoint.load(trained / name)["classes"] == NAMES
    ended = run(*TINY, "--eval", "--resume", trained / "checkpoint.pth", "--data-path", data_path,
                "--output_dir", tmp_path)  # fmt: skip
    assert ended.code == 0, ended.err
    assert json.loads((tmp_path / "eval.json").read_text())["classes"] == NAMES
    with (tmp_path / "per_class.csv").open(newline="") as file:
        assert [row["class"] for row in csv.DictReader(file)] == NAMES


@pytest.mark.parametrize(
    ("new", "difference"),
    [
        ("zebra", r"\(only in the checkpoint: class1; only in the data: zebra\)"),
        ("class9", r"\(only in the checkpoint: class1; only in the data: class9\)"),
    ],
)
def test_other_classes_are_refused(new, difference, trained, run, data_path, tmp_path):
    data = renamed(data_path, tmp_path, "class1", new)
    shared = (*TINY, "--data-path", data, "--output_dir", tmp_path / "run")
    message = f"is of other classes than the data {difference}: use the data of its training"
    resume = ("--resume", trained / "checkpoint.pth")
    refused(run(*shared, *resume, "--epochs", "2"), message, tmp_path / "run")
    refused(run(*shared, *resume, "--eval"), message, tmp_path / "run")


def test_another_number_of_classes_is_told_by_their_names(trained, run, data_path, tmp_path):
    data = shutil.copytree(data_path, tmp_path / "data")
    for split in ("train", "val"):
        shutil.copytree(data / split / "class0", data / split / "more")
    arguments = (*TINY, "--data-path", data, "--eval", "--resume", trained / "checkpoint.pth")
    refused(run(*arguments), r"of other classes than the data \(only in the data: more\)")


def test_the_same_names_in_another_order_are_other_classes():
    saved = {"classes": NAMES}
    assert checkpoint.differing_classes(saved, NAMES) == ""
    assert checkpoint.differing_classes({}, NAMES) == ""
    assert checkpoint.differing_classes(saved, NAMES[::-1]) == "the same in another order"
    many = [f"c{i}" for i in range(1000)]
    assert checkpoint.differing_classes({"classes": many}, NAMES[:1]) == (
        "only in the checkpoint: c0, c1, c2, c3, c4, ...; only in the data: class0"
    )


def test_a_teacher_of_other_classes_is_refused(run, data_path, tmp_path):
    state = timm.create_model("test_resnet", num_classes=3).state_dict()
    torch.save({"model": state, "classes": ["class0", "class1", "cat"]}, tmp_path / "t.pth")
    ended = run(*TINY, "--data-path", data_path, "--distillation-type", "hard", "--teacher-model",
                "test_resnet", "--teacher-path", tmp_path / "t.pth")  # fmt: skip
    refused(ended, r"the teacher .*t.pth is of other classes than the data \(only in the checkpoi")


def test_fine_tuning_to_other_classes_gets_a_new_head(trained, run, data_path, tmp_path):
    still = ("--lr", "0", "--min-lr", "0", "--warmup-lr", "0", "--batch-size", "40")
    options = (*TINY, *still, "--finetune", trained / "checkpoint.pth")
    data = renamed(data_path, tmp_path, "class1", "zebra")
    ended = run(*options, "--data-path", data, "--output_dir", tmp_path / "other")
    assert ended.code == 0
    assert "head replaced: it tells apart other classes" in ended.out
    ended = run(*options, "--data-path", data_path, "--output_dir", tmp_path / "same")
    assert ended.code == 0
    assert "head replaced" not in ended.out
    before = weights(trained)["head.weight"]
    assert weights(tmp_path / "same")["head.weight"].equal(before)
    assert not weights(tmp_path / "other")["head.weight"].equal(before)


def test_class_names_that_are_no_utf8(run, tmp_path):
    data = renamed(make_image_folder(tmp_path / "data"), tmp_path, "class1", b"caf\xe9")
    odd = os.fsdecode(b"caf\xe9")
    shared = (*TINY, "--data-path", data, "--batch-size", "40")
    ended = run(*shared, "--output_dir", tmp_path / "run")
    assert ended.code == 0, ended.err
    assert checkpoint.load(tmp_path / "run" / "checkpoint.pth")["classes"] == [odd, *NAMES[::2]]
    ended = run(*shared, "--eval", "--resume", tmp_path / "run" / "checkpoint.pth",
                "--output_dir", tmp_path / "scores")  # fmt: skip
    assert ended.code == 0, ended.err
    assert json.loads((tmp_path / "scores" / "eval.json").read_text())["classes"][0] == odd
    with (tmp_path / "scores" / "per_class.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == [r"caf\udce9", *NAMES[::2]]
    assert sum(int(row["images"]) for row in rows) == 21


def test_folders_whose_names_are_no_utf8(run, tmp_path):
    """A path is also an argument, that logs and settings hold."""
    root = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), b"caf\xe9")))
    data = make_image_folder(root / "data", train=12, test=3)
    (data / "train" / "class0" / "0.gif").touch()
    bad = data / "train" / "class1" / "1.png"
    bad.write_bytes(b"")
    shared = (*TINY, "--data-path", data, "--batch-size", "2")
    refused(run(*shared, "--output_dir", root / "run"), "--output_dir .* is no plain UTF-8")
    ended = run(*shared, "--output_dir", tmp_path / "run")
    assert ended.code == 0, ended.err
    assert "1 files are left out (1 .gif" in ended.out
    assert "without image" in ended.out
    scores = ("--eval", "--resume", "auto", "--output_dir", tmp_path / "run")
    assert run(*shared, *scores).code == 0
    facts = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert facts["args"]["data_path"] == str(data)


def test_scores_replace_others_only_when_they_are_whole(tmp_path):
    write_scores(tmp_path, {"acc1": 1}, ["a"], [[1, 1]])
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="argument 2 is longer"):
        write_scores(tmp_path, {"acc1": 1}, ["a"], [[1, 1], [1, 1]])
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before
