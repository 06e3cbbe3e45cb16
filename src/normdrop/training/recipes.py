"""The recipe of each network family and data set: what an option means that nobody gave.

A value comes from the first of: the user, the data set's own recipe (for its own default network),
the network family's, the common one.
"""

from __future__ import annotations

import re
from dataclasses import fields, replace
from typing import Any

from normdrop.training.options import Options

__all__ = ["COMMON", "DATA", "FAMILY", "resolve"]

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
    "resnet": {"learning_rate": 0.2},
    "wide_resnet": {"keep_hidden": 0.7},
    "vgg": {"learning_rate": 0.05, "keep_hidden": 0.5},
    "mlp": {"learning_rate": 0.05, "weight_decay": 1e-4, "keep_hidden": 0.5},
}

# The recipe for a data set's own default network.
DATA: dict[str, dict[str, Any]] = {
    "digits": {
        "model": "resnet8",
        "augment": "shift",
        "epochs": 30,
        "batch_size": 64,
        "keep_hidden": 0.9,
    },
    "fashion-mnist": {"model": "resnet20", "epochs": 12},
    "image": {"model": "resnet20"},
    "table": {"model": "mlp"},
}


def resolve(options: Options, *, name: str, kind: str) -> Options:
    """Fill in every option that nobody gave.

    Args:
        options: what the user chose.
        name: the data set's name, ``"digits"`` for example.
        kind: ``"image"`` or ``"table"``.

    Example:
        >>> from normdrop.training.options import Options
        >>> resolve(Options(), name="digits", kind="image").recipe.momentum
        0.9
    """
    own = DATA.get(name, DATA[kind])
    model = options.network.model or own["model"]
    family = "_".join(re.findall(r"[a-z]+", model.removesuffix("_bn")))
    recipe = COMMON | FAMILY.get(family, {}) | (own if model == own["model"] else {})
    recipe["model"] = model
    filled: list[Any] = []
    for group in (options.data, options.network, options.recipe, options.run):
        missing = {
            item.name: recipe[item.name]
            for item in fields(group)
            if getattr(group, item.name) is None and item.name in recipe
        }
        filled.append(replace(group, **missing))
    return Options(*filled)
