"""Reading a run folder: everything that the report shows, and nothing that a run did not write."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normdrop.errors import UserError

__all__ = ["DropoutLayer", "NormLayer", "RunFolder", "read_run_folder"]

Array = NDArray[Any]

_COLUMNS = (
    "epoch",
    "step",
    "learning_rate",
    "train_loss",
    "train_accuracy",
    "val_loss",
    "val_accuracy",
    "seconds",
    "images_per_second",
)


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
    None and ``norm_layers`` is empty; ``missing`` names the files.
    """

    path: Path
    options: dict[str, Any]
    run: dict[str, Any]
    metrics: dict[str, Array]
    result: dict[str, Any] | None
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
        return str(self.run.get("network", {}).get("name", "network"))

    @property
    def network_options(self) -> dict[str, Any]:
        return dict(self.run.get("network", {}).get("options") or {})

    @property
    def data(self) -> str:
        state = self.run.get("data", {})
        for key in ("name", "source"):
            if state.get(key):
                return str(state[key])
        return str(self.options.get("data", "data"))

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the network's outputs."""
        return tuple(str(name) for name in self.run["network"]["classes"])

    @property
    def samples(self) -> dict[str, list[int]]:
        """Samples of each class in each split; empty for a run that did not write them."""
        return dict(self.run.get("samples") or {})

    @property
    def skipped(self) -> tuple[tuple[str, str], ...]:
        """Images that could not be read and were left out, with the reason."""
        return tuple((str(name), str(reason)) for name, reason in self.run.get("skipped") or ())

    @property
    def dropped(self) -> int:
        """Rows of a table that were left out for their missing values."""
        return int(self.run.get("dropped") or 0)

    @property
    def epochs(self) -> int:
        return len(self.metrics["epoch"])


def read_run_folder(path: str | os.PathLike[str]) -> RunFolder:
    """Read the files of a run.

    Args:
        path: the folder that ``normdrop train`` wrote.

    Raises:
        UserError: there is no such folder, it holds no run, or one of its files is damaged.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(
            f"Expected a run folder, but {folder} is "
            f"{'a file' if folder.exists() else 'not there'}: "
            "give the folder that `normdrop train` wrote, such as runs/digits."
        )
    if not (folder / "run.json").is_file():
        raise UserError(
            f"Expected a run folder, but {folder} has no run.json: "
            "give the folder that `normdrop train` wrote, such as runs/digits."
        )
    missing: list[str] = []
    options = _read_yaml(folder / "options.yaml", missing)
    run = _read_json(folder / "run.json", missing) or {}
    metrics = _read_metrics(folder / "metrics.csv", missing)
    result = _read_json(folder / "result.json", missing)
    evaluation = _read_tensors(folder / "evaluation.safetensors", None, missing) or {}
    names = _read_json(folder / "evaluation.json", missing) or {}
    _check_run(folder / "run.json", run)
    if result is not None:
        _check_result(folder / "result.json", result, len(run["network"]["classes"]))
    if evaluation:
        path = folder / "evaluation.safetensors"
        _check_evaluation(path, evaluation, len(run["network"]["classes"]))
    return RunFolder(
        path=folder,
        options=options,
        run=run,
        metrics=metrics,
        result=result,
        probabilities=evaluation.get("probabilities"),
        labels=evaluation.get("labels"),
        mistakes=evaluation.get("mistakes", np.zeros(0, dtype=np.int64)),
        mistake_pictures=evaluation.get("mistake_pictures"),
        mistake_names=tuple(str(name) for name in names.get("mistake_names", ())),
        norm_layers=_read_norm_layers(folder / "weights.safetensors", run, missing),
        dropout_layers=_find_dropout_layers(run),
        missing=tuple(missing),
    )


def _damaged(path: Path, why: object) -> UserError:
    return UserError(
        f"Expected {path} to be a whole file of a run, but it cannot be read ({why}): "
        "restore it, or run the training again."
    )


def _check_run(path: Path, run: dict[str, Any]) -> None:
    network, layers = run.get("network"), run.get("norm_layers") or []
    if not isinstance(network, dict) or not {"name", "input_shape", "classes"} <= network.keys():
        raise _damaged(path, "it does not name the network, its input shape and its classes")
    if not isinstance(network["classes"], list) or not isinstance(run.get("data"), dict):
        raise _damaged(path, "it does not list the classes, or does not describe the data")
    if any(
        not isinstance(layer, dict) or not {"name", "features"} <= layer.keys() for layer in layers
    ):
        raise _damaged(path, "its batch norm layers have no names or features")
    samples, classes = run.get("samples") or {}, len(network["classes"])
    if samples and (
        not isinstance(samples, dict)
        or not {"train", "val", "test"} <= samples.keys()
        or any(not isinstance(n, list) or len(n) != classes for n in samples.values())
    ):
        raise _damaged(path, f"it does not count the samples of the {classes} classes")
    if any(not isinstance(pair, list) or len(pair) != 2 for pair in run.get("skipped") or ()):
        raise _damaged(path, "what was skipped has no name or no reason")


def _check_result(path: Path, result: dict[str, Any], classes: int) -> None:
    wanted = {
        "split", "count", "accuracy", "accuracy_interval", "loss", "calibration_error",
        "per_class", "confusion", "epochs", "best_epoch", "train_seconds",
    }  # fmt: skip
    if absent := sorted(wanted - result.keys()):
        raise _damaged(path, f"it lacks {', '.join(absent)}")
    if np.shape(result["confusion"]) != (classes, classes) or len(result["per_class"]) != classes:
        raise _damaged(path, f"its tables are not those of the {classes} classes in run.json")


def _check_evaluation(path: Path, evaluation: dict[str, Array], classes: int) -> None:
    """Probabilities, labels and mistakes must belong to each other and to the classes."""
    if not {"probabilities", "labels", "mistakes"} <= evaluation.keys():
        raise _damaged(path, "it lacks probabilities, labels or mistakes")
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
        raise _damaged(path, f"its tensors do not fit together, or not the {classes} classes")


def _read_json(path: Path, missing: list[str]) -> dict[str, Any] | None:
    if not path.is_file():
        missing.append(path.name)
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error
    if not isinstance(value, dict):
        raise _damaged(path, f"it holds a {type(value).__name__}, not an object")
    return value


def _read_yaml(path: Path, missing: list[str]) -> dict[str, Any]:
    import yaml

    if not path.is_file():
        missing.append(path.name)
        return {}
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise _damaged(path, str(error).replace("\n", " ")) from error
    if not isinstance(value, dict):
        raise _damaged(path, f"it holds a {type(value).__name__}, not a mapping")
    return value


def _read_metrics(path: Path, missing: list[str]) -> dict[str, Array]:
    rows: list[list[float]] = []
    if path.is_file():
        try:
            with path.open(encoding="utf-8", newline="") as file:
                rows = [
                    [float(row.get(name) or "nan") for name in _COLUMNS]
                    for row in csv.DictReader(file)
                ]
        except (OSError, ValueError, csv.Error) as error:
            raise _damaged(path, error) from error
    else:
        missing.append(path.name)
    table = np.array(rows, dtype=np.float64).reshape(-1, len(_COLUMNS))
    table = table[np.isfinite(table[:, 0])]
    return {name: table[:, column] for column, name in enumerate(_COLUMNS)}


def _read_tensors(path: Path, names: list[str] | None, missing: list[str]) -> dict[str, Any] | None:
    """Read the named tensors, or all; bfloat16 is widened, since NumPy has no such type."""
    import torch
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        missing.append(path.name)
        return None
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
        raise _damaged(path, error) from error
    return arrays


def _read_norm_layers(path: Path, run: dict[str, Any], missing: list[str]) -> tuple[NormLayer, ...]:
    layers = run.get("norm_layers") or []
    parts = ("weight", "bias", "running_mean", "running_var")
    names = [f"{layer['name']}.{part}" for layer in layers for part in parts]
    arrays = _read_tensors(path, names, missing)
    if arrays is None:
        return ()
    found = []
    for layer in layers:
        name = str(layer["name"])
        values = [arrays.get(f"{name}.{part}") for part in parts]
        if any(value is not None for value in values):
            found.append(NormLayer(name, int(layer["features"]), *values))
    return tuple(found)


def _find_dropout_layers(run: dict[str, Any]) -> tuple[DropoutLayer, ...] | None:
    """Build the network anew, without memory for its weights, and list its dropout layers.

    None when the network cannot be built here, as for a run of a later version.
    """
    import torch

    from normdrop import networks

    network = run.get("network", {})
    try:
        with torch.device("meta"):
            model = networks.build(
                network["name"],
                classes=len(network["classes"]),
                input_shape=tuple(network["input_shape"]),
                **(network.get("options") or {}),
            )
    except (KeyError, TypeError, ValueError, RuntimeError):
        return None
    return tuple(
        DropoutLayer(name, type(module).__name__, round(1.0 - float(module.p), 9))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.modules.dropout._DropoutNd)
    )
