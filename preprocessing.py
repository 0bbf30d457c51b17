"""What images become before a model sees them, and where that is known from."""

from dataclasses import asdict, dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, resolve_data_config

from errors import UserError

# Up to this size (CIFAR, Fashion-MNIST) an image is used whole, not cropped out of a larger one.
SMALL_IMAGE = 32
FILTERS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
CROPS = ("center", "squash", "border")
# Trained from scratch as DeiT does it, whatever timm's own weights of them were trained with.
TRAINED_AS_DEIT = ("lion_", "hydra_", "vim_", "vit_", "deit")


@dataclass(frozen=True)
class Preprocessing:
    """Evaluation's view of an image, in the words of timm's `create_transform`.

    Attributes:
        input_size: channels, height and width in pixels.
        interpolation: timm's name of the filter that resizes.
        mean, std: per channel, for pixels in [0, 1].
        crop_pct: share of the resized image's shorter side that is kept; all of a small image.
        crop_mode: "center", "squash" or "border".
    """

    input_size: tuple[int, int, int] = (3, 224, 224)
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    crop_pct: float = 0.875
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        for name in ("input_size", "mean", "std"):  # lists, where they were read from a file
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def is_sound(self) -> bool:
        """Whether every value is of its kind, as those of a file need not be."""
        numbers = (*self.mean, *self.std, self.crop_pct)
        return (
            len(self.input_size) == len(self.mean) == len(self.std) == 3
            and all(type(pixels) is int and pixels > 0 for pixels in self.input_size)
            and all(type(number) in (int, float) and isfinite(number) for number in numbers)
            and min(*self.std, self.crop_pct) > 0
            and self.interpolation in FILTERS
            and self.crop_mode in CROPS
        )

    def __str__(self) -> str:
        size = "x".join(map(str, self.input_size[1:]))
        crop = effective_crop(self.size, self.crop_pct)
        mean, std = (", ".join(f"{v:.4g}" for v in values) for values in (self.mean, self.std))
        return (
            f"{size} pixels, crop {crop:.4g} ({self.crop_mode}), {self.interpolation}, "
            f"mean ({mean}), std ({std})"
        )

    @property
    def size(self) -> int | tuple[int, int]:
        """Pixels: the side of a square, else height and width."""
        height, width = self.input_size[1:]
        return height if height == width else (height, width)

    def at(self, size: int) -> "Preprocessing":
        return replace(self, input_size=(3, size, size))

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint, as keywords of timm's `create_transform`."""
        values = asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    def for_timm(self) -> dict[str, Any]:
        """As `state()`, for timm's `pretrained_cfg`: timm crops small images, too."""
        return {**self.state(), "crop_pct": effective_crop(self.size, self.crop_pct)}


def effective_crop(input_size: int | tuple[int, int], crop_ratio: float) -> float:
    return 1.0 if np.max(input_size) <= SMALL_IMAGE else crop_ratio


def choose(
    model: str,
    found: tuple[dict[str, Any], str] | None,
    *,
    new_training: bool,
    size: int | None,
    **given: Any,
) -> tuple[Preprocessing, str]:
    """That of a checkpoint, where it is `found`, else of a model; and whose it is.

    Args:
        found: a checkpoint, and where it was read.
        new_training: where no checkpoint is found, the model's is that of a training from scratch.
        size: pixels of a square to take instead.
        given: fields to take instead.
    """
    chosen = of_checkpoint(found[0], model, found[1]) if found else None
    if found and chosen:
        origin = found[1]
    else:
        origin = model
        chosen = of_new_training(model) if new_training and not found else of_model(model)
    if size is not None:
        chosen = chosen.at(size)
    return replace(chosen, **given), origin


def of_model(name: str) -> Preprocessing:
    """That of timm's weights of a model (its `pretrained_cfg`)."""
    config = timm.get_pretrained_cfg(name)
    if config is None:
        return Preprocessing()
    return Preprocessing(**resolve_data_config(pretrained_cfg=config.to_dict()))


def of_new_training(name: str) -> Preprocessing:
    """DeiT's for the models that it is about, timm's for others."""
    return Preprocessing() if name.startswith(TRAINED_AS_DEIT) else of_model(name)


def of_checkpoint(saved: dict[str, Any], name: str, source: str | Path) -> Preprocessing | None:
    """That which the model `name` in a checkpoint was trained with; None for weights alone.

    Files of main.py hold it as `data_config`; older ones and DeiT's tell it by their arguments,
    as those of timm's train.py do.

    Raises:
        UserError: it is not what main.py writes.
    """
    try:
        images = _told_by(saved, name)
        sound = images is None or images.is_sound()
    except (TypeError, ValueError, KeyError):
        sound = False
    if not sound:
        where = "data_config" if "data_config" in saved else "args"
        raise UserError(f"The {where} in {source} is not one that main.py writes.")
    return images


def _told_by(saved: dict[str, Any], name: str) -> Preprocessing | None:
    if "data_config" in saved:
        if set(saved["data_config"]) != set(Preprocessing.__dataclass_fields__):
            raise KeyError
        return Preprocessing(**saved["data_config"])
    args = saved.get("args")
    if not isinstance(args, dict):
        return None
    if "data_set" in args:  # of DeiT, whose normalisation is ImageNet's
        size = args.get("input_size", 224)
        return Preprocessing((3, size, size), crop_pct=args.get("eval_crop_ratio", 0.875))
    if "crop_pct" in args:  # of timm
        given = {key: value for key, value in args.items() if value is not None}
        return Preprocessing(**resolve_data_config(given, asdict(of_model(name))))
    return None
