"""A linear layer with the faster library's products."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from normdrop.nn.tracing import call_as_leaf
from normdrop.ops import context
from normdrop.ops.linear import linear

__all__ = ["Linear"]


class Linear(torch.nn.Linear):
    r"""torch.nn.Linear, whose large products are oneDNN's on AMD processors with AVX-512.

    .. math:: y = W x + b

    Training and evaluation in float32 without autocast gain; everything else, other processors
    included, is torch's own code. Numbers agree to float32 rounding.

    Args:
        See :class:`torch.nn.Linear`.

    Shape:
        (…, in_features) to (…, out_features).

    Example:
        >>> Linear(256, 512)(torch.randn(64, 256)).shape
        torch.Size([64, 512])
    """

    def forward(self, input: Tensor) -> Tensor:
        if context.is_traced(input):
            return cast(Tensor, call_as_leaf(self, input))
        return linear(input, self.weight, self.bias)
