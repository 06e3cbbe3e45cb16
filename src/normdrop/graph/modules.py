"""What is asked about modules."""

from __future__ import annotations

import torch

from normdrop import nn

__all__ = [
    "CONSTANTS",
    "DROPOUTS",
    "does_more",
    "gives_one_tensor",
    "has_hooks",
    "is_fusible_norm",
    "is_norm",
    "is_replaced",
]

CONSTANTS = frozenset(
    {type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device}
)
"""Types whose values never change, so that one stands for its equals."""

_NORMS = frozenset(
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


def does_more(module: torch.nn.Module) -> bool:
    """Whether a call does more than its class says: hooks, or a forward of the instance."""
    return "forward" in vars(module) or has_hooks(module)


def is_replaced(module: torch.nn.Module) -> bool:
    """Whether somebody gave the instance a forward; a fused one says what the class's says."""
    forward = vars(module).get("forward")
    return forward is not None and not type(forward).__module__.startswith("normdrop.graph.")


def gives_one_tensor(module: torch.nn.Module) -> bool:
    """Whether it is one of torch's or our layers that give one tensor and keep no list."""
    home = getattr(type(module).forward, "__module__", None) or ""
    return (
        home.startswith(("torch.nn.", "normdrop.nn."))
        and not isinstance(module, (torch.nn.Sequential, *_SEVERAL))
        and not getattr(module, "return_indices", False)
    )


def is_norm(module: torch.nn.Module) -> bool:
    """Whether it is batch normalization of torch's or ours, and no subclass."""
    return type(module) in _NORMS


def is_fusible_norm(module: torch.nn.Module) -> bool:
    """Whether what follows this layer may become part of it."""
    return (
        is_norm(module)
        and getattr(module, "activation", None) is None
        and getattr(module, "qconfig", None) is None
        and not does_more(module)
    )
