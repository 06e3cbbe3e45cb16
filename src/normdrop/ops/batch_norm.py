"""Batch normalization with what follows it: residual addition, activation, dropout.

The kernel saves x and per-channel vectors for backward. The activation's sign is worked out again
from x; where a residual was added, one bit an element is kept instead. The dropout mask is drawn
again from its seed.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from normdrop.memory import recompute
from normdrop.ops import batch_norm_twice as twice
from normdrop.ops import dropout as dropout_ops
from normdrop.ops import has_kernels, reference

__all__ = ["batch_norm"]

NONFINITE = {"propagate": 0, "skip": 1, "raise": 2}

_TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_HALF = (torch.bfloat16, torch.float16)

_SMALL = 16384
"""Elements up to which torch's own operator is as fast: the call is all that counts."""

Drop = tuple[()] | tuple[Tensor, int, float, int]
"""The kernel's last arguments: seed, threshold, drop_scale and sample_offset, or no dropout."""


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
    drop: Drop = ()
    if keep < 1.0 and seed is not None:
        if sample_offset < 0:
            raise ValueError(f"batch_norm: sample_offset must not be negative, got {sample_offset}")
        drop = (seed, reference.keep_threshold(keep), 1.0 / keep if keep else 0.0, sample_offset)
    # The compiler is asked first: it would compile once more for the small.
    if not torch.compiler.is_compiling() and x.numel() <= _SMALL and nonfinite == "propagate":
        y = _torch(x, running_mean, running_var, weight, bias, training, momentum, eps)
        return _finish(y, residual, activation, drop)
    return kernel_or_plain(
        x,
        running_mean,
        running_var,
        weight,
        bias,
        training,
        momentum,
        eps,
        residual,
        activation,
        nonfinite,
        drop,
    )


def kernel_or_plain(
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
    nonfinite: str,
    drop: Drop = (),
) -> Tensor:
    """y = dropout(activation(BN(x) + residual)), by the kernel wherever there is one."""
    if not _takes_kernel(x, running_mean, running_var, weight, bias, training, eps):
        y = _plain(x, running_mean, running_var, weight, bias, training, momentum, eps, nonfinite)
        return _finish(y, residual, activation, drop)
    if not _is_ordered(x):
        x = x.contiguous()  # as is torch's result
    slope = reference.slope_of(activation)  # the kernel has no other activations
    run = _traced if torch.compiler.is_compiling() else _eager
    y = run(
        x,
        running_mean,
        running_var,
        weight,
        bias,
        residual,
        training,
        momentum,
        eps,
        1.0 if slope is None else slope,
        NONFINITE[nonfinite],
        () if slope is None else drop,
    )
    return _finish(y, None, activation, drop) if slope is None else y


def _finish(y: Tensor, residual: Tensor | None, activation: str | None, drop: Drop) -> Tensor:
    if residual is not None:
        y = y + residual
    if activation is not None:
        y = reference.activate(y, activation)
    if drop:
        seed, threshold, scale, sample_offset = drop
        y = dropout_ops.drop(y, seed, (threshold, scale, 0.0, 0.0, sample_offset, ()))
    return y


def _takes_kernel(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
) -> bool:
    """Whether the kernel computes this; what is wrong is left to torch, which says so."""
    if not has_kernels() or not x.is_cpu or x.dtype not in _TYPES or x.dim() < 2:
        return False
    if x.layout is not torch.strided or _is_transformed():
        return False
    if torch._C._get_tracing_state() is not None:
        return False  # torch.jit.trace saves no autograd.Function
    channels, dtype = x.shape[1], x.dtype
    if x.numel() == 0 or (training and (x.numel() == channels or eps <= 0.0)):
        return False
    if (running_mean is None) != (running_var is None):
        return False
    if running_mean is None and not training:
        return False
    for vector in (running_mean, running_var, weight, bias):
        if vector is None:
            continue
        if vector.dtype is not dtype and not (dtype in _HALF and vector.dtype is torch.float32):
            return False
        if vector.dim() != 1 or vector.shape[0] != channels or not vector.is_cpu:
            return False
    return True


def _is_transformed() -> bool:
    """Under torch.func or forward-mode differentiation, for which the kernel has no rules."""
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def _is_ordered(x: Tensor) -> bool:
    """Contiguous or channels_last: torch gives no other layout back."""
    if x.is_contiguous():
        return True
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d)


def _plain(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    nonfinite: str,
) -> Tensor:
    """The same with torch's operator."""
    if not training or nonfinite == "propagate" or x.numel() == 0:
        return _torch(x, running_mean, running_var, weight, bias, training, momentum, eps)
    y = torch.nn.functional.batch_norm(x, None, None, weight, bias, True, momentum, eps)
    with torch.no_grad():
        mean, var = reference.batch_statistics(x.detach())
        is_finite = (mean.isfinite() & var.isfinite()).all()
        if nonfinite == "raise" and not is_finite:
            raise RuntimeError("batch_norm: the input holds NaN or infinity")
        if running_mean is not None and running_var is not None:
            new_mean, new_var = running_mean.clone(), running_var.clone()
            reference.update_running_statistics(
                new_mean, new_var, mean, var, x.numel() // x.shape[1], momentum
            )
            running_mean.copy_(torch.where(is_finite, new_mean, running_mean))
            running_var.copy_(torch.where(is_finite, new_var, running_var))
    return y


def _torch(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """Torch's operator, which takes no half γ and α beside running statistics in float32."""
    if running_var is not None and running_var.dtype is torch.float32 and x.dtype in _HALF:
        weight = None if weight is None else weight.float()
        bias = None if bias is None else bias.float()
    return torch.nn.functional.batch_norm(
        x, running_mean, running_var, weight, bias, training, momentum, eps
    )


def _traced(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    slope: float,
    nonfinite: int,
    drop: Drop,
) -> Tensor:
    """The operators as torch.compile and torch.export see them."""
    y, mean, var, _ = torch.ops.normdrop.batch_norm.default(
        x,
        None if training else running_mean,
        None if training else running_var,
        weight,
        bias,
        residual,
        training,
        eps,
        slope,
        *drop,
    )
    if training:
        _update(running_mean, running_var, x, mean, var, momentum, nonfinite)
    return cast(Tensor, y)


def _update(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    momentum: float,
    nonfinite: int,
) -> None:
    if running_mean is None or running_var is None:
        if nonfinite != NONFINITE["raise"]:
            return
        running_mean, running_var = torch.empty_like(mean), torch.empty_like(var)
    torch.ops.normdrop.batch_norm_update.default(
        running_mean, running_var, mean, var, x.numel() // x.shape[1], momentum, nonfinite
    )


def _eager(*args: Any) -> Tensor:
    """The same in eager mode, without the 60 µs that a registered formula costs a call."""
    x, _, _, weight, bias, residual, *_ = args
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        return cast(Tensor, cast(Any, _Eager).apply(*args))
    return _Eager.forward(None, *args)


def _again(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    slope: float,
    drop: Drop,
) -> tuple[Tensor, ...]:
    """The bits of y once more, from the statistics of the first time."""
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.normdrop.batch_norm.default(  # type: ignore[no-any-return]
            x, mean, var, weight, bias, residual, False, eps, slope, *drop
        )[:1]


# To add what x gets from its other users (a DenseNet's concatenation) in the loop of backward, not
# by autograd after it, gained 1 % of a DenseNet-40's step: the loop waits for its loads already.
class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
        slope: float,
        nonfinite: int,
        drop: Drop,
    ) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            y, mean, var, positive = torch.ops.normdrop.batch_norm.default(
                x,
                None if training else running_mean,
                None if training else running_var,
                weight,
                bias,
                residual,
                training,
                eps,
                slope,
                *drop,
            )
            if training:
                _update(running_mean, running_var, x, mean, var, momentum, nonfinite)
        if ctx is not None:
            ctx.save_for_backward(x, mean, var, weight, bias, positive, *drop[:1])
            ctx.training, ctx.eps, ctx.slope, ctx.drop = training, eps, slope, drop[1:]
            ctx.set_materialize_grads(False)
            recorder = recompute.active()
            if recorder is not None:
                vectors = (mean, var, weight, bias)
                recorder.note(y, _again, (x, *vectors), (residual,), (eps, slope, drop))
        return cast(Tensor, y)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None) -> tuple[Tensor | None, ...]:
        need_x, _, _, need_weight, need_bias, need_residual, *_ = ctx.needs_input_grad
        grads = _gradients(ctx, grad_y, need_x, need_weight, need_bias, need_residual)
        grad_x, grad_weight, grad_bias, grad_residual = grads
        return (grad_x, None, None, grad_weight, grad_bias, grad_residual, *(None,) * 6)


# ---- Fake kernels: shapes, types and layouts only ----------------------------------------------


def _batch_norm_fake(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    training: bool,
    eps: float,
    slope: float,
    seed: Tensor | None = None,
    threshold: int = 2**32,
    drop_scale: float = 1.0,
    sample_offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    vector = x.new_empty((x.shape[1],), dtype=torch.float64)
    has_bits = residual is not None and slope != 1.0
    size = (x.numel() + 7) // 8 + x.shape[0] * x.shape[1] if has_bits else 0
    positive = x.new_empty((size,), dtype=torch.uint8)
    return torch.empty_like(x), vector, torch.empty_like(vector), positive


def _batch_norm_backward_fake(
    grad_y: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    positive: Tensor,
    training: bool,
    eps: float,
    slope: float,
    need_x: bool,
    need_vectors: bool,
    need_residual: bool,
    seed: Tensor | None = None,
    threshold: int = 2**32,
    drop_scale: float = 1.0,
    sample_offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    plain = torch.float64 if x.dtype == torch.float64 else torch.float32
    size = (x.shape[1] if need_vectors else 0,)
    return (
        torch.empty_like(x) if need_x or need_residual else x.new_empty((0,)),
        x.new_empty(size, dtype=plain if weight is None else weight.dtype),
        x.new_empty(size, dtype=plain if bias is None else bias.dtype),
        torch.empty_like(x) if need_residual else x.new_empty((0,)),
    )


def _batch_norm_update_fake(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    var: Tensor,
    count: int,
    momentum: float,
    nonfinite: int,
) -> None:
    return None


# ---- Backward ----------------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, _, weight, bias, _, training, eps, slope, seed, *drop = inputs
    _, mean, var, positive = output
    seeds = () if seed is None else (seed,)
    ctx.save_for_backward(x, mean, var, weight, bias, positive, *seeds)
    ctx.training, ctx.eps, ctx.slope, ctx.drop = training, eps, slope, drop if seeds else ()
    ctx.mark_non_differentiable(mean, var, positive)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_y: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    need_x, _, _, need_weight, need_bias, need_residual, *_ = ctx.needs_input_grad
    grads = _gradients(ctx, grad_y, need_x, need_weight, need_bias, need_residual)
    grad_x, grad_weight, grad_bias, grad_residual = grads
    return (grad_x, None, None, grad_weight, grad_bias, grad_residual, *(None,) * 7)


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
    # With create_graph the operator is differentiated in turn; else its formula need not be found.
    again = torch.is_grad_enabled()
    with nullcontext() if again else torch._C._AutoDispatchBelowAutograd():
        grads = torch.ops.normdrop.batch_norm_backward.default(
            grad_y,
            x,
            mean,
            var,
            weight,
            bias,
            positive,
            ctx.training,
            ctx.eps,
            ctx.slope,
            need_x,
            need_weight or need_bias,
            need_residual and not is_plain,
            *seeds,
            *ctx.drop,
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
