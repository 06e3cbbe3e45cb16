"""Run folders for the report: one that training wrote, and others of its form."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from normdrop.runs.folder import OPTIONS, RECORD, RESULT
from normdrop.runs.options import Options
from normdrop.runs.write import write_end, write_metrics
from normdrop.training.fit import train
from normdrop.training.measure import measure


@pytest.fixture(scope="session")
def real_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run as training leaves it; no test changes it."""
    options = {
        "data": "digits", "model": "resnet8", "width": 4, "epochs": 2, "keep_hidden": 0.8,
        "test": 0.5, "threads": 1, "report": False,
        "runs_dir": str(tmp_path_factory.mktemp("real")),
    }  # fmt: skip
    return train(Options.from_flat(options))


def changed(content: dict, **values: object) -> dict:
    """What a real run wrote with other values; a key that it does not have is an error."""
    assert values.keys() <= content.keys(), values.keys() - content.keys()
    return content | values


def fabricate(
    folder: Path,
    real: Path,
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
    """Write a run folder in the form of a real one; see the arguments for what can be varied."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    names = classes if isinstance(classes, tuple) else tuple(str(k) for k in range(classes))
    k = len(names)
    options = changed(
        yaml.safe_load((real / OPTIONS).read_text()),
        data=data, model=network, epochs=epochs, norm=norm, label_smoothing=0.0,
    )  # fmt: skip
    (folder / OPTIONS).write_text(yaml.safe_dump(options, sort_keys=False), encoding="utf-8")
    norm_layers = [
        {"name": f"layer{1 + i // 6}.{i % 6 // 2}.bn{1 + i % 2}", "features": channels}
        for i in range(layers if norm else 0)
    ]
    shape = [picture[2], *picture[:2]] if kind == "image" else [12]
    record = json.loads((real / RECORD).read_text())
    record = changed(
        record,
        network=changed(
            record["network"],
            name=network,
            options=network_options or {"keep_hidden": 0.8, "norm": norm},
            input_shape=shape,
            classes=list(names),
        ),
        data=changed(record["data"], source=data, kind=kind, classes=list(names)),
        samples={"train": [90] * k, "val": [10] * k, "test": [samples // k] * k},
        skipped=[list(pair) for pair in skipped],
        dropped=dropped,
        norm_layers=norm_layers,
    )
    (folder / RECORD).write_text(json.dumps(record), encoding="utf-8")

    rows = []
    for epoch in range(1, epochs + 1):
        at = epoch / max(epochs, 2)
        train = 2.2 * np.exp(-5 * at) + 0.02 + 0.01 * random.random()
        val = 2.2 * np.exp(-4 * at) + 0.12 + 0.02 * random.random()
        if overfit:
            train, val = 2.3 * 0.7**epoch, 0.4 + 0.5 * abs(at - 0.4)
        rows.append(
            {
                "epoch": epoch,
                "step": epoch * 11,
                "learning_rate": 0.05 * min(1, 6 * epoch / epochs) * (1 + np.cos(np.pi * at)),
                "train_loss": train,
                "train_accuracy": 1 - train / 3,
                "val_loss": val,
                "val_accuracy": 1 - val / 4,
                "seconds": 1.2,
                "images_per_second": 21000 + 900 * random.standard_normal(),
            }
        )
    write_metrics(folder, rows)
    if not finished:
        return folder

    weights = {"fc.weight": random.standard_normal((k, channels))}
    for depth, layer in enumerate(norm_layers):
        gamma = random.normal(1 - 0.02 * depth, 0.15, channels)
        gamma[: dead if depth == 2 else 0] = 1e-5
        weights[f"{layer['name']}.weight"] = gamma
        weights[f"{layer['name']}.bias"] = random.normal(-0.1, 0.2, channels)
        weights[f"{layer['name']}.running_mean"] = random.normal(0, 0.5, channels)
        weights[f"{layer['name']}.running_var"] = np.exp(random.normal(-0.1 * depth, 0.5, channels))
    labels = random.integers(0, k, samples)
    if samples >= k:
        labels[:k] = np.arange(k)
    logits = random.standard_normal((samples, k)) * 0.8
    logits[np.arange(samples), labels] += 6.0
    wrong = random.random(samples) < error
    logits[np.arange(samples)[wrong], (labels[wrong] + 1) % k] += 7.0
    probabilities = torch.from_numpy(logits).softmax(1).float()
    guess = probabilities.argmax(1).numpy()
    mistakes = np.flatnonzero(guess != labels)
    mistakes = mistakes[np.argsort(-probabilities.numpy()[mistakes, guess[mistakes]])][:24]
    evaluation = {
        "probabilities": probabilities,
        "labels": torch.from_numpy(labels),
        "mistakes": torch.from_numpy(mistakes),
    }
    if kind == "image" and len(mistakes):
        pictures = random.integers(0, 256, (len(mistakes), *picture), dtype=np.uint8)
        evaluation["mistake_pictures"] = torch.from_numpy(pictures)
    result = json.loads((real / RESULT).read_text())
    write_end(
        folder,
        weights={name: torch.from_numpy(value).float() for name, value in weights.items()},
        evaluation=evaluation,
        mistake_names=[
            f"test/{names[labels[i]]}/{i:05}.png" if kind == "image" else f"row {i}"
            for i in mistakes
        ],
        result=changed(
            result,
            **measure(probabilities, evaluation["labels"], names),
            epochs=epochs,
            best_epoch=max(1, epochs - 2),
            train_seconds=1.2 * epochs,
            machine=changed(result["machine"], processor="Some Processor 9000", threads=2),
            command=f"normdrop train --config {folder.name}/options.yaml",
        ),
    )
    return folder


@pytest.fixture
def make_run(tmp_path: Path, real_run: Path) -> Callable[..., Path]:
    """A function that writes a run folder below the test's own folder."""
    return lambda name="run", **options: fabricate(tmp_path / name, real_run, **options)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, real_run: Path) -> Path:
    """One finished run with warning signs, for tests that do not change it."""
    return fabricate(tmp_path_factory.mktemp("finished") / "run", real_run, dead=3)
