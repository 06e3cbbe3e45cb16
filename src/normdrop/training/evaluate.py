"""Tests of a trained network: at the end of a run, and whenever asked again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normdrop import data
from normdrop.data.table import labels_in
from normdrop.errors import UserError
from normdrop.runs.data import check_same_data, load_data
from normdrop.runs.folder import command_to_repeat
from normdrop.runs.read import read_options
from normdrop.runs.weights import load_network
from normdrop.runs.write import write_end
from normdrop.training.measure import (
    check_flip,
    count_parameters,
    machine,
    measure,
    predict_batches,
)

__all__ = ["conclusion", "evaluate", "finish"]

MISTAKES = 24
BATCH = 256


def evaluate(
    run: Path, *, source: str | None = None, split: str = "test", flip: bool | None = None
) -> dict[str, Any]:
    """Test a finished run's network.

    Args:
        run: the run folder.
        source: other data with the run's classes: a folder of images by class, a table with the
            run's target column, or the name of a data set. None for the run's own data.
        split: which split of the data: test, val or train.
        flip: average over each image and its mirror image; None for what the run does.

    Returns:
        What :func:`normdrop.training.measure.measure` gives, with the split, the data's name, and
        whether mirror images were averaged.

    Raises:
        UserError: the run or the data cannot be used.
    """
    network, record = load_network(run)
    classes = record["network"]["classes"]
    batches: Iterable[tuple[Tensor, Tensor]]
    if source is None:
        datamodule = load_data(read_options(run))
        datamodule.setup()
        check_same_data(run, datamodule)
        name, batches = datamodule.name, datamodule.in_order(split)
    elif Path(source).exists():
        name, batches = source, _labelled(Path(source), record["data"], classes)
    else:
        datamodule = data.load(source)
        datamodule.setup()
        _check_same_kind(datamodule, record)
        name, batches = datamodule.name, datamodule.in_order(split)
    flip = read_options(run).recipe.flip_test if flip is None else flip
    if flip:
        check_flip(record["data"]["kind"])
    probabilities, labels = predict_batches(network, batches, flip=flip)
    start = {"data": name, "split": split, "flip_test": flip}
    return start | measure(probabilities, labels, classes)


def finish(
    folder: Path,
    network: torch.nn.Module,
    datamodule: data.DataModule,
    end: Mapping[str, Any],
    *,
    flip: bool = False,
) -> None:
    """Test the weights once, and write them and what the test says.

    Args:
        folder: the run's.
        network: with the weights of the best epoch.
        datamodule: the run's.
        end: epochs, best_epoch, diverged and train_seconds.
        flip: average over each image and its mirror image.
    """
    probabilities, labels = predict_batches(network, datamodule.test_dataloader(), flip=flip)
    worst = _worst_mistakes(probabilities, labels)
    evaluation = {"probabilities": probabilities, "labels": labels, "mistakes": worst}
    if datamodule.kind == "image" and len(worst):
        pictures = np.stack(datamodule.pictures("test", worst.tolist()))
        evaluation["mistake_pictures"] = torch.from_numpy(pictures)
    tested = {"split": "test", "flip_test": flip}
    tested |= measure(probabilities, labels, datamodule.classes)
    write_end(
        folder,
        weights=network.state_dict(),
        evaluation=evaluation,
        mistake_names=datamodule.names("test", worst.tolist()),
        result=tested | conclusion(folder, network, end),
    )


def conclusion(folder: Path, network: torch.nn.Module, end: Mapping[str, Any]) -> dict[str, Any]:
    """What result.json says beside the test, which a run that diverged at once has not."""
    return {
        **end,
        "parameters": count_parameters(network),
        "machine": machine(),
        "command": command_to_repeat(folder),
    }


def _worst_mistakes(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Positions of the samples that were classified wrong, the most confident first."""
    wrong = (probabilities.argmax(1) != labels).nonzero().flatten()
    confidence = probabilities[wrong].max(1).values
    return wrong[confidence.argsort(descending=True, stable=True)][:MISTAKES]


def _check_same_kind(datamodule: data.DataModule, record: dict[str, Any]) -> None:
    then = record["network"]
    if list(datamodule.classes) != then["classes"]:
        raise UserError(
            f"Expected data with the run's classes ({_list(then['classes'])}), but "
            f"{datamodule.name} has {_list(datamodule.classes)}"
        )
    if list(datamodule.input_shape) != then["input_shape"]:
        raise UserError(
            f"Expected data of shape {tuple(then['input_shape'])}, but {datamodule.name} has "
            f"{tuple(datamodule.input_shape)}"
        )


def _labelled(
    path: Path, state: dict[str, Any], classes: list[str]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of new files with their labels, encoded as the run's own data."""
    places = {name: place for place, name in enumerate(classes)}
    encoder = data.encoder(state)
    if state["kind"] == "table":
        names = labels_in(path, state["target"], classes)
        inputs = torch.stack([x for _, x in encoder.read([path])])
    else:
        pairs = [(x, folder.name) for folder in _folders(path) for _, x in encoder.read([folder])]
        inputs, names = torch.stack([x for x, _ in pairs]), [name for _, name in pairs]
    if unknown := sorted(set(names) - set(classes)):
        raise UserError(
            f"{path} has the label {unknown[0]!r}, which training never saw; "
            f"expected labels among {_list(classes)}"
        )
    labels = torch.tensor([places[name] for name in names])
    return zip(inputs.split(BATCH), labels.split(BATCH), strict=True)


def _folders(path: Path) -> list[Path]:
    if not path.is_dir():
        raise UserError(f"Expected a folder of images by class, but {path} is a file")
    inner = path / "test"
    folders = sorted(
        item for item in (inner if inner.is_dir() else path).iterdir() if item.is_dir()
    )
    if not folders:
        raise UserError(f"Expected {path} to hold a folder for each class, but it holds none")
    return folders


def _list(names: Any, most: int = 8) -> str:
    shown = [str(name) for name in list(names)[:most]]
    return ", ".join([*shown, "…"] if len(names) > most else shown)
