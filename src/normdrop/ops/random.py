"""Where the seed of a dropout mask comes from, and the mask as an operator in compiled graphs.

A mask is a pure function of a 64-bit seed and the element's index. The seed is one number from
torch's CPU generator, so ``torch.manual_seed``, ``torch.random.fork_rng`` and activation
checkpointing act as they do on torch's dropout. The same call draws the same seed in eager mode
and in a compiled graph. Two draw from torch's own generators unless somebody asks for a certain
mask by a seed, a generator or an offset: exported programs, which hold torch's operators only, and
devices other than the CPU; see ops/dropout.py.
"""

from __future__ import annotations

import operator
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from normdrop.ops import context, reference

__all__ = ["draw_seed", "keep_mask", "make_seed"]

_HIGH = 2**63 - 1

# In a graph the draw is an operator of its own: inductor would replace torch.randint by a
# generator of its own, which gives other numbers than eager mode. Two arguments that are not
# looked at keep the draws apart and in order: `after`, the tensor that the mask will be for, and
# `fresh`, a new tensor each time, since graph optimizations merge equal calls of an operator even
# where it is tagged random, but never two calls of torch.empty.
_library = torch.library.Library("normdrop", "FRAGMENT")
_library.define(
    "draw_seed(Tensor after, Tensor fresh) -> Tensor",
    tags=(torch.Tag.nondeterministic_seeded,),
)
# The mask in plain PyTorch is an operator of its own in a graph: inductor would inline every word
# into both of its uses in the next round, 2⁷ times the work.
_library.define(
    "keep_mask(SymInt[] shape, int threshold, Tensor seed, SymInt sample_offset) -> Tensor"
)


def _draw() -> Tensor:
    return torch.randint(_HIGH, (), device="cpu")


_library.impl("draw_seed", lambda after, fresh: _draw(), "CompositeExplicitAutograd")


@torch.library.register_fake("normdrop::draw_seed", lib=_library)
def _(after: Tensor, fresh: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.int64, device="cpu")


def _keep_mask(shape: list[int], threshold: int, seed: Tensor, sample_offset: int) -> Tensor:
    # A copy, since a graph expects a tensor that begins where its storage does.
    return reference.keep_mask_of_threshold(tuple(shape), threshold, seed, sample_offset).clone()


_library.impl("keep_mask", _keep_mask, "CompositeExplicitAutograd")


@torch.library.register_fake("normdrop::keep_mask", lib=_library)
def _(shape: list[int], threshold: int, seed: Tensor, sample_offset: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bool, device=seed.device)


def _keep_mask_vmap(
    info: Any,
    in_dims: tuple[Any, ...],
    shape: list[int],
    threshold: int,
    seed: Tensor,
    sample_offset: int,
) -> tuple[Tensor, int]:
    seeds = seed.unbind(in_dims[2])
    return torch.stack([keep_mask(tuple(shape), threshold, s, sample_offset) for s in seeds]), 0


torch.library.register_vmap("normdrop::keep_mask", _keep_mask_vmap, lib=_library)


def keep_mask(shape: tuple[int, ...], threshold: int, seed: Tensor, sample_offset: int) -> Tensor:
    """See :func:`normdrop.ops.reference.keep_mask_of_threshold`."""
    if context.is_compiled() and not context.is_exported():
        mask: Tensor = torch.ops.normdrop.keep_mask(shape, threshold, seed, sample_offset)
        return mask
    return reference.keep_mask_of_threshold(shape, threshold, seed, sample_offset)


def draw_seed(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """An int64 scalar tensor drawn from ``generator``, or from torch's CPU generator.

    Under ``torch.func.vmap`` the draw follows its ``randomness``: "same" draws one seed for all,
    "different" one for each, "error" raises. (vmap in a compiled graph draws from inductor's
    generator, so there the masks are not those of eager mode.)
    """
    if generator is not None:
        return torch.randint(_HIGH, (), generator=generator, device=generator.device)
    if context.is_compiled() and not (context.is_exported() or context.is_transformed()):
        fresh = torch.empty((), device="cpu")
        seed: Tensor = torch.ops.normdrop.draw_seed(x.detach(), fresh)
        return seed
    return _draw()


def make_seed(
    x: Tensor, seed: SupportsIndex | Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """The seed for x as an int64 scalar tensor on x's device; drawn if none is given."""
    if seed is None:
        drawn = draw_seed(x, generator)
        return drawn if x.is_cpu and drawn.is_cpu else drawn.to(x.device)
    if isinstance(seed, Tensor):
        if seed.numel() != 1 or seed.is_floating_point() or seed.is_complex():
            raise ValueError(
                f"seed must be an integer or an integer tensor with one element, got "
                f"{seed.dtype} of shape {tuple(seed.shape)}"
            )
        if seed.dtype is torch.int64 and seed.dim() == 0 and seed.is_cpu and x.is_cpu:
            return seed
        return seed.reshape(()).to(x.device, torch.int64)
    if not isinstance(seed, int):
        try:
            seed = operator.index(seed)
        except TypeError:
            raise TypeError(
                f"seed must be an integer or an integer tensor with one element, got {seed!r}"
            ) from None
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must fit into 64 bits, got {seed}")
    signed = seed if seed < 2**63 else seed - 2**64
    return torch.full((), signed, dtype=torch.int64, device=x.device)
