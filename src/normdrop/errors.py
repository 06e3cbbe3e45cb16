"""The one error for what a user gave: a path, an option, data, a checkpoint."""

__all__ = ["UserError"]


class UserError(ValueError):
    """What the user gave cannot be used; the message says what was expected, what came, what to do.

    The command line prints the message as one sentence and exits with code 2. The drop-in layers
    raise torch's own error types instead, with torch's own sentences.
    """
