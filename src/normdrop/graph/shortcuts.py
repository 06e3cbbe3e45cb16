"""Modules that do nothing but take a part of x and put zeros around it: shortcuts of residuals."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Graph, Node

from normdrop.graph.forward import Code, FusedForward
from normdrop.graph.tracing import (
    TENSOR,
    Untraceable,
    default_arguments,
    looks_through,
    trace,
)
from normdrop.ops.shortcut import padded_part

__all__ = ["find_shortcuts"]


def find_shortcuts(model: torch.nn.Module) -> Iterator[FusedForward]:
    """The forwards that those modules are to get."""
    for module in model.modules():
        has_parts = bool(module._modules or module._parameters or module._buffers)
        if not has_parts and looks_through(module) and "forward" not in vars(module):
            codes = {training: _code(module, training) for training in (True, False)}
            found = {training: code for training, code in codes.items() if code is not None}
            if found:
                yield FusedForward(module, (TENSOR,), found, [], [], [])


def _code(module: torch.nn.Module, training: bool) -> Code | None:
    try:
        if default_arguments(module) != (TENSOR,):
            return None
        found = trace(module, training, (TENSOR,), lambda _: False)
    except Untraceable:
        return None
    return Code(found.graph) if _rewrite(found.graph) else None


def _rewrite(graph: Graph) -> bool:
    """Make one call of the slice and the padding, if the graph has these and nothing else."""
    nodes = list(graph.nodes)
    if [node.op for node in nodes] != ["placeholder", "call_function", "call_function", "output"]:
        return False
    x, part, padded, output = nodes
    index, pad = _index_of(part, x), _pad_of(padded, part)
    if index is None or pad is None or output.args != (padded,):
        return False
    with graph.inserting_before(output):
        call = graph.call_function(padded_part, (x, index, pad))
    padded.replace_all_uses_with(call)
    graph.erase_node(padded)
    graph.erase_node(part)
    graph.lint()
    return True


def _index_of(part: Node, x: Node) -> tuple[slice, ...] | None:
    """The slices of ``x[...]``, if it has these alone."""
    if part.target is not operator.getitem or part.args[0] is not x:
        return None
    index: Any = part.args[1]
    index = index if isinstance(index, tuple) else (index,)
    parts = [bound for s in index if isinstance(s, slice) for bound in (s.start, s.stop, s.step)]
    is_fixed = all(bound is None or type(bound) is int for bound in parts)
    return index if is_fixed and len(parts) == 3 * len(index) else None


def _pad_of(padded: Node, part: Node) -> tuple[int, ...] | None:
    """What ``F.pad`` adds in zeros."""
    given = dict(zip(("input", "pad", "mode", "value"), padded.args, strict=False))
    if padded.target is not torch.nn.functional.pad or given.keys() & padded.kwargs.keys():
        return None
    given.update(padded.kwargs)
    value, pad = given.get("value"), given.get("pad")
    if given.get("input") is not part or given.get("mode", "constant") != "constant":
        return None
    is_zero = value is None or (isinstance(value, (int, float)) and value == 0)
    if not is_zero or not isinstance(pad, (tuple, list)) or len(pad) % 2:
        return None
    return tuple(pad) if all(type(n) is int and n >= 0 for n in pad) else None
