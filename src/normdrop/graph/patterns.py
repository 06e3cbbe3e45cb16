"""How additions, activations and dropout are spelled, and chains of them behind a layer."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from normdrop.graph.modules import DROPOUTS, does_more
from normdrop.graph.nodes import gives_new_tensor, may_write, only_user
from normdrop.graph.tracing import Trace
from normdrop.ops.activations import leaky_relu_of

__all__ = ["Pattern", "find_patterns", "path_of", "rewrite"]

_N = torch.nn

ACTIVATIONS: dict[Any, str] = {
    **dict.fromkeys((_N.ReLU, torch.relu, torch.relu_, F.relu, F.relu_, "relu", "relu_"), "relu"),
    **dict.fromkeys((_N.LeakyReLU, F.leaky_relu, F.leaky_relu_), "leaky_relu"),
    **dict.fromkeys((_N.ReLU6, F.relu6), "relu6"),
    **dict.fromkeys((_N.SiLU, F.silu), "silu"),
    **dict.fromkeys((_N.Hardswish, F.hardswish), "hardswish"),
}
"""What a class, a function or a method's name stands for."""

_ADDITIONS = frozenset({operator.add, operator.iadd, torch.add, "add", "add_"})
_IN_PLACE = (operator.iadd, "add_")


@dataclass
class Pattern:
    """A layer, then perhaps an addition, an activation, dropout: nodes of one graph.

    ``chain`` has them all in their order, with the Identity modules that lie between them.
    ``into`` says where an addition in place writes: to the layer's "output" or to the "residual".
    """

    head: Node
    add: Node | None = None
    residual: Node | None = None
    into: str | None = None
    activation: str | None = None
    dropout: Node | None = None
    chain: list[Node] = field(default_factory=list)

    def text(self) -> str:
        """What is fused with the layer."""
        names = ("add" if self.add else None, self.activation, "dropout" if self.dropout else None)
        return "with " + ", ".join(filter(None, names))


def find_patterns(
    trace: Trace, heads: Iterable[Node], applies: Callable[[str], bool], drops: bool = False
) -> list[Pattern]:
    """What follows some layers of a graph, each by itself; no two patterns share a node.

    Args:
        trace: the graph.
        heads: nodes that call the layers with one argument; where two of them are added, the one
            that comes first here takes the addition.
        applies: whether a layer can apply the activation of that name.
        drops: whether dropout may follow.
    """
    order = {node: i for i, node in enumerate(trace.graph.nodes)}
    taken: set[Node] = set()
    found = []
    for head in heads:
        pattern = _follow(head, trace, order, taken, applies, drops)
        taken.update(pattern.chain)
        found.append(pattern)
    return found


def _follow(
    head: Node,
    trace: Trace,
    order: dict[Node, int],
    taken: set[Node],
    applies: Callable[[str], bool],
    drops: bool,
) -> Pattern:
    pattern = Pattern(head)
    path = path_of(head, trace)

    def next_user() -> Node | None:
        user = only_user(path[-1])
        return None if user in taken else user

    user = next_user()
    if user is not None:
        residual, into = _other_summand(user, path[-1], trace)
        if residual is not None and _may_wait(head, user, trace, order):
            pattern.add, pattern.residual, pattern.into = user, residual, into
            pattern.chain += path
            path = path_of(user, trace)
            user = next_user()
    if user is not None:
        activation = _activation(user, path[-1], trace)
        if activation is not None and applies(activation):
            pattern.activation = activation
            pattern.chain += path
            path = path_of(user, trace)
            user = next_user() if drops else None
            if user is not None and any(_calls(user, trace, kind) for kind in DROPOUTS):
                pattern.dropout = user
                pattern.chain += path
                path = [user]
    pattern.chain.append(path[0])
    return pattern


def path_of(node: Node, trace: Trace) -> list[Node]:
    """The node and the Identity modules that its value goes through, and nowhere else."""
    path = [node]
    while (user := only_user(path[-1])) is not None and _calls(user, trace, torch.nn.Identity):
        path.append(user)
    return path


def _other_summand(user: Node, node: Node, trace: Trace) -> tuple[Node | None, str | None]:
    """What an addition adds to the node, and where it writes the sum, if to anything."""
    if user.target not in _ADDITIONS or user.kwargs or len(user.args) != 2:
        return None, None
    first, second = user.args
    if not (isinstance(first, Node) and isinstance(second, Node)):
        return None, None
    is_in_place = user.target in _IN_PLACE
    if first is node:
        return second, "output" if is_in_place else None
    if not is_in_place:
        return first, None
    # Others may see what is written to the other summand.
    is_unseen = only_user(first) is user and gives_new_tensor(first, trace)
    return (first, "residual") if is_unseen else (None, None)


def _activation(user: Node, node: Node, trace: Trace) -> str | None:
    """The name of the activation that is applied to the node."""
    module = trace.modules.get(user)
    name = ACTIVATIONS.get(user.target if module is None else type(module))
    if name is None or user.args[:1] != (node,):
        return None
    takes = ("negative_slope", "inplace") if name == "leaky_relu" else ("inplace",)
    options = dict(zip(takes, user.args[1:], strict=False)) | user.kwargs
    if len(user.args) > 1 + len(takes) or options.keys() - set(takes):
        return None
    slope = options.get("negative_slope", 0.01)
    if module is not None:
        if options or does_more(module):
            return None
        slope = getattr(module, "negative_slope", slope)
    return leaky_relu_of(slope) if name == "leaky_relu" else name


def _calls(user: Node, trace: Trace, kind: type[torch.nn.Module]) -> bool:
    """Whether this is a call of such a module with one argument that does no more than it says."""
    module = trace.modules.get(user)
    is_one = type(module) is kind and len(user.args) == 1 and not user.kwargs
    return is_one and not does_more(trace.modules[user])


def _may_wait(head: Node, add: Node, trace: Trace, order: dict[Node, int]) -> bool:
    """Whether the layer may be computed as late as the addition: nobody writes to x meanwhile."""
    x = head.args[0]
    between = [n for n in trace.graph.nodes if order[head] < order[n] < order[add]]
    # Running statistics move in the order of the calls.
    if any(trace.modules.get(n) is trace.modules[head] for n in between):
        return False
    if not isinstance(x, Node):
        return False
    is_unseen = gives_new_tensor(x, trace) and len(x.users) == 1
    return is_unseen or not any(may_write(n, trace) for n in between)


def rewrite(trace: Trace, patterns: list[Pattern], function: Callable[..., Any]) -> Graph:
    """Put one call in the place of each pattern.

    It is ``function(layer, x, residual, activation, into)``, with the dropout behind, if any.
    """
    graph = trace.graph
    replaced: dict[Node, Node] = {}
    for pattern in patterns:
        head, residual, last = pattern.head, pattern.residual, pattern.chain[-1]
        with graph.inserting_before(pattern.add or head):
            layer = graph.create_node("get_attr", head.target)
            # The residual may be of a pattern before, as in a residual network.
            given = [layer, *head.args, residual and replaced.get(residual, residual)]
            given += [pattern.activation, pattern.into]
            if pattern.dropout is not None:
                given.append(graph.create_node("get_attr", pattern.dropout.target))
            call = graph.call_function(function, tuple(given))
        last.replace_all_uses_with(call)
        replaced[last] = call
        for node in reversed(pattern.chain):
            graph.erase_node(node)
            trace.modules.pop(node, None)
    graph.lint()
    return graph
