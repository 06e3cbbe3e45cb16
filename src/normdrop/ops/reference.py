"""The operators written from their equations in plain PyTorch, for every device and transform.

This file is the specification: the kernels compute the same, and the tests compare with it. It is
also the path that is taken where there is no kernel, under torch.func transforms, and for second
derivatives. Everything here is differentiable by autograd.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from normdrop.ops import context

__all__ = [
    "batch_norm",
    "batch_statistics",
    "conv2d",
    "dropout",
    "keep_mask",
    "keep_mask_of_threshold",
    "keep_threshold",
    "philox",
    "update_running_statistics",
]

ROUNDS = 7
"""Philox4x32 passes BigCrush from 7 rounds on (Salmon et al. 2011, table 2)."""

_LOW32 = 0xFFFFFFFF


def batch_norm(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Normalize with given statistics: y_k = γ_k (x_k − μ_k) / sqrt(σ_k² + ε) + α_k.

    x is (N, C, …); mean, var, weight (γ) and bias (α) are (C,). Computed in the statistics' type,
    given back in x's.
    """
    shape = (1, -1) + (1,) * (x.dim() - 2)
    scale = torch.rsqrt(var + eps)
    y = (x.to(mean.dtype) - mean.view(shape)) * scale.view(shape)
    if weight is not None:
        y = y * weight.to(mean.dtype).view(shape)
    if bias is not None:
        y = y + bias.to(mean.dtype).view(shape)
    return y.to(x.dtype)


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """μ_k and the biased σ_k² of every channel of x (N, C, …), in float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    var, mean = torch.var_mean(wide, dim=[d for d in range(x.dim()) if d != 1], correction=0)
    return mean, var


@torch.no_grad()
def update_running_statistics(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    var: Tensor,
    count: int,
    momentum: float,
) -> None:
    """r ← (1 − m)·r + m·batch, in place, with the unbiased variance σ²·n/(n − 1)."""
    if count == 0:
        return
    unbiased = var * (count / max(count - 1, 1))
    running_mean.copy_((1 - momentum) * running_mean + momentum * mean)
    running_var.copy_((1 - momentum) * running_var + momentum * unbiased)


def _multiply_wide(factor: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of factor · word, both below 2³².

    factor · word − 2³² · word fits into int64, since factor − 2³² is above −2³¹.
    """
    product = word * (factor - 2**32)
    return ((product >> 32) + word) & _LOW32, product & _LOW32


def philox(
    counter: tuple[Tensor | int, Tensor | int, int, int], seed: Tensor, rounds: int = ROUNDS
) -> list[Tensor]:
    """Philox4x32 (Salmon et al. 2011, section 4) in int64 arithmetic.

    Args:
        counter: the four words of the counter, each below 2³², as int64 tensors or integers.
        seed: int64 scalar tensor, the 64-bit key.
        rounds: number of rounds.

    Returns:
        The four output words, int64 tensors below 2³².
    """
    c0, c1, c2, c3 = (
        word if isinstance(word, Tensor) else torch.full((), word, device=seed.device)
        for word in counter
    )
    k0, k1 = seed & _LOW32, (seed >> 32) & _LOW32
    for _ in range(rounds):
        high0, low0 = _multiply_wide(0xD2511F53, c0)
        high1, low1 = _multiply_wide(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _LOW32, (k1 + 0xBB67AE85) & _LOW32
    return [c0, c1, c2, c3]


def keep_threshold(keep: float) -> int:
    """T = round(keep · 2³²); the probability to keep is T / 2³² exactly."""
    return round(keep * 2**32)


def keep_mask(
    shape: tuple[int, ...] | torch.Size,
    keep: float,
    seed: Tensor,
    sample_offset: int = 0,
) -> Tensor:
    """Which elements dropout keeps: True with probability keep, to a resolution of 2⁻³².

    Element i (in row-major order, counted from the first sample of the whole batch) has the 16
    bits r at half-word i mod 8 of Philox block i div 8. It is kept if r is below the upper 16 bits
    of T = round(keep·2³²); where r equals them, 16 bits of a second stream decide against the
    lower ones. So the mask is a pure function of (seed, i): the same for any number of threads,
    memory format, device, or split of the batch.

    Args:
        shape: shape of the mask, (N, …).
        keep: probability to keep, in [0, 1].
        seed: int64 scalar tensor.
        sample_offset: number of samples of the whole batch that lie before this shard's first.

    Example:
        >>> whole = keep_mask((4, 3), 0.5, torch.tensor(1))
        >>> torch.equal(whole[2:], keep_mask((2, 3), 0.5, torch.tensor(1), sample_offset=2))
        True
    """
    return keep_mask_of_threshold(shape, keep_threshold(keep), seed, sample_offset)


def keep_mask_of_threshold(
    shape: tuple[int, ...] | torch.Size, threshold: int, seed: Tensor, sample_offset: int = 0
) -> Tensor:
    """See :func:`keep_mask`; T instead of keep."""
    if threshold in (0, 2**32):
        return torch.full(shape, threshold != 0, dtype=torch.bool, device=seed.device)
    first = sample_offset * math.prod(shape[1:])
    count = math.prod(shape)
    upper, lower = threshold >> 16, threshold & 0xFFFF
    block = torch.arange(first >> 3, (first + count + 7) >> 3, device=seed.device)

    def half_words(stream: int) -> list[Tensor]:
        words = philox((block & _LOW32, (block >> 32) & _LOW32, stream, 0), seed)
        return [half for word in words for half in (word & 0xFFFF, word >> 16)]

    random = half_words(0)
    kept = [r < upper for r in random]
    if lower:
        pairs = zip(random, half_words(1), strict=True)
        decided = [(r == upper) & (e < lower) for r, e in pairs]
        kept = [k | d for k, d in zip(kept, decided, strict=True)]
    mask = torch.stack(kept, dim=-1).flatten()
    return mask[first & 7 : (first & 7) + count].view(shape)


def dropout(x: Tensor, mask: Tensor, scale: float, shift: float = 0.0, fill: float = 0.0) -> Tensor:
    """z = scale · x + shift where the mask keeps, fill elsewhere, even where x is inf or NaN."""
    z = x * scale
    if shift:
        # 16-bit types are rounded once.
        z = (x.to(torch.promote_types(x.dtype, torch.float32)) * scale + shift).to(x.dtype)
    if not x.is_contiguous() and not context.is_transformed():
        # torch.where gives its result in the mask's memory format.
        mask = torch.empty_like(x, dtype=torch.bool).copy_(mask)
    return torch.where(mask, z, torch.full((), fill, dtype=x.dtype, device=x.device))


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y[n, k, i, j] = b[k] + Σ w[k, c, r, s] · x[n, c, i + r − 1, j + s − 1], x being 0 outside."""
    height, width = x.shape[2:]
    wide = torch.nn.functional.pad(x, (1, 1, 1, 1))
    parts = (
        torch.einsum("kc,nchw->nkhw", weight[:, :, r, s], wide[..., r : r + height, s : s + width])
        for r in range(3)
        for s in range(3)
    )
    y = sum(parts, torch.zeros((), dtype=x.dtype, device=x.device))
    return y if bias is None else y + bias.view(-1, 1, 1)
