"""What can be read off the Python code of a forward."""

from __future__ import annotations

import ast
import dis
import inspect
import textwrap
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary

__all__ = ["reads", "tests_for_none", "uses_besides_calling"]


_known: WeakKeyDictionary[type, bool] = WeakKeyDictionary()


def tests_for_none(kind: type[Any]) -> bool:
    """Whether the forward of a class asks whether a value that it computed or got is None.

    A proxy never is, and Python tells nobody that it was asked. Attributes do not count
    (``if self.downsample is not None``), since they are what they are while tracing, too. Functions
    that the forward calls are read as well: methods, and those of its own module by name.
    """
    if kind not in _known:
        codes = (code for function in _functions(kind) for code in _nested(function.__code__))
        _known[kind] = any(_tests_for_none(code) for code in codes)
    return _known[kind]


def reads(function: Any, name: str) -> bool:
    """Whether a function looks at an argument; True where that cannot be told."""
    if not isinstance(function, FunctionType):
        return True
    return any(
        instruction.argval == name and instruction.opname.startswith("LOAD_")
        for code in _nested(function.__code__)
        for instruction in dis.get_instructions(code)
    )


def _functions(kind: type[Any]) -> Iterator[FunctionType]:
    """The forward, and what it calls outside of torch."""
    found: list[FunctionType] = [kind.forward] if isinstance(kind.forward, FunctionType) else []
    for function in found:  # which grows meanwhile
        if (function.__module__ or "").partition(".")[0] == "torch":
            continue
        yield function
        for code in _nested(function.__code__):
            for name in code.co_names:
                inherited = (vars(base).get(name) for base in kind.__mro__)
                for callee in (*inherited, function.__globals__.get(name)):
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


# ---- What a forward that cannot be traced does with its children -------------------------------

_WALKS = frozenset(
    {
        *("children", "named_children", "modules", "named_modules", "_modules", "get_submodule"),
        *("parameters", "named_parameters", "get_parameter", "state_dict", "__dict__", "vars"),
    }
)
"""Names by which code gets at parts that it does not name."""


def uses_besides_calling(
    kind: type[Any], child: str, is_list: bool, parts: frozenset[str]
) -> str | None:
    """What a class does with a child, or the children of a list, besides calling them.

    Args:
        kind: a class whose forward cannot be traced.
        child: the name of a child of its instances.
        is_list: whether that is a mere list (or dictionary) of modules, whose items are called.
        parts: names of modules inside the child.

    Returns:
        What was found, or that the code cannot be read, or None.
    """
    for function in _functions(kind):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        except (OSError, TypeError, SyntaxError):
            return "the code cannot be read"
        parents = {inner: node for node in ast.walk(tree) for inner in ast.iter_child_nodes(node)}
        items = _items(tree, child) if is_list else set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and node.value in parts:
                return f"reads {node.value}"
            if isinstance(node, ast.Name) and node.id in items:
                is_used = isinstance(node.ctx, ast.Store) or _is_called(node, parents)
                if not is_used:
                    return f"reads {child}"
            if not isinstance(node, ast.Attribute):
                continue
            is_own = isinstance(node.value, ast.Name) and node.value.id == "self"
            if node.attr in _WALKS:
                return f"reads {node.attr}"
            if node.attr in parts and not is_own and not _is_global(node, function):
                return f"reads {node.attr}"
            is_used = _is_called(node, parents) or (is_list and _is_passed_through(node, parents))
            if node.attr == child and is_own and not is_used:
                return f"reads {child}"
    return None


def _is_global(node: ast.Attribute, function: FunctionType) -> bool:
    """Whether it is a part of an imported module, such as torch.nn.functional.linear."""
    inner: ast.expr = node
    while isinstance(inner, ast.Attribute):
        inner = inner.value
    return isinstance(inner, ast.Name) and isinstance(
        function.__globals__.get(inner.id), ModuleType
    )


def _is_called(node: ast.expr, parents: dict[ast.AST, ast.AST]) -> bool:
    """Whether a reference to a module is called, or asked whether it is there, and no more."""
    parent = parents.get(node)
    if isinstance(parent, ast.Compare):
        return all(isinstance(op, (ast.Is, ast.IsNot)) for op in parent.ops)
    return isinstance(parent, ast.Call) and parent.func is node


def _is_passed_through(node: ast.Attribute, parents: dict[ast.AST, ast.AST]) -> bool:
    """Whether a list of modules is only gone through, or an item of it called."""
    parent = parents.get(node)
    if isinstance(parent, ast.Subscript):
        return _is_called(parent, parents)
    while isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name):
        if parent.func.id not in ("enumerate", "zip", "reversed", "len"):
            return False
        if parent.func.id == "len":
            return True
        parent = parents.get(parent)
    return isinstance(parent, (ast.For, ast.comprehension))


def _items(tree: ast.AST, child: str) -> set[str]:
    """The names that a loop over a list of modules gives to its items."""
    names: set[str] = set()
    for loop in ast.walk(tree):
        if not isinstance(loop, (ast.For, ast.comprehension)):
            continue
        if all(getattr(node, "attr", None) != child for node in ast.walk(loop.iter)):
            continue
        target = loop.target
        function = loop.iter.func if isinstance(loop.iter, ast.Call) else None
        is_counted = isinstance(function, ast.Name) and function.id == "enumerate"
        if is_counted and isinstance(target, ast.Tuple):
            target = target.elts[-1]
        names |= {node.id for node in ast.walk(target) if isinstance(node, ast.Name)}
    return names
