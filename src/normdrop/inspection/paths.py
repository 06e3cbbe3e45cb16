"""Which path each layer of a model takes: a kernel, or torch's operators and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from normdrop.graph import fusion
from normdrop.graph.modules import is_fusible_norm
from normdrop.inspection.visits import visited
from normdrop.ops.paths import told
from normdrop.surgery.classes import CLASSES, reason_to_leave

__all__ = ["paths_of"]

_FAMILIES = (torch.nn.modules.batchnorm._BatchNorm, torch.nn.modules.dropout._DropoutNd)


def paths_of(
    model: torch.nn.Module, names: Mapping[torch.nn.Module, str], run: Callable[[], Any]
) -> dict[str, str]:
    """Run the model and give, by name, the path of each of its layers that ran.

    The paths are those that the operators tell while they run, by the very test that decides. So
    nothing else may look on meanwhile: under a dispatch mode some would take another one.
    """
    paths = _Paths()
    with visited(names, paths), told(paths.hear):
        run()
    against = fusion.reasons_against(model)
    converted = {norm for norm, _ in fusion.fused_in(model)}
    result = {}
    for module, heard in paths.heard.items():
        path = _path(module, heard)
        alone = "" if module in paths.fused else _unfused(module, against, converted)
        result[names[module]] = "; ".join(filter(None, (path, alone)))
    return result


class _Paths:
    """What is heard while a module is at work; those that are fused do not say more."""

    def __init__(self) -> None:
        self.heard: dict[torch.nn.Module, list[str]] = {}
        self.fused: set[torch.nn.Module] = set()
        self._at_work: list[torch.nn.Module] = []

    def enter(self, module: torch.nn.Module, fused: str) -> None:
        self._at_work.append(module)
        self.heard.setdefault(module, [])
        if fused:
            self.fused.add(module)

    def leave(self, module: torch.nn.Module, output: Any) -> None:
        self._at_work.pop()

    def hear(self, path: str) -> None:
        heard = self.heard[self._at_work[-1]]
        if path not in heard:
            heard.append(path)


def _path(module: torch.nn.Module, heard: list[str]) -> str:
    if heard:
        return ", ".join(heard)
    if isinstance(module, _FAMILIES):
        if type(module) in CLASSES.values():
            return "nothing to do"
        return f"torch: {reason_to_leave(module) or 'it is not converted'}"
    return "" if next(module.children(), None) is not None else "torch"


def _unfused(module: torch.nn.Module, against: Mapping[int, str], converted: set[int]) -> str:
    """Why a batch normalization that ran by itself is not fused with what follows."""
    if id(module) in converted:
        return "not fused: something is not as it was when it was converted"
    if id(module) in against:
        return f"not fused: {against[id(module)]}"
    return "not fused: convert would" if is_fusible_norm(module) else ""
