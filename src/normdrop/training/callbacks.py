"""What happens around the steps: records, checkpoints, and what the terminal shows."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from normdrop.runs.folder import COLUMNS, best_checkpoint, cannot_write, last_checkpoint
from normdrop.runs.write import keep_best_as_last, write_checkpoint, write_metrics
from normdrop.training.console import say
from normdrop.training.task import Task

__all__ = ["AtomicCheckpoints", "Display", "Record", "silence"]


class AtomicCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Write ``checkpoint`` to a temporary name, flush it, rename it."""
        write_checkpoint(Path(path), checkpoint)


class Record(pl.callbacks.Checkpoint):
    """After every epoch: metrics.csv, TensorBoard, last.ckpt, and best.ckpt if it is the best.

    The best epoch has the highest validation accuracy, and among equals the lowest validation loss.
    The rows live in the checkpoint, so a resumed run forgets those that came after it.

    Args:
        folder: the run's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: list[dict[str, float]] = []
        self.best_epoch = 0
        self.diverged: int | None = None

    def state_dict(self) -> dict[str, Any]:
        """The rows so far, the best epoch, and the one whose figures or weights are not finite."""
        return {"rows": self.rows, "best_epoch": self.best_epoch, "diverged": self.diverged}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        self.rows = list(state_dict["rows"])
        self.best_epoch = state_dict["best_epoch"]
        self.diverged = state_dict["diverged"]

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the epoch down; where it left the finite numbers, it is the last one."""
        assert isinstance(pl_module, Task)
        self.rows.append(dict(pl_module.row))
        if not _is_finite(self.rows[-1], pl_module.network):
            self.diverged = len(self.rows)
            trainer.should_stop = True
        best = self.rows[self.best_epoch - 1] if self.best_epoch else None
        better = not self.diverged and (best is None or _rank(self.rows[-1]) > _rank(best))
        if better:
            self.best_epoch = len(self.rows)
        if trainer.logger is not None and not self.diverged:
            trainer.logger.log_metrics(
                {name: self.rows[-1][name] for name in COLUMNS[2:]}, trainer.global_step
            )
        try:
            # The best comes first: killed between the two, the run repeats this epoch.
            trainer.save_checkpoint((best_checkpoint if better else last_checkpoint)(self.folder))
            if trainer.is_global_zero:
                if better:
                    keep_best_as_last(self.folder)
                write_metrics(self.folder, self.rows)
        except OSError as error:
            raise cannot_write(error, self.folder) from error


class Display(pl.Callback):
    """A progress bar on a terminal, and a line an epoch everywhere.

    Args:
        epochs: how many there will be.
        unit: what a sample is called.
    """

    def __init__(self, epochs: int, unit: str = "samples") -> None:
        self.epochs = epochs
        self.unit = unit
        self._bar: Progress | None = None
        self._shown = 0.0

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A spawned process unpickles its callbacks before Lightning says anything.
        self.__dict__.update(state)
        silence()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show a bar for the epoch."""
        if not trainer.is_global_zero or not sys.stdout.isatty():
            return
        self._bar = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            transient=True,
        )
        self._bar.add_task(
            "", total=trainer.num_training_batches, epoch=trainer.current_epoch + 1, figures=""
        )
        self._bar.start()
        self._begin = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any
    ) -> None:
        """Move the bar, ten times a second at most."""
        now = time.monotonic()
        if self._bar is None or now - self._shown < 0.1:
            return
        self._shown = now
        assert isinstance(pl_module, Task)
        loss, accuracy, count = pl_module.running()
        self._bar.update(
            self._bar.task_ids[0],
            completed=trainer.fit_loop.epoch_loop.batch_progress.current.processed,
            figures=self._figures(loss, accuracy, count / (now - self._begin)),
        )

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Replace the bar by the epoch's line."""
        self._stop()
        if trainer.is_global_zero:
            assert isinstance(pl_module, Task)
            row = pl_module.row
            width = len(str(self.epochs))
            say(
                f"epoch {row['epoch']:{width}}/{self.epochs}  "
                + self._figures(row["train_loss"], row["train_accuracy"], row["images_per_second"])
                + f"  validation: loss {row['val_loss']:.4f} accuracy {row['val_accuracy']:.2%}"
                + f"  {row['seconds']:.1f} s"
            )

    def on_exception(self, *_: Any) -> None:
        """Take the bar away, so that a message stands on its own line."""
        self._stop()

    def _figures(self, loss: float, accuracy: float, speed: float) -> str:
        return f"loss {loss:.4f}  accuracy {accuracy:.2%}  {speed:,.0f} {self.unit}/s"

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def silence() -> None:
    """Keep Lightning's hints and banners off the terminal; its errors still come."""
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for module in ("pytorch_lightning", "lightning_fabric"):
        warnings.filterwarnings("ignore", module=rf"{module}\b.*")


def _is_finite(row: dict[str, float], network: torch.nn.Module) -> bool:
    """Whether losses and weights are finite; without validation samples its loss is zero."""
    weights = (value for value in network.state_dict().values() if value.is_floating_point())
    return (
        math.isfinite(row["train_loss"])
        and math.isfinite(row["val_loss"])
        and all(bool(value.isfinite().all()) for value in weights)
    )


def _rank(row: dict[str, float]) -> tuple[float, float]:
    return row["val_accuracy"], -row["val_loss"]
