"""CSV and Parquet tables with a target column: numbers standardised, categories one-hot."""

from __future__ import annotations

import csv
import difflib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from normdrop.data.module import DataModule, InMemory, Samples
from normdrop.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Table", "encode_rows", "has_tables", "read_table", "table_in"]

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
            frames = {part: read_table(path) for part, path in found.items() if path}
            _check_same_columns(frames, self.path)
        else:
            frames = {"": read_table(self.path)}
        frame = pd.concat(frames, names=["part", "row"])
        target = self._target_column(frame)
        ignored = [self._column(frame, name, "ignore") for name in self.ignore]
        if target in ignored:
            raise UserError(f"the target column {target!r} cannot be in ignore")
        frame = self._without_missing(frame.drop(columns=ignored))
        classes, labels = _classes(frame[target], target)
        features = frame.drop(columns=[target])
        if not len(features.columns):
            raise UserError(f"{self.path} must have a column beside the target {target!r}")
        self._target, self._features = target, features
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

    def _without_missing(self, frame: pd.DataFrame) -> pd.DataFrame:
        for name in frame.select_dtypes("float").columns:
            frame[name] = frame[name].replace([np.inf, -np.inf], np.nan)
        counts = frame.isna().sum()
        counts = counts[counts > 0]
        if not len(counts):
            return frame
        if self.missing == "error":
            shown = ", ".join(f"{name} ({n})" for name, n in list(counts.items())[:5])
            more = f" and {len(counts) - 5} more columns" if len(counts) > 5 else ""
            raise UserError(
                f"{self.path} has missing or infinite values in {shown}{more}; fill them in, or "
                f"leave those rows out with missing='drop' (--missing drop)"
            )
        kept = frame.dropna()
        if not len(kept):
            raise UserError(f"{self.path} has no row without missing values; ignore those columns")
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
            _describe(self._features[name].iloc[training], str(name), self.standardize, self.path)
            for name in self._features.columns
        ]
        values, _ = encode_rows(self._features, self._columns)
        self._samples.store = InMemory(values)
        del self._features

    def _encoding(self) -> dict[str, Any]:
        return {"columns": self._columns, "target": self._target}


def has_tables(folder: Path) -> bool:
    """Whether the folder has tables named train and test."""
    return folder.is_dir() and all(table_in(folder, part) for part in ("train", "test"))


def table_in(folder: Path, part: str) -> Path | None:
    """The folder's table of that name, if any."""
    for suffix in (".csv", ".tsv", ".parquet", ".pq"):
        if (path := folder / f"{part}{suffix}").is_file():
            return path
    return None


def read_table(path: Path, text_columns: Iterable[str] = ()) -> pd.DataFrame:
    """Read a CSV (comma, semicolon or tab), TSV or Parquet file.

    Args:
        path: of the file.
        text_columns: columns of a CSV to read as text, even if they look like numbers.

    Raises:
        UserError: the file is missing, damaged, empty or without a line of column names.
    """
    import pandas as pd

    try:
        if path.suffix.lower() in (".parquet", ".pq"):
            frame = pd.read_parquet(path).reset_index(drop=True)
        else:
            with path.open(encoding="utf-8-sig") as file:
                first = file.readline()
            if not first:
                raise UserError(f"table {str(path)!r} is empty")
            separator = max(",;\t", key=first.count)
            _check_header(path, first, separator)
            frame = pd.read_csv(
                path,
                sep=separator,
                dtype=dict.fromkeys(text_columns, str),
                low_memory=False,
                encoding="utf-8-sig",
                skipinitialspace=True,
                index_col=False,
            )
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(
            f"table {str(path)!r} cannot be read, since it is not text in UTF-8; save it as such"
        ) from error
    except Exception as error:  # A damaged Parquet file raises KeyError and TypeError too.
        reason = str(error).strip().splitlines()
        raise UserError(
            f"table {str(path)!r} cannot be read ({reason[0] if reason else error!r})"
        ) from error
    frame.columns = [str(column) for column in frame.columns]
    for name, kind in frame.dtypes.items():
        if (
            pd.api.types.is_object_dtype(kind)
            and pd.api.types.infer_dtype(frame[name]) == "decimal"
        ):
            frame[name] = frame[name].astype(float)
    if not len(frame) or not len(frame.columns):
        raise UserError(f"table {str(path)!r} has no rows")
    # Columns may be named 0, 1, 2; a name such as 0.94 is a sample's value.
    numbers = [float(column) for column in frame.columns if _is_number(column)]
    if len(numbers) == len(frame.columns) or any(value % 1 > 0 for value in numbers):
        raise UserError(
            f"table {str(path)!r} must begin with a line of column names, but its first line "
            f"holds numbers; add that line"
        )
    return frame


def _check_header(path: Path, line: str, separator: str) -> None:
    """Two columns of one name: pandas would rename the second in silence."""
    header = next(csv.reader([line], delimiter=separator, skipinitialspace=True), [])
    twice = [name for name, count in Counter(header).items() if name and count > 1]
    if twice:
        raise UserError(
            f"table {str(path)!r} has more than one column {twice[0]!r}; give each its own name"
        )


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
            numbers = pd.to_numeric(values, errors="coerce").to_numpy(np.float64)
            if column["mean"] is not None:
                numbers = (numbers - column["mean"]) / column["deviation"]
            blocks.append(numbers[:, None])
        else:
            codes = pd.Index(column["values"]).get_indexer(pd.Index(values.astype(str)))
            block = np.zeros((len(frame), len(column["values"])))
            known = codes >= 0
            block[np.flatnonzero(known), codes[known]] = 1.0
            blocks.append(block)
            if not known.all():
                unseen[column["name"]] = int((~known).sum())
    return np.concatenate(blocks, axis=1).astype(np.float32), unseen


def _describe(values: pd.Series, name: str, standardize: bool, path: Path) -> dict[str, Any]:
    """What encodes one column, learned from the training rows."""
    from pandas.api import types

    if types.is_numeric_dtype(values) or types.is_bool_dtype(values):
        numbers = values.to_numpy(np.float64)
        deviation = float(numbers.std()) or 1.0
        return {
            "name": name,
            "kind": "number",
            "mean": float(numbers.mean()) if standardize else None,
            "deviation": deviation if standardize else None,
        }
    if types.is_datetime64_any_dtype(values) or types.is_timedelta64_dtype(values):
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
    if len(texts) > MOST_CATEGORIES or len(texts) > max(50, 0.5 * len(values)):
        raise UserError(
            f"column {name!r} of {path} holds {len(texts)} distinct texts in {len(values)} rows, "
            f"too many for categories; name it in ignore"
        )
    return {"name": name, "kind": "category", "values": texts}


def _classes(values: pd.Series, target: str) -> tuple[tuple[str, ...], np.ndarray]:
    import pandas as pd
    from pandas.api import types

    numeric = types.is_numeric_dtype(values) and not types.is_bool_dtype(values)
    distinct = sorted(values.unique()) if numeric else sorted(values.astype(str).unique())
    whole = numeric and all(float(value).is_integer() for value in distinct)
    if (
        (numeric and not whole and len(distinct) > 20)
        or (numeric and len(distinct) > 100 and len(distinct) > 0.05 * len(values))
        or len(distinct) > MOST_CLASSES
    ):
        raise UserError(
            f"the target column {target!r} holds {len(distinct)} distinct values in {len(values)} "
            f"rows, which is no set of classes; normdrop classifies: choose another target, or "
            f"put its values into classes"
        )
    names = [str(int(value)) if whole else str(value) for value in distinct]
    codes = pd.Index(distinct).get_indexer(pd.Index(values if numeric else values.astype(str)))
    return tuple(names), codes.astype(np.int64)


def _check_same_columns(frames: dict[str, pd.DataFrame], folder: Path) -> None:
    train = set(frames["train"].columns)
    for part, frame in frames.items():
        differ = train ^ set(frame.columns)
        if differ:
            raise UserError(
                f"the tables in {folder} must have the same columns, but train and {part} differ "
                f"in {', '.join(sorted(differ)[:5])}"
            )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
