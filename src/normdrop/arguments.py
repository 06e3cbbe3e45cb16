"""Checks of what the tools are given, before they change anything."""

from __future__ import annotations

from typing import Any, get_args

import torch

from normdrop.errors import UserError

__all__ = ["check_choice", "check_flag", "check_model"]


def check_model(who: str, model: Any) -> None:
    """Raise TypeError for what is no module, such as a class, a state_dict or a list of layers."""
    if isinstance(model, torch.nn.Module):
        return
    if isinstance(model, type) and issubclass(model, torch.nn.Module):
        got = f"the class {model.__name__} itself; make an instance of it"
    else:
        got = repr(model) if model is None else f"an object of type {type(model).__name__}"
    raise TypeError(f"{who}: expected `model` to be a torch.nn.Module but got {got}")


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raise UserError for a word that is none of a ``Literal``'s.

    Example:
        >>> from typing import Literal
        >>> check_choice("memory", "lots", Literal["normal", "low"])
        Traceback (most recent call last):
        ...
        normdrop.errors.UserError: Expected `memory` to be "normal" or "low" but got 'lots'
    """
    words = get_args(choices)
    if value not in words:
        *most, last = [f'"{word}"' for word in words]
        raise UserError(f"Expected `{name}` to be {', '.join(most)} or {last} but got {value!r}")


def check_flag(who: str, name: str, value: Any) -> None:
    """Raise TypeError for what is neither True nor False."""
    if not isinstance(value, bool):
        raise TypeError(f"{who}: expected `{name}` to be True or False but got {value!r}")
