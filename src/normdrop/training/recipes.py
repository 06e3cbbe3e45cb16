"""The recipe of each network family and data set: what an option means that nobody gave.

A value comes from the first of: the user, the data set's own recipe (for its own default network),
the network family's, the common one. Without norm the recipes leave out the input's, too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from normdrop.runs.options import DataOptions, Options

__all__ = ["COMMON", "DATA", "FAMILY", "in_words", "resolve", "resolve_data"]

COMMON: dict[str, Any] = {
    "epochs": 30,
    "batch_size": 128,
    "learning_rate": 0.1,
    "warmup": 0.1,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "label_smoothing": 0.1,
    "average": 0.0,
    "channels_last": True,
    "input_norm": True,
    "keep_input": 1.0,
    "keep_hidden": 1.0,
}

FAMILY: dict[str, dict[str, Any]] = {
    "wide_resnet": {"keep_hidden": 0.7},
    "vgg": {"learning_rate": 0.05, "keep_hidden": 0.5},
    "mlp": {
        "learning_rate": 0.05,
        "weight_decay": 1e-4,
        "keep_hidden": 0.5,
        "channels_last": False,
    },
}

# The recipe for the default network of a data set, or of a kind of data.
DATA: dict[str, dict[str, Any]] = {
    "digits": {
        "model": "resnet8",
        "epochs": 30,
        "batch_size": 64,
        "learning_rate": 0.2,
        "label_smoothing": 0.02,
        "keep_hidden": 0.9,
        # Steps of 20 ms: a second thread gains little, and costs much where the cores are busy.
        "threads": 1,
    },
    "fashion-mnist": {
        "model": "resnet8",
        "width": 32,
        "stem_stride": 2,
        "augment": "shift,flip",
        "epochs": 26,
        "keep_hidden": 0.9,
    },
    "images up to 64 pixels": {"model": "resnet8", "width": 32, "stem_stride": 2},
    "larger images": {"model": "resnet18", "width": 32, "batch_size": 64},
    "tables": {"model": "mlp", "epochs": 60, "batch_size": 64, "keep_hidden": 0.8},
}


def resolve_data(chosen: DataOptions, *, name: str) -> DataOptions:
    """Fill in the options of the data that nobody gave, before they are read."""
    return replace(chosen, augment=chosen.augment or DATA.get(name, {}).get("augment"))


def resolve(options: Options, *, name: str, input_shape: Sequence[int]) -> Options:
    """Fill in every option that nobody gave.

    Args:
        options: what the user chose.
        name: the data set's name, ``"digits"`` for example.
        input_shape: (C, H, W) of its images, or (features,) of a table.

    Example:
        >>> from normdrop.runs.options import Options
        >>> resolve(Options(), name="digits", input_shape=(1, 8, 8)).recipe.batch_size
        64
    """
    if len(input_shape) == 3:
        kind = "images up to 64 pixels" if min(input_shape[1:]) <= 64 else "larger images"
    else:
        kind = "tables"
    own = DATA.get(name, DATA[kind])
    model = options.network.model or own["model"]
    family = "_".join(re.findall(r"[a-z]+", model.removesuffix("_bn")))
    recipe = COMMON | FAMILY.get(family, {}) | (own if model == own["model"] else {})
    recipe["model"] = model
    recipe["input_norm"] = recipe["input_norm"] and options.network.norm
    filled: list[Any] = [options.data]
    for group in (options.network, options.recipe, options.run):
        missing = {
            item.name: recipe[item.name]
            for item in fields(group)
            if getattr(group, item.name) is None and item.name in recipe
        }
        filled.append(replace(group, **missing))
    return Options(*filled)


def in_words() -> str:
    """The recipes, for the help of ``normdrop train``."""

    def listed(values: dict[str, Any]) -> str:
        return ", ".join(
            f"{key.replace('_', '-')} {_plain(value)}" for key, value in values.items()
        )

    width = max(map(len, [*DATA, *FAMILY]))
    lines = [
        "Defaults, chosen for two cores without a GPU; a data set's hold for the model it names:"
    ]
    lines += [f"  {name:{width}}  {listed(values)}" for name, values in DATA.items()]
    lines += [f"  {name:{width}}  {listed(values)}" for name, values in FAMILY.items()]
    return "\n".join([*lines, f"  {'otherwise':{width}}  {listed(COMMON)}"])


def _plain(value: Any) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else f"{value}"
