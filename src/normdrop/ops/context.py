"""Who looks on while a layer runs: a tracer, a transform, the compiler, a subclass of Tensor.

The kernels' autograd functions and their writing into buffers are for plain tensors in eager mode.
Everywhere else torch's own operators, the reference or a registered operator stand in; which, is
decided by these answers alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

__all__ = [
    "TENSORS",
    "is_compiled",
    "is_exported",
    "is_plain",
    "is_subclass",
    "is_traced",
    "is_transformed",
]

TENSORS = frozenset({Tensor, torch.nn.Parameter, torch.nn.Buffer, FakeTensor})
"""Torch's own. A FakeTensor has no values, and a rule for every operator that is registered."""

is_compiled = torch.compiler.is_compiling
"""Whether torch.compile or torch.export traces; both understand registered operators."""


def is_exported() -> bool:
    """Whether what is traced will run elsewhere: torch.export, torch.jit.trace, ONNX.

    There only torch's own operators may be left in the program.
    """
    return torch._C._get_tracing_state() is not None or torch.compiler.is_exporting()


def is_traced(x: Any) -> bool:
    """Whether torch.fx traces, so that x is a Proxy instead of a tensor."""
    return isinstance(x, torch.fx.Proxy)


def is_transformed() -> bool:
    """Under torch.func or forward-mode differentiation, for which a kernel has no rule."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_subclass(x: Tensor) -> bool:
    """Whether x has another class than torch's own, which says itself what operators do with it."""
    return type(x) not in TENSORS


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether all are torch's own strided tensors, in eager mode, and nobody looks on."""
    if is_compiled() or is_exported() or is_transformed():
        return False
    if torch._C._len_torch_dispatch_stack() > 0:
        return False
    return all(t is None or (type(t) in TENSORS and t.layout is torch.strided) for t in tensors)
