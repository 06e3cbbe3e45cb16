"""What tracing must leave as it was: the attributes of modules, and random number generators."""

from __future__ import annotations

import pickle
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from normdrop.graph.modules import CONSTANTS

__all__ = [
    "State",
    "Untraceable",
    "chance_untouched",
    "is_same",
    "patched",
    "restore",
    "state_of",
]


class Untraceable(Exception):
    """The module does what no graph can repeat."""


State = dict[str, tuple[Any, Any]]


def state_of(module: torch.nn.Module) -> State:
    """Its attributes, and what is in those that are lists, sets or dictionaries."""
    return {name: (value, _contents(value)) for name, value in vars(module).items()}


def _contents(value: Any) -> Any:
    if isinstance(value, dict):
        return dict(value)
    return list(value) if isinstance(value, (list, set)) else None


def is_same(before: State, after: State) -> bool:
    """Whether nothing was written in between; equal numbers and strings count as the same."""
    if list(before) != list(after):
        return False
    for name, (value, inside) in before.items():
        other, other_inside = after[name]
        if value is not other and not (type(value) in CONSTANTS and value == other):
            return False
        if inside is not None and (
            len(inside) != len(other_inside)
            or list(map(id, inside)) != list(map(id, other_inside))
            or (
                isinstance(inside, dict)
                and list(map(id, inside.values())) != list(map(id, other_inside.values()))
            )
        ):
            return False
    return True


def restore(module: torch.nn.Module, state: State) -> None:
    """Make the module what it was."""
    attributes = vars(module)
    if list(attributes) != list(state):
        attributes.clear()
    attributes.update({name: value for name, (value, _) in state.items()})
    for value, inside in state.values():
        if inside is None or is_same({"": (value, inside)}, {"": (value, _contents(value))}):
            continue
        value.clear()
        value.extend(inside) if isinstance(value, list) else value.update(inside)


@contextmanager
def chance_untouched() -> Iterator[None]:
    """Refuse what draws from Python's or NumPy's generator, and put back what it drew.

    torch's cannot be drawn from here.
    """
    numpy = sys.modules.get("numpy")
    before = random.getstate()
    numpys = None if numpy is None else numpy.random.get_state()
    try:
        yield
    finally:
        is_drawn = random.getstate() != before
        if is_drawn:
            random.setstate(before)
        if numpy is not None and pickle.dumps(numpys) != pickle.dumps(numpy.random.get_state()):
            is_drawn = True
            numpy.random.set_state(numpys)
    if is_drawn:
        raise Untraceable("it draws random numbers")


@contextmanager
def patched(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    """Set attributes (of, name, value), for a while."""
    before = [(owner, name, vars(owner)[name]) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in reversed(before):
            setattr(owner, name, value)
