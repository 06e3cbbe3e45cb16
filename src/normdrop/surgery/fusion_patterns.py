"""Where batch normalization is followed by what one operator can do with it."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from normdrop.ops.reference import leaky_relu_of
from normdrop.surgery.fusion_call import batch_norm
from normdrop.surgery.fusion_modules import DROPOUTS, has_hooks, is_fusible_norm
from normdrop.surgery.fusion_tracing import IN_PLACE, Trace

__all__ = [
    "Pattern",
    "find_patterns",
    "may_write",
    "only_user",
    "participants",
    "reasons",
    "rewrite",
]

_F = torch.nn.functional

_ADD = (operator.add, operator.iadd, torch.add)
_RELU = (torch.relu, torch.relu_, _F.relu, _F.relu_)
_LEAKY = (_F.leaky_relu, _F.leaky_relu_)

# Convolutions and products give a tensor that nobody else has.
_FRESH_MODULES = (torch.nn.modules.conv._ConvNd, torch.nn.Linear)
_FRESH_FUNCTIONS = frozenset(
    {
        *(torch.conv1d, torch.conv2d, torch.conv3d, _F.linear, torch.matmul, torch.cat),
        *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
    }
)


@dataclass
class Pattern:
    """BN, then perhaps an addition, an activation, dropout: nodes of one graph.

    ``chain`` has them all in their order, with the Identity modules that lie between them.
    """

    norm: Node
    add: Node | None = None
    residual: Node | None = None
    activation: str | None = None
    act: Node | None = None
    dropout: Node | None = None
    chain: list[Node] = field(default_factory=list)

    def text(self) -> str:
        """What is fused with the norm."""
        names = (
            "add" if self.add else None,
            self.activation,
            "dropout" if self.dropout else None,
        )
        return "with " + ", ".join(filter(None, names))


def find_patterns(trace: Trace) -> list[Pattern]:
    """All patterns of a graph; none shares a node with another."""
    found: list[Pattern] = []
    order = {node: i for i, node in enumerate(trace.graph.nodes)}
    taken: set[Node] = set()
    for node in _norms(trace):
        if node.kwargs or len(node.args) != 1 or not isinstance(node.args[0], Node):
            continue
        pattern = _follow(node, trace, order)
        # Where both summands are normalized, the first takes the addition.
        if pattern is not None and pattern.add in taken:
            pattern = None
        if pattern is not None:
            found.append(pattern)
            taken.update(pattern.chain)
    return found


def _norms(trace: Trace) -> list[Node]:
    return [node for node, module in trace.modules.items() if is_fusible_norm(module)]


def reasons(trace: Trace, patterns: list[Pattern]) -> Iterator[tuple[torch.nn.Module, str]]:
    """The norms of a graph that no pattern has, each with why."""
    fused = {pattern.norm for pattern in patterns}
    taken = {node for pattern in patterns for node in pattern.chain}
    for node in _norms(trace):
        if node not in fused:
            yield trace.modules[node], _reason(node, trace, taken)


def _reason(norm: Node, trace: Trace, taken: set[Node]) -> str:
    path = _path(norm, trace)
    norm, users = path[-1], list(path[-1].users)
    if len(users) != 1:
        return f"its output is used {len(users) or 'no'} times"
    (user,) = users
    if user.op == "output":
        return f"its output is what {type(trace.root).__name__} returns"
    if user in taken:
        return "the sum it goes into is fused with the other summand"
    if user.op == "call_module":
        module = trace.modules[user]
        hooked = ", which has a hook" if has_hooks(module) else ""
        return f"{type(module).__name__} follows{hooked}"
    name = user.target if isinstance(user.target, str) else user.target.__name__
    return f"{name} follows"


def _follow(norm: Node, trace: Trace, order: dict[Node, int]) -> Pattern | None:
    pattern = Pattern(norm)
    path = _path(norm, trace)
    user = only_user(path[-1])
    if user is not None:
        residual = _residual(user, path[-1])
        if residual is not None and _may_wait(norm, user, trace, order):
            pattern.add, pattern.residual = user, residual
            pattern.chain += path
            path = _path(user, trace)
            user = only_user(path[-1])
    if user is not None:
        pattern.activation = _activation(user, trace)
        if pattern.activation is not None:
            pattern.act = user
            pattern.chain += path
            path = _path(user, trace)
            user = only_user(path[-1])
            if user is not None and _is_dropout(user, trace):
                pattern.dropout = user
                pattern.chain += path
                path = [user]
    if pattern.add is None and pattern.act is None:
        return None
    pattern.chain.append(path[0])
    return pattern


def _path(node: Node, trace: Trace) -> list[Node]:
    """The node and the Identity modules that its value goes through, and nowhere else."""
    path = [node]
    while (user := only_user(path[-1])) is not None and _is_plain(user, trace, torch.nn.Identity):
        path.append(user)
    return path


def only_user(node: Node) -> Node | None:
    """Who uses the node, if one does so once."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    uses: list[Node] = []
    torch.fx.map_arg((user.args, user.kwargs), uses.append)
    return user if uses.count(node) == 1 and user.op != "output" else None


def _residual(user: Node, norm: Node) -> Node | None:
    """The other summand, if this is an addition that writes to the norm's output or to nothing."""
    is_method = user.op == "call_method" and user.target in ("add", "add_")
    is_function = user.op == "call_function" and user.target in _ADD
    if not (is_method or is_function) or user.kwargs or len(user.args) != 2:
        return None
    first, second = user.args
    if not (isinstance(first, Node) and isinstance(second, Node)):
        return None
    if first is norm:
        return second
    return None if _writes(user) else first


def _writes(add: Node | None) -> bool:
    return add is not None and (add.target == "add_" or add.target is operator.iadd)


def _activation(user: Node, trace: Trace) -> str | None:
    if user.op == "call_module":
        module = trace.modules[user]
        if _is_plain(user, trace, torch.nn.ReLU):
            return "relu"
        is_leaky = _is_plain(user, trace, torch.nn.LeakyReLU)
        return leaky_relu_of(module.negative_slope) if is_leaky else None
    if user.op == "call_method":
        is_relu = user.target in ("relu", "relu_") and len(user.args) == 1 and not user.kwargs
        return "relu" if is_relu else None
    if user.op != "call_function":
        return None
    options: dict[str, Any] = dict(user.kwargs)
    options.pop("inplace", None)
    if user.target in _RELU:
        return "relu" if len(user.args) <= 2 and not options else None
    if user.target in _LEAKY:
        slope = user.args[1] if len(user.args) > 1 else options.pop("negative_slope", 0.01)
        return None if options else leaky_relu_of(slope)
    return None


def _is_dropout(user: Node, trace: Trace) -> bool:
    return any(_is_plain(user, trace, kind) for kind in DROPOUTS)


def _is_plain(user: Node, trace: Trace, kind: type[torch.nn.Module]) -> bool:
    """Whether this is a call of such a module with one argument that does no more than it says."""
    module = trace.modules.get(user)
    return (
        module is not None
        and type(module) is kind
        and len(user.args) == 1
        and not user.kwargs
        and "forward" not in vars(module)
        and not has_hooks(module)
    )


def _may_wait(norm: Node, add: Node, trace: Trace, order: dict[Node, int]) -> bool:
    """Whether the norm may be computed as late as the addition: nobody writes to x meanwhile."""
    x = norm.args[0]
    between = [n for n in trace.graph.nodes if order[norm] < order[n] < order[add]]
    # Running statistics move in the order of the calls.
    if any(trace.modules.get(n) is trace.modules[norm] for n in between):
        return False
    if not isinstance(x, Node):
        return False
    is_fresh = (x.op == "call_function" and x.target in _FRESH_FUNCTIONS) or (
        x.op == "call_module" and isinstance(trace.modules[x], _FRESH_MODULES)
    )
    return (is_fresh and len(x.users) == 1) or not any(may_write(n, trace) for n in between)


def may_write(node: Node, trace: Trace) -> bool:
    """Whether a node may write to a tensor that it is given."""
    if node.op == "call_module":
        return any(
            not type(module).__module__.startswith(("torch.nn.modules", "normdrop.nn."))
            or has_hooks(module)
            or bool(getattr(module, "inplace", False))
            for module in trace.modules[node].modules()
        )
    if node.op == "call_method":
        return str(node.target).endswith("_")
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "_")
        # A True by position may be the argument inplace.
        in_place = name.endswith("_") or name in IN_PLACE or any(a is True for a in node.args)
        return in_place or bool(node.kwargs.get("inplace")) or "out" in node.kwargs
    return False


def rewrite(trace: Trace, patterns: list[Pattern]) -> Graph:
    """Put one call in the place of each pattern."""
    graph = trace.graph
    replaced: dict[Node, Node] = {}
    for pattern in patterns:
        place = pattern.add or pattern.norm
        last = pattern.chain[-1]
        with graph.inserting_before(place):
            norm = graph.create_node("get_attr", pattern.norm.target)
            dropout = None
            if pattern.dropout is not None:
                dropout = graph.create_node("get_attr", pattern.dropout.target)
            x, residual, activation = pattern.norm.args[0], pattern.residual, pattern.activation
            if residual in replaced:  # by a pattern before, as in a residual network
                residual = replaced[residual]
            rest = (dropout, True) if _writes(pattern.add) else (dropout,)
            fused = graph.call_function(batch_norm, (norm, x, residual, activation, *rest))
        last.replace_all_uses_with(fused)
        replaced[last] = fused
        for node in reversed(pattern.chain):
            graph.erase_node(node)
    graph.lint()
    return graph


def participants(trace: Trace, patterns: list[Pattern]) -> Iterator[torch.nn.Module]:
    """The modules whose calls the patterns take in."""
    for pattern in patterns:
        for node in pattern.chain:
            if node in trace.modules:
                yield trace.modules[node]
