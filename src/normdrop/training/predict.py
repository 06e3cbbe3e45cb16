"""Classes of new files, by the network of a run."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from normdrop import data
from normdrop.errors import UserError
from normdrop.files import write_text
from normdrop.runs.read import read_options
from normdrop.runs.weights import load_network
from normdrop.training.measure import predict_batches

__all__ = ["predict", "predictions"]

BATCH = 256
Item = TypeVar("Item")


def predict(
    run: Path, files: Sequence[Path], *, form: Literal["table", "csv", "json"], output: Path | None
) -> None:
    """Predict, and print or write the answer; see :func:`predictions`."""
    rows = predictions(run, files)
    text = {"table": _as_table, "csv": _as_csv, "json": _as_json}[form](rows)
    if output is None:
        print(text, end="")
        return
    try:
        write_text(output, text)
    except OSError as error:
        raise UserError(f"Cannot write {output} ({error.strerror}); choose another file") from error
    print(f"{len(rows)} predictions in {output}")


def predictions(run: Path, files: Sequence[Path]) -> list[dict[str, Any]]:
    """The class of every image, or of every row of a table.

    Args:
        run: a finished run folder.
        files: images or tables, as the run was trained on.

    Returns:
        One dictionary a sample: file, class, probability, and the probabilities of all classes.

    Raises:
        UserError: the run or a file cannot be used.
    """
    network, record = load_network(run)
    classes = record["network"]["classes"]
    encoder = data.encoder(record["data"])
    flip = read_options(run).recipe.flip_test
    rows = []
    for pairs in _chunks(encoder.read(list(files)), BATCH):
        names, tensors = zip(*pairs, strict=True)
        x = torch.stack(tensors)
        batch = (x, torch.zeros(len(x), dtype=torch.int64))
        probabilities, _ = predict_batches(network, [batch], flip=flip)
        rows += [
            _row(str(name), values, classes)
            for name, values in zip(names, probabilities, strict=True)
        ]
    return rows


def _row(name: str, probabilities: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    best = int(probabilities.argmax())
    return {
        "file": name,
        "class": classes[best],
        "probability": float(probabilities[best]),
        "probabilities": dict(zip(classes, probabilities.tolist(), strict=True)),
    }


def _chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    chunk: list[Item] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


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
