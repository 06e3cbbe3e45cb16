"""Give convolutions the faster kernels, by rules that look at the layer alone."""

from __future__ import annotations

from typing import Literal

import torch

from normdrop.arguments import check_choice
from normdrop.nn.conv2d import Conv2d, reason_against_kernels
from normdrop.ops.conv2d import HAS_CONV2D
from normdrop.surgery.classes import in_quantized, reason_to_leave

__all__ = ["Convolution", "reason_to_keep", "set_convolution"]

Convolution = Literal["auto", "keep"]


def set_convolution(model: torch.nn.Module, convolution: Convolution) -> None:
    """With "auto", let 3×3 convolutions take Winograd's algorithm; "keep" changes nothing.

    The layers stay the same objects and get the class :class:`normdrop.nn.conv2d.Conv2d`, which
    decides at every call whether its input is one that gains: docs/convolution.md.

    Raises:
        UserError: another word.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(16, 16, 3, padding=1))
        >>> set_convolution(model, "auto")
        >>> type(model[0]).__module__
        'normdrop.nn.conv2d'
    """
    check_choice("convolution", convolution, Convolution)
    if convolution == "keep":
        return
    quantized = in_quantized(model)
    for module in model.modules():
        if (
            type(module) is torch.nn.Conv2d
            and reason_to_leave(module, id(module) in quantized) is None
            and reason_to_keep(module) is None
        ):
            module.__class__ = Conv2d


def reason_to_keep(layer: torch.nn.Conv2d) -> str | None:
    """Why a layer keeps torch's convolution, or None."""
    if not HAS_CONV2D:
        return "this processor has no kernel for it"
    if layer.weight.dtype is not torch.float32:
        return f"its weight is {layer.weight.dtype}".replace("torch.", "")
    return reason_against_kernels(layer)
