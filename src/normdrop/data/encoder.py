"""New files to a network's input, by what a finished run remembers of its data."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from normdrop.errors import UserError

__all__ = ["Encoder", "encoder"]


class Encoder(Protocol):
    """Reads files as a network's training data was read; made by :func:`encoder`."""

    def read(
        self, paths: Iterable[str | Path], *, skipped: list[tuple[str, str]] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Give (name, input without a batch dimension) for every image, or every row of a table.

        Args:
            paths: files, or folders of images.
            skipped: takes the path and the reason of every image that cannot be read; without it
                such an image is an error.

        Raises:
            UserError: a file is missing or cannot be read; the message names it.
        """
        ...


def encoder(state: dict[str, Any]) -> Encoder:
    """The encoder of a finished run's data.

    Args:
        state: from :meth:`normdrop.data.DataModule.state`.

    Raises:
        UserError: the state is not one that ``state`` gives.

    Example:
        >>> encoder({"kind": "image", "channels": 1, "size": [8, 8]})
        Images(channels=1, height=8, width=8)
    """
    try:
        if state["kind"] == "table":
            return Rows(state["columns"])
        return Images(int(state["channels"]), *(int(side) for side in state["size"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"the run's description of its data must be what normdrop wrote, but {error!r} is "
            f"missing or wrong in it"
        ) from error


class Images:
    """Image files as (C, H, W) float32 in [0, 1], by the rule of the training set."""

    def __init__(self, channels: int, height: int, width: int) -> None:
        from normdrop.data.images import Rule

        self.rule = Rule(channels, height, width)

    def __repr__(self) -> str:
        return (
            f"Images(channels={self.rule.channels}, height={self.rule.height}, "
            f"width={self.rule.width})"
        )

    def read(
        self, paths: Iterable[str | Path], *, skipped: list[tuple[str, str]] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        from normdrop.data.images import Unreadable, decode, to_float, walk

        for given in paths:
            path = Path(given)
            _check_exists(path)
            files = walk(path) if path.is_dir() else [path]
            if not files:
                raise UserError(f"folder {str(path)!r} has no images")
            for file in files:
                try:
                    pixels = np.ascontiguousarray(decode(file, self.rule))
                except Unreadable as error:
                    if skipped is None:
                        raise UserError(
                            f"image {str(file)!r} cannot be read ({error}); leave out such images "
                            f"by --skip-unreadable"
                        ) from error
                    skipped.append((str(file), str(error)))
                    continue
                yield str(file), torch.from_numpy(to_float(pixels))


class Rows:
    """The rows of CSV or Parquet tables as (F,) float32; further columns are left alone."""

    def __init__(self, columns: list[dict[str, Any]]) -> None:
        self.columns = columns

    def read(
        self, paths: Iterable[str | Path], *, skipped: list[tuple[str, str]] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        from normdrop.data.table import encode_rows
        from normdrop.data.table_file import read_table

        for given in paths:
            path = Path(given)
            _check_exists(path)
            frame = read_table(path)
            self._check_columns(frame.columns, path)
            frame = frame[[column["name"] for column in self.columns]]
            self._check_values(frame, path)
            values, unseen = encode_rows(frame, self.columns)
            for name, count in unseen.items():
                warnings.warn(
                    f"{count} of {len(frame)} rows of {path} have a value of {name!r} that "
                    f"training never saw; it counts as none of the known ones",
                    stacklevel=2,
                )
            for row, inputs in enumerate(torch.from_numpy(values), 1):
                yield f"{path}:{row}", inputs

    def _check_columns(self, present: Iterable[str], path: Path) -> None:
        present = list(present)
        lacking = [c["name"] for c in self.columns if c["name"] not in present]
        if lacking:
            near = difflib.get_close_matches(lacking[0], present, 1)
            hint = f"; is it {near[0]!r} there?" if near else ""
            raise UserError(
                f"table {str(path)!r} must have the columns that the network was trained on, but "
                f"lacks {', '.join(lacking[:5])}{', …' if len(lacking) > 5 else ''}{hint}"
            )

    def _check_values(self, frame: Any, path: Path) -> None:
        from normdrop.data.table_file import as_numbers

        bad = {}
        for column in self.columns:
            values = frame[column["name"]]
            if column["kind"] == "number":
                lacking = ~np.isfinite(as_numbers(values, column["form"]))
            else:
                lacking = values.isna() | (values.astype(str).str.strip() == "")
            if count := int(lacking.sum()):
                bad[column["name"]] = count
        if bad:
            shown = ", ".join(f"{name} ({count})" for name, count in list(bad.items())[:5])
            raise UserError(
                f"table {str(path)!r} has values that are missing, or no numbers where training "
                f"had numbers, in {shown}; fill them in"
            )


def _check_exists(path: Path) -> None:
    if not path.exists():
        raise UserError(f"there is no file {str(path)!r}")
