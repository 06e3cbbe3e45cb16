"""What can be folded: which batch normalizations follow what, in the records of a model."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from normdrop import nn
from normdrop.surgery.fold_scopes import Scope, has_hooks

__all__ = ["Match", "Matches", "find_matches", "is_mutating", "name_of_activation", "takes_more"]

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
    _N.Conv1d: 1,
    _N.Conv2d: 2,
    _N.Conv3d: 3,
    _N.ConvTranspose1d: 1,
    _N.ConvTranspose2d: 2,
    _N.ConvTranspose3d: 3,
}
OURS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

_MODULES: dict[type[_N.Module], str] = {
    _N.ReLU: "relu",
    _N.ReLU6: "relu6",
    _N.SiLU: "silu",
    _N.Hardswish: "hardswish",
}
_FUNCTIONS: dict[Any, str] = {
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu: "relu",
    F.relu6: "relu6",
    F.silu: "silu",
    F.hardswish: "hardswish",
    "relu": "relu",
    "relu_": "relu",
}
_ADDITIONS = (operator.add, operator.iadd, torch.add)
_IN_PLACE = {
    getattr(operator, name)
    for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "setitem")
}


@dataclass
class Match:
    """A batch normalization, the layer before it, and where both are called."""

    scope: Scope
    layer_node: Node
    norm_node: Node
    layer_path: str
    norm_path: str

    @property
    def layer(self) -> Any:
        return self.scope.at(self.layer_node.target)

    @property
    def norm(self) -> Any:
        return self.scope.at(self.norm_node.target)


@dataclass
class Matches:
    """Everything that was found.

    Attributes:
        found: what is folded.
        left: why, for the name of every batch normalization that is not.
        single: names of the layers (convolutions) that are called once and may take an activation.
    """

    found: list[Match] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    calls: Counter[int] = field(default_factory=Counter)
    shared: set[int] = field(default_factory=set)
    read: set[int] = field(default_factory=set)


def find_matches(model: torch.nn.Module, scopes: list[Scope]) -> Matches:
    """Match every batch normalization with the layer before it, or say why not."""
    matches = Matches()
    names: Counter[int] = Counter()
    owners: Counter[int] = Counter()
    for _, module in model.named_modules(remove_duplicate=False):
        names[id(module)] += 1
    for module in model.modules():
        owners.update({id(p) for p in module._parameters.values() if p is not None})
    matches.shared = {key for key, count in (names + owners).items() if count > 1}
    places: dict[int, tuple[Scope, Node]] = {}
    for scope in scopes:
        for node in scope.graph.nodes:
            if node.op == "call_module":
                module = scope.at(node.target)
                matches.calls[id(module)] += 1
                places[id(module)] = scope, node
            elif node.op == "get_attr":
                matches.read.add(id(operator.attrgetter(str(node.target))(scope.module)))
    for path, module in model.named_modules():
        if not isinstance(module, BatchNorm):
            continue
        why = _against_norm(module, matches)
        if not why:
            scope, node = places[id(module)]
            layer_node = node.args[0] if node.args else None
            why = _against_layer(scope, node, layer_node, module, matches)
            if not why and isinstance(layer_node, Node):
                head = f"{scope.path}." if scope.path else ""
                match = Match(scope, layer_node, node, f"{head}{layer_node.target}", path)
                matches.found.append(match)
        if why:
            matches.left[path] = why
    return matches


def _against_norm(norm: BatchNorm, matches: Matches) -> str:
    """Say what forbids to fold a batch normalization, whatever is before it."""
    if type(norm) not in _NORMS:
        return f"class {type(norm).__name__} is unknown"
    if norm.training:
        return "in training mode"
    if norm.running_mean is None or norm.running_var is None:
        return "has no running statistics"
    if has_hooks(norm):
        return "has a hook"
    if getattr(norm, "nonfinite", "propagate") == "raise":
        return "checks its input (nonfinite='raise')"
    return _against_sharing(norm, matches)


def _against_sharing(module: torch.nn.Module, matches: Matches) -> str:
    if id(module) in matches.shared or matches.calls[id(module)] > 1:
        return "used more than once"
    parameters = [p for p in module._parameters.values() if p is not None]
    if any(id(p) in matches.shared for p in parameters):
        return "shares a parameter"
    if any(id(tensor) in matches.read for tensor in (*parameters, *module.buffers())):
        return "a parameter is read elsewhere"
    if matches.calls[id(module)] == 0:
        return "no forward that torch.fx can trace calls it"
    return ""


def _against_layer(scope: Scope, node: Node, before: Any, norm: BatchNorm, matches: Matches) -> str:
    """Say what forbids to fold a batch normalization into the layer before it."""
    if not isinstance(before, Node):
        return "called without a plain input"
    if before.op != "call_module":
        return f"follows {_name(before)}, not a layer"
    layer = scope.at(before.target)
    target = before.target
    if type(layer) not in _LAYERS:
        return f"follows {target} ({type(layer).__name__})"
    sides = _NORMS[type(norm)]
    if sides is not None and sides != _LAYERS[type(layer)]:
        return f"follows {target}, of other dimensions"
    if has_hooks(layer):
        return f"{target} has a hook"
    why = _against_sharing(layer, matches)
    if why:
        return f"{target}: {why}"
    if len(before.users) > 1:
        return f"the output of {target} is read elsewhere"
    if any(is_mutating(n, scope) for n in between(before, node)):
        return f"something is written in place between {target} and it"
    weight: Any = layer.weight
    if not weight.is_floating_point():
        return f"{target} has a weight of {weight.dtype}"
    return ""


def takes_more(scope: Scope, node: Node, matches: Matches) -> bool:
    """Whether the node calls a convolution that can be made to add and activate."""
    if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return False
    layer = scope.at(node.target)
    return (
        type(layer) is torch.nn.Conv2d
        and not isinstance(layer.padding, str)
        and layer.padding_mode == "zeros"
        and not has_hooks(layer)
        and not _against_sharing(layer, matches)
    )


def between(first: Node, last: Node) -> Iterator[Node]:
    """Give the nodes after the first and before the last."""
    node = first.next
    while node is not last and node.op != "root":
        yield node
        node = node.next


def name_of_activation(scope: Scope, node: Node) -> str | None:
    """Give the name of an activation that does nothing but activate its one argument."""
    if len(node.args) != 1 or set(node.kwargs) - {"inplace"}:
        return None
    if node.op == "call_module":
        module = scope.at(node.target)
        return None if has_hooks(module) else _MODULES.get(type(module))
    return _FUNCTIONS.get(node.target) if node.op.startswith("call_") else None


def summands(node: Node) -> tuple[Node, Node] | None:
    """Give the two tensors that a node adds, or None."""
    is_addition = node.op == "call_function" and node.target in _ADDITIONS
    if not is_addition and not (node.op == "call_method" and node.target in ("add", "add_")):
        return None
    if len(node.args) != 2 or node.kwargs:
        return None
    first, second = node.args
    if isinstance(first, Node) and isinstance(second, Node) and first is not second:
        return first, second
    return None


def is_mutating(node: Node, scope: Scope) -> bool:
    """Whether a node may write into one of its arguments."""
    if node.op == "call_module":
        return bool(getattr(scope.at(node.target), "inplace", False))
    if "out" in node.kwargs or node.kwargs.get("inplace") or True in node.args:
        return True
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    if node.op not in ("call_method", "call_function"):
        return False
    return node.target in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))


def _name(node: Node) -> str:
    if node.op == "placeholder":
        return "the input"
    return str(getattr(node.target, "__name__", node.target))
