"""Which path an operator takes, a kernel's or torch's and why, and who is told."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from normdrop.ops import context, has_kernels

__all__ = ["reason_for_torch", "tell", "told"]

_TYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})

_listeners: dict[int, Callable[[str], None]] = {}
"""By thread."""


def reason_for_torch(x: Tensor) -> str | None:
    """Why no kernel takes the tensor, so that torch's operators do; None where one may."""
    if not has_kernels():
        return "there are no kernels"
    if not x.is_cpu:
        return "the input is not on the CPU"
    if x.dtype not in _TYPES:
        return "the input has none of the types float32, float64, bfloat16 and float16"
    if x.layout is not torch.strided or context.is_subclass(x):
        return "the input is not a plain tensor"
    if context.is_exported():
        return "the model is traced or exported"
    if context.is_transformed():
        return "torch.func or forward-mode differentiation transforms it"
    return None


def tell(path: str, reason: str | None) -> None:
    """Say which path an operator takes: this one, or torch's for a reason."""
    if _listeners and (listener := _listeners.get(threading.get_ident())) is not None:
        listener(path if reason is None else f"torch: {reason}")


@contextmanager
def told(listener: Callable[[str], None]) -> Iterator[None]:
    """Tell ``listener`` the path of every operator that this thread runs in the block.

    Example:
        >>> from normdrop import functional
        >>> paths = []
        >>> with told(paths.append):
        ...     y = functional.dropout(torch.ones(3, dtype=torch.complex64), keep=0.5)
        >>> paths
        ['torch: the input has none of the types float32, float64, bfloat16 and float16']
    """
    thread = threading.get_ident()
    before = _listeners.get(thread)
    _listeners[thread] = listener
    try:
        yield
    finally:
        del _listeners[thread]
        if before is not None:
            _listeners[thread] = before
