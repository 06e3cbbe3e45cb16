"""Dropout by a counter: the mask is drawn from (seed, element index), never stored."""

from __future__ import annotations

import torch
from torch import Tensor

from normdrop.ops import reference

__all__ = ["alpha_dropout", "dropout", "keep_mask", "make_seed"]


def make_seed(
    x: Tensor, seed: int | Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """The seed as an int64 scalar tensor on x's device; drawn from the generator if not given."""
    if seed is None:
        return reference.draw_seed(generator).to(x.device)
    if isinstance(seed, Tensor):
        return seed.to(x.device, torch.int64)
    wrapped = (int(seed) + (1 << 63)) % (1 << 64) - (1 << 63)
    return torch.tensor(wrapped, dtype=torch.int64, device=x.device)


def keep_mask(
    shape: tuple[int, ...], keep: float, seed: Tensor, sample_offset: int = 0
) -> Tensor:
    """See :func:`normdrop.ops.reference.keep_mask`."""
    return reference.keep_mask(shape, keep, seed, sample_offset)


def _mask(
    x: Tensor, keep: float, seed: Tensor, sample_offset: int, shared_dims: tuple[int, ...]
) -> Tensor:
    shared = {d % x.dim() for d in shared_dims}
    shape = tuple(1 if d in shared else size for d, size in enumerate(x.shape))
    return keep_mask(shape, keep, seed, sample_offset)


def _check_floating_point(x: Tensor) -> None:
    if not x.is_floating_point():
        raise RuntimeError(
            f"dropout: the input must be floating-point, got {x.dtype}; convert it first"
        )


def dropout(
    x: Tensor,
    keep: float,
    scale: float,
    seed: int | Tensor | None = None,
    sample_offset: int = 0,
    generator: torch.Generator | None = None,
    inplace: bool = False,
    shared_dims: tuple[int, ...] = (),
) -> Tensor:
    """z = scale · (r ⊙ x) with r = keep_mask(…), r being constant along shared_dims."""
    _check_floating_point(x)
    if keep == 1.0 and scale == 1.0:
        return x
    mask = _mask(x, keep, make_seed(x, seed, generator), sample_offset, shared_dims)
    z = reference.dropout(x, mask, scale)
    return x.copy_(z) if inplace else z


def alpha_dropout(
    x: Tensor, keep: float, a: float, low: float, b: float, shared_dims: tuple[int, ...] = ()
) -> Tensor:
    """z = a (r ⊙ x + (1 − r) low) + b."""
    _check_floating_point(x)
    mask = _mask(x, keep, make_seed(x), 0, shared_dims)
    return torch.where(mask, x * a + b, torch.full((), a * low + b, dtype=x.dtype, device=x.device))
