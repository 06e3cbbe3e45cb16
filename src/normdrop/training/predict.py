"""Classes of new files, by the network of a run."""

from __future__ import annotations

import csv
import io
import itertools
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from normdrop import data
from normdrop.errors import UserError
from normdrop.files import write_text
from normdrop.runs.folder import FILES, best_checkpoint, last_checkpoint
from normdrop.runs.read import read_options
from normdrop.runs.weights import load_network
from normdrop.training.measure import predict_batches

__all__ = ["predict", "predictions"]

BATCH = 256
Item = TypeVar("Item")


def predict(
    run: Path,
    files: Sequence[Path],
    *,
    form: Literal["table", "csv", "json"] | None,
    output: Path | None,
    skip_unreadable: bool = False,
) -> None:
    """Predict, and print or write the answer; see :func:`predictions`.

    What was predicted is kept where a file cannot be read: the answer comes before the error.
    """
    if output is not None:
        _check_output(output, run, files)
    by_name = output.suffix.lower().removeprefix(".") if output is not None else ""
    form = form or ("csv" if by_name == "csv" else "json" if by_name == "json" else "table")
    rows: list[dict[str, Any]] = []
    skipped: list[tuple[str, str]] | None = [] if skip_unreadable else None
    try:
        for some in _predicted(run, files, skipped):
            rows += some
    except UserError as error:
        if not rows:
            raise
        kept = _give({"table": _as_table, "csv": _as_csv, "json": _as_json}[form](rows), output)
        where = f"in {output}" if kept else "above"
        raise UserError(f"{error}; what was predicted before it is {where}") from error
    if skipped:
        shown = "; ".join(f"{name} ({reason})" for name, reason in skipped[:5])
        more = f"; and {len(skipped) - 5} more" if len(skipped) > 5 else ""
        what = "1 image is" if len(skipped) == 1 else f"{len(skipped)} images are"
        warnings.warn(f"{what} left out: {shown}{more}", stacklevel=2)
    if _give({"table": _as_table, "csv": _as_csv, "json": _as_json}[form](rows), output):
        print(f"{len(rows)} prediction{'' if len(rows) == 1 else 's'} in {output}")


def _give(text: str, output: Path | None) -> bool:
    """Print the answer, or write it; whether it was written."""
    if output is None:
        print(text, end="")
        return False
    try:
        write_text(output, text)
    except OSError as error:
        raise UserError(f"Cannot write {output} ({error.strerror}); choose another file") from error
    return True


def _check_output(output: Path, run: Path, files: Sequence[Path]) -> None:
    """Raise UserError where the output would replace what is read."""
    if not output.is_file():
        return
    given = [file for path in files for file in (path.rglob("*") if path.is_dir() else [path])]
    own = [best_checkpoint(run), last_checkpoint(run), *(run / name for name in FILES)]
    for what, paths in (("one of the files to predict", given), ("a file of the run", own)):
        if any(path.is_file() and path.samefile(output) for path in paths):
            raise UserError(f"Cannot write to {output}, since it is {what}; choose another file")


def predictions(
    run: Path, files: Sequence[Path], *, skip_unreadable: bool = False
) -> list[dict[str, Any]]:
    """The class of every image, or of every row of a table.

    Args:
        run: a finished run folder.
        files: images or tables, as the run was trained on.
        skip_unreadable: leave out images that cannot be read.

    Returns:
        One dictionary a sample: file, class, probability, and the probabilities of all classes.

    Raises:
        UserError: the run or a file cannot be used.
    """
    chunks = _predicted(run, files, [] if skip_unreadable else None)
    return [row for rows in chunks for row in rows]


def _predicted(
    run: Path, files: Sequence[Path], skipped: list[tuple[str, str]] | None
) -> Iterator[list[dict[str, Any]]]:
    """Rows of the answer, some at a time; those before an error come before it."""
    network, record = load_network(run)
    classes = record["network"]["classes"]
    encoder = data.encoder(record["data"])
    flip = read_options(run).recipe.flip_test
    for pairs, error in _chunks(encoder.read(list(files), skipped=skipped), BATCH):
        if pairs:
            names, tensors = zip(*pairs, strict=True)
            x = torch.stack(tensors)
            batch = (x, torch.zeros(len(x), dtype=torch.int64))
            probabilities, _ = predict_batches(network, [batch], flip=flip)
            yield [
                _row(str(name), values, classes)
                for name, values in zip(names, probabilities, strict=True)
            ]
        if error is not None:
            raise error


def _row(name: str, probabilities: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    best = int(probabilities.argmax())
    return {
        "file": name,
        "class": classes[best],
        "probability": float(probabilities[best]),
        "probabilities": dict(zip(classes, probabilities.tolist(), strict=True)),
    }


def _chunks(items: Iterator[Item], size: int) -> Iterator[tuple[list[Item], UserError | None]]:
    """Lists of ``size`` items, and with the last one what ended the items too early."""
    error = None
    while error is None:
        chunk: list[Item] = []
        try:
            for item in itertools.islice(items, size):
                chunk.append(item)  # noqa: PERF402 -- what came before an error is kept
        except UserError as raised:
            error = raised
        if not chunk and error is None:
            return
        yield chunk, error


def _as_table(rows: Sequence[dict[str, Any]]) -> str:
    table = Table("file", "class", "probability", "next", box=None, pad_edge=False)
    for row in rows:
        ordered = sorted(row["probabilities"].items(), key=lambda item: -item[1])
        second = f"{ordered[1][0]} {ordered[1][1]:.1%}" if len(ordered) > 1 else ""
        table.add_row(row["file"], row["class"], f"{row['probability']:.1%}", second)
    text = io.StringIO()
    Console(file=text, width=None if not rows else _width(rows), highlight=False).print(table)
    return text.getvalue()


def _width(rows: Sequence[dict[str, Any]]) -> int:
    """Wide enough that no file name is cut."""
    names = max(len(row["file"]) for row in rows)
    return names + 3 * max(len(name) for name in rows[0]["probabilities"]) + 60


def _as_csv(rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    classes = list(rows[0]["probabilities"]) if rows else []
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "class", "probability", *(f"p({name})" for name in classes)])
    for row in rows:
        values = [f"{row['probabilities'][name]:.6g}" for name in classes]
        writer.writerow([row["file"], row["class"], f"{row['probability']:.6g}", *values])
    return text.getvalue()


def _as_json(rows: Sequence[dict[str, Any]]) -> str:
    return json.dumps(list(rows), indent=1, ensure_ascii=False) + "\n"
