"""Let the convolutions of a folded model add and activate: edits of the record of a forward."""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch.fx import Node

from normdrop.graph.convolution import can_activate, convolution, is_plain_call
from normdrop.graph.forward import Code, FusedForward
from normdrop.graph.layout import hide_layout
from normdrop.graph.modules import does_more
from normdrop.graph.nodes import gives_new_tensor
from normdrop.graph.patterns import find_patterns, rewrite
from normdrop.graph.tracing import Trace
from normdrop.nn.add_activate import AddActivate
from normdrop.ops.activations import slope_of

__all__ = ["FoldedForward", "absorb"]


class FoldedForward(FusedForward):
    """The edited record of a module's forward; where it does not hold, the class's own forward.

    That gives the same numbers with less fused, and is what torch.compile, torch.export and
    torch.jit.trace see.
    """

    def may_run(self) -> bool:
        return is_plain_call()


def absorb(trace: Trace, convolutions: list[Node]) -> None:
    """Let convolutions do what follows them, and let the module's forward call them so."""
    graph, modules = trace.graph, trace.modules
    if not convolutions:
        return
    inside = dict.fromkeys(call.module for calls in trace.calls.values() for call in calls)
    # Everything that is called must stay what it is; a hook set later would see another layout.
    called = dict.fromkeys(module for module in modules.values() if not does_more(module))
    for node, module in list(modules.items()):
        if not does_more(module):
            _spell_out(node, module, trace)
    # From the end: of two convolutions that are added, the later one adds.
    patterns = find_patterns(trace, reversed(convolutions), can_activate)
    rewrite(trace, patterns, convolution)
    if not hide_layout(trace):
        return
    for node in graph.find_nodes(op="call_function", target=convolution):
        if isinstance(node.args[2], Node) and _may_overwrite(node, node.args[2], trace):
            node.kwargs = {"overwrite": True}
    graph.lint()
    inside.pop(trace.root)
    codes = {trace.training: Code(graph)}
    FoldedForward(trace.root, trace.arguments, codes, list(inside), list(called), []).install()


def _spell_out(node: Node, module: torch.nn.Module, trace: Trace) -> None:
    """Take away what stands where a norm was: an Identity, or an addition and an activation."""
    y = node.args[0] if node.args else None
    if not isinstance(y, Node):
        return
    if isinstance(module, AddActivate) and module.dims is None:
        residual = node.args[1] if len(node.args) > 1 else node.kwargs.get("residual")
        with trace.graph.inserting_before(node):
            if residual is not None:
                y = trace.graph.call_function(operator.add, (y, residual))
            if module.activation is not None:
                slope = slope_of(module.activation)
                if slope is None:
                    y = trace.graph.call_function(F.silu, (y,))
                elif slope == 0.0:
                    y = trace.graph.call_function(torch.relu, (y,))
                else:
                    y = trace.graph.call_function(F.leaky_relu, (y, slope))
    elif type(module) is not torch.nn.Identity or len(node.args) != 1:
        return
    node.replace_all_uses_with(y)
    trace.graph.erase_node(node)
    del trace.modules[node], trace.calls[node]


def _may_overwrite(node: Node, residual: Node, trace: Trace) -> bool:
    """Whether nobody reads the residual after the node, so that its memory may take the sum."""
    if residual is node.args[1] or not gives_new_tensor(residual, trace):
        return False
    others = (user for user in residual.users if user is not node)
    return all(gives_new_tensor(user, trace) and user < node for user in others)
