"""Where oneDNN's layout, channels last, must not be seen: edits of the record of a forward.

Nearly all of torch takes any strides and gives the same numbers. ``view`` does not, nor perhaps do
functions and modules that others wrote; those get their tensors as the model would have given them.
"""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F

from normdrop.surgery.fold_calls import AddActivate, as_given, convolution
from normdrop.surgery.fold_match import Scope, does_more
from normdrop.surgery.fusion_modules import is_plain_tensor_module
from normdrop.surgery.fusion_patterns import may_write, only_user

__all__ = ["hide_layout", "writes"]

Node = torch.fx.Node

_SEE_STRIDES = frozenset(
    {
        *("view", "view_as", "unflatten", "as_strided", "view_as_real", "view_as_complex"),
        *("stride", "is_contiguous", "data_ptr", "storage_offset", "untyped_storage", "resize_"),
        *("set_", "swapdims_", "multi_head_attention_forward"),
    }
)
"""Names of methods and functions of torch that depend on strides."""

_ALIASES = (
    torch.nn.Identity,
    torch.nn.Flatten,
    torch.nn.Unflatten,
    torch.nn.modules.dropout._DropoutNd,
)
"""Modules that give their input, or a view of it."""

_COMPUTING = frozenset(
    {
        *(convolution, torch.cat, torch.stack, torch.add, torch.sub, torch.mul, torch.div),
        *(torch.relu, torch.sigmoid, torch.tanh, torch.matmul, torch.mean, torch.sum),
        *(operator.add, operator.sub, operator.mul, operator.truediv, operator.matmul),
        *(F.relu, F.relu6, F.silu, F.hardswish, F.leaky_relu, F.gelu, F.sigmoid, F.linear),
        *(F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d),
    }
)


def hide_layout(scope: Scope) -> bool:
    """Give what depends on strides tensors in the layout of the model's inputs.

    Returns:
        Whether that can be done: not where a copy would hide from one what another writes.
    """
    graph = scope.trace.graph
    touched: set[Node] = set()  # what may come from a convolution
    for node in graph.nodes:
        if node.target is convolution or touched.intersection(node.all_input_nodes):
            touched.add(node)
    wary = [node for node in graph.nodes if node in touched and not _takes_any(node, scope)]
    copying = [node for node in touched if _may_copy(node)]
    if not _can_copy(scope, {*wary, *copying}):
        return False
    inputs = graph.find_nodes(op="placeholder")
    for node in wary:
        for given in [given for given in node.all_input_nodes if given in touched]:
            with graph.inserting_before(node):
                node.replace_input_with(given, graph.call_function(as_given, (given, *inputs)))
    return True


def writes(node: Node, scope: Scope) -> bool:
    """Whether a node may write to a tensor that it is given."""
    if node.target is convolution:
        return False
    module = scope.trace.modules.get(node)
    if isinstance(module, AddActivate):
        return does_more(module)
    return may_write(node, scope.trace)


def _takes_any(node: Node, scope: Scope) -> bool:
    """Whether a node gives the same for any strides of the tensors that it is given."""
    if node.op == "call_module":
        module = scope.trace.modules[node]
        is_known = is_plain_tensor_module(module) or isinstance(module, AddActivate)
        return is_known and not does_more(module) and type(module) is not torch.nn.Unflatten
    if node.op == "output":
        return False
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    home = getattr(node.target, "__module__", None) or "torch"
    is_torchs = node.op == "call_method" or home.startswith(("torch", "_operator"))
    return node.target is convolution or (is_torchs and name not in _SEE_STRIDES)


def _may_copy(node: Node) -> bool:
    """Whether a node gives a view, or else a copy, as strides allow."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op != "output" and name in (
        "reshape",
        "reshape_as",
        "flatten",
        "ravel",
        "contiguous",
    )


def _can_copy(scope: Scope, nodes: set[Node]) -> bool:
    """Whether nobody sees that these get or give copies, since what is written is seen by none."""
    fresh: set[Node] = set()
    is_seen = any(node.op != "output" for node in nodes) or any(
        isinstance(module, torch.nn.Flatten) for module in scope.trace.modules.values()
    )
    if not is_seen:
        return True
    for node in scope.trace.graph.nodes:
        if not writes(node, scope):
            if _computes(node, scope):
                fresh.add(node)
            continue
        if node in nodes:
            if any(only_user(given) is not node for given in node.all_input_nodes):
                return False
            continue
        given = node.args[0] if node.args else None
        if given not in fresh:
            return False
        others = (user for user in given.users if user is not node)
        if not all(_computes(user, scope) for user in others):
            return False
        fresh.add(node)
    return True


def _computes(node: Node, scope: Scope) -> bool:
    """Whether a node gives a new tensor."""
    if node.op != "call_module":
        return node.target in _COMPUTING
    module = scope.trace.modules[node]
    return (
        is_plain_tensor_module(module)
        and not isinstance(module, _ALIASES)
        and not getattr(module, "inplace", False)
        and not does_more(module)
    )
