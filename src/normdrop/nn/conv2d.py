"""A convolution of images: by our kernels where they are faster, around a fault of the library."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from normdrop.nn.tracing import call_as_leaf
from normdrop.ops import context
from normdrop.ops.conv2d import LEAST_CHANNELS, conv2d
from normdrop.ops.shortcut import padded_part

__all__ = ["Conv2d", "is_strided_point", "reason_against_kernels"]


def reason_against_kernels(layer: torch.nn.Conv2d) -> str | None:
    """Why a layer of this geometry is not for :mod:`normdrop.ops.conv2d`, or None.

    Example:
        >>> reason_against_kernels(torch.nn.Conv2d(16, 16, 3, stride=2, padding=1))
        'its stride is (2, 2)'
    """
    if tuple(layer.kernel_size) != (3, 3):
        return f"its kernel is {tuple(layer.kernel_size)}"
    if tuple(layer.stride) != (1, 1):
        return f"its stride is {tuple(layer.stride)}"
    if tuple(layer.dilation) != (1, 1):
        return f"its dilation is {tuple(layer.dilation)}"
    if layer.groups != 1:
        return f"it has {layer.groups} groups"
    if layer.padding not in ((1, 1), "same"):
        return f"its padding is {layer.padding}"
    if layer.padding_mode != "zeros":
        return f"it pads with {layer.padding_mode}"
    if min(layer.in_channels, layer.out_channels) < LEAST_CHANNELS:
        return f"it has fewer than {LEAST_CHANNELS} channels"
    return None


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
    r"""torch.nn.Conv2d, by Winograd's algorithm where a layer is 3×3 with stride 1 and padding 1.

    .. math:: y_{n k i j} = b_k + \sum_{c, r, s} W_{k c r s} x_{n, c, i + r - 1, j + s - 1}

    In float32 with the channels last in memory, on processors with AVX2, training and evaluation
    take less than half the time. Numbers agree to float32 rounding: docs/convolution.md has the
    figures, and the rule that decides.

    A strided 1×1 layer is a slice and a layer of stride 1:

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
        A. Lavin, S. Gray: Fast Algorithms for Convolutional Neural Networks, CVPR 2016.
        B. Barabasz et al.: Error Analysis and Improving the Accuracy of Winograd Convolution for
        Deep Neural Networks, ACM TOMS 2020: the points.
        https://github.com/uxlfoundation/oneDNN/issues/6035
    """

    def forward(self, input: Tensor) -> Tensor:
        if context.is_traced(input):
            return cast(Tensor, call_as_leaf(self, input))
        if reason_against_kernels(self) is None:
            return conv2d(input, self.weight, self.bias)
        return self._conv_forward(input, self.weight, self.bias)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not is_strided_point(self) or input.dim() not in (3, 4):
            return cast(Tensor, torch.nn.Conv2d._conv_forward(self, input, weight, bias))
        sides = (slice(None, None, step) for step in self.stride)
        part = padded_part(input, (slice(None),) * (input.dim() - 2) + tuple(sides), ())
        return torch.nn.functional.conv2d(part, weight, bias, groups=self.groups)
