"""Lines and tables on the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console

__all__ = ["say"]


def say(thing: Any) -> None:
    """Print a line or a table; long lines are left to the terminal."""
    Console(
        highlight=False, soft_wrap=isinstance(thing, str), markup=not isinstance(thing, str)
    ).print(thing)
