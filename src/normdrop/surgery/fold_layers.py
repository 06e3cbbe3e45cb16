"""The layers of a folded model: a convolution that applies what follows it, and a stand-in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from normdrop.nn.tracing import call_as_leaf, is_traced
from normdrop.ops import reference

__all__ = ["AddActivate", "FoldedConv2d", "become_folded", "is_plain_call"]

ACTIVATIONS: dict[str, tuple[str, list[float], Callable[[Tensor], Tensor]]] = {
    "relu": ("relu", [], torch.relu_),
    "relu6": ("hardtanh", [0.0, 6.0], lambda y: F.relu6(y, inplace=True)),
    "leaky_relu": ("leaky_relu", [0.01], lambda y: F.leaky_relu(y, inplace=True)),
    "silu": ("swish", [], lambda y: F.silu(y, inplace=True)),
    "hardswish": ("hardswish", [], lambda y: F.hardswish(y, inplace=True)),
}
"""By name: oneDNN's name and numbers for it, and the same in place."""

_SHAPES = 2
"""Input shapes for which a convolution keeps its weight in oneDNN's layout."""

_PLAIN = (Tensor, torch.nn.Parameter)

_operators: Any = torch.ops.mkldnn
_reorder: Any = getattr(torch._C._nn, "mkldnn_reorder_conv2d_weight", None)

HAS_OPERATORS = (
    torch.backends.mkldnn.is_available()
    and hasattr(_operators, "_convolution_pointwise")
    and hasattr(_operators, "_convolution_pointwise_")
    and _reorder is not None
)
"""Whether torch has convolution with addition and activation, which is oneDNN's."""


def is_plain_call() -> bool:
    """Whether tensors are what they seem: nothing compiles, traces, transforms or casts."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.maybe_current_level() is not None
        or forward_ad._current_level >= 0
        or torch.is_autocast_enabled("cpu")
        or torch._C._len_torch_dispatch_stack()
    )


class AddActivate(torch.nn.Module):
    r"""Stand where a batch normalization was folded into the layer before it.

    .. math:: y = f(x + r)

    with x, r and y of one shape and f the activation that the batch normalization had.

    Args:
        activation: its name, or None.
        dims: number of dimensions that x must have, or None for any.

    Raises:
        ValueError: x has another number of dimensions. Of (N, L, C) BatchNorm1d normalizes L,
            while the layer before it has its channels in C.

    Example:
        >>> AddActivate("relu")(torch.tensor([-1.0, 1.0]), torch.tensor([0.5, 0.5]))
        tensor([0.0000, 1.5000])
    """

    def __init__(self, activation: str | None = None, dims: int | None = None) -> None:
        super().__init__()
        self.activation = activation
        self.dims = dims

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if is_traced(input):
            others = () if residual is None else (residual,)
            return cast(Tensor, call_as_leaf(self, input, *others))
        if self.dims is not None and input.dim() != self.dims:
            raise ValueError(
                f"fold: expected {self.dims} dimensions where a batch normalization was folded "
                f"away, got {tuple(input.shape)}; it cannot be folded for inputs of this shape"
            )
        y = input if residual is None else input + residual
        return reference.activate(y, self.activation)

    def extra_repr(self) -> str:
        return "" if self.activation is None else f"activation={self.activation!r}"


class FoldedConv2d(torch.nn.Conv2d):
    r"""A convolution that adds and activates as it writes its output.

    .. math:: y = f(W * x + b + r)

    with x (N, C, H, W), r and y (N, K, H', W'), and f an activation by name.

    On the CPU, in float32 and without autograd this is one call of oneDNN, with the weight kept in
    oneDNN's layout for the last two input shapes; elsewhere the same in plain PyTorch. The packed
    weights are no part of the state: pickles, copies and ``state_dict`` leave them out. They are
    made again after the weight was exchanged or changed by an in-place operator, as
    ``load_state_dict`` does; writing through ``weight.data`` is not seen.
    """

    channels_last: bool
    # The weight and its version, and what was made of it: by input shape and number of threads the
    # packed weight and y's shape. Replaced as a whole, so that several threads may call at once.
    _packed: tuple[Any, dict[tuple[int, ...], tuple[Tensor, tuple[int, ...]]]] | None

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        activation: str | None = None,
        *,
        writes: bool = False,
        overwrite: bool = False,
    ) -> Tensor:
        """Give y.

        Args:
            input: x.
            residual: r.
            activation: the name of f.
            writes: the sum has W * x's type whatever r's is, as where it is written in place.
            overwrite: r's memory may take y.
        """
        if is_traced(input):
            return cast(Tensor, call_as_leaf(self, input))
        if self.channels_last and input.dim() == 4:
            input = input.contiguous(memory_format=torch.channels_last)
        if not self._takes_operator(input, residual):
            y = torch.nn.Conv2d.forward(self, input)
            return _finish(y, residual, activation, writes)
        weight, shape = self._pack(input)
        name, scalars, _ = ACTIVATIONS.get(activation or "", ("none", [], None))
        geometry = (weight, self.bias, self.padding, self.stride, self.dilation, self.groups)
        operator = _operators._convolution_pointwise
        if residual is None:
            return cast(Tensor, operator.default(input, *geometry, name, scalars, ""))
        if residual.shape != shape or residual.dtype is not input.dtype:
            y = operator.default(input, *geometry, "none", [], "")
            return _finish(y, residual, activation, writes)
        # With an addition oneDNN has no other activation.
        inner = "relu" if activation == "relu" else None
        after: tuple[Any, ...] = ("add", 1.0, inner, [], "")
        is_alike = self.channels_last and residual.is_contiguous(memory_format=torch.channels_last)
        if overwrite and is_alike:
            operator = _operators._convolution_pointwise_
            y = operator.binary(residual, input, *geometry, *after)
        else:
            y = operator.binary(input, residual, *geometry, *after)
        return _activate(y, activation if inner is None else None)

    def _takes_operator(self, input: Tensor, residual: Tensor | None) -> bool:
        if not HAS_OPERATORS or not is_plain_call() or not torch.backends.mkldnn.enabled:
            return False
        if input.dim() != 4 or input.shape[1] != self.in_channels or not input.numel():
            return False
        is_recording = torch.is_grad_enabled()
        return not self.weight.is_inference() and all(
            type(tensor) in _PLAIN  # a number may have been added
            and tensor.dtype is torch.float32
            and tensor.is_cpu
            and tensor.layout is torch.strided
            and not (is_recording and tensor.requires_grad)
            for tensor in (input, self.weight, self.bias, residual)
            if tensor is not None
        )

    def _pack(self, input: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Give the weight in the layout that oneDNN prefers for this input, and y's shape.

        In the layout for another shape a call can take 15 times as long.
        """
        weight = self.weight
        origin = (weight._version, weight.data_ptr())
        key = (*input.shape, torch.get_num_threads())
        packed = {}
        if self._packed is not None:
            # The weight itself is kept, so that no other has its address meanwhile.
            (source, *others), found = self._packed
            if source is weight and tuple(others) == origin:
                packed = found
        if key not in packed:
            recent = list(packed.items())[1 - _SHAPES :]
            packed = dict([*recent, (key, self._pack_for(list(input.shape)))])
            self._packed = (weight, *origin), packed
        return packed[key]

    def _pack_for(self, shape: list[int]) -> tuple[Tensor, tuple[int, ...]]:
        padding = cast(tuple[int, ...], self.padding)
        # Without the grad mode of the caller: the packed weight is no tensor of a graph.
        with torch.no_grad():
            weight = self.weight.detach().contiguous(
                memory_format=torch.channels_last if self.channels_last else torch.contiguous_format
            )
            packed = _reorder(
                weight.to_mkldnn(), padding, self.stride, self.dilation, self.groups, shape
            )
        sides = (
            (side + 2 * p - d * (k - 1) - 1) // s + 1
            for side, p, d, k, s in zip(
                shape[2:], padding, self.dilation, self.kernel_size, self.stride, strict=True
            )
        )
        return packed, (shape[0], self.out_channels, *sides)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FoldedConv2d:
        self._packed = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": None}


def _activate(y: Tensor, activation: str | None) -> Tensor:
    """Apply an activation to a tensor that nobody else reads, in place."""
    return y if activation is None else ACTIVATIONS[activation][2](y)


def _finish(y: Tensor, residual: Tensor | None, activation: str | None, writes: bool) -> Tensor:
    """Give activation(y + residual); y is a layer's fresh output."""
    if residual is not None:
        y = y.add_(residual) if writes else y + residual
    return _activate(y, activation)


def become_folded(layer: torch.nn.Conv2d, *, channels_last: bool) -> None:
    """Make a convolution a folded one: the same object, with the same state.

    torch's lazy layers change their class in the same way. Every reference to the layer stays.
    """
    layer.__class__ = FoldedConv2d
    folded = cast(FoldedConv2d, layer)
    folded.channels_last, folded._packed = channels_last, None
