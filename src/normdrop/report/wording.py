"""How the report words numbers and findings."""

from __future__ import annotations

import dataclasses

import numpy as np

__all__ = [
    "Sentence",
    "counted",
    "duration",
    "listed",
    "number",
    "option",
    "percent",
    "power_of_ten",
    "probability",
    "times",
]

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
#: A space at which no line breaks.
NBSP = "\u00a0"


@dataclasses.dataclass(frozen=True)
class Sentence:
    """What is seen in a figure, and the warning sign: present (``warning``) or only described."""

    seen: str
    sign: str
    warning: bool = False


def number(value: float, digits: int = 3) -> str:
    """A few significant digits, with a power of ten only where they would be long without.

    Example:
        >>> number(0.123456), number(1234567.0), number(-0.00001234), number(0.0)
        ('0.123', '1,230,000', '−1.23×10⁻⁵', '0')
        >>> number(0.123456, digits=2)
        '0.12'
    """
    value = float(value)
    if not np.isfinite(value):
        return "not a number" if np.isnan(value) else ("∞" if value > 0 else "−∞")
    if value == 0:
        return "0"
    rounded = f"{value:.{digits - 1}e}"
    mantissa, _, power = rounded.partition("e")
    exponent = int(power)
    if -4 <= exponent < 7:
        text = f"{float(rounded):,.{max(0, digits - 1 - exponent)}f}"
    else:
        text = f"{mantissa}×{power_of_ten(exponent)}"
    return text.replace("-", "−")


def power_of_ten(exponent: int) -> str:
    """Ten to a whole power, as in 10⁻⁵."""
    return f"10{str(exponent).translate(_SUPERSCRIPT)}"


def option(value: float) -> str:
    """A number that somebody chose, such as 0.05: without zeros at its end."""
    text = number(value)
    return text.rstrip("0").rstrip(".") if "." in text and "×" not in text else text


def percent(share: float, digits: int = 1) -> str:
    r"""A share as a percentage, with a no-break space; never rounded up to 100.

    Example:
        >>> percent(0.9754), percent(1.0), percent(0.99999)
        ('97.5\xa0%', '100\xa0%', '>\xa099.9\xa0%')
    """
    share = float(share)
    if not np.isfinite(share):
        return "not a number"
    if share in (0.0, 1.0):
        return f"{share:.0%}".replace("%", NBSP + "%")
    text = f"{100 * share:.{digits}f}"
    if float(text) >= 100:
        return f">{NBSP}{100 - 10**-digits:.{digits}f}{NBSP}%"
    if float(text) <= 0:
        return f"<{NBSP}{10**-digits:.{digits}f}{NBSP}%"
    return f"{text}{NBSP}%"


def probability(value: float) -> str:
    r"""A probability with three digits; never rounded up to 1.

    Example:
        >>> probability(0.98765), probability(0.99996)
        ('0.988', '>\xa00.999')
    """
    return f">{NBSP}0.999" if 0.9995 <= value < 1 else f"{value:.3f}"


def duration(seconds: float) -> str:
    """Seconds in words.

    Example:
        >>> duration(0.4), duration(74), duration(7380)
        ('0.4 s', '1 min 14 s', '2 h 3 min')
    """
    if not np.isfinite(seconds):
        return "an unknown time"
    if seconds < 10:
        return f"{seconds:.1f} s"
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60} s"
    return f"{total // 3600} h {total % 3600 // 60} min"


def counted(count: int, noun: str, plural: str | None = None) -> str:
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count:,} times")


def listed(words: list[str], most: int = 4) -> str:
    if len(words) > most:
        words = [*words[: most - 1], f"{len(words) - most + 1} more"]
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
