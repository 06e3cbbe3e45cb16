"""Who has a part in the layers of a model, as far as its forwards show."""

from __future__ import annotations

import inspect
import operator
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Node

from normdrop.graph.code import reads, uses_besides_calling
from normdrop.graph.modules import CONSTANTS, is_replaced
from normdrop.graph.nodes import only_user
from normdrop.graph.scopes import find_traces
from normdrop.graph.tracing import (
    TENSOR,
    Trace,
    Untraceable,
    default_arguments,
    looks_through,
    trace,
)

__all__ = ["Uses", "is_pair"]

_Norm = torch.nn.modules.batchnorm._BatchNorm
_LISTS = (torch.nn.ModuleList, torch.nn.ModuleDict)


class Uses:
    """Where the modules of a model are called, and whether anything else has a part in them."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.paths = {module: path for path, module in model.named_modules()}
        self.failures: dict[torch.nn.Module, str] = {}
        self.others: dict[torch.nn.Module, list[Trace]] = {}
        self.traces = list(
            find_traces(model, lambda m: (m.training,), self.failures, accepts=self._accepts)
        )
        self.visited = {c.module for t in self.traces for cs in t.calls.values() for c in cs}
        self.places: dict[torch.nn.Module, tuple[Trace, Node]] = {}
        self.calls: Counter[torch.nn.Module] = Counter()
        self.held: Counter[torch.nn.Module] = Counter()
        self.owners: Counter[int] = Counter()
        for module in self.paths:
            self.held.update(module._modules.values())
            self.owners.update({id(t) for t in _tensors(module)})
            for thing in _hidden(module):
                self.held.update([thing] if isinstance(thing, torch.nn.Module) else ())
                self.owners[id(thing)] += 1
        for found in self.traces:
            for node in found.graph.nodes:
                if node.op == "call_module":
                    module = found.modules[node]
                    self.calls[module] += 1
                    self.places[module] = found, node
                elif node.op == "get_attr":
                    read = operator.attrgetter(str(node.target))(found.root)
                    self.owners[id(read)] += 1

    def against(self, module: torch.nn.Module) -> str:
        """Say what forbids to change a module."""
        if self.held[module] > 1 or self.calls[module] > 1:
            return "used more than once"
        if any(self.owners[id(tensor)] > 1 for tensor in _tensors(module)):
            return "shares a parameter, or it is read elsewhere"
        if self.calls[module] == 0:
            for outer in self.failures:
                if self.failures[outer].startswith("argument") and module in outer.modules():
                    return f"{self.failures[outer]} of {type(outer).__name__} may choose what runs"
            return "no forward that can be traced calls it"
        return ""

    def against_pair(self, layer: torch.nn.Module, norm: torch.nn.Module) -> str:
        """Say what else than the call that was traced may part a layer and what follows it."""
        found, _ = self.places[norm]
        if not all(is_pair(other, layer, norm) for other in self.others[found.root]):
            return f"an argument of {type(found.root).__name__} may choose what runs"
        for module in (layer, norm):
            parent = self.model.get_submodule(self.paths[module].rpartition(".")[0])
            for name, other in parent.named_children():
                is_choice = isinstance(module, _Norm) or isinstance(parent, _LISTS)
                if is_choice and isinstance(other, type(module)) and not self.calls[other]:
                    return f"{name} beside it is not called, so that something may choose"
        return self._against_outer(found.root, (layer, norm))

    def _against_outer(self, root: torch.nn.Module, pair: tuple[torch.nn.Module, ...]) -> str:
        """Say where code that is not traced reaches into what is traced by itself."""
        inside = {module: path for path, module in root.named_modules()}
        parts = {part for module in pair for part in inside[module].split(".")}
        for outer in self.paths:
            if outer in self.visited or outer is root or root not in outer.modules():
                continue
            kind = type(outer)
            if (getattr(kind.forward, "__module__", None) or "").startswith("torch."):
                continue
            path = next(path for path, module in outer.named_modules() if module is root)
            first = path.partition(".")[0]
            is_list = isinstance(outer._modules[first], _LISTS)
            what = uses_besides_calling(kind, first, is_list, frozenset(parts))
            if is_replaced(outer):
                what = "the forward was replaced"
            if what is not None:
                return f"{kind.__name__}, which is not traced: {what}"
        return ""

    def _accepts(self, found: Trace) -> str | None:
        """Trace a module with its other arguments, too; name one that decides what runs."""
        self.others[found.root] = []
        for name, arguments in _other_arguments(found.root):
            try:
                if arguments is None:
                    raise Untraceable(name)
                other = trace(found.root, found.training, arguments, looks_through)
            except Untraceable:
                return f"argument {name}"
            self.others[found.root].append(other)
        return None


def is_pair(found: Trace, layer: torch.nn.Module, norm: torch.nn.Module) -> bool:
    """Whether in a graph all that the layer gives goes to the norm alone, and nothing else does."""
    for node, module in found.modules.items():
        if module not in (layer, norm):
            inside = {layer, norm}.intersection(module.modules())
            # A wrapper of torch's calls both. Of others it was not traced what they do.
            is_wrapper = type(module).__module__.startswith("torch.") and len(inside) == 2
            if inside and not is_wrapper:
                return False
        if module is layer:
            user = only_user(node)
            if user is None or found.modules.get(user) is not norm:
                return False
        if module is norm:
            given = node.args[0] if node.args else None
            if not isinstance(given, Node) or found.modules.get(given) is not layer:
                return False
    return True


def _other_arguments(module: torch.nn.Module) -> Iterator[tuple[str, tuple[Any, ...] | None]]:
    """For each argument that need not be given a call that gives it; None where none can be made.

    That is the other truth value, or else a tensor.
    """
    given = list(default_arguments(module))
    forward = type(module).forward
    for name, parameter in list(inspect.signature(forward).parameters.items())[1 + len(given) :]:
        if not reads(forward, name):
            continue
        default = parameter.default
        if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD or type(default) not in CONSTANTS:
            yield name, None
            return
        yield name, (*given, not default if isinstance(default, bool) else TENSOR)
        given.append(default)


def _tensors(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    held = (*module._parameters.values(), *module._buffers.values())
    return (tensor for tensor in held if tensor is not None)


_OWN = frozenset(vars(torch.nn.Module()))


def _hidden(module: torch.nn.Module) -> Iterator[torch.nn.Module | torch.Tensor]:
    """Modules and tensors in attributes that torch does not know: a list, or set past torch."""
    todo = [value for name, value in vars(module).items() if name not in _OWN]
    while todo:
        value = todo.pop()
        if isinstance(value, (torch.nn.Module, torch.Tensor)):
            yield value
        elif type(value) is dict:
            todo += value.values()
        elif type(value) in (list, tuple, set):
            todo += value
