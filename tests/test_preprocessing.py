"""Images become what the weights were trained with, and it is said; arguments override."""

import json
from argparse import Namespace

import pytest
import timm
import torch
from helpers import TINY, VARIANT
from timm.data import create_transform

import checkpoint
import loaders
import main
import preprocessing
import pretrained
from losses import load_teacher
from preprocessing import Preprocessing

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5,) * 3, (0.5,) * 3)
PLAIN = ("--batch-size", "40", "--num_workers", "0", "--device", "cpu", "--epochs", "1",
         "--mixup", "0", "--cutmix", "0", "--drop-path", "0")  # fmt: skip
OWN = ("--mean", "0.1", "0.2", "0.3", "--std", "0.4", "0.5", "0.6", "--eval-crop-ratio", "0.5",
       "--interpolation", "bilinear", "--crop-mode", "squash")  # fmt: skip
OF_OWN = Preprocessing((3, 48, 48), "bilinear", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 0.5, "squash")


@pytest.fixture
def made(monkeypatch):
    """What loaders of evaluation are built with: each one's transform and normalisation."""
    noted = []
    init, build = loaders.DeviceLoader.__init__, loaders.build_normalization
    normalizations = []

    def noting(self, dataset, *args, **kwargs):
        init(self, dataset, *args, **kwargs)
        noted.append((dataset, *normalizations[-1]))

    def noting_normalization(*, mean, std, **kwargs):
        normalizations.append((tuple(mean), tuple(std)))
        return build(mean=mean, std=std, **kwargs)

    monkeypatch.setattr(loaders.DeviceLoader, "__init__", noting)
    monkeypatch.setattr(loaders, "build_normalization", noting_normalization)
    return noted


def evaluated(made, run, *arguments: object) -> Preprocessing:
    """What --eval really does to images, which it also says."""
    ended = run("--eval", "--num_workers", "0", "--device", "cpu", *arguments)
    assert ended.code == 0, ended.err
    dataset, mean, std = made[-1]
    resize, crop = dataset.transform.transforms[:2]
    (line,) = [line for line in ended.out.splitlines() if line.startswith("Images: ")]
    used = Preprocessing((3, *crop.size), resize.interpolation.value, mean, std)
    assert f"Images: {crop.size[0]}x{crop.size[1]} pixels" in line
    for values in (mean, std):
        assert f"({', '.join(f'{value:.4g}' for value in values)})" in line
    return used


def weights_of(name: str, tmp_path, **options) -> str:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **options)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    return str(tmp_path / "weights.pth")


# What is known of a model and of a checkpoint


@pytest.mark.parametrize(
    ("name", "mean_std", "crop", "interpolation"),
    [
        ("tf_efficientnet_lite0", HALF, 0.875, "bicubic"),
        ("vit_tiny_patch16_224", HALF, 0.9, "bicubic"),
        ("deit_tiny_patch16_224", IMAGENET, 0.9, "bicubic"),
        ("regnety_160", IMAGENET, 0.95, "bicubic"),
        ("mobilenetv3_large_100", IMAGENET, 0.875, "bicubic"),
        ("lion_tiny_patch16_224", IMAGENET, 0.875, "bicubic"),
        ("hydra_tiny_patch16_224", IMAGENET, 0.875, "bicubic"),
        ("vgg11", IMAGENET, 0.875, "bilinear"),
    ],
)
def test_weights_alone_are_of_timms_configuration(name, mean_std, crop, interpolation):
    known = preprocessing.of_model(name)
    assert (known.mean, known.std) == mean_std
    assert (known.crop_pct, known.interpolation) == (crop, interpolation)
    assert known.input_size == timm.get_pretrained_cfg(name).input_size


@pytest.mark.parametrize("name", ["lion_tiny", "hydra_tiny", "vim_tiny", "vit_tiny", "deit_tiny"])
def test_new_training_is_that_of_deit(name):
    assert preprocessing.of_new_training(f"{name}_patch16_224") == Preprocessing()


def test_new_training_of_other_models_is_that_of_timm():
    assert preprocessing.of_new_training("tf_efficientnet_lite0").mean == HALF[0]


def test_what_checkpoints_tell():
    name = "tf_efficientnet_lite0"
    tell = lambda saved: preprocessing.of_checkpoint(saved, name, "file")  # noqa: E731
    assert tell({"data_config": OF_OWN.state()}) == OF_OWN
    assert tell({"model": {}}) is None
    assert tell({"model": {}, "args": {"lr": 1}}) is None
    deit = {"data_set": "IMNET", "input_size": 384, "eval_crop_ratio": 1.0}
    assert tell({"args": deit}) == Preprocessing((3, 384, 384), crop_pct=1.0)
    of_timm = dict.fromkeys(("mean", "std", "interpolation", "crop_pct", "input_size", "img_size"))
    assert tell({"args": of_timm}) == preprocessing.of_model(name)
    of_timm |= {"mean": [0.1, 0.2, 0.3], "img_size": 192, "crop_pct": 0.8}
    known = tell({"args": of_timm})
    assert (known.mean, known.size, known.crop_pct) == ((0.1, 0.2, 0.3), 192, 0.8)
    assert known.std == HALF[1]
    changes = [{"size": 3}, {"mean": [0.5, 0.5]}, {"mean": "abc"}, {"mean": 1}, {"std": [0, 0, 0]},
               {"input_size": [3, 28]}, {"input_size": [3, 28, 0.5]}, {"interpolation": "foo"},
               {"crop_pct": 0.0}, {"crop_pct": "1"}, {"crop_mode": "x"}]  # fmt: skip
    for wrong in ({}, {"size": 3}, *(OF_OWN.state() | change for change in changes)):
        with pytest.raises(ValueError, match="data_config in file is not one that main.py writes"):
            tell({"data_config": wrong})


def test_the_record_is_that_of_timms_create_transform():
    transform = create_transform(**OF_OWN.state())
    assert [type(step).__name__ for step in transform.transforms][-1] == "Normalize"


# Evaluation


def test_another_size_resamples_the_position_embedding(trained, run, data_path, monkeypatch):
    built, evaluate = [], main.evaluate
    monkeypatch.setattr(main, "evaluate", lambda model, *args, **kwargs: (
        built.append(model) or evaluate(model, *args, **kwargs)))  # fmt: skip
    arguments = (*TINY, *VARIANT, "--data-path", data_path, "--eval", "--resume", trained)
    assert run(*arguments, "--input-size", "32").code == 0
    assert built[0].pos_embed.shape == (1, 65, 16)
    expected = pretrained.load(trained, input_size=32).model
    assert built[0].pos_embed.equal(expected.pos_embed)


@pytest.mark.parametrize(
    ("name", "mean_std"),
    [("test_efficientnet", IMAGENET), ("test_resnet", HALF), ("test_nfnet", HALF)],
)
def test_evaluation_of_weights_alone(name, mean_std, made, run, data_path, tmp_path):
    arguments = ("--model", name, "--resume", weights_of(name, tmp_path), "--data-path", data_path)
    used = evaluated(made, run, *arguments)
    assert (used.mean, used.std) == mean_std
    assert used.input_size == timm.get_pretrained_cfg(name).input_size
    used = evaluated(made, run, *arguments, "--input-size", "64", *OWN[:8])
    assert (used.mean, used.std, used.size) == (OF_OWN.mean, OF_OWN.std, 64)


def test_what_a_run_was_trained_with_is_kept_and_used(made, run, data_path, tmp_path):
    shared = ("--model", "test_resnet", "--data-path", data_path)
    arguments = (*PLAIN, *shared, "--output_dir", tmp_path / "run", "--input-size", "48", *OWN)
    assert run(*arguments).code == 0
    saved = checkpoint.load(tmp_path / "run" / "checkpoint.pth")
    assert saved["data_config"] == OF_OWN.state()
    resume = ("--resume", tmp_path / "run" / "checkpoint.pth")
    used = evaluated(made, run, *shared, *resume, "--output_dir", tmp_path / "scores")
    assert used == Preprocessing((3, 48, 48), "bilinear", OF_OWN.mean, OF_OWN.std)
    facts = json.loads((tmp_path / "scores" / "eval.json").read_text())
    assert facts["data_config"] == OF_OWN.state()
    # The default of an argument is no argument, but its value given is one.
    used = evaluated(made, run, *shared, *resume, "--input-size", "224", "--mean", "0", "0", "0")
    assert (used.size, used.mean, used.std) == (224, (0, 0, 0), OF_OWN.std)
    # A run that goes on, and one that starts from its weights, keep it, too.
    goes_on = (
        *PLAIN,
        *shared,
        "--output_dir",
        tmp_path / "run",
        "--epochs",
        "2",
        "--resume",
        "auto",
    )
    assert run(*goes_on).code == 0
    assert checkpoint.load(tmp_path / "run" / "checkpoint.pth")["data_config"] == OF_OWN.state()
    tuned = (*PLAIN, *shared, "--output_dir", tmp_path / "tuned", "--finetune", resume[1],
             "--input-size", "32")  # fmt: skip
    assert run(*tuned).code == 0
    record = checkpoint.load(tmp_path / "tuned" / "checkpoint.pth")["data_config"]
    assert record == OF_OWN.at(32).state()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lion_tiny_patch16_224", Preprocessing((3, 16, 16))),
        ("vit_tiny_patch16_224", Preprocessing((3, 16, 16))),
        ("test_resnet", Preprocessing((3, 16, 16), "bilinear", *HALF, 0.95)),
    ],
)
def test_the_record_of_new_training(name, expected, run, data_path, tmp_path):
    model = () if "patch16" in name else ("--model-kwargs",)
    arguments = (*TINY, "--model", name, *model, "--data-path", data_path, "--batch-size", "40")
    assert run(*arguments, "--output_dir", tmp_path / "run").code == 0
    assert checkpoint.load(tmp_path / "run" / "checkpoint.pth")["data_config"] == expected.state()


# Teachers


@pytest.mark.parametrize("recorded", [True, False], ids=["of main.py", "weights alone"])
def test_a_teacher_sees_what_it_was_trained_with(recorded, tmp_path):
    model = timm.create_model("test_resnet", num_classes=3).eval()
    record = Preprocessing((3, 24, 24), mean=(0.1, 0.2, 0.3), std=(0.3, 0.2, 0.1))
    content = {"model": model.state_dict()}
    if recorded:
        content |= {"data_config": record.state(), "args": vars(Namespace(data_set="IMNET"))}
    torch.save(content, tmp_path / "teacher.pth")
    mean, std = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    path = str(tmp_path / "teacher.pth")
    teacher = load_teacher("test_resnet", path, num_classes=3, input_size=32, mean=mean, std=std)
    seen = {}
    teacher.teacher.register_forward_hook(lambda _, inputs, __: seen.update(images=inputs[0]))
    pixels = torch.full((1, 3, 32, 32), 0.6)
    teacher.eval()((pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))
    own_mean, own_std = (record.mean, record.std) if recorded else HALF
    size = 24 if recorded else 32
    assert seen["images"].shape == (1, 3, size, size)
    expected = (0.6 - torch.tensor(own_mean)) / torch.tensor(own_std)
    assert torch.allclose(seen["images"].mean((0, 2, 3)), expected, atol=1e-4)


@pytest.mark.parametrize("size", [16, 160])
def test_a_teacher_of_fixed_size_is_built_for_what_its_weights_fit(size, tmp_path):
    weights = timm.create_model("test_vit", img_size=size, num_classes=3).state_dict()
    torch.save(weights, tmp_path / "vit.pth")
    teacher = load_teacher("test_vit", str(tmp_path / "vit.pth"), num_classes=3, input_size=16,
                           mean=HALF[0], std=HALF[1])  # fmt: skip
    assert teacher.size == (size, size)
    assert teacher(torch.zeros(1, 3, 16, 16)).shape == (1, 3)
