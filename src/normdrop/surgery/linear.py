"""Give linear layers the faster library's products."""

from __future__ import annotations

from typing import Literal

import torch

from normdrop.arguments import check_choice
from normdrop.nn.linear import Linear

__all__ = ["Products", "layers_to_choose", "set_linear"]

Products = Literal["auto", "keep"]


def set_linear(model: torch.nn.Module, linear: Products) -> None:
    """With "auto", let torch.nn.Linear layers choose their library; "keep" changes nothing.

    The layers stay the same objects and get the class :class:`normdrop.nn.linear.Linear`, which
    decides at every call. Subclasses, and layers that are parametrized or prepared for
    quantization, stay.

    Raises:
        UserError: another word.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3))
        >>> set_linear(model, "auto")
        >>> type(model[0]).__module__
        'normdrop.nn.linear'
    """
    for module in layers_to_choose(model, linear):
        module.__class__ = Linear


def layers_to_choose(model: torch.nn.Module, linear: Products) -> list[torch.nn.Module]:
    """The layers that :func:`set_linear` gives our class, each once."""
    check_choice("linear", linear, Products)
    return [
        module
        for module in (model.modules() if linear != "keep" else ())
        if type(module) is torch.nn.Linear and getattr(module, "qconfig", None) is None
    ]
