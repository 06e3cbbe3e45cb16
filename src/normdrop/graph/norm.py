"""The call that stands in the fused code of a converted model."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from normdrop import nn
from normdrop.ops.activations import activation_of

__all__ = ["add", "batch_norm"]


def batch_norm(
    norm: Any,
    x: Tensor,
    residual: Tensor | None,
    activation: str | None,
    into: str | None,
    dropout: Any = None,
) -> Tensor:
    """y = dropout(activation(BN(x) + residual)), with the modules' flags as they are now.

    A residual that is not of x's shape and type is added as the model's own code does, ``into`` the
    "output", the "residual" or nothing.
    """
    if residual is None or (
        isinstance(residual, Tensor)
        and residual.shape == x.shape
        and residual.dtype is x.dtype
        and residual.layout is x.layout
        and residual.device == x.device
    ):
        keep = _keep_in_operator(norm, x, dropout)
        y = norm.normalize(x, residual, activation, keep)
        if keep < 1.0:
            return cast(Tensor, y)
    else:
        y = add(norm.normalize(x, None, None), residual, into)
        y = activation_of(activation).apply(y)
    return y if dropout is None else cast(Tensor, type(dropout).forward(dropout, y))


def add(y: Tensor, residual: Any, into: str | None) -> Tensor:
    """Add as an operator in place does that writes to the output, the residual or nothing."""
    if into is None:
        return cast(Tensor, y + residual)
    return y.add_(residual) if into == "output" else cast(Tensor, residual.add_(y))


def _keep_in_operator(norm: Any, x: Tensor, dropout: Any) -> float:
    """What batch normalization's own operator is to keep; 1 leaves dropout to its module.

    Both must be in training, and the factor must be applied there. Off the CPU a mask comes from
    that device's generator, which the operator does not ask.
    """
    is_part = (
        type(dropout) is nn.Dropout
        and dropout.training
        and norm.training
        and dropout.scaling == "train"
        and 0.0 < dropout.p < 1.0
        and x.is_cpu
    )
    return 1.0 - dropout.p if is_part else 1.0
