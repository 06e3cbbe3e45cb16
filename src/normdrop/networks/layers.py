"""What all networks share: norm and dropout where asked for, He initialization, the checks."""

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, cast, overload

import torch

from normdrop import nn
from normdrop.errors import UserError

__all__ = [
    "Output",
    "check_count",
    "check_image",
    "check_keep",
    "dropout",
    "initialize",
    "least_size",
    "norm1d",
    "norm2d",
    "zero_last",
]


class Output:
    """A network's attribute ``output``: its output layer, whose logits are never dropped.

    A tool may write an attribute of this name to the network, as BackPACK does with what a module
    gave; a property would refuse it.

    Args:
        path: the layer's name in the network.

    Example:
        >>> class Network(torch.nn.Module):
        ...     output = Output("fc")
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.fc = torch.nn.Linear(2, 3)
        >>> Network().output
        Linear(in_features=2, out_features=3, bias=True)
    """

    def __init__(self, path: str) -> None:
        self.path = path

    @overload
    def __get__(self, network: torch.nn.Module, kind: Any) -> torch.nn.Linear: ...

    @overload
    def __get__(self, network: None, kind: Any) -> "Output": ...

    def __get__(self, network: torch.nn.Module | None, kind: Any) -> "torch.nn.Linear | Output":
        return self if network is None else cast(torch.nn.Linear, network.get_submodule(self.path))


def norm1d(features: int, *, norm: bool) -> torch.nn.Module:
    """Batch normalization of (N, features), or a layer that is none."""
    return torch.nn.BatchNorm1d(features) if norm else torch.nn.Identity()


def norm2d(channels: int, *, norm: bool) -> torch.nn.Module:
    """Batch normalization of (N, channels, H, W), or a layer that is none."""
    return torch.nn.BatchNorm2d(channels) if norm else torch.nn.Identity()


def dropout(keep: float) -> torch.nn.Module:
    """Dropout that keeps a value with probability ``keep``; for ``keep=1`` a layer that is none."""
    return nn.Dropout(keep=keep) if keep < 1 else torch.nn.Identity()


def check_keep(name: str, keep: object) -> float:
    """Give ``keep`` as a float if it is a probability in (0, 1], else raise UserError.

    Example:
        >>> check_keep("keep_hidden", 0.5)
        0.5
    """
    if isinstance(keep, bool) or not isinstance(keep, Real) or not 0 < float(keep) <= 1:
        raise UserError(
            f"Expected `{name}` to be in (0, 1] but got {keep!r}: it is the probability to keep a "
            "value (the lecture's p), so 1 drops nothing and 0 would drop everything"
        )
    return float(keep)


def check_count(name: str, count: object) -> int:
    """Give ``count`` back if it is a whole number of 1 or more, else raise UserError."""
    if isinstance(count, bool) or not isinstance(count, Integral) or count < 1:
        raise UserError(f"Expected `{name}` to be a whole number of at least 1 but got {count!r}")
    return int(count)


def check_image(shape: Sequence[int], least: int, who: str) -> None:
    """Raise UserError if an image of (…, H, W) is smaller than ``least`` on a side.

    ``torch.fx`` records this check as one call, so that the networks remain traceable. It does so
    only for calls through this module: ``layers.check_image(...)``.
    """
    height, width = shape[-2], shape[-1]
    if height < least or width < least:
        raise UserError(
            f"{who} takes images of at least {least}x{least} pixels but got {height}x{width}: "
            "give larger images (--image-size scales those of a folder), or a network that halves "
            "them less often"
        )


torch.fx.wrap("check_image")


def initialize(network: torch.nn.Module, output: torch.nn.Linear) -> None:
    r"""Draw the weights by He's rule, and the output layer's close to zero.

    .. math::
        W \sim \mathcal{N}(0, 2/m), \qquad W_{output} \sim \mathcal{N}(0, 0.01^2), \qquad b = 0

    where m is the fan-out of a convolution (its channels out times the pixels of its kernel, which
    keeps the variance of the gradient) and the fan-in of a linear layer (which keeps the variance
    of its output). The small output weights make the first loss :math:`\ln` (classes).

    Reference:
        K. He, X. Zhang, S. Ren, J. Sun: Delving Deep into Rectifiers. ICCV 2015.
        P. Goyal et al.: Accurate, Large Minibatch SGD. 2017 (the output layer).
    """
    if output.weight.is_meta:
        return  # Nothing can be drawn, and torch would import its compiler to say so.
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif module is output:
            torch.nn.init.normal_(output.weight, std=0.01)
        elif isinstance(module, torch.nn.Linear):
            torch.nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
        else:
            continue
        if module.bias is not None:
            torch.nn.init.zeros_(module.bias)


def zero_last(norm: torch.nn.Module, convolution: torch.nn.Conv2d) -> None:
    """Let a residual branch begin as zero: by its last γ, or where none is, its convolution."""
    last: Any = norm if isinstance(norm, torch.nn.BatchNorm2d) else convolution
    torch.nn.init.zeros_(last.weight)


def least_size(halvings: int) -> int:
    """Give the least side at which every halving, which rounds up, still has two pixels to halve.

    Example:
        >>> [least_size(halvings) for halvings in (0, 1, 2, 5)]
        [1, 2, 3, 17]
    """
    return 1 if halvings == 0 else 2 ** (halvings - 1) + 1
