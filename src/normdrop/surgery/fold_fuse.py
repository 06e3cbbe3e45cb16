"""Let folded layers add and activate: edits of the record of a forward."""

from __future__ import annotations

from typing import Any

import torch

from normdrop.surgery.fold_layers import AddActivate, FoldedConv2d, FoldedLinear
from normdrop.surgery.fold_match import (
    Matches,
    between,
    is_mutating,
    name_of_activation,
    summands,
)
from normdrop.surgery.fold_scopes import Scope, has_hooks

__all__ = ["fuse"]

Node = torch.fx.Node

_FRESH = (
    FoldedConv2d,
    torch.nn.Conv2d,
    torch.nn.MaxPool2d,
    torch.nn.AvgPool2d,
    torch.nn.BatchNorm2d,
)
"""Layers that give a new tensor and keep no reference to what they get."""


def fuse(scope: Scope, matches: Matches) -> bool:
    """Edit the record so that folded layers do what follows them; say whether any does."""
    for match in matches.found:
        if match.scope is scope:
            _absorb_norm(scope, match.layer_node, match.norm_node)
    calls = scope.graph.find_nodes(op="call_module")
    # From the end: of two convolutions that are added, the later one adds.
    for node in reversed([n for n in calls if _is_folded(scope, n)]):
        _absorb_what_follows(scope, node)
    fused = [n for n in scope.graph.nodes if _is_folded(scope, n) and n.kwargs]
    for node in fused:
        if _may_overwrite(scope, node):
            node.kwargs = {**node.kwargs, "overwrite": True}
    scope.graph.lint()
    return bool(fused)


def _is_folded(scope: Scope, node: Node) -> bool:
    return node.op == "call_module" and type(scope.at(node.target)) in (FoldedConv2d, FoldedLinear)


def _absorb_norm(scope: Scope, layer: Node, norm: Node) -> None:
    """Call the layer instead of what stands where its batch normalization was."""
    stand_in = scope.at(norm.target)
    kwargs: dict[str, Any] = {}
    if isinstance(stand_in, AddActivate):
        if not _is_folded(scope, layer):
            return
        residual = norm.args[1] if len(norm.args) > 1 else norm.kwargs.get("residual")
        if residual is not None:
            kwargs["residual"] = residual
        if stand_in.activation is not None:
            kwargs["activation"] = stand_in.activation
    _put(scope, layer, norm, kwargs)


def _absorb_what_follows(scope: Scope, node: Node) -> None:
    """Let the layer add the residual and apply the activation that alone read its output."""
    while len(node.users) == 1 and "activation" not in node.kwargs:
        after = next(iter(node.users))
        if any(is_mutating(other, scope) for other in between(node, after)):
            return
        activation = name_of_activation(scope, after)
        if activation is not None:
            node = _put(scope, node, after, {**node.kwargs, "activation": activation})
            continue
        pair = summands(after)
        if pair is None or "residual" in node.kwargs:
            return
        residual = pair[0] if pair[1] is node else pair[1]
        if is_mutating(after, scope) and residual is pair[0] and not _is_only_here(scope, residual):
            return  # The sum is written into a tensor that others read.
        node = _put(scope, node, after, {**node.kwargs, "residual": residual})


def _is_only_here(scope: Scope, node: Node) -> bool:
    return len(node.users) == 1 and _is_fresh(scope, node)


def _is_fresh(scope: Scope, node: Node) -> bool:
    if node.op != "call_module":
        return False
    module = scope.at(node.target)
    return type(module) in _FRESH and not has_hooks(module)


def _put(scope: Scope, layer: Node, after: Node, kwargs: dict[str, Any]) -> Node:
    """Call the layer with these keywords in the place of a node that follows it."""
    with scope.graph.inserting_before(after):
        new = scope.graph.call_module(str(layer.target), layer.args, kwargs)
    after.replace_all_uses_with(new)
    scope.graph.erase_node(after)
    scope.graph.erase_node(layer)
    return new


def _may_overwrite(scope: Scope, node: Node) -> bool:
    """Whether nobody reads the residual after the node, so that its memory may take the sum."""
    residual = node.kwargs.get("residual")
    if not isinstance(residual, Node) or residual in node.args or not _is_fresh(scope, residual):
        return False
    for user in residual.users:
        if user is node:
            continue
        if not _is_fresh(scope, user) or not user < node:
            return False
        if user.kwargs.get("residual") is residual and user.kwargs.get("overwrite"):
            return False
    return True
