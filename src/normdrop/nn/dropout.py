"""Dropout modules."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from normdrop import functional
from normdrop.functional import Scaling
from normdrop.nn.tracing import call_as_leaf
from normdrop.ops import context

__all__ = [
    "AlphaDropout",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "FeatureAlphaDropout",
]


class _Dropout(torch.nn.modules.dropout._DropoutNd):
    """p is torch's probability to drop; given ``keep``, p = 1 − keep."""

    scaling: Scaling

    def __init__(
        self,
        p: float | None = None,
        inplace: bool = False,
        *,
        keep: float | None = None,
        scaling: Scaling = "train",
    ) -> None:
        kept = functional.keep_probability(p, keep)
        # 1 − 0.8 is 0.19999999999999996 in binary; the repr shall say 0.2.
        super().__init__(round(1.0 - kept, 15) if p is None else p, inplace)
        self.scaling = functional.check_scaling(scaling)

    @property
    def keep(self) -> float:
        """The probability to keep, 1 − p: the lecture's p."""
        return round(1.0 - self.p, 15)

    def extra_repr(self) -> str:
        text = str(super().extra_repr())
        return text if self.scaling == "train" else f"{text}, scaling={self.scaling!r}"

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Modules pickled by torch's class and read as ours have no scaling.
        super().__setstate__({"scaling": "train", **state})  # type: ignore[no-untyped-call]


class Dropout(_Dropout, torch.nn.Dropout):
    """Drop elements: z = r ⊙ x / keep with r_i ~ Bernoulli(keep) in training, z = x in evaluation.

    With ``scaling="test"``, the lecture's form, z = r ⊙ x in training and keep · x in evaluation.

    Args:
        p: probability to DROP, as in torch; 0.5 if neither p nor keep is given.
        inplace: write the result into the input.
        keep: probability to KEEP, the lecture's p: 0.8 at the input, 0.5 in hidden layers.
        scaling: "train" or "test".

    Shape:
        - Input: any. Output: the same.

    Raises:
        ValueError: p or keep outside [0, 1], or both given.

    Example:
        >>> Dropout(keep=0.8)
        Dropout(p=0.2, inplace=False)
        >>> x = torch.ones(3)
        >>> Dropout(0.5).eval()(x) is x
        True

    Reference:
        Srivastava et al., 2014, https://jmlr.org/papers/v15/srivastava14a
    """

    def forward(self, input: Tensor) -> Tensor:
        """z; see the class."""
        if context.is_traced(input):
            return cast(Tensor, call_as_leaf(self, input))
        return functional.dropout(input, self.p, self.training, self.inplace, scaling=self.scaling)


class Dropout1d(_Dropout, torch.nn.Dropout1d):
    """Drop whole channels of (N, C, L) or (C, L); otherwise as :class:`Dropout`.

    Example:
        >>> Dropout1d(0.5)(torch.ones(2, 3, 4)).shape
        torch.Size([2, 3, 4])
    """

    def forward(self, input: Tensor) -> Tensor:
        """z; see the class."""
        if context.is_traced(input):
            return cast(Tensor, call_as_leaf(self, input))
        return functional.dropout1d(
            input, self.p, self.training, self.inplace, scaling=self.scaling
        )


class Dropout2d(_Dropout, torch.nn.Dropout2d):
    """Drop whole channels of (N, C, H, W); otherwise as :class:`Dropout`.

    Example:
        >>> Dropout2d(0.5)(torch.ones(2, 3, 4, 4)).shape
        torch.Size([2, 3, 4, 4])
    """

    def forward(self, input: Tensor) -> Tensor:
        """z; see the class."""
        if context.is_traced(input):
            return cast(Tensor, call_as_leaf(self, input))
        return functional.dropout2d(
            input, self.p, self.training, self.inplace, scaling=self.scaling
        )


class Dropout3d(_Dropout, torch.nn.Dropout3d):
    """Drop whole channels of (N, C, D, H, W) or (C, D, H, W); otherwise as :class:`Dropout`.

    Example:
        >>> Dropout3d(0.5)(torch.ones(2, 3, 2, 2, 2)).shape
        torch.Size([2, 3, 2, 2, 2])
    """

    def forward(self, input: Tensor) -> Tensor:
        """z; see the class."""
        if context.is_traced(input):
            return cast(Tensor, call_as_leaf(self, input))
        return functional.dropout3d(
            input, self.p, self.training, self.inplace, scaling=self.scaling
        )


class AlphaDropout(_Dropout, torch.nn.AlphaDropout):
    """Dropout for SELU networks: mean 0 and variance 1 stay; see functional.alpha_dropout.

    As in torch, ``inplace`` is accepted and not used.

    Example:
        >>> y = AlphaDropout(0.5)(torch.randn(100_000))
        >>> bool((y.mean().abs() < 0.05) & ((y.var() - 1).abs() < 0.05))
        True
    """

    def __init__(
        self, p: float | None = None, inplace: bool = False, *, keep: float | None = None
    ) -> None:
        super().__init__(p, inplace, keep=keep)

    def forward(self, input: Tensor) -> Tensor:
        """z; see the class."""
        if context.is_traced(input):
            return cast(Tensor, call_as_leaf(self, input))
        return functional.alpha_dropout(input, self.p, self.training)


class FeatureAlphaDropout(_Dropout, torch.nn.FeatureAlphaDropout):
    """:class:`AlphaDropout` of whole channels of (N, C, …).

    Example:
        >>> FeatureAlphaDropout(0.5)(torch.randn(2, 3, 4, 4)).shape
        torch.Size([2, 3, 4, 4])
    """

    def __init__(
        self, p: float | None = None, inplace: bool = False, *, keep: float | None = None
    ) -> None:
        super().__init__(p, inplace, keep=keep)

    def forward(self, input: Tensor) -> Tensor:
        """z; see the class."""
        if context.is_traced(input):
            return cast(Tensor, call_as_leaf(self, input))
        return functional.feature_alpha_dropout(input, self.p, self.training)
