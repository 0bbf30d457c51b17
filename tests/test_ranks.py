"""Ranks whose arguments, data, weights or checkpoints differ do not start."""

import os
import re
import shutil
import socket
from pathlib import Path

import pytest
import torch
from helpers import (
    TINY,
    Ranks,
    call_main,
    make_image_folder,
    rendezvous,
    slow,
)
from test_mlm_pretrain import short

import checkpoint
import main

HOST = re.escape(socket.gethostname())


@pytest.fixture(scope="module")
def fewer_images(tmp_path_factory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("fewer"), train=117)


@pytest.fixture(scope="module")
def other_names(data_path, tmp_path_factory) -> Path:
    folder = shutil.copytree(data_path, tmp_path_factory.mktemp("other") / "images")
    (folder / "train" / "class0" / "0.png").rename(folder / "train" / "class0" / "z.png")
    return folder


def differing(rank: int, folder: Path, arguments: tuple, alone: tuple) -> None:
    """Rank 1 has more arguments, and a working directory of its own."""
    os.chdir(folder.parent / f"of{rank}")
    more = alone if rank else ()
    call_main(*TINY, *arguments, *more, "--dist_url", rendezvous(folder))


def refused(folder: Path, arguments: tuple, alone: tuple, message: str) -> None:
    for rank in (0, 1):
        (folder / f"of{rank}").mkdir(exist_ok=True)
    ranks = Ranks(folder, arguments, alone, function=differing)
    assert ranks.wait() == [2, 2], ranks.errors()
    sentence = message.replace("RANK", rf"rank \d on {HOST}")
    assert re.fullmatch(rf"main\.py: error: The processes differ in {sentence}\n", ranks.errors())
    assert ranks.errors(1) == ""


@pytest.mark.parametrize("mode", [(), slow(("--eval",))], ids=["training", "evaluation"])
def test_arguments_that_differ(mode, data_path, tmp_path):
    message = r"--seed \(RANK: 0; RANK: 3\), the arguments given \(.*\): give them the same .*"
    refused(tmp_path, ("--data-path", data_path, *mode), ("--seed", "3"), message)


def test_another_number_of_images(fewer_images, data_path, tmp_path):
    message = (r"their number of training images \(rank 0 on HOST: 120; rank 1 on HOST: 117\), "
               "the names or labels of their training images .*: give .*")  # fmt: skip
    arguments = ("--data-path", data_path)
    refused(tmp_path, arguments, ("--data-path", fewer_images), message.replace("HOST", HOST))


def test_other_names_of_images(other_names, data_path, tmp_path):
    message = r"the names or labels of their training images \(RANK: \w{8}; RANK: \w{8}\): give .*"
    refused(tmp_path, ("--data-path", data_path), ("--data-path", other_names), message)


def test_fewer_images_to_evaluate(data_path, tmp_path, tmp_path_factory):
    fewer = make_image_folder(tmp_path_factory.mktemp("fewer"), train=3, test=18)
    message = (rf"their number of test images \(rank 0 on {HOST}: 21; rank 1 on {HOST}: 18\), "
               "the names or labels of their test images .*: give .*")  # fmt: skip
    refused(tmp_path, ("--data-path", data_path, "--eval"), ("--data-path", fewer), message)


def test_other_weights_to_evaluate(data_path, tmp_path):
    for rank in (0, 1):
        torch.manual_seed(rank)
        model = main.build_model(main.get_args_parser().parse_args(TINY), 3, 16)
        (tmp_path / f"of{rank}").mkdir()
        torch.save({"model": model.state_dict()}, tmp_path / f"of{rank}" / "weights.pth")
    arguments = ("--data-path", data_path, "--eval", "--resume", "weights.pth")
    refused(tmp_path, arguments, (), r"their weights \(RANK: \w{8}; RANK: \w{8}\): give .*")


def test_data_may_lie_elsewhere(data_path, tmp_path):
    shutil.copytree(data_path, tmp_path / "of1" / "images")
    (tmp_path / "of0").mkdir()
    alone = ("--data-path", "images", "--num_workers", "1")
    arguments = ("--data-path", data_path, "--batch-size", "40")
    ranks = Ranks(tmp_path, arguments, alone, function=differing)
    assert ranks.wait() == [0, 0], ranks.errors()


@pytest.mark.parametrize("epochs", [slow(1), 2], ids=["other weights", "another epoch"])
def test_another_checkpoint(epochs, run, data_path, tmp_path):
    arguments = ("--data-path", data_path, "--output_dir", "run", "--epochs", "3",
                 "--batch-size", "40")  # fmt: skip
    for rank in (0, 1):
        options = ("--epochs", epochs if rank else 1, "--seed", rank if epochs == 1 else 0)
        folder = tmp_path / f"of{rank}" / "run"
        assert run(*TINY, *arguments, *options, "--output_dir", folder).code == 0
    weights = r"their weights \(RANK: \w{8}; RANK: \w{8}\): give .*"
    stand = r"where they stand \(RANK: epoch 1, step 0; RANK: epoch 2, step 0\), "
    message = weights if epochs == 1 else stand + weights
    refused(tmp_path, (*arguments, "--resume", "auto"), (), message)


def other_settings(rank: int, folder: Path, data: list[Path], settings: list[dict]) -> None:
    short(data[rank], folder / "run", dist_url=rendezvous(folder), **settings[rank])


def test_pretraining_with_other_settings_or_data(corpus, tmp_path):
    for settings, message in (
        ([{"lr": 1e-3}, {"lr": 2e-3}], rf"lr \(rank 0 on {HOST}: 0.001; rank 1 on {HOST}: 0.002\)"),
        ([{}, {}], r"their training data \(.* windows of 16 tokens, .*\)"),
    ):
        other = corpus
        if not settings[0]:
            other = shutil.copytree(corpus, tmp_path / "other")
            shutil.copy(next(other.glob("eval-*.bin")), next(other.glob("train-*.bin")))
        ranks = Ranks(tmp_path, [corpus, other], settings, function=other_settings)
        assert ranks.wait() == [2, 2], ranks.errors()
        error = ranks.errors().splitlines()[-1]
        assert re.match(rf"mlm\.pretrain: error: The processes differ in {message}", error), error
        assert "error:" not in ranks.errors(1)


def going_on(rank: int, folder: Path, corpus: Path) -> None:
    os.chdir(folder.parent / f"of{rank}")
    short(corpus, "run", dist_url=rendezvous(folder), steps=2, resume="auto")


def test_pretraining_with_another_checkpoint(corpus, ending, tmp_path):
    assert ending(short, corpus, tmp_path / "of0" / "run", steps=2).code == 0
    other = shutil.copytree(tmp_path / "of0", tmp_path / "of1") / "run" / "checkpoint.pth"
    saved = checkpoint.load(other)
    next(iter(saved["model"].values()))[0] += 1
    checkpoint.save({**saved, "step": 1}, other)
    ranks = Ranks(tmp_path, corpus, function=going_on)
    assert ranks.wait() == [2, 2], ranks.errors()
    steps = rf"\(rank 0 on {HOST}: 2; rank 1 on {HOST}: 1\)"
    message = rf"The processes differ in their step {steps}, their weights \(.*\): give them"
    assert re.search(message, ranks.errors()), ranks.errors()
