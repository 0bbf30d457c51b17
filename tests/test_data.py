import errno
import gzip
import json
import logging
import os
import pickle
import sys
import types
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from helpers import write_image
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100, Flowers102

import datasets
from datasets import ALIASES, DATASETS, build_dataset
from errors import UserError


def write_image_bytes(path: Path) -> None:
    """An image whatever the file's name is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        Image.new("RGB", (8, 8)).save(file, "PNG")


def write_idx(path: Path, array: np.ndarray) -> None:
    content = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
    content += array.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_fashion_mnist(folder: Path, suffix: str = "", images: int = 3, labels: int = 3) -> None:
    for split in ("train", "t10k"):
        pixels = np.arange(images * 28 * 28).reshape(images, 28, 28).astype(np.uint8)
        write_idx(folder / f"{split}-images-idx3-ubyte{suffix}", pixels)
        write_idx(folder / f"{split}-labels-idx1-ubyte{suffix}", np.arange(labels, dtype=np.uint8))


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(datasets, "DEBIAN_FASHION_MNIST", tmp_path / "no such package")


# Which images


@pytest.mark.parametrize(("train", "count"), [(True, 10_000), (False, 2_000)])
def test_demo_is_balanced_rgb(train, count):
    dataset, num_classes = build_dataset("DEMO", "/ignored", train=train)
    assert (len(dataset), num_classes) == (count, 10)
    assert np.bincount(dataset.labels).tolist() == [count // 10] * 10
    image, label = dataset[0]
    assert (image.size, image.mode, type(label)) == ((28, 28), "RGB", int)
    assert dataset.classes[9] == "Ankle boot"


def test_demo_is_part_of_fashion_mnist():
    if not datasets.DEBIAN_FASHION_MNIST.is_dir():
        pytest.skip("needs the Debian package dataset-fashion-mnist")
    for train, count in ((True, 60_000), (False, 10_000)):
        whole, _ = build_dataset("FMNIST", "/does/not/exist", train=train)
        part, _ = build_dataset("DEMO", "", train=train)
        assert len(whole) == count
        labels = dict(zip(map(bytes, whole.images), whole.labels, strict=True))
        found = [labels.get(bytes(image)) for image in part.images]
        assert found == part.labels.tolist()


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("folder", ["", "FashionMNIST/raw"])
def test_fashion_mnist_from_a_folder(folder, suffix, tmp_path):
    write_fashion_mnist(tmp_path / folder, suffix)
    dataset, num_classes = build_dataset("FMNIST", tmp_path, train=False)
    assert (len(dataset), num_classes) == (3, 10)
    image, label = dataset[1]
    assert label == 1
    assert np.array_equal(np.asarray(image)[..., 2], dataset.images[1])


def test_image_folder(image_folder):
    train, num_classes = build_dataset("IMNET", str(image_folder), train=True)
    assert (len(train), num_classes, train.classes) == (8, 2, ["cat", "dog"])
    (image_folder / "val").rename(image_folder / "validation")
    evaluation, _ = build_dataset(
        "IMNET", image_folder, train=False, transform=lambda image: image.getpixel((0, 0))
    )
    assert list(evaluation) == [
        ((v,) * 3, label) for v, label in ((0, 0), (1, 0), (100, 1), (101, 1))
    ]


def test_hidden_and_other_files_are_left_out_and_counted(image_folder, caplog):
    """Jupyter, macOS and network disks leave copies and folders of their own."""
    for path in (
        ".ipynb_checkpoints/0.png",
        "cat/.ipynb_checkpoints/0-checkpoint.png",
        "cat/.thumbnails/small/0.png",
        "dog/._0.png",
        "dog/.DS_Store",
        "flat.png",
        "cat/0.jfif",
        "cat/1.JFIF",
        "cat/0.avif",
        "dog/more/0.gif",
        "dog/README",
    ):
        write_image_bytes(image_folder / "train" / path)  # fmt: skip
    write_image(image_folder / "train/cat/more/9.PNG", 9)
    with caplog.at_level(logging.INFO):
        dataset, num_classes = build_dataset("IMNET", image_folder, train=True)
    assert (num_classes, dataset.classes, len(dataset)) == (2, ["cat", "dog"], 9)
    assert [image.getpixel((0, 0))[0] for image, _ in dataset] == [0, 1, 2, 3, 9, *range(100, 104)]
    (message,) = caplog.messages
    assert message.startswith(f"{image_folder / 'train'}: 11 files are left out (5 hidden, 2 .jfif")
    for kind in ("1 .avif", "1 .gif", "1 without a suffix", "1 outside of class folders"):
        assert kind in message
    assert "read are .jpg, .jpeg, .png" in message


def test_nothing_is_said_where_nothing_is_left_out(image_folder, caplog):
    with caplog.at_level(logging.INFO):
        build_dataset("IMNET", image_folder, train=True)
    assert caplog.messages == []


@pytest.mark.parametrize("name", ["0.jfif", ".ipynb_checkpoints/0.png"])
def test_a_class_of_nothing_that_is_read_is_an_error(name, image_folder):
    write_image_bytes(image_folder / "train/emu" / name)
    kind = "hidden" if name.startswith(".") else ".jfif"
    rejects(
        f"train/emu has no images \\(1 {kind}; read are .jpg, .*\\): fill", "IMNET", image_folder
    )


def test_only_hidden_folders_are_no_classes(tmp_path):
    write_image(tmp_path / "train/.cache/0.png")
    rejects("train has no class folders", "IMNET", tmp_path)


def test_hidden_folders_make_no_difference_between_splits(image_folder):
    write_image(image_folder / "train/.ipynb_checkpoints/0.png")
    dataset, _ = build_dataset("IMNET", image_folder, train=False)
    assert dataset.classes == ["cat", "dog"]


@pytest.mark.parametrize(("name", "cifar"), [("CIFAR10", CIFAR10), ("CIFAR", CIFAR100)])
def test_cifar_is_read_without_a_download(name, cifar, tmp_path, monkeypatch, no_network):
    key = "fine_labels" if cifar is CIFAR100 else "labels"
    images = np.arange(2 * 3072).reshape(2, 3072).astype(np.uint8)
    meta = dict(cifar.meta, md5=None)
    contents = {
        "some": {"data": images, key: [1, 0]},
        meta["filename"]: {meta["key"]: ["apple", "bear"]},
    }
    folder = tmp_path / cifar.base_folder
    folder.mkdir()
    for file, content in contents.items():
        (folder / file).write_bytes(pickle.dumps(content))
    monkeypatch.setattr(cifar, "train_list", [["some", None]])
    monkeypatch.setattr(cifar, "test_list", [])
    monkeypatch.setattr(cifar, "meta", meta)
    dataset, num_classes = build_dataset(name, tmp_path, train=True)
    assert (num_classes, dataset[0][0].mode, dataset[0][1]) == (2, "RGB", 1)


def test_flowers_trains_on_train_and_val(tmp_path, monkeypatch):
    tables = {
        "setid.mat": {
            k: np.array(v) for k, v in {"trnid": [1], "valid": [3], "tstid": [2, 4]}.items()
        },
        "imagelabels.mat": {"labels": np.array([5, 6, 7, 8])},
    }
    scipy_io = types.SimpleNamespace(loadmat=lambda path, **_: tables[path.name])
    monkeypatch.setitem(sys.modules, "scipy", types.SimpleNamespace(io=scipy_io))
    monkeypatch.setitem(sys.modules, "scipy.io", scipy_io)
    monkeypatch.setattr(Flowers102, "_check_integrity", lambda self: True)
    for i in range(1, 5):
        write_image(tmp_path / f"flowers-102/jpg/image_{i:05d}.jpg")
    for train, labels in ((True, [4, 6]), (False, [5, 7])):
        dataset, num_classes = build_dataset("FLOWERS", tmp_path, train=train)
        assert (num_classes, len(dataset.classes)) == (102, 102)
        assert [label for _, label in dataset] == labels

    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(ValueError, match="Flowers102 needs scipy"):
        build_dataset("FLOWERS", tmp_path, train=True)


@pytest.fixture
def inat_folder(tmp_path) -> Path:
    levels = [("Plantae", "rose"), ("Animalia", "wolf"), ("Animalia", "bear")]
    categories = [
        {"id": 10 + i, "kingdom": kingdom, "name": name} for i, (kingdom, name) in enumerate(levels)
    ]
    (tmp_path / "categories.json").write_text(json.dumps(categories))
    for split in ("train2018", "val2018", "train2019"):
        files = [f"{split}/x/{i}.jpg" for i in range(3)]
        content = {
            "images": [{"id": 7 * i, "file_name": file} for i, file in enumerate(files)],
            "annotations": [{"image_id": 7 * i, "category_id": 10 + i} for i in (2, 0, 1)],
        }
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
        for i, file in enumerate(files):
            write_image(tmp_path / file, 50 * i)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "train", "level", "classes", "labels"),
    [
        ("INAT18", True, "name", ["bear", "rose", "wolf"], [0, 1, 2]),
        ("INAT", False, "kingdom", ["Animalia", "Plantae"], [0, 1, 0]),
        ("INAT19", True, "name", ["bear", "rose", "wolf"], [0, 1, 2]),
    ],
)
def test_inaturalist(name, train, level, classes, labels, inat_folder):
    dataset, num_classes = build_dataset(name, inat_folder, train=train, inat_category=level)
    assert (num_classes, dataset.classes) == (len(classes), classes)
    assert [label for _, label in dataset] == labels
    assert [round(image.getpixel((0, 0))[0], -1) for image, _ in dataset] == [100, 0, 50]


# Errors


def rejects(match: str, name: str, path: Path, **kwargs) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        build_dataset(name, path, **{"train": True} | kwargs)
    assert "\n" not in str(caught.value)


def test_unknown_name_is_an_error(tmp_path):
    rejects("Unknown data set 'MNIST': choose one of IMNET, .*, INAT", "MNIST", tmp_path)
    assert set(ALIASES.values()) < set(DATASETS)


def test_image_folder_errors(image_folder):
    rejects("The data folder .*/nowhere does not exist", "IMNET", image_folder / "nowhere")
    write_image(image_folder / "val/emu/0.png")
    rejects("only one of them has emu", "IMNET", image_folder, train=False)
    (image_folder / "train/ant").mkdir()
    rejects("The class folder .*/train/ant has no images: fill", "IMNET", image_folder)
    rejects("has no folder train: IMNET needs", "IMNET", image_folder / "val")
    rejects("has no folder val or validation or test", "IMNET", image_folder / "val", train=False)
    (image_folder / "empty/train").mkdir(parents=True)
    rejects("empty/train has no class folders", "IMNET", image_folder / "empty")


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100", "FLOWERS", "FMNIST"])
def test_failed_download_is_an_error(name, tmp_path, no_network):
    rejects("is not complete in .* and could not be downloaded", name, tmp_path)


def test_broken_fashion_mnist_is_an_error(tmp_path):
    write_fashion_mnist(tmp_path, labels=2)
    rejects("hold 3 images but 2 labels", "FMNIST", tmp_path)
    images = tmp_path / "train-images-idx3-ubyte"
    for content in (b"", images.read_bytes()[:-1], b"<html>"):
        images.write_bytes(content)
        rejects("train-images-idx3-ubyte is not a complete IDX file", "FMNIST", tmp_path)
    images.unlink()
    packed = gzip.compress(bytes(1000))
    for content in (packed[:-12], packed[:12] + b"x" * 12, b"<html>"):
        (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(content)
        rejects("ubyte.gz is not a complete IDX file", "FMNIST", tmp_path)


def test_inaturalist_errors(inat_folder):
    rejects("category 'size': choose one of kingdom", "INAT18", inat_folder, inat_category="size")
    rejects("do not fit together .*'genus'", "INAT18", inat_folder, inat_category="genus")
    rejects("val2019.json is missing or no json", "INAT19", inat_folder, train=False)
    rejects("folder .* does not exist", "INAT18", inat_folder / "nowhere")


def test_a_single_class_is_nothing_to_learn(tmp_path):
    for split in ("train", "val"):
        write_image(tmp_path / split / "cat" / "1.png")
    with pytest.raises(UserError, match="train has one class folder alone: put the images of each"):
        build_dataset("IMNET", tmp_path, train=True)
    assert build_dataset("IMNET", tmp_path, train=False)[1] == 1


def test_a_folder_that_cannot_be_listed_is_an_error(image_folder, monkeypatch):
    scandir, closed = os.scandir, image_folder / "train" / "cat" / "more"
    write_image(closed / "1.png")

    def refusing(path):  # as for a user without the right to read it
        if Path(path) == closed:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError, match="cat/more cannot be read .Permission denied"):
        build_dataset("IMNET", image_folder, train=True)
