"""The call that stands in the code of a folded model: a convolution, a sum, an activation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from normdrop.graph.norm import add
from normdrop.nn.conv2d import Conv2d
from normdrop.ops import context
from normdrop.ops.activations import slope_of

__all__ = ["activation_of", "as_given", "can_activate", "convolution", "is_plain_call"]

_Activation = tuple[str, list[float], Callable[[Tensor], Tensor]]

_ACTIVATIONS: dict[str, _Activation] = {
    "relu": ("relu", [], torch.relu_),
    "relu6": ("hardtanh", [0.0, 6.0], lambda y: F.relu6(y, inplace=True)),
    "silu": ("swish", [], lambda y: F.silu(y, inplace=True)),
    "hardswish": ("hardswish", [], lambda y: F.hardswish(y, inplace=True)),
}
"""By name: oneDNN's name and numbers for it, and the same in place; see :func:`activation_of`."""

_NO_ACTIVATION: _Activation = ("none", [], lambda y: y)


def activation_of(name: str) -> _Activation:
    """oneDNN's name and numbers for an activation, and the same in place.

    Raises:
        KeyError: one that oneDNN's convolutions do not apply.

    Example:
        >>> activation_of("leaky_relu(0.2)")[:2]
        ('leaky_relu', [0.2])
    """
    slope = None if name in _ACTIVATIONS else slope_of(name)
    if slope is None:
        return _ACTIVATIONS[name]
    return "leaky_relu", [slope], lambda y: F.leaky_relu(y, slope, inplace=True)


def can_activate(name: str) -> bool:
    """Whether oneDNN's convolutions apply the activation."""
    return name in _ACTIVATIONS or slope_of(name) is not None


_SHAPES = 2
"""Input shapes for which a convolution's weight is kept in oneDNN's layout."""

_PLAIN = (Tensor, torch.nn.Parameter)

_operators: Any = torch.ops.mkldnn
_reorder: Any = getattr(torch._C._nn, "mkldnn_reorder_conv2d_weight", None)

_HAS_OPERATORS = (
    torch.backends.mkldnn.is_available()
    and hasattr(_operators, "_convolution_pointwise")
    and hasattr(_operators, "_convolution_pointwise_")
    and _reorder is not None
)
"""Whether torch has convolution with addition and activation, which is oneDNN's."""


def is_plain_call() -> bool:
    """Whether tensors are what they seem: nothing compiles, traces, transforms or casts."""
    return (
        context.is_plain()
        and not torch.is_autocast_enabled("cpu")
        and bool(torch.backends.mkldnn.enabled)
    )


def convolution(
    layer: torch.nn.Conv2d,
    x: Tensor,
    residual: Tensor | None = None,
    activation: str | None = None,
    into: str | None = None,
    overwrite: bool = False,
) -> Tensor:
    r"""Convolve, add and activate.

    .. math:: y = f(W * x + b + r)

    On the CPU, in float32 and without autograd this is one call of oneDNN, whose y has its channels
    last in memory. Its weight, in oneDNN's own layout, is kept for the last two input shapes. It is
    made again after the layer's weight was exchanged or changed by an in-place operator, as
    ``load_state_dict`` does; writing through ``weight.data`` is not seen. Elsewhere the same is
    computed in plain PyTorch.

    Args:
        layer: what has W (K, C, …) and b (K), with zeros as padding.
        x: (N, C, H, W).
        residual: r, with y's shape (N, K, H', W'), or what can be added to it.
        activation: the name of f.
        into: whether the sum is written to the "output" or the "residual", whose type it then has.
        overwrite: r's memory may take y.
    """
    if not _takes_operator(layer, x, residual):
        y = Conv2d._conv_forward(layer, x, layer.weight, layer.bias)  # type: ignore[arg-type]
        return _finish(y, residual, activation, into)
    weight, shape = _pack(layer, x)
    name, scalars, _ = _NO_ACTIVATION if activation is None else activation_of(activation)
    x = x.contiguous(memory_format=torch.channels_last)
    geometry = (weight, layer.bias, layer.padding, layer.stride, layer.dilation, layer.groups)
    operator = _operators._convolution_pointwise
    if residual is None:
        return cast(Tensor, operator.default(x, *geometry, name, scalars, ""))
    if residual.shape != shape or residual.dtype is not x.dtype:
        y = operator.default(x, *geometry, "none", [], "")
        return _finish(y, residual, activation, into)
    # With an addition oneDNN has no other activation.
    inner = "relu" if activation == "relu" else None
    after: tuple[Any, ...] = ("add", 1.0, inner, [], "")
    if overwrite and residual.is_contiguous(memory_format=torch.channels_last):
        y = _operators._convolution_pointwise_.binary(residual, x, *geometry, *after)
    else:
        residual = residual.contiguous(memory_format=torch.channels_last)
        y = operator.binary(x, residual, *geometry, *after)
    return _activate(y, activation if inner is None else None)


def as_given(x: Any, *given: Any) -> Any:
    """Give x in the layout that it would have without oneDNN's operators.

    That is with its channels last only if an input of the model has them there.
    """
    if isinstance(x, (tuple, list)):
        return type(x)(as_given(part, *given) for part in x)
    if not isinstance(x, Tensor) or any(map(_has_channels_last, given)):
        return x
    return x.contiguous()


def _has_channels_last(x: Any) -> bool:
    return (
        isinstance(x, Tensor)
        and x.dim() == 4
        and x.is_contiguous(memory_format=torch.channels_last)
        and not x.is_contiguous()
    )


def _takes_operator(layer: torch.nn.Conv2d, x: Tensor, residual: Tensor | None) -> bool:
    if not _HAS_OPERATORS or x.dim() != 4 or x.shape[1] != layer.in_channels or not x.numel():
        return False
    is_recording = torch.is_grad_enabled()
    return not layer.weight.is_inference() and all(
        type(tensor) in _PLAIN  # a number may have been added
        and tensor.dtype is torch.float32
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and not (is_recording and tensor.requires_grad)
        for tensor in (x, layer.weight, layer.bias, residual)
        if tensor is not None
    )


_Packed = dict[tuple[int, ...], tuple[Tensor, tuple[int, ...]]]
"""The packed weight and y's shape, by input shape and number of threads."""

_packed: WeakKeyDictionary[torch.nn.Module, tuple[Tensor, int, int, _Packed]] = WeakKeyDictionary()
"""By layer: the weight, its version and address, and what was made of it.

An entry is replaced as a whole, so that several threads may call at once. The weight itself is
kept, so that no other has its address meanwhile.
"""


def _pack(layer: torch.nn.Conv2d, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Give the weight in the layout that oneDNN prefers for this input, and y's shape.

    In the layout for another shape a call can take 15 times as long.
    """
    weight = layer.weight
    version, address = weight._version, weight.data_ptr()
    key = (*x.shape, torch.get_num_threads())
    entry = _packed.get(layer)
    known: _Packed = {}
    if entry is not None and entry[0] is weight and entry[1:3] == (version, address):
        known = entry[3]
    if key not in known:
        recent = list(known.items())[1 - _SHAPES :]
        known = dict([*recent, (key, _pack_for(layer, list(x.shape)))])
        _packed[layer] = weight, version, address, known
    return known[key]


def _pack_for(layer: torch.nn.Conv2d, shape: list[int]) -> tuple[Tensor, tuple[int, ...]]:
    padding = cast(tuple[int, ...], layer.padding)
    # Without the grad mode of the caller: the packed weight is no tensor of a graph.
    with torch.no_grad():
        weight = layer.weight.detach().contiguous(memory_format=torch.channels_last)
        packed = _reorder(
            weight.to_mkldnn(), padding, layer.stride, layer.dilation, layer.groups, shape
        )
    sides = (
        (side + 2 * p - d * (k - 1) - 1) // s + 1
        for side, p, d, k, s in zip(
            shape[2:], padding, layer.dilation, layer.kernel_size, layer.stride, strict=True
        )
    )
    return packed, (shape[0], layer.out_channels, *sides)


def _activate(y: Tensor, activation: str | None) -> Tensor:
    """Apply an activation to a tensor that nobody else reads, in place."""
    return y if activation is None else activation_of(activation)[2](y)


def _finish(y: Tensor, residual: Any, activation: str | None, into: str | None) -> Tensor:
    """Give activation(y + residual); y is a layer's fresh output."""
    return _activate(y if residual is None else add(y, residual, into), activation)
