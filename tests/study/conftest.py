"""A fabricated run folder, seeded and in the exact form that training writes."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

COLUMNS = (
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


def wilson(right: int, count: int) -> list[float]:
    z, share = 1.959964, right / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * np.sqrt(share * (1 - share) / count + z * z / (4 * count**2)) / (1 + z * z / count)
    return [float(middle - half), float(middle + half)]


def fabricate(
    folder: Path,
    *,
    epochs: int = 30,
    classes: int | tuple[str, ...] = 10,
    norm: bool = True,
    layers: int = 19,
    channels: int = 16,
    kind: str = "image",
    picture: tuple[int, int, int] = (8, 8, 1),
    samples: int = 360,
    error: float = 0.04,
    network: str = "resnet20",
    network_options: dict | None = None,
    data: str = "digits",
    finished: bool = True,
    overfit: bool = False,
    dead: int = 0,
    skipped: tuple[tuple[str, str], ...] = (),
    dropped: int = 0,
    seed: int = 0,
) -> Path:
    """Write a run folder; see the arguments for what can be varied."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    names = classes if isinstance(classes, tuple) else tuple(str(k) for k in range(classes))
    k = len(names)
    network_options = network_options or {"keep_hidden": 0.8, "norm": norm}
    options = {
        "data": data,
        "model": network,
        "epochs": epochs,
        "batch_size": 128,
        "seed": seed,
        "label_smoothing": 0.0,
        "learning_rate": 0.1,
        "network": network_options,
        "augment": None,
    }
    (folder / "options.yaml").write_text(yaml.safe_dump(options), encoding="utf-8")
    norm_layers = [
        {"name": f"layer{1 + i // 6}.{i % 6 // 2}.bn{1 + i % 2}", "features": channels}
        for i in range(layers if norm else 0)
    ]
    shape = (picture[2], *picture[:2]) if kind == "image" else (12,)
    run = {
        "version": "0.1.0",
        "network": {
            "name": network,
            "options": network_options,
            "input_shape": shape,
            "classes": names,
        },
        "data": {"name": data, "kind": kind, "classes": names, "shape": shape},
        "samples": {"train": [90] * k, "val": [10] * k, "test": [samples // k] * k},
        "skipped": skipped,
        "dropped": dropped,
        "norm_layers": norm_layers,
    }
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")

    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for epoch in range(1, epochs + 1):
            at = epoch / max(epochs, 2)
            train = 2.2 * np.exp(-5 * at) + 0.02 + 0.01 * random.random()
            val = 2.2 * np.exp(-4 * at) + 0.12 + 0.02 * random.random()
            if overfit:
                train, val = 2.3 * 0.7**epoch, 0.4 + 0.5 * abs(at - 0.4)
            rate = 0.1 * min(1, epoch / max(1, epochs / 6)) * (1 + np.cos(np.pi * at)) / 2
            speed = 21000 + 900 * random.standard_normal()
            row = [epoch, epoch * 11, rate, train, 1 - train / 3, val, 1 - val / 4, 1.2, speed]
            writer.writerow(row)

    state = {"fc.weight": random.standard_normal((k, channels)).astype(np.float32)}
    for depth, layer in enumerate(norm_layers):
        name = layer["name"]
        gamma = random.normal(1 - 0.02 * depth, 0.15, channels)
        gamma[: dead if depth == 2 else 0] = 1e-5
        state[f"{name}.weight"] = gamma.astype(np.float32)
        state[f"{name}.bias"] = random.normal(-0.1, 0.2, channels).astype(np.float32)
        state[f"{name}.running_mean"] = random.normal(0, 0.5, channels).astype(np.float32)
        state[f"{name}.running_var"] = np.exp(random.normal(-0.1 * depth, 0.5, channels)).astype(
            np.float32
        )
        state[f"{name}.num_batches_tracked"] = np.array(epochs * 11, dtype=np.int64)
    save_file(state, folder / "weights.safetensors")
    if not finished:
        return folder

    labels = random.integers(0, k, samples)
    if samples >= k:
        labels[:k] = np.arange(k)
    logits = random.standard_normal((samples, k)) * 0.8
    logits[np.arange(samples), labels] += 6.0
    wrong = random.random(samples) < error
    logits[np.arange(samples)[wrong], (labels[wrong] + 1) % k] += 7.0
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    predicted = probabilities.argmax(1)
    confusion = np.zeros((k, k), dtype=int)
    np.add.at(confusion, (labels, predicted), 1)
    hits = np.diag(confusion)
    precision = hits / np.maximum(confusion.sum(0), 1)
    recall = hits / np.maximum(confusion.sum(1), 1)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    confidence = probabilities.max(1)
    edges = np.linspace(0, 1, 16)
    bins = np.clip(np.digitize(confidence, edges) - 1, 0, 14)
    count = np.bincount(bins, minlength=15)
    right = predicted == labels
    bin_confidence = [float(confidence[bins == b].mean()) if count[b] else None for b in range(15)]
    bin_accuracy = [float(right[bins == b].mean()) if count[b] else None for b in range(15)]
    gaps = [count[b] * abs(bin_confidence[b] - bin_accuracy[b]) for b in range(15) if count[b] > 0]
    result = {
        "split": "test",
        "count": samples,
        "accuracy": float(right.mean()),
        "accuracy_interval": wilson(int(right.sum()), samples),
        "loss": float(-np.log(probabilities[np.arange(samples), labels]).mean()),
        "calibration_error": float(sum(gaps) / samples),
        "per_class": [
            {
                "class": names[i],
                "precision": float(precision[i]),
                "recall": float(recall[i]),
                "f1": float(f1[i]),
                "support": int(confusion[i].sum()),
            }
            for i in range(k)
        ],
        "confusion": confusion.tolist(),
        "reliability": {
            "edges": edges.tolist(),
            "confidence": bin_confidence,
            "accuracy": bin_accuracy,
            "count": count.tolist(),
        },
        "epochs": epochs,
        "best_epoch": max(1, epochs - 2),
        "train_seconds": 1.2 * epochs,
        "parameters": {
            "theta": 272474,
            "gamma_alpha": 2 * channels * len(norm_layers),
            "norm_nodes": channels * len(norm_layers),
        },
        "machine": {
            "processor": "Some Processor 9000",
            "threads": 2,
            "torch": "2.13.0",
            "normdrop": "0.1.0",
            "kernels": True,
        },
        "command": f"normdrop train --config {folder.name}/options.yaml",
    }
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    mistakes = np.flatnonzero(~right)
    mistakes = mistakes[np.argsort(-probabilities[mistakes, predicted[mistakes]])][:24]
    tensors = {
        "probabilities": probabilities.astype(np.float32),
        "labels": labels.astype(np.int64),
        "mistakes": mistakes.astype(np.int64),
    }
    if kind == "image":
        pictures = random.integers(0, 256, (len(mistakes), *picture), dtype=np.uint8)
        tensors["mistake_pictures"] = pictures
    save_file(tensors, folder / "evaluation.safetensors")
    named = [f"test/{names[labels[i]]}/{i:05}.png" for i in mistakes]
    if kind == "table":
        named = [f"row {i}" for i in mistakes]
    (folder / "evaluation.json").write_text(json.dumps({"mistake_names": named}), encoding="utf-8")
    return folder


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a run folder below the test's own folder."""
    return lambda name="run", **options: fabricate(tmp_path / name, **options)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished run with warning signs, for tests that do not change it."""
    return fabricate(tmp_path_factory.mktemp("finished") / "run", dead=3)
