"""Batch normalization modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from normdrop import functional
from normdrop.nn.tracing import call_as_leaf, is_traced

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]

_STATISTICS = ("running_mean", "running_var")


class _BatchNorm(torch.nn.modules.batchnorm._BatchNorm):
    """What the three modules share; see :class:`BatchNorm2d`."""

    activation: str | None
    nonfinite: str

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
        nonfinite: str = "propagate",
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if affine and not bias:
            # torch 2.13 has the argument, 2.10 not yet.
            self.register_parameter("bias", None)
        self.activation = functional.check_activation(activation)
        self.nonfinite = functional.check_nonfinite(nonfinite)
        self._widen_statistics(self._buffers)

    def _widen_statistics(self, before: dict[str, Tensor | None]) -> None:
        """Keep the running statistics in float32 where the module is half or bfloat16.

        A float16 variance overflows at 65504 and a bfloat16 mean cannot move by less than 1/256.
        """
        for name in _STATISTICS:
            value, old = self._buffers[name], before[name]
            if value is None or old is None or value.dtype not in (torch.half, torch.bfloat16):
                continue
            self._buffers[name] = old.to(value.device, torch.float32)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _BatchNorm:
        before = {name: self._buffers[name] for name in _STATISTICS}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._widen_statistics(before)
        return self

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """y = activation(BN(input) + residual); the residual has the input's shape."""
        if is_traced(input):
            others = () if residual is None else (residual,)
            return cast(Tensor, call_as_leaf(self, input, *others))
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        track = self.training and self.track_running_stats
        momentum = 0.0 if self.momentum is None else self.momentum
        if track and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                # Every batch has the same weight: a cumulative average.
                momentum = 1.0 / float(self.num_batches_tracked)
        given = track or not self.training
        return functional.batch_norm(
            input,
            self.running_mean if given else None,
            self.running_var if given else None,
            self.weight,
            self.bias,
            self.training or (self.running_mean is None and self.running_var is None),
            momentum,
            self.eps,
            residual=residual,
            activation=self.activation,
            nonfinite=self.nonfinite,
        )

    def extra_repr(self) -> str:
        text = str(super().extra_repr())  # type: ignore[no-untyped-call]
        if self.activation is not None:
            text += f", activation={self.activation!r}"
        if self.nonfinite != "propagate":
            text += f", nonfinite={self.nonfinite!r}"
        return text

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Modules pickled by torch's class and read as ours have neither.
        state = {"activation": None, "nonfinite": "propagate", **state}
        super().__setstate__(state)  # type: ignore[no-untyped-call]


class BatchNorm2d(_BatchNorm, torch.nn.BatchNorm2d):
    r"""Batch normalization of images: every channel over batch, height and width.

    .. math::
        y_k = \mathrm{activation}\Bigl(\gamma_k \frac{x_k - \mu_k}{\sqrt{\sigma_k^2 + \epsilon}}
              + \alpha_k + \mathrm{residual}_k\Bigr)

    In training μ and the biased σ² come from the batch, and the running statistics move towards
    the batch's mean and unbiased variance; in evaluation the running statistics are used. Those
    stay float32 when the module is converted to float16 or bfloat16.

    Args:
        num_features: C, the number of channels K that are normalized.
        eps: ε, inside the root.
        momentum: weight of the new batch in the running statistics; None for their plain average.
        affine: learn γ (``weight``) and α (``bias``).
        track_running_stats: keep running statistics; without them evaluation uses the batch's.
        device: of parameters and buffers.
        dtype: of parameters and buffers.
        bias: without it, α is left out and γ is kept.
        activation: None, "relu", "leaky_relu" or "silu", in the same operator.
        nonfinite: "propagate", "skip" or "raise": see :func:`normdrop.functional.batch_norm`.

    Shape:
        - Input: (N, C, H, W); residual: the same.
        - Output: (N, C, H, W), in the input's memory format.

    Raises:
        ValueError: not a 4-D input; one value per channel in training.
        RuntimeError: another number of channels than ``num_features``.

    Example:
        >>> layer = BatchNorm2d(64, activation="relu")
        >>> x = torch.randn(8, 64, 14, 14)
        >>> layer(x).shape, layer(x, residual=x).min() >= 0
        (torch.Size([8, 64, 14, 14]), tensor(True))
        >>> sorted(layer.state_dict())
        ['bias', 'num_batches_tracked', 'running_mean', 'running_var', 'weight']

    Reference:
        Ioffe and Szegedy, 2015, https://arxiv.org/abs/1502.03167
    """


class BatchNorm1d(_BatchNorm, torch.nn.BatchNorm1d):
    """Batch normalization of a batch matrix (n, d), every feature over the n samples.

    An input (N, C, L) is normalized over N and L. Otherwise as :class:`BatchNorm2d`.

    Shape:
        - Input: (N, C) or (N, C, L).
        - Output: as the input.

    Example:
        >>> y = BatchNorm1d(3)(torch.randn(100, 3))
        >>> bool(y.mean(0).abs().max() < 1e-6)
        True
    """


class BatchNorm3d(_BatchNorm, torch.nn.BatchNorm3d):
    """Batch normalization of volumes, every channel over batch, depth, height and width.

    Otherwise as :class:`BatchNorm2d`.

    Shape:
        - Input: (N, C, D, H, W).
        - Output: as the input.

    Example:
        >>> BatchNorm3d(2)(torch.randn(1, 2, 3, 4, 5)).shape
        torch.Size([1, 2, 3, 4, 5])
    """
