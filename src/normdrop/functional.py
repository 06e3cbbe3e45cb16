"""The public functions: torch.nn.functional's signatures, and more behind the keyword-only bar.

They check what was given and call the operators in :mod:`normdrop.ops`.
"""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch import Tensor

from normdrop.ops import dropout as _dropout
from normdrop.ops.activations import activation_of
from normdrop.ops.batch_norm import Affine, Drop, Statistics
from normdrop.ops.batch_norm import batch_norm as _batch_norm

__all__ = [
    "alpha_dropout",
    "batch_norm",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "feature_alpha_dropout",
]

NONFINITE = ("propagate", "skip", "raise")
"""What becomes of the running statistics when a batch holds NaN or infinity."""

Scaling = Literal["train", "test"]


def check_activation(activation: str | None) -> str | None:
    """The activation's name, if there is one of that name."""
    activation_of(activation)
    return activation


def check_nonfinite(nonfinite: str) -> str:
    """What a NaN does to the running statistics, if it is one of the three ways."""
    if nonfinite not in NONFINITE:
        raise ValueError(
            f"batch_norm: nonfinite must be one of {', '.join(NONFINITE)}, got {nonfinite!r}"
        )
    return nonfinite


def check_scaling(scaling: Scaling) -> Scaling:
    """Where dropout's factor stands, if it is one of the two ways."""
    if scaling not in ("train", "test"):
        raise ValueError(f"dropout: scaling must be 'train' or 'test', got {scaling!r}")
    return scaling


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    keep: float = 1.0,
    seed: int | Tensor | None = None,
    sample_offset: int = 0,
    nonfinite: str = "propagate",
) -> Tensor:
    r"""Normalize every channel over the batch, then add, activate and drop, in one operator.

    .. math::
        \hat y_k = \gamma_k \frac{x_k - \mu_k}{\sqrt{\sigma_k^2 + \epsilon}} + \alpha_k, \qquad
        y = r \odot \mathrm{activation}(\hat y + \mathrm{residual}) / \mathrm{keep}

    x is (N, C, …); μ, σ², γ (``weight``) and α (``bias``) are (C,). In training, μ and the biased
    σ² are those of the batch over all dimensions but C, and the running statistics move to
    (1 − m)·running + m·batch, the variance unbiased, n/(n − 1). Otherwise the running statistics
    are used, and nothing is dropped.

    Args:
        input: x, of shape (N, C) or (N, C, …), any floating-point type and memory format.
        running_mean: (C,), updated in place in training; None to keep none.
        running_var: (C,), as ``running_mean``; both or neither.
        weight: γ, (C,), or None for 1.
        bias: α, (C,), or None for 0.
        training: use the batch's statistics.
        momentum: m, the weight of the new batch (torch's convention).
        eps: ε, inside the root.
        residual: of x's shape, added before the activation (a residual network's shortcut).
        activation: None, "relu", "leaky_relu" (slope 0.01), "leaky_relu(0.2)" (that slope) or
            "silu".
        keep: probability to keep an element in the dropout that follows in training, in (0, 1].
        seed: seed of the dropout mask; drawn from torch's generator if None.
        sample_offset: number of samples of the whole batch before this shard's first, for the mask.
        nonfinite: what a NaN or infinity in a batch does to the running statistics: "propagate"
            (torch's: they become NaN), "skip" (they stay as they were), "raise" (RuntimeError).

    Returns:
        y, of x's shape, type and memory format.

    Raises:
        ValueError: one value per channel in training; eps not positive in training; an unknown
            activation or nonfinite; keep outside (0, 1]; running_mean without running_var.
        RuntimeError: a vector with the wrong number of elements; torch's own sentence.

    Example:
        >>> x = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
        >>> batch_norm(x, None, None, training=True, eps=1e-12)
        tensor([[-1., -1.],
                [ 1.,  1.]])
        >>> batch_norm(x, None, None, training=True, eps=1e-12, activation="relu")
        tensor([[0., 0.],
                [1., 1.]])

    Reference:
        Ioffe and Szegedy, Batch Normalization: Accelerating Deep Network Training by Reducing
        Internal Covariate Shift, 2015, https://arxiv.org/abs/1502.03167
    """
    check_activation(activation)
    check_nonfinite(nonfinite)
    if residual is not None and residual.shape != input.shape:
        raise ValueError(
            f"batch_norm: residual must have the input's shape {tuple(input.shape)}, "
            f"got {tuple(residual.shape)}"
        )
    drop = None
    if keep != 1.0:
        if not 0.0 < keep <= 1.0:
            raise ValueError(f"batch_norm: keep must be in (0, 1], got {keep}")
        if sample_offset < 0:
            raise ValueError(f"batch_norm: sample_offset must not be negative, got {sample_offset}")
        drop = Drop(keep, seed, sample_offset) if training else None
    statistics = Statistics(running_mean, running_var, training, momentum, nonfinite)
    return _batch_norm(input, statistics, Affine(weight, bias), eps, residual, activation, drop)


def _check_probability(p: float) -> None:
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")


def keep_probability(p: float | None, keep: float | None, default: float = 0.5) -> float:
    """The probability to keep, from torch's p (to drop) or the lecture's keep; never from both."""
    if keep is None:
        p = default if p is None else p
        _check_probability(p)
        return 1.0 - p
    if p is not None:
        raise ValueError(
            f"give either p, the probability to drop, or keep, the probability to keep; "
            f"got p={p} and keep={keep}"
        )
    if not 0.0 <= keep <= 1.0:
        raise ValueError(f"keep has to be between 0 and 1, but got {keep}")
    return keep


def dropout(
    input: Tensor,
    p: float | None = None,
    training: bool = True,
    inplace: bool = False,
    *,
    keep: float | None = None,
    scaling: Scaling = "train",
    seed: int | Tensor | None = None,
    sample_offset: int = 0,
    generator: torch.Generator | None = None,
    shared_dims: tuple[int, ...] = (),
) -> Tensor:
    r"""Multiply the input by a Bernoulli mask: z = r ⊙ x, r_i ~ Bernoulli(keep).

    ======================  ==================  ===========
    scaling                 training            evaluation
    ======================  ==================  ===========
    "train" (inverted)      r ⊙ x / keep        x
    "test" (the lecture's)  r ⊙ x               keep · x
    ======================  ==================  ===========

    Both agree in expectation. The mask is a pure function of (seed, element index), see
    :func:`normdrop.ops.reference.keep_mask`: the same for any number of threads, memory format
    and data type, eager and compiled. Its resolution is 2⁻³². On a device other than the CPU that
    holds where ``seed``, ``generator`` or ``sample_offset`` is given; else the mask there comes
    from torch's own generator of that device, since that is faster.

    Args:
        input: x, of any shape and floating-point type.
        p: probability to DROP, torch's; 0.5 if neither p nor keep is given.
        training: without it nothing is dropped.
        inplace: write the result into the input and return it.
        keep: probability to KEEP, the lecture's p. Refused together with ``p``.
        scaling: where the factor stands, see the table.
        seed: a 64-bit integer (or int64 tensor) that fixes the mask. If None, one is drawn from
            ``generator`` or from torch's, so that ``torch.manual_seed`` acts as everywhere.
        sample_offset: number of samples of the whole batch that lie before ``input``'s first, so
            that shards of a batch get the shards of its mask.
        generator: where a seed is drawn from, if none is given.
        shared_dims: dimensions along which all elements share one draw.

    Returns:
        z, of x's shape, type and memory format; the input itself where nothing is to do.

    Raises:
        ValueError: p or keep outside [0, 1] or both given; an unknown scaling.
        RuntimeError: an input that is not floating-point.

    Example:
        >>> x = torch.ones(8)
        >>> dropout(x, keep=0.5, seed=1).unique()
        tensor([0., 2.])
        >>> dropout(x, keep=0.5, scaling="test", training=False)
        tensor([0.5000, 0.5000, 0.5000, 0.5000, 0.5000, 0.5000, 0.5000, 0.5000])

    Reference:
        Srivastava, Hinton, Krizhevsky, Sutskever and Salakhutdinov, Dropout: A Simple Way to
        Prevent Neural Networks from Overfitting, 2014, https://jmlr.org/papers/v15/srivastava14a
    """
    kept = keep_probability(p, keep)
    scale = 1.0 / kept if kept and check_scaling(scaling) == "train" else 1.0
    if not training:
        if scaling == "train" or kept == 1.0:
            return input
        return input.mul_(kept) if inplace else input * kept
    return _dropout.dropout(
        input, kept, scale, seed, sample_offset, generator, inplace, tuple(shared_dims)
    )


def _channel_dropout(
    input: Tensor, kept: float, scaling: Scaling, training: bool, inplace: bool, batched: bool
) -> Tensor:
    first = 2 if batched else 1
    _check_feature_dims(input, kept, training, first)
    return dropout(
        input,
        training=training,
        inplace=inplace,
        keep=kept,
        scaling=scaling,
        shared_dims=tuple(range(first, input.dim())),
    )


def dropout1d(
    input: Tensor,
    p: float | None = None,
    training: bool = True,
    inplace: bool = False,
    *,
    keep: float | None = None,
    scaling: Scaling = "train",
) -> Tensor:
    """Drop whole channels of (N, C, L) or (C, L); otherwise as :func:`dropout`.

    Raises:
        RuntimeError: an input that is neither 2-D nor 3-D.

    Example:
        >>> dropout1d(torch.ones(2, 3, 4), keep=0.5).std(dim=2).max()
        tensor(0.)
    """
    kept = keep_probability(p, keep)
    if input.dim() not in (2, 3):
        raise RuntimeError(
            f"dropout1d: Expected 2D or 3D input, but received a {input.dim()}D input. "
            "Note that dropout1d exists to provide channel-wise dropout on inputs with 1 "
            "spatial dimension, a channel dimension, and an optional batch dimension "
            "(i.e. 2D or 3D inputs)."
        )
    return _channel_dropout(input, kept, scaling, training, inplace, input.dim() == 3)


def dropout2d(
    input: Tensor,
    p: float | None = None,
    training: bool = True,
    inplace: bool = False,
    *,
    keep: float | None = None,
    scaling: Scaling = "train",
) -> Tensor:
    """Drop whole channels of (N, C, H, W); otherwise as :func:`dropout`.

    A 3-D input is read as (N, C, L), as torch does, with torch's warning.

    Raises:
        RuntimeError: an input with fewer than two dimensions, of which channels are to be drawn.

    Example:
        >>> dropout2d(torch.ones(2, 3, 4, 4), keep=0.5).std(dim=(2, 3)).max()
        tensor(0.)
    """
    kept = keep_probability(p, keep)
    if input.dim() not in (3, 4):
        warnings.warn(
            f"dropout2d: Received a {input.dim()}-D input to dropout2d, which is deprecated "
            "and will result in an error in a future release. To retain the behavior "
            "and silence this warning, please use dropout instead. Note that dropout2d "
            "exists to provide channel-wise dropout on inputs with 2 spatial dimensions, "
            "a channel dimension, and an optional batch dimension (i.e. 3D or 4D inputs).",
            stacklevel=2,
        )
    if input.dim() == 3:
        warnings.warn(
            "dropout2d: Received a 3D input to dropout2d and assuming that channel-wise "
            "1D dropout behavior is desired - input is interpreted as shape (N, C, L), where C "
            "is the channel dim. This behavior will change in a future release to interpret the "
            "input as one without a batch dimension, i.e. shape (C, H, W). To maintain the 1D "
            "channel-wise dropout behavior, please switch to using dropout1d instead.",
            stacklevel=2,
        )
    return _channel_dropout(input, kept, scaling, training, inplace, batched=True)


def dropout3d(
    input: Tensor,
    p: float | None = None,
    training: bool = True,
    inplace: bool = False,
    *,
    keep: float | None = None,
    scaling: Scaling = "train",
) -> Tensor:
    """Drop whole channels of (N, C, D, H, W) or (C, D, H, W); otherwise as :func:`dropout`.

    Example:
        >>> dropout3d(torch.ones(2, 3, 2, 2, 2), keep=0.5).std(dim=(2, 3, 4)).max()
        tensor(0.)
    """
    kept = keep_probability(p, keep)
    if input.dim() not in (4, 5):
        warnings.warn(
            f"dropout3d: Received a {input.dim()}-D input to dropout3d, which is deprecated "
            "and will result in an error in a future release. To retain the behavior "
            "and silence this warning, please use dropout instead. Note that dropout3d "
            "exists to provide channel-wise dropout on inputs with 3 spatial dimensions, "
            "a channel dimension, and an optional batch dimension (i.e. 4D or 5D inputs).",
            stacklevel=2,
        )
    return _channel_dropout(input, kept, scaling, training, inplace, input.dim() == 5)


def _check_feature_dims(input: Tensor, kept: float, training: bool, least: int) -> None:
    """Refuse an input without channels where they are drawn: in training, p neither 0 nor 1."""
    if input.dim() < least and training and 0.0 < kept < 1.0:
        raise RuntimeError("Feature dropout requires at least 2 dimensions in the input")


ALPHA = -1.7580993408473766
"""α′ = −λα of SELU, the value that a dropped unit takes (Klambauer et al. 2017)."""


def _alpha_dropout(
    input: Tensor, kept: float, training: bool, inplace: bool, shared_dims: tuple[int, ...]
) -> Tensor:
    if not training or kept == 1.0:
        return input
    if kept == 0.0:
        return _dropout.dropout(input, 0.0, 1.0, inplace=inplace)
    # a and b bring mean and variance back to 0 and 1.
    a = (kept * (1.0 + (1.0 - kept) * ALPHA**2)) ** -0.5
    b = -a * ALPHA * (1.0 - kept)
    y = _dropout.alpha_dropout(input, kept, a, ALPHA, b, shared_dims)
    return input.copy_(y) if inplace else y


def alpha_dropout(
    input: Tensor,
    p: float | None = None,
    training: bool = False,
    inplace: bool = False,
    *,
    keep: float | None = None,
) -> Tensor:
    r"""Dropout for self-normalizing networks: z = a (r ⊙ x + (1 − r) α′) + b.

    a = (keep (1 + (1 − keep) α′²))^(−1/2) and b = −a (1 − keep) α′ keep mean 0 and variance 1.
    In evaluation the input comes back.

    Example:
        >>> x = torch.zeros(4)
        >>> alpha_dropout(x, 0.5) is x
        True

    Reference:
        Klambauer, Unterthiner, Mayr and Hochreiter, Self-Normalizing Neural Networks, 2017,
        https://arxiv.org/abs/1706.02515
    """
    return _alpha_dropout(input, keep_probability(p, keep), training, inplace, ())


def feature_alpha_dropout(
    input: Tensor,
    p: float | None = None,
    training: bool = False,
    inplace: bool = False,
    *,
    keep: float | None = None,
) -> Tensor:
    """:func:`alpha_dropout` of whole channels of (N, C, …)."""
    kept = keep_probability(p, keep)
    _check_feature_dims(input, kept, training, 2)
    return _alpha_dropout(input, kept, training, inplace, tuple(range(2, input.dim())))
