"""Let the convolutions of a folded model add and activate: edits of the record of a forward."""

from __future__ import annotations

import operator
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from normdrop.errors import UserError
from normdrop.graph.convolution import can_activate, convolution, is_plain_call
from normdrop.graph.forward import Code, Facts, FusedForward, is_so
from normdrop.graph.layout import hide_layout
from normdrop.graph.modules import CONSTANTS, does_more
from normdrop.graph.nodes import gives_new_tensor
from normdrop.graph.patterns import find_patterns, rewrite
from normdrop.graph.tracing import TENSOR, Trace, Untraceable, looks_through, trace
from normdrop.graph.uses import is_pair
from normdrop.nn.add_activate import AddActivate
from normdrop.ops.activations import slope_of

__all__ = ["FoldedForward", "absorb"]


class FoldedForward(FusedForward):
    """The edited record of a module's forward; where it does not hold, the class's own forward.

    That gives the same numbers with less fused, and is what torch.compile, torch.export and
    torch.jit.trace see. With other arguments or attributes it may run another way, on which a layer
    is not followed by the norm that is folded into it; then a call raises UserError.

    Args:
        pairs: every layer that took a norm, with what stands in the norm's place.
    """

    def __init__(self, *args: Any, pairs: list[tuple[torch.nn.Module, torch.nn.Module]]) -> None:
        super().__init__(*args)
        self.pairs = pairs
        self._checked: Facts | None = None
        self._ways: set[tuple[Any, ...]] = set()

    def install(self) -> None:
        super().install()
        self._checked, self._ways = self.facts, {(self.module.training, self.arguments)}

    def may_run(self) -> bool:
        return is_plain_call()

    def check(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_dynamo_compiling():  # which cannot look at what traces
            if self.tensors(args, kwargs) is None or not is_so(self.facts):
                raise UserError(self._text())
            return
        given = self.given(args, kwargs)
        if given is None:
            return
        arguments = tuple(value if type(value) in CONSTANTS else TENSOR for value in given)
        way = (module.training, arguments)
        is_own, checked = module is self.module, self._checked
        is_as_checked = is_own and checked is not None and is_so(checked)
        if is_as_checked and way in self._ways:
            return
        parts = set(module.modules())
        pairs = [pair for pair in self.pairs if parts.issuperset(pair)]  # others were exchanged
        try:
            found = _uncompiled(trace)(module, module.training, arguments, _looks_into)
        except Untraceable as error:
            raise UserError(self._text()) from error
        if not all(is_pair(found, *pair) for pair in pairs):
            raise UserError(self._text())
        if is_as_checked:
            self._ways.add(way)
        elif is_own:
            self._checked, self._ways = self.noted(), {way}

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        if not state["facts"].forwards or self._checked is not self.facts:
            return {**state, "_checked": None, "_ways": set()}  # it is checked when called
        return state

    def _text(self) -> str:
        return (
            f"fold: expected {type(self.module).__name__} to run as when it was folded, but got "
            "other arguments or attributes, with which a layer may run without the batch "
            "normalization that is part of it now; fold the original once it is as it shall be"
        )


def _looks_into(module: torch.nn.Module) -> bool:
    return looks_through(module, with_hooks=True)


def _uncompiled(function: Any) -> Any:
    """The function, into which torch.compile does not look where it breaks a graph."""
    dynamo = sys.modules.get("torch._dynamo")
    return function if dynamo is None else dynamo.disable(function)


def absorb(
    record: Trace,
    convolutions: list[Node],
    pairs: list[tuple[torch.nn.Module, torch.nn.Module]],
) -> None:
    """Let convolutions do what follows them, and let the module's forward call them so."""
    if not convolutions and not pairs:
        return
    inside = dict.fromkeys(call.module for calls in record.calls.values() for call in calls)
    # Everything that is called must stay what it is; a hook set later would see another layout.
    called = dict.fromkeys(module for module in record.modules.values() if not does_more(module))
    codes = {}
    if convolutions and _edit(record, convolutions):
        codes[record.training] = Code(record.graph)
    inside.pop(record.root)
    FoldedForward(
        record.root, record.arguments, codes, list(inside), list(called), [], pairs=pairs
    ).install()


def _edit(record: Trace, convolutions: list[Node]) -> bool:
    """Edit the graph; False where the layout could be seen."""
    for node, module in list(record.modules.items()):
        if not does_more(module):
            _spell_out(node, module, record)
    # From the end: of two convolutions that are added, the later one adds.
    patterns = find_patterns(record, reversed(convolutions), can_activate)
    graph = rewrite(record, patterns, convolution)
    if not hide_layout(record):
        return False
    for node in graph.find_nodes(op="call_function", target=convolution):
        if isinstance(node.args[2], Node) and _may_overwrite(node, node.args[2], record):
            node.kwargs = {"overwrite": True}
    graph.lint()
    return True


def _spell_out(node: Node, module: torch.nn.Module, record: Trace) -> None:
    """Take away what stands where a norm was: an Identity, or an addition and an activation."""
    y = node.args[0] if node.args else None
    if not isinstance(y, Node):
        return
    if isinstance(module, AddActivate) and module.dims is None:
        residual = node.args[1] if len(node.args) > 1 else node.kwargs.get("residual")
        with record.graph.inserting_before(node):
            if residual is not None:
                y = record.graph.call_function(operator.add, (y, residual))
            if module.activation is not None:
                slope = slope_of(module.activation)
                if slope is None:
                    y = record.graph.call_function(F.silu, (y,))
                elif slope == 0.0:
                    y = record.graph.call_function(torch.relu, (y,))
                else:
                    y = record.graph.call_function(F.leaky_relu, (y, slope))
    elif type(module) is not torch.nn.Identity or len(node.args) != 1:
        return
    node.replace_all_uses_with(y)
    record.graph.erase_node(node)
    del record.modules[node], record.calls[node]


def _may_overwrite(node: Node, residual: Node, record: Trace) -> bool:
    """Whether nobody reads the residual after the node, so that its memory may take the sum."""
    if residual is node.args[1] or not gives_new_tensor(residual, record):
        return False
    others = (user for user in residual.users if user is not node)
    return all(gives_new_tensor(user, record) and user < node for user in others)
