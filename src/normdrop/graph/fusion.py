"""Find what can be fused with batch normalization in a model, and put it there.

A pattern, such as BN → add → ReLU, has a scope: the smallest module in whose forward all of it
happens. The scope is traced again with everything a leaf but the modules on the way to the
pattern, for training and for evaluation, and gets a forward of its own that runs the rewritten
code; see :class:`~normdrop.graph.forward.FusedForward`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from normdrop.graph.forward import Code, FusedForward
from normdrop.graph.modules import has_hooks, is_fusible_norm, is_norm
from normdrop.graph.nodes import name_of
from normdrop.graph.norm import batch_norm
from normdrop.graph.patterns import Pattern, find_patterns, path_of, rewrite
from normdrop.graph.scopes import find_traces
from normdrop.graph.shortcuts import find_shortcuts
from normdrop.graph.tracing import TENSOR, Call, Trace, Untraceable, looks_through, trace
from normdrop.ops.activations import slope_of

__all__ = ["find", "fused_in", "inside_fused", "reasons_against", "remove"]


@dataclass
class _Place:
    """What a scope was called with, and what lies in it.

    Attributes:
        arguments: TENSOR or a constant for each.
        norms: those that are to be fused.
        inner: the modules between the scope and its patterns.
        beside: those that are called between a norm and the addition that it waits for.
    """

    arguments: tuple[Any, ...]
    norms: set[torch.nn.Module] = field(default_factory=set)
    inner: set[torch.nn.Module] = field(default_factory=set)
    beside: set[torch.nn.Module] = field(default_factory=set)


def find(model: torch.nn.Module) -> list[FusedForward]:
    """The forwards that scopes and shortcuts of a model are to get; it stays as it is."""
    search = _Search(model)
    built = [_build(module, place) for module, place in search.places.items()]
    return [*filter(None, built), *find_shortcuts(model)]


def reasons_against(model: torch.nn.Module) -> dict[int, str]:
    """For the norms that are not fused, by id, why not."""
    search = _Search(model)
    result = {id(norm): text for norm, text in search.against.items()}
    for outer in model.modules():  # the innermost has the last word
        why = search.failures.get(outer)
        if why is not None:
            for norm in filter(is_norm, outer.modules()):
                if norm not in search.against:
                    result[id(norm)] = f"the code of {type(outer).__name__} is not traced: {why}"
    for norm in filter(is_norm, model.modules()):
        if has_hooks(norm):
            result[id(norm)] = "it has a hook"
    return result


def fused_in(model: torch.nn.Module) -> Iterator[tuple[int, str]]:
    """The norms that are fused by now, by id, with what."""
    for module in model.modules():
        forward = vars(module).get("forward")
        if isinstance(forward, FusedForward):
            yield from ((id(norm), text) for norm, text in forward.fused)


def inside_fused(modules: Iterable[torch.nn.Module]) -> set[torch.nn.Module]:
    """What convert's code replaces: it calls none of these, and steps aside where one has a hook.

    The code of a folded model, of a class of its own, is for evaluation without autograd.
    """
    forwards = (vars(module).get("forward") for module in modules)
    return {
        module
        for forward in forwards
        if type(forward) is FusedForward
        for module in (*forward.looked_into, *forward.participants)
    }


def remove(model: torch.nn.Module) -> None:
    """Take the fused forwards away."""
    for module in model.modules():
        if isinstance(vars(module).get("forward"), FusedForward):
            del vars(module)["forward"]


def _has_norm(module: torch.nn.Module) -> bool:
    return any(is_fusible_norm(inner) for inner in module.modules())


class _Search:
    """The patterns of a model.

    Attributes:
        places: where there are some.
        against: norms that a graph has outside of patterns, and why.
        failures: modules that cannot be traced, and why.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.places: dict[torch.nn.Module, _Place] = {}
        self.against: dict[torch.nn.Module, str] = {}
        self.failures: dict[torch.nn.Module, str] = {}
        for found in find_traces(model, lambda _: (True, False), self.failures, _has_norm):
            patterns = _patterns_in(found)
            for pattern in patterns:
                _place(pattern, found, self.places)
            self.against.update(_reasons(found, patterns))


def _patterns_in(found: Trace) -> list[Pattern]:
    """What is fused with the norms of a graph."""
    heads = [
        node
        for node in _norms(found)
        if not node.kwargs and len(node.args) == 1 and isinstance(node.args[0], Node)
    ]
    # SiLU is a pass of its own in the operator, too.
    patterns = find_patterns(found, heads, lambda name: slope_of(name) is not None, drops=True)
    return [pattern for pattern in patterns if pattern.add or pattern.activation]


def _norms(found: Trace) -> list[Node]:
    return [node for node, module in found.modules.items() if is_fusible_norm(module)]


def _reasons(found: Trace, patterns: list[Pattern]) -> Iterator[tuple[torch.nn.Module, str]]:
    """The norms of a graph that no pattern has, each with why."""
    fused = {pattern.head for pattern in patterns}
    taken = {node for pattern in patterns for node in pattern.chain}
    for node in _norms(found):
        if node not in fused:
            yield found.modules[node], _reason(path_of(node, found)[-1], found, taken)


def _reason(norm: Node, found: Trace, taken: set[Node]) -> str:
    users = list(norm.users)
    if len(users) != 1:
        return f"its output is used {len(users) or 'no'} times"
    (user,) = users
    if user.op == "output":
        return f"its output is what {type(found.root).__name__} returns"
    if user in taken:
        return "the sum it goes into is fused with the other summand"
    if user.op == "call_module":
        module = found.modules[user]
        hooked = ", which has a hook" if has_hooks(module) else ""
        return f"{type(module).__name__} follows{hooked}"
    return f"{name_of(user)} follows"


def _place(pattern: Pattern, found: Trace, places: dict[torch.nn.Module, _Place]) -> None:
    """Note the scope of a pattern."""
    chains = [found.calls[node] for node in pattern.chain]
    depth = 0
    while all(depth < len(chain) and chain[depth] is chains[0][depth] for chain in chains):
        depth += 1
    while depth > 1 and not _can_be_scope(chains[0][depth - 1]):
        depth -= 1
    call = chains[0][depth - 1]
    place = places.setdefault(call.module, _Place(call.arguments or ()))
    place.norms.add(found.modules[pattern.head])
    place.inner.update(c.module for chain in chains for c in chain[depth:])
    if pattern.add is not None:
        nodes = list(found.graph.nodes)
        between = nodes[nodes.index(pattern.head) : nodes.index(pattern.add)]
        # A call that is under way at both ends is under way between them.
        place.beside.update(c.module for node in between for c in found.calls[node][depth:])


def _can_be_scope(call: Call) -> bool:
    return call.arguments is not None and TENSOR in call.arguments


def _build(module: torch.nn.Module, place: _Place) -> FusedForward | None:
    codes: dict[bool, Code] = {}
    looked_into: dict[torch.nn.Module, None] = {}
    taking_part: dict[torch.nn.Module, None] = {}
    fused: dict[torch.nn.Module, str] = {}
    for training in (True, False):
        found, patterns = _patterns_of(module, training, place)
        if found is None:
            continue
        for call in (call for calls in found.calls.values() for call in calls):
            looked_into[call.module] = None
        chains = (node for pattern in patterns for node in pattern.chain)
        taking_part.update((found.modules[n], None) for n in chains if n in found.modules)
        fused.update({found.modules[p.head]: p.text() for p in patterns})
        codes[training] = Code(rewrite(found, patterns, batch_norm))
    if not codes:
        return None
    looked_into.pop(module, None)
    return FusedForward(
        module, place.arguments, codes, list(looked_into), list(taking_part), list(fused.items())
    )


def _patterns_of(
    module: torch.nn.Module, training: bool, place: _Place
) -> tuple[Trace | None, list[Pattern]]:
    """The scope traced with as few modules looked into as will do, or else with all."""
    best: tuple[Trace | None, list[Pattern]] = (None, [])
    for looks_into in (
        place.inner.__contains__,
        (place.inner | place.beside).__contains__,
        looks_through,
    ):
        try:
            found = trace(module, training, place.arguments, looks_into)
        except Untraceable:
            continue
        patterns = _patterns_in(found)
        if place.norms <= {found.modules[pattern.head] for pattern in patterns}:
            return found, patterns
        if len(patterns) > len(best[1]):
            best = found, patterns
    return best
