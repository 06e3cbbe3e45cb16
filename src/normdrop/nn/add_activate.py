"""What stands where a batch normalization was folded into the layer before it."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from normdrop.nn.tracing import call_as_leaf
from normdrop.ops import context
from normdrop.ops.activations import activation_of

__all__ = ["AddActivate"]


class AddActivate(torch.nn.Module):
    r"""Stand where a batch normalization was folded into the layer before it.

    .. math:: y = f(x + r)

    with x, r and y of one shape and f the activation that the batch normalization had.

    Args:
        activation: its name, or None.
        dims: number of dimensions that x must have, or None for any.

    Raises:
        ValueError: x has another number of dimensions. Of (N, L, C) BatchNorm1d normalizes L,
            while the layer before it has its channels in C.

    Example:
        >>> AddActivate("relu")(torch.tensor([-1.0, 1.0]), torch.tensor([0.5, 0.5]))
        tensor([0.0000, 1.5000])
    """

    def __init__(self, activation: str | None = None, dims: int | None = None) -> None:
        super().__init__()
        self.activation = activation
        self.dims = dims

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if context.is_traced(input):
            others = () if residual is None else (residual,)
            return cast(Tensor, call_as_leaf(self, input, *others))
        if self.dims is not None and input.dim() != self.dims:
            raise ValueError(
                f"fold: expected {self.dims} dimensions where a batch normalization was folded "
                f"away, got {tuple(input.shape)}; for such inputs it cannot be folded"
            )
        y = input if residual is None else input + residual
        return activation_of(self.activation).apply(y)

    def extra_repr(self) -> str:
        return "" if self.activation is None else f"activation={self.activation!r}"
