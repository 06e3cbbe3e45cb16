"""Batch normalization with what follows it: residual addition, activation, dropout.

The kernel saves x and per-channel vectors for backward. The activation's sign is worked out again
from x; where a residual was added, one bit an element is kept instead. The dropout mask is drawn
again from its seed.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from normdrop.memory import recompute
from normdrop.ops import batch_norm_twice as twice
from normdrop.ops import context, has_kernels, paths, reference
from normdrop.ops import dropout as dropout_ops
from normdrop.ops.activations import activation_of

__all__ = ["Affine", "Drop", "Statistics", "batch_norm", "reason_for_torch"]

NONFINITE = {"propagate": 0, "skip": 1, "raise": 2}

_HALF = (torch.bfloat16, torch.float16)


class Statistics(NamedTuple):
    """Whose mean and variance are used, and how the running ones, (C,) each, move."""

    running_mean: Tensor | None
    running_var: Tensor | None
    training: bool
    momentum: float = 0.1
    nonfinite: str = "propagate"


class Affine(NamedTuple):
    """γ and α, (C,) each, or None for 1 and 0."""

    weight: Tensor | None = None
    bias: Tensor | None = None


class Drop(NamedTuple):
    """The dropout that follows; without a seed one is drawn."""

    keep: float
    seed: int | Tensor | None = None
    sample_offset: int = 0


def batch_norm(
    x: Tensor,
    statistics: Statistics,
    affine: Affine,
    eps: float,
    residual: Tensor | None = None,
    activation: str | None = None,
    drop: Drop | None = None,
) -> Tensor:
    """y = dropout(activation(BN(x) + residual)), by the kernel wherever there is one."""
    reason = reason_for_torch(x, statistics, affine, eps)
    paths.tell("kernel", reason)
    if reason is not None:
        y = _by_torch(x, statistics, affine, eps)
        return _follow(y, residual, activation, drop)
    if not _is_ordered(x):
        x = x.contiguous()  # as is torch's result
    slope = activation_of(activation).slope
    if slope is None:  # none of the kernel's: it follows
        y = _by_kernel(x, statistics, affine, eps, residual, 1.0, ())
        return _follow(y, None, activation, drop)
    mask = () if drop is None else _mask_arguments(x, drop)
    return _by_kernel(x, statistics, affine, eps, residual, slope, mask)


def reason_for_torch(x: Tensor, statistics: Statistics, affine: Affine, eps: float) -> str | None:
    """Why torch's operator computes this, which says, too, what is wrong; None for the kernel."""
    if (reason := paths.reason_for_torch(x)) is not None:
        return reason
    running_mean, running_var, training = statistics[:3]
    if x.dim() < 2 or x.numel() == 0:
        return "the input has no channels or no elements"
    dtype, channels = x.dtype, x.shape[1]
    if training and (x.numel() == channels or eps <= 0.0):
        return "the batch has one value a channel, or eps is not positive"
    if (running_mean is None) != (running_var is None) or (running_mean is None and not training):
        return "running statistics are missing"
    for vector in (running_mean, running_var, *affine):
        if vector is None:
            continue
        if vector.dtype is not dtype and not (dtype in _HALF and vector.dtype is torch.float32):
            return "parameters or running statistics have another type than the input"
        if vector.shape != (channels,) or not vector.is_cpu:
            return "parameters or running statistics have another size or device"
        if type(vector) not in context.TENSORS:
            return "parameters or running statistics are not plain tensors"
    return None


def _mask_arguments(x: Tensor, drop: Drop) -> tuple[Any, ...]:
    """The operator's last arguments: seed, threshold, drop_scale and sample_offset."""
    seed = dropout_ops.make_seed(x, drop.seed)
    return seed, reference.keep_threshold(drop.keep), 1.0 / drop.keep, drop.sample_offset


def _follow(
    y: Tensor, residual: Tensor | None, activation: str | None, drop: Drop | None
) -> Tensor:
    """dropout(activation(y + residual)) by operators of their own."""
    if residual is not None:
        y = y + residual
    if activation is not None:
        y = activation_of(activation).apply(y)
    if drop is not None:
        keep, seed, sample_offset = drop
        y = dropout_ops.dropout(y, keep, 1.0 / keep, seed, sample_offset)
    return y


def _is_ordered(x: Tensor) -> bool:
    """Contiguous or channels_last: torch gives no other layout back."""
    if x.is_contiguous():
        return True
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d)


# ---- Torch's operator --------------------------------------------------------------------------


def _by_torch(x: Tensor, statistics: Statistics, affine: Affine, eps: float) -> Tensor:
    running_mean, running_var, training, momentum, nonfinite = statistics
    weight, bias = affine
    if not training or nonfinite == "propagate" or x.numel() == 0:
        if running_var is not None and running_var.dtype is torch.float32 and x.dtype in _HALF:
            # Torch takes no half γ and α beside running statistics in float32.
            weight = None if weight is None else weight.float()
            bias = None if bias is None else bias.float()
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    y = F.batch_norm(x, None, None, weight, bias, True, momentum, eps)
    with torch.no_grad():
        mean, var = reference.batch_statistics(x.detach())
        is_finite = (mean.isfinite() & var.isfinite()).all()
        if nonfinite == "raise":
            _raise_unless(is_finite)
        if running_mean is not None and running_var is not None:
            new_mean, new_var = running_mean.clone(), running_var.clone()
            reference.update_running_statistics(
                new_mean, new_var, mean, var, x.numel() // x.shape[1], momentum
            )
            running_mean.copy_(torch.where(is_finite, new_mean, running_mean))
            running_var.copy_(torch.where(is_finite, new_var, running_var))
    return y


def _raise_unless(is_finite: Tensor) -> None:
    message = "batch_norm: the input holds NaN or infinity"
    if context.is_compiled() or context.is_exported():
        torch._assert_async(is_finite, message)  # a graph has no branch on a tensor's value
    elif not is_finite:
        raise RuntimeError(message)


# ---- The kernel --------------------------------------------------------------------------------


def _by_kernel(
    x: Tensor,
    statistics: Statistics,
    affine: Affine,
    eps: float,
    residual: Tensor | None,
    slope: float,
    mask: tuple[Any, ...],
) -> Tensor:
    if not context.is_compiled():
        # In eager mode without the 60 µs that a registered formula costs a call.
        weight, bias = affine
        if torch.is_grad_enabled() and (
            x.requires_grad
            or (weight is not None and weight.requires_grad)
            or (bias is not None and bias.requires_grad)
            or (residual is not None and residual.requires_grad)
        ):
            return cast(Tensor, _apply(x, weight, bias, residual, statistics, eps, slope, mask))
        with torch._C._AutoDispatchBelowAutograd():
            return _call(x, statistics, affine, eps, residual, slope, mask)[0]
    return _call(x, statistics, affine, eps, residual, slope, mask)[0]


def _call(
    x: Tensor,
    statistics: Statistics,
    affine: Affine,
    eps: float,
    residual: Tensor | None,
    slope: float,
    mask: tuple[Any, ...],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operators, which is all that torch.compile sees: y, mean, var and the signs' bits."""
    running_mean, running_var, training, momentum, nonfinite = statistics
    given = (None, None) if training else (running_mean, running_var)
    y, mean, var, positive = torch.ops.normdrop.batch_norm.default(
        x, *given, *affine, residual, training, eps, slope, *mask
    )
    if training:
        if running_mean is None or running_var is None:
            if nonfinite != "raise":
                return y, mean, var, positive
            running_mean, running_var = torch.empty_like(mean), torch.empty_like(var)
        count = x.numel() // x.shape[1]
        torch.ops.normdrop.batch_norm_update.default(
            running_mean, running_var, mean, var, count, momentum, NONFINITE[nonfinite]
        )
    return y, mean, var, positive


def _again(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    slope: float,
    mask: tuple[Any, ...],
) -> tuple[Tensor, ...]:
    """The bits of y once more, from the statistics of the first time."""
    statistics = Statistics(mean, var, training=False)
    with torch._C._AutoDispatchBelowAutograd():
        return _call(x, statistics, Affine(weight, bias), eps, residual, slope, mask)[:1]


# To add what x gets from its other users (a DenseNet's concatenation) in the loop of backward, not
# by autograd after it, gained 1 % of a DenseNet-40's step: the loop waits for its loads already.
class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        statistics: Statistics,
        eps: float,
        slope: float,
        mask: tuple[Any, ...],
    ) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            y, mean, var, positive = _call(
                x, statistics, Affine(weight, bias), eps, residual, slope, mask
            )
        ctx.save_for_backward(x, mean, var, weight, bias, positive, *mask[:1])
        ctx.training, ctx.eps, ctx.slope, ctx.mask = statistics.training, eps, slope, mask[1:]
        ctx.set_materialize_grads(False)
        if recorder := recompute.active():
            vectors = (mean, var, weight, bias)
            recorder.note(y, _again, (x, *vectors), (residual,), (eps, slope, mask))
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None) -> tuple[Tensor | None, ...]:
        need_x, need_weight, need_bias, need_residual = ctx.needs_input_grad[:4]
        grads = _gradients(ctx, grad_y, need_x, need_weight, need_bias, need_residual)
        return (*grads, None, None, None, None)


# Function.apply looks for transforms, of which `reason_for_torch` found none: 3 µs.
_apply = cast(Any, super(torch.autograd.Function, _BatchNorm)).apply

# ---- Fake kernels: shapes, types and layouts only ----------------------------------------------


def _batch_norm_fake(
    x: Tensor, mean: Any, var: Any, weight: Any, bias: Any, residual: Any, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    slope = rest[2]
    vector = x.new_empty((x.shape[1],), dtype=torch.float64)
    has_bits = residual is not None and slope != 1.0
    size = (x.numel() + 7) // 8 + x.shape[0] * x.shape[1] if has_bits else 0
    positive = x.new_empty((size,), dtype=torch.uint8)
    return torch.empty_like(x), vector, torch.empty_like(vector), positive


def _batch_norm_backward_fake(
    grad_y: Tensor, x: Tensor, mean: Any, var: Any, weight: Any, bias: Any, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    need_x, need_vectors, need_residual = rest[4:7]
    plain = torch.float64 if x.dtype == torch.float64 else torch.float32
    size = (x.shape[1] if need_vectors else 0,)
    return (
        torch.empty_like(x) if need_x or need_residual else x.new_empty((0,)),
        x.new_empty(size, dtype=plain if weight is None else weight.dtype),
        x.new_empty(size, dtype=plain if bias is None else bias.dtype),
        torch.empty_like(x) if need_residual else x.new_empty((0,)),
    )


def _batch_norm_update_fake(*_: Any) -> None:
    return None


# ---- Backward ----------------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, _, weight, bias, _, training, eps, slope, seed, *mask = inputs
    _, mean, var, positive = output
    seeds = () if seed is None else (seed,)
    ctx.save_for_backward(x, mean, var, weight, bias, positive, *seeds)
    ctx.training, ctx.eps, ctx.slope, ctx.mask = training, eps, slope, mask if seeds else ()
    ctx.mark_non_differentiable(mean, var, positive)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_y: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    need_x, _, _, need_weight, need_bias, need_residual, *_ = ctx.needs_input_grad
    grads = _gradients(ctx, grad_y, need_x, need_weight, need_bias, need_residual)
    return (grads[0], None, None, *grads[1:], *(None,) * 7)


def _gradients(
    ctx: Any,
    grad_y: Tensor | None,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    need_residual: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    if grad_y is None:
        return None, None, None, None
    x, mean, var, weight, bias, positive, *seeds = ctx.saved_tensors
    is_plain = ctx.slope == 1.0 and not seeds  # then the residual's gradient is that of y
    needs = need_x, need_weight or need_bias, need_residual and not is_plain
    # With create_graph the operator is differentiated in turn; else its formula need not be found.
    with nullcontext() if torch.is_grad_enabled() else torch._C._AutoDispatchBelowAutograd():
        vectors = (mean, var, weight, bias, positive, ctx.training, ctx.eps, ctx.slope)
        grads = torch.ops.normdrop.batch_norm_backward.default(
            grad_y, x, *vectors, *needs, *seeds, *ctx.mask
        )
    return (
        grads[0] if need_x else None,
        grads[1] if need_weight else None,
        grads[2] if need_bias else None,
        (grad_y if is_plain else grads[3]) if need_residual else None,
    )


# ---- Registration ------------------------------------------------------------------------------

if has_kernels():
    torch.library.register_fake("normdrop::batch_norm", _batch_norm_fake)
    torch.library.register_fake("normdrop::batch_norm_backward", _batch_norm_backward_fake)
    torch.library.register_fake("normdrop::batch_norm_update", _batch_norm_update_fake)
    torch.library.register_autograd("normdrop::batch_norm", _backward, setup_context=_setup_context)
    torch.library.register_autograd(
        "normdrop::batch_norm_backward", twice.backward, setup_context=twice.setup_context
    )
