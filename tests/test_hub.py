"""Trained models leave as timm's folders, and come back wherever a checkpoint is taken."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from helpers import TINY, VARIANT, Malicious, same
from huggingface_hub import HfApi
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file
from timm.data import create_transform, resolve_data_config

import checkpoint
import hub
import pretrained
import publishing
from datasets import build_dataset
from errors import UserError

NAME = "hf-hub:owner/name"


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "model"
    publishing.save_for_hf(pretrained.load(trained), folder)
    return folder


@pytest.fixture
def on_the_hub(folder, monkeypatch) -> list[tuple]:
    """The folder is `owner/name` on the Hub; what was asked for."""
    asked = []

    def download(name, file, revision=None, **_):
        asked.append((name, file, revision))
        return str(folder / file)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    return asked


def score(run, *arguments: object) -> float:
    ended = run("--eval", *TINY, *VARIANT, *arguments)
    assert ended.code == 0, ended.err
    (line,) = [line for line in ended.out.splitlines() if line.startswith("* Acc@1")]
    return line


def test_a_checkpoint_alone_builds_its_model(trained):
    found = pretrained.load(trained)
    state = checkpoint.load(trained)
    assert same(dict(found.model.state_dict()), state["model"])
    assert found.model.order == "S"
    assert not found.model.training
    assert found.images.mean == (0.2, 0.3, 0.4)
    assert found.classes == ["class0", "class1", "class2"]
    assert same(dict(pretrained.load(trained, ema=True).model.state_dict()), state["model_ema"])
    larger = pretrained.load(trained, input_size=32)
    assert larger.model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


def test_a_folder_keeps_the_crop_of_small_images(trained, folder):
    """Which is of no use at their own size, but at a larger one."""
    assert pretrained.load(folder).images == pretrained.load(trained).images
    assert pretrained.load(folder).images.crop_pct == 0.875


def test_the_name_of_another_model_is_refused(trained):
    with pytest.raises(ValueError, match=r"is of lion_tiny_.*, not of test_resnet: name that"):
        pretrained.load(trained, name="test_resnet")
    assert pretrained.load(trained, name="lion_tiny_patch16_224").model.order == "S"
    assert pretrained.load(trained, options={"num_classes": 3}).model.num_classes == 3
    with pytest.raises(ValueError, match="2 of another shape"):
        pretrained.load(trained, options={"num_classes": 4})


def test_weights_alone_need_the_models_name(tmp_path):
    model = timm.create_model("test_resnet", num_classes=5)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"weights.pth does not tell which .* add --model"):
        pretrained.load(tmp_path / "weights.pth")
    found = pretrained.load(tmp_path / "weights.pth", name="test_resnet")
    assert found.class_names == [f"class {i}" for i in range(5)]


def test_timm_alone_gets_the_same_scores(folder, data_path, run):
    """The path of timm's validate.py: create_model, resolve_data_config, create_loader."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    config = resolve_data_config(model=model)
    assert config["crop_pct"] == 1.0
    assert tuple(config["input_size"]) == (3, 16, 16)
    assert config["interpolation"] == "bilinear"
    assert tuple(config["mean"]) == (0.2, 0.3, 0.4)
    dataset, _ = build_dataset("IMNET", data_path, train=False)
    dataset.transform = create_transform(**config)
    samples, labels = zip(*dataset, strict=True)
    right = model(torch.stack(samples)).argmax(1) == torch.tensor(labels)
    line = score(run, "--resume", folder, "--data-path", data_path)
    assert right.float().mean() > 0.4  # it has learned something
    assert f"* Acc@1 {100 * right.float().mean():.3f}" in line


def test_a_round_trip_keeps_weights_classes_and_recipe(folder, trained):
    before, after = checkpoint.load(trained), checkpoint.load(folder)
    assert same(dict(after["model"]), dict(before["model"]))
    assert after["classes"] == before["classes"]
    assert after["args"]["mask_type"] == "Selective"
    assert after["args"]["lr"] == 0.1
    text = (folder / "config.json").read_text()
    assert "data_path" not in text
    assert str(trained.parent) not in text
    assert load_file(folder / "model.safetensors").keys() == before["model"].keys()


def test_the_card_states_data_recipe_and_normalisation(folder, trained):
    card = (folder / "README.md").read_text()
    facts = ("| Data | IMNET |", "mean (0.2, 0.3, 0.4), standard deviation (0.229, 0.224, ",
             "3 x 16 x 16", "class0, class1, class2", "lr: 0.1", "order: S",
             "crop 1 (center); 0.875 above 32 pixels |")  # fmt: skip
    for fact in facts:
        assert fact in card, fact
    (folder / "README.md").write_text("mine")
    publishing.save_for_hf(pretrained.load(trained), folder)
    assert (folder / "README.md").read_text() == "mine"


def test_the_card_tells_of_other_weights(folder, trained, tmp_path):
    """But not where they lie; nor is it lost in a small checkpoint."""
    told = "finetune: started from the weights of another training"
    assert told not in (folder / "README.md").read_text()
    saved = checkpoint.load(trained)
    saved["args"]["finetune"] = "/home/me/secret.pth"
    checkpoint.save(saved, tmp_path / "tuned.pth")
    publishing.save_weights(pretrained.load(tmp_path / "tuned.pth"), tmp_path / "small.pth")
    publishing.save_for_hf(pretrained.load(tmp_path / "small.pth"), tmp_path / "published")
    written = [
        (tmp_path / "published" / name).read_text() for name in (publishing.CARD, hub.CONFIG)
    ]
    assert told in written[0]
    assert not any("secret" in text for text in written)
    assert checkpoint.load(tmp_path / "published")["args"]["finetune"] == publishing.OTHER_WEIGHTS


def test_hub_names_are_taken_wherever_checkpoints_are(
    on_the_hub, trained, data_path, run, tmp_path
):
    data = ("--data-path", data_path)
    assert score(run, "--resume", NAME, *data) == score(run, "--resume", trained, *data)
    assert on_the_hub == [("owner/name", file, None) for file in ("config.json", hub.WEIGHTS[0])]
    tuned = run(*TINY, *VARIANT, *data, "--finetune", f"{NAME}@v1", "--output_dir", tmp_path / "t")
    assert tuned.code == 0
    assert on_the_hub[-1] == ("owner/name", hub.WEIGHTS[0], "v1")
    ended = run("--eval", *TINY, *data, "--resume", NAME)  # Decay
    assert ended.code == 2
    assert f"{NAME} is of another model" in ended.err


def test_a_teacher_may_come_from_the_hub(tmp_path, monkeypatch, data_path, run):
    model = timm.create_model("test_resnet", num_classes=3)
    timm.models.save_for_hf(model, tmp_path / "teacher", safe_serialization=False)
    monkeypatch.setattr(
        hub, "hf_hub_download", lambda _, file, **__: str(tmp_path / "teacher" / file)
    )
    ended = run(*TINY, "--data-path", data_path, "--distillation-type", "hard", "--teacher-model",
                "test_resnet", "--teacher-path", NAME)  # fmt: skip
    assert ended.code == 0, ended.err
    assert "The teacher test_resnet gets" in ended.out


def test_weights_of_a_folder_run_nothing(folder, tmp_path):
    """Such a file comes where there is no model.safetensors."""
    shutil.copy(folder / hub.CONFIG, tmp_path)
    torch.save({"head.bias": Malicious(tmp_path / "proof")}, tmp_path / hub.WEIGHTS[1])
    with pytest.raises(ValueError, match="because they could run code"):
        checkpoint.load(tmp_path)
    assert not (tmp_path / "proof").exists()


def test_what_cannot_be_had_is_told(on_the_hub, folder, tmp_path, monkeypatch, run):
    def unreachable(*_, **__):
        raise LocalEntryNotFoundError("Check your connection.\nMore.")

    monkeypatch.setattr(hub, "hf_hub_download", unreachable)
    ended = run("--eval", *TINY, "--resume", NAME, "--data-path", tmp_path)
    assert ended.code == 2
    assert ended.err.count("\n") == 1
    assert f"cannot download {NAME}: Check your connection. (name it" in ended.err
    monkeypatch.undo()
    with pytest.raises(ValueError, match="cannot download hf-hub:no name: "):
        checkpoint.load("hf-hub:no name")
    with pytest.raises(ValueError, match="holds no config.json: name a file in it"):
        checkpoint.load(tmp_path)
    shutil.copytree(folder, tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="other: it is truncated, corrupt"):
        checkpoint.load(tmp_path / "other")


def test_a_push_uploads_the_folder_and_keeps_a_card(trained, monkeypatch, tmp_path):
    uploaded = {}

    class Api:
        def __init__(self, **_): ...

        def create_repo(self, name, exist_ok):
            assert exist_ok
            return type("Address", (), {"repo_id": f"me/{name}"})

        def file_exists(self, name, file):
            return False

        def upload_folder(self, *, repo_id, folder_path, ignore_patterns, **_):
            shutil.copytree(folder_path, tmp_path / "hub", ignore=lambda *_: ignore_patterns or [])
            uploaded[repo_id] = sorted(path.name for path in (tmp_path / "hub").iterdir())

    monkeypatch.setattr(publishing, "HfApi", Api)
    assert publishing.push_to_hf_hub(pretrained.load(trained), "name") == "hf-hub:me/name"
    assert uploaded == {"me/name": ["README.md", "config.json", "model.safetensors"]}
    assert json.loads((tmp_path / "hub" / "config.json").read_text())["architecture"]
    monkeypatch.setattr(Api, "file_exists", lambda *_: True)
    shutil.rmtree(tmp_path / "hub")
    publishing.push_to_hf_hub(pretrained.load(trained), "name")
    assert uploaded == {"me/name": ["config.json", "model.safetensors"]}


@pytest.mark.parametrize(
    ("name", "said"), [("me/name", "refused"), ("no name", "Repo id must use alphanumeric chars")]
)
def test_a_push_that_fails_is_told(name, said, trained, monkeypatch):
    closed = partial(HfApi, endpoint="http://127.0.0.1:9", token="none")
    monkeypatch.setattr(publishing, "HfApi", closed)
    with pytest.raises(UserError, match=f"cannot upload {name} \\(.*{said}.*: name it OWNER/NAME"):
        publishing.push_to_hf_hub(pretrained.load(trained), name)


@pytest.mark.parametrize("half", [False, True])
def test_a_small_checkpoint_serves_every_command(half, trained, data_path, run, tmp_path):
    path = tmp_path / "small.pth"
    publishing.save_weights(pretrained.load(trained), path, half=half)
    assert path.stat().st_size < trained.stat().st_size / (6 if half else 3)
    line = score(run, "--resume", path, "--data-path", data_path)
    assert (
        line.split(" loss ")[0]
        == score(run, "--resume", trained, "--data-path", data_path).split(" loss ")[0]
    )
    assert pretrained.load(path).classes == pretrained.load(trained).classes
