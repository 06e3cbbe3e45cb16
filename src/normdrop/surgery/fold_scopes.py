"""Modules whose forward torch.fx can record, and a forward that follows the edited record."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from normdrop.surgery.fold_layers import AddActivate, FoldedConv2d, FoldedLinear

__all__ = ["Scope", "TracedForward", "find_scopes", "has_hooks"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_LEAVES = (
    torch.nn.modules.batchnorm._BatchNorm,
    torch.nn.modules.dropout._DropoutNd,
    AddActivate,
    FoldedConv2d,
    FoldedLinear,
)

Link = tuple[torch.nn.Module, str, torch.nn.Module]
"""A parent, a name in it, and the child that is there."""


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether calling the module does more than its class says: hooks, or a forward of its own."""
    return "forward" in module.__dict__ or any(getattr(module, name, None) for name in _HOOKS)


@dataclass
class Scope:
    """A module, its name in the model, and the record of its forward.

    ``inlined`` are the modules whose own forward is part of the record.
    """

    path: str
    module: torch.nn.Module
    graph: torch.fx.Graph
    inlined: list[Link]

    def at(self, target: object) -> torch.nn.Module:
        """Give the module that a node calls."""
        return self.module.get_submodule(str(target))


def find_scopes(model: torch.nn.Module) -> list[Scope]:
    """Record the model, or where that fails its children, and theirs, each by itself."""
    return list(_scopes(model, "", set()))


def _scopes(module: torch.nn.Module, path: str, seen: set[int]) -> Iterator[Scope]:
    if id(module) in seen:
        return
    seen.add(id(module))
    scope = _record(module, path)
    if scope is None:
        for name, child in module.named_children():
            yield from _scopes(child, f"{path}.{name}" if path else name, seen)
        return
    yield scope
    # Modules with hooks were recorded as one call; what is inside has a record of its own.
    for node in scope.graph.find_nodes(op="call_module"):
        child = scope.at(node.target)
        if has_hooks(child):
            target = str(node.target)
            yield from _scopes(child, f"{path}.{target}" if path else target, seen)


class _Tracer(torch.fx.Tracer):
    """Records a call with the arguments that have no default; the others keep theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.inlined: list[Link] = []

    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
        return has_hooks(m) or self.is_builtin(m, module_qualified_name)

    def is_builtin(self, m: torch.nn.Module, path: str) -> bool:
        """Whether a module is torch's, or ours that is seen as torch's are."""
        return isinstance(m, _LEAVES) or super().is_leaf_module(m, path)

    def call_module(self, m: torch.nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        path = self.path_of_module(m)
        if not self.is_leaf_module(m, path):
            self.inlined.append(link(self.root, path))
        return super().call_module(m, forward, args, kwargs)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        names = required_arguments(self.root)
        return root_fn, [self.root, *(self.create_proxy("placeholder", n, (), {}) for n in names)]


def required_arguments(module: torch.nn.Module) -> list[str]:
    """Give the names of forward's arguments without a default, or raise TypeError."""
    names = []
    for parameter in list(inspect.signature(type(module).forward).parameters.values())[1:]:
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            if parameter.default is parameter.empty:
                names.append(parameter.name)
        elif parameter.kind is not parameter.KEYWORD_ONLY or parameter.default is parameter.empty:
            raise TypeError(f"forward takes {parameter}")
    return names


def link(root: torch.nn.Module, path: str) -> Link:
    """Give the parent of the module at a path, its name there, and the module."""
    head, _, name = path.rpartition(".")
    parent = root.get_submodule(head)
    return parent, name, parent.get_submodule(name)


def _record(module: torch.nn.Module, path: str) -> Scope | None:
    """Trace a module, or give None where its forward depends on values, or writes attributes."""
    tracer = _Tracer()
    if "forward" in module.__dict__ or tracer.is_builtin(module, path):
        return None
    before = [(m, dict(m.__dict__)) for m in module.modules()]
    try:
        graph = tracer.trace(module)
    except Exception:  # what a user's forward raises when given a proxy can be anything
        graph = None
    for m, attributes in before:
        if not _is_same(m.__dict__, attributes):
            # The record would not write them.
            graph = None
            m.__dict__.clear()
            m.__dict__.update(attributes)
    return None if graph is None else Scope(path, module, graph, tracer.inlined)


def _is_same(now: dict[str, Any], before: dict[str, Any]) -> bool:
    return now.keys() == before.keys() and all(now[name] is before[name] for name in now)


class TracedForward:
    """The forward of one module, after an edited record; held by the module as ``forward``.

    It holds for what was recorded: evaluation, the arguments without a default, the same modules
    inside and no new hooks. Otherwise, and under torch.compile, torch.export and torch.jit, the
    class's own forward runs, which gives the same numbers and fuses less.
    """

    def __init__(
        self,
        owner: torch.nn.Module,
        graph: torch.fx.Graph,
        inlined: list[Link],
        layers: list[Link],
    ) -> None:
        self.owner = owner
        self.inlined = inlined
        self.layers = layers
        self.count = len(required_arguments(owner))
        code = graph.python_code("self")
        # What it would register for another trace is not wanted here.
        lines = code.src.splitlines()
        self.source = "\n".join(s for s in lines if not s.startswith("torch.fx._symbolic_trace."))
        self.globals = {n: v for n, v in code.globals.items() if n in code.src}
        self._compile()

    def _compile(self) -> None:
        namespace = dict(self.globals)
        exec(compile(self.source, f"<fold of {type(self.owner).__name__}>", "exec"), namespace)
        self.function = namespace["forward"]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != self.count or not self._holds():
            return type(self.owner).forward(self.owner, *args, **kwargs)
        return self.function(self.owner, *args)

    def _holds(self) -> bool:
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or self.owner.training:
            return False
        for parent, name, module in self.inlined:
            if parent._modules.get(name) is not module or module.training:
                return False
            if module._forward_hooks or module._forward_pre_hooks:
                return False
        return all(parent._modules.get(name) is layer for parent, name, layer in self.layers)

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(type(self.owner).forward)
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    def __getstate__(self) -> dict[str, Any]:
        # Python's modules do not pickle; their names do.
        names = {
            n: (v.__name__, None) if isinstance(v, ModuleType) else (None, v)
            for n, v in self.globals.items()
        }
        state = {n: v for n, v in self.__dict__.items() if n not in ("function", "globals")}
        return {**state, "names": names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        names = state.pop("names")
        self.__dict__.update(state)
        self.globals = {
            n: value if module is None else importlib.import_module(module)
            for n, (module, value) in names.items()
        }
        self._compile()
