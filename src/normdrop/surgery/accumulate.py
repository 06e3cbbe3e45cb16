"""Gradient accumulation: the running statistics move once for every step of the optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from normdrop.arguments import check_model
from normdrop.nn import batch_norm as ours
from normdrop.nn.batch_norm import MicroBatches, is_recomputation

__all__ = ["accumulate"]

_Torchs = torch.nn.modules.batchnorm._BatchNorm


@contextmanager
def accumulate(model: torch.nn.Module) -> Iterator[None]:
    r"""Take the micro-batches of one optimizer step for one batch in the running statistics.

    A layer that saw micro-batches :math:`b = 1 \ldots B` of :math:`n_b` values a channel with means
    :math:`\mu_b` and biased variances :math:`\sigma_b^2`, each (C,), moves once, when the block
    ends:

    .. math::
        n = \sum_b n_b, \qquad \mu = \frac1n \sum_b n_b \mu_b, \qquad
        \sigma^2 = \frac{1}{n - 1} \sum_b n_b \bigl(\sigma_b^2 + (\mu_b - \mu)^2\bigr)

    .. math:: r_\mu \leftarrow (1 - m)\, r_\mu + m \mu, \qquad
              r_{\sigma^2} \leftarrow (1 - m)\, r_{\sigma^2} + m \sigma^2

    and ``num_batches_tracked`` grows by one. For a layer whose input does not depend on how the
    batch was cut, that is what one call with the whole batch does. The merged statistics are kept
    in float64. The outputs are unchanged: every micro-batch is normalized by its own statistics.

    Layers in evaluation mode and layers without running statistics are left as they are. A layer
    used several times in a forward moves once, with all that it saw. After an exception the
    running statistics and ``num_batches_tracked`` are those from before the block. Recomputed
    forwards (activation checkpointing) add nothing. Works for this package's layers and for torch's
    BatchNorm1d, 2d and 3d.

    Args:
        model: a module, wrapped or compiled or not.

    Raises:
        TypeError: a layer in training mode whose class computes its statistics in its own way, as
            SyncBatchNorm does, or that has no parameters yet, as LazyBatchNorm2d.
        RuntimeError: a layer that is in such a block already.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(1), torch.nn.Linear(1, 1))
        >>> x = torch.tensor([[1.0], [3.0], [5.0], [7.0]])
        >>> with accumulate(model):
        ...     for part in x.split(2):
        ...         model(part).mean().backward()
        >>> model[0].num_batches_tracked
        tensor(1)
        >>> model[0].running_mean / 0.1, x.mean()
        (tensor([4.]), tensor(4.))

    Reference:
        Chan, Golub and LeVeque, Algorithms for Computing the Sample Variance, 1983.
    """
    check_model("accumulate", model)
    merged: dict[torch.nn.modules.batchnorm._BatchNorm, MicroBatches] = {}
    try:
        for name, layer in model.named_modules():
            if isinstance(layer, _Torchs) and layer.track_running_stats:
                found = _attach(name or "(model)", layer)
                if found is not None:
                    merged[layer] = found
        yield
        for layer, found in merged.items():
            if found.count.any():
                _move(layer, found)
    finally:
        for layer in merged:
            if isinstance(layer, ours._BatchNorm):
                del vars(layer)["_micro_batches"]
            else:
                vars(layer).pop("forward").found = None


def _attach(name: str, layer: torch.nn.modules.batchnorm._BatchNorm) -> MicroBatches | None:
    """Let the layer merge what it sees; None where it is frozen in a way that we do not know."""
    own = vars(layer).get("forward")
    is_copied = isinstance(own, _Merging) and own.found is None
    if vars(layer).get("_micro_batches") or (isinstance(own, _Merging) and not is_copied):
        raise RuntimeError(f"accumulate: layer {name!r} is in a block of accumulate already")
    is_plain = type(layer).forward is _Torchs.forward and (own is None or is_copied)
    is_lazy = isinstance(layer, torch.nn.modules.lazy.LazyModuleMixin)
    if is_lazy or not (is_plain or isinstance(layer, ours._BatchNorm)):
        if not layer.training:
            return None
        if is_lazy:
            raise TypeError(
                f"accumulate: expected layer {name!r} to have its parameters, got "
                f"{type(layer).__name__}; call the model on one batch first"
            )
        raise TypeError(
            f"accumulate: expected layer {name!r} to be a BatchNorm1d, 2d or 3d of torch or "
            f"normdrop, got {type(layer).__name__}, whose statistics cannot be merged; "
            "put it in evaluation mode to leave it alone"
        )
    if layer.running_mean is None:
        return None
    found = MicroBatches(layer.running_mean.shape[0], layer.running_mean.device)
    if isinstance(layer, ours._BatchNorm):
        layer._micro_batches = found
    else:
        merging = _mergings.setdefault(layer, _Merging(layer))
        merging.found = found
        vars(layer)["forward"] = merging
    return found


class _Merging:
    """The forward of one of torch's layers within a block; a copy of it does what torch's does."""

    def __init__(self, layer: torch.nn.modules.batchnorm._BatchNorm) -> None:
        self._layer = ref(layer)
        self.found: MicroBatches | None = None

    def __call__(self, input: Tensor) -> Tensor:
        layer, found = self._layer(), self.found
        assert layer is not None
        mean, var = layer.running_mean, layer.running_var
        is_moving = layer.training and layer.track_running_stats
        if found is None or not is_moving or mean is None or var is None:
            return type(layer).forward(layer, input)
        layer._check_input_dim(input)
        is_first = not is_recomputation()
        if is_first:
            mean, var = found.buffers(mean, var)
        y = torch.nn.functional.batch_norm(
            input, mean, var, layer.weight, layer.bias, True, float(is_first), layer.eps
        )
        if is_first:
            found.add(mean, var, input.numel() // input.shape[1])
        return y

    def __reduce__(self) -> tuple[Any, ...]:
        return _Merging, (self._layer(),)


# One for all blocks of a layer: compiled code holds for the object that it was compiled with.
_mergings: WeakKeyDictionary[torch.nn.Module, _Merging] = WeakKeyDictionary()


def _move(layer: torch.nn.modules.batchnorm._BatchNorm, found: MicroBatches) -> None:
    mean, var, count = layer.running_mean, layer.running_var, layer.num_batches_tracked
    if mean is None or var is None or count is None:
        return
    count.add_(1)
    found.move(mean, var, 1.0 / float(count) if layer.momentum is None else layer.momentum)
