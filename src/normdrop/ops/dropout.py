"""Dropout by a counter: the mask is drawn from (seed, element index), never stored."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from normdrop.memory import recompute
from normdrop.ops import context, has_kernels, paths, reference
from normdrop.ops.random import keep_mask, make_seed

__all__ = ["alpha_dropout", "dropout", "make_seed"]


class Rule(NamedTuple):
    """All of the operator but x and seed: z = scale · x + shift where kept, fill elsewhere."""

    threshold: int
    scale: float
    shift: float = 0.0
    fill: float = 0.0
    sample_offset: int = 0
    shared_dims: tuple[int, ...] = ()

    def derivative(self) -> Rule:
        """The rule of the gradient."""
        return self._replace(shift=0.0, fill=0.0)


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
    if keep == 1.0 and scale == 1.0:
        _check_input(x, sample_offset)
        return x
    return _draw_and_drop(
        x, keep, (scale, 0.0, 0.0), seed, sample_offset, generator, inplace, shared_dims
    )


def alpha_dropout(
    x: Tensor,
    keep: float,
    a: float,
    low: float,
    b: float,
    shared_dims: tuple[int, ...] = (),
    seed: int | Tensor | None = None,
    sample_offset: int = 0,
    generator: torch.Generator | None = None,
    inplace: bool = False,
) -> Tensor:
    """z = a (r ⊙ x + (1 − r) low) + b."""
    return _draw_and_drop(
        x, keep, (a, b, a * low + b), seed, sample_offset, generator, inplace, shared_dims
    )


def _draw_and_drop(
    x: Tensor,
    keep: float,
    coefficients: tuple[float, float, float],
    seed: int | Tensor | None,
    sample_offset: int,
    generator: torch.Generator | None,
    inplace: bool,
    shared_dims: tuple[int, ...],
) -> Tensor:
    _check_input(x, sample_offset)
    threshold = reference.keep_threshold(keep)
    if threshold == 0 and seed is None:
        seed = 0  # nothing is left to chance, so nothing is drawn, as in torch
    shared_dims = _positive_dims(x, shared_dims)
    if seed is None and generator is None and sample_offset == 0:
        is_exported = context.is_exported()
        if is_exported or not x.is_cpu:
            paths.tell("kernel", paths.reason_for_torch(x))
            z = _drop_by_torch(x, keep, coefficients, shared_dims, is_exported)
            return x.copy_(z) if inplace else z
    rule = Rule(threshold, *coefficients, sample_offset, shared_dims)
    return drop(x, make_seed(x, seed, generator), rule, inplace)


def _check_input(x: Tensor, sample_offset: int) -> None:
    if not (x.is_floating_point() or x.is_complex()):
        raise RuntimeError(
            f"dropout: the input must be floating-point, got {x.dtype}; convert it first"
        )
    if sample_offset < 0:
        raise ValueError(f"dropout: sample_offset must not be negative, got {sample_offset}")


def _positive_dims(x: Tensor, dims: tuple[int, ...]) -> tuple[int, ...]:
    if not dims:
        return ()
    if not all(-x.dim() <= d < x.dim() for d in dims):
        raise ValueError(
            f"dropout: shared_dims must lie in [{-x.dim()}, {x.dim()}) for an input of "
            f"{x.dim()} dimensions, got {dims}"
        )
    return tuple(d % x.dim() for d in dims)


def drop(x: Tensor, seed: Tensor, rule: Rule, inplace: bool = False) -> Tensor:
    """The dropout of this seed and rule, by the kernel wherever there is one."""
    reason = paths.reason_for_torch(x)
    paths.tell("kernel", reason)
    if reason is not None:
        threshold, scale, shift, fill, sample_offset, shared_dims = rule
        shape = tuple(1 if d in shared_dims else size for d, size in enumerate(x.shape))
        mask = keep_mask(shape, threshold, seed, sample_offset)
        z = reference.dropout(x, mask, scale, shift, fill)
        return x.copy_(z) if inplace else z
    if context.is_compiled():
        z = torch.ops.normdrop.dropout.default(x, seed, *rule)
        return x.copy_(z) if inplace else z
    if x.requires_grad and torch.is_grad_enabled():
        return _Dropout.apply(x, seed, rule, inplace)  # type: ignore[no-any-return,no-untyped-call]
    z = x if inplace else torch.empty_like(x)
    torch.ops.normdrop.dropout_into.default(x, seed, *rule, z)
    if inplace:
        torch.autograd.graph.increment_version(x)
    return z


def _drop_by_torch(
    x: Tensor,
    keep: float,
    coefficients: tuple[float, float, float],
    shared_dims: tuple[int, ...],
    is_exported: bool,
) -> Tensor:
    """The same with a mask from torch's generator of x's device.

    Off the CPU there is no kernel, and Philox in int64 operators is slow: so it is taken where
    somebody asks for a certain mask only. A program that is exported holds torch's operators.
    """
    scale, shift, fill = coefficients
    is_plain = scale == 1.0 / keep and shift == fill == 0.0 and x.is_floating_point()
    if is_plain and not shared_dims and is_exported:
        return torch.nn.functional.dropout(x, 1.0 - keep)
    if is_plain and not shared_dims and not context.is_transformed():
        z, mask = torch.native_dropout(x, 1.0 - keep, True)
        return torch.where(mask, z, 0.0)  # torch multiplies, and NaN times 0 is NaN
    shape = tuple(1 if d in shared_dims else size for d, size in enumerate(x.shape))
    mask = torch.rand(shape, device=x.device) < keep
    return reference.dropout(x, mask, scale, shift, fill)


def _again(x: Tensor, seed: Tensor, rule: Rule) -> tuple[Tensor, ...]:
    """The same bits whenever it is called."""
    z = torch.empty_like(x)
    torch.ops.normdrop.dropout_into.default(x, seed, *rule, z)
    return (z,)


class _Dropout(torch.autograd.Function):
    """The derivative in eager mode, in place or not; one registered with torch.library costs 5×."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seed: Tensor, rule: Rule, inplace: bool) -> Tensor:
        ctx.save_for_backward(seed)
        ctx.rule = rule
        if inplace:
            ctx.mark_dirty(x)
        if inplace:
            torch.ops.normdrop.dropout_into.default(x, seed, *rule, x)
            return x
        (z,) = _again(x, seed, rule)
        if recorder := recompute.active():
            recorder.note(z, _again, (), (x,), (seed, rule))
        return z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (seed,) = ctx.saved_tensors
        rule = ctx.rule.derivative()
        if torch._C._functorch.is_legacy_batchedtensor(grad):  # is_grads_batched=True
            return torch.ops.normdrop.dropout.default(grad, seed, *rule), None, None, None
        return drop(grad, seed, rule), None, None, None


def _fake(
    x: Tensor,
    seed: Tensor,
    threshold: int,
    scale: float,
    shift: float,
    fill: float,
    sample_offset: int,
    shared_dims: list[int],
) -> Tensor:
    return torch.empty_like(x)


def _fake_into(*args: Any) -> None:
    return None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, seed, threshold, scale, shift, fill, sample_offset, shared_dims = inputs
    ctx.save_for_backward(seed)
    ctx.rule = Rule(threshold, scale, shift, fill, sample_offset, tuple(shared_dims))


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # ∂L/∂x_i = scale · r_i · ∂L/∂z_i: the same mask, drawn again.
    rule = ctx.rule.derivative()
    return (torch.ops.normdrop.dropout.default(grad, ctx.saved_tensors[0], *rule), *[None] * 7)


if has_kernels():
    torch.library.register_fake("normdrop::dropout", _fake)
    torch.library.register_fake("normdrop::dropout_into", _fake_into)
    torch.library.register_autograd("normdrop::dropout", _backward, setup_context=_setup_context)
