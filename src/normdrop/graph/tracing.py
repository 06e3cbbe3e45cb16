"""A tracer that gives up on what it cannot be sure of, part by part.

torch.fx runs a module's Python code once, with proxies for tensors, and records what happens to
them. What the code does besides is lost: a branch on the state of the program, a context such as
``no_grad``, an attribute that is written, a random number. This tracer notices those. Where one
occurs, the innermost module that is being looked into becomes a single call in the graph; if it is
the root itself, there is no graph.
"""

from __future__ import annotations

import builtins
import inspect
import operator
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node, Proxy
from torch.fx.proxy import Attribute
from torch.utils._python_dispatch import TorchDispatchMode

from normdrop.graph.code import tests_for_none
from normdrop.graph.modules import CONSTANTS, gives_one_tensor, has_hooks, is_replaced
from normdrop.graph.state import (
    Untraceable,
    chance_untouched,
    is_same,
    patched,
    restore,
    state_of,
)

__all__ = [
    "IN_PLACE",
    "TENSOR",
    "Call",
    "Trace",
    "Untraceable",
    "default_arguments",
    "looks_through",
    "trace",
]

TENSOR = torch.Tensor
"""Stands for an argument that is a tensor; the others are the constants that were given."""


@dataclass(eq=False)
class Call:
    """One call of a module while tracing, with what it was given: TENSOR or a constant each.

    ``arguments`` is None where it was given anything else, such as a list of tensors.
    """

    module: torch.nn.Module
    arguments: tuple[Any, ...] | None = ()


@dataclass(eq=False)
class Trace:
    """A graph, for each of its nodes the calls that it stands in, the root's first, and modules."""

    root: torch.nn.Module
    training: bool
    arguments: tuple[Any, ...]
    graph: Graph
    calls: dict[Node, tuple[Call, ...]]
    modules: dict[Node, torch.nn.Module]


def trace(
    root: torch.nn.Module,
    training: bool,
    arguments: Sequence[Any],
    looks_into: Callable[[torch.nn.Module], bool],
) -> Trace:
    """Trace the forward of a module's class; the module is afterwards what it was before.

    Args:
        root: the module.
        training: the flag that it and all within have meanwhile.
        arguments: for each positional argument TENSOR or a constant.
        looks_into: which modules are traced through; the others are called.

    Raises:
        Untraceable: its forward cannot be traced.
    """
    tracer = _Tracer(arguments, looks_into)
    before = {
        module: state_of(module)
        for module in root.modules()
        if not isinstance(module, torch.jit.ScriptModule)
    }
    try:
        for module in before:
            vars(module)["training"] = training
            # Only fused forwards get here: other modules with a forward of their own are called.
            if module is root or looks_into(module):
                vars(module).pop("forward", None)
        meanwhile = {module: state_of(module) for module in before}
        with _watched(), chance_untouched():
            tracer.trace(root)
        for module, state in meanwhile.items():
            if not is_same(state, state_of(module)):
                raise Untraceable(f"{type(module).__name__} is written to")
    except Exception as error:
        raise Untraceable(str(error)) from error
    finally:
        for module, state in before.items():
            restore(module, state)
    return Trace(root, training, tuple(arguments), tracer.graph, tracer.calls, tracer.targets)


# ---- Proxies -----------------------------------------------------------------------------------

_TENSOR_NAMES = frozenset(dir(torch.Tensor))

IN_PLACE = (
    *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul"),
    *("iand", "ior", "ixor", "ilshift", "irshift"),
)
"""Names in the operator module of what writes to its first argument."""

# What does not give a tensor, of the functions and methods that take one.
_OTHER_RESULTS = frozenset(
    {
        *("size", "dim", "ndimension", "numel", "nelement", "stride", "item", "tolist", "type"),
        *("element_size", "storage_offset", "get_device", "data_ptr", "storage", "getattr", "len"),
        *("is_contiguous", "is_floating_point", "is_complex", "untyped_storage", "unbind"),
        *("split", "chunk", "tensor_split", "hsplit", "vsplit", "dsplit", "split_with_sizes"),
        *("unsafe_chunk", "unsafe_split", "max", "min", "sort", "topk", "median", "nanmedian"),
        *("mode", "kthvalue", "cummax", "cummin", "aminmax", "var_mean", "std_mean", "frexp"),
        *("unique", "unique_consecutive", "nonzero", "svd", "qr", "eig", "eigh", "lu", "meshgrid"),
        *("broadcast_tensors", "eq", "ne", "lt", "le", "gt", "ge"),
    }
)


class _TensorProxy(Proxy):
    """A proxy that refuses what no tensor has, and records an in-place operator as one.

    torch.fx records ``x += y`` as ``x = x + y``, which is another thing where x is seen elsewhere.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("node", "tracer", "root", "attr", "_node"):
            raise Untraceable(f"attribute {name} is written to a tensor")
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Attribute:
        if name not in _TENSOR_NAMES:
            raise AttributeError(name)
        return _TensorAttribute(self, name)


class _TensorAttribute(_TensorProxy, Attribute):
    """An attribute or method of a tensor; which, its use will tell."""


def _make_in_place(name: str) -> Callable[[Proxy, Any], Proxy]:
    target = getattr(operator, name)

    def record(self: Proxy, other: Any) -> Proxy:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return record


for _name in IN_PLACE:
    setattr(_TensorProxy, f"__{_name}__", _make_in_place(_name))


def _is_tensor(proxy: Any, modules: dict[Node, torch.nn.Module]) -> bool:
    """Whether this is surely a tensor and nothing else."""
    if type(proxy) is not _TensorProxy:
        return False
    node = proxy.node
    if node.op in ("placeholder", "get_attr"):
        return True
    if node.op == "call_module":
        return gives_one_tensor(modules[node])
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    home = getattr(node.target, "__module__", None) or "torch"
    if node.op == "call_function" and not home.startswith(("torch", "_operator")):
        return False
    if name in _OTHER_RESULTS or any(key in node.kwargs for key in ("return_indices", "dtype")):
        return False
    if home == "_operator":
        # Sums of sizes are no tensors, nor are parts of what is none.
        return any(
            isinstance(a, Node) and _is_tensor(_TensorProxy(a, proxy.tracer), modules)
            for a in node.args
        )
    return True


def _may_be_none(node: Node, modules: dict[Node, torch.nn.Module]) -> bool:
    """Whether this is what a module of somebody's gave, or a part of that."""
    while node.target is operator.getitem and isinstance(node.args[0], Node):
        node = node.args[0]
    return node.op == "call_module" and not gives_one_tensor(modules[node])


def _flat(thing: Any) -> Iterator[Any]:
    if isinstance(thing, dict):
        thing = list(thing.values())
    if isinstance(thing, (list, tuple)):
        for inner in thing:
            yield from _flat(inner)
    else:
        yield thing


# ---- Watching the code that runs ---------------------------------------------------------------


class _NoComputing(TorchDispatchMode):
    """What is computed from no proxy would be frozen into the graph, a random number too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise Untraceable(f"{func} is computed from no argument")


_lock = threading.RLock()


@contextmanager
def _watched() -> Iterator[None]:
    """While it is entered, code that depends on more than its tensors raises Untraceable."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == thread:
            raise Untraceable("it depends on the state of autograd or autocast")
        return None

    def on_thread(name: str) -> Callable[..., Any]:
        before = getattr(torch, name)
        return lambda *a, **k: refuse() if threading.get_ident() == thread else before(*a, **k)

    thread = threading.get_ident()
    apply = torch.autograd.Function.apply

    def no_function(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() == thread:
            raise Untraceable("it has a backward of its own")
        return apply.__func__(cls, *args, **kwargs)  # type: ignore[attr-defined]

    states = ("is_grad_enabled", "is_autocast_enabled", "is_inference_mode_enabled")
    with (
        _lock,
        patched(
            (builtins, "isinstance", _make_isinstance()),
            (torch.autograd.Function, "apply", classmethod(no_function)),
            *((torch, name, on_thread(name)) for name in states),
        ),
        _NoComputing(),  # type: ignore[no-untyped-call]
    ):
        yield


def _make_isinstance() -> Callable[[Any, Any], bool]:
    """``isinstance`` that takes a proxy of a tensor for a tensor.

    A ``__class__`` that says so would do for Python, but torch's C++ code believes it as well and
    then reads memory that is no tensor's.
    """
    before = builtins.isinstance

    def isinstance_(thing: Any, kinds: Any) -> bool:
        kind = type(thing)
        if kind is not _TensorProxy and kind is not _TensorAttribute:
            return before(thing, kinds)
        home = sys._getframe(1).f_globals.get("__name__", "")
        if home.startswith(("torch.fx", "normdrop.graph", "normdrop.nn")) or before(thing, kinds):
            return before(thing, kinds)
        if _is_tensor(thing, thing.tracer.targets):
            return issubclass(torch.Tensor, kinds)
        if home.startswith("torch."):
            return False
        raise Untraceable("it asks for the type of what may be no tensor")

    return isinstance_


# ---- The tracer --------------------------------------------------------------------------------


class _Tracer(torch.fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(
        self, arguments: Sequence[Any], looks_into: Callable[[torch.nn.Module], bool]
    ) -> None:
        super().__init__()
        self.arguments = arguments
        self.looks_into = looks_into
        self.calls: dict[Node, tuple[Call, ...]] = {}
        self.targets: dict[Node, torch.nn.Module] = {}
        self.failed: list[torch.nn.Module] = []
        self.stack: tuple[Call, ...] = ()
        self.cache: dict[str, Proxy] = {}

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        self.stack = (Call(self.root, tuple(self.arguments)),)
        names = (f"argument_{i}" for i in range(len(self.arguments)))
        return root_fn, [
            self.root,
            *(
                self.create_proxy("placeholder", name, (), {}) if given is TENSOR else given
                for name, given in zip(names, self.arguments, strict=True)
            ),
        ]

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        node = super().create_node(*args, **kwargs)
        self.calls[node] = self.stack
        return node

    def proxy(self, node: Node) -> Proxy:
        return _TensorProxy(node, self)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Proxy):
            return a.node
        if isinstance(a, torch.Tensor) and not isinstance(a, torch.nn.Parameter):
            raise Untraceable("it uses a tensor that is neither parameter nor buffer")
        if isinstance(a, (dict, list, tuple, set)) and type(a) not in _CONTAINERS:
            raise Untraceable(f"it makes a {type(a).__name__}")
        return super().create_arg(a)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Proxy]) -> Any:
        self.cache = parameter_proxy_cache
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(
        self, m: torch.nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        given = [a for a in _flat((args, kwargs)) if isinstance(a, Proxy)]
        asks = tests_for_none(type(m)) and any(_may_be_none(a.node, self.targets) for a in given)
        if self.looks_into(m) and m not in self.failed and not asks:
            mark, before = len(self.calls), state_of(m)
            self.stack += (Call(m, _arguments(m, args, kwargs)),)
            try:
                # Global hooks that a call of the module would run are none of the graph's.
                with chance_untouched():
                    result = type(m).forward(m, *args, **kwargs)
                if not is_same(before, state_of(m)):
                    raise Untraceable(f"{type(m).__name__} changes state that is not a tensor's")
                return result
            except Exception:
                self._forget(mark)
                restore(m, before)
                self.failed.append(m)
            finally:
                self.stack = self.stack[:-1]
        if not gives_one_tensor(m) and any(
            isinstance(a, (list, dict, set)) for a in (*args, *kwargs.values())
        ):
            raise Untraceable("a module may write to the list that it is given")
        if not gives_one_tensor(m) and any(
            tests_for_none(type(call.module)) for call in self.stack
        ):
            raise Untraceable(f"what {type(m).__name__} gives may be None, and it asks for that")
        proxy = self.create_proxy("call_module", self.path_of_module(m), args, kwargs)
        self.targets[proxy.node] = m
        return proxy

    def _forget(self, mark: int) -> None:
        """Take back the nodes recorded since."""
        for node in reversed(list(self.calls)[mark:]):
            for name in [name for name, proxy in self.cache.items() if proxy.node is node]:
                del self.cache[name]
            self.graph.erase_node(node)
            self.targets.pop(node, None)
            del self.calls[node]


_CONTAINERS = (dict, list, tuple, torch.Size, torch.fx.immutable_collections.immutable_list)


def _arguments(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...] | None:
    if kwargs:
        try:
            bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
        except (TypeError, ValueError):
            return None
        if bound.kwargs:
            return None
        args = bound.args[1:]
    result: list[Any] = []
    for value in args:
        if type(value) is _TensorProxy or type(value) is _TensorAttribute:
            result.append(TENSOR)
        elif type(value) in CONSTANTS:
            result.append(value)
        else:
            return None
    return tuple(result)


def default_arguments(module: torch.nn.Module) -> tuple[Any, ...]:
    """Tensors for the arguments that must be given, and for the others nothing."""
    result: list[Any] = []
    for parameter in list(inspect.signature(type(module).forward).parameters.values())[1:]:
        if parameter.default is not parameter.empty:
            break
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            result.append(TENSOR)
        elif parameter.kind is parameter.KEYWORD_ONLY:
            raise Untraceable(f"it must be given {parameter.name}")
    return tuple(result)


def looks_through(module: torch.nn.Module, with_hooks: bool = False) -> bool:
    """Whether a module is made of others in Python code that may be traced through."""
    forward = getattr(type(module), "forward", None)
    home = getattr(forward, "__module__", "") or ""
    return (
        (forward is torch.nn.Sequential.forward or not home.startswith(("torch.", "normdrop.nn.")))
        and (with_hooks or not has_hooks(module))
        and not is_replaced(module)
        and not isinstance(module, torch.jit.ScriptModule)
    )
