"""Let folded convolutions add and activate: edits of the record of a forward."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F

from normdrop.ops.reference import leaky_relu_of
from normdrop.surgery.fold_calls import AddActivate, convolution, is_plain_call
from normdrop.surgery.fold_layout import hide_layout, writes
from normdrop.surgery.fold_match import Scope, does_more
from normdrop.surgery.fusion_forward import Code, FusedForward
from normdrop.surgery.fusion_patterns import only_user

__all__ = ["fuse"]

Node = torch.fx.Node

_MODULES: dict[type[torch.nn.Module], str] = {
    torch.nn.ReLU: "relu",
    torch.nn.ReLU6: "relu6",
    torch.nn.SiLU: "silu",
    torch.nn.Hardswish: "hardswish",
}
_FUNCTIONS: dict[Any, str] = {
    **dict.fromkeys((torch.relu, torch.relu_, F.relu, F.relu_, "relu", "relu_"), "relu"),
    F.relu6: "relu6",
    F.silu: "silu",
    F.hardswish: "hardswish",
}
_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
_IN_PLACE = (operator.iadd, "add_")

_FRESH = (
    torch.nn.Conv2d,
    torch.nn.MaxPool2d,
    torch.nn.AvgPool2d,
    torch.nn.BatchNorm2d,
)
"""Layers that give a new tensor and keep no reference to what they get."""


class FoldedForward(FusedForward):
    """The edited record of a module's forward; where it does not hold, the class's own forward.

    That gives the same numbers with less fused, and is what torch.compile, torch.export and
    torch.jit.trace see.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not is_plain_call():
            return type(self.module).forward(self.module, *args, **kwargs)
        return super().__call__(*args, **kwargs)


def fuse(scope: Scope, convolutions: list[Node]) -> None:
    """Let convolutions do what follows them, and let the module's forward call them so."""
    graph, modules = scope.trace.graph, scope.trace.modules
    if not convolutions:
        return
    # Everything that is called must stay what it is; a hook set later would see another layout.
    called = [module for module in modules.values() if not does_more(module)]
    for node in [n for n, m in modules.items() if type(m) is torch.nn.Identity]:
        if not does_more(modules[node]) and len(node.args) == 1 and isinstance(node.args[0], Node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
            del modules[node], scope.trace.calls[node]
    made = []
    for node in convolutions:
        with graph.inserting_before(node):
            layer = graph.create_node("get_attr", str(node.target))
        made.append(_put(scope, node, node, (layer, *node.args), {}))
    # From the end: of two convolutions that are added, the later one adds.
    for node in reversed(made):
        _absorb_what_follows(scope, node)
    if not hide_layout(scope):
        return
    for node in graph.find_nodes(op="call_function", target=convolution):
        residual = node.kwargs.get("residual")
        if isinstance(residual, Node) and _may_overwrite(scope, node, residual):
            node.kwargs = {**node.kwargs, "overwrite": True}
    graph.lint()
    inside = (call.module for calls in scope.trace.calls.values() for call in calls)
    forward = FoldedForward(
        scope.module,
        scope.arguments,
        {scope.module.training: Code(graph)},
        [m for m in dict.fromkeys(inside) if m is not scope.module],
        list(dict.fromkeys(called)),
        [],
    )
    vars(scope.module)["forward"] = forward
    forward.prepare()


def _absorb_what_follows(scope: Scope, node: Node) -> None:
    """Let the convolution add the residual and apply the activation that alone read its output."""
    while "activation" not in node.kwargs:
        after = only_user(node)
        if after is None or any(writes(n, scope) for n in _between(node, after)):
            return
        does = _does(scope, node, after)
        if does is None or does.keys() & node.kwargs.keys():
            return
        node = _put(scope, node, after, node.args, {**node.kwargs, **does})


def _put(
    scope: Scope, node: Node, after: Node, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Node:
    """Call the convolution in the place of itself or of a node that follows it."""
    graph = scope.trace.graph
    with graph.inserting_before(after):
        new = graph.call_function(convolution, args, kwargs)
    after.replace_all_uses_with(new)
    modules, calls = scope.trace.modules, scope.trace.calls
    modules[new], calls[new] = modules[node], calls[node]
    for old in dict.fromkeys((after, node)):
        graph.erase_node(old)
        modules.pop(old, None)
        calls.pop(old)
    return new


def _does(scope: Scope, node: Node, after: Node) -> dict[str, Any] | None:
    """Say by what arguments a convolution does what the node after it does, if any."""
    module = scope.trace.modules.get(after)
    if module is not None and does_more(module):
        return None
    if type(module) is AddActivate:
        residual = after.args[1] if len(after.args) > 1 else after.kwargs.get("residual")
        given = {"residual": residual, "activation": module.activation}
        is_summand = after.args[:1] == (node,) and module.dims is None
        return {k: v for k, v in given.items() if v is not None} if is_summand else None
    if module is not None:
        is_leaky = type(module) is torch.nn.LeakyReLU
        activation = (
            leaky_relu_of(module.negative_slope) if is_leaky else _MODULES.get(type(module))
        )
    elif after.target in (F.leaky_relu, F.leaky_relu_):
        return _leaky(node, after)
    else:
        activation = _FUNCTIONS.get(after.target)
    if activation is not None:
        # The second argument of the functions is inplace.
        is_alone = len(after.args) <= 2 and not set(after.kwargs) - {"inplace"}
        return {"activation": activation} if is_alone and after.args[:1] == (node,) else None
    if after.target not in _ADDITIONS or len(after.args) != 2 or after.kwargs:
        return None
    first, second = after.args
    if not (isinstance(first, Node) and isinstance(second, Node)):
        return None
    if after.target not in _IN_PLACE:
        return {"residual": second if first is node else first}
    if first is node:
        return {"residual": second, "writes": True}
    # The sum is written into the other summand, which others may read.
    return {"residual": first} if only_user(first) is after and _is_fresh(scope, first) else None


def _leaky(node: Node, after: Node) -> dict[str, Any] | None:
    """What a convolution does for ``leaky_relu(input, negative_slope=0.01, inplace=False)``."""
    options = dict(after.kwargs)
    slope = after.args[1] if len(after.args) > 1 else options.pop("negative_slope", 0.01)
    options.pop("inplace", None)
    activation = leaky_relu_of(slope)
    if options or activation is None or after.args[:1] != (node,):
        return None
    return {"activation": activation}


def _between(first: Node, last: Node) -> list[Node]:
    nodes, node = [], first.next
    while node is not last:
        nodes.append(node)
        node = node.next
    return nodes


def _is_fresh(scope: Scope, node: Node) -> bool:
    module = scope.trace.modules.get(node)
    return (
        module is not None
        and type(module) in _FRESH
        and not does_more(module)
        and not getattr(module, "return_indices", False)
    )


def _may_overwrite(scope: Scope, node: Node, residual: Node) -> bool:
    """Whether nobody reads the residual after the node, so that its memory may take the sum."""
    if residual in node.args or not _is_fresh(scope, residual):
        return False
    others = (user for user in residual.users if user is not node)
    return all(_is_fresh(scope, user) and user < node for user in others)
