"""scripts/predict.py names the classes of images of every size and format."""

import csv
import errno
import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import pretrained
from datasets import build_dataset
from errors import UserError
from pretrained import readable
from scripts import predict


@pytest.fixture
def call(ending, trained):
    def call(*arguments: object, checkpoint: object = trained):
        options = map(str, ("--checkpoint", checkpoint, "--device", "cpu", *arguments))
        return ending(predict.main, list(options))

    return call


def test_every_size_and_format(call, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (33, 50, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    (tmp_path / "deep").mkdir()
    for name in ("a.png", "b.JPG", "c.webp", "d.bmp", "e.gif", "deep/f.tiff"):
        image.save(tmp_path / name)
    image.convert("RGBA").resize((7, 3)).save(tmp_path / "g.png")
    Image.fromarray(noise[..., 0].astype(np.uint16) * 257).save(tmp_path / "h.png")
    Image.fromarray(noise[..., 0]).save(tmp_path / "i.png")
    (tmp_path / ".hidden.png").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("no image")
    ended = call(tmp_path, "--top", "2")
    assert ended.code == 0, ended.err
    rows = list(csv.DictReader(io.StringIO(ended.out)))
    names = ["a.png", "b.JPG", "c.webp", "d.bmp", "deep/f.tiff", "e.gif", "g.png", "h.png", "i.png"]
    assert [row["image"] for row in rows] == [str(tmp_path / n) for n in names for _ in range(2)]
    assert [row["rank"] for row in rows] == ["1", "2"] * 9
    assert {row["class"] for row in rows} <= {"class0", "class1", "class2"}
    for pair in (("a.png", "d.bmp"), ("h.png", "i.png")):  # the latter of 16 and of 8 bits
        same = [row["probability"] for row in rows if Path(row["image"]).name in pair]
        assert same[:2] == same[2:]


def test_folders_are_searched_as_those_of_training(call, tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert call(tmp_path, "--top", "1").out.count("\n") == 2
    scandir, closed = os.scandir, tmp_path / "closed"
    closed.mkdir()

    def refusing(path):  # as for a user without the right to read it
        if Path(path) == closed:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    ended = call(tmp_path)
    assert ended.code == 2
    assert "closed cannot be read (Permission denied)" in ended.err


def test_classes_are_those_of_an_evaluation(call, trained, data_path, tmp_path):
    ended = call(data_path / "val", "--output", tmp_path / "p.json", "--batch-size", "4")
    assert (ended.code, ended.out) == (0, ""), ended.err
    records = json.loads((tmp_path / "p.json").read_text())
    found = pretrained.load(trained)
    dataset, _ = build_dataset("IMNET", data_path, train=False)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (found.images.mean, found.images.std))
    assert len(records) == len(dataset) == 21
    samples = map(dataset.sample, range(len(dataset)))
    for record, (image, _), (path, _) in zip(records, dataset, samples, strict=True):
        assert record["image"] == str(path)
        small = image.resize((16, 16), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(small)).permute(2, 0, 1) / 255
        shares = found.model(((pixels - mean) / std)[None]).softmax(1)[0]
        order = shares.argsort(descending=True).tolist()
        assert [p["class"] for p in record["predictions"]] == [found.classes[i] for i in order]
        given = torch.tensor([p["probability"] for p in record["predictions"]])
        torch.testing.assert_close(given, shares[order], atol=1e-5, rtol=0)


def test_another_resolution(call, data_path):
    image = data_path / "val" / "class0" / "0.png"
    assert call(image, "--input-size", "32").out != call(image).out
    ended = call(image, "--input-size", "2")
    assert ended.code == 2
    assert ended.err.count("\n") == 1
    assert "images of 2" in ended.err


def test_the_format_may_be_another(call, data_path, monkeypatch):
    models = []
    load = pretrained.load
    monkeypatch.setattr(
        pretrained, "load", lambda *a, **k: models.append(load(*a, **k)) or models[-1]
    )
    image = data_path / "val" / "class0" / "0.png"
    for words in (("--format", "RNN"), ("--format", "Chunk", "--chunk-size", "5")):
        ended = call(image, *words)
        mixer = models[-1].model.blocks[0].attn
        assert ended.code == 0, ended.err
        assert mixer.format == words[1], ended.err
    assert mixer.chunk_size == 5


def test_names_for_people():
    assert readable(["n01440764", "n01443537"], 2)[0].startswith("tench")
    assert readable([], 1000)[1].startswith("goldfish")
    assert readable([], 2) == ["class 0", "class 1"]
    assert readable(["b", "a"], 2) == ["b", "a"]


def test_what_cannot_be_read_is_told_and_the_rest_predicted(call, data_path, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    good = data_path / "val" / "class0" / "0.png"
    ended = call(tmp_path, good, "--top", "1")
    assert ended.code == 1
    assert ended.out.count("\n") == 2
    assert ended.err.startswith(f"error: Cannot read the image {tmp_path}/broken.png")
    ended = call(tmp_path)
    assert ended.code == 2
    assert ended.out == ""


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_a_name_that_is_not_utf_8(kind, call, data_path, tmp_path):
    image = tmp_path / os.fsdecode(b"b\xe4r.png")
    image.write_bytes((data_path / "val" / "class0" / "0.png").read_bytes())
    ended = call(image, "--output", tmp_path / f"p.{kind}")
    assert ended.code == 0
    assert r"b\udce4r.png" in (tmp_path / f"p.{kind}").read_text("utf-8")


def test_a_name_that_the_terminal_has_no_letters_for(call, tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "schön.png")
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert call(tmp_path).code == 0
    terminal.flush()
    assert rb"sch\xf6n.png,1," in terminal.buffer.getvalue()


def test_a_disk_that_fills_up_leaves_the_predictions_before(call, tmp_path, monkeypatch):
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    (tmp_path / "p.csv").write_text("before")
    full = lambda *_: Path("/dev/full").write_text("x")  # noqa: E731
    monkeypatch.setattr(os, "fsync", full)
    ended = call(tmp_path / "image.png", "--output", tmp_path / "p.csv")
    assert ended.code == 2
    assert "p.csv: [Errno 28] No space left on device" in ended.err
    assert (tmp_path / "p.csv").read_text() == "before"
    assert {path.name for path in tmp_path.iterdir()} == {"p.csv", "image.png"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.png"], "There is no image or folder missing.png: check its name"),
        (["EMPTY"], "holds no images: name a folder that does"),
        (["IMAGE", "--top", "0"], "--top and --batch-size must be at least 1"),
        (["IMAGE", "--output", "p.txt"], "p.txt must end in .csv or .json"),
        (["IMAGE", "--output", "nowhere/p.csv"], "There is no folder for --output nowhere/p.csv"),
        (["IMAGE", "--checkpoint", "missing.pth"], "cannot read the checkpoint missing.pth"),
        (["IMAGE", "--model", "lion_tiny"], "There is no model 'lion_tiny': did you mean"),
        (["IMAGE", "--input-size", "-1"], "--input-size must be at least 1, not -1"),
        (["IMAGE", "--model-kwargs", "depth"], "--model-kwargs takes KEY=VALUE, not 'depth'"),
        (["IMAGE", "--device", "abacus"], "abacus"),
        (
            ["IMAGE", "--format", "Chunk", "--chunk-size", "0"],
            "chunk_size must be at least 1, not 0",
        ),
    ],
)
def test_bad_input(arguments, message, call, data_path, tmp_path):
    here = {"IMAGE": data_path / "val" / "class0" / "0.png", "EMPTY": tmp_path}
    ended = call(*(here.get(argument, argument) for argument in arguments))
    assert ended.code == 2, ended.err
    assert message in ended.err, ended.err
    assert ended.out == ""


@pytest.mark.parametrize("name", ["lion_tiny_distilled_patch16_224", "deit3_small_patch16_224"])
def test_bare_weights_tell_the_size_by_their_position_embedding(name, call, data_path, tmp_path):
    sizes = {"patch_size": 4, "embed_dim": 18, "depth": 1}
    own = {"pos_emb": True} if "lion" in name else {"num_heads": 3}
    model = timm.create_model(name, img_size=20, num_classes=3, **sizes, **own)
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    options = [f"{key}={value}" for key, value in {**sizes, **own}.items()]
    options = ["--model", name, "--model-kwargs", *options]
    for size in ([], ["--input-size", "32"]):
        ended = call(data_path / "val", *options, *size, checkpoint=tmp_path / "bare.pth")
        assert ended.code == 0, ended.err
        assert "class 2" in ended.out, ended.err


def test_formats_are_of_lion(call, data_path, tmp_path):
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), tmp_path / "r.pth")
    words = ("--model", "test_resnet", "--format", "RNN")
    ended = call(data_path / "val", *words, checkpoint=tmp_path / "r.pth")
    assert ended.code == 2
    assert "--format and --chunk-size are of LION models" in ended.err
    bare = {"embed_dim": 18, "depth": 1, "patch_size": 4}
    model = timm.create_model("lion_tiny_patch16_224", num_classes=3, **bare)
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    options = [f"{key}={value}" for key, value in bare.items()]
    words = ("--model", "lion_tiny_patch16_224", "--input-size", "16", "--chunk-size", "5")
    words += ("--model-kwargs", *options)
    assert call(data_path / "val", *words, checkpoint=tmp_path / "bare.pth").code == 0


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (KeyboardInterrupt(), 130, ""),
        (UserError("No memory is left"), 1, "error: No memory is left\n"),
    ],
    ids=["Ctrl-C", "memory"],
)
def test_what_is_done_before_an_end_is_written(error, code, reason, call, tmp_path, monkeypatch):
    for name in "abc":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")

    def load(path):
        if path.name == "c.png":
            raise error
        return Image.open(path).convert("RGB")

    monkeypatch.setattr(predict, "load_image", load)
    ended = call(tmp_path, "--batch-size", "1", "--top", "1", "--output", tmp_path / "p.csv")
    assert ended.code == code
    assert ended.err == f"{reason}error: stopped after 2 of 3 images\n"
    images = [row["image"] for row in csv.DictReader((tmp_path / "p.csv").open())]
    assert images == [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    ended = call(tmp_path / "c.png", "--output", tmp_path / "none.csv")
    assert ended.code == code
    assert not (tmp_path / "none.csv").exists()
