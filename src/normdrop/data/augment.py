"""Augmentation of whole batches of uint8 images, a pure function of (seed, epoch, batch)."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import numpy as np

from normdrop.data.batches import Batch
from normdrop.errors import UserError

__all__ = ["NAMES", "Augmentation", "augmentation_names"]

NAMES = ("shift", "crop", "flip", "cutout", "erase")


def augmentation_names(
    augment: bool | str | Sequence[str] | None, suits: Sequence[str]
) -> tuple[str, ...]:
    """What the option ``augment`` asks for: None is what suits, True is crop and flip.

    A text has commas between the names; "none" is the same as False.
    """
    if augment is None:
        return tuple(suits)
    if augment == "none":
        return ()
    if isinstance(augment, bool):
        return ("crop", "flip") if augment else ()
    if isinstance(augment, str):
        augment = [part.strip() for part in augment.replace("+", ",").split(",") if part.strip()]
    for name in augment:
        if name not in NAMES:
            near = difflib.get_close_matches(str(name), NAMES, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(
                f"augment must be none or name some of {', '.join(NAMES)}, but got {name!r}{hint}"
            )
    return tuple(name for name in NAMES if name in augment)


class Augmentation:
    """Changes a batch of images at random; the same (seed, epoch, batch) gives the same bits.

    What is drawn belongs to a sample's place in the whole batch, so the shards of several
    processes together equal the batch of one. In this order:

    - ``shift``: moved by −1, 0 or 1 pixels each way, zeros come in;
    - ``crop``: zero-padded by an eighth of the height and width, cropped back at random;
    - ``flip``: mirrored left to right, half of the images;
    - ``cutout``: a square of half the side length is set to 0 (DeVries & Taylor 2017);
    - ``erase``: in half of the images a rectangle of 2 to 33 % of the area, of aspect 0.3 to 3.3,
      is filled with noise (Zhong et al. 2017).

    Args:
        names: some of the above.
        seed: of all draws.

    Shape:
        (N, C, H, W) uint8 to the same; the input is not changed.
    """

    def __init__(self, names: Sequence[str], seed: int) -> None:
        self.names, self.seed = tuple(names), seed

    def __call__(self, images: np.ndarray, batch: Batch) -> np.ndarray:
        if not self.names:
            return images
        count, _, height, width = images.shape
        mine = slice(batch.first, batch.first + count)
        for name in self.names:
            # One stream for each kind: switching one on leaves the others' draws as they were.
            draw = np.random.default_rng(
                [self.seed, batch.epoch, batch.number, 1 + NAMES.index(name)]
            )
            if name == "flip":
                images = _flip(images, draw.random(batch.total)[mine] < 0.5)
            elif name in ("shift", "crop"):
                pads = (1, 1) if name == "shift" else (max(1, height // 8), max(1, width // 8))
                rows = draw.integers(0, 2 * pads[0] + 1, batch.total)[mine]
                columns = draw.integers(0, 2 * pads[1] + 1, batch.total)[mine]
                images = _crop(images, pads, rows, columns)
            else:
                boxes = _squares if name == "cutout" else _rectangles
                inside = _inside(
                    height, width, *(edge[mine] for edge in boxes(draw, batch.total, height, width))
                )
                if name == "cutout":
                    images = np.where(inside, np.uint8(0), images)
                else:
                    images = _fill_with_noise(images, inside, draw, batch)
        return images


def _flip(images: np.ndarray, which: np.ndarray) -> np.ndarray:
    images = images.copy()
    images[which] = images[which, :, :, ::-1]
    return images


def _crop(
    images: np.ndarray, pads: tuple[int, int], rows: np.ndarray, columns: np.ndarray
) -> np.ndarray:
    """Window i begins at (rows[i], columns[i]) of image i after padding: one gather, no loop."""
    count, channels, height, width = images.shape
    tall, wide = height + 2 * pads[0], width + 2 * pads[1]
    padded = np.zeros((count, channels, tall, wide), images.dtype)
    padded[:, :, pads[0] : pads[0] + height, pads[1] : pads[1] + width] = images
    # windows[i, :, dy, dx] is the view of image i that begins at (dy, dx); nothing is copied.
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(2, 3))
    return windows[np.arange(count), :, rows, columns]


def _squares(
    draw: np.random.Generator, count: int, height: int, width: int
) -> tuple[np.ndarray, ...]:
    """Edges (top, bottom, left, right); the centre is anywhere, so a square may reach outside."""
    centre_y = draw.integers(0, height, count)
    centre_x = draw.integers(0, width, count)
    half_y, half_x = max(1, height // 4), max(1, width // 4)
    return centre_y - half_y, centre_y + half_y, centre_x - half_x, centre_x + half_x


def _rectangles(
    draw: np.random.Generator, count: int, height: int, width: int
) -> tuple[np.ndarray, ...]:
    area = draw.uniform(0.02, 0.33, count) * (height * width)
    aspect = np.exp(draw.uniform(np.log(0.3), np.log(1 / 0.3), count))
    tall = np.clip(np.rint(np.sqrt(area * aspect)), 1, height).astype(np.int64)
    wide = np.clip(np.rint(np.sqrt(area / aspect)), 1, width).astype(np.int64)
    tall[draw.random(count) >= 0.5] = 0
    top = (draw.random(count) * (height - tall + 1)).astype(np.int64)
    left = (draw.random(count) * (width - wide + 1)).astype(np.int64)
    return top, top + tall, left, left + wide


def _inside(
    height: int,
    width: int,
    top: np.ndarray,
    bottom: np.ndarray,
    left: np.ndarray,
    right: np.ndarray,
) -> np.ndarray:
    """(N, 1, H, W) bool: which pixels lie in image i's box."""
    y, x = np.arange(height)[None, :], np.arange(width)[None, :]
    rows = (y >= top[:, None]) & (y < bottom[:, None])
    columns = (x >= left[:, None]) & (x < right[:, None])
    return rows[:, None, :, None] & columns[:, None, None, :]


def _fill_with_noise(
    images: np.ndarray, inside: np.ndarray, draw: np.random.Generator, batch: Batch
) -> np.ndarray:
    shape = (batch.total, *images.shape[1:])
    noise = np.frombuffer(draw.bytes(int(np.prod(shape))), dtype=np.uint8).reshape(shape)
    mine = noise[batch.first : batch.first + len(images)]
    return np.where(inside, mine, images)
