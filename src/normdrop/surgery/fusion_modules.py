"""What fusion asks about modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from normdrop import nn

__all__ = ["PLAIN", "has_hooks", "is_fusible_norm", "is_norm", "is_plain_tensor_module", "patched"]

PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device})
"""Types whose values never change, so that one stands for its equals."""

NORMS = frozenset(
    {
        *(torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d),
        *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    }
)
DROPOUTS = frozenset({torch.nn.Dropout, nn.Dropout})

_SEVERAL = (
    torch.nn.RNNBase,
    torch.nn.LSTMCell,
    torch.nn.MultiheadAttention,
    torch.nn.AdaptiveLogSoftmaxWithLoss,
)
"""Modules of torch's that give more than one tensor."""


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether a call of the module does more than its forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def is_plain_tensor_module(module: torch.nn.Module) -> bool:
    """Whether it is one of torch's or our layers that give one tensor and keep no list."""
    home = getattr(type(module).forward, "__module__", None) or ""
    return (
        home.startswith(("torch.nn.", "normdrop.nn."))
        and not isinstance(module, (torch.nn.Sequential, *_SEVERAL))
        and not getattr(module, "return_indices", False)
    )


def is_norm(module: torch.nn.Module) -> bool:
    """Whether it is batch normalization of torch's or ours, and no subclass."""
    return type(module) in NORMS


def is_fusible_norm(module: torch.nn.Module) -> bool:
    """Whether what follows this layer may become part of it."""
    return (
        is_norm(module)
        and getattr(module, "activation", None) is None
        and getattr(module, "qconfig", None) is None
        and "forward" not in vars(module)
        and not has_hooks(module)
    )


@contextmanager
def patched(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    """Set attributes (of, name, value), for a while."""
    before = [(owner, name, vars(owner)[name]) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in reversed(before):
            setattr(owner, name, value)
