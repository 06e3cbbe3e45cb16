"""Where oneDNN's layout, channels last, must not be seen: edits of the record of a forward.

Nearly all of torch takes any strides and gives the same numbers. ``view`` does not, nor perhaps do
functions and modules that others wrote; those get their tensors as the model would have given them.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from normdrop.graph.convolution import as_given, convolution
from normdrop.graph.modules import does_more, gives_one_tensor
from normdrop.graph.nodes import gives_new_tensor, may_write, name_of, only_user
from normdrop.graph.tracing import Trace

__all__ = ["hide_layout"]

_SEE_STRIDES = frozenset(
    {
        *("view", "view_as", "unflatten", "as_strided", "view_as_real", "view_as_complex"),
        *("stride", "is_contiguous", "data_ptr", "storage_offset", "untyped_storage", "resize_"),
        *("set_", "swapdims_", "multi_head_attention_forward"),
    }
)
"""Names of methods and functions of torch that depend on strides."""

_MAY_COPY = frozenset({"reshape", "reshape_as", "flatten", "ravel", "contiguous"})


def hide_layout(trace: Trace) -> bool:
    """Give what depends on strides tensors in the layout of the model's inputs.

    Returns:
        Whether that can be done: not where a copy would hide from one what another writes.
    """
    graph = trace.graph
    touched: set[Node] = set()  # what may come from a convolution
    for node in graph.nodes:
        if node.target is convolution or touched.intersection(node.all_input_nodes):
            touched.add(node)
    wary = [node for node in graph.nodes if node in touched and not _takes_any(node, trace)]
    copying = [node for node in touched if _may_copy(node)]
    if not _can_copy(trace, {*wary, *copying}):
        return False
    inputs = graph.find_nodes(op="placeholder")
    for node in wary:
        for given in [given for given in node.all_input_nodes if given in touched]:
            with graph.inserting_before(node):
                node.replace_input_with(given, graph.call_function(as_given, (given, *inputs)))
    return True


def _takes_any(node: Node, trace: Trace) -> bool:
    """Whether a node gives the same for any strides of the tensors that it is given."""
    if node.op == "call_module":
        module = trace.modules[node]
        is_known = gives_one_tensor(module) and not does_more(module)
        return is_known and type(module) is not torch.nn.Unflatten
    if node.op == "output":
        return False
    home = getattr(node.target, "__module__", None) or "torch"
    is_torchs = node.op == "call_method" or home.startswith(("torch", "_operator"))
    return node.target is convolution or (is_torchs and name_of(node) not in _SEE_STRIDES)


def _may_copy(node: Node) -> bool:
    """Whether a node gives a view, or else a copy, as strides allow."""
    return node.op != "output" and name_of(node) in _MAY_COPY


def _can_copy(trace: Trace, nodes: set[Node]) -> bool:
    """Whether nobody sees that these get or give copies, since what is written is seen by none."""
    fresh: set[Node] = set()
    is_seen = any(node.op != "output" for node in nodes) or any(
        isinstance(module, torch.nn.Flatten) for module in trace.modules.values()
    )
    if not is_seen:
        return True
    for node in trace.graph.nodes:
        if not may_write(node, trace):
            if gives_new_tensor(node, trace):
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
        if not all(gives_new_tensor(user, trace) for user in others):
            return False
        fresh.add(node)
    return True
