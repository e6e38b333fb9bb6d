"""Pictures in files: each one is read as it is meant to be seen, or refused with its name and the reason.

| what a file may hold | what is read |
| --- | --- |
| an EXIF orientation | the picture upright |
| transparency | the stored colours, as most loaders of training data do |
| a palette, CMYK, YCbCr, one bit | its colours |
| 16-bit grey | its upper bits: 65,535 is white |
| several frames or pages | the first one |
| 32-bit integers, floating point numbers | nothing: which of them is white is not said |
| an ICC profile | not applied |

Colours become grey, and grey becomes colour, as the network takes them.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from graphcomp.errors import DataError, first_line

__all__ = ["CROP_FRACTION", "DECODED", "SUFFIXES", "decode", "is_image"]

CROP_FRACTION = 0.875
DECODED = 2
"""Raised whenever a file is read as another picture than before, so that nothing cached of it is used."""

FORMATS = {
    "AVIF": (".avif",),
    "BMP": (".bmp", ".dib"),
    "GIF": (".gif",),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "JPEG2000": (".jp2", ".j2k", ".jpf", ".jpx"),
    "PNG": (".png", ".apng"),
    "PPM": (".pbm", ".pgm", ".ppm", ".pnm", ".pfm"),
    "TGA": (".tga",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
"""What is read, whatever the file is called, and what it is called. None of them runs another program."""

SUFFIXES = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)
OTHERS = frozenset(
    ".blp .bw .cur .dds .emf .eps .exr .fit .fits .fli .hdr .heic .heif .icns .ico .jxl .npy .nef .pcd .pcx "
    ".psd .qoi .raw .cr2 .dng .arw .rgb .rgba .sgi .svg .wmf .xbm .xpm".split()
)
"""Pictures that are not read: left out in silence they would be missing from a class."""


def is_image(path: Path) -> bool:
    """Whether a file is to be read, by its name; hidden files and what are no pictures are not.

    Raises:
        DataError: a picture of a kind that is not read.
    """
    suffix = path.suffix.lower()
    if suffix in OTHERS and not path.name.startswith("."):
        raise DataError.at(
            path,
            f"a picture of a kind that is not read ({suffix})",
            ", ".join(sorted(SUFFIXES)),
            "convert it",
        )
    return suffix in SUFFIXES and not path.name.startswith(".")


def decode(path: Path, shape: tuple[int, ...]) -> Tensor:
    """The picture as uint8 of `shape`, (C, H, W) with C 1 or 3: its centre, resized.

    Raises:
        DataError: naming the file, if it is damaged, cut off, absurdly large, or of an unknown scale.
    """
    channels, height, width = shape
    try:
        with Image.open(path, formats=_known_formats()) as image:
            _require_size(image)
            image.load()
            pixels = np.array(_fit(_plain(upright(image), "RGB" if channels == 3 else "L"), height, width))
    except Exception as error:  # a damaged file can raise anything at all
        raise DataError.at(
            path, f"an unreadable image ({first_line(error)})", "one that decodes", "replace or remove it"
        ) from error
    return torch.from_numpy(pixels.reshape(height, width, channels)).permute(2, 0, 1)


def _known_formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _require_size(image: Image.Image) -> None:
    """Pillow only warns between once and twice its limit."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit and image.width * image.height > limit:
        raise ValueError(f"{image.width} x {image.height} pixels, more than {limit:,}")


def upright(image: Image.Image) -> Image.Image:
    """Turned and mirrored as its EXIF orientation says; `image` is loaded."""
    orientation = image.getexif().get(0x0112, 1)
    return image if orientation == 1 else ImageOps.exif_transpose(image)


def _plain(image: Image.Image, mode: str) -> Image.Image:
    """8 bits a channel, "RGB" or "L"."""
    whole = image.mode == "I" and image.format in ("PNG", "PPM")  # 16 bits, by their definition
    if whole or image.mode.startswith("I;16"):
        levels = np.asarray(image).astype(np.float64) / 257
        image = Image.fromarray(np.rint(levels).clip(0, 255).astype(np.uint8))
    elif image.mode in ("I", "F"):
        kind = "floating point numbers" if image.mode == "F" else "32-bit integers"
        raise ValueError(f"{kind}, of which none is known to be white: save it with 8 or 16 bits a channel")
    if image.mode in ("RGBa", "La"):
        image = image.convert({"RGBa": "RGBA", "La": "LA"}[image.mode])
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # with its transparency, that is then dropped
    if image.mode == "LAB":
        image = image.convert("RGB")
    return image.convert(mode)


def _fit(image: Image.Image, height: int, width: int) -> Image.Image:
    """The centre, 7/8 of the tighter side, resized; an image that fits stays as it is."""
    if image.size == (width, height):
        return image
    scale = CROP_FRACTION * min(image.width / width, image.height / height)
    left, top = (image.width - scale * width) / 2, (image.height - scale * height) / 2
    box = (left, top, left + scale * width, top + scale * height)
    return image.resize((width, height), Image.Resampling.BILINEAR, box)
