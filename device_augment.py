"""Normalisation and random erasing of whole batches on their device; of small images also padded
crop, flip and RandAugment, all as timm has them for single images.

Random numbers come from the global generator of the device, which training seeds at every step.
What of an augmented image lies outside of the original has the mean colour.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from errors import UserError

PADDING = 4  # pixels that a crop may lie outside of the image on each side
OPERATIONS = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd",
    "Color", "Contrast", "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY",
)  # fmt: skip
GREY = (0.299, 0.587, 0.114)
ERASED = (0.02, 1 / 3)  # smallest and largest share of the image
ASPECT = (0.3, 1 / 0.3)  # of the erased rectangle
ATTEMPTS = 10  # to draw a rectangle that the image has room for


@dataclass(frozen=True)
class RandAugment:
    """timm's policy of the same options: `layers` operations an image, each with a probability.

    Levels are in [0, 1]: normal draws around `level`, or, with infinite `std`, uniform ones below.
    """

    level: float = 1.0
    layers: int = 2
    probability: float = 0.5
    std: float = 0.0

    @classmethod
    def parse(cls, policy: str) -> "RandAugment | None":
        """The policy that timm's words name, such as `rand-m9-mstd0.5-inc1`; None for `none`.

        Raises UserError for what is there for single images alone.
        """
        if policy.lower() in ("none", ""):
            return None
        name, *sections = policy.split("-")
        found = [re.fullmatch(r"(m|n|p|mstd|inc)(\d+\.?\d*)", section) for section in sections]
        given = {match[1]: float(match[2]) for match in found if match}
        if name != "rand" or None in found or given.get("inc") != 1:
            raise UserError(
                f"There is no augmentation {policy!r} for whole batches: use none, or rand with "
                "-inc1 and any of -m, -n, -p and -mstd, such as rand-m9-mstd0.5-inc1."
            )
        std = given.get("mstd", 0.0)
        return cls(
            level=given.get("m", 10) / 10,
            layers=int(given.get("n", 2)),
            probability=given.get("p", 0.5),
            std=float("inf") if std > 100 else std / 10,
        )

    def draw(self, count: int, device: torch.device) -> list[tuple[Tensor, Tensor, Tensor]]:
        """For every layer: operations (-1 for none), levels and signs, each `[count]`."""
        layers = []
        for _ in range(self.layers):
            operation = torch.randint(len(OPERATIONS), (count,), device=device)
            left_out = torch.rand(count, device=device) > self.probability
            operation = operation.masked_fill(left_out, -1)
            level = torch.full((count,), self.level, device=device)
            if self.std == float("inf"):
                level = level * torch.rand(count, device=device)
            elif self.std:
                level = level + self.std * torch.randn(count, device=device)
            sign = torch.randint(2, (count,), device=device) * 2 - 1
            layers.append((operation, level.clamp(0, 1), sign))
        return layers


def build_normalization(
    *,
    mean: Sequence[float],
    std: Sequence[float],
    reprob: float = 0.0,
    remode: str = "const",
    recount: int = 1,
    device: torch.device | str = "cpu",
) -> Callable[[Tensor], Tensor]:
    """Pixels `[B, 3, H, W]`, bytes or floats up to 255 -> normalised floats, on `device`.

    Args:
        mean, std: per channel, for pixels in [0, 1].
        reprob, remode, recount: probability, fill and most rectangles of random erasing.

    Raises:
        UserError: unknown `remode`.
    """
    if remode not in FILLS:
        raise UserError(f"There is no --remode {remode}: use {' or '.join(FILLS)}.")
    centre, width = (torch.tensor(v, device=device).view(3, 1, 1) for v in (mean, std))

    def transform(pixels: Tensor) -> Tensor:
        images = (pixels / 255 - centre) / width
        return erase(images, reprob, FILLS[remode], recount) if reprob else images

    return transform


def build_device_transform(
    *,
    mean: Sequence[float],
    std: Sequence[float],
    aa: str = "none",
    device: torch.device | str = "cpu",
    **erasing: Any,
) -> Callable[[Tensor], Tensor]:
    """Bytes `[B, 3, S, S]` -> augmented, normalised floats of the same shape, on `device`.

    `aa` is as in `augment.build_train_transform`, the others are as in `build_normalization`.
    Raises UserError for an `aa` that is not there for whole batches, or an unknown `remode`.
    """
    policy = RandAugment.parse(aa)
    normalize = build_normalization(mean=mean, std=std, device=device, **erasing)
    centre = torch.tensor(mean, device=device).view(3, 1, 1)

    def transform(images: Tensor) -> Tensor:
        count, device = len(images), images.device
        layers = policy.draw(count, device) if policy else []
        matrix = crop_and_flip(count, images.shape[-1], device)
        for operation, level, sign in layers:
            matrix = matrix @ geometry(operation, level, sign, images.shape[-1])
        pixels = sample(images.float(), matrix, 255 * centre)
        for operation, level, sign in layers:
            pixels = colours(pixels, operation, level, sign)
        return normalize(pixels)

    return transform


def crop_and_flip(count: int, size: int, device: torch.device) -> Tensor:
    """Matrices `[count, 3, 3]` of random crops by `PADDING` pixels and of horizontal flips."""
    shift = torch.randint(-PADDING, PADDING + 1, (count, 2), device=device)
    flipped = torch.randint(2, (count,), device=device)
    matrix = torch.eye(3, device=device).repeat(count, 1, 1)
    matrix[:, 0, 0] = 1 - 2 * flipped
    matrix[:, 0, 2] = flipped * size + shift[:, 0]
    matrix[:, 1, 2] = shift[:, 1]
    return matrix


def geometry(operation: Tensor, level: Tensor, sign: Tensor, size: int) -> Tensor:
    """Matrices `[B, 3, 3]` that say which point of the input a point of the output shows.

    Points are (x, y, 1) in pixels from the upper left corner. Operations that change colours give
    the identity.
    """
    signed = level * sign

    def of(name: str, value: Tensor) -> Tensor:
        return torch.where(operation == OPERATIONS.index(name), value, 0)

    angle = torch.deg2rad(of("Rotate", 30 * signed))
    cos, sin, centre = angle.cos(), angle.sin(), size / 2
    matrix = torch.eye(3, device=level.device).repeat(len(level), 1, 1)
    matrix[:, 0, 0] = matrix[:, 1, 1] = cos
    matrix[:, 0, 1] = of("ShearX", 0.3 * signed) - sin
    matrix[:, 1, 0] = of("ShearY", 0.3 * signed) + sin
    matrix[:, 0, 2] = of("TranslateX", 0.45 * size * signed) + centre * (1 - cos + sin)
    matrix[:, 1, 2] = of("TranslateY", 0.45 * size * signed) + centre * (1 - cos - sin)
    return matrix


def sample(pixels: Tensor, matrix: Tensor, fill: Tensor) -> Tensor:
    """Images `[B, 3, S, S]` of the points to which matrices of `geometry` lead, bilinearly."""
    size = pixels.shape[-1]
    # affine_grid counts from the centre of the image, in halves of its side.
    turned, shift = matrix[:, :2, :2], matrix[:, :2, 2:]
    shift = turned.sum(2, keepdim=True) - 1 + shift * (2 / size)
    theta = torch.cat([turned, shift], 2)
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    sampled = F.grid_sample(pixels - fill, grid, padding_mode="zeros", align_corners=False)
    return sampled + fill


def colours(pixels: Tensor, operation: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    """Each image `[B, 3, S, S]`, in [0, 255], after its own operation, if that is one on colours.

    The result is of whole numbers, as the operations count in them.
    """
    pixels = pixels.round().clamp(0, 255)
    level, sign = (x.view(-1, 1, 1, 1) for x in (level, sign))
    factor = (1 + 0.9 * level * sign).clamp(min=0.1)
    grey = sum(share * c for share, c in zip(GREY, pixels.split(1, 1), strict=True))
    darkest, brightest = pixels.amin((2, 3), keepdim=True), pixels.amax((2, 3), keepdim=True)
    stretch = 255 / (brightest - darkest).clamp(min=1)
    unit = 2 ** (4 + (4 * level).floor())  # all but 4 bits are lost, and up to 4 more
    threshold = 256 - (256 * level).floor()
    added = (pixels + (110 * level).floor()).clamp(max=255)
    changed = {
        "AutoContrast": torch.where(brightest > darkest, (pixels - darkest) * stretch, pixels),
        "Equalize": equalized(pixels),
        "Invert": 255 - pixels,
        "Posterize": (pixels / unit).floor() * unit,
        "Solarize": torch.where(pixels < threshold, pixels, 255 - pixels),
        "SolarizeAdd": torch.where(pixels < 128, added, pixels),
        "Color": torch.lerp(grey, pixels, factor),
        "Contrast": torch.lerp(grey.mean((2, 3), keepdim=True).round(), pixels, factor),
        "Brightness": pixels * factor,
        "Sharpness": torch.lerp(smoothed(pixels), pixels, factor),
    }
    chosen = operation.view(-1, 1, 1, 1)
    for name, result in changed.items():
        pixels = torch.where(chosen == OPERATIONS.index(name), result, pixels)
    return pixels.round().clamp(0, 255)


def equalized(pixels: Tensor) -> Tensor:
    """Each channel of whole numbers `[B, 3, S, S]` with a histogram as even as Pillow makes it."""
    levels = pixels.long().flatten(2)
    counts = levels.new_zeros(*levels.shape[:2], 256)
    counts.scatter_add_(2, levels, torch.ones_like(levels))
    of_brightest = counts.gather(2, levels.amax(2, keepdim=True))
    step = (counts.sum(2, keepdim=True) - of_brightest) // 255
    before = counts.cumsum(2) - counts
    table = (before + step // 2) // step.clamp(min=1)
    new = table.clamp(max=255).gather(2, levels).to(pixels.dtype)
    return torch.where(step[..., None] > 0, new.view_as(pixels), pixels)


def smoothed(pixels: Tensor) -> Tensor:
    """Means of 3 x 3 pixels, of which the centre counts five times; edges stay as they are."""
    inner = (9 * F.avg_pool2d(pixels, 3, stride=1) + 4 * pixels[:, :, 1:-1, 1:-1]) / 13
    return torch.cat([
        pixels[:, :, :1],
        torch.cat([pixels[:, :, 1:-1, :1], inner, pixels[:, :, 1:-1, -1:]], 3),
        pixels[:, :, -1:],
    ], 2)  # fmt: skip


def erase(
    images: Tensor, probability: float, fill: Callable[[Tensor], Tensor], most: int = 1
) -> Tensor:
    """Fills up to `most` random rectangles in a share of the images `[B, 3, H, W]`."""
    count, device = len(images), images.device
    chosen = torch.rand(count, device=device) < probability
    number = (torch.rand(count, device=device) * most).floor() + 1
    for i in range(most):
        erased = rectangles(number, *images.shape[2:]) & (chosen & (i < number)).view(-1, 1, 1)
        images = torch.where(erased[:, None], fill(images), images)
    return images


def rectangles(number: Tensor, height: int, width: int) -> Tensor:
    """Masks `[B, H, W]` of a random rectangle in each image, which is to have a `number` of them.

    An image has none if all that were drawn for it were too large.
    """
    count, device = len(number), number.device

    def uniform(low: float, high: float, attempts: int = 1) -> Tensor:
        return torch.rand(attempts, count, device=device) * (high - low) + low

    area = uniform(*ERASED, ATTEMPTS) * height * width / number
    ratio = uniform(math.log(ASPECT[0]), math.log(ASPECT[1]), ATTEMPTS).exp()
    tall, wide = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (tall < height) & (wide < width)
    first = fits.int().argmax(0, keepdim=True)
    mask = fits.any(0).view(-1, 1, 1)
    for dim, sides, length in ((1, tall, height), (2, wide, width)):
        side = sides.gather(0, first)
        start = (uniform(0, 1) * (length - side + 1)).floor()
        place = torch.arange(length, device=device) - start.mT
        mask = mask & ((place >= 0) & (place < side.mT)).unsqueeze(3 - dim)
    return mask


FILLS: dict[str, Callable[[Tensor], Tensor]] = {
    "const": torch.zeros_like,
    "rand": lambda images: torch.randn(*images.shape[:2], 1, 1, device=images.device),
    "pixel": torch.randn_like,
}
