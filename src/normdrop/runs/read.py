"""The one reader of run folders: what a run wrote, checked; and nothing that it did not write."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from normdrop.errors import UserError
from normdrop.runs.folder import (
    COLUMNS,
    EVALUATION,
    METRICS,
    MISTAKE_NAMES,
    OPTIONS,
    RECORD,
    RESULT,
    WEIGHTS,
    damaged,
)
from normdrop.runs.network import build_network
from normdrop.runs.options import Options

__all__ = [
    "DropoutLayer",
    "NormLayer",
    "RunFolder",
    "read_options",
    "read_record",
    "read_result",
    "read_run",
]

Array = NDArray[Any]


@dataclasses.dataclass(frozen=True)
class NormLayer:
    """What one batch norm layer holds, a number for each channel; None where it has none."""

    name: str
    features: int
    gamma: Array | None
    alpha: Array | None
    mean: Array | None
    variance: Array | None


@dataclasses.dataclass(frozen=True)
class DropoutLayer:
    """One dropout layer of the network: its name, its class and the share of values it keeps."""

    name: str
    kind: str
    keep: float


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """The files of one run, read and checked.

    A run that was stopped lacks some of them: ``result``, ``probabilities``, ``labels`` are then
    None and ``norm_layers`` is empty; ``missing`` names the files. ``diverged`` is the epoch that
    left the finite numbers; where it was the first, there is no ``result`` either.
    """

    path: Path
    options: Options | None
    record: dict[str, Any]
    metrics: dict[str, Array]
    result: dict[str, Any] | None
    diverged: int | None
    probabilities: Array | None
    labels: Array | None
    mistakes: Array
    mistake_pictures: Array | None
    mistake_names: tuple[str, ...]
    norm_layers: tuple[NormLayer, ...]
    dropout_layers: tuple[DropoutLayer, ...] | None
    missing: tuple[str, ...]

    @property
    def network(self) -> str:
        return str(self.record["network"]["name"])

    @property
    def network_options(self) -> dict[str, Any]:
        return dict(self.record["network"]["options"])

    @property
    def data(self) -> str:
        return str(self.record["data"]["source"])

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the network's outputs."""
        return tuple(str(name) for name in self.record["network"]["classes"])

    @property
    def samples(self) -> dict[str, list[int]]:
        """Samples of each class in each split; empty for a run that did not write them."""
        return dict(self.record.get("samples") or {})

    @property
    def skipped(self) -> tuple[tuple[str, str], ...]:
        """Images that could not be read and were left out, with the reason."""
        return tuple((str(name), str(reason)) for name, reason in self.record.get("skipped") or ())

    @property
    def dropped(self) -> int:
        """Rows of a table that were left out for their missing values."""
        return int(self.record.get("dropped") or 0)

    @property
    def epochs(self) -> int:
        return len(self.metrics["epoch"])


def read_options(folder: Path) -> Options:
    """The options of a run.

    Raises:
        UserError: the folder is no run's, or its options.yaml is damaged.
    """
    path = _present(folder, OPTIONS)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise damaged(path, error) from error
    if not isinstance(values, dict):
        raise damaged(path, f"it holds a {type(values).__name__}, not options")
    options = Options.from_flat(values)
    try:
        options.check()
    except TypeError as error:
        raise damaged(path, f"an option has the wrong type: {error}") from error
    return options


def read_record(folder: Path) -> dict[str, Any]:
    """What run.json of a run folder holds.

    Raises:
        UserError: the folder is no run's, or its run.json is damaged.
    """
    path = _present(folder, RECORD)
    record = _read_json(path)
    _check_record(path, record)
    return record


def read_result(folder: Path) -> dict[str, Any]:
    """What result.json of a finished run holds; without a test where the run diverged at once.

    Raises:
        UserError: there is none, or it is damaged.
    """
    result = _read_json(_present(folder, RESULT))
    record = read_record(folder)
    if not (result.get("diverged") and "accuracy" not in result):
        _check_result(folder / RESULT, result, len(record["network"]["classes"]))
    return result


def read_run(path: str | os.PathLike[str]) -> RunFolder:
    """Read everything that a run wrote, as far as it came.

    Args:
        path: the folder that ``normdrop train`` wrote.

    Raises:
        UserError: there is no such folder, it holds no run, or one of its files is damaged.
    """
    folder = Path(path)
    record = read_record(folder)
    names = (OPTIONS, METRICS, RESULT, EVALUATION, MISTAKE_NAMES, WEIGHTS)
    missing = tuple(name for name in names if not (folder / name).is_file())
    classes = len(record["network"]["classes"])
    result, evaluation, mistakes = None, dict[str, Array](), dict[str, Any]()
    diverged = None
    if RESULT not in missing:
        result = read_result(folder)
        diverged = result.get("diverged")
        result = result if "accuracy" in result else None
    if EVALUATION not in missing:
        evaluation = _read_tensors(folder / EVALUATION)
        _check_evaluation(folder / EVALUATION, evaluation, classes)
    if MISTAKE_NAMES not in missing:
        mistakes = _read_json(folder / MISTAKE_NAMES)
    return RunFolder(
        path=folder,
        options=None if OPTIONS in missing else read_options(folder),
        record=record,
        metrics=_read_metrics(folder / METRICS, there=METRICS not in missing),
        result=result,
        diverged=diverged,
        probabilities=evaluation.get("probabilities"),
        labels=evaluation.get("labels"),
        mistakes=evaluation.get("mistakes", np.zeros(0, dtype=np.int64)),
        mistake_pictures=evaluation.get("mistake_pictures"),
        mistake_names=tuple(str(name) for name in mistakes.get("mistake_names", ())),
        norm_layers=() if WEIGHTS in missing else _read_norm_layers(folder / WEIGHTS, record),
        dropout_layers=_find_dropout_layers(record),
        missing=missing,
    )


def _present(folder: Path, name: str) -> Path:
    """The path of a file without which a folder is no run's."""
    if (folder / name).is_file():
        return folder / name
    what = (
        f"has no {name}" if folder.is_dir() else "is a file" if folder.exists() else "is not there"
    )
    raise UserError(
        f"Expected a run folder, but {folder} {what}; "
        "give the folder that `normdrop train` wrote, such as runs/digits-resnet8-1"
    )


def _check_record(path: Path, record: dict[str, Any]) -> None:
    network, layers = record.get("network"), record.get("norm_layers") or []
    if not isinstance(network, dict) or not (
        {"name", "options", "input_shape", "classes"} <= network.keys()
    ):
        raise damaged(path, "it does not name the network, its options, input shape and classes")
    if not isinstance(network["classes"], list) or not isinstance(network["options"], dict):
        raise damaged(path, "it does not list the classes or the network's options")
    if not isinstance(record.get("data"), dict) or not {"source", "kind"} <= record["data"].keys():
        raise damaged(path, "it does not describe the data")
    if "digest" not in record:
        raise damaged(path, "it holds no digest of the data")
    if any(
        not isinstance(layer, dict) or not {"name", "features"} <= layer.keys() for layer in layers
    ):
        raise damaged(path, "its batch norm layers have no names or features")
    samples, classes = record.get("samples") or {}, len(network["classes"])
    if samples and (
        not isinstance(samples, dict)
        or not {"train", "val", "test"} <= samples.keys()
        or any(not isinstance(n, list) or len(n) != classes for n in samples.values())
    ):
        raise damaged(path, f"it does not count the samples of the {classes} classes")
    if any(not isinstance(pair, list) or len(pair) != 2 for pair in record.get("skipped") or ()):
        raise damaged(path, "what was skipped has no name or no reason")


def _check_result(path: Path, result: dict[str, Any], classes: int) -> None:
    wanted = {
        "split", "count", "accuracy", "accuracy_interval", "loss", "calibration_error",
        "per_class", "confusion", "epochs", "best_epoch", "train_seconds",
    }  # fmt: skip
    if absent := sorted(wanted - result.keys()):
        raise damaged(path, f"it lacks {', '.join(absent)}")
    if np.shape(result["confusion"]) != (classes, classes) or len(result["per_class"]) != classes:
        raise damaged(path, f"its tables are not those of the {classes} classes in run.json")


def _check_evaluation(path: Path, evaluation: dict[str, Array], classes: int) -> None:
    """Probabilities, labels and mistakes must belong to each other and to the classes."""
    if not {"probabilities", "labels", "mistakes"} <= evaluation.keys():
        raise damaged(path, "it lacks probabilities, labels or mistakes")
    probabilities, labels, mistakes = (
        evaluation[name] for name in ("probabilities", "labels", "mistakes")
    )
    whole = probabilities.shape == (len(labels), classes)
    whole = whole and all((labels >= 0) & (labels < classes))
    whole = whole and all((mistakes >= 0) & (mistakes < len(labels)))
    pictures = evaluation.get("mistake_pictures")
    if not whole or (
        pictures is not None and (pictures.ndim != 4 or len(pictures) != len(mistakes))
    ):
        raise damaged(path, f"its tensors do not fit together, or not the {classes} classes")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise damaged(path, error) from error
    if not isinstance(value, dict):
        raise damaged(path, f"it holds a {type(value).__name__}, not an object")
    return value


def _read_metrics(path: Path, *, there: bool) -> dict[str, Array]:
    rows: list[list[float]] = []
    if there:
        try:
            with path.open(encoding="utf-8", newline="") as file:
                header, *lines = list(csv.reader(file)) or [[]]
            if header != list(COLUMNS):
                raise ValueError("its first line does not name the columns of a run")
            if any(len(line) != len(COLUMNS) for line in lines):
                raise ValueError("a line is cut off")
            rows = [[float(value or "nan") for value in line] for line in lines]
        except (OSError, ValueError, csv.Error) as error:
            raise damaged(path, error) from error
    table = np.array(rows, dtype=np.float64).reshape(-1, len(COLUMNS))
    if table[:, 0].tolist() != list(range(1, len(table) + 1)):
        raise damaged(path, "its epochs are not counted from 1")
    return {name: table[:, column] for column, name in enumerate(COLUMNS)}


def _read_tensors(path: Path, names: list[str] | None = None) -> dict[str, Array]:
    """Read the named tensors, or all; bfloat16 is widened, since NumPy has no such type."""
    arrays: dict[str, Array] = {}
    try:
        with safe_open(path, framework="pt") as file:
            present = set(file.keys())
            for name in sorted(present) if names is None else names:
                if name in present:
                    tensor = file.get_tensor(name)
                    if tensor.dtype in (torch.bfloat16, torch.float16):
                        tensor = tensor.float()
                    arrays[name] = tensor.numpy()
    except (OSError, SafetensorError) as error:
        raise damaged(path, error) from error
    return arrays


def _read_norm_layers(path: Path, record: dict[str, Any]) -> tuple[NormLayer, ...]:
    layers = record.get("norm_layers") or []
    parts = ("weight", "bias", "running_mean", "running_var")
    arrays = _read_tensors(path, [f"{layer['name']}.{part}" for layer in layers for part in parts])
    found = []
    for layer in layers:
        name = str(layer["name"])
        values = [arrays.get(f"{name}.{part}") for part in parts]
        if any(value is not None for value in values):
            found.append(NormLayer(name, int(layer["features"]), *values))
    return tuple(found)


def _find_dropout_layers(record: dict[str, Any]) -> tuple[DropoutLayer, ...] | None:
    """Build the network anew, without memory for its weights, and list its dropout layers.

    None when the network cannot be built here, as for a run of a later version.
    """
    try:
        with torch.device("meta"):
            model = build_network(record["network"])
    except (KeyError, TypeError, ValueError, RuntimeError):
        return None
    return tuple(
        DropoutLayer(name, type(module).__name__, round(1.0 - float(module.p), 9))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.modules.dropout._DropoutNd)
    )
