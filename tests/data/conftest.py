"""Small data that the tests make themselves."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from normdrop.data import fashion_mnist


def idx_bytes(values: np.ndarray) -> bytes:
    head = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
    return head + values.astype(np.uint8).tobytes()


@pytest.fixture
def tiny_idx() -> dict[str, bytes]:
    """A fabricated set of 40 training and 20 test images of 10 classes, as IDX contents."""
    draw = np.random.default_rng(0)
    return {
        "train-images-idx3-ubyte": idx_bytes(draw.integers(0, 256, (40, 28, 28))),
        "train-labels-idx1-ubyte": idx_bytes(np.arange(40) % 10),
        "t10k-images-idx3-ubyte": idx_bytes(draw.integers(0, 256, (20, 28, 28))),
        "t10k-labels-idx1-ubyte": idx_bytes(np.arange(20) % 10),
    }


@pytest.fixture
def write_idx() -> Callable[[Path, dict[str, bytes]], Path]:
    def write(folder: Path, contents: dict[str, bytes], *, packed: bool = True) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            if packed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / name).write_bytes(content)
        return folder

    return write


@pytest.fixture
def tiny_is_published(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_idx: dict[str, bytes]
) -> Path:
    """Let the fabricated set pass for the published one, without Debian's; gives the cache."""
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in tiny_idx.items()}
    monkeypatch.setattr(fashion_mnist, "CONTENT_SHA256", sums)
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "no-debian")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "normdrop" / "fashion-mnist"


@pytest.fixture
def image_folder(tmp_path: Path) -> Callable[..., Path]:
    """Make a folder of images by class: ``image_folder({"cat": 6, "train/dog": 4}, size=…)``."""

    def make(
        counts: dict[str, int],
        *,
        size: tuple[int, int] = (16, 16),
        mode: str = "RGB",
        name: str = "pets",
    ) -> Path:
        draw = np.random.default_rng(1)
        root = tmp_path / name
        for label, count in counts.items():
            folder = root / label
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                shape = size if mode == "L" else (*size, 3)
                pixels = draw.integers(0, 256, shape).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
        return root

    return make
