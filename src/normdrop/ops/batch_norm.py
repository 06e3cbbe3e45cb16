"""Batch normalization with what follows it: residual addition, activation, dropout."""

from __future__ import annotations

import torch
from torch import Tensor

from normdrop.ops import dropout as dropout_ops
from normdrop.ops import reference

__all__ = ["batch_norm"]


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    activation: str | None,
    keep: float,
    seed: Tensor | None,
    sample_offset: int,
    nonfinite: str,
) -> Tensor:
    """y = dropout(activation(BN(x) + residual)); training says whose statistics are used."""
    y = torch.nn.functional.batch_norm(
        x, running_mean, running_var, weight, bias, training, momentum, eps
    )
    if residual is not None:
        y = y + residual
    y = reference.activate(y, activation)
    if keep < 1.0 and seed is not None:
        y = dropout_ops.dropout(y, keep, 1.0 / keep, seed, sample_offset)
    return y
