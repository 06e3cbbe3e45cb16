r"""The 3×3 convolution with stride 1 and padding 1, by Winograd's F(4×4, 3×3) in float32.

.. math:: y_{nkij} = b_k + \sum_{c,r,s} w_{kcrs} \, x_{n,\,c,\,i+r-1,\,j+s-1}

with x (N, C, H, W), w (K, C, 3, 3), b (K) and y (N, K, H, W), all with their channels last in
memory. Sixteen outputs take 36 multiplications a pair of channels instead of 144; the matrices,
and what the other order of the additions does to the rounding, are in docs/convolution.md.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from normdrop.ops import context, has_kernels, instruction_set, paths

__all__ = ["HAS_CONV2D", "LEAST_CHANNELS", "conv2d"]

HAS_CONV2D = instruction_set() not in (None, "baseline")
"""Whether there are kernels for this processor."""

LEAST_CHANNELS = 8
"""Of x and of y; with fewer, the transforms cost more than the products save."""

_LEAST_TILES = 8
"""With fewer, transforming w is most of the work."""


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """torch.nn.functional.conv2d with padding 1; by the kernels where they are faster."""
    reason = _reason_for_torch(x, weight, bias)
    paths.tell("kernel", reason)
    if reason is not None:
        return F.conv2d(x, weight, bias, padding=1)
    if torch.is_grad_enabled() and not context.is_compiled():
        return cast(Tensor, cast(Any, _Conv2d).apply(x, weight, bias))
    return cast(Tensor, torch.ops.normdrop.conv2d.default(x, weight, bias))


def _reason_for_torch(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Why torch computes this; what is wrong, or unusual, is left to it."""
    if not HAS_CONV2D:
        return "there are no kernels for this processor"
    for tensor in (x, weight, bias):
        if tensor is not None and (
            tensor.dtype is not torch.float32 or tensor.device.type != "cpu"
        ):
            return "a tensor is not float32 on the CPU"
    if reason := _reason_of_context(x, weight, bias):
        return reason
    if x.dim() != 4 or weight.shape[1:] != (x.shape[1], 3, 3):
        return "the input does not fit the weight"
    n, channels, height, width = x.shape
    filters = weight.shape[0]
    if bias is not None and bias.shape != (filters,):
        return "the bias does not fit the weight"
    if min(channels, filters) < LEAST_CHANNELS:
        return "there are few channels"
    tiles = ((height + 3) // 4) * ((width + 3) // 4)
    if n * tiles < _LEAST_TILES:
        return "the input is small"
    if height * width < 8 * tiles:
        return "tiles of 4 × 4 would be less than half full"
    if not (_has_channels_last(weight) or _has_channels_last(x)):  # as torch chooses y's layout
        return "neither weight nor input has its channels last"
    return None


def _reason_of_context(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    if not torch.backends.mkldnn.enabled:
        return "torch is set to do without oneDNN"
    if context.is_compiled() and not context.is_exported() and not context.is_transformed():
        return None
    if not context.is_plain(x, weight, bias):
        return "a tensor is not plain, or is traced or transformed"
    precision: str = torch.backends.mkldnn.conv.fp32_precision  # type: ignore[attr-defined]
    return None if precision in ("none", "ieee") else "torch is set to another precision"


def _has_channels_last(t: Tensor) -> bool:
    return t.is_contiguous(memory_format=torch.channels_last)


class _Conv2d(torch.autograd.Function):
    """The derivative in eager mode; one registered with torch.library takes five times as long."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return cast(Tensor, torch.ops.normdrop.conv2d.default(x, weight, bias))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, grad)


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    shape = (x.shape[0], weight.shape[0], *x.shape[2:])
    return x.new_empty(shape).contiguous(memory_format=torch.channels_last)


def _fake_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    def like(t: Tensor, is_needed: bool) -> Tensor:
        return (
            torch.empty_like(t, memory_format=torch.channels_last) if is_needed else t.new_empty(0)
        )

    return like(x, need_x), like(weight, need_weight)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad
    # With create_graph torch's, which can be differentiated in turn.
    if torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(grad):
        return _backward_by_torch(grad, x, weight, ctx.needs_input_grad)
    grad_x = grad_weight = None
    if need_x or need_weight:
        grad_x, grad_weight = torch.ops.normdrop.conv2d_backward.default(
            grad, x, weight, need_x, need_weight
        )
    return (
        grad_x if need_x else None,
        grad_weight if need_weight else None,
        grad.sum((0, 2, 3)) if need_bias else None,
    )


def _backward_by_torch(
    grad: Tensor, x: Tensor, weight: Tensor, needed: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    ones, filters = [1, 1], [weight.shape[0]]
    backward = torch.ops.aten.convolution_backward.default
    grads = backward(grad, x, weight, filters, ones, ones, ones, False, [0, 0], 1, list(needed))
    return cast(tuple[Tensor | None, ...], grads)


if has_kernels():
    torch.library.register_fake("normdrop::conv2d", _fake)
    torch.library.register_fake("normdrop::conv2d_backward", _fake_backward)
    torch.library.register_autograd("normdrop::conv2d", _backward, setup_context=_setup_context)
