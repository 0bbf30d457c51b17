"""Images that stay on the device: the same images, trained on reproducibly."""

from types import SimpleNamespace

import pytest
import torch
from helpers import TINY, assert_same_run, refused, slow
from test_resume import signal_at

import checkpoint
import loaders
import main
import optimizer_step
from cached_images import CachedLoader
from samplers import EpochSampler

CACHED = (*TINY, "--cache", "--epochs", "3", "--warmup-epochs", "1", "--mask_type", "Selective",
          "--drop-path", "0.3", "--no-model-ema")  # fmt: skip


class Counted(torch.utils.data.Dataset):
    """Images of their own index, which counts how often each is decoded."""

    classes = ("a", "b")

    def __init__(self, length: int) -> None:
        self.decoded = [0] * length

    def __len__(self) -> int:
        return len(self.decoded)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.decoded[index] += 1
        return torch.full((3, 2, 2), index, dtype=torch.uint8), index % 2


def loader(dataset, sampler, **options) -> CachedLoader:
    options = {"transform": lambda images: images, "device": torch.device("cpu"), **options}
    return CachedLoader(dataset, 8, sampler=sampler, **options)


def test_batches_are_those_of_the_sampler_and_decoded_once():
    dataset, sampler = Counted(50), EpochSampler(50)
    batches = loader(dataset, sampler, drop_last=True)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        drawn = [index for index, _ in sampler]
        seen = [(images[:, 0, 0, 0].tolist(), labels.tolist()) for images, labels in batches]
        assert len(seen) == len(batches) == 6
        assert [i for images, _ in seen for i in images] == drawn[:48]
        assert [i for _, labels in seen for i in labels] == [index % 2 for index in drawn[:48]]
    assert set(dataset.decoded) == {1}


def test_the_last_batch_of_an_evaluation_is_kept():
    batches = loader(Counted(50), range(1, 50, 2))
    assert [len(labels) for _, labels in batches] == [8, 8, 8, 1]
    assert len(batches) == 4


def test_decoding_does_not_disturb_a_step():
    """It draws random numbers, and a run that goes on decodes at another step."""
    batches = loader(Counted(50), EpochSampler(50))
    stream = iter(batches)
    torch.manual_seed(0)
    next(stream)
    drawn = torch.rand(3)
    torch.manual_seed(0)
    assert drawn.equal(torch.rand(3))


def test_evaluation_is_that_without_the_cache(run, data_path, tmp_path):
    assert run(*CACHED, "--data-path", data_path, "--output_dir", tmp_path).code == 0
    scores = []
    for more in ((), ("--cache",)):
        ended = run(*TINY, *more, "--mask_type", "Selective", "--eval", "--data-path", data_path,
                    "--resume", tmp_path / "checkpoint.pth")  # fmt: skip
        scores.append([line for line in ended.out.splitlines() if line.startswith("* Acc@1")])
    assert scores[0] == scores[1]
    assert len(scores[0]) == 1


@pytest.mark.parametrize("interval", [slow(1), 2])
def test_an_interrupted_run_equals_a_whole_one(interval, run, data_path, tmp_path, monkeypatch):
    options = (*CACHED, "--data-path", data_path, "--eval-interval", interval)
    assert run(*options, "--output_dir", tmp_path / "whole").code == 0
    options = (*options, "--output_dir", tmp_path / "run")
    with monkeypatch.context() as patch:
        signal_at(patch, optimizer_step, "seed_everything", 20, 15)
        assert run(*options).code == 128 + 15
    saved = checkpoint.load(tmp_path / "run" / "checkpoint.pth")
    assert (saved["epoch"], saved["step"]) == (0, 5)
    assert run(*options, "--resume", "auto", "--num_workers", "1").code == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_training_images_are_augmented(data_path):
    args = main.get_args_parser().parse_args([*CACHED, "--data-path", str(data_path)])
    world = main.init_distributed("cpu")
    images = main.choose_preprocessing(args, None, keep_size=False)
    streams = []
    for no_aug in (True, False):
        args.no_aug = no_aug
        batches, _ = main.build_train_loader(args, world, images)
        torch.manual_seed(0)
        streams.append(next(iter(batches)))
    (plain, labels), (augmented, same_labels) = streams
    assert labels.equal(same_labels)
    assert plain.shape == augmented.shape == (8, 3, 16, 16)
    assert ((plain - augmented).abs().mean((1, 2, 3)) > 0.1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--input-size 64", "for images of up to 32 pixels, not 64"),
        ("--aa original", "no augmentation 'original' for whole batches"),
        ("--aa none", "no --color-jitter: leave one of them out"),
        ("--ThreeAugment --src", "no --ThreeAugment and no --src"),
        ("--remode nonsense", "no --remode nonsense"),
    ],
)
def test_what_the_cache_cannot_do(options, message, run, data_path, tmp_path):
    ended = run(*CACHED, *options.split(), "--data-path", data_path, "--output_dir", tmp_path / "x")
    refused(ended, message, tmp_path / "x")


def test_unaugmented_training_is_free_of_these(run, data_path):
    options = ("--no-aug", "--aa", "none", "--epochs", "1", "--data-path", data_path)
    assert run(*CACHED, *options).code == 0


def epochs_with_test(folder) -> list[bool]:
    return ["test_acc1" in line for line in (folder / "log.txt").read_text().splitlines()]


def test_evaluation_interval(run, data_path, tmp_path):
    options = (*TINY, "--epochs", "5", "--data-path", data_path, "--output_dir", tmp_path)
    assert run(*options, "--eval-interval", "3").code == 0
    assert epochs_with_test(tmp_path) == [False, False, True, False, True]
    assert checkpoint.load(tmp_path / "checkpoint.pth")["epoch"] == 4
    assert checkpoint.load(tmp_path / "checkpoint.previous.pth")["epoch"] == 2


def test_held_out_images_are_not_trained_on(data_path):
    args = main.get_args_parser().parse_args(
        [*TINY, "--no-aug", "--data-path", str(data_path), "--holdout", "20"]
    )
    world = SimpleNamespace(rank=0, size=1, device=torch.device("cpu"))
    world.main_first = main.World(0, 1, world.device).main_first
    kept, held = (main.image_loading(args).find(world, train=train) for train in (True, False))
    assert (len(kept), len(held)) == (100, 20)
    assert kept.classes == held.classes == ["class0", "class1", "class2"]
    every = [image.tobytes() for part in (kept, held) for image, _ in part]
    args.holdout = 0
    assert sorted(every) == sorted(
        image.tobytes() for image, _ in main.image_loading(args).find(world, train=True)
    )
    args.holdout, args.seed = 20, 5
    again = main.image_loading(args).find(world, train=False)
    assert again.indices.tolist() == held.indices.tolist() != list(range(20))


def test_holding_out_everything_is_refused(run, data_path):
    refused(run(*TINY, "--data-path", data_path, "--holdout", "120"), "leaves none of the 120")


def test_augmentation_is_compiled_with_the_model(data_path, monkeypatch):
    compiled = []

    def note(transform, backend):
        compiled.append(backend)
        return transform

    monkeypatch.setattr(loaders, "compile_augmentation", note)
    world = main.init_distributed("cpu")
    for options in (CACHED, TINY):
        for more in ((), ("--torchcompile", "aot_eager")):
            arguments = [*options, "--data-path", str(data_path), *more]
            args = main.get_args_parser().parse_args(arguments)
            images = main.choose_preprocessing(args, None, keep_size=False)
            main.build_train_loader(args, world, images)
    assert compiled == ["aot_eager"] * 2
