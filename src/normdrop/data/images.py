"""One image file to a uint8 array: any mode, any size, one rule for training and prediction."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import TiffImageFile

__all__ = ["Rule", "Unreadable", "decode", "is_junk", "look", "to_float", "walk"]

GREY_MODES = ("1", "L", "LA", "La", "I;16", "I;16L", "I;16B", "I;16N", "I")
JUNK_SUFFIXES = (
    *(".txt", ".md", ".rst", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".toml"),
    *(".html", ".htm", ".ini", ".cfg", ".log", ".db", ".py", ".ipynb", ".lock", ".part", ".tmp"),
)
JUNK_NAMES = ("license", "readme", "sha256sums", "md5sums")
EXIF_ORIENTATION = 0x0112
TIFF_SAMPLE_FORMAT = 339


class Unreadable(Exception):
    """An image file that cannot be decoded; the text is the reason, without the path."""


@dataclass(frozen=True)
class Rule:
    """How every image of a set becomes (channels, height, width) uint8.

    An image of another size is scaled, keeping its aspect, until it covers height × width, and
    its centre is cut out.
    """

    channels: int
    height: int
    width: int


def is_junk(path: Path) -> bool:
    """Files that lie beside images and are quietly left alone: .DS_Store, Thumbs.db, .txt, …"""
    name = path.name.lower()
    return name.startswith(".") or name in JUNK_NAMES or path.suffix.lower() in JUNK_SUFFIXES


def look(path: Path) -> tuple[int, int, bool]:
    """Height, width (as the orientation in its metadata shows it) and whether it is grey.

    Reads the header only.

    Raises:
        Unreadable: not an image, or a damaged one.
    """
    try:
        with Image.open(path) as image:
            _check_mode(image)
            width, height = image.size
            if image.getexif().get(EXIF_ORIENTATION, 1) in (5, 6, 7, 8):
                width, height = height, width
            return height, width, image.mode in GREY_MODES or _has_grey_palette(image)
    except Exception as error:  # Pillow raises SyntaxError, struct.error and more for bad files.
        raise Unreadable(_reason(error, path)) from error


def decode(path: Path, rule: Rule) -> np.ndarray:
    """Read an image file as (channels, height, width) uint8.

    Transparent pixels show white, 16-bit grey is divided by 257, of 32-bit grey beyond that the
    image's own highest value is white, the orientation that a camera noted is applied, and of an
    animation the first frame is taken.

    Raises:
        Unreadable: not an image, or a damaged one, such as a JPEG that is cut off.
    """
    try:
        with Image.open(path) as image:
            _check_mode(image)
            # Decode a large JPEG at a fraction of its size, but never below what is needed.
            if image.format == "JPEG" and rule.height and rule.width:
                side = max(rule.height, rule.width) * 2
                image.draft(None, (side, side))
            image.load()
            upright = ImageOps.exif_transpose(image)
            plain = _plain(upright, "L" if rule.channels == 1 else "RGB", _is_unsigned(image))
    except Exception as error:
        raise Unreadable(_reason(error, path)) from error
    size = (rule.width, rule.height)
    if plain.size != size:
        plain = ImageOps.fit(plain, size, Image.Resampling.BILINEAR)
    array = np.asarray(plain, dtype=np.uint8)
    return array[None] if rule.channels == 1 else np.moveaxis(array, 2, 0)


def to_float(pixels: np.ndarray) -> np.ndarray:
    """uint8 pixels as float32 in [0, 1]; training and prediction must round alike."""
    return np.asarray(np.divide(pixels, np.float32(255), dtype=np.float32))


def _plain(image: Image.Image, mode: str, unsigned: bool) -> Image.Image:
    if image.mode.startswith("I"):
        # Older Pillow opens a 16-bit PNG as mode I, newer as I;16: the values are the same.
        values = np.asarray(image).astype(np.int64)
        if unsigned:
            values &= 0xFFFFFFFF
        low, high = min(0, values.min()), max(65535, values.max())
        image = Image.fromarray(np.rint((values - low) * (255 / (high - low))).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == mode else image.convert(mode)


def _is_unsigned(image: Image.Image) -> bool:
    """Whether 32-bit pixels, which Pillow gives as signed, are none."""
    return isinstance(image, TiffImageFile) and 2 not in image.tag_v2.get(TIFF_SAMPLE_FORMAT, (1,))


def _check_mode(image: Image.Image) -> None:
    # Nothing says which numbers are black and white.
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; save it with 8 or 16 bits")


def _has_grey_palette(image: Image.Image) -> bool:
    if image.mode != "P" or "transparency" in image.info:
        return False
    colours = image.getpalette() or []
    return all(colours[i] == colours[i + 1] == colours[i + 2] for i in range(0, len(colours), 3))


def _reason(error: BaseException, path: Path) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        kind = _foreign_kind(path)
        return f"it is {kind}; save it as PNG or JPEG" if kind else "it is no image file"
    text = str(error) or type(error).__name__
    return text[:1].lower() + text[1:] if not text[:2].isupper() else text


def _foreign_kind(path: Path) -> str:
    """What a file that Pillow does not read is, by its first bytes; empty for anything else."""
    with path.open("rb") as file:
        head = file.read(512)
    if head.startswith(b"%PDF"):
        return "a PDF"
    if b"<svg" in head:
        return "an SVG"
    brand = head[8:12] if head[4:8] == b"ftyp" else b""
    return {b"heic": "a HEIC", b"heix": "a HEIC", b"mif1": "a HEIC", b"avif": "an AVIF"}.get(
        brand, "a film" if brand else ""
    )


def walk(folder: Path) -> list[Path]:
    """Every file below a folder that is not junk, sorted; follows links, but not in circles."""
    files: list[Path] = []
    seen: set[str] = set()
    for where, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [Path(where, name) for name in names]
    return sorted(file for file in files if not is_junk(file))
