"""What a run folder is: its files, the columns of its metrics, and what to type for it."""

from __future__ import annotations

import shlex
from pathlib import Path

from normdrop.errors import UserError

__all__ = [
    "COLUMNS",
    "EVALUATION",
    "FILES",
    "METRICS",
    "MISTAKE_NAMES",
    "OPTIONS",
    "RECORD",
    "RESULT",
    "WEIGHTS",
    "best_checkpoint",
    "cannot_write",
    "command_to_repeat",
    "command_to_resume",
    "damaged",
    "last_checkpoint",
]

OPTIONS = "options.yaml"
RECORD = "run.json"
METRICS = "metrics.csv"
WEIGHTS = "weights.safetensors"
EVALUATION = "evaluation.safetensors"
MISTAKE_NAMES = "evaluation.json"
# Written last of all: a folder with it is a finished run.
RESULT = "result.json"
FILES = (OPTIONS, RECORD, METRICS, WEIGHTS, EVALUATION, MISTAKE_NAMES, RESULT)

COLUMNS = (
    "epoch",
    "step",
    "learning_rate",
    "train_loss",
    "train_accuracy",
    "val_loss",
    "val_accuracy",
    "seconds",
    "images_per_second",
)


def last_checkpoint(folder: Path) -> Path:
    """The checkpoint of the last whole epoch."""
    return folder / "checkpoints" / "last.ckpt"


def best_checkpoint(folder: Path) -> Path:
    """The checkpoint of the best epoch."""
    return folder / "checkpoints" / "best.ckpt"


def command_to_resume(folder: Path) -> str:
    """What to type to go on with a run."""
    return f"normdrop train --resume {shlex.quote(str(folder))}"


def command_to_repeat(folder: Path) -> str:
    """What to type to run a run again."""
    return f"normdrop train --config {shlex.quote(str(folder / OPTIONS))}"


def cannot_write(error: OSError, folder: Path) -> UserError:
    """One sentence for a full disk or a folder that cannot be written."""
    whole = last_checkpoint(folder).exists()
    return UserError(
        f"Cannot write to {folder} ({error.strerror or error}); make room or allow writing there, "
        f"then {'go on from the last whole epoch' if whole else 'start again'} with: "
        f"{command_to_resume(folder)}"
    )


def damaged(path: Path, why: object) -> UserError:
    """One sentence for a file that is not what a run wrote."""
    reason = " ".join(str(why).split())[:160]
    return UserError(
        f"Cannot read {path} ({reason}); it was cut off or changed: restore it, or train again"
    )
