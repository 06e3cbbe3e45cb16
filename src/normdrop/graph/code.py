"""What can be read off the Python code of a forward."""

from __future__ import annotations

import dis
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any
from weakref import WeakKeyDictionary

__all__ = ["tests_for_none"]


_known: WeakKeyDictionary[type, bool] = WeakKeyDictionary()


def tests_for_none(kind: type[Any]) -> bool:
    """Whether the forward of a class asks whether a value that it computed or got is None.

    A proxy never is, and Python tells nobody that it was asked. Attributes do not count
    (``if self.downsample is not None``), since they are what they are while tracing, too. Functions
    that the forward calls are read as well: methods, and those of its own module by name.
    """
    if kind not in _known:
        _known[kind] = any(_tests_for_none(code) for code in _codes(kind))
    return _known[kind]


def _codes(kind: type[Any]) -> Iterator[CodeType]:
    """The code of the forward, and of what it calls outside of torch."""
    found: list[FunctionType] = [kind.forward] if isinstance(kind.forward, FunctionType) else []
    for function in found:  # which grows meanwhile
        if function.__module__.partition(".")[0] == "torch":
            continue
        for code in _nested(function.__code__):
            yield code
            for name in code.co_names:
                for callee in (getattr(kind, name, None), function.__globals__.get(name)):
                    if isinstance(callee, FunctionType) and callee not in found:
                        found.append(callee)


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


def _tests_for_none(code: CodeType) -> bool:
    before: list[dis.Instruction] = []
    for instruction in dis.get_instructions(code):
        asked = None
        if instruction.opname.endswith(("_IF_NONE", "_IF_NOT_NONE")):
            asked = before[-1]
        elif instruction.opname == "IS_OP" and before[-1].argval is None:
            asked = before[-2]
        elif instruction.opname == "IS_OP":  # None is x, or x is y
            asked = before[-1]
        if asked is not None and not asked.opname.startswith(("LOAD_ATTR", "LOAD_GLOBAL")):
            return True
        before.append(instruction)
    return False
