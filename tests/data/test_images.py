"""Pictures in files: one picture, saved in every way that Pillow knows, reads back equal or is refused."""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from graphcomp.data.images import FORMATS, OTHERS, SUFFIXES, decode, is_image
from graphcomp.errors import DataError

HEIGHT, WIDTH = 24, 32
SHAPE = (3, HEIGHT, WIDTH)

_x, _y = np.meshgrid(np.linspace(0, 1, WIDTH), np.linspace(0, 1, HEIGHT))
COLOUR = np.rint(255 * np.stack([_x, _y, 0.7 - 0.5 * _x * _y], 2)).astype(np.uint8)
"""Smooth, so that lossy formats stay close, and another one in each corner."""

PICTURE = Image.fromarray(COLOUR)
GREY = np.asarray(PICTURE.convert("L"))
BLACK_AND_WHITE = (np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 7 < 3) * np.uint8(255)
WIDE = np.rint(GREY * 257.0).astype(np.uint16)

FORMS: dict[str, tuple[Image.Image, np.ndarray]] = {
    "RGB": (PICTURE, COLOUR),
    "RGBA": (PICTURE.convert("RGBA"), COLOUR),
    "CMYK": (PICTURE.convert("CMYK"), COLOUR),
    "YCbCr": (PICTURE.convert("YCbCr"), COLOUR),
    "HSV": (PICTURE.convert("HSV"), COLOUR),
    "LAB": (PICTURE.convert("LAB"), np.asarray(PICTURE.convert("LAB").convert("RGB"))),
    "P": (PICTURE.quantize(256), np.asarray(PICTURE.quantize(256).convert("RGB"))),
    "L": (Image.fromarray(GREY), GREY),
    "LA": (Image.fromarray(GREY).convert("LA"), GREY),
    "1": (Image.fromarray(BLACK_AND_WHITE).convert("1", dither=Image.Dither.NONE), BLACK_AND_WHITE),
    "I;16": (Image.fromarray(WIDE), GREY),
    "I;16B": (Image.fromarray(WIDE.astype(">u2")), GREY),
    "I": (Image.fromarray(WIDE.astype(np.int32)), GREY),
    "F": (Image.fromarray(GREY.astype(np.float32)), GREY),
    "F unit": (Image.fromarray(GREY.astype(np.float32) / 255), GREY),
}
LOSSY = {"JPEG": 24, "MPO": 24, "WEBP": 24, "AVIF": 24, "JPEG2000": 8}
WRITERS = sorted(name for name in (*FORMATS, "MPO") if name in (Image.init(), Image.SAVE)[1])


def near(found: np.ndarray, expected: np.ndarray, tolerance: float) -> bool:
    expected = expected if expected.ndim == 3 else expected[:, :, None].repeat(3, 2)
    return bool(np.abs(found.astype(float) - expected).max() <= tolerance)


def read(path: Path, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return decode(path, shape).permute(1, 2, 0).numpy()


def stored_as(form: str, writer: str, path: Path) -> str | None:
    """The mode that Pillow opens the saved picture in; None if it does not write it, or not these values."""
    image, _ = FORMS[form]
    try:
        image.save(path, writer)
    except (OSError, ValueError, KeyError):
        return None
    with Image.open(path) as stored:
        scaled = form in ("I;16", "I;16B", "I", "F", "F unit", "LAB")
        kept = stored.mode in ("LAB", "F", "I") or stored.mode.startswith("I;16")
        return stored.mode if kept or not scaled else None  # 8 bits: Pillow cut the values off


@pytest.mark.parametrize("form", FORMS)
def test_a_picture_in_every_form_reads_back_or_is_refused(tmp_path: Path, form: str) -> None:
    """White would be a third outcome: that of 16 bits, once."""
    expected = FORMS[form][1]
    seen = 0
    for writer in WRITERS:
        path = tmp_path / f"p{FORMATS.get(writer, ('.jpg',))[0]}"
        mode = stored_as(form, writer, path)
        if mode is None:
            continue
        seen += 1
        if mode == "F" or (mode == "I" and writer == "TIFF"):
            with pytest.raises(DataError, match=rf"{path.name}: found an unreadable image \(.*none is known"):
                read(path)
            continue
        found, loss = read(path), LOSSY.get(writer, 3)
        if mode in ("1", "P"):
            loss = 16 if form in ("RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB") else 3
        assert near(found, expected, 40 if form == "1" and writer in LOSSY else loss), (writer, mode)
        grey = read(path, (1, HEIGHT, WIDTH))
        assert near(grey, np.asarray(Image.fromarray(found).convert("L")), 3), (writer, mode)
    assert seen


HELD = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""EXIF orientation -> what a camera that was held so makes of a picture."""


@pytest.mark.parametrize("writer", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_read_upright(tmp_path: Path, writer: str, orientation: int) -> None:
    """A camera stores what it sees, and how it was held."""
    if writer not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {writer}")
    stored = PICTURE if orientation == 1 else PICTURE.transpose(HELD[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"p{FORMATS[writer][0]}"
    stored.save(path, writer, exif=exif)
    assert near(read(path), COLOUR, LOSSY.get(writer, 0))


@pytest.mark.parametrize("writer", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_the_first_frame_is_read(tmp_path: Path, writer: str) -> None:
    if writer not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {writer}")
    first, other = (
        Image.new("RGB", (WIDTH, HEIGHT), (200, 30, 60)),
        Image.new("RGB", (WIDTH, HEIGHT), (0, 0, 255)),
    )
    path = tmp_path / f"p{FORMATS[writer][0]}"
    first.save(path, writer, save_all=True, append_images=[other, first, other])
    assert near(read(path), np.asarray(first), 8)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_stored_colours_count_where_they_are_transparent(tmp_path: Path, mode: str) -> None:
    image = PICTURE.quantize(256) if mode == "P" else PICTURE.convert(mode)
    expected = np.asarray(image.convert("RGBA").convert("RGB"))
    if mode == "P":
        image.save(tmp_path / "p.png", transparency=bytes(range(256)))
    else:
        image.putalpha(Image.fromarray(GREY))
        image.save(tmp_path / "p.png")
    assert near(read(tmp_path / "p.png"), expected, 0)


@pytest.mark.parametrize("writer", [w for w in WRITERS if w != "MPO"])
def test_cut_files_are_named_or_whole(tmp_path: Path, writer: str) -> None:
    """What of a picture is missing is not made up."""
    stream = io.BytesIO()
    (PICTURE if writer != "GIF" else FORMS["P"][0]).save(stream, writer)
    whole = stream.getvalue()
    path = tmp_path / f"p{FORMATS[writer][0]}"
    path.write_bytes(whole)
    expected = read(path)
    for part in (0, 3, 20, len(whole) // 3, len(whole) // 2, int(0.9 * len(whole))):
        path.write_bytes(whole[:part])
        try:
            found = read(path)
        except DataError as error:
            assert f"{path}: found an unreadable image (" in str(error)
        else:
            assert near(found, expected, 0), f"{part} of {len(whole)} bytes"


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("side", [10_000, 20_000, 1_000_000])
def test_bombs_are_refused_before_they_are_decoded(tmp_path: Path, side: int) -> None:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    (tmp_path / "p.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(99))))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as the command line does
        with pytest.raises(DataError, match=r"p\.png: found an unreadable image \(.*pixels"):
            decode(tmp_path / "p.png", SHAPE)


def test_every_picture_is_read_or_refused_by_its_name() -> None:
    """None that Pillow can open is passed over in silence, but for films and tables of numbers."""
    Image.init()
    films = {".flc", ".fli", ".mpg", ".mpeg", ".avifs"}
    numbers = {
        ".bufr",
        ".grib",
        ".h5",
        ".hdf",
        ".iim",
        ".dcx",
        ".ftc",
        ".ftu",
        ".gbr",
        ".im",
        ".msp",
        ".pxr",
        ".ps",
    }
    rare = {".ras", ".icb", ".vda", ".vst", ".jpc", ".j2c"}
    known = {s for s, f in Image.registered_extensions().items() if f in Image.OPEN}
    assert known <= SUFFIXES | OTHERS | films | numbers | rare
    assert not SUFFIXES & OTHERS
    assert all(is_image(Path(f"x{s.upper()}")) for s in SUFFIXES)
    assert not any(is_image(Path(name)) for name in (".hidden.png", "notes.txt", "Thumbs.db", ".x.psd"))
    for suffix in OTHERS:
        with pytest.raises(DataError, match=rf"x\{suffix}: found a picture of a kind that is not read"):
            is_image(Path(f"x{suffix}"))
