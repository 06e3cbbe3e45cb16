"""What a network is worth on a split: accuracy, per class, confusion, calibration."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import normdrop
from normdrop.errors import UserError

__all__ = [
    "check_flip",
    "count_parameters",
    "machine",
    "measure",
    "predict_batches",
]

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
    # Predictions need this file too, but not these, which take long to import.
    from scipy.stats import binomtest
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

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
        # Wilson, Probable Inference, the Law of Succession, and Statistical Inference, 1927.
        "accuracy_interval": list(binomtest(right, count).proportion_ci(method="wilson")),
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
    network: torch.nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, flip: bool = False
) -> tuple[Tensor, Tensor]:
    """The class probabilities (n, k) float32 and the labels (n,) of all batches, in order.

    With ``flip`` each row is the mean of the probabilities of an image and of its mirror image.
    """
    network.eval()
    dtype = next(network.parameters()).dtype
    probabilities, labels = [], []
    for x, y in batches:
        views = (x, x.flip(-1)) if flip else (x,)
        each = [network(view.to(dtype)).double().softmax(1) for view in views]
        probabilities.append(torch.stack(each).mean(0).float())
        labels.append(y)
    return torch.cat(probabilities), torch.cat(labels)


def check_flip(kind: str) -> None:
    """Raise UserError where there is no mirror image to average with.

    Example:
        >>> check_flip("table")
        Traceback (most recent call last):
        normdrop.errors.UserError: flip_test is for images, but the data is a table; leave it out
    """
    if kind != "image":
        raise UserError(f"flip_test is for images, but the data is a {kind}; leave it out")


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
