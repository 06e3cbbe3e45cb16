"""CSV and Parquet tables with a target column: numbers standardised, categories one-hot."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from normdrop.data.module import DataModule, InMemory, Samples
from normdrop.data.table_file import (
    TABLE_SUFFIXES,
    Meaning,
    as_numbers,
    is_csv,
    read_meaning,
    read_table,
)
from normdrop.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Table", "encode_rows", "has_tables", "labels_in", "table_in"]

TARGET_NAMES = ("target", "label", "class")
# More distinct texts than this in one column are names or free text, not categories.
MOST_CATEGORIES = 1000
MOST_CLASSES = 1000
LARGEST = 1e30


class Table(DataModule):
    """A classification table: numeric and categorical columns and one target column.

    Numeric columns become (v − mean) / deviation with the training samples' mean and deviation;
    each other column becomes one input per category that training saw, 1 for the row's own and 0
    for the others. A folder with train.csv and test.csv (or .parquet; val.csv too) keeps its
    parts; a single table is split by the seed, class by class.

    Args:
        path: .csv, .tsv or .parquet, or a folder with train and test tables.
        target, ignore, missing, standardize: see :func:`normdrop.data.load`.
        options: see :class:`normdrop.data.DataModule`.

    Raises:
        UserError: from ``setup``, if the table cannot be used as it is.
    """

    kind = "table"

    def __init__(
        self,
        path: str | Path,
        *,
        target: str | None = None,
        ignore: Sequence[str] = (),
        missing: str = "error",
        standardize: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if missing not in ("error", "drop"):
            raise UserError(f"missing must be 'error' or 'drop', but got {missing!r}")
        self.path, self.target, self.missing = Path(path), target, missing
        self.ignore, self.standardize = tuple(ignore), standardize
        self.name = self.path.stem if self.path.is_file() else self.path.name

    def _read(self) -> Samples:
        import pandas as pd

        if self.path.is_dir():
            found = {part: table_in(self.path, part) for part in ("train", "val", "test")}
            paths = {part: path for part, path in found.items() if path}
        else:
            paths = {"": self.path}
        frames = {part: read_table(path) for part, path in paths.items()}
        _check_same_columns(frames, self.path)
        if any(map(is_csv, paths.values())):
            frames = {
                part: frame if is_csv(paths[part]) else _as_texts(frame)
                for part, frame in frames.items()
            }
        # The parts' types are found out together, or 1 and 1.5 would differ between them.
        frame = pd.concat(frames, names=["part", "row"])
        target = self._target_column(frame)
        ignored = [self._column(frame, name, "ignore") for name in self.ignore]
        if target in ignored:
            raise UserError(f"the target column {target!r} cannot be in ignore")
        frame = frame.drop(columns=ignored)
        meanings: dict[str, Meaning] = {}
        if any(map(is_csv, paths.values())):
            separator = frame.attrs.get("separator", ",")
            meanings = {
                name: read_meaning(
                    frame[name], name, self.path, separator=separator, flags=name != target
                )
                for name in frame.columns
            }
            frame = pd.DataFrame({name: meaning.values for name, meaning in meanings.items()})
        frame = self._without_missing(frame, target, meanings)
        classes, labels = _classes(frame[target], target)
        features = frame.drop(columns=[target])
        if not len(features.columns):
            raise UserError(f"{self.path} must have a column beside the target {target!r}")
        self._target, self._features, self._meanings = target, features, meanings
        part_of = np.asarray(frame.index.get_level_values("part"))
        return Samples(
            # The inputs depend on the training part: _fit makes them.
            store=InMemory(np.zeros((len(frame), 0), np.float32)),
            labels=labels,
            classes=classes,
            names=[f"{part} row {row + 1}".strip() for part, row in frame.index],
            splits={part: np.flatnonzero(part_of == part) for part in frames if part},
        )

    def _column(self, frame: pd.DataFrame, name: str, option: str) -> str:
        columns = [str(column) for column in frame.columns]
        if name in columns:
            return name
        near = difflib.get_close_matches(name, columns, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        shown = ", ".join(columns[:20]) + (", …" if len(columns) > 20 else "")
        raise UserError(f"{option} {name!r} is no column of {self.path}; it has {shown}{hint}")

    def _target_column(self, frame: pd.DataFrame) -> str:
        if self.target is not None:
            return self._column(frame, self.target, "target")
        named = [c for name in TARGET_NAMES for c in frame.columns if str(c).lower() == name]
        return str(named[0] if named else frame.columns[-1])

    def _without_missing(
        self, frame: pd.DataFrame, target: str, meanings: dict[str, Meaning]
    ) -> pd.DataFrame:
        for name in frame.select_dtypes("float").columns:
            frame[name] = frame[name].replace([np.inf, -np.inf], np.nan)
        counts = frame.isna().sum()
        counts = counts[counts > 0]
        if not len(counts):
            return frame
        if self.missing == "error":
            shown = []
            for name, count in list(counts.items())[:5]:
                marked = meanings[name].nothing if name in meanings else ""
                shown.append(f"{name} ({count}{f', as {marked}' if marked else ''})")
            more = f" and {len(counts) - 5} more columns" if len(counts) > 5 else ""
            raise UserError(
                f"{self.path} has missing or infinite values in {', '.join(shown)}{more}; fill "
                f"them in, or leave those rows out with missing='drop' (--missing drop)"
            )
        kept = frame.dropna()
        if not len(kept):
            raise UserError(f"{self.path} has no row without missing values; ignore those columns")
        lost = set(frame[target].dropna()) - set(kept[target])
        if lost:
            name = next(
                name for name in counts.index if frame[name][frame[target].isin(lost)].isna().any()
            )
            raise UserError(
                f"every row of class {str(min(lost))!r} of {self.path} has missing values, so "
                f"missing='drop' would leave out the class; fill them in, or ignore {name!r}"
            )
        self.dropped = len(frame) - len(kept)
        return kept

    def _fit(self, training: np.ndarray) -> None:
        numbers = self._features.select_dtypes("number", exclude="timedelta")
        large = numbers.columns[(numbers.abs() > LARGEST).any()]
        if len(large):
            raise UserError(
                f"column {large[0]!r} of {self.path} has numbers beyond {LARGEST:g}, which float32 "
                f"cannot calculate with; scale them down"
            )
        self._columns = [
            _describe(self._features[name], training, self._meanings.get(name), self)
            for name in self._features.columns
        ]
        values, _ = encode_rows(self._features, self._columns)
        self._samples.store = InMemory(values)
        del self._features, self._meanings

    def _encoding(self) -> dict[str, Any]:
        return {"columns": self._columns, "target": self._target}


def has_tables(folder: Path) -> bool:
    """Whether the folder has tables named train and test."""
    return folder.is_dir() and all(table_in(folder, part) for part in ("train", "test"))


def table_in(folder: Path, part: str) -> Path | None:
    """The folder's table of that name, if any."""
    for suffix in TABLE_SUFFIXES:
        if (path := folder / f"{part}{suffix}").is_file():
            return path
    return None


def encode_rows(
    frame: pd.DataFrame, columns: Sequence[dict[str, Any]]
) -> tuple[np.ndarray, dict[str, int]]:
    """Encode rows as (N, F) float32.

    Args:
        frame: has every column, without missing values.
        columns: as :meth:`Table.state` has them under "columns".

    Returns:
        the inputs, and for each column how many rows have a category that training never saw;
        such a category becomes zeros.
    """
    import pandas as pd

    blocks, unseen = [], {}
    for column in columns:
        values = frame[column["name"]]
        if column["kind"] == "number":
            numbers = as_numbers(values, column["form"])
            if column["mean"] is not None:
                numbers = (numbers - column["mean"]) / column["deviation"]
            blocks.append(numbers[:, None])
        else:
            codes = pd.Index(column["values"]).get_indexer(pd.Index(values.astype(str).str.strip()))
            block = np.zeros((len(frame), len(column["values"])))
            known = codes >= 0
            block[np.flatnonzero(known), codes[known]] = 1.0
            blocks.append(block)
            if not known.all():
                unseen[column["name"]] = int((~known).sum())
    return np.concatenate(blocks, axis=1).astype(np.float32), unseen


def _describe(
    whole: pd.Series, training: np.ndarray, meaning: Meaning | None, table: Table
) -> dict[str, Any]:
    """What encodes one column, learned from the training rows."""
    from pandas.api import types

    values, name, path = whole.iloc[training], str(whole.name), table.path
    if types.is_numeric_dtype(values) or types.is_bool_dtype(values):
        numbers = as_numbers(values)
        return {
            "name": name,
            "kind": "number",
            "form": meaning.form if meaning else "plain",
            "mean": float(numbers.mean()) if table.standardize else None,
            "deviation": float(numbers.std()) or 1.0 if table.standardize else None,
        }
    if (
        types.is_datetime64_any_dtype(values)
        or types.is_timedelta64_dtype(values)
        or types.infer_dtype(values) in ("date", "datetime", "time", "timedelta")
    ):
        raise UserError(
            f"column {name!r} of {path} holds dates or durations; turn it into numbers, or name it "
            f"in ignore"
        )
    if values.map(lambda value: isinstance(value, (list, dict, tuple, bytes, np.ndarray))).any():
        raise UserError(
            f"column {name!r} of {path} must hold numbers or categories, but holds "
            f"{type(values.iloc[0]).__name__} values; name it in ignore"
        )
    texts = sorted(values.astype(str).unique())
    odd = meaning.odd if meaning else ""
    if len(texts) > MOST_CATEGORIES or len(texts) > max(50, 0.5 * len(values)):
        raise UserError(
            f"column {name!r} of {path} holds numbers, but {odd}; mend it, or leave it empty and "
            f"see --missing"
            if odd
            else f"column {name!r} of {path} holds {whole.nunique()} distinct texts in "
            f"{len(whole)} rows, too many for categories; name it in ignore"
        )
    if odd:
        warnings.warn(
            f"column {name!r} of {path} holds numbers, but {odd}; its values are taken as "
            f"categories",
            stacklevel=2,
        )
    return {"name": name, "kind": "category", "values": texts}


def _class_names(values: pd.Series) -> pd.Series:
    """Each value as the name of its class: whole numbers without a point, others as they are."""
    from pandas.api import types

    if types.is_numeric_dtype(values) and not types.is_bool_dtype(values):
        whole = all(float(value).is_integer() for value in values.unique())
        return values.map(lambda value: str(int(value)) if whole else str(value))
    return values.astype(str)


def _classes(values: pd.Series, target: str) -> tuple[tuple[str, ...], np.ndarray]:
    import pandas as pd
    from pandas.api import types

    numeric = types.is_numeric_dtype(values) and not types.is_bool_dtype(values)
    distinct = values.drop_duplicates().sort_values() if numeric else values.drop_duplicates()
    names = _class_names(distinct).tolist()
    if (
        (numeric and len(distinct) > 20 and any("." in name for name in names))
        or (numeric and len(distinct) > 100 and len(distinct) > 0.05 * len(values))
        or len(distinct) > MOST_CLASSES
    ):
        raise UserError(
            f"the target column {target!r} holds {len(distinct)} distinct values in {len(values)} "
            f"rows, which is no set of classes; normdrop classifies: choose another target, or "
            f"put its values into classes"
        )
    names = names if numeric else sorted(names)
    codes = pd.Index(names).get_indexer(pd.Index(_class_names(values)))
    return tuple(names), codes.astype(np.int64)


def labels_in(path: Path, target: str, classes: Sequence[str]) -> list[str]:
    """The class of every row of another table, by the names that training knows.

    Raises:
        UserError: the table has no such column.
    """
    frame = read_table(path)
    if target not in frame.columns:
        raise UserError(f"Expected {path} to have the target column {target!r}, but it has none")
    values = frame[target]
    if is_csv(path) and not set(values.str.strip()) <= set(classes):
        values = read_meaning(values, target, path, flags=False).values
    return list(_class_names(values))


def _as_texts(frame: pd.DataFrame) -> pd.DataFrame:
    """A Parquet table as a CSV would hold it."""
    return frame.astype(object).where(frame.notna(), "").map(str)


def _check_same_columns(frames: dict[str, pd.DataFrame], folder: Path) -> None:
    train = set(next(iter(frames.values())).columns)
    for part, frame in frames.items():
        differ = train ^ set(frame.columns)
        if differ:
            raise UserError(
                f"the tables in {folder} must have the same columns, but train and {part} differ "
                f"in {', '.join(sorted(differ)[:5])}"
            )
