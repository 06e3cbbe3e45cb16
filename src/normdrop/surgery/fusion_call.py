"""The call that stands in fused code."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

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
        if activation == "relu":
            y = torch.relu(y)
        elif activation is not None:
            y = torch.nn.functional.leaky_relu(y)
    return y if dropout is None else cast(Tensor, type(dropout).forward(dropout, y))
