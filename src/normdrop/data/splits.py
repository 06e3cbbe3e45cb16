"""Stratified splits: each class is divided in the same proportion, by a seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from normdrop.errors import UserError

__all__ = ["check_split_fraction", "stratified_split"]


def check_split_fraction(name: str, value: float, *, zero: bool = False) -> float:
    """Return ``value`` if it is a fraction that a split can have."""
    if not (0.0 < value < 1.0 or (zero and value == 0.0)):
        limits = "at least 0 and below 1" if zero else "between 0 and 1"
        raise UserError(f"{name} must be a fraction {limits}, but got {value}")
    return float(value)


def stratified_split(
    labels: np.ndarray,
    fraction: float,
    seed: int,
    *,
    classes: Sequence[str],
    purpose: str = "test",
) -> tuple[np.ndarray, np.ndarray]:
    """Divide samples into a kept and a held-out part, class by class.

    Of n_c samples of class c, about ``fraction`` · n_c are held out: rounded down, and the
    samples that rounding leaves go to the classes with the largest remainders. Each class has at
    least one sample in both parts.

    Args:
        labels: class of each sample, integers.
        fraction: the share to hold out, in (0, 1).
        seed: the same seed gives the same split, whatever else draws random numbers.
        classes: names of the classes, for the error.
        purpose: what the held-out part is for, for the error and to draw independent splits.

    Returns:
        positions kept and positions held out, each sorted.

    Raises:
        UserError: a class has one sample only, so it cannot be on both sides.

    Example:
        >>> kept, held = stratified_split(
        ...     np.array([0] * 8 + [1] * 4), 0.25, 0, classes=["a", "b"])
        >>> len(kept), len(held), np.bincount(np.array([0] * 8 + [1] * 4)[held]).tolist()
        (9, 3, [2, 1])
    """
    present, counts = np.unique(labels, return_counts=True)
    if (counts < 2).any():
        few = [classes[c] for c in present[counts < 2]]
        raise UserError(
            f"class {few[0]!r} has only one sample left where the {purpose} split needs at least 2"
            + (f" (and {len(few) - 1} more classes)" if len(few) > 1 else "")
            + "; add samples, or remove the class"
        )
    exact = counts * fraction
    held = np.clip(np.floor(exact).astype(np.int64), 1, counts - 1)
    missing = round(len(labels) * fraction) - int(held.sum())
    for where in np.argsort(held - exact, kind="stable"):
        if missing <= 0:
            break
        if held[where] < counts[where] - 1:
            held[where] += 1
            missing -= 1
    # The purpose's bytes go into the seed: the validation split does not follow the test split.
    generator = np.random.default_rng([seed, *purpose.encode()])
    out = [
        generator.permutation(np.flatnonzero(labels == c))[:n]
        for c, n in zip(present, held, strict=True)
    ]
    held_out = np.sort(np.concatenate(out))
    kept = np.setdiff1d(np.arange(len(labels)), held_out, assume_unique=True)
    return kept, held_out
