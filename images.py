"""Image files of every pixel format as 8-bit RGB.

8-bit images become what Pillow's `convert("RGB")`, hence torchvision, makes of them: alpha is
dropped, so that the colours under transparent pixels are seen, and the orientation that EXIF tells
is not applied. Grey images of more than 8 bits, which Pillow would clip at 255, are scaled.
"""

import os

import numpy as np
from PIL import Image
from PIL.TiffTags import TAGS_V2

from errors import USED_UP, UserError, one_line
from files import require_file

BITS_PER_SAMPLE = next(tag for tag, info in TAGS_V2.items() if info.name == "BitsPerSample")
MOST_TIMES_LONGER = 500
DEEP_GREY = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")


class UnreadableImage(UserError, OSError):
    """A file that is no image, or a damaged one."""


def load_image(path: str | os.PathLike) -> Image.Image:
    """The RGB image in a file.

    Raises UnreadableImage, which names the file, and UserError where memory or the files that may
    be open are used up, which says nothing of the image.
    """
    try:
        require_file(path)
        with Image.open(path) as image:
            require_sides(image)
            return to_rgb(image)
    except Exception as error:  # Pillow's decoders raise many types on corrupt data
        used_up = isinstance(error, MemoryError) or getattr(error, "errno", None) in USED_UP
        kind = UserError if used_up else UnreadableImage
        raise kind(f"Cannot read the image {path}: {one_line(error)}") from error


def require_sides(image: Image.Image) -> None:
    """Raises OSError for a line of pixels: resized by its short side, it would fill the memory."""
    if max(image.size) > MOST_TIMES_LONGER * min(image.size):
        raise OSError(
            f"one side of {image.width} x {image.height} pixels is more than {MOST_TIMES_LONGER} "
            "times as long as the other"
        )


def to_rgb(image: Image.Image) -> Image.Image:
    """`image` in mode RGB, its grey levels scaled to 8 bits where it has more."""
    if image.mode in DEEP_GREY:
        levels = np.asarray(image).astype(np.float64)
        black, white = _black_and_white(levels, image)
        grey = (np.nan_to_num(levels, nan=black) - black) / (white - black)
        image = Image.fromarray(np.rint(grey.clip(0, 1) * 255).astype(np.uint8))
    elif image.mode == "La":  # premultiplied by alpha, from which Pillow has no way to RGB
        image = image.convert("LA")
    return image.convert("RGB")


def _black_and_white(levels: np.ndarray, image: Image.Image) -> tuple[float, float]:
    """The levels `[H, W]` of `image` that become 0 and 255.

    16-bit formats say what white is. Other integers, and floats that are whole numbers, are taken
    for 8 or 16 bits, whichever holds them; floats up to 1 for shares of white. All others, such as
    signed ones, are stretched from the image's own darkest to its brightest level.
    """
    if image.mode.startswith("I;16"):
        bits = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, (16,))
        return 0, 2 ** bits[0] - 1
    if image.format == "PPM" and image.mode == "I":
        return 0, 65535
    finite = levels[np.isfinite(levels)]
    low, high = (finite.min(), finite.max()) if finite.size else (0, 0)
    if low >= 0 and image.mode == "F" and high <= 1:
        return 0, 1
    if low >= 0 and high <= 65535 and (finite == np.rint(finite)).all():
        return 0, 255 if high <= 255 else 65535
    return low, high if high > low else low + 1
