"""What can be folded: which batch normalizations follow what, in the records of a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from normdrop import nn
from normdrop.graph.modules import does_more
from normdrop.graph.nodes import name_of, only_user
from normdrop.graph.tracing import Trace
from normdrop.graph.uses import Uses
from normdrop.nn.conv2d import Conv2d
from normdrop.nn.linear import Linear

__all__ = ["Match", "Matches", "find_matches"]

BatchNorm = torch.nn.modules.batchnorm._BatchNorm

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
    Conv2d: 2,
    _N.Conv1d: 1,
    _N.Conv2d: 2,
    _N.Conv3d: 3,
    _N.ConvTranspose1d: 1,
    _N.ConvTranspose2d: 2,
    _N.ConvTranspose3d: 3,
}


@dataclass(eq=False)
class Match:
    """A batch normalization, the layer before it, and where they are."""

    layer: Any
    norm: Any
    layer_path: str
    norm_path: str
    trace: Trace
    norm_node: Node


@dataclass
class Matches:
    """Everything that was found.

    Attributes:
        found: what is folded.
        left: why, for the name of every batch normalization that is not.
        convolutions: the nodes of a trace that call one which may add and activate.
    """

    found: list[Match] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    convolutions: list[tuple[Trace, list[Node]]] = field(default_factory=list)


def find_matches(model: torch.nn.Module) -> Matches:
    """Match every batch normalization with the layer before it, or say why not."""
    uses = Uses(model)
    matches = Matches()
    for trace in uses.traces:
        may_do_more = [n for n, m in trace.modules.items() if _may_add_and_activate(n, m, uses)]
        matches.convolutions.append((trace, may_do_more))
    for path, module in model.named_modules():
        if not isinstance(module, BatchNorm):
            continue
        why = _against_norm(module) or uses.against(module)
        if not why:
            trace, node = uses.places[module]
            why = _against_layer(trace, node, module, uses)
            if not why:
                layer = trace.modules[node.args[0]]  # type: ignore[index]
                matches.found.append(Match(layer, module, uses.paths[layer], path, trace, node))
        if why:
            matches.left[path] = why
    return matches


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


def _against_layer(record: Trace, node: Node, norm: BatchNorm, uses: Uses) -> str:
    """Say what forbids to fold a batch normalization into the layer before it."""
    before = node.args[0] if node.args else None
    if not isinstance(before, Node):
        return "called without a plain input"
    if before.op != "call_module":
        what = "the input" if before.op == "placeholder" else name_of(before)
        return f"follows {what}, not a layer"
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
    return uses.against_pair(layer, norm)


def _may_add_and_activate(node: Node, layer: torch.nn.Module, uses: Uses) -> bool:
    return (
        type(layer) in (torch.nn.Conv2d, Conv2d)
        and len(node.args) == 1
        and not node.kwargs
        and not isinstance(layer.padding, str)
        and layer.padding_mode == "zeros"
        and not does_more(layer)
        and not uses.against(layer)
    )
