"""The forward that a module gets on its instance: generated code, used where it holds."""

from __future__ import annotations

import importlib
import inspect
import operator
import pickle
import re
import sys
from collections import OrderedDict
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch.fx import Graph
from torch.nn.modules.module import _has_any_global_hook

from normdrop.graph.modules import CONSTANTS, does_more, has_hooks, is_replaced
from normdrop.graph.tracing import TENSOR

__all__ = ["Code", "Facts", "FusedForward", "is_so"]

_OWN = frozenset({*vars(torch.nn.Module()), "forward", "_compiled_call_impl"})
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


class Facts(NamedTuple):
    """What fused code rests on. An owner is a module, another object, or a dictionary.

    Attributes:
        equal: (owner, name, value) of what must have an equal value.
        same: (owner, name, value) of what must be the same object.
        present: (children, name) of layers that may be exchanged, but not taken away.
        lengths: (children, how many).
        lists: (list, what is in it).
        forwards: (module, the forward of its class).
    """

    equal: list[tuple[Any, str, Any]]
    same: list[tuple[Any, str, Any]]
    present: list[tuple[dict[str, Any], str]]
    lengths: list[tuple[dict[str, Any], int]]
    lists: list[tuple[list[Any], list[Any]]]
    forwards: list[tuple[torch.nn.Module, Any]]


class FusedForward:
    """Run the fused code of a module, or the forward of its class where that is not the same.

    The code was traced for certain arguments, and for the modules that it looked into as they were
    then. It holds while those have no hooks and no forward of their own, the same attributes and
    children, and the same training flag. Layers that it calls may be exchanged. A copy, however it
    is made, takes with it what its code rests on.

    Args:
        module: whose forward this is, as it is now.
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
        self.facts = Facts([], [], [], [], [], [])
        self._functions: dict[bool, Callable[..., Any]] | None = None

    def install(self) -> None:
        """Make this the module's forward; the code rests on what is so now."""
        vars(self.module)["forward"] = self
        self.facts = self.noted()
        self._functions = self._compiled()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        if torch.compiler.is_dynamo_compiling():
            if self._functions is None:
                # A copy that was never called. What is fused matters less once it is compiled.
                return type(module).forward(module, *args, **kwargs)
        else:
            module = self._called(sys._getframe(1).f_locals.get("self"))
            if self._functions is None:
                self._functions = self._compiled()
        run = self._functions.get(module.training)
        if run is not None and module is self.module and self.may_run():
            tensors = self.tensors(args, kwargs)
            if tensors is not None and self._holds(module.training):
                return run(module, *tensors)
        self.check(module, args, kwargs)
        return type(module).forward(module, *args, **kwargs)

    def may_run(self) -> bool:
        """Whether the code is for a call of this kind."""
        return True

    def check(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise where the forward of the class is not right either."""

    def _called(self, caller: Any) -> torch.nn.Module:
        """The module that is called; shallow copies (copy.copy, DataParallel) share this object."""
        is_copy = isinstance(caller, torch.nn.Module) and vars(caller).get("forward") is self
        return caller if is_copy else self.module

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

    def _compiled(self) -> dict[bool, Callable[..., Any]]:
        return {training: code.compiled() for training, code in self.codes.items()}

    def noted(self) -> Facts:
        """What is so now."""
        code_of = [self.module, *self.looked_into]
        fixed = {id(module) for module in (*self.looked_into, *self.participants)}
        forwards = [(module, type(module).forward) for module in (*code_of, *self.participants)]
        facts = Facts([], [], [], [], [], forwards)
        seen: set[int] = set()
        for module in code_of:
            for name, value in vars(module).items():
                if name in _OWN:
                    continue
                if type(value) in CONSTANTS:
                    facts.equal.append((module, name, value))
                else:
                    facts.same.append((module, name, value))
                    if isinstance(value, list):
                        facts.lists.append((value, list(value)))
                    facts.equal.extend(_inside(value, seen))
            children = module._modules
            facts.lengths.append((children, len(children)))
            for name, child in children.items():
                if child is None or id(child) in fixed:
                    facts.same.append((children, name, child))
                else:
                    facts.present.append((children, name))
        for module in self.participants:
            if "negative_slope" in vars(module):
                facts.equal.append((module, "negative_slope", module.negative_slope))
        return facts

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        """The arguments by position; None if some cannot be given so."""
        if kwargs:
            try:
                signature = inspect.signature(type(self.module).forward)
                bound = signature.bind(self.module, *args, **kwargs)
            except TypeError:
                return None
            return None if bound.kwargs else bound.args[1:]
        return args

    def tensors(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any] | None:
        """The tensors to call the code with; None if the call is not as it was traced."""
        args = self.given(args, kwargs) or ()
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
            if module.training is not training or has_hooks(module) or is_replaced(module):
                return False
        for module in self.participants:
            if does_more(module):
                return False
        return is_so(self.facts)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy takes along: no code where it would not know what the code rests on."""
        owners = (owner for owner, _, _ in (*self.facts.equal, *self.facts.same))
        may_copy = is_so(self.facts) and not any(map(_copies_itself, owners))
        if may_copy and _can_pickle([forward for _, forward in self.facts.forwards]):
            codes = {k: v for k, v in self.codes.items() if _can_pickle(v)}
            return {**vars(self), "codes": codes, "_functions": None}
        facts = Facts([], [], [], [], [], [])
        return {**vars(self), "codes": {}, "facts": facts, "_functions": None}

    def __repr__(self) -> str:
        return f"<fused forward of {type(self.module).__name__}>"


def is_so(facts: Facts) -> bool:
    """Whether everything is as it was noted."""
    for module, forward in facts.forwards:
        if type(module).forward is not forward:
            return False
    for owner, name, value in facts.equal:
        if _attributes(owner).get(name, _MISSING) != value:
            return False
    for owner, name, value in facts.same:
        if _attributes(owner).get(name, _MISSING) is not value:
            return False
    for children, name in facts.present:
        if children.get(name) is None:
            return False
    for now, then in facts.lists:
        if len(now) != len(then) or not all(map(operator.is_, now, then)):
            return False
    return all(len(children) == length for children, length in facts.lengths)


def _attributes(owner: Any) -> dict[str, Any]:
    return owner if isinstance(owner, dict) else vars(owner)


def _copies_itself(owner: Any) -> bool:
    """Whether its class says how it is copied or pickled, so that a copy may have other parts."""
    return any(
        name in vars(kind)
        for kind in type(owner).__mro__
        if kind not in (object, dict, OrderedDict, torch.nn.Module)
        for name in ("__deepcopy__", "__getstate__", "__reduce__", "__reduce_ex__")
    )


def _can_pickle(things: Any) -> bool:
    """Whether every name in it can be found again."""
    try:
        pickle.dumps(things)
    except Exception:
        return False
    return True


def _inside(value: Any, seen: set[int]) -> list[tuple[Any, str, Any]]:
    """The constants of an object that a module holds, such as a configuration."""
    if id(value) in seen or isinstance(value, (torch.Tensor, torch.nn.Module, type)):
        return []
    seen.add(id(value))
    inside = value if type(value) is dict else getattr(value, "__dict__", None)
    if not isinstance(inside, dict) or callable(value):
        return []
    return [(value, name, item) for name, item in inside.items() if type(item) in CONSTANTS]
