"""What convert would do to a model, as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from normdrop import nn
from normdrop.arguments import check_choice, check_flag, check_model
from normdrop.graph import fusion
from normdrop.graph.forward import FusedForward
from normdrop.graph.modules import is_norm
from normdrop.memory.low import Memory
from normdrop.surgery.layout import Layout, weights_to_lay_out
from normdrop.surgery.linear import Products, layers_to_choose

__all__ = ["CLASSES", "Plan", "Row", "plan"]

CLASSES: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.BatchNorm1d: nn.BatchNorm1d,
    torch.nn.BatchNorm2d: nn.BatchNorm2d,
    torch.nn.BatchNorm3d: nn.BatchNorm3d,
    torch.nn.Dropout: nn.Dropout,
    torch.nn.Dropout1d: nn.Dropout1d,
    torch.nn.Dropout2d: nn.Dropout2d,
    torch.nn.Dropout3d: nn.Dropout3d,
    torch.nn.AlphaDropout: nn.AlphaDropout,
    torch.nn.FeatureAlphaDropout: nn.FeatureAlphaDropout,
}
"""Torch's classes, each with ours that takes its place."""

OURS = frozenset(CLASSES.values())

_NAMES = frozenset(kind.__name__ for kind in CLASSES)

Action = Literal["replace", "fuse", "leave", "already"]

_FAMILIES = (torch.nn.modules.batchnorm._BatchNorm, torch.nn.modules.dropout._DropoutNd)


@dataclass(frozen=True)
class Row:
    """What becomes of one batch normalization or dropout.

    Attributes:
        path: its name in the model, as in the state_dict; empty for the model itself.
        type: its class.
        action: "replace" (by our class), "fuse" (the same, and what follows it is computed in the
            same operator), "leave", or "already" (ours, and as far as it goes).
        why: what it is fused with, why it is not fused, or the reason for leaving it.
    """

    path: str
    type: str
    action: Action
    why: str


@dataclass(frozen=True)
class Plan:
    """What :func:`plan` gives; ``print`` gives a table.

    Attributes:
        rows: one for each batch normalization and dropout.
        notes: what the options ``layout``, ``linear`` and ``memory`` would do.
    """

    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def count(self, action: Action) -> int:
        """How many layers have this action."""
        return sum(row.action == action for row in self.rows)

    def __str__(self) -> str:
        if not self.rows:
            return "\n".join(["no batch normalization, no dropout", *self.notes])
        header = ("layer", "class", "action", "why")
        lines = [header, *((r.path or "(model)", r.type, r.action, r.why) for r in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(3)]
        table = [
            "  ".join([*(c.ljust(w) for c, w in zip(line, widths, strict=False)), line[3]]).rstrip()
            for line in lines
        ]
        counts = Counter(row.action for row in self.rows)
        table.append(", ".join(f"{number} {action}" for action, number in counts.items()))
        return "\n".join([*table, *self.notes])

    __repr__ = __str__


def plan(
    model: torch.nn.Module,
    *,
    fuse: bool = True,
    layout: Layout = "keep",
    linear: Products = "keep",
    memory: Memory = "normal",
) -> Plan:
    """Say what :func:`normdrop.convert` would replace, fuse or leave, and why; change nothing.

    Every batch normalization and dropout of the model has a row, one that stands in several places
    has one for all of them.

    Args:
        model: any module.
        fuse: whether batch normalization shall be fused with what follows.
        layout: as in :func:`normdrop.convert`.
        linear: as in :func:`normdrop.convert`.
        memory: as in :func:`normdrop.convert`.

    Raises:
        UserError: another ``layout``, ``linear`` or ``memory``.
        TypeError: no module, or a ``fuse`` that is neither True nor False.

    Example:
        >>> block = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8),
        ...                             torch.nn.ReLU(), torch.nn.Dropout2d(0.1))
        >>> print(plan(block))
        layer  class        action   why
        1      BatchNorm2d  fuse     with relu
        3      Dropout2d    replace
        1 fuse, 1 replace
    """
    check_model("plan", model)
    check_flag("plan", "fuse", fuse)
    check_choice("memory", memory, Memory)
    found = fusion.find(model) if fuse else []
    notes = _notes(model, layout, linear, memory, found)
    fusible = {id(norm): text for forward in found for norm, text in forward.fused}
    against = fusion.reasons_against(model) if fuse else {}
    present = dict(fusion.fused_in(model))
    rows = []
    quantized = _in_quantized(model)
    for path, others, module in _named(model):
        if isinstance(module, torch.jit.ScriptModule):
            name = getattr(module, "original_name", "")
            if name in _NAMES:
                rows.append(Row(path, name, "leave", "it is compiled by torch.jit"))
            continue
        if not isinstance(module, _FAMILIES):
            continue
        reason = reason_to_leave(module, id(module) in quantized)
        action: Action
        if reason is not None:
            action, why = "leave", reason
        elif id(module) in present:
            action, why = "already", present[id(module)]
        elif id(module) in fusible:
            action, why = "fuse", fusible[id(module)]
        else:
            action, why = ("already" if type(module) in OURS else "replace"), ""
            if action == "replace" and id(module) in against:
                why = f"not fused: {against[id(module)]}"
        also = f"also at {', '.join(others)}" if others else ""
        rows.append(Row(path, type(module).__name__, action, "; ".join(filter(None, (why, also)))))
    return Plan(tuple(rows), notes)


def _notes(
    model: torch.nn.Module,
    layout: Layout,
    linear: Products,
    memory: Memory,
    found: list[FusedForward],
) -> tuple[str, ...]:
    notes = []
    shortcuts = [forward for forward in found if not forward.fused]  # the others have a norm
    if shortcuts:
        notes.append(f"shortcuts: {len(shortcuts)} that slice and pad become one call")
    if layout != "keep":
        count = len(weights_to_lay_out(model, layout))
        notes.append(f"layout: {count} convolution weight{'s' * (count != 1)} in channels_last")
    if linear != "keep":
        count = len(layers_to_choose(model, linear))
        notes.append(f"linear: {count} linear layer{'s' * (count != 1)} may take oneDNN's products")
    if memory != "normal" and any(map(is_norm, model.modules())):
        notes.append("memory: outputs of batch normalization are worked out again in backward")
    return tuple(notes)


def replaceable(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers of torch's that are replaced, each once."""
    quantized = _in_quantized(model)
    return [
        module
        for module in model.modules()
        if type(module) in CLASSES and reason_to_leave(module, id(module) in quantized) is None
    ]


def reason_to_leave(module: torch.nn.Module, is_quantized: bool = False) -> str | None:
    """Why a batch normalization or dropout stays as it is, or None."""
    kind = type(module)
    if kind in OURS:
        return None
    if isinstance(module, torch.nn.SyncBatchNorm):
        return "its statistics are those of all processes"
    if isinstance(module, torch.nn.modules.lazy.LazyModuleMixin):
        return "it is lazy: call the model on one batch first"
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "it is parametrized"
    if is_quantized or getattr(module, "qconfig", None) is not None:
        return "it is prepared for quantization"
    if kind not in CLASSES:
        return "a subclass that normdrop does not know"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    return None


def _named(model: torch.nn.Module) -> Iterator[tuple[str, list[str], torch.nn.Module]]:
    """Every module once, with its first path and its others."""
    paths: dict[torch.nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    for module, (first, *others) in paths.items():
        yield first, others, module


def _in_quantized(model: torch.nn.Module) -> set[int]:
    """Everything inside torch's quantized and quantization-aware modules."""
    return {
        id(inner)
        for outer in model.modules()
        if type(outer).__module__.startswith("torch.ao.")
        for inner in outer.modules()
    }
