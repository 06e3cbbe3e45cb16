"""A convolution of images that goes around a fault of the library for one kind of layer."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from normdrop.nn.tracing import call_as_leaf
from normdrop.ops import context
from normdrop.ops.shortcut import padded_part

__all__ = ["Conv2d", "is_strided_point"]


def is_strided_point(layer: torch.nn.Conv2d) -> bool:
    """Whether a layer reads one pixel in several and nothing around it: 1×1, strided, no padding.

    Example:
        >>> is_strided_point(torch.nn.Conv2d(4, 8, 1, stride=2))
        True
    """
    return (
        tuple(layer.kernel_size) == (1, 1)
        and tuple(layer.stride) != (1, 1)
        and layer.padding in ("valid", "same", (0, 0))
    )


class Conv2d(torch.nn.Conv2d):
    r"""torch.nn.Conv2d, where a strided 1×1 layer is a slice and a layer of stride 1.

    .. math:: y_{n k i j} = b_k + \sum_c W_{k c} x_{n, c, s i, s j}

    With channels last in memory and fewer than 8 input channels (a group), oneDNN's gradient of
    such a layer's weight writes beyond its buffer on AVX2: wrong numbers, or the end of the
    process. The slice has the same result. All other layers are torch's own code.

    Args:
        See :class:`torch.nn.Conv2d`.

    Shape:
        As :class:`torch.nn.Conv2d`.

    Example:
        >>> Conv2d(4, 8, 1, stride=2)(torch.randn(1, 4, 7, 6)).shape
        torch.Size([1, 8, 4, 3])

    Reference:
        https://github.com/uxlfoundation/oneDNN/issues/6035
    """

    def forward(self, input: Tensor) -> Tensor:
        if context.is_traced(input):
            return cast(Tensor, call_as_leaf(self, input))
        return self._conv_forward(input, self.weight, self.bias)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not is_strided_point(self) or input.dim() not in (3, 4):
            return cast(Tensor, torch.nn.Conv2d._conv_forward(self, input, weight, bias))
        sides = (slice(None, None, step) for step in self.stride)
        part = padded_part(input, (slice(None),) * (input.dim() - 2) + tuple(sides), ())
        return torch.nn.functional.conv2d(part, weight, bias, groups=self.groups)
