"""Networks by name, for the command line and for runs that are loaded again."""

import difflib
import inspect
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from normdrop.errors import UserError
from normdrop.networks.layers import check_count, check_image
from normdrop.networks.mlp import mlp
from normdrop.networks.resnet import resnet
from normdrop.networks.vgg import VGG, vgg
from normdrop.networks.wide_resnet import wide_resnet

__all__ = ["available", "build", "options"]

# Images of at most so many pixels get a residual network's small stem.
SMALL = 64


@dataclass(frozen=True)
class _Family:
    """Networks whose names one pattern describes; its numbers are the factory's first arguments."""

    pattern: str
    factory: Callable[..., torch.nn.Module]
    published: tuple[str, ...]


_FAMILIES = (
    _Family(r"mlp((?:_\d+)*)", mlp, ("mlp",)),
    _Family(
        r"resnet(\d+)",
        resnet,
        tuple(f"resnet{n}" for n in (8, 14, 18, 20, 32, 34, 44, 50, 56, 101, 110, 152)),
    ),
    _Family(
        r"vgg(\d+)(_bn)?",
        vgg,
        tuple(f"vgg{n}{bn}" for n in (11, 13, 16, 19) for bn in ("", "_bn")),
    ),
    _Family(
        r"wide_resnet(\d+)_(\d+)",
        wide_resnet,
        ("wide_resnet16_4", "wide_resnet28_10", "wide_resnet40_4"),
    ),
)
# What build() itself gives a factory.
_GIVEN = ("widths", "depth", "widen", "classes", "in_channels")


def available() -> tuple[str, ...]:
    """Give the names of the published networks; :func:`build` takes others of their families too.

    Example:
        >>> "resnet20" in available()
        True
    """
    return tuple(name for family in _FAMILIES for name in family.published)


def options(name: str) -> tuple[str, ...]:
    """Give the options that the network ``name`` takes.

    Example:
        >>> options("mlp")
        ('hidden', 'keep_input', 'keep_hidden', 'norm', 'input_norm', 'memory')
    """
    family, _ = _find(name)
    own = tuple(o for o in inspect.signature(family.factory).parameters if o not in _GIVEN)
    return ("hidden", *own) if family.factory is mlp else own


def build(
    name: str, *, classes: int, input_shape: Sequence[int], **options: Any
) -> torch.nn.Module:
    """Build a network by its name.

    - ``"mlp"``, whose option ``hidden`` holds the widths of the hidden layers, (256, 256) by
      default; or ``"mlp_1024_1024"``, which names them.
    - ``"resnet20"`` and any other depth of :func:`normdrop.networks.resnet`; on images up to 64
      pixels every depth has the small stem, since the large one would leave little of them.
    - ``"vgg16"``, normalized unless ``norm=False``; ``"vgg16_bn"`` is the same, torchvision's name.
    - ``"wide_resnet28_10"`` and any other depth and width of :func:`normdrop.networks.wide_resnet`.

    Args:
        name: the network.
        classes: number of classes.
        input_shape: (C, H, W) of an image, or (features,) of a row in a table.
        options: what the network's function takes by keyword, such as ``keep_hidden``.

    Raises:
        UserError: a name that no family has (the nearest is suggested), an option that the network
            does not have, a value out of range, an input that the network cannot take, or a
            request that would drop the output.

    Example:
        >>> network = build("resnet20", classes=10, input_shape=(1, 28, 28), keep_hidden=0.9)
        >>> network.output
        Linear(in_features=64, out_features=10, bias=True)
    """
    family, match = _find(name)
    _check_options(name, options)
    check_count("classes", classes)
    shape = tuple(check_count("input_shape", side) for side in input_shape)
    if family.factory is mlp:
        return _build_mlp(match.group(1), classes, shape, options)
    if len(shape) != 3:
        raise UserError(
            f"{name} takes images, (channels, height, width), but the input has the shape {shape}; "
            'for a table use "mlp"'
        )
    if family.factory is vgg:
        # Beforehand, since VGG's weights take seconds to draw.
        check_image(shape, VGG.least_size, name)
        if match.group(2) and options.get("norm", True) is False:
            raise UserError(f"{name} is the normalized network; for norm=False use {name[:-3]}")
    if family.factory is resnet and min(shape[1:]) <= SMALL:
        options = {"stem": "small", **options}
    numbers = [int(number) for number in match.groups() if number and number.isdecimal()]
    network = family.factory(*numbers, classes, in_channels=shape[0], **options)
    check_image(shape, getattr(network, "least_size", 1), name)
    return network


def _find(name: str) -> tuple[_Family, re.Match[str]]:
    for family in _FAMILIES:
        match = re.fullmatch(family.pattern, name)
        if match:
            return family, match
    names = available()
    near = difflib.get_close_matches(name.lower().replace("-", "_"), names, n=1, cutoff=0.5)
    if near:
        raise UserError(f'Unknown network "{name}"; did you mean "{near[0]}"?')
    raise UserError(
        f'Unknown network "{name}"; choose one of {", ".join(names)}, or another of their '
        "families, such as mlp_64_64"
    )


def _check_options(name: str, given: dict[str, Any]) -> None:
    known = options(name)
    for option in given:
        if option in known:
            continue
        if option.startswith(("keep", "drop")) and "out" in option:
            raise UserError(
                f"{name}: `{option}` would drop the output, which is never dropped; use "
                "`keep_input` and `keep_hidden`"
            )
        near = difflib.get_close_matches(option, known, n=1)
        suggestion = f"did you mean `{near[0]}`? " if near else ""
        raise UserError(f"{name} has no option `{option}`: {suggestion}It takes {', '.join(known)}")


def _build_mlp(
    widths: str, classes: int, shape: tuple[int, ...], given: dict[str, Any]
) -> torch.nn.Module:
    named = tuple(int(width) for width in widths.split("_") if width)
    rest = {option: value for option, value in given.items() if option != "hidden"}
    hidden = given.get("hidden", named or (256, 256))
    if named and "hidden" in given and tuple(hidden) != named:
        raise UserError(f"mlp{widths} names its hidden layers: leave out hidden={hidden!r}")
    if isinstance(hidden, int):
        hidden = (hidden,)
    if not isinstance(hidden, (list, tuple)):
        raise UserError(f"Expected `hidden` to be widths such as (256, 256) but got {hidden!r}")
    return mlp((math.prod(shape), *hidden, classes), **rest)
