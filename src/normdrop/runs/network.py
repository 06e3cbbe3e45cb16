"""The network of a run, by its options or by what run.json says of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from normdrop import networks
from normdrop.runs.options import Options

__all__ = ["build_network", "network_record"]


def network_record(
    options: Options, *, input_shape: Sequence[int], classes: Sequence[str]
) -> dict[str, Any]:
    """What run.json says of the network, from a run's options and the shape of its data."""
    chosen = asdict(options.network)
    model = chosen.pop("model")
    if "layout" in networks.options(model):
        chosen["layout"] = "channels_last" if options.recipe.channels_last else "keep"
        chosen["convolution"] = options.recipe.convolution
    return {
        "name": model,
        "options": {name: value for name, value in chosen.items() if value is not None},
        "input_shape": list(input_shape),
        "classes": list(classes),
    }


def build_network(record: dict[str, Any], **changes: Any) -> torch.nn.Module:
    """The network that run.json describes, with new weights.

    Args:
        record: as :func:`network_record` gives it.
        changes: options to build it with instead of its own.
    """
    return networks.build(
        record["name"],
        classes=len(record["classes"]),
        input_shape=tuple(record["input_shape"]),
        **{**record["options"], **changes},
    )
