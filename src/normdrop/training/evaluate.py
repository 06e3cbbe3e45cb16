"""What a trained network is worth: accuracy, per class, confusion, calibration."""

from __future__ import annotations

import json
import math
import os
import pickle
import platform
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from torch import Tensor

import normdrop
from normdrop import networks
from normdrop.errors import UserError
from normdrop.files import write_atomically, write_text

__all__ = [
    "best_weights",
    "count_parameters",
    "finish",
    "load_checkpoint",
    "load_network",
    "measure",
    "predict_batches",
    "read_run",
    "wilson_interval",
    "with_weights",
]

MISTAKES = 24
BINS = 15


def measure(probabilities: Tensor, labels: Tensor, classes: Iterable[str]) -> dict[str, Any]:
    """Everything that is measured on a split, ready for JSON.

    Args:
        probabilities: (n, k), each row sums to 1.
        labels: (n,) class indices.
        classes: the k names.

    Returns:
        count, accuracy with its 95 % interval, loss, calibration_error, per_class, confusion (rows
        are the truth) and reliability, as in result.json.

    Example:
        >>> result = measure(torch.eye(2), torch.tensor([0, 1]), ["cat", "dog"])
        >>> result["accuracy"], result["confusion"]
        (1.0, [[1, 0], [0, 1]])
    """
    names = list(classes)
    truth = labels.numpy()
    guess = probabilities.argmax(1).numpy()
    count = len(truth)
    right = int((truth == guess).sum())
    every = list(range(len(names)))
    precision, recall, f1, support = precision_recall_fscore_support(
        truth, guess, labels=every, zero_division=0.0
    )
    given = probabilities.double().gather(1, labels[:, None]).clamp_min(1e-12)
    reliability, error = _reliability(probabilities, labels)
    return {
        "count": count,
        "accuracy": right / count,
        "accuracy_interval": list(wilson_interval(right, count)),
        "loss": float(-given.log().mean()),
        "calibration_error": error,
        "per_class": [
            {
                "class": name,
                "precision": float(precision[i]),
                "recall": float(recall[i]),
                "f1": float(f1[i]),
                "support": int(support[i]),
            }
            for i, name in enumerate(names)
        ],
        "confusion": confusion_matrix(truth, guess, labels=every).tolist(),
        "reliability": reliability,
    }


def wilson_interval(right: int, count: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """The 95 % interval of a share, right / count, which stays inside [0, 1].

    Example:
        >>> low, high = wilson_interval(98, 100)
        >>> round(low, 3), round(high, 3)
        (0.93, 0.994)

    Reference:
        Wilson, Probable Inference, the Law of Succession, and Statistical Inference, 1927.
    """
    share = right / count
    middle = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def _reliability(probabilities: Tensor, labels: Tensor) -> tuple[dict[str, Any], float]:
    """Confidence and accuracy in 15 bins of confidence, and their expected distance (ECE).

    Reference:
        Guo et al., On Calibration of Modern Neural Networks, 2017.
    """
    confidence, guess = (value.numpy() for value in probabilities.double().max(1))
    right = guess == labels.numpy()
    edges = np.linspace(0, 1, BINS + 1)
    # A bin holds its upper edge, not its lower one, as in the paper.
    place = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    count = np.bincount(place, minlength=BINS)
    total = np.maximum(count, 1)
    mean_confidence = np.bincount(place, weights=confidence, minlength=BINS) / total
    mean_accuracy = np.bincount(place, weights=right, minlength=BINS) / total
    error = float((count * np.abs(mean_accuracy - mean_confidence)).sum() / max(len(right), 1))
    return {
        "edges": edges.tolist(),
        "confidence": mean_confidence.tolist(),
        "accuracy": mean_accuracy.tolist(),
        "count": count.tolist(),
    }, error


@torch.no_grad()
def predict_batches(
    network: torch.nn.Module, batches: Iterable[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """The class probabilities (n, k) float32 and the labels (n,) of all batches, in order."""
    network.eval()
    dtype = next(network.parameters()).dtype
    probabilities, labels = [], []
    for x, y in batches:
        probabilities.append(network(x.to(dtype)).double().softmax(1).float())
        labels.append(y)
    return torch.cat(probabilities), torch.cat(labels)


def finish(
    folder: Path,
    network: torch.nn.Module,
    datamodule: Any,
    *,
    epochs: int,
    best_epoch: int,
    train_seconds: float,
) -> dict[str, Any]:
    """Write the weights, test them once, and write what the test says."""
    tensors = {name: value.contiguous() for name, value in network.state_dict().items()}
    with write_atomically(folder / "weights.safetensors") as temporary:
        temporary.write_bytes(safetensors.torch.save(tensors))
    probabilities, labels = predict_batches(network, datamodule.test_dataloader())
    _write_evaluation(folder, probabilities, labels, datamodule)
    result = {
        "split": "test",
        **measure(probabilities, labels, datamodule.classes),
        "epochs": epochs,
        "best_epoch": best_epoch,
        "train_seconds": train_seconds,
        "parameters": count_parameters(network),
        "machine": machine(),
        "command": f"normdrop train --config {folder / 'options.yaml'}",
    }
    # Last of all: a folder with result.json is a finished run.
    write_text(folder / "result.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return result


def _write_evaluation(folder: Path, probabilities: Tensor, labels: Tensor, datamodule: Any) -> None:
    wrong = (probabilities.argmax(1) != labels).nonzero().flatten()
    confidence = probabilities[wrong].max(1).values
    worst = wrong[confidence.argsort(descending=True, stable=True)][:MISTAKES]
    tensors = {"probabilities": probabilities, "labels": labels, "mistakes": worst}
    indices = worst.tolist()
    if datamodule.kind == "image" and indices:
        pictures = [np.asarray(picture) for picture in datamodule.pictures("test", indices)]
        if len({picture.shape for picture in pictures}) == 1:
            tensors["mistake_pictures"] = torch.from_numpy(np.stack(pictures))
    names = [str(name) for name in datamodule.names("test", indices)] if indices else []
    with write_atomically(folder / "evaluation.safetensors") as temporary:
        temporary.write_bytes(
            safetensors.torch.save({name: value.contiguous() for name, value in tensors.items()})
        )
    write_text(
        folder / "evaluation.json",
        json.dumps({"mistake_names": names}, indent=1, ensure_ascii=False) + "\n",
    )


def count_parameters(network: torch.nn.Module) -> dict[str, int]:
    """Θ, the γ and α that batch norm adds, and the nodes K that it normalizes.

    Example:
        >>> count_parameters(torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5)))
        {'theta': 20, 'gamma_alpha': 10, 'norm_nodes': 5}
    """
    norms = [
        module
        for module in network.modules()
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
    ]
    added = sum(p.numel() for module in norms for p in module.parameters(recurse=False))
    return {
        "theta": sum(p.numel() for p in network.parameters()) - added,
        "gamma_alpha": added,
        "norm_nodes": sum(module.num_features for module in norms),
    }


def machine() -> dict[str, Any]:
    """The processor, threads and versions that a figure was measured with."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
                break
    return {
        "processor": processor,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "normdrop": normdrop.__version__,
        "kernels": bool(normdrop.has_kernels()),
    }


def read_run(folder: Path) -> dict[str, Any]:
    """What run.json of a run folder holds."""
    path = folder / "run.json"
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        run["network"]["name"], run["data"], run["digest"]
    except FileNotFoundError:
        raise UserError(
            f"Expected a run folder with run.json, but {folder} has none"
            if folder.is_dir()
            else f"There is no run folder {folder}"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"Cannot read {path}: {error}; it was cut off or changed") from error
    return dict(run)


def load_network(folder: Path) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The trained network of a run folder, in evaluation mode, and what run.json says.

    Raises:
        UserError: the folder is no finished run, or its weights belong to another network.
    """
    run = read_run(folder)
    path = folder / "weights.safetensors"
    if not path.exists():
        raise UserError(
            f"The run {folder} has no weights yet; finish it with: normdrop train --resume {folder}"
        )
    network = networks.build(
        run["network"]["name"],
        classes=len(run["network"]["classes"]),
        input_shape=tuple(run["network"]["input_shape"]),
        **run["network"]["options"],
    )
    try:
        weights = safetensors.torch.load(path.read_bytes())
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"Cannot read {path} ({error}); the file is cut off or no safetensors file"
        ) from error
    return with_weights(network, weights, path).eval(), run


def with_weights(
    network: torch.nn.Module, weights: Mapping[str, Tensor], path: str | os.PathLike[str]
) -> torch.nn.Module:
    """Load weights into a network; when names or shapes differ, say which.

    Raises:
        UserError: the weights belong to another network.
    """
    own = network.state_dict()
    differ = [f"{name} is missing" for name in own if name not in weights]
    differ += [f"{name} is unknown" for name in weights if name not in own]
    differ += [
        f"{name} should have shape {tuple(own[name].shape)}, not {tuple(value.shape)}"
        for name, value in weights.items()
        if name in own and own[name].shape != value.shape
    ]
    if differ:
        more = f"; and {len(differ) - 3} more" if len(differ) > 3 else ""
        raise UserError(
            f"{os.fspath(path)} belongs to another network: {'; '.join(differ[:3])}{more}"
        )
    dtypes = {value.dtype for value in weights.values() if value.is_floating_point()}
    if len(dtypes) == 1:
        network.to(dtypes.pop())
    network.load_state_dict(dict(weights))
    return network


def load_checkpoint(path: Path, network: torch.nn.Module) -> dict[str, Any]:
    """A checkpoint of this network; loading it never runs code from the file.

    Raises:
        UserError: the file is missing, cut off, no checkpoint, or of another network.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        state, _ = checkpoint["state_dict"], checkpoint["callbacks"]["Record"]
    except FileNotFoundError:
        raise UserError(f"There is no checkpoint {path}; start the run again") from None
    except (
        RuntimeError,
        OSError,
        EOFError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        KeyError,
        TypeError,
        ValueError,
    ) as error:
        reason = str(error).strip().split("\n")[0][:120]
        raise UserError(
            f"Cannot read {path} ({reason}); the file is cut off or no checkpoint of a run"
        ) from error
    own = {f"network.{name}": value for name, value in network.state_dict().items()}
    shapes = {name: tuple(value.shape) for name, value in own.items()}
    if shapes != {name: tuple(value.shape) for name, value in state.items()}:
        with_weights(network, _network_part(state), path)
    return dict(checkpoint)


def best_weights(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights to evaluate: those of the moving average where there is one."""
    return _network_part(checkpoint["state_dict"]) | dict(checkpoint["averaged"])


def _network_part(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("network."): value for name, value in state.items()}
