"""Augmentation of batches on their device against timm's and Pillow's of single images."""

import random

import numpy as np
import pytest
import torch
from kernel_cases import gpu
from PIL import Image
from timm.data.auto_augment import LEVEL_TO_ARG, NAME_TO_OP
from timm.data.random_erasing import RandomErasing
from torchvision.transforms.functional import normalize

import augment  # noqa: F401, mends timm's Posterize
import device_augment
from compilation import compile_augmentation
from device_augment import (
    OPERATIONS,
    RandAugment,
    build_device_transform,
    build_normalization,
    colours,
    geometry,
)

TIMM = {"Translate": "{}Rel"} | dict.fromkeys(
    ("Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness"), "{}Increasing"
)
MOVING = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
TABLES = ("Equalize", "Invert", "Posterize", "Solarize", "SolarizeAdd")  # whole numbers throughout
GREY = torch.full((3, 1, 1), 128.0)
STANDARD = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}  # keeps the pixels


def picture(size: int = 32, seed: int = 0) -> torch.Tensor:
    """Bytes `[3, size, size]`: smooth, in colour, darker on one side, and noisy in a corner."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 5, 5, generator=generator) * 200 + 20
    pixels = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic")[0]
    pixels[:, :8, :8] += 40 * torch.rand(3, 8, 8, generator=generator)
    return pixels.clamp(0, 255).byte()


def by_timm(pixels: torch.Tensor, name: str, level: float, sign: int) -> torch.Tensor:
    long = TIMM.get(name.rstrip("XY"), "{}").format(name)
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    to_argument = LEVEL_TO_ARG[long]
    arguments = to_argument(10 * level, {}) if to_argument else ()
    if name in ("Color", "Contrast", "Brightness", "Sharpness"):  # the sign is drawn in there
        arguments = (max(0.1, 1 + sign * 0.9 * level),)
    elif name in MOVING:
        arguments = (sign * abs(arguments[0]),)
    options = {"fillcolor": (128, 128, 128), "resample": Image.BILINEAR}
    changed = NAME_TO_OP[long](image, *arguments, **options)
    return torch.from_numpy(np.array(changed)).permute(2, 0, 1).float()


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("level", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_those_of_timm(name, level, sign):
    pixels = torch.stack([picture(), picture(seed=1)])
    drawn = tuple(torch.full((2,), value) for value in (OPERATIONS.index(name), level, sign))
    moved = device_augment.sample(pixels.float(), geometry(*drawn, 32), GREY)
    for result, original in zip(colours(moved, *drawn), pixels, strict=True):
        error = (result - by_timm(original, name, level, sign)).abs()
        if name in MOVING:  # Pillow blends pixels at the border of a moved image otherwise
            assert (error[:, 2:-2, 2:-2] > 2).float().mean() < 0.1
        else:  # Pillow's blends drop what lies behind the decimal point
            assert error.max() <= (0 if name in TABLES else 1)


def test_each_image_has_its_own_operation():
    pixels = picture().expand(len(OPERATIONS), -1, -1, -1).float()
    one = torch.ones(len(OPERATIONS))
    together = colours(pixels, torch.arange(len(OPERATIONS)), 0.7 * one, one)
    for i, result in enumerate(together):
        assert result.equal(colours(pixels[:1], torch.tensor([i]), 0.7 * one[:1], one[:1])[0])


def test_layers_follow_each_other():
    """Geometry of several layers is one sampling, in the order of the layers."""
    names, levels = ("TranslateX", "Rotate"), (0.5, 1.0)
    draws = [
        (torch.tensor([OPERATIONS.index(n)]), torch.tensor([v]), torch.tensor([1]))
        for n, v in zip(names, levels, strict=True)
    ]
    first, second = (geometry(*draw, 32) for draw in draws)
    pixels = torch.zeros(1, 3, 32, 32)
    pixels[..., 12:20, 20:26] = 255
    at_once = device_augment.sample(pixels, first @ second, torch.zeros(3, 1, 1))
    one_by_one = device_augment.sample(pixels, first, torch.zeros(3, 1, 1))
    one_by_one = device_augment.sample(one_by_one, second, torch.zeros(3, 1, 1))
    assert (at_once - one_by_one).abs().mean() < 2


def test_crops_are_shifted_and_flipped_images():
    size, padding = 8, device_augment.PADDING
    pixels = picture(size)
    torch.manual_seed(0)
    crops = build_device_transform(**STANDARD)(pixels.expand(500, -1, -1, -1))
    padded = torch.nn.functional.pad(pixels.float(), 4 * (padding,))
    views = [
        view[:, y : y + size, x : x + size]
        for view in (padded, padded.flip(2))
        for y in range(2 * padding + 1) for x in range(2 * padding + 1)
    ]  # fmt: skip
    distance = torch.cdist(crops.flatten(1), torch.stack(views).flatten(1))
    nearest = distance.min(1)
    assert nearest.values.max() < 0.1
    assert nearest.indices.unique().numel() > 140  # of 162, drawn 500 times


def test_what_is_outside_has_the_mean_colour():
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.2, 0.2)
    torch.manual_seed(0)
    black = torch.zeros(200, 3, 8, 8, dtype=torch.uint8)
    values = build_device_transform(mean=mean, std=std)(black)
    expected = -torch.tensor(mean).view(3, 1, 1) / 0.2
    outside = values.abs() < 1e-4
    assert outside.any()
    assert ((values - expected).abs() < 1e-4)[~outside].all()


@pytest.mark.parametrize("remode", device_augment.FILLS)
def test_erasing(remode):
    torch.manual_seed(0)
    images = torch.full((4000, 3, 16, 16), 9.0)
    erased = device_augment.erase(images, 0.25, device_augment.FILLS[remode]) != 9
    share = erased.float().mean((1, 2, 3))
    assert abs((share > 0).float().mean() - 0.25) < 0.03
    assert 0.01 < share[share > 0].min() < share.max() < 0.45
    rows, columns = erased[:, 0].any(2), erased[:, 0].any(1)
    assert erased[:, 0].equal(rows[:, :, None] & columns[:, None])  # one rectangle
    assert ((rows.int().diff(dim=1) == 1).sum(1) <= 1).all()


def test_erased_rectangles_are_drawn_as_timm_draws_them():
    """Of images that are not square: how high, how wide, and how far from the upper left corner."""
    random.seed(0), torch.manual_seed(0)
    images = torch.full((8000, 3, 12, 24), 9.0)
    ours = device_augment.erase(images, 1.0, torch.zeros_like)
    by_timm = RandomErasing(1.0, device="cpu")(images.clone())
    shapes = []
    for erased in (ours[:, 0] == 0, by_timm[:, 0] == 0):
        rows, columns = erased.any(2).float(), erased.any(1).float()
        shapes.append([part for sides in (rows, columns)
                       for part in (sides.sum(1), sides.argmax(1).float())])  # fmt: skip
    for own, expected in zip(*shapes, strict=True):
        assert abs(own.mean() - expected.mean()) < 0.04 * expected.mean()
        assert abs(own.std() - expected.std()) < 0.05 * expected.std()


def test_an_image_without_room_for_a_rectangle_stays_as_it_is():
    torch.manual_seed(0)
    images = torch.full((500, 3, 1, 30), 9.0)
    assert device_augment.erase(images, 1.0, torch.zeros_like).equal(images)


def test_several_rectangles_share_what_is_erased():
    torch.manual_seed(0)
    images = torch.full((4000, 3, 32, 32), 9.0)
    one, three = (
        (device_augment.erase(images, 0.5, torch.zeros_like, most)[:, 0] == 0) for most in (1, 3)
    )
    rows, columns = three.any(2), three.any(1)
    several = (three != (rows[:, :, None] & columns[:, None])).flatten(1).any(1)
    assert 0.25 < several.float().mean() < 0.34  # some have one, or several in line
    assert abs((three.flatten(1).any(1)).float().mean() - 0.5) < 0.03
    assert 0.7 < three.float().mean() / one.float().mean() < 1  # they overlap


def test_what_is_to_be_erased_is_normalised_before():
    torch.manual_seed(0)
    pixels = torch.stack([picture(seed=i) for i in range(8)])
    options = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    plain = build_normalization(**options)(pixels)
    assert plain.equal(normalize(pixels / 255, *options.values()))
    erased = build_normalization(**options, reprob=1.0, remode="pixel", recount=2)(pixels)
    noise = erased[erased != plain]
    assert abs(noise.mean()) < 0.1
    assert abs(noise.std() - 1) < 0.1
    with pytest.raises(ValueError, match="no --remode noise: use const or rand or pixel"):
        build_normalization(**options, remode="noise")


def test_levels_and_operations_are_drawn_as_the_policy_says():
    torch.manual_seed(0)
    drawn = RandAugment.parse("rand-m5-n3-p0.4-mstd1-inc1").draw(20000, torch.device("cpu"))
    assert len(drawn) == 3
    for operation, level, sign in drawn:
        assert abs((operation >= 0).float().mean() - 0.4) < 0.02
        assert operation.unique().tolist() == list(range(-1, len(OPERATIONS)))
        assert abs(level.mean() - 0.5) < 0.01
        assert abs(level.std() - 0.1) < 0.01
        assert abs(sign.float().mean()) < 0.03
    uniform = RandAugment.parse("rand-n1-p1-mstd101-inc1").draw(20000, torch.device("cpu"))[0][1]
    assert uniform.min() < 0.01
    assert uniform.max() > 0.99
    assert abs(uniform.mean() - 0.5) < 0.01


@pytest.mark.parametrize(
    "policy", ["rand-m9", "rand-m9-inc0", "original", "rand-inc1-t3a", "augmix-m3"]
)
def test_other_policies_are_refused(policy):
    with pytest.raises(ValueError, match=f"no augmentation '{policy}' for whole batches: use none"):
        RandAugment.parse(policy)


def test_results_depend_on_the_seed_alone():
    images = torch.stack([picture(seed=i) for i in range(6)])
    transform = build_device_transform(
        mean=(0.5,) * 3, std=(0.2,) * 3, aa="rand-m9-mstd0.5-inc1", reprob=0.5, remode="pixel"
    )
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(transform(images))
    assert results[0].equal(results[1])
    assert not results[0].equal(results[2])
    assert results[0].isfinite().all()


def test_every_layer_of_the_policy_is_applied(monkeypatch):
    def draw(policy: RandAugment, count: int, device: torch.device) -> list:
        names, levels = ("TranslateX", "Invert"), (4 / (0.45 * 16), 1.0)
        return [
            (
                torch.full((count,), OPERATIONS.index(name)),
                torch.full((count,), level),
                torch.ones(count),
            )
            for name, level in zip(names, levels, strict=True)
        ]

    monkeypatch.setattr(RandAugment, "draw", draw)
    images = torch.stack([picture(16, seed) for seed in range(8)])
    results = []
    for policy in ("none", "rand-inc1"):
        torch.manual_seed(0)
        results.append(build_device_transform(**STANDARD, aa=policy)(images))
    plain, augmented = results
    assert (augmented[..., :-4] - (255 - plain[..., 4:])).abs().max() < 1


@pytest.mark.parametrize(
    ("backend", "device"), [("aot_eager", "cpu"), pytest.param("inductor", "cuda", marks=gpu)]
)
def test_compiled_it_draws_the_same(backend, device):
    images = torch.stack([picture(seed=i) for i in range(64)]).to(device)
    transform = build_device_transform(
        mean=(0.5,) * 3, std=(0.2,) * 3, aa="rand-m9-mstd0.5-inc1", reprob=0.5, device=device
    )
    results = []
    for apply in (transform, compile_augmentation(transform, backend)):
        torch.manual_seed(0)
        results.append(apply(images))
    differing = (results[0] - results[1]).abs().amax(1) > 1e-3  # a step of grey is 0.02
    assert differing.float().mean() < 1e-3, "but where rounding goes the other way"
