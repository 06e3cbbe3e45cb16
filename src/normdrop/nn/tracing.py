"""How torch.fx sees the modules: as leaves, as it sees torch's own."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["call_as_leaf"]


def call_as_leaf(module: torch.nn.Module, input: Any, *others: Any) -> Any:
    """Record a call of the module instead of what it does inside.

    torch.fx takes a module as a leaf only if it is defined in torch.nn. Traced through, ours would
    branch on the values of a Proxy, and count a batch while no batch is there.
    """
    tracer = input.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (input, *others), {})
