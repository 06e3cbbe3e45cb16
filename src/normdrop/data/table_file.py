"""CSV and Parquet files, and what the texts of a CSV mean: numbers, yes or no, words, nothing."""

from __future__ import annotations

import csv
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TextIO

import numpy as np

from normdrop.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["TABLE_SUFFIXES", "Meaning", "as_numbers", "is_csv", "read_meaning", "read_table"]

PARQUET_SUFFIXES = (".parquet", ".pq")
TABLE_SUFFIXES = (".csv", ".tsv", *PARQUET_SUFFIXES)
# What stands for nothing among numbers; in a column of words it is a word like any other.
NOTHING = (
    *("na", "n/a", "#n/a", "#na", "<na>", "nan", "-nan", "null", "none"),
    *("?", "-", "--", ".", "*"),
)
WORDS = {"true": 1.0, "false": 0.0}
# How the numbers of a column are written, other than 1234.5.
FORMS = {
    "percent signs": r"[+-]?\d+(?:\.\d+)?\s*%",
    "decimal comma": r"[+-]?(?:\d+|\d{1,3}(?:\.\d{3})+)(?:,\d+)?",
    "commas between thousands": r"[+-]?(?:\d+|\d{1,3}(?:,\d{3})+)(?:\.\d+)?",
}
# From this share of numbers on, a column is one of numbers with a slip, rather than of words.
MOSTLY = 0.9


class Meaning(NamedTuple):
    """What the texts of a column were read as."""

    values: pd.Series
    #: How its numbers are written; see ``FORMS``.
    form: str = "plain"
    #: The first text that counts as missing, and the first that is no number among numbers,
    #: with their rows.
    nothing: str = ""
    odd: str = ""


def is_csv(path: Path) -> bool:
    """Whether a table is text."""
    return path.suffix.lower() not in PARQUET_SUFFIXES


def read_table(path: Path) -> pd.DataFrame:
    """Read a CSV (comma, semicolon or tab), TSV or Parquet file; a CSV's values stay texts.

    Raises:
        UserError: the file is missing, damaged, empty, ragged or without a line of column names.
    """
    import pandas as pd

    try:
        frame = _read_csv(path) if is_csv(path) else pd.read_parquet(path).reset_index(drop=True)
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
    frame = _without_nameless(frame, path)
    if not len(frame) or not len(frame.columns):
        raise UserError(f"table {str(path)!r} has no rows")
    for name in frame.columns if not is_csv(path) else ():
        frame[name] = _plain(frame[name])
    return frame


def _read_csv(path: Path) -> pd.DataFrame:
    import pandas as pd

    with path.open(encoding="utf-8-sig", newline="") as file:
        first = file.readline()
        # Excel's own first line, which names the separator.
        told = first.strip().lower() if first.lower().startswith("sep=") else ""
        header_line = file.readline() if told else first
        if not header_line.strip():
            raise UserError(f"table {str(path)!r} is empty")
        separator = told[4:5] or max(",;\t", key=header_line.count)
        header = next(csv.reader([header_line], delimiter=separator, skipinitialspace=True), [])
        _check_header(header, path)
        named = _check_rows(file, header, header_line, separator, path)
    if named:
        warnings.warn(
            f"the rows of {path} begin with a name that the first line leaves out, as R writes "
            f"them; the names are left out",
            stacklevel=2,
        )
    with warnings.catch_warnings():
        # Of separators at the end of a line, which hold no values: _check_rows looked.
        warnings.simplefilter("ignore", pd.errors.ParserWarning)
        frame = pd.read_csv(
            path,
            sep=separator,
            skiprows=1 if told else 0,
            dtype=str,
            keep_default_na=False,
            encoding="utf-8-sig",
            skipinitialspace=True,
            index_col=0 if named else False,
            names=["", *header] if named else None,
            header=0,
        ).reset_index(drop=True)
    frame.attrs["separator"] = separator
    return frame


def _check_header(header: Sequence[str], path: Path) -> None:
    # pandas would rename the second column of a name in silence.
    twice = [name for name, count in Counter(header).items() if name and count > 1]
    if twice:
        raise UserError(
            f"table {str(path)!r} has more than one column {twice[0]!r}; give each its own name"
        )
    # Columns may be named 0, 1, 2; a name such as 0.94 is a sample's value.
    numbers = [name for name in header if _is_number(name)]
    if len(numbers) == len(header) or any(not name.strip().isdecimal() for name in numbers):
        raise UserError(
            f"table {str(path)!r} must begin with a line of column names, but its first line "
            f"holds numbers; add that line"
        )


def _check_rows(
    file: TextIO, header: Sequence[str], header_line: str, separator: str, path: Path
) -> bool:
    """Whether every row begins with a name that the header leaves out, as R's write.table does.

    Raises:
        UserError: a row has more or fewer values than the header names.
    """
    wide, last = len(header), header_line

    def lines() -> Iterator[str]:
        nonlocal last
        for line in file:
            last = line
            yield line

    quoted, firsts, rows, ragged = header_line.lstrip().startswith('"'), set[str](), 0, (0, 0)
    for row in csv.reader(lines(), delimiter=separator, skipinitialspace=True):
        if not row:
            continue
        rows += 1
        if len(row) > wide and not any(value.strip() for value in row[wide:]):
            continue  # Separators at the end of a line.
        if len(row) == wide + 1:
            firsts.add(row[0])
            quoted = quoted and last.lstrip().startswith('"')
        if len(row) != wide and not ragged[0]:
            ragged = rows, len(row)
    if not ragged[0]:
        return False
    if len(firsts) == rows and (quoted or firsts == {str(n) for n in range(1, rows + 1)}):
        return True
    row_number, count = ragged
    raise UserError(
        f"row {row_number} of table {str(path)!r} has {count} value{'' if count == 1 else 's'}, "
        f"but its first line names {wide} columns; mend the row, or put quotes around a value "
        f"that holds {_spelled(separator)}"
    )


def _spelled(separator: str) -> str:
    return {",": "a comma", ";": "a semicolon", "\t": "a tab"}.get(separator, repr(separator))


def _without_nameless(frame: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Leave out a first column without a name, which counts the rows, and empty ones."""
    nameless = [name for name in frame.columns if not name.strip() or name.startswith("Unnamed: ")]
    for name in nameless:
        place = list(frame.columns).index(name) + 1
        if place == 1:
            warnings.warn(
                f"the first column of {path} has no name, as one that counts the rows; "
                f"it is left out",
                stacklevel=2,
            )
        elif (frame[name] != "").any():
            raise UserError(f"column {place} of table {str(path)!r} has no name; give it one")
    return frame.drop(columns=nameless)


def _plain(values: pd.Series) -> pd.Series:
    """A Parquet column of objects as the numbers or dates that it holds."""
    import pandas as pd

    if not pd.api.types.is_object_dtype(values):
        return values
    kinds = {type(value) for value in values.dropna()}
    if kinds and all(issubclass(kind, (bool, np.bool_)) for kind in kinds):
        return values.astype("float64")
    if pd.api.types.infer_dtype(values) == "decimal":
        return values.astype("float64")
    return values


def read_meaning(
    values: pd.Series, name: str, path: Path, *, separator: str = ",", flags: bool = True
) -> Meaning:
    """What the texts of a CSV's column mean.

    It is a column of numbers if every text is one, in one of the usual ways to write it, or
    stands for nothing. Zeros in front (007) make words of numbers, since 7 is another word. In a
    column of words only an empty text is missing.

    Args:
        values: the texts.
        name, path: for what is said aloud.
        separator: of the file; where it is a semicolon, 1,000 is a one with decimals.
        flags: read a column of true and false as ones and zeros.
    """
    texts = values.fillna("").str.strip()
    empty = texts == ""
    marks = ~empty & texts.str.lower().isin(NOTHING)
    some = texts[~empty & ~marks]
    words = Meaning(texts.where(~empty))
    if not len(some):
        return words if marks.any() else Meaning(texts.where(~empty).astype("float64"))
    if some.str.fullmatch(r"[+-]?0\d+").any():
        return words
    numbers = _parsed(some, "plain")
    form = "plain" if numbers.notna().all() else _form(some, separator)
    nothing = f"{texts[marks].iloc[0]!r} in {_row(marks)}" if marks.any() else ""
    if form:
        if form != "plain":
            numbers = _parsed(some, form)
            at = int(np.argmax(some.str.contains("[%,.]").to_numpy()))
            warnings.warn(
                f"column {name!r} of {path} is read as numbers with {form}: {some.iloc[at]} is "
                f"{numbers.iloc[at]:g}",
                stacklevel=2,
            )
        return Meaning(numbers.reindex(texts.index), form, nothing=nothing)
    if flags and some.str.lower().isin(WORDS).all():
        return Meaning(some.str.lower().map(WORDS).reindex(texts.index), nothing=nothing)
    if numbers.notna().mean() >= MOSTLY:
        odd = numbers.isna().reindex(texts.index, fill_value=False)
        return words._replace(odd=f"{texts[odd].iloc[0]!r} in {_row(odd)}")
    return words


def _form(texts: pd.Series, separator: str) -> str:
    """How all the texts are written as numbers, other than 1234.5; empty if they are none."""
    fitting = [form for form, pattern in FORMS.items() if texts.str.fullmatch(pattern).all()]
    # 1,000 may be a one or a thousand. Where commas stand between columns, it is a thousand.
    return fitting[0 if separator == ";" else -1] if fitting else ""


def _row(mask: pd.Series) -> str:
    """The first row where a mask holds, in words."""
    at = mask.index[int(np.argmax(mask.to_numpy()))]
    part, row = at if isinstance(at, tuple) else ("", at)
    return f"{part} row {row + 1}".strip()


def _parsed(texts: pd.Series, form: str) -> pd.Series:
    """Texts as float64, NaN for what is no number of that form."""
    import pandas as pd

    if form == "plain":
        return pd.to_numeric(texts.astype(object), errors="coerce").astype("float64")
    right = texts.str.fullmatch(FORMS[form])
    if form == "percent signs":
        bare = texts.str.rstrip("% ")
    elif form == "commas between thousands":
        bare = texts.str.replace(",", "")
    else:
        bare = texts.str.replace(".", "").str.replace(",", ".")
    numbers = pd.to_numeric(bare.where(right).astype(object), errors="coerce").astype("float64")
    return numbers / 100 if form == "percent signs" else numbers


def as_numbers(values: pd.Series, form: str = "plain") -> np.ndarray:
    """A column as float64, by the way that its numbers were written in training; NaN for others."""
    from pandas.api import types

    if types.is_numeric_dtype(values) or types.is_bool_dtype(values):
        return np.asarray(values.to_numpy(np.float64, na_value=np.nan))
    texts = values.astype(str).str.strip()
    numbers = _parsed(texts, form).fillna(texts.str.lower().map(WORDS))
    return np.asarray(numbers, dtype=np.float64)


def _is_number(text: str) -> bool:
    return re.fullmatch(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", text) is not None
