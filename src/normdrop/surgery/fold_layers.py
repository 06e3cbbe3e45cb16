"""The layers of a folded model: convolution and linear layers that apply what follows them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from normdrop.nn.tracing import call_as_leaf, is_traced
from normdrop.ops import reference

__all__ = ["ACTIVATIONS", "AddActivate", "FoldedConv2d", "FoldedLinear", "become_folded"]

Scalars = list[float | None]

ACTIVATIONS: dict[str, tuple[str, Scalars, Callable[[Tensor], Tensor]]] = {
    "relu": ("relu", [], torch.relu_),
    "relu6": ("hardtanh", [0.0, 6.0], lambda y: F.relu6(y, inplace=True)),
    "leaky_relu": ("leaky_relu", [0.01], lambda y: F.leaky_relu(y, inplace=True)),
    "silu": ("swish", [], lambda y: F.silu(y, inplace=True)),
    "hardswish": ("hardswish", [], lambda y: F.hardswish(y, inplace=True)),
}
"""By name: oneDNN's name and numbers for it, and the same in place."""

_SHAPES = 2
"""Input shapes for which a convolution keeps its weight in oneDNN's layout."""


def activate(y: Tensor, activation: str | None) -> Tensor:
    """Apply an activation to a tensor that nobody else reads, in place."""
    return y if activation is None else ACTIVATIONS[activation][2](y)


def _finish(y: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    """Give activation(y + residual); y is a layer's fresh output."""
    if residual is None:
        return activate(y, activation)
    return activate(y + residual, activation)


def _has_operator() -> bool:
    """Whether torch has the convolution with an activation, which is oneDNN's."""
    operators = torch.ops.mkldnn
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(operators, "_convolution_pointwise")
        and hasattr(operators, "_convolution_pointwise_")
        and hasattr(torch._C._nn, "mkldnn_reorder_conv2d_weight")
    )


def _is_plain_call() -> bool:
    """Whether tensors are what they seem: nothing compiles, traces, transforms or casts."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._functorch.maybe_current_level() is not None
        or forward_ad._current_level >= 0
        or torch.is_autocast_enabled("cpu")
        or torch._C._len_torch_dispatch_stack()
    )


class AddActivate(torch.nn.Module):
    r"""Stand where one of our batch normalizations was folded into the layer before it.

    .. math:: y = f(x + r)

    with x, r and y of one shape and f the activation that the batch normalization had.

    Example:
        >>> AddActivate("relu")(torch.tensor([-1.0, 1.0]), torch.tensor([0.5, 0.5]))
        tensor([0.0000, 1.5000])
    """

    def __init__(self, activation: str | None = None) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if is_traced(input):
            others = () if residual is None else (residual,)
            return cast(Tensor, call_as_leaf(self, input, *others))
        y = input if residual is None else input + residual
        return reference.activate(y, self.activation)

    def extra_repr(self) -> str:
        return "" if self.activation is None else f"activation={self.activation!r}"


class FoldedLinear(torch.nn.Linear):
    r"""A linear layer with a batch normalization folded into it.

    .. math:: y = f(W x + b + r)

    with x (N, in), W (out, in), b (out), r and y (N, out), and f an activation.
    """

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        activation: str | None = None,
        overwrite: bool = False,
    ) -> Tensor:
        """Give y; the folded batch normalization took a matrix, so the input must be one."""
        if is_traced(input):
            return cast(Tensor, call_as_leaf(self, input, residual, activation, overwrite))
        if input.dim() != 2:
            # Of (N, L, out) BatchNorm1d normalizes L.
            raise ValueError(
                "fold: expected the linear layer, into which a batch normalization was folded, to "
                f"get (N, {self.in_features}), got {tuple(input.shape)}; leave this model unfolded"
            )
        return _finish(F.linear(input, self.weight, self.bias), residual, activation)


class FoldedConv2d(torch.nn.Conv2d):
    r"""A convolution that adds and activates as it writes its output.

    .. math:: y = f(W * x + b + r)

    with x (N, C, H, W), r and y (N, K, H', W'), and f an activation by name.

    On the CPU, in float32 and without autograd this is one call of oneDNN, with the weight kept in
    oneDNN's layout for the last two input shapes; elsewhere the same in plain PyTorch. The packed
    weights are no part of the state: pickles, copies and ``state_dict`` leave them out. They are
    made again after the weight was changed by an in-place operator, as ``load_state_dict`` does;
    a change through ``weight.data`` is not seen.
    """

    channels_last: bool
    _packed: dict[tuple[int, ...], tuple[Any, tuple[int, ...]]]
    _packed_from: tuple[int, int, int]

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        activation: str | None = None,
        overwrite: bool = False,
    ) -> Tensor:
        """Give y; with ``overwrite`` the residual's memory may take it."""
        if is_traced(input):
            return cast(Tensor, call_as_leaf(self, input, residual, activation, overwrite))
        if self.channels_last and input.dim() == 4:
            input = input.contiguous(memory_format=torch.channels_last)
        if not self._takes_operator(input, residual):
            y = torch.nn.Conv2d.forward(self, input)
            return _finish(y, residual, activation)
        weight, shape = self._pack(input)
        name, scalars, _ = ACTIVATIONS.get(activation or "", ("none", [], None))
        geometry = (self.padding, self.stride, self.dilation, self.groups)
        if residual is None:
            return cast(
                Tensor,
                torch.ops.mkldnn._convolution_pointwise.default(
                    input, weight, self.bias, *geometry, name, scalars, ""
                ),
            )
        if residual.shape != shape or residual.dtype is not input.dtype:
            y = torch.ops.mkldnn._convolution_pointwise.default(
                input, weight, self.bias, *geometry, "none", [], ""
            )
            return _finish(y, residual, activation)
        # Added, oneDNN has no other activation.
        inner = "relu" if activation == "relu" else None
        after = (*geometry, "add", 1.0, inner, [], "")
        is_alike = self.channels_last and residual.is_contiguous(memory_format=torch.channels_last)
        if overwrite and is_alike:
            y = torch.ops.mkldnn._convolution_pointwise_.binary(
                residual, input, weight, self.bias, *after
            )
        else:
            y = torch.ops.mkldnn._convolution_pointwise.binary(
                input, residual, weight, self.bias, *after
            )
        return activate(y, activation if inner is None else None)

    def _takes_operator(self, input: Tensor, residual: Tensor | None) -> bool:
        tensors = (input, self.weight, self.bias, residual)
        if residual is not None and not isinstance(residual, Tensor):
            return False  # a number was added
        if input.dim() != 4 or not _HAS_OPERATOR or not _is_plain_call():
            return False
        if input.shape[1] != self.in_channels or not input.numel():
            return False
        for tensor in tensors:
            if tensor is None:
                continue
            if tensor.dtype is not torch.float32 or not tensor.is_cpu:
                return False
            if tensor.requires_grad and torch.is_grad_enabled():
                return False
            if tensor.layout is not torch.strided:
                return False
        return (
            torch.backends.mkldnn.enabled
            and not self.weight.is_inference()
            and type(input) in (Tensor, torch.nn.Parameter)
        )

    def _pack(self, input: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Give the weight in the layout that oneDNN prefers for this input, and y's shape.

        In the layout for another shape a call can take 15 times as long.
        """
        weight = self.weight
        origin = (id(weight), weight._version, weight.data_ptr())
        if origin != self._packed_from:
            self._packed, self._packed_from = {}, origin
        key = (*input.shape, torch.get_num_threads())
        found = self._packed.get(key)
        if found is not None:
            return found
        # Without the grad mode of the caller: the packed weight is no tensor of a graph.
        with torch.no_grad():
            packed = torch._C._nn.mkldnn_reorder_conv2d_weight(
                weight.detach().contiguous(memory_format=self._format()).to_mkldnn(),
                self.padding,
                self.stride,
                self.dilation,
                self.groups,
                list(input.shape),
            )
        sides = (
            (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            for size, padding, dilation, kernel, stride in zip(
                input.shape[2:],
                cast(tuple[int, ...], self.padding),
                self.dilation,
                self.kernel_size,
                self.stride,
                strict=True,
            )
        )
        found = (packed, (input.shape[0], self.out_channels, *sides))
        while len(self._packed) >= _SHAPES:
            self._packed.pop(next(iter(self._packed)))
        self._packed[key] = found
        return found

    def _format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FoldedConv2d:
        self._packed = {}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": {}, "_packed_from": (0, 0, 0)}


_HAS_OPERATOR = _has_operator()


def become_folded(layer: torch.nn.Module, *, channels_last: bool) -> None:
    """Make a convolution or linear layer a folded one: the same object, with the same state.

    torch's lazy layers change their class in the same way. Every reference to the layer stays.
    """
    if isinstance(layer, torch.nn.Linear):
        layer.__class__ = FoldedLinear
    elif isinstance(layer, torch.nn.Conv2d):
        layer.__class__ = FoldedConv2d
        folded = cast(FoldedConv2d, layer)
        folded.channels_last = channels_last
        folded._packed, folded._packed_from = {}, (0, 0, 0)
        if channels_last:
            with torch.no_grad():
                folded.weight.data = folded.weight.data.contiguous(
                    memory_format=torch.channels_last
                )
