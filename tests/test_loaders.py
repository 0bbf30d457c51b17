"""Batches: the same whoever loads them, without what cannot be read, from workers that end."""

import errno
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from helpers import ROOT, slow
from PIL import Image
from torch.utils.data import DataLoader

import workers
from augment import build_train_transform
from datasets import build_dataset
from errors import UserError
from loaders import DeviceLoader, ImageLoading, SeededDataset, build_eval_loader
from preprocessing import Preprocessing
from processes import World
from samplers import EpochSampler
from workers import ignore_signals

AUGMENTATION = {"input_size": 28, "mean": (0.5,) * 3}


# The stream of training samples


class Endless(torch.utils.data.Dataset):
    """Its images never come."""

    def __getitem__(self, index: int) -> None:
        time.sleep(1000)

    def __len__(self) -> int:
        return 4


def demo_loader(workers: int = 0, batch_size: int = 8, start: int = 0, **sampler) -> DataLoader:
    images, _ = build_dataset("DEMO", "", train=True)
    dataset = SeededDataset(images, build_train_transform(**AUGMENTATION), seed=3)
    order = EpochSampler(200, seed=3, **sampler)
    order.set_epoch(1, start)
    return DataLoader(
        dataset, batch_size, sampler=order, num_workers=workers, worker_init_fn=ignore_signals
    )


def stream(*args, **kwargs) -> list[torch.Tensor]:
    """All images and labels of a loader, one after the other."""
    images, labels = zip(*demo_loader(*args, **kwargs), strict=True)
    return [torch.cat(images), torch.cat(labels)]


def assert_equal(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert all(a.equal(e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker")
@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("repeats", [1, 3])
def test_the_stream_does_not_depend_on_the_workers(workers, repeats):
    assert_equal(stream(workers, repeats=repeats), stream(0, repeats=repeats))


def test_resume_gives_the_same_tail():
    assert_equal(stream(2, start=88), [part[88:] for part in stream(0)])


@pytest.mark.parametrize("repeats", [1, 3])
def test_two_ranks_see_the_batches_of_one(repeats):
    ranks = [stream(batch_size=4, num_replicas=2, rank=rank, repeats=repeats) for rank in (0, 1)]
    interleaved = [torch.stack(parts, 1).flatten(0, 1) for parts in zip(*ranks, strict=True)]
    assert_equal(interleaved, stream(batch_size=8, repeats=repeats))


def test_each_draw_is_augmented_differently():
    images, _ = stream(repeats=3)
    assert len({image.numpy().tobytes() for image in images}) > 190  # a few are black


def test_loading_in_the_training_process_leaves_its_random_states_alone():
    def numbers() -> tuple:
        return random.random(), np.random.standard_normal(), torch.rand(1).item()

    def seeded_numbers(between) -> list[tuple]:
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        return [numbers(), between(), numbers()][::2]

    dataset = demo_loader().dataset
    assert seeded_numbers(lambda: dataset[0, 5]) == seeded_numbers(lambda: None)


# Batches on the device


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_batches_are_transformed_on_the_device(device, image_folder):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    images, _ = build_dataset("IMNET", image_folder, train=True)
    dataset = SeededDataset(images, build_train_transform(**AUGMENTATION), seed=0)
    loader = DeviceLoader(
        dataset, 2, sampler=EpochSampler(8), device=torch.device(device), transform=torch.neg,
        pin_memory=device == "cuda",
    )  # fmt: skip
    for (batch, labels), keys in zip(loader, loader.batch_sampler, strict=True):
        assert batch.device.type == device
        assert batch.is_contiguous()
        assert batch.cpu().equal(-torch.stack([dataset[key][0] for key in keys]))
        assert labels.tolist() == [dataset[key][1] for key in keys]


# Corrupt images


def corrupt(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def corrupt_loader(root: Path, workers: int = 0, **kwargs) -> DataLoader:
    images, _ = build_dataset("IMNET", root, train=True)
    dataset = SeededDataset(images, lambda image: image.getpixel((0, 0))[0], seed=0, **kwargs)
    order = EpochSampler(len(dataset), shuffle=False)
    return DataLoader(dataset, sampler=order, batch_size=2, num_workers=workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_images_are_replaced_and_counted_once(workers, image_folder):
    corrupt(image_folder / "train/cat/3.png")
    (image_folder / "train/dog/0.png").write_bytes(b"")
    loader = corrupt_loader(image_folder, workers)
    for _epoch in range(2):
        values, labels = zip(*loader, strict=True)
        assert torch.cat(values).tolist() == [0, 1, 2, 101, 101, 101, 102, 103]
        assert torch.cat(labels).tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
        assert loader.dataset.corrupt_count == 2


def test_the_last_image_is_replaced_by_the_first(image_folder):
    corrupt(image_folder / "train/dog/3.png")
    assert corrupt_loader(image_folder).dataset[7, 0] == (0, 0)


def test_a_corrupt_image_is_named_once(image_folder, caplog):
    corrupt(image_folder / "train/dog/1.png")
    with caplog.at_level(logging.WARNING):
        dataset = corrupt_loader(image_folder).dataset
        assert dataset[5, 0] == dataset[5, 1] == (102, 1)
    (message,) = caplog.messages
    assert "without image 5: Cannot read the image" in message
    assert str(image_folder / "train/dog/1.png") in message


def test_an_image_is_not_corrupt_because_files_or_memory_are_used_up(image_folder, monkeypatch):
    dataset = corrupt_loader(image_folder).dataset
    for error in (OSError(errno.EMFILE, "Too many open files"), MemoryError()):
        monkeypatch.setattr(Image, "open", Mock(side_effect=error))
        with pytest.raises(UserError, match="Cannot read the image .*(many open|MemoryError)"):
            dataset[0, 0]
    assert dataset.corrupt_count == 0


@pytest.mark.parametrize("workers", [0, slow(2)])
def test_too_many_corrupt_images_are_an_error(workers, image_folder):
    for i in range(3):
        corrupt(image_folder / f"train/cat/{i}.png")
    assert len(list(corrupt_loader(image_folder, workers, max_corrupt=3))) == 4
    with pytest.raises(UserError, match="3 of 8 training images cannot be read, more than the 2"):
        list(corrupt_loader(image_folder, workers, max_corrupt=2))


def test_nothing_but_corrupt_images_is_an_error(image_folder):
    for path in (image_folder / "train").rglob("*.png"):
        corrupt(path)
    loader = corrupt_loader(image_folder)
    for _attempt in range(2):
        with pytest.raises(UserError, match="8 of 8 training images cannot be read"):
            next(iter(loader))


def test_a_corrupt_image_is_an_error_in_evaluation(image_folder):
    corrupt(image_folder / "val/cat/0.png")
    world = World()
    loading = ImageLoading("IMNET", str(image_folder), batch_size=2)
    loader = build_eval_loader(loading, world, Preprocessing(input_size=(3, 8, 8)))
    with pytest.raises(OSError, match="Cannot read the image .*/val/cat/0.png"):
        list(loader)


# Signals to the loader's workers


def test_workers_outlive_signals_and_end_with_their_loader():
    before = multiprocessing.active_children()  # of loaders that are not collected yet
    batches = iter(demo_loader(workers=2))
    received = [next(batches), next(batches)]
    workers = [child for child in multiprocessing.active_children() if child not in before]
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGINT)
    received += batches
    assert len(received) == 25
    del batches
    assert [worker.exitcode for worker in workers] == [0, 0]


class Counted(torch.utils.data.Dataset):
    """Counts, in all processes, how often each of its images is loaded."""

    def __init__(self) -> None:
        self.loaded = torch.zeros(5).share_memory_()

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.loaded[index] += 1
        return torch.zeros(3, 2, 2), index

    def __len__(self) -> int:
        return 5


def test_what_workers_load_at_their_start_is_used():
    images, loading = Counted(), ImageLoading("DEMO", "", num_workers=1)
    loader = loading.batches(
        images, 2, device=torch.device("cpu"), transform=torch.neg, sampler=[3, 1, 2, 0, 4]
    )
    loader.start()
    for count in (1, 2):
        labels = [label for _, batch in loader for label in batch.tolist()]
        assert labels == [3, 1, 2, 0, 4]
        assert images.loaded.tolist() == [count] * 5


@pytest.mark.parametrize(
    ("processes", "most"), [("", 12), ("1", 12), ("4", 3), ("16", 1), ("0", 12), ("x", 12)]
)
def test_processes_of_a_node_share_its_cores(processes, most, monkeypatch):
    monkeypatch.setattr(workers, "usable_cores", lambda: 12)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    counts = [workers.worker_options(count)["num_workers"] for count in (0, 1, 100)]
    assert counts == [0, 1, most]


def test_samples_are_no_objects_of_their_own(image_folder):
    """Reading a list in a worker would copy it, as it counts references."""
    images, _ = build_dataset("IMNET", image_folder, train=True)
    path, label = images.sample(len(images) - 1)
    assert Path(path).is_file()
    assert images[len(images) - 1][1] == label
    kinds = {type(value) for name, value in vars(images).items() if name.startswith("_")}
    assert kinds == {bytes, np.ndarray}


@pytest.mark.slow
def test_a_worker_that_hangs_ends_the_run(monkeypatch):
    assert workers.worker_options(0)["timeout"] == 0
    monkeypatch.setattr(workers, "PATIENCE", 0.5)
    loading = ImageLoading("DEMO", "", num_workers=1)
    batches = loading.batches(
        Endless(), 2, device=torch.device("cpu"), transform=torch.neg, sampler=range(4)
    )
    with pytest.raises(RuntimeError, match="timed out after 0.5 seconds"):
        next(iter(batches))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "code", "said"),
    [("raise RuntimeError", 1, "RuntimeError\n"), ("os.kill(os.getpid(), 9)", -9, "")],
)
def test_no_worker_outlives_its_process(end, code, said):
    script = f"""
import os, sys
sys.path.insert(0, "tests")
from test_loaders import demo_loader
batches = iter(demo_loader(workers=2))
next(batches), next(batches)
{end}
"""
    # A worker holds the output pipes open, so this would time out.
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, timeout=40, text=True
    )
    assert ended.returncode == code
    assert ended.stderr.endswith(said)
    assert "DataLoader worker" not in ended.stderr
