"""More than 2³¹ elements: whether any index of the kernels is too narrow.

A check rather than a measurement. Samples are chunks of noise, each scaled by another factor, so
that an index that wraps around meets other values. Results are compared, chunk by chunk around the
2³¹st element and at the end, with the equations in float64; dropout's mask with the reference's.
Needs about 15 GB for 2³¹ bfloat16 elements; says so and ends where there is less.
"""

from __future__ import annotations

import re
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Benchmark
from normdrop import functional
from normdrop.ops import reference

COLUMNS = ("check", "layout", "dtype", "elements", "seconds", "largest_error", "bound", "holds")
KEYS = 4

CHANNELS, SIDE = 64, 32
SAMPLE = CHANNELS * SIDE * SIDE
CHUNK = 256
"""Samples that are compared at once."""

ROUNDING = 2.0**-8
"""bfloat16 has 8 bits: a rounding is at most this part of the value."""


def empty(samples: int, layout: str) -> Tensor:
    """(N, C, H, W) in bfloat16."""
    n, c, h, w = samples, CHANNELS, SIDE, SIDE
    if layout == "channels_last":
        return torch.empty(n, h, w, c, dtype=torch.bfloat16).permute(0, 3, 1, 2)
    return torch.empty(n, c, h, w, dtype=torch.bfloat16)


def fill_with_noise(x: Tensor, seed: int) -> Tensor:
    """Each chunk of samples is the same noise times another factor, plus a constant."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(min(CHUNK, len(x)), CHANNELS, SIDE, SIDE, generator=generator)
    for i, chunk in enumerate(x.split(CHUNK)):
        chunk.copy_(base[: len(chunk)] * (1 + i * CHUNK / len(x)) + 0.25)
    return x


def compared(samples: int) -> list[slice]:
    """The first samples, those around the 2³¹st element, and the last."""
    middle = 2**31 // SAMPLE
    starts = {0, max(0, samples - CHUNK)}
    if samples > middle:
        starts.add(middle - CHUNK // 2)
    return [slice(start, start + CHUNK) for start in sorted(starts)]


def check_batch_norm(samples: int, layout: str) -> tuple[float, float]:
    """Seconds of forward and backward, and the largest error in roundings."""
    x = fill_with_noise(empty(samples, layout), 0)

    def over_chunks(term: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        result = torch.zeros(CHANNELS, dtype=torch.float64)
        for chunks in zip(*(t.detach().split(CHUNK) for t in tensors), strict=True):
            # A channel of one sample is 1024 values: float32 sums those, float64 the rest.
            result += term(*(chunk.float() for chunk in chunks)).sum((2, 3)).double().sum(0)
        return result

    def wide(vector: Tensor) -> Tensor:
        return vector.view(1, -1, 1, 1)

    count = samples * SIDE * SIDE
    mean = over_chunks(lambda a: a, x) / count
    var = over_chunks(lambda a: (a - wide(mean).float()).square(), x) / count
    invstd = (var + 1e-5).rsqrt()

    x.requires_grad_()
    start = perf_counter()
    y = functional.batch_norm(x, None, None, training=True)
    seconds = perf_counter() - start
    errors = [
        _error(y.detach()[part], (x.detach()[part].double() - wide(mean)) * wide(invstd))
        for part in compared(samples)
    ]
    # y is not kept for backward, so its memory can take the gradient.
    g = fill_with_noise(y.detach(), 1)
    mean_g = over_chunks(lambda b: b, g) / count
    mean_gx = over_chunks(lambda a, b: b * (a - wide(mean).float()), x, g) / count
    start = perf_counter()
    (grad_x,) = torch.autograd.grad(y, x, g)
    seconds += perf_counter() - start
    for part in compared(samples):
        d = x.detach()[part].double() - wide(mean)
        slope = wide(mean_gx) * wide(invstd).square()
        truth = wide(invstd) * (g[part].double() - wide(mean_g) - d * slope)
        errors.append(_error(grad_x[part], truth))
    return seconds, max(errors)


def check_dropout(samples: int, layout: str) -> tuple[float, float]:
    """Seconds of forward, in place, and the number of wrong elements."""
    x = empty(samples, layout).fill_(1.0)
    start = perf_counter()
    functional.dropout(x, keep=0.75, seed=1, scaling="test", inplace=True)
    seconds = perf_counter() - start
    wrong = 0
    for part in compared(samples):
        mask = reference.keep_mask_of_threshold(
            tuple(x[part].shape),
            reference.keep_threshold(0.75),
            torch.tensor(1),
            part.start,
        )
        wrong += int((x[part] != mask.to(x.dtype)).sum())
    return seconds, float(wrong)


def _error(result: Tensor, truth: Tensor) -> float:
    """The largest error, in roundings of bfloat16."""
    scale = truth.abs().clamp(min=1e-2) * ROUNDING
    return float(((result.double() - truth).abs() / scale).max())


class Check(NamedTuple):
    """One operator in one layout: the errors that it makes, and what they may be."""

    name: str
    layout: str
    errors: Callable[[int, str], tuple[float, float]]
    bound: float
    tensors: int
    """As large as the input, the input included."""

    def __str__(self) -> str:
        return f"{self.name} {self.layout}"


CHECKS = tuple(
    Check(name, layout, errors, bound, tensors)
    for name, errors, bound, tensors in (
        ("dropout, wrong elements", check_dropout, 0.0, 1),
        ("batch_norm, roundings", check_batch_norm, 1.1, 3),
    )
    for layout in ("contiguous", "channels_last")
)


def available_memory() -> float:
    """Bytes, or infinity where the system does not say."""
    info = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+) kB", info.read_text()) if info.exists() else None
    return int(found[1]) * 1024 if found else float("inf")


def measure(check: Check, options: Namespace) -> Iterator[harness.Row]:
    samples = 2 if options.quick else 2**31 // SAMPLE + CHUNK
    needed = check.tensors * samples * SAMPLE * 2 + 2e9 * (not options.quick)
    if needed > available_memory():
        print(
            f"  left out, it needs {needed / 1e9:.0f} GB "
            f"and {available_memory() / 1e9:.0f} GB are free"
        )
        return
    seconds, error = check.errors(samples, check.layout)
    yield {
        "check": check.name,
        "layout": check.layout,
        "dtype": "bfloat16",
        "elements": samples * SAMPLE,
        "seconds": seconds,
        "largest_error": error,
        "bound": check.bound,
        "holds": str(error <= check.bound),
    }


def holds(row: harness.Row) -> bool:
    return bool(row["holds"] == "True")


def line(row: harness.Row) -> str:
    error = f"largest {row['largest_error']:.3g}, at most {row['bound']:g}"
    verdict = "holds" if holds(row) else "FAILS"
    return f"  {row['elements']:>12} elements {row['seconds']:8.2f} s   {error}: {verdict}"


BENCHMARK = Benchmark(
    claim="Check the kernels on more than 2³¹ elements.",
    stem="large",
    columns=COLUMNS,
    keys=KEYS,
    cases=lambda options: CHECKS,
    measure=measure,
    line=line,
    holds=holds,
)


def main(argv: Sequence[str] | None = None) -> int:
    return harness.run(BENCHMARK, argv)


if __name__ == "__main__":
    sys.exit(main())
