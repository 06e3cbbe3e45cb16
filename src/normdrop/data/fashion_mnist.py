"""Fashion-MNIST (Xiao, Rasul & Vollgraf 2017), and any folder of IDX files like it."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import os
import urllib.error
import urllib.request
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from normdrop.data.module import DataModule, InMemory, Samples
from normdrop.errors import UserError
from normdrop.files import write_atomically

__all__ = ["FashionMNIST", "has_idx_files"]

# The data set's own distribution, as its README links it.
BASE_ADDRESS = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
TIMEOUT_SECONDS = 30.0

# SHA-256 of what the .gz files hold. Debian's files have another gzip header than the published
# ones (no name, another time), so a checksum of the compressed bytes would refuse one of them.
CONTENT_SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
# Twice the largest published file; a server that sends more sends something else.
MOST_BYTES = 64 * 2**20


class FashionMNIST(DataModule):
    """70,000 grey images (1, 28, 28) of ten kinds of clothing, with their official test part.

    Read from ``folder`` if given, else from Debian's package dataset-fashion-mnist, else from the
    cache, else downloaded once into the cache; all but the given folder are held against known
    checksums. A given folder may hold other IDX files of the same names, such as MNIST's.

    Args:
        folder: with the four IDX files, compressed or not.
        options: see :class:`normdrop.data.DataModule`; validation comes out of the 60,000
            training images, and ``test`` is not used.

    Raises:
        UserError: from ``setup``, if no folder has the files and they cannot be downloaded.
    """

    name = "fashion-mnist"
    suits = ("crop", "flip")

    def __init__(self, *, folder: str | Path | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.folder = Path(folder) if folder is not None else None

    def _read(self) -> Samples:
        if self.folder is not None:
            contents = _read_given(self.folder)
        elif has_idx_files(DEBIAN_FOLDER):
            contents = {
                name: _read_checked(DEBIAN_FOLDER / f"{name}.gz", name) for name in CONTENT_SHA256
            }
        else:
            contents = _read_cache()
        parts = []
        for part in ("train", "t10k"):
            images = _idx(contents, f"{part}-images-idx3-ubyte", 3)
            labels = _idx(contents, f"{part}-labels-idx1-ubyte", 1)
            if len(images) != len(labels):
                raise UserError(
                    f"{part}-images and {part}-labels must have equally many entries, but got "
                    f"{len(images)} and {len(labels)}"
                )
            parts.append((images, labels))
        (train, train_labels), (test, test_labels) = parts
        if train.shape[1:] != test.shape[1:]:
            raise UserError(
                f"train and t10k images must have one size, but got {train.shape[1:]} and "
                f"{test.shape[1:]}"
            )
        labels = np.concatenate([train_labels, test_labels]).astype(np.int64)
        highest = int(labels.max())
        classes: tuple[str, ...] = CLASSES
        if self.folder is not None and not _is_published(contents):
            self.name = self.folder.name or self.name
            classes = tuple(str(c) for c in range(highest + 1))
        return Samples(
            store=InMemory(np.concatenate([train, test])[:, None]),
            labels=labels,
            classes=classes,
            names=[f"train[{i}]" for i in range(len(train))]
            + [f"test[{i}]" for i in range(len(test))],
            splits={
                "train": np.arange(len(train)),
                "test": np.arange(len(train), len(train) + len(test)),
            },
        )

    def _encoding(self) -> dict[str, Any]:
        return {"channels": 1, "size": list(self.input_shape[1:])}


def has_idx_files(folder: Path) -> bool:
    """Whether the folder has all four files, compressed or not."""
    return all(_find(folder, name) is not None for name in CONTENT_SHA256)


def _find(folder: Path, name: str) -> Path | None:
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    return None


def _read_given(folder: Path) -> dict[str, bytes]:
    if not folder.is_dir():
        raise UserError(f"folder must be a folder with IDX files, but there is none at {folder}")
    contents = {}
    for name in CONTENT_SHA256:
        path = _find(folder, name)
        if path is None:
            raise UserError(f"{folder} must hold {name}.gz, but it does not")
        contents[name] = _unpacked(path)
    return contents


def _is_published(contents: dict[str, bytes]) -> bool:
    return all(
        hashlib.sha256(contents[name]).hexdigest() == known
        for name, known in CONTENT_SHA256.items()
    )


def _unpacked(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}); replace it by a good copy") from error


def _read_checked(path: Path, name: str) -> bytes:
    content = _unpacked(path)
    if hashlib.sha256(content).hexdigest() != CONTENT_SHA256[name]:
        raise UserError(
            f"{path} is not Fashion-MNIST's file (its checksum differs); replace it by a good copy"
        )
    return content


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/normdrop/fashion-mnist``, by default under ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "normdrop" / "fashion-mnist"


def _read_cache() -> dict[str, bytes]:
    """The four files out of the cache; what is missing or damaged there is downloaded."""
    folder = cache_folder()

    def content(name: str) -> bytes:
        path = _find(folder, name)
        if path is None:
            return _download(name, folder)
        try:
            return _read_checked(path, name)
        except UserError:
            return _download(name, folder)

    return {name: content(name) for name in CONTENT_SHA256}


def _download(name: str, folder: Path) -> bytes:
    address = f"{BASE_ADDRESS}/{name}.gz"
    instead = (
        f"install Debian's package dataset-fashion-mnist, or put the four files "
        f"{', '.join(f'{file}.gz' for file in CONTENT_SHA256)} into {folder}"
    )
    try:
        with urllib.request.urlopen(address, timeout=TIMEOUT_SECONDS) as answer:
            raw = answer.read(MOST_BYTES + 1)
    except (OSError, http.client.HTTPException) as error:
        reason = error.reason if type(error) is urllib.error.URLError else error
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        raise UserError(
            f"Fashion-MNIST cannot be downloaded from {address} ({reason}); {instead}"
        ) from error
    try:
        content = gzip.decompress(raw) if len(raw) <= MOST_BYTES else b""
    except (OSError, EOFError, zlib.error):
        content = b""
    if hashlib.sha256(content).hexdigest() != CONTENT_SHA256[name]:
        raise UserError(
            f"what {address} sent is not Fashion-MNIST's file (its checksum differs); try again, "
            f"or {instead}"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with write_atomically(folder / f"{name}.gz") as temporary:
            temporary.write_bytes(raw)
    except OSError as error:
        raise UserError(f"{folder} cannot be written to ({error}); {instead}") from error
    return content


def _idx(contents: dict[str, bytes], name: str, dimensions: int) -> np.ndarray:
    """Decode the IDX format: 0, 0, type 8 (uint8), number of dimensions, sizes, then the values."""
    content = contents[name]
    head = 4 + 4 * dimensions
    magic = bytes([0, 0, 8, dimensions])
    shape = tuple(int(n) for n in np.frombuffer(content[4:head].ljust(4 * dimensions), ">u4"))
    if content[:4] != magic or len(content) != head + int(np.prod(shape, dtype=np.int64)):
        raise UserError(
            f"{name} must be an IDX file of {dimensions}-dimensional uint8 values, but its header "
            f"says otherwise or it is cut off"
        )
    return np.frombuffer(content, np.uint8, offset=head).reshape(shape).copy()
