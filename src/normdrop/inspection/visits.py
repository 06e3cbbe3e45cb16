"""Be told when a model's modules begin and end their work, those in fused code included."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from normdrop.graph import fusion

__all__ = ["Visitor", "visited"]

_BatchNorm = torch.nn.modules.batchnorm._BatchNorm


class Visitor(Protocol):
    """Who is told; see :func:`visited`."""

    def enter(self, module: torch.nn.Module, fused: str) -> None:
        """The module begins; ``fused`` has what its call does besides, such as "add+relu"."""

    def leave(self, module: torch.nn.Module, output: Any) -> None:
        """It ends, and gives this; None where it failed."""


@contextmanager
def visited(modules: Iterable[torch.nn.Module], visitor: Visitor) -> Iterator[None]:
    """Tell ``visitor`` of every call of the modules in the block.

    Fused code calls a batch normalization's ``normalize`` and none of the modules that it takes in.
    With a hook on those it would step aside, so the hooks are on all others.
    """
    modules = list(modules)
    inside_fused = fusion.inside_fused(modules)
    norms = [module for module in inside_fused if isinstance(module, _BatchNorm)]
    handles = []
    try:
        for norm in norms:
            vars(norm)["normalize"] = partial(_normalize, visitor, norm)
        for module in modules:
            if module not in inside_fused:
                begin, end = partial(_begin, visitor), partial(_end, visitor)
                handles.append(module.register_forward_pre_hook(begin, prepend=True))
                handles.append(module.register_forward_hook(end, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for norm in norms:
            vars(norm).pop("normalize", None)


def _begin(visitor: Visitor, module: torch.nn.Module, arguments: Any) -> None:
    visitor.enter(module, "")


def _end(visitor: Visitor, module: torch.nn.Module, arguments: Any, output: Any) -> None:
    visitor.leave(module, output)


def _normalize(
    visitor: Visitor,
    norm: Any,
    x: Tensor,
    residual: Tensor | None,
    activation: str | None,
    keep: float = 1.0,
) -> Any:
    added = "add" if residual is not None else None
    dropped = "dropout" if keep < 1.0 else None
    visitor.enter(norm, "+".join(filter(None, (added, activation, dropped))))
    y = None
    try:
        y = type(norm).normalize(norm, x, residual, activation, keep)
    finally:
        visitor.leave(norm, y)
    return y
