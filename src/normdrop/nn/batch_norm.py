"""Batch normalization modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from normdrop import functional
from normdrop.nn.tracing import call_as_leaf
from normdrop.ops import context

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]

_STATISTICS = ("running_mean", "running_var")
_HALF = (torch.half, torch.bfloat16)

_backward_pass = torch._C._current_graph_task_id


def is_recomputation() -> bool:
    """Whether this forward runs inside a backward pass, as activation checkpointing's second does.

    In compiled code the answer is no: there the compiler recomputes, and knows what it may repeat.
    """
    # The compiler cannot trace the second call, so the first stands before it.
    return not context.is_compiled() and _backward_pass() != -1


class MicroBatches:
    r"""What a layer saw in the micro-batches of one optimizer step; see normdrop.accumulate.

    Count n, mean μ and sum of squared deviations M, each (C,) and float64. A micro-batch b adds

    .. math::
        \delta = \mu_b - \mu, \qquad n' = n + n_b, \qquad \mu' = \mu + \delta \frac{n_b}{n'},
        \qquad M' = M + M_b + \delta^2 \frac{n\, n_b}{n'}

    Args:
        channels: C.
        device: where the layer's running statistics are.

    Reference:
        Chan, Golub and LeVeque, Algorithms for Computing the Sample Variance, 1983.
    """

    def __init__(self, channels: int, device: torch.device) -> None:
        self.count = torch.zeros(channels, dtype=torch.float64, device=device)
        self.mean = torch.zeros_like(self.count)
        self.squares = torch.zeros_like(self.count)

    @staticmethod
    def buffers(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """Two vectors like these, which momentum 1 makes a batch's mean and unbiased variance.

        A variance that is still −1 afterwards says that the batch was empty or skipped.
        """
        return torch.zeros_like(mean), torch.full_like(var, -1.0)

    @torch.no_grad()
    def add(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Merge the statistics of a micro-batch, its variance unbiased, of count values each."""
        was_seen = var != -1.0
        new = was_seen * float(count)
        total = self.count + new
        delta = mean.double() - self.mean
        share = new / total.clamp(min=1.0)
        self.squares.add_(was_seen * (var.double() * (count - 1) + delta**2 * self.count * share))
        self.mean.add_(delta * share)
        self.count.copy_(total)

    @torch.no_grad()
    def move(self, mean: Tensor, var: Tensor, momentum: float) -> None:
        """Let the running statistics move once, with all that was merged."""
        for running, new in ((mean, self.mean), (var, self.squares / (self.count - 1.0))):
            moved = (1.0 - momentum) * running.double() + momentum * new
            running.copy_(torch.where(self.count > 0, moved, running.double()))

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the layer is not part of the step.
        return type(None), ()


class _BatchNorm(torch.nn.modules.batchnorm._BatchNorm):
    """What the three modules share; see :class:`BatchNorm2d`."""

    activation: str | None
    nonfinite: str
    _micro_batches: MicroBatches | None = None

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
        self.widen_statistics()

    def widen_statistics(self, before: dict[str, Tensor | None] | None = None) -> None:
        """Keep the running statistics in float32 where the module is half or bfloat16.

        A float16 variance overflows at 65504 and a bfloat16 mean cannot move by less than 1/256.

        Args:
            before: the buffers before they were rounded, if it is known.
        """
        for name in _STATISTICS:
            value = self._buffers[name]
            old = value if before is None else before[name]
            if value is not None and old is not None and value.dtype in _HALF:
                value.data = old.to(value.device, torch.float32)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _STATISTICS and isinstance(value, Tensor) and value.dtype in _HALF:
            value = value.float()
        super().__setattr__(name, value)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.widen_statistics()  # torch's set_swap_module_params_on_conversion gets past all else

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _BatchNorm:
        before = {name: self._buffers[name] for name in _STATISTICS}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.widen_statistics(before)
        return self

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """y = activation(BN(input) + residual); the residual has the input's shape."""
        if context.is_traced(input):
            others = () if residual is None else (residual,)
            return cast(Tensor, call_as_leaf(self, input, *others))
        return self.normalize(input, residual, self.activation)

    def normalize(
        self,
        input: Tensor,
        residual: Tensor | None,
        activation: str | None,
        keep: float = 1.0,
    ) -> Tensor:
        """:meth:`forward` as fused code calls it: with another activation, and dropout after it."""
        self._check_input_dim(input)  # type: ignore[no-untyped-call]
        mean, var = self.running_mean, self.running_var
        training = self.training or (mean is None and var is None)
        momentum = 0.0 if self.momentum is None else self.momentum
        merging, average = None, None
        if not self.training:
            pass
        elif not self.track_running_stats:
            mean = var = None
        elif is_recomputation():
            # Checkpointing wants both passes to save the same: the statistics are given, unmoved.
            momentum = 0.0
        elif self._micro_batches is not None and mean is not None and var is not None:
            merging, momentum = self._micro_batches, 1.0
            mean, var = merging.buffers(mean, var)
        elif (seen := self.num_batches_tracked) is not None:
            seen.add_(1)
            if self.momentum is None and context.is_compiled():
                # The compiler breaks the graph, or gives up, where a tensor becomes a number.
                average, momentum = (mean, var), 1.0
                if mean is not None and var is not None:
                    mean, var = MicroBatches.buffers(mean, var)
            elif self.momentum is None:
                # Every batch has the same weight: a cumulative average.
                momentum = 1.0 / float(seen)
        y = functional.batch_norm(
            input,
            mean,
            var,
            self.weight,
            self.bias,
            training,
            momentum,
            self.eps,
            residual=residual,
            activation=activation,
            keep=keep,
            nonfinite=self.nonfinite,
        )
        if merging is not None and mean is not None and var is not None:
            merging.add(mean, var, input.numel() // input.shape[1])
        if average is not None:
            self._average(average, (mean, var))
        return y

    @torch.no_grad()
    def _average(
        self,
        average: tuple[Tensor | None, Tensor | None],
        batch: tuple[Tensor | None, Tensor | None],
    ) -> None:
        """Let the running statistics be those of all batches so far, with equal weight."""
        var, count = batch[1], self.num_batches_tracked
        for running, new in zip(average, batch, strict=True):
            if running is not None and new is not None and var is not None and count is not None:
                moved = running + (new - running) / count
                running.copy_(torch.where(var != -1.0, moved, running))

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
        self.widen_statistics()


class BatchNorm2d(_BatchNorm, torch.nn.BatchNorm2d):
    r"""Batch normalization of images: every channel over batch, height and width.

    .. math::
        y_k = \mathrm{activation}\Bigl(\gamma_k \frac{x_k - \mu_k}{\sqrt{\sigma_k^2 + \epsilon}}
              + \alpha_k + \mathrm{residual}_k\Bigr)

    In training μ and the biased σ² come from the batch, and the running statistics move towards
    the batch's mean and unbiased variance; in evaluation the running statistics are used. Those
    stay float32 when the module is converted to float16 or bfloat16.

    A forward inside a backward pass is taken for the recomputation that
    :func:`torch.utils.checkpoint.checkpoint` makes, and leaves the running statistics and
    ``num_batches_tracked`` alone: every batch counts once. With gradient accumulation,
    :func:`normdrop.accumulate` lets them move once for every optimizer step.

    Tools do not see an ``activation``: ``convert_sync_batchnorm`` and ``fuse_conv_bn_eval`` put a
    layer without it in this one's place, and what works on every ``torch.nn.ReLU`` (captum's
    DeepLift) misses it. Where they may come, write batch normalization and ReLU as two layers, and
    let :func:`normdrop.convert` fuse them.

    Args:
        num_features: C, the number of channels K that are normalized.
        eps: ε, inside the root.
        momentum: weight of the new batch in the running statistics; None for their plain average.
        affine: learn γ (``weight``) and α (``bias``).
        track_running_stats: keep running statistics; without them evaluation uses the batch's.
        device: of parameters and buffers.
        dtype: of parameters and buffers.
        bias: without it, α is left out and γ is kept.
        activation: None, "relu", "leaky_relu" (slope 0.01), "leaky_relu(0.2)" (that slope) or
            "silu", in the same operator.
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
