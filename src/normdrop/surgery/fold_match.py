"""What can be folded: which batch normalizations follow what, in the records of a model."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from normdrop import nn
from normdrop.nn.linear import Linear
from normdrop.surgery.fold_calls import AddActivate
from normdrop.surgery.fusion_forward import FusedForward
from normdrop.surgery.fusion_modules import has_hooks
from normdrop.surgery.fusion_patterns import only_user
from normdrop.surgery.fusion_tracing import (
    Trace,
    Untraceable,
    default_arguments,
    looks_through,
    trace,
)

__all__ = ["Match", "Matches", "Scope", "does_more", "find_matches", "find_scopes"]

BatchNorm = torch.nn.modules.batchnorm._BatchNorm
Node = torch.fx.Node

_N = torch.nn
_NORMS: dict[type[_N.Module], int | None] = {
    _N.BatchNorm1d: 1,
    _N.BatchNorm2d: 2,
    _N.BatchNorm3d: 3,
    nn.BatchNorm1d: 1,
    nn.BatchNorm2d: 2,
    nn.BatchNorm3d: 3,
    _N.SyncBatchNorm: None,
}
"""Classes that are folded, and the sides of their images; a SyncBatchNorm takes any."""

_LAYERS: dict[type[_N.Module], int] = {
    _N.Linear: 1,
    Linear: 1,
    _N.Conv1d: 1,
    _N.Conv2d: 2,
    _N.Conv3d: 3,
    _N.ConvTranspose1d: 1,
    _N.ConvTranspose2d: 2,
    _N.ConvTranspose3d: 3,
}


@dataclass(eq=False)
class Scope:
    """A module and the record of its forward, when it is called with these arguments."""

    module: torch.nn.Module
    arguments: tuple[Any, ...]
    trace: Trace


@dataclass(eq=False)
class Match:
    """A batch normalization, the layer before it, and where they are."""

    layer: Any
    norm: Any
    layer_path: str
    norm_path: str
    scope: Scope
    norm_node: Node


@dataclass
class Matches:
    """Everything that was found.

    Attributes:
        found: what is folded.
        left: why, for the name of every batch normalization that is not.
        convolutions: the nodes of a scope that call one which may add and activate.
    """

    found: list[Match] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    convolutions: dict[Scope, list[Node]] = field(default_factory=dict)


def does_more(module: torch.nn.Module) -> bool:
    """Whether calling the module does more than its class says: hooks, or a forward of its own."""
    return "forward" in vars(module) or has_hooks(module)


# ---- Records -----------------------------------------------------------------------------------


def find_scopes(
    model: torch.nn.Module, done: set[torch.nn.Module] | None = None
) -> Iterator[Scope]:
    """Record the model, or where that fails its children, and theirs, each by itself."""
    done = set() if done is None else done
    if model in done:
        return
    done.add(model)
    visited: set[torch.nn.Module] = set()
    called: set[torch.nn.Module] = set()
    if _is_own(model, True):
        try:
            arguments = default_arguments(model)
            found = trace(
                model,
                model.training,
                arguments,
                lambda m: _is_own(m, False) and m.training is model.training,
            )
        except (Untraceable, TypeError, ValueError):  # the last two by a forward without signature
            pass
        else:
            yield Scope(model, arguments, found)
            visited = {call.module for calls in found.calls.values() for call in calls}
            called = set(found.modules.values())
            done |= visited
    # What was called as a whole, or not at all, has a record of its own.
    for child in _outermost(model, visited, called):
        yield from find_scopes(child, done)


def _outermost(
    module: torch.nn.Module, visited: set[torch.nn.Module], called: set[torch.nn.Module]
) -> Iterator[torch.nn.Module]:
    known = visited | called
    for child in module.children():
        # A mere container of what is called one by one has no part in it.
        if child in visited or (child not in called and not known.isdisjoint(child.modules())):
            yield from _outermost(child, visited, called)
        else:
            yield child


def _is_own(module: torch.nn.Module, with_hooks: bool) -> bool:
    """Whether a module's forward is its class's, which may be traced."""
    forward = vars(module).get("forward")
    return (
        looks_through(module, with_hooks)
        and (forward is None or isinstance(forward, FusedForward))
        and not isinstance(module, AddActivate)
    )


# ---- Matches -----------------------------------------------------------------------------------


def find_matches(model: torch.nn.Module, scopes: list[Scope]) -> Matches:
    """Match every batch normalization with the layer before it, or say why not."""
    uses = _Uses(model, scopes)
    matches = Matches()
    for scope in scopes:
        modules = scope.trace.modules
        matches.convolutions[scope] = [
            node for node, layer in modules.items() if _may_add_and_activate(node, layer, uses)
        ]
    for path, module in model.named_modules():
        if not isinstance(module, BatchNorm):
            continue
        why = _against_norm(module) or uses.against(module)
        if not why:
            scope, node = uses.places[module]
            why = _against_layer(scope.trace, node, module, uses)
            if not why:
                layer = scope.trace.modules[node.args[0]]  # type: ignore[index]
                matches.found.append(Match(layer, module, uses.paths[layer], path, scope, node))
        if why:
            matches.left[path] = why
    return matches


class _Uses:
    """Where the modules of a model are called, and whether anything else has a part in them."""

    def __init__(self, model: torch.nn.Module, scopes: list[Scope]) -> None:
        self.paths = {module: path for path, module in model.named_modules()}
        self.places: dict[torch.nn.Module, tuple[Scope, Node]] = {}
        self.calls: Counter[torch.nn.Module] = Counter()
        modules = list(model.modules())
        self.held = Counter(child for m in modules for child in m._modules.values())
        self.owners: Counter[int] = Counter()
        for module in modules:
            self.owners.update({id(t) for t in _tensors(module)})
        for scope in scopes:
            for node in scope.trace.graph.nodes:
                if node.op == "call_module":
                    module = scope.trace.modules[node]
                    self.calls[module] += 1
                    self.places[module] = scope, node
                elif node.op == "get_attr":
                    read = operator.attrgetter(str(node.target))(scope.module)
                    self.owners[id(read)] += 1

    def against(self, module: torch.nn.Module) -> str:
        """Say what forbids to change a module."""
        if self.held[module] > 1 or self.calls[module] > 1:
            return "used more than once"
        if any(self.owners[id(tensor)] > 1 for tensor in _tensors(module)):
            return "shares a parameter, or it is read elsewhere"
        if self.calls[module] == 0:
            return "no forward that can be traced calls it"
        return ""


def _tensors(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    held = (*module._parameters.values(), *module._buffers.values())
    return (tensor for tensor in held if tensor is not None)


def _against_norm(norm: BatchNorm) -> str:
    """Say what forbids to fold a batch normalization, whatever is before it."""
    if type(norm) not in _NORMS:
        return f"class {type(norm).__name__} is unknown"
    if norm.training:
        return "in training mode"
    if norm.running_mean is None or norm.running_var is None:
        return "has no running statistics"
    if does_more(norm):
        return "has a hook"
    if getattr(norm, "nonfinite", "propagate") == "raise":
        return "checks its input (nonfinite='raise')"
    return ""


def _against_layer(record: Trace, node: Node, norm: BatchNorm, uses: _Uses) -> str:
    """Say what forbids to fold a batch normalization into the layer before it."""
    before = node.args[0] if node.args else None
    if not isinstance(before, Node):
        return "called without a plain input"
    if before.op != "call_module":
        return f"follows {_name(before)}, not a layer"
    layer, target = record.modules[before], before.target
    if type(layer) not in _LAYERS:
        return f"follows {target} ({type(layer).__name__})"
    sides, outputs = _NORMS[type(norm)], getattr(layer, "out_channels", None)
    outputs = layer.out_features if outputs is None else outputs
    if sides not in (None, _LAYERS[type(layer)]) or norm.num_features != outputs:
        return f"follows {target}, of other dimensions"
    if does_more(layer):
        return f"{target} has a hook"
    why = uses.against(layer)
    if why:
        return f"{target}: {why}"
    if only_user(before) is not node:
        return f"the output of {target} is read elsewhere"
    weight: Any = layer.weight
    if not weight.is_floating_point():
        return f"{target} has a weight of {weight.dtype}"
    return ""


def _may_add_and_activate(node: Node, layer: torch.nn.Module, uses: _Uses) -> bool:
    return (
        type(layer) is torch.nn.Conv2d
        and len(node.args) == 1
        and not node.kwargs
        and not isinstance(layer.padding, str)
        and layer.padding_mode == "zeros"
        and not does_more(layer)
        and not uses.against(layer)
    )


def _name(node: Node) -> str:
    if node.op == "placeholder":
        return "the input"
    return str(getattr(node.target, "__name__", node.target))
