import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from timm.data.auto_augment import AugmentOp
from torchvision import transforms
from torchvision.transforms.functional import pil_to_tensor

from augment import (
    build_batch_transform,
    build_eval_transform,
    build_train_transform,
    posterize_to_black,
)
from datasets import build_dataset

MEAN = {"mean": (0.5, 0.4, 0.3)}
MIX = {"prob": 1.0, "switch_prob": 0.5, "mode": "batch", "smoothing": 0.1, "num_classes": 4}


@pytest.fixture
def image() -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (48, 40, 3), np.uint8)
    return Image.fromarray(noise)


def steps(transform) -> list:
    """The single steps of nested Compose."""
    if isinstance(transform, transforms.Compose):
        return [step for part in transform.transforms for step in steps(part)]
    return [transform]


def step_names(**kwargs) -> list[str]:
    return [type(step).__name__ for step in steps(build_train_transform(**MEAN, **kwargs))]


@pytest.mark.slow
def test_the_default_recipe_survives_5000_images():
    images, _ = build_dataset("DEMO", "", train=True)
    transform = build_train_transform(input_size=28, **MEAN)
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    outputs = torch.stack([transform(images[i][0]) for i in range(5000)])
    assert outputs.shape == (5000, 3, 28, 28)
    assert outputs.isfinite().all()


@pytest.mark.parametrize("name", ["PosterizeIncreasing", "Posterize"])
def test_posterize_to_no_bits_is_black(name, image):
    magnitude = 10 if name == "PosterizeIncreasing" else 0
    black = AugmentOp(name, prob=1.0, magnitude=magnitude)(image)
    assert black.size == image.size
    assert black.mode == "RGB"
    assert not np.asarray(black).any()


def test_posterize_to_some_bits_is_unchanged(image):
    assert posterize_to_black(image, 2) == ImageOps.posterize(image, 2)
    assert posterize_to_black(image, 8) == image


@pytest.mark.parametrize(
    "aa", ["original", "v0", "augmix-m5", "rand-m15-mmax30-inc1", "none", "", None]
)
def test_policies_give_bytes_and_can_be_pickled(aa, image):
    transform = build_train_transform(input_size=40, aa=aa, **MEAN)
    transform = pickle.loads(pickle.dumps(transform))
    for _ in range(60):
        output = transform(image)
        assert output.shape == (3, 40, 40)
        assert output.dtype is torch.uint8


def test_what_a_moved_image_leaves_bare_has_the_mean_colour():
    transform = build_train_transform(input_size=40, aa="rand-m9-n3-p1", **MEAN)
    policy = steps(transform)[2]
    assert {op.hparams["img_mean"] for op in policy.ops} == {(128, 102, 76)}


def test_steps_of_the_training_recipes():
    end = ["MaybePILToTensor"]
    large = ["RandomResizedCropAndInterpolation", "RandomHorizontalFlip"]
    small = ["Resize", "RandomCrop", "RandomHorizontalFlip"]
    assert step_names(input_size=224) == [*large, "RandAugment", *end]
    assert step_names(input_size=32) == [*small, "RandAugment", *end]
    assert step_names(input_size=33, aa="None") == [*large, "ColorJitter", *end]
    assert step_names(input_size=33, aa="", color_jitter=0) == [*large, *end]
    three = ["AutoAugment", "ColorJitter", *end]
    assert step_names(input_size=224, three_augment=True) == [*large, *three]
    assert step_names(input_size=224, three_augment=True, simple_random_crop=True) == [
        *small,
        *three,
    ]


@pytest.mark.parametrize(("simple", "mode"), [(False, "constant"), (True, "reflect")])
def test_small_images_are_cropped_with_padding(simple, mode):
    transform = build_train_transform(
        input_size=32, interpolation="random", simple_random_crop=simple, **MEAN
    )
    resize, crop = steps(transform)[:2]
    assert (crop.size, crop.padding, crop.padding_mode) == ((32, 32), 4, mode)
    same_size = Image.new("RGB", (32, 32))
    assert resize(same_size) is same_size
    assert resize(Image.new("RGB", (64, 80))).size == (32, 40)


def test_three_augment_is_one_of_grayscale_solarize_blur(image):
    policy = steps(build_train_transform(input_size=40, three_augment=True, **MEAN))[2]
    outputs = [policy(image) for _ in range(60)]
    gray, solarized = ImageOps.grayscale(image).convert("RGB"), ImageOps.solarize(image, 128)
    blurred = [output for output in outputs if output not in (gray, solarized)]
    assert gray in outputs
    assert solarized in outputs
    assert 0 < len(blurred) < 60
    assert all(np.asarray(output).std() < np.asarray(image).std() for output in blurred)


def test_evaluation_resizes_and_crops_the_centre(image):
    expected = transforms.Compose(
        [
            transforms.Resize(73, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(64),
            transforms.PILToTensor(),
        ]
    )
    transform = build_eval_transform(input_size=64)
    assert transform(image).equal(expected(image))
    assert build_eval_transform(input_size=64, crop_ratio=1.0)(image).shape == (3, 64, 64)


def test_evaluation_keeps_small_images_whole(image):
    transform = build_eval_transform(input_size=32)
    small = image.crop((0, 0, 32, 32))
    assert transform(small).equal(pil_to_tensor(small))
    assert transform(image).shape == (3, 32, 32)


@pytest.mark.parametrize(
    "wrong",
    ["foo", "rand-q9", "rand-m9-foo", "v0-m"],
)
def test_unknown_augmentation_is_an_error(wrong):
    with pytest.raises(ValueError, match="timm has no augmentation .* use for instance"):
        build_train_transform(input_size=32, aa=wrong, **MEAN)


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    np.random.seed(0)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 3, 16, 16, generator=generator), torch.arange(6) % 4


def test_without_mixup_the_batch_stays(batch):
    transform = build_batch_transform(mixup=0, cutmix=0, cutmix_minmax=None, **MIX)
    assert all(a is b for a, b in zip(transform(*batch), batch, strict=True))


@pytest.mark.parametrize(
    "active",
    [
        {"mixup": 0.8, "cutmix": 0, "cutmix_minmax": None},
        {"mixup": 0, "cutmix": 1.0, "cutmix_minmax": None},
        {"mixup": 0, "cutmix": 0, "cutmix_minmax": (0.2, 0.8)},
    ],
)
def test_mixup_and_cutmix_mix_samples_and_targets(active, batch):
    samples, targets = build_batch_transform(**active, **MIX)(batch[0].clone(), batch[1])
    assert samples.shape == batch[0].shape
    assert not samples.equal(batch[0])
    torch.testing.assert_close(targets.sum(1), torch.ones(6))
    assert targets.min() > 0  # label smoothing


@pytest.mark.parametrize("mixup", [0, 0.8])
def test_cosub_repeats_the_mixed_samples_only(mixup, batch):
    transform = build_batch_transform(mixup=mixup, cutmix=0, cutmix_minmax=None, cosub=True, **MIX)
    samples, targets = transform(*batch)
    assert samples.shape[0] == 12
    assert samples[:6].equal(samples[6:])
    assert targets.shape[0] == 6


@pytest.mark.parametrize("size", [(16, 24), (40, 48)])
def test_training_images_need_not_be_square(size):
    transform = build_train_transform(input_size=size, **MEAN)
    assert transform(Image.new("RGB", (60, 50))).shape == (3, *size)
