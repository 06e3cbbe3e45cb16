"""The forward that a module gets on its instance: generated code, used where it holds."""

from __future__ import annotations

import importlib
import inspect
import operator
import pickle
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch.fx import Graph
from torch.nn.modules.module import _has_any_global_hook

from normdrop.graph.modules import CONSTANTS, has_hooks
from normdrop.graph.tracing import TENSOR

__all__ = ["Code", "FusedForward"]

_OWN = frozenset({*vars(torch.nn.Module()), "forward"})
"""Attributes that every module has."""

_MISSING = object()


class Code:
    """The source of a graph, and what its names mean."""

    def __init__(self, graph: Graph) -> None:
        code = graph.python_code("self")
        self.source = code.src
        used = set(re.findall(r"\w+", code.src))
        self.names = {name: value for name, value in code.globals.items() if name in used}

    def compiled(self) -> Callable[..., Any]:
        """The function."""
        names = dict(self.names)
        exec(compile(self.source, "<normdrop fused forward>", "exec"), names)
        function: Callable[..., Any] = names["forward"]
        return function

    def __getstate__(self) -> dict[str, Any]:
        modules = {k: v.__name__ for k, v in self.names.items() if isinstance(v, ModuleType)}
        others = {k: v for k, v in self.names.items() if k not in modules}
        return {"source": self.source, "modules": modules, "others": others}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.source = state["source"]
        modules = {name: importlib.import_module(home) for name, home in state["modules"].items()}
        self.names = {**modules, **state["others"]}

    def can_pickle(self) -> bool:
        """Whether every name can be found again."""
        try:
            pickle.dumps(self.__getstate__())
        except Exception:
            return False
        return True


class FusedForward:
    """Run the fused code of a module, or the forward of its class where that is not the same.

    The code was traced for certain arguments, and for the modules that it looked into as they were
    then. It holds while those have no hooks and no forward of their own, the same attributes and
    children, and the same training flag. Layers that it calls may be exchanged.

    Args:
        module: whose forward this is.
        arguments: for each positional argument TENSOR or the constant that was traced.
        codes: by training flag.
        looked_into: modules whose forward is part of the code, without ``module``.
        participants: norms, activations and dropouts that are fused.
        fused: those of them that are norms, with what they are fused with.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        arguments: tuple[Any, ...],
        codes: dict[bool, Code],
        looked_into: list[torch.nn.Module],
        participants: list[torch.nn.Module],
        fused: list[tuple[torch.nn.Module, str]],
    ) -> None:
        self.module = module
        self.arguments = arguments
        self.codes = codes
        self.looked_into = looked_into
        self.participants = participants
        self.fused = fused
        self._facts: Any = None
        self._functions: dict[bool, Callable[..., Any]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        if self._facts is None:
            if torch.compiler.is_dynamo_compiling():
                # A copy that was never called. What is fused matters less once it is compiled.
                return type(module).forward(module, *args, **kwargs)
            self.prepare()
        run = self._functions.get(module.training)
        if run is not None:
            tensors = self._tensors(args, kwargs)
            if tensors is not None and self._holds(module.training):
                return run(module, *tensors)
        return type(module).forward(module, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(type(self.module).forward)
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    # torch.export and torch.fx look for these on what they take for a method.

    @property
    def __code__(self) -> Any:
        return getattr(type(self.module).forward, "__code__", None)

    @property
    def __globals__(self) -> Any:
        return getattr(type(self.module).forward, "__globals__", {})

    def prepare(self) -> None:
        """Compile the code, and note the facts that it rests on."""
        self._functions = {training: code.compiled() for training, code in self.codes.items()}
        code_of = [self.module, *self.looked_into]
        fixed = {id(module) for module in (*self.looked_into, *self.participants)}
        attributes: list[tuple[dict[str, Any], str, Any]] = []
        identities: list[tuple[dict[str, Any], str, Any]] = []
        sequences: list[tuple[list[Any], list[Any]]] = []
        seen: set[int] = set()
        for module in code_of:
            for name, value in vars(module).items():
                if name in _OWN:
                    continue
                if type(value) in CONSTANTS:
                    attributes.append((vars(module), name, value))
                else:
                    identities.append((vars(module), name, value))
                    if isinstance(value, list):
                        sequences.append((value, list(value)))
                    attributes += _inside(value, seen)
        for module in self.participants:
            attributes += [
                (vars(module), name, value)
                for name, value in vars(module).items()
                if name == "negative_slope"
            ]
        children = [
            (module._modules, name, child if child is None or id(child) in fixed else _MISSING)
            for module in code_of
            for name, child in module._modules.items()
        ]
        self._facts = (
            [(module, type(module).forward) for module in (*code_of, *self.participants)],
            attributes,
            identities,
            children,
            [(module._modules, len(module._modules)) for module in code_of],
            sequences,
        )

    def _tensors(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any] | None:
        """The tensors to call the code with; None if the call is not as it was traced."""
        if kwargs:
            try:
                bound = inspect.signature(type(self.module).forward).bind(
                    self.module, *args, **kwargs
                )
            except TypeError:
                return None
            if bound.kwargs:
                return None
            args = bound.args[1:]
        if len(args) != len(self.arguments):
            return None
        tensors = []
        for given, traced in zip(args, self.arguments, strict=True):
            if traced is TENSOR:
                if not isinstance(given, torch.Tensor):
                    return None
                tensors.append(given)
            elif type(given) is not type(traced) or given != traced:
                return None
        return tensors

    def _holds(self, training: bool) -> bool:
        """Whether the code may run: everything that it rests on is as it was."""
        if _has_any_global_hook():
            return False
        for module in self.looked_into:
            if module.training is not training:
                return False
        return self._is_unchanged()

    def _is_unchanged(self) -> bool:
        forwards, attributes, identities, children, lengths, sequences = self._facts
        for module, forward in forwards:
            if type(module).forward is not forward:
                return False
        for module in self.looked_into:
            own = vars(module).get("forward")
            if has_hooks(module) or not (own is None or type(own) is FusedForward):
                return False
        for module in self.participants:
            if has_hooks(module) or "forward" in vars(module):
                return False
        for where, name, value in attributes:
            if where.get(name, _MISSING) != value:
                return False
        for where, name, value in identities:
            if where.get(name, _MISSING) is not value:
                return False
        for where, name, child in children:
            present = where.get(name)
            if present is not child and (child is not _MISSING or present is None):
                return False
        for now, then in sequences:
            if len(now) != len(then) or not all(map(operator.is_, now, then)):
                return False
        return all(len(where) == length for where, length in lengths)

    def __getstate__(self) -> dict[str, Any]:
        codes = {training: code for training, code in self.codes.items() if code.can_pickle()}
        if self._facts is not None and not self._is_unchanged():
            # A copy notes the facts anew, where the code would then seem to hold.
            codes = {}
        return {**vars(self), "codes": codes, "_facts": None, "_functions": {}}

    def __repr__(self) -> str:
        return f"<fused forward of {type(self.module).__name__}>"


def _inside(value: Any, seen: set[int]) -> list[tuple[dict[str, Any], str, Any]]:
    """The plain attributes of an object that a module holds, such as a configuration."""
    if id(value) in seen or isinstance(value, (torch.Tensor, torch.nn.Module, type)):
        return []
    seen.add(id(value))
    inside = value if type(value) is dict else getattr(value, "__dict__", None)
    if not isinstance(inside, dict) or callable(value):
        return []
    return [(inside, name, item) for name, item in inside.items() if type(item) in CONSTANTS]
