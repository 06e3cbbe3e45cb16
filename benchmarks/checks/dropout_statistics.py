"""Is the dropout mask random? 10⁹ draws for each keep: rates, correlations, chi-square.

    python -m benchmarks.checks.dropout_statistics [--draws 1000000000]

One row a test with its statistic as a number of standard deviations (z). A chi-square value with d
degrees of freedom is turned into z by Wilson and Hilferty's cube root. With 56 tests, |z| above 4
happens once in 300 runs if all is well.
"""

from __future__ import annotations

import math
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Benchmark
from normdrop import functional

COLUMNS = ("test", "keep", "draws", "value", "z")
KEYS = 2

KEEPS = (0.5, 0.8, 0.9, 0.999)
CHUNK = 1 << 24

Row = tuple[str, float, int, float, float]
"""test, keep, draws, value, z"""


def kept(keep: float, seed: int, chunk: int, count: int = CHUNK) -> Tensor:
    """Elements chunk · CHUNK … of the mask, as 0 and 1 in bytes."""
    ones = torch.ones(count // 1024, 1024, dtype=torch.bfloat16)
    mask = functional.dropout(ones, keep=keep, seed=seed, sample_offset=chunk * (CHUNK // 1024))
    return mask.ne(0).view(torch.uint8).flatten()


def normal_of_chi_square(value: float, degrees: int) -> float:
    spread = 2 / (9 * degrees)
    return ((value / degrees) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


def chi_square(counts: Tensor, probabilities: Tensor) -> tuple[float, float]:
    expected = probabilities * counts.sum()
    value = ((counts - expected) ** 2 / expected).sum().item()
    return value, normal_of_chi_square(value, len(counts) - 1)


def rates(keep: float, draws: int) -> Iterator[Row]:
    """How many are kept; how often each pattern of eight neighbours, one Philox block, occurs."""
    chunks = draws // CHUNK
    patterns = torch.zeros(256, dtype=torch.int64)
    for chunk in range(chunks):
        # Eight bytes that are 0 or 1, as one number, times this: the eight bits in the top byte.
        blocks = kept(keep, 1, chunk).view(torch.int64) * 0x0102040810204080
        patterns += torch.bincount((blocks >> 56) & 0xFF, minlength=256)
    bits = torch.tensor([bin(code).count("1") for code in range(256)])
    n, total = chunks * CHUNK, int((patterns * bits).sum())
    yield "keep rate", keep, n, total / n, (total / n - keep) / math.sqrt(keep * (1 - keep) / n)

    # Patterns that are too rare for the chi-square approximation are taken together by their count.
    probabilities = keep**bits * (1 - keep) ** (8 - bits)
    common = probabilities * n / 8 >= 10
    counts = patterns.double()
    counts = torch.cat([counts[common], counts[~common].sum(0, keepdim=True)])
    expected = torch.cat([probabilities[common], probabilities[~common].sum(0, keepdim=True)])
    if expected[-1] * n / 8 < 10:
        counts[-2] += counts[-1]
        expected[-2] += expected[-1]
        counts, expected = counts[:-1], expected[:-1]
    value, z = chi_square(counts, expected)
    yield f"chi-square of blocks, {len(counts) - 1} degrees", keep, n, value, z


def covariance(a: Tensor, b: Tensor, keep: float) -> float:
    """Σ (a − keep)(b − keep)."""
    both, first, second = (int(torch.count_nonzero(t)) for t in (a & b, a, b))
    return both - keep * (first + second) + keep * keep * len(a)


def correlations(keep: float, draws: int) -> Iterator[Row]:
    """Of a mask with itself moved, and with masks of other seeds."""
    chunks = max(1, draws // CHUNK // 8)
    pairs: dict[str, tuple[int, int]] = {  # name → (distance in elements, change of the seed)
        "neighbours": (1, 0),
        "elements 2 apart": (2, 0),
        "elements 4 apart": (4, 0),
        "blocks (8 apart)": (8, 0),
        "words (64 apart)": (64, 0),
        "rows (1024 apart)": (1024, 0),
        "samples (3136 apart)": (3136, 0),
        "seeds 1 apart": (0, 1),
        "seeds with another upper half": (0, 1 << 32),
        "seeds that differ in the sign": (0, -(1 << 63)),
    }
    sums = dict.fromkeys(pairs, 0.0)
    count = dict.fromkeys(pairs, 0)
    for chunk in range(chunks):
        mask = kept(keep, 1, chunk)
        for name, (distance, change) in pairs.items():
            other = (
                mask if change == 0 else kept(keep, 1 ^ change if change < 0 else 1 + change, chunk)
            )
            a, b = (mask, other) if distance == 0 else (mask[:-distance], other[distance:])
            sums[name] += covariance(a, b, keep)
            count[name] += len(a)
    far = kept(keep, 1, (1 << 40) // CHUNK)
    mask = kept(keep, 1, 0)
    sums["offset 2^40"] = covariance(mask, far, keep)
    count["offset 2^40"] = CHUNK
    for name, value in sums.items():
        n = count[name]
        correlation = value / n / (keep * (1 - keep))
        yield f"correlation of {name}", keep, n, correlation, correlation * math.sqrt(n)


def seeds(keep: float, draws: int) -> Iterator[Row]:
    """The same 1024 elements under many seeds in a row: is each kept as often as it should be?"""
    trials = max(1000, draws // 1024 // 200)
    counts = torch.zeros(1024, dtype=torch.float64)
    for seed in range(trials):
        counts += kept(keep, seed, 0, count=1024)
    z = (counts - keep * trials) / math.sqrt(trials * keep * (1 - keep))
    value = (z**2).sum().item()
    yield (
        "chi-square of elements over seeds, 1024 degrees",
        keep,
        trials * 1024,
        value,
        normal_of_chi_square(value, 1024),
    )


class Case(NamedTuple):
    """A family of tests with one keep."""

    tests: Callable[[float, int], Iterator[Row]]
    keep: float

    def __str__(self) -> str:
        return f"{self.tests.__name__}, keep {self.keep:g}"


def measure(case: Case, options: Namespace) -> Iterator[harness.Row]:
    draws = -(-options.draws // CHUNK) * CHUNK
    for name, keep, n, value, z in case.tests(case.keep, draws):
        # As text, since a rate of 0.5000026 is more than five digits.
        digits = {"value": f"{value:.10g}", "z": f"{z:.3f}"}
        yield {"test": name, "keep": keep, "draws": n, **digits}


def line(row: harness.Row) -> str:
    return f"  {row['test']:52} {row['draws']:>11}  {row['value']:>14}  z = {row['z']:>6}"


BENCHMARK = Benchmark(
    claim="Test whether the dropout mask is random.",
    stem="dropout_statistics",
    columns=COLUMNS,
    keys=KEYS,
    cases=lambda options: [Case(t, k) for k in KEEPS for t in (rates, correlations, seeds)],
    measure=measure,
    line=line,
    holds=lambda row: abs(float(row["z"])) < 5,
    draws=10**9,
)


def main(argv: Sequence[str] | None = None) -> int:
    return harness.run(BENCHMARK, argv)


if __name__ == "__main__":
    sys.exit(main())
