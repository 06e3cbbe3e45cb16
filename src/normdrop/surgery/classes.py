"""Torch's classes with ours that take their places, and what keeps a layer from it."""

from __future__ import annotations

import torch

from normdrop import nn
from normdrop.nn.conv2d import Conv2d

__all__ = ["CLASSES", "OURS", "in_quantized", "reason_to_leave", "replaceable"]

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


def replaceable(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers of torch's that are replaced, each once."""
    quantized = in_quantized(model)
    return [
        module
        for module in model.modules()
        if type(module) in CLASSES and reason_to_leave(module, id(module) in quantized) is None
    ]


def reason_to_leave(module: torch.nn.Module, is_quantized: bool = False) -> str | None:
    """Why a layer that ours could replace stays as it is, or None."""
    kind = type(module)
    if kind in OURS or kind is Conv2d:
        return None
    if isinstance(module, torch.nn.SyncBatchNorm):
        return "its statistics are those of all processes"
    if isinstance(module, torch.nn.modules.lazy.LazyModuleMixin):
        return "it is lazy: call the model on one batch first"
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "it is parametrized"
    if is_quantized or getattr(module, "qconfig", None) is not None:
        return "it is prepared for quantization"
    if kind not in CLASSES and kind is not torch.nn.Conv2d:
        return "a subclass that normdrop does not know"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    return None


def in_quantized(model: torch.nn.Module) -> set[int]:
    """Everything inside torch's quantized and quantization-aware modules."""
    return {
        id(inner)
        for outer in model.modules()
        if type(outer).__module__.startswith("torch.ao.")
        for inner in outer.modules()
    }
