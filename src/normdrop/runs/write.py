"""The one writer of run folders; every file is written whole or not at all."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml
from torch import Tensor

import normdrop
from normdrop import data
from normdrop.errors import UserError
from normdrop.files import write_atomically, write_text
from normdrop.runs.folder import (
    COLUMNS,
    EVALUATION,
    METRICS,
    MISTAKE_NAMES,
    OPTIONS,
    RECORD,
    RESULT,
    WEIGHTS,
    best_checkpoint,
    last_checkpoint,
)
from normdrop.runs.network import network_record
from normdrop.runs.options import Options

__all__ = [
    "keep_best_as_last",
    "new_folder",
    "remove_parts",
    "write_checkpoint",
    "write_end",
    "write_metrics",
    "write_result",
    "write_start",
]


def new_folder(options: Options, source: str) -> Path:
    """Make the run's folder: the name given, or the source, the model and the next free number."""
    runs = Path(options.run.runs_dir)
    try:
        runs.mkdir(parents=True, exist_ok=True)
        if options.run.name is not None:
            folder = runs / options.run.name
            try:
                folder.mkdir()
            except FileExistsError:
                raise UserError(
                    f"The run {folder} exists; go on with it by --resume {folder}, "
                    "or choose another --name"
                ) from None
            return folder
        stem = re.sub(r"[^\w.-]+", "-", f"{source}-{options.network.model}").strip("-.")
        for number in range(1, 10**6):
            folder = runs / f"{stem}-{number}"
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                return folder
    except OSError as error:
        raise UserError(
            f"Cannot make a run folder in {runs} ({error.strerror}); choose another by --runs-dir"
        ) from error
    raise UserError(f"All numbers are taken in {runs}; choose a --name")


def write_start(
    folder: Path, options: Options, network: torch.nn.Module, datamodule: data.DataModule
) -> None:
    """What stands in the folder before the first step: options.yaml and run.json."""
    flat = options.flat()
    # A run that is run again takes the next free name.
    del flat["name"]
    norms = [
        {"name": name, "features": module.num_features}
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
    ]
    record = {
        "version": normdrop.__version__,
        "network": network_record(
            options, input_shape=datamodule.input_shape, classes=datamodule.classes
        ),
        "data": datamodule.state(),
        "digest": datamodule.digest,
        "samples": datamodule.class_counts(),
        "skipped": [list(pair) for pair in datamodule.skipped],
        "dropped": datamodule.dropped,
        "norm_layers": norms,
    }
    try:
        (folder / "checkpoints").mkdir()
        _write_json(folder / RECORD, record)
        write_text(
            folder / OPTIONS,
            "# normdrop train --config THIS FILE runs this again.\n"
            + yaml.safe_dump(flat, sort_keys=False, allow_unicode=True),
        )
    except OSError as error:
        raise UserError(
            f"Cannot write to {folder} ({error.strerror}); choose another folder by --runs-dir"
        ) from error


def write_checkpoint(path: Path, checkpoint: Mapping[str, Any]) -> None:
    """Write what :func:`normdrop.runs.weights.load_checkpoint` reads."""
    # When torch.save writes a file itself, a full disk is a RuntimeError without errno.
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    with write_atomically(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def keep_best_as_last(folder: Path) -> None:
    """Make the checkpoint of the best epoch that of the last one too."""
    with write_atomically(last_checkpoint(folder)) as temporary:
        shutil.copyfile(best_checkpoint(folder), temporary)


def write_metrics(folder: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Write metrics.csv, a row an epoch."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows
    )
    write_text(folder / METRICS, text.getvalue())


def write_end(
    folder: Path,
    *,
    weights: Mapping[str, Tensor],
    evaluation: Mapping[str, Tensor],
    mistake_names: Sequence[str],
    result: Mapping[str, Any],
) -> None:
    """Write what a run ends with: its weights, its answers on the test split, its result."""
    _write_tensors(folder / WEIGHTS, weights)
    _write_tensors(folder / EVALUATION, evaluation)
    _write_json(folder / MISTAKE_NAMES, {"mistake_names": list(mistake_names)})
    write_result(folder, result)


def write_result(folder: Path, result: Mapping[str, Any]) -> None:
    """Write result.json, which makes the run a finished one."""
    _write_json(folder / RESULT, result)


def remove_parts(folder: Path) -> None:
    """Remove the temporary files of a run that was killed while it wrote."""
    for part in folder.rglob(".*.part"):
        part.unlink(missing_ok=True)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    whole = {name: value.contiguous() for name, value in tensors.items()}
    with write_atomically(path) as temporary:
        temporary.write_bytes(safetensors.torch.save(whole))


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
