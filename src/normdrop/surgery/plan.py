"""What convert would do to a model, as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, cast

import torch

from normdrop.arguments import check_choice, check_flag, check_model
from normdrop.graph import fusion
from normdrop.graph.forward import FusedForward
from normdrop.graph.modules import is_norm
from normdrop.memory.low import Memory
from normdrop.nn.conv2d import Conv2d
from normdrop.surgery.classes import CLASSES, OURS, in_quantized, reason_to_leave
from normdrop.surgery.convolution import Convolution, reason_to_keep
from normdrop.surgery.layout import Layout, weights_to_lay_out
from normdrop.surgery.linear import Products, layers_to_choose

__all__ = ["Plan", "Row", "plan"]

_NAMES = frozenset(kind.__name__ for kind in CLASSES)

Action = Literal["replace", "fuse", "leave", "already"]

_FAMILIES = (torch.nn.modules.batchnorm._BatchNorm, torch.nn.modules.dropout._DropoutNd)


@dataclass(frozen=True)
class Row:
    """What becomes of one batch normalization, dropout or convolution.

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
        rows: one for each batch normalization and dropout, and with ``convolution`` each Conv2d.
        notes: what the options ``layout``, ``linear``, ``convolution`` and ``memory`` would do,
            and how many shortcuts become one call.
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
    convolution: Convolution = "keep",
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
        convolution: as in :func:`normdrop.convert`. With "auto" convolutions have rows, too.
        memory: as in :func:`normdrop.convert`.

    Raises:
        UserError: another ``layout``, ``linear``, ``convolution`` or ``memory``.
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
    check_choice("convolution", convolution, Convolution)
    found = fusion.find(model) if fuse else []
    notes = _notes(model, layout, linear, convolution, memory, found)
    fusible = {id(norm): text for forward in found for norm, text in forward.fused}
    against = fusion.reasons_against(model) if fuse else {}
    present = dict(fusion.fused_in(model))
    rows = []
    quantized = in_quantized(model)
    for path, others, module in _named(model):
        if isinstance(module, torch.jit.ScriptModule):
            name = getattr(module, "original_name", "")
            if name in _NAMES:
                rows.append(Row(path, name, "leave", "it is compiled by torch.jit"))
            continue
        is_convolution = convolution != "keep" and isinstance(module, torch.nn.Conv2d)
        if not isinstance(module, _FAMILIES) and not is_convolution:
            continue
        reason = reason_to_leave(module, id(module) in quantized)
        if reason is None and is_convolution:
            reason = reason_to_keep(cast(torch.nn.Conv2d, module))
        action: Action
        if reason is not None:
            action, why = "leave", reason
        elif id(module) in present:
            action, why = "already", present[id(module)]
        elif id(module) in fusible:
            action, why = "fuse", fusible[id(module)]
        else:
            is_ours = type(module) in OURS or type(module) is Conv2d
            action, why = ("already" if is_ours else "replace"), ""
            if action == "replace" and id(module) in against:
                why = f"not fused: {against[id(module)]}"
        also = f"also at {', '.join(others)}" if others else ""
        rows.append(Row(path, type(module).__name__, action, "; ".join(filter(None, (why, also)))))
    return Plan(tuple(rows), notes)


def _notes(
    model: torch.nn.Module,
    layout: Layout,
    linear: Products,
    convolution: Convolution,
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
    if convolution != "keep" and layout == "keep":
        notes.append("convolution: acts where the channels lie last; layout='auto' lays them so")
    if memory != "normal" and any(map(is_norm, model.modules())):
        notes.append("memory: outputs of batch normalization are worked out again in backward")
    return tuple(notes)


def _named(model: torch.nn.Module) -> Iterator[tuple[str, list[str], torch.nn.Module]]:
    """Every module once, with its first path and its others."""
    paths: dict[torch.nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    for module, (first, *others) in paths.items():
        yield first, others, module
