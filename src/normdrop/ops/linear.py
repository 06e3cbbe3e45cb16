r"""A linear layer's three products by oneDNN, where the library that torch takes is slow.

.. math:: Y = X W^T + b, \qquad \nabla X = \nabla Y \, W, \qquad \nabla W = \nabla Y^T X

with X (N, in), W (out, in), Y (N, out). Torch hands float32 products to MKL, which on AMD's
processors does without AVX-512; oneDNN uses it, at about twice the speed.
"""

from __future__ import annotations

import platform
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from normdrop.ops import context, paths

__all__ = ["linear", "prefers_onednn"]

_LEAST = 1 << 22
"""Multiply-adds from which the product counts more than the call."""

_LEAST_ROWS = 8
"""With fewer, reading W is all there is to do, and both libraries are as fast."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """torch.nn.functional.linear, by oneDNN for large float32 products on the processors above."""
    reason = _reason_for_torch(x, weight, bias)
    paths.tell("oneDNN", reason)
    if reason is not None:
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return cast(Tensor, cast(Any, _Linear).apply(x, weight, bias))
    return _product(x, weight, bias)


@lru_cache(maxsize=1)
def prefers_onednn() -> bool:
    """Whether this processor's products are faster in oneDNN: AMD's with AVX-512."""
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and "AVX512" in torch.backends.cpu.get_cpu_capability()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and "AuthenticAMD" in _vendor()
    )


def _vendor() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")[:4096]
    except OSError:
        return platform.processor()


def _reason_for_torch(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Why torch computes this; what is wrong, or unusual, is left to it."""
    if context.is_compiled():  # first: the compiler cannot trace what follows
        return "the compiler chooses"
    if not prefers_onednn():
        return "oneDNN is no faster on this processor"
    if not context.is_plain(x, weight, bias):
        return "a tensor is not plain, or is compiled, traced or transformed"
    for tensor in (x, weight, bias):
        if tensor is not None and (tensor.dtype is not torch.float32 or not tensor.is_cpu):
            return "a tensor is not float32 on the CPU"
    if x.dim() < 2 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        return "the input is one row, or does not fit the weight"
    if bias is not None and bias.shape != weight.shape[:1]:
        return "the bias does not fit the weight"
    if x.numel() < _LEAST_ROWS * weight.shape[1] or x.numel() * weight.shape[0] < _LEAST:
        return "the product is small"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    if torch.get_float32_matmul_precision() != "highest" or not torch.backends.mkldnn.enabled:
        return "torch is set to another precision, or to do without oneDNN"
    return None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """X Wᵀ + b."""
    product = torch.ops.mkldnn._linear_pointwise.default
    return cast(Tensor, product(x, weight, bias, "none", [], ""))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        # With create_graph the products are differentiated in turn, which oneDNN's are not.
        is_plain = torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(grad)
        if not is_plain:
            grad = grad.contiguous()
        rows, samples = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        grad_x = grad_weight = None
        if need_x:
            grad_x = grad @ weight if is_plain else _product(grad, weight.t())
        if need_weight:
            grad_weight = rows.t() @ samples if is_plain else _product(rows.t(), samples.t())
        return grad_x, grad_weight, rows.sum(0) if need_bias else None
