"""Image and batch transforms with the semantics of DeiT, built from timm and torchvision."""

import re
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup, create_transform
from timm.data.auto_augment import NAME_TO_OP, posterize
from timm.data.transforms import str_to_interp_mode
from torch import Tensor
from torchvision import transforms

from errors import UserError
from preprocessing import SMALL_IMAGE, effective_crop


def posterize_to_black(image: Image.Image, bits_to_keep: int, **kwargs) -> Image.Image:
    """timm's posterize, and a black image where no bit is kept."""
    if bits_to_keep < 1:
        return Image.new(image.mode, image.size)
    return posterize(image, bits_to_keep, **kwargs)


# timm's policies ask for 0 bits now and then: black in older Pillow, an exception in Pillow 13.
NAME_TO_OP.update(Posterize=posterize_to_black, PosterizeIncreasing=posterize_to_black)


def build_train_transform(
    *,
    input_size: int | tuple[int, int],
    mean: Sequence[float],
    color_jitter: float = 0.3,
    aa: str | None = "rand-m9-mstd0.5-inc1",
    interpolation: str = "bicubic",
    three_augment: bool = False,
    simple_random_crop: bool = False,
) -> transforms.Compose:
    """Training augmentation: PIL image -> bytes `[3, input_size, input_size]`.

    A random resized crop (a padded random crop up to 32 pixels), flip and policy `aa` (none with
    'none', '' or None; colour jitter then takes its place). Random erasing, whose noise is normal,
    comes with the normalisation (`device_augment.build_normalization`).

    Args:
        input_size: pixels of a square, or height and width.
        mean: per channel, in [0, 1]: the colour of what a moved image leaves bare.
        color_jitter: strength for brightness, contrast and saturation.
        aa: a policy that timm's `create_transform` knows.
        interpolation: timm's name of a filter, or 'random' for bilinear and bicubic.
        three_augment: DeiT III's 3-Augment (one of grayscale, solarize and blur, then colour
            jitter) instead of `aa`.
        simple_random_crop: DeiT III's crop: shorter side to `input_size`, padded random crop.

    Raises:
        UserError: `aa` unknown to timm.
    """
    if three_augment:
        aa = "3a"
    try:
        crop_and_flip, policy, to_tensor = create_transform(
            input_size,
            is_training=True,
            color_jitter=color_jitter or None,  # type: ignore[arg-type]  # None is taken
            auto_augment=_policy_for_timm(aa),
            interpolation=interpolation,
            mean=tuple(mean),
            normalize=False,
            separate=True,
        )
    except (AssertionError, ValueError) as error:
        raise UserError(
            f"timm has no augmentation {aa!r}: use for instance 'rand-m9-mstd0.5-inc1'."
        ) from error
    if simple_random_crop or np.max(input_size) <= SMALL_IMAGE:
        padding_mode = "reflect" if simple_random_crop else "constant"
        crop_and_flip.transforms[0] = _padded_crop(input_size, interpolation, padding_mode)
    return transforms.Compose([crop_and_flip, policy, to_tensor])


def _padded_crop(
    input_size: int | tuple[int, int], interpolation: str, padding_mode: str
) -> transforms.Compose:
    mode = "bicubic" if interpolation == "random" else interpolation
    return transforms.Compose(
        [
            transforms.Resize(input_size, interpolation=str_to_interp_mode(mode)),
            transforms.RandomCrop(input_size, padding=4, padding_mode=padding_mode),
        ]
    )


def _policy_for_timm(name: str | None) -> str | None:
    """None for none. timm ignores what it does not understand behind the name, such as `-foo`."""
    if not name or name.lower() == "none":
        return None
    for section in name.split("-")[1:]:
        if not re.fullmatch(r"[a-z]+\d.*|t\w+", section):
            raise ValueError(f"{section!r} is no option of an augmentation policy")
    return name


def build_eval_transform(
    *,
    input_size: int | tuple[int, int],
    crop_ratio: float = 0.875,
    crop_mode: str = "center",
    interpolation: str = "bicubic",
) -> transforms.Compose:
    """Evaluation: PIL image -> bytes `[3, *input_size]`.

    The shorter side becomes `input_size / crop_ratio` pixels, of which the centre is cropped; up
    to 32 pixels the ratio is 1, so images of the right size stay as they are.

    Args:
        input_size: pixels of a square, or height and width.
        crop_mode: timm's "center"; "squash" changes the aspect ratio instead of cropping, "border"
            fills up the shorter side.
    """
    return create_transform(
        input_size,
        interpolation=interpolation,
        normalize=False,
        crop_pct=effective_crop(input_size, crop_ratio),
        crop_mode=crop_mode,
    )


def build_batch_transform(
    *,
    mixup: float,
    cutmix: float,
    cutmix_minmax: Sequence[float] | None,
    prob: float,
    switch_prob: float,
    mode: str,
    smoothing: float,
    num_classes: int,
    cosub: bool = False,
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Mixup, CutMix and batch repetition: `(samples, targets) -> (samples, targets)`.

    Samples are `[B, 3, H, W]` (B even with Mixup or CutMix, which overwrite them), targets `[B]`
    class indices. Mixed targets are `[B, num_classes]` with label smoothing; without Mixup and
    CutMix targets stay as they are. Mixup draws from numpy's global random state.

    Args:
        mixup, cutmix: parameters of the beta distributions, 0 for off.
        cutmix_minmax: side of the CutMix box as (least, largest) share of the image; turns CutMix
            on.
        prob: probability to mix at all; `switch_prob`: to take CutMix where both are on.
        mode: what shares one draw: 'batch', 'pair' or 'elem'.
        cosub: repeat the mixed batch, samples become `[2B, 3, H, W]`; the loss splits the outputs.
    """
    mix = None
    if mixup > 0 or cutmix > 0 or cutmix_minmax is not None:
        mix = Mixup(
            mixup_alpha=mixup,
            cutmix_alpha=cutmix,
            cutmix_minmax=cutmix_minmax,
            prob=prob,
            switch_prob=switch_prob,
            mode=mode,
            label_smoothing=smoothing,
            num_classes=num_classes,
        )

    def transform(samples: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if mix is not None:
            samples, targets = mix(samples, targets)
        if cosub:
            samples = torch.cat((samples, samples))
        return samples, targets

    return transform
