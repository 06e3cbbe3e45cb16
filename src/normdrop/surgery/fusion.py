"""Find what can be fused in a model, and put it there.

A pattern, such as BN → add → ReLU, has a scope: the smallest module in whose forward all of it
happens. The scope is traced again with everything a leaf but the modules on the way to the
pattern, for training and for evaluation, and gets a forward of its own that runs the rewritten
code; see :class:`~normdrop.surgery.fusion_forward.FusedForward`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from normdrop.surgery.fusion_forward import Code, FusedForward
from normdrop.surgery.fusion_modules import has_hooks, is_fusible_norm, is_norm
from normdrop.surgery.fusion_patterns import (
    Pattern,
    find_patterns,
    participants,
    reasons,
    rewrite,
)
from normdrop.surgery.fusion_shortcut import find_shortcuts
from normdrop.surgery.fusion_tracing import (
    TENSOR,
    Call,
    Trace,
    Untraceable,
    default_arguments,
    looks_through,
    trace,
)

__all__ = ["Scope", "find", "fused_in", "inside_fused", "reasons_against", "remove"]


@dataclass
class Scope:
    """A module in whose forward something can be fused."""

    module: torch.nn.Module
    forward: FusedForward

    def fused(self) -> list[tuple[torch.nn.Module, str]]:
        """The norms that are fused, with what."""
        return self.forward.fused

    def install(self) -> None:
        """Give the module the fused forward."""
        vars(self.module)["forward"] = self.forward
        self.forward.prepare()


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


def find(model: torch.nn.Module) -> list[Scope]:
    """All scopes of a model, which stays as it is."""
    search = _Search()
    search.look(model)
    built = [_build(module, place) for module, place in search.places.items()]
    scopes = [scope for scope in built if scope is not None]
    return scopes + [Scope(*shortcut) for shortcut in find_shortcuts(model)]


def reasons_against(model: torch.nn.Module) -> dict[int, str]:
    """For the norms that are not fused, by id, why not."""
    search = _Search()
    search.look(model)
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


def _may_look_into(module: torch.nn.Module) -> bool:
    return looks_through(module) and _is_own_forward(module)


def _is_own_forward(module: torch.nn.Module) -> bool:
    forward = vars(module).get("forward")
    return forward is None or isinstance(forward, FusedForward)


def _has_norm(module: torch.nn.Module) -> bool:
    return any(is_fusible_norm(inner) for inner in module.modules())


@dataclass
class _Search:
    """Look for patterns everywhere in a model.

    Attributes:
        places: where there are some.
        against: norms that a graph has outside of patterns, and why.
        failures: modules that cannot be traced, and why.
    """

    places: dict[torch.nn.Module, _Place] = field(default_factory=dict)
    against: dict[torch.nn.Module, str] = field(default_factory=dict)
    failures: dict[torch.nn.Module, str] = field(default_factory=dict)
    done: set[torch.nn.Module] = field(default_factory=set)

    def look(self, root: torch.nn.Module) -> None:
        """Trace a module; where that fails, its children."""
        if root in self.done or not _has_norm(root):
            return
        self.done.add(root)
        visited: set[torch.nn.Module] = set()
        if looks_through(root, with_hooks=True) and _is_own_forward(root):
            for training in (True, False):
                try:
                    found = trace(root, training, default_arguments(root), _may_look_into)
                except Untraceable as error:
                    self.failures[root] = _first_line(error)
                    continue
                patterns = find_patterns(found)
                for pattern in patterns:
                    _place(pattern, found, self.places)
                self.against.update(reasons(found, patterns))
                visited.update(call.module for calls in found.calls.values() for call in calls)
        # What was called as a whole, or not at all, is looked at by itself.
        for child in _outermost(root, visited):
            self.look(child)


def _first_line(error: Exception) -> str:
    """Why a module is not traced, short enough for a table."""
    text = str(error).partition("\n")[0]
    if "control flow" in text:
        return "it branches on a tensor"
    return text if len(text) <= 60 else f"{text[:59]}…"


def _outermost(root: torch.nn.Module, visited: set[torch.nn.Module]) -> Iterator[torch.nn.Module]:
    for child in root.children():
        if child in visited:
            yield from _outermost(child, visited)
        else:
            yield child


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
    place.norms.add(found.modules[pattern.norm])
    place.inner.update(c.module for chain in chains for c in chain[depth:])
    if pattern.add is not None:
        nodes = list(found.graph.nodes)
        between = nodes[nodes.index(pattern.norm) : nodes.index(pattern.add)]
        # A call that is under way at both ends is under way between them.
        place.beside.update(c.module for node in between for c in found.calls[node][depth:])


def _can_be_scope(call: Call) -> bool:
    return call.arguments is not None and TENSOR in call.arguments


def _build(module: torch.nn.Module, place: _Place) -> Scope | None:
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
        taking_part.update(dict.fromkeys(participants(found, patterns)))
        fused.update({found.modules[p.norm]: p.text() for p in patterns})
        codes[training] = Code(rewrite(found, patterns))
    if not codes:
        return None
    looked_into.pop(module, None)
    forward = FusedForward(
        module, place.arguments, codes, list(looked_into), list(taking_part), list(fused.items())
    )
    return Scope(module, forward)


def _patterns_of(
    module: torch.nn.Module, training: bool, place: _Place
) -> tuple[Trace | None, list[Pattern]]:
    """The scope traced with as few modules looked into as will do, or else with all."""
    best: tuple[Trace | None, list[Pattern]] = (None, [])
    for looks_into in (
        place.inner.__contains__,
        (place.inner | place.beside).__contains__,
        _may_look_into,
    ):
        try:
            found = trace(module, training, place.arguments, looks_into)
        except Untraceable:
            continue
        patterns = find_patterns(found)
        if len(patterns) > len(best[1]):
            best = found, patterns
        if place.norms <= {found.modules[pattern.norm] for pattern in patterns}:
            break
    return best
