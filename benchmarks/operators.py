"""What the kernel benchmarks measure: for each operator its providers, its shapes and its floor.

The floor is the least that memory must carry, in cold copies (one copy reads one tensor and writes
one). A second reading of the same data is free where it can come from the processor's cache:

=================  ==========================================  ==========================  ======
operator           forward reads + writes                      backward reads + writes     copies
=================  ==========================================  ==========================  ======
batch_norm,        contiguous: x + y                           x, ∂y + ∂x                  2.5
with ReLU or not   channels_last: x, again x + y               x, ∂y, again x, ∂y + ∂x     4
add                contiguous: x, residual + y                 x, ∂y + ∂x, ∂residual       3.5
                   channels_last: x, again x, residual + y     again x, ∂y: two more       5
with dropout       as without it: the mask is not in memory    as without it               2.5, 4
dropout            x + y                                       ∂y + ∂x                     2
=================  ==========================================  ==========================  ======

A contiguous channel of one sample lies together, so a task can sum a channel and find it in its
cache when it normalizes. In channels_last every row holds all channels: the sums need the whole
tensor before the first element can be normalized, and a large tensor has then left the cache.
A tensor that fits into the cache as a whole can go below its floor. The activation's sign (one bit
an element where a residual was added) and the vectors per channel are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import relu_

import normdrop.nn
from benchmarks.harness import BOTH, FORWARD, Measure, Provider, autograd_measure
from normdrop import functional

Shape = tuple[int, ...]
Function = Callable[..., Tensor]

CONTIGUOUS, CHANNELS_LAST = "contiguous", "channels_last"

LARGE: Shape = (32, 64, 224, 224)
SHAPES: tuple[Shape, ...] = (
    (32, 64, 56, 56),
    (128, 16, 32, 32),
    (64, 64, 32, 32),
    (32, 256, 14, 14),
    LARGE,
    (8, 32, 16, 28, 28),
    (256, 1024),
    (32, 10),
)
QUICK_SHAPES: tuple[Shape, ...] = ((2, 3, 4, 4), (2, 3, 2, 4, 4), (4, 3))


@dataclass(frozen=True)
class Operator:
    """One piece of work: how torch does it at its best, how normdrop does it, and its floor."""

    name: str
    title: str
    torch: Callable[[Shape], Function]
    ours: Callable[[Shape], Function]
    floors: dict[str, tuple[float, float]]
    """Copies of forward, and of forward and backward, by layout."""
    inputs: int = 1
    large: tuple[str, ...] = ()
    """Layouts in which the largest shape is measured, too."""

    def floor(self, layout: str, which: str) -> float:
        return self.floors[layout][(FORWARD, BOTH).index(which)]


@dataclass(frozen=True)
class Case:
    """One operator on one shape and type: all its providers run in turn."""

    operator: Operator
    shape: Shape
    dtype: torch.dtype
    threads: int

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{self.operator.name} {shape_name(self.shape)} {dtype_name(self.dtype)} {threads}"

    @property
    def layouts(self) -> tuple[str, ...]:
        if len(self.shape) < 4:
            return (CONTIGUOUS,)
        return self.operator.large if self.shape == LARGE else (CONTIGUOUS, CHANNELS_LAST)

    def floor(self, layout: str, which: str) -> float:
        # Of a matrix (N, C) a row holds all channels, as in channels_last.
        layout = CHANNELS_LAST if len(self.shape) == 2 else layout
        return self.operator.floor(layout, which)


def shape_name(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def new_tensor(shape: Shape, dtype: torch.dtype, layout: str) -> Tensor:
    x = torch.randn(shape).to(dtype)
    if layout == CHANNELS_LAST:
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        x = x.contiguous(memory_format=formats[len(shape)])
    return x


def prepare(case: Case, layout: str, function: Function) -> Measure:
    """One provider of an operator: its own inputs and gradient, in one layout."""
    inputs = [
        new_tensor(case.shape, case.dtype, layout).requires_grad_()
        for _ in range(case.operator.inputs)
    ]
    grad = new_tensor(case.shape, case.dtype, layout)
    parameters = list(getattr(function, "parameters", list)())
    return autograd_measure(lambda: function(*inputs), [*inputs, *parameters], grad)


def providers(case: Case) -> Iterator[Provider]:
    for layout in case.layouts:
        for name in ("torch", "ours"):
            function = getattr(case.operator, name)(case.shape)
            label = "normdrop" if name == "ours" else name
            yield Provider(label, layout, prepare(case, layout, function))


# ---- The operators -----------------------------------------------------------------------------


def dimension(shape: Shape) -> int:
    """The d in BatchNorm1d, 2d, 3d."""
    return max(len(shape) - 2, 1)


def torch_norm(shape: Shape) -> torch.nn.Module:
    return getattr(torch.nn, f"BatchNorm{dimension(shape)}d")(shape[1])


def our_norm(shape: Shape, activation: str | None = None) -> torch.nn.Module:
    return getattr(normdrop.nn, f"BatchNorm{dimension(shape)}d")(shape[1], activation=activation)


class TorchReLU(torch.nn.Module):
    """torch's best: the ReLU writes over what batch normalization gave."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm = torch_norm(shape)

    def forward(self, x: Tensor) -> Tensor:
        return relu_(self.norm(x))


class TorchAddReLU(TorchReLU):
    """torch's best: addition and ReLU write over what batch normalization gave."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return relu_(self.norm(x).add_(residual))


class TorchReLUDropout(TorchReLU):
    """Batch normalization, ReLU and dropout; torch's dropout keeps a mask of x's type."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.dropout(relu_(self.norm(x)), 0.5)


class OurReLUDropout(torch.nn.Module):
    """The same in one call."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm = our_norm(shape)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        return functional.batch_norm(
            x,
            norm.running_mean,
            norm.running_var,
            norm.weight,
            norm.bias,
            training=True,
            activation="relu",
            keep=0.5,
        )


BATCH_NORM = {CONTIGUOUS: (1.0, 2.5), CHANNELS_LAST: (1.5, 4.0)}
BATCH_NORM_ADD = {CONTIGUOUS: (1.5, 3.5), CHANNELS_LAST: (2.0, 5.0)}
DROPOUT = {CONTIGUOUS: (1.0, 2.0), CHANNELS_LAST: (1.0, 2.0)}

OPERATORS = (
    Operator("batch_norm", "BN", torch_norm, our_norm, BATCH_NORM),
    Operator(
        "batch_norm+relu",
        "BN+ReLU",
        TorchReLU,
        lambda shape: our_norm(shape, "relu"),
        BATCH_NORM,
        large=(CONTIGUOUS, CHANNELS_LAST),
    ),
    Operator(
        "batch_norm+add+relu",
        "BN+add+ReLU",
        TorchAddReLU,
        lambda shape: our_norm(shape, "relu"),
        BATCH_NORM_ADD,
        inputs=2,
    ),
    Operator(
        "batch_norm+relu+dropout",
        "BN+ReLU+dropout 0.5",
        TorchReLUDropout,
        OurReLUDropout,
        BATCH_NORM,
    ),
    Operator(
        "dropout",
        "dropout 0.5",
        lambda shape: torch.nn.Dropout(0.5),
        lambda shape: normdrop.nn.Dropout(0.5),
        DROPOUT,
        large=(CONTIGUOUS,),
    ),
)
TITLES = {operator.name: operator.title for operator in OPERATORS}


def cases(threads: Sequence[int], quick: bool) -> Iterator[Case]:
    """All that is measured. The largest shape only with the operators that say so."""
    for operator in OPERATORS:
        for shape in QUICK_SHAPES if quick else SHAPES:
            if shape == LARGE and not operator.large:
                continue
            for dtype in (torch.float32, torch.bfloat16):
                for count in threads:
                    yield Case(operator, shape, dtype, count)
