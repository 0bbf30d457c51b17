"""Every pixel format that Pillow opens keeps its grey levels; 8-bit ones are read as ever."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets.folder import pil_loader

from images import UnreadableImage, load_image, to_rgb

RAMP = np.linspace(0, 1, 64).reshape(8, 8)
UINT16 = np.rint(RAMP * 65535)


def written(path: Path, levels: np.ndarray, format: str) -> Path:
    Image.fromarray(levels).save(path, format)
    return path


def pgm(levels: np.ndarray, white: int) -> bytes:
    return b"P5 8 8 %d\n" % white + levels.astype(">u2").tobytes()


def read(path: Path) -> np.ndarray:
    image = load_image(path)
    assert image.mode == "RGB"
    channels = np.asarray(image)
    assert (channels == channels[..., :1]).all()
    return channels[..., 0]


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "image.png")
    with pytest.raises(UnreadableImage, match="Cannot read the image .*image.png: it is no file"):
        load_image(tmp_path / "image.png")


@pytest.mark.parametrize("size", [(501, 1), (1, 9000)])
def test_a_line_of_pixels_is_no_image(size, tmp_path):
    """Resized to 224 pixels by its short side, 9000 x 1 takes gigabytes."""
    Image.new("L", (500, 1)).save(tmp_path / "long.png")
    assert load_image(tmp_path / "long.png").size == (500, 1)
    Image.new("L", size).save(tmp_path / "line.png")
    with pytest.raises(UnreadableImage, match="one side of .* is more than 500 times as long"):
        load_image(tmp_path / "line.png")


@pytest.mark.parametrize(
    ("levels", "format"),
    [
        (UINT16.astype(np.uint16), "PNG"),
        (UINT16.astype(np.uint16), "TIFF"),
        (UINT16.astype(">u2"), "TIFF"),
        (UINT16.astype(np.uint16), "JPEG2000"),
        (UINT16.astype(np.uint16), "PPM"),
        (UINT16.astype(np.int32), "TIFF"),
        (UINT16.astype(np.float32), "TIFF"),
        (RAMP.astype(np.float32), "TIFF"),
        (np.rint(RAMP * 255).astype(np.float32), "TIFF"),
        (np.rint(RAMP * 255).astype(np.int32), "TIFF"),
        (np.rint(RAMP * 2e9 - 1e9).astype(np.int32), "TIFF"),
        ((UINT16 - 32768).astype(np.int16), "TIFF"),
        (np.rint(RAMP * 4000 - 1024).astype(np.int32), "TIFF"),
        ((RAMP * 10 - 3).astype(np.float32), "TIFF"),
        ((RAMP * 1e6).astype(np.float32), "TIFF"),
        (np.rint(RAMP * 255).astype(np.uint8), "PNG"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.dtype.str} to {value.max():g}",
)
def test_a_ramp_stays_a_ramp(levels, format, tmp_path):
    seen = read(written(tmp_path / "image", levels, format))
    assert np.abs(seen - RAMP * 255).max() <= 1
    assert len(np.unique(seen)) == 64


@pytest.mark.parametrize("white", [65535, 4095, 1023])
def test_the_white_of_a_portable_grey_map(white, tmp_path):
    (tmp_path / "image.pgm").write_bytes(pgm(np.rint(RAMP * white), white))
    assert np.abs(read(tmp_path / "image.pgm") - RAMP * 255).max() <= 1


def test_a_dark_image_of_16_bits_stays_dark(tmp_path):
    """White is that of the format, not of the image."""
    for format in ("PNG", "PPM", "TIFF"):
        levels = np.rint(RAMP * 6553).astype(np.uint16)
        assert read(written(tmp_path / "image", levels, format)).max() == 25


def test_a_tiff_of_12_bits(tmp_path):
    levels = np.rint(RAMP * 4095).astype(np.uint16).reshape(-1, 2)
    packed = np.stack([levels[:, 0] >> 4, (levels[:, 0] & 15) << 4 | levels[:, 1] >> 8,
                       levels[:, 1] & 255], 1).astype(np.uint8).tobytes()  # fmt: skip
    tags = ((256, 8), (257, 8), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 8),
            (279, len(packed)))  # fmt: skip
    entries = b"".join(
        np.array([tag, 4], "<u2").tobytes() + np.array([1, value], "<u4").tobytes()
        for tag, value in tags
    )
    offset = np.array([8 + len(packed)], "<u4").tobytes()
    count = np.array([len(tags)], "<u2").tobytes()
    content = b"II*\0" + offset + packed + count + entries + bytes(4)
    (tmp_path / "image.tif").write_bytes(content)
    assert Image.open(tmp_path / "image.tif").mode == "I;16"
    assert np.abs(read(tmp_path / "image.tif") - RAMP * 255).max() <= 1


def test_what_is_not_a_number_is_black(tmp_path):
    levels = RAMP.astype(np.float32)
    levels[0, 0], levels[0, 1], levels[7, 7] = np.nan, -np.inf, np.inf
    seen = read(written(tmp_path / "image", levels, "TIFF"))
    assert seen[0, 0] == seen[0, 1] == 0
    assert seen[7, 7] == 255
    assert read(written(tmp_path / "image", levels * np.nan, "TIFF")).max() == 0


def test_one_level_is_no_division_by_zero(tmp_path):
    levels = np.full((8, 8), -5, np.int32)
    assert read(written(tmp_path / "image", levels, "TIFF")).max() == 0


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB"])
def test_images_of_8_bits_are_read_as_torchvision_does(mode, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 4), np.uint8)
    image = Image.fromarray(noise, "RGBA")
    if mode in ("LAB", "YCbCr"):
        image = Image.fromarray(noise[..., :3].copy(), mode)
    elif mode != "RGBA":
        image = image.convert("RGB").convert(mode) if mode != "LA" else image.convert("LA")
    format = "TIFF" if mode in ("CMYK", "YCbCr", "LAB") else "PNG"
    image.save(tmp_path / "image", format)
    assert np.array_equal(load_image(tmp_path / "image"), pil_loader(str(tmp_path / "image")))


def test_orientation_is_not_applied_and_alpha_is_dropped(tmp_path):
    image = Image.new("RGBA", (8, 4), (10, 20, 30, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "image.png", exif=exif)
    seen = load_image(tmp_path / "image.png")
    assert seen.size == (8, 4)
    assert seen.getpixel((0, 0)) == (10, 20, 30)


@pytest.mark.parametrize("mode", Image.MODES)
def test_every_mode_becomes_rgb(mode):
    assert to_rgb(Image.new(mode, (8, 8))).mode == "RGB"


def test_grey_premultiplied_by_alpha():
    """Pillow itself cannot convert this mode to RGB."""
    grey = Image.new("LA", (8, 8), (200, 255)).convert("La")
    assert to_rgb(grey).getpixel((0, 0)) == (200, 200, 200)
