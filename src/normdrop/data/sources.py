"""From what the user names to the module that reads it."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from normdrop.data.module import DataModule
from normdrop.data.table_file import TABLE_SUFFIXES
from normdrop.errors import UserError

__all__ = ["SOURCES", "load"]

SOURCES = ("digits", "fashion-mnist")


def load(
    source: str | Path,
    *,
    batch_size: int = 128,
    seed: int = 0,
    validation: float = 0.1,
    test: float = 0.2,
    augment: bool | str | Sequence[str] | None = None,
    folder: str | Path | None = None,
    image_size: int | str | tuple[int, int] | None = None,
    skip_unreadable: bool = False,
    memory_budget: int = 2 * 2**30,
    target: str | None = None,
    ignore: str | Sequence[str] = (),
    missing: str = "error",
    standardize: bool = True,
) -> DataModule:
    """Make the data module of a source; nothing is read before its ``setup``.

    Args:
        source: "digits" (scikit-learn's, embedded), "fashion-mnist", a folder of images by class,
            a folder of IDX files named as Fashion-MNIST's, a table (.csv, .tsv or .parquet), or a
            folder with train and test tables.
        batch_size, seed, validation, test, augment: see :class:`normdrop.data.DataModule`.
        folder: fashion-mnist only: where its four files lie.
        image_size: image folders only: (height, width), "48x64", or one number for both; by
            default the size of the images if they share one of at most 256, else a square that
            suits them, of at most 224.
        skip_unreadable: image folders only: leave out images that cannot be read, listed in
            ``skipped``, rather than raise.
        memory_budget: image folders only: bytes of decoded pixels to keep in memory; larger
            folders are decoded batch by batch.
        target: tables only: the column of the classes; by default the one named target, label or
            class, else the last.
        ignore: tables only: columns to leave out, as a sequence or with commas between.
        missing: tables only: "error", or "drop" to leave out rows with missing values.
        standardize: tables only: numeric columns to mean 0 and deviation 1 over the training
            samples; False leaves that to batch normalization at the input.

    Raises:
        UserError: no such source, or an option that it does not have.

    Example:
        >>> data = load("digits", batch_size=64)
        >>> x, y = next(iter(data.train_dataloader()))
        >>> x.shape, y.dtype
        (torch.Size([64, 1, 8, 8]), torch.int64)
    """
    if isinstance(ignore, str):
        ignore = [name.strip() for name in ignore.split(",") if name.strip()]
    common: dict[str, Any] = {
        "batch_size": batch_size,
        "seed": seed,
        "validation": validation,
        "test": test,
        "augment": augment,
    }
    fashion = {"folder": (folder, None)}
    images = {
        "image_size": (image_size, None),
        "skip_unreadable": (skip_unreadable, False),
        "memory_budget": (memory_budget, 2 * 2**30),
    }
    tables = {
        "target": (target, None),
        "ignore": (tuple(ignore), ()),
        "missing": (missing, "error"),
        "standardize": (standardize, True),
    }

    def only(name: str, *groups: dict[str, tuple[Any, Any]]) -> dict[str, Any]:
        """The options of the groups that apply; another one that was set is an error."""
        for group in (fashion, images, tables):
            for option, (value, default) in group.items():
                if group not in groups and value != default:
                    raise UserError(f"{option} is not an option of {name}; leave it out")
        return common | {option: value for group in groups for option, (value, _) in group.items()}

    text = str(source)
    if text == "digits":
        from normdrop.data.digits import Digits

        return Digits(**only(text))
    from normdrop.data import fashion_mnist

    if text == "fashion-mnist":
        return fashion_mnist.FashionMNIST(**only(text, fashion))
    path = Path(source).expanduser()
    if not path.exists():
        near = difflib.get_close_matches(text.lower().replace("_", "-"), SOURCES, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(
            f"data must be {', '.join(map(repr, SOURCES))}, a folder of images or a table, but "
            f"there is nothing at {text!r}{hint}"
        )
    if path.is_dir() and fashion_mnist.has_idx_files(path):
        return fashion_mnist.FashionMNIST(**only(text) | {"folder": path})
    from normdrop.data.table import Table, has_tables

    if (path.is_file() and path.suffix.lower() in TABLE_SUFFIXES) or has_tables(path):
        return Table(path, **only(text, tables))
    if path.is_file():
        raise UserError(
            f"data must be a folder of images or a table ({', '.join(TABLE_SUFFIXES)}), but got "
            f"the file {text!r}"
        )
    from normdrop.data.image_folder import ImageFolder

    return ImageFolder(path, **only(text, images))
