"""The checkpoint in demo/ serves every command as it is."""

import pytest
import torch
from helpers import ROOT
from timm.data import create_transform

import checkpoint
import pretrained
from datasets import IdxImages, build_dataset
from scripts import predict

DEMO = ROOT / "demo" / "lion_s.pth"
MODEL = ("--model", "lion_tiny_patch16_224", "--mask_type", "Selective", "--order", "S",
         "--pos_emb", "--model-kwargs", "patch_size=2", "embed_dim=96", "depth=6",
         "num_heads=3")  # fmt: skip


def test_it_is_small_and_tells_all():
    assert DEMO.stat().st_size < 2e6
    saved = checkpoint.load(DEMO)
    assert {"model", "args", "data_config", "classes"} == saved.keys()
    assert saved["args"]["data_set"] == "DEMO"
    assert saved["data_config"]["input_size"][1] == 28


@pytest.mark.slow
def test_it_knows_the_images():
    found = pretrained.load(DEMO)
    images, _ = build_dataset("DEMO", "", train=False)
    step, count = 10, 200
    samples = [images[i * step] for i in range(count)]
    transform = create_transform(**found.images.for_timm())
    pixels = torch.stack([transform(image) for image, _ in samples])
    with torch.no_grad():
        right = found.model(pixels).argmax(1) == torch.tensor([label for _, label in samples])
    assert right.float().mean() > 0.88


def test_main_evaluates_it(run, monkeypatch):
    monkeypatch.setattr(IdxImages, "__len__", lambda _: 50)
    ended = run("--eval", "--resume", DEMO, *MODEL, "--data-set", "DEMO",
                "--num_workers", "0", "--device", "cpu")  # fmt: skip
    assert ended.code == 0, ended.err
    (line,) = [line for line in ended.out.splitlines() if line.startswith("* Acc@1")]
    assert float(line.split()[2]) > 86


def test_torch_hub_loads_it():
    model = torch.hub.load(str(ROOT), "trained", str(DEMO), source="local")
    assert not model.training
    assert model.pretrained_cfg["input_size"] == [3, 28, 28]
    assert model(torch.zeros(1, 3, 28, 28)).shape == (1, 10)


def test_predict_names_most_of_its_images(ending):
    images = sorted((ROOT / "demo" / "images").glob("*.png"))
    ended = ending(predict.main, ["--checkpoint", str(DEMO), "--top", "1", str(images[0].parent)])
    assert ended.code == 0, ended.err
    rows = [line.split(",") for line in ended.out.splitlines()[1:]]
    named = [row[2].lower().replace(" ", "-").replace("/", "-") in row[0] for row in rows]
    assert len(rows) == len(images) == 10
    assert sum(named) >= 7
