"""A folder of images by class, with its own train and test folders or split by a seed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from normdrop.data.images import Rule, Unreadable, decode, is_junk, look, walk
from normdrop.data.module import DataModule, InMemory, Samples, Store
from normdrop.errors import UserError

__all__ = ["ImageFolder"]

SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
# Images that share a size up to this keep it; others become squares of one of these sides.
LARGEST_KEPT = 256
LARGEST_SIDE = 4096
SIDES = (16, 24, 28, 32, 48, 64, 96, 128, 160, 192, 224)


class ImageFolder(DataModule):
    """Images in one folder per class: ``cats/1.jpg, dogs/2.png``.

    The class folders lie in the folder itself, which is then split by the seed, class by class,
    or in its ``train/`` and ``test/`` (and ``val/``). Any mode and size works: transparent pixels
    show white, a set of grey images stays at one channel, and mixed sizes are scaled and cut to
    one. What fits in ``memory_budget`` is decoded once; more is decoded batch by batch in threads.

    Args:
        path: the folder.
        image_size, skip_unreadable, memory_budget: see :func:`normdrop.data.load`.
        options: see :class:`normdrop.data.DataModule`.

    Raises:
        UserError: from ``setup``, if a class folder is empty, an image is unreadable, …
    """

    def __init__(
        self,
        path: str | Path,
        *,
        image_size: int | str | tuple[int, int] | None = None,
        skip_unreadable: bool = False,
        memory_budget: int = 2 * 2**30,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.path, self.skip_unreadable = Path(path), skip_unreadable
        self.image_size = _check_size(image_size)
        self.memory_budget = memory_budget
        self.name = self.path.resolve().name

    def _read(self) -> Samples:
        classes, files = _find_files(self.path)
        with ThreadPoolExecutor(_threads()) as pool:
            looks = list(pool.map(_looked, [path for path, _, _ in files]))
            good = [i for i, found in enumerate(looks) if not isinstance(found, str)]
            bad = {i: found for i, found in enumerate(looks) if isinstance(found, str)}
            sizes = [looks[i] for i in good]
            self.rule = self._choose_rule([s for s in sizes if not isinstance(s, str)])
            rule = self.rule
            size = rule.channels * rule.height * rule.width
            fits = size * len(good) <= self.memory_budget
            pixels = np.empty(
                (len(good) if fits else 0, rule.channels, rule.height, rule.width), np.uint8
            )

            def decoded(place: int) -> str:
                try:
                    image = decode(files[good[place]][0], rule)
                except Unreadable as error:
                    return str(error)
                if fits:
                    pixels[place] = image
                return ""

            # Every file is decoded here even where none is kept: a damaged image must show
            # before training, not in the middle of it.
            reasons = list(pool.map(decoded, range(len(good))))
        bad |= {good[place]: reason for place, reason in enumerate(reasons) if reason}
        kept = [place for place, reason in enumerate(reasons) if not reason]
        self._report_unreadable({str(files[i][0]): bad[i] for i in sorted(bad)})
        chosen = [files[good[place]] for place in kept]
        _check_classes_left(classes, [label for _, label, _ in chosen])
        if rule.channels == 3:
            self.suits = ("crop", "flip")
        elif min(rule.height, rule.width) >= 16:
            self.suits = ("crop",)
        paths = [path for path, _, _ in chosen]
        store: Store = (
            InMemory(pixels if len(kept) == len(good) else pixels[kept])
            if fits
            else Files(paths, rule)
        )
        parts = np.array([part for _, _, part in chosen])
        return Samples(
            store=store,
            labels=np.array([label for _, label, _ in chosen], dtype=np.int64),
            classes=classes,
            names=[str(path) for path in paths],
            splits={
                part: np.flatnonzero(parts == part)
                for part in sorted({part for _, _, part in files})
                if part
            },
            identity=[
                [path.relative_to(self.path).as_posix(), path.stat().st_size] for path in paths
            ]
            + [rule.channels, rule.height, rule.width],
        )

    def _choose_rule(self, looks: Sequence[tuple[int, int, bool]]) -> Rule:
        channels = 1 if looks and all(grey for _, _, grey in looks) else 3
        if self.image_size is not None:
            return Rule(channels, *self.image_size)
        sizes = {(height, width) for height, width, _ in looks}
        if len(sizes) == 1 and max(max(sizes)) <= LARGEST_KEPT:
            return Rule(channels, *sizes.pop())
        if not looks:
            return Rule(channels, 1, 1)
        middle = int(np.median([min(height, width) for height, width, _ in looks]))
        side = max((side for side in SIDES if side <= middle), default=middle)
        return Rule(channels, side, side)

    def _report_unreadable(self, bad: dict[str, str]) -> None:
        self.skipped = list(bad.items())
        if not bad or self.skip_unreadable:
            return
        shown = "; ".join(f"{path} ({reason})" for path, reason in self.skipped[:5])
        more = f"; and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise UserError(
            f"{len(bad)} {'image' if len(bad) == 1 else 'images'} cannot be read: {shown}{more}; "
            f"repair or remove {'it' if len(bad) == 1 else 'them'}, or go on without by "
            f"--skip-unreadable (skip_unreadable=True)"
        )

    def _encoding(self) -> dict[str, Any]:
        return {
            "channels": self.rule.channels,
            "size": [self.rule.height, self.rule.width],
        }


@dataclass
class Files:
    """Images that are decoded when a batch asks for them, in threads."""

    paths: list[Path]
    rule: Rule

    def take(self, positions: np.ndarray) -> np.ndarray:
        rule = self.rule
        pixels = np.empty((len(positions), rule.channels, rule.height, rule.width), np.uint8)

        def fill(place: int) -> None:
            path = self.paths[positions[place]]
            try:
                pixels[place] = decode(path, rule)
            except Unreadable as error:
                raise UserError(
                    f"image {str(path)!r} cannot be read any more ({error}); it could when the "
                    f"run began"
                ) from error

        with ThreadPoolExecutor(_threads()) as pool:
            list(pool.map(fill, range(len(positions))))
        return pixels

    def __len__(self) -> int:
        return len(self.paths)


def _threads() -> int:
    return min(8, os.cpu_count() or 1)


def _looked(path: Path) -> tuple[int, int, bool] | str:
    try:
        return look(path)
    except Unreadable as error:
        return str(error)


def _check_size(size: int | str | Sequence[int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    try:
        parts = size.lower().split("x") if isinstance(size, str) else size
        sides = [int(side) for side in ([parts] if isinstance(parts, int) else parts)]
    except (TypeError, ValueError):
        sides = []
    if len(sides) not in (1, 2) or any(side < 1 for side in sides):
        raise UserError(
            f"image_size must be one or two numbers of at least 1, such as 64 or 48x64 (height x "
            f"width), but got {size!r}"
        )
    if max(sides) > LARGEST_SIDE:
        raise UserError(
            f"image_size must be at most {LARGEST_SIDE} pixels a side, but got {size!r}; a batch "
            f"of such images would not fit into memory"
        )
    return sides[0], sides[-1]


def _folders(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))


def _find_files(root: Path) -> tuple[tuple[str, ...], list[tuple[Path, int, str]]]:
    """Classes, and (path, class, part) of every file that is not junk; part is "" if unsplit."""
    if not root.is_dir():
        raise UserError(f"data must be a folder of images by class, but {root} is none")
    below = {path.name.lower(): path for path in _folders(root)}
    parts = {
        part: below[name]
        for part, names in SPLIT_FOLDERS.items()
        for name in names
        if name in below
    }
    has_own_parts = "train" in parts and (len(parts) > 1 or bool(_folders(parts["train"])))
    roots = parts if has_own_parts else {"": root}
    folders = {part: _folders(path) for part, path in roots.items()}
    for part, path in roots.items():
        if not folders[part]:
            loose = sum(not is_junk(p) for p in path.iterdir() if p.is_file())
            has = (
                f"holds {loose} files and no folder"
                if loose
                else "holds neither folders nor images"
            )
            raise UserError(
                f"folder {str(path)!r} must hold one folder of images per class, but it {has}; "
                f"make folders named after the classes and put the images into them"
            )
    classes = tuple(sorted({folder.name for group in folders.values() for folder in group}))
    files: list[tuple[Path, int, str]] = []
    for part, group in folders.items():
        for folder in group:
            found = walk(folder)
            if not found:
                raise UserError(
                    f"class folder {folder} holds no images; put images into it, or remove it"
                )
            files += [(path, classes.index(folder.name), part) for path in found]
    return classes, files


def _check_classes_left(classes: tuple[str, ...], labels: list[int]) -> None:
    lost = sorted(set(range(len(classes))) - set(labels))
    if lost:
        raise UserError(
            f"class {classes[lost[0]]!r} has no readable image; repair its images, or remove it"
        )
