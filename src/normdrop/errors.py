"""The one error for what a user gave: a path, an option, data, a checkpoint."""

from __future__ import annotations

from pathlib import Path

__all__ = ["Diverged", "UserError"]


class UserError(ValueError):
    """What the user gave cannot be used; the message says what was expected, what came, what to do.

    The command line prints the message as one sentence and exits with code 2. The drop-in layers
    raise torch's own error types instead, with torch's own sentences.
    """


class Diverged(UserError):
    """A training left the finite numbers; its folder says how far it came.

    The command line exits with code 1.

    Args:
        message: what happened, and what to do.
        folder: the run folder.
    """

    def __init__(self, message: str, folder: Path) -> None:
        super().__init__(message)
        self.folder = folder
