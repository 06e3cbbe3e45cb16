"""The activations that batch normalization takes, by name: one table for all rooms."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["ACTIVATIONS", "Activation", "activation_of", "leaky_relu_of", "slope_of"]


class Activation(NamedTuple):
    """An activation as a layer's ``activation=`` names it."""

    apply: Callable[[Tensor], Tensor]
    slope: float | None
    """Left of zero, where the activation is linear there and the identity beyond: the kernels'."""


_LEAKY = "leaky_relu("
_DEFAULT_SLOPE = 0.01  # torch's

ACTIVATIONS = ("relu", "leaky_relu", "leaky_relu(SLOPE)", "silu")
"""What ``activation=`` takes; leaky ReLU has torch's default slope, 0.01, unless it names one."""

_TABLE: dict[str | None, Activation] = {
    None: Activation(lambda y: y, 1.0),
    "relu": Activation(torch.relu, 0.0),
    "leaky_relu": Activation(torch.nn.functional.leaky_relu, _DEFAULT_SLOPE),
    "silu": Activation(torch.nn.functional.silu, None),
}


def _leaky_relu(name: str) -> Activation | None:
    if not (name.startswith(_LEAKY) and name.endswith(")")):
        return None
    try:
        slope = float(name[len(_LEAKY) : -1])
    except ValueError:
        return None
    if not -float("inf") < slope < float("inf"):
        return None
    return Activation(partial(torch.nn.functional.leaky_relu, negative_slope=slope), slope)


def _find(name: str | None) -> Activation | None:
    return _TABLE.get(name) or (_leaky_relu(name) if isinstance(name, str) else None)


def activation_of(name: str | None) -> Activation:
    """The activation of that name; None is the identity.

    Raises:
        ValueError: there is none.

    Example:
        >>> activation_of("relu").apply(torch.tensor([-1.0, 2.0]))
        tensor([0., 2.])
    """
    found = _find(name)
    if found is None:
        raise ValueError(
            f"batch_norm: activation must be None or one of {', '.join(ACTIVATIONS)}, got {name!r}"
        )
    return found


def slope_of(name: str | None) -> float | None:
    """The slope left of zero of an activation of the kernels; None for any other name.

    Example:
        >>> slope_of("leaky_relu"), slope_of("leaky_relu(0.2)"), slope_of("relu"), slope_of(None)
        (0.01, 0.2, 0.0, 1.0)
        >>> slope_of("silu") is slope_of("gelu") is None
        True
    """
    found = _find(name)
    return None if found is None else found.slope


def leaky_relu_of(slope: object) -> str | None:
    """The name of leaky ReLU with that slope; None for what is no number.

    Example:
        >>> leaky_relu_of(0.01), leaky_relu_of(0.2)
        ('leaky_relu', 'leaky_relu(0.2)')
        >>> slope_of(leaky_relu_of(1 / 3)) == 1 / 3
        True
    """
    if type(slope) not in (int, float):
        return None
    return "leaky_relu" if slope == _DEFAULT_SLOPE else f"{_LEAKY}{slope!r})"
