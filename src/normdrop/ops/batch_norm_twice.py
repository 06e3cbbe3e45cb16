"""The backward of batch normalization's backward, through the reference."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from normdrop.ops import reference
from normdrop.ops.random import keep_mask

__all__ = ["backward", "setup_context", "unpack_bits"]


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    grad_y, x, mean, var, weight, bias, positive, training, eps, slope = inputs[:10]
    seed, *drop = inputs[13:]
    ctx.save_for_backward(grad_y, x, mean, var, weight, bias, positive, seed)
    ctx.training, ctx.eps, ctx.slope, ctx.drop = training, eps, slope, drop
    ctx.set_materialize_grads(False)


def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    mean, var, positive, seed = saved[2], saved[3], saved[6], saved[7]
    with torch.enable_grad():
        grad_y, x = _differentiable(saved[0]), _differentiable(saved[1])
        weight, bias = (None if t is None else _differentiable(t) for t in saved[4:6])
        if ctx.training:
            mean, var = reference.batch_statistics(x)
        wide = torch.promote_types(x.dtype, torch.float32)
        y = reference.batch_norm(x, mean.to(wide), var.to(wide), weight, bias, ctx.eps)
        g = grad_y
        if seed is not None:
            threshold, scale, sample_offset = ctx.drop
            mask = keep_mask(tuple(x.shape), threshold, seed, sample_offset)
            g = reference.dropout(g, mask, scale)
        if ctx.slope != 1.0:
            is_positive = unpack_bits(positive, x) if positive.numel() else ~(y <= 0)
            g = torch.where(is_positive, g, ctx.slope * g)
        vectors = [t for t in (weight, bias) if t is not None]
        first = iter(torch.autograd.grad(y, [x, *vectors], g, create_graph=True))
        outputs = [next(first)]
        outputs += [g if t is None else next(first) for t in (weight, bias)]
        outputs.append(g)
        # Where there is no weight, or no bias, nothing asked for its gradient.
        there = (True, weight is not None, bias is not None, True)
        pairs = [
            (output, grad)
            for output, grad, is_there in zip(outputs, grads, there, strict=True)
            if is_there and grad is not None and grad.numel()
        ]
    if not pairs:
        return (None,) * 17
    second = iter(
        torch.autograd.grad(
            [output for output, _ in pairs],
            [grad_y, x, *vectors],
            [grad for _, grad in pairs],
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
        )
    )
    gg_y, gg_x = next(second), next(second)
    gg_weight, gg_bias = (None if t is None else next(second) for t in (weight, bias))
    return (gg_y, gg_x, None, None, gg_weight, gg_bias, *(None,) * 11)


def _differentiable(t: Tensor) -> Tensor:
    """A view of t, so that third derivatives find their way to it, or a leaf."""
    return t.view_as(t) if t.requires_grad else t.detach().requires_grad_()


def unpack_bits(positive: Tensor, x: Tensor) -> Tensor:
    """The kernel's bits as a bool tensor of x's shape; see `positive` in csrc/library.cpp.

    They are in the order of memory. Where other elements of a channel lie beside an element, each
    such row begins with a byte of its own.
    """
    strides = torch.empty_like(x, device="meta").stride()  # of what the kernel reads: dense
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=x.device)
    bits = (positive.unsqueeze(1) & weights).ne(0).flatten()
    row = _elements_beside(x.shape, strides)
    if row > 1:
        rows = x.numel() // row
        bits = bits[: rows * ((row + 7) // 8 * 8)].view(rows, -1)[:, :row].flatten()
    return bits.as_strided(x.shape, strides)


def _elements_beside(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """How many elements of a channel lie side by side: `inner` of csrc/base/layout.h."""
    return math.prod(
        size
        for d, size in enumerate(shape)
        if d != 1 and (shape[1] == 1 or strides[d] < strides[1])
    )
