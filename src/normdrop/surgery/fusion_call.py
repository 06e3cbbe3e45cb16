"""The call that stands in fused code."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from normdrop.ops import reference

__all__ = ["batch_norm"]


def batch_norm(
    norm: Any,
    x: Tensor,
    residual: Tensor | None,
    activation: str | None,
    dropout: Any,
    writes: bool = False,
) -> Tensor:
    """y = dropout(activation(BN(x) + residual)), with the modules' flags as they are now.

    A residual that is not of x's shape and type is added as the model's own code does; ``writes``
    says that it does so in place.
    """
    if residual is None or (
        isinstance(residual, Tensor)
        and residual.shape == x.shape
        and residual.dtype is x.dtype
        and residual.layout is x.layout
        and residual.device == x.device
    ):
        y = norm.normalize(x, residual, activation)
    else:
        y = norm.normalize(x, None, None)
        y = y.add_(residual) if writes else y + residual
        y = reference.activate(y, activation)
    return y if dropout is None else cast(Tensor, type(dropout).forward(dropout, y))
