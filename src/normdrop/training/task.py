"""One step of training: the loss, the learning rate, the moving average, and repeatable dropout."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.nn import functional

from normdrop.runs.options import RecipeOptions

__all__ = ["Task", "learning_rate", "step_seed"]


def learning_rate(progress: float, highest: float, warmup: float) -> float:
    """The learning rate at a share of the training: it rises linearly, then falls as a cosine.

    With progress t and warm-up w: highest · t/w for t < w, then
    highest · (1 + cos(π (t − w) / (1 − w))) / 2.

    Args:
        progress: share of the training that is done, in [0, 1].
        highest: the learning rate at the end of the warm-up.
        warmup: share of the training in which the rate rises, in [0, 1).

    Example:
        >>> [round(learning_rate(t, 0.1, 0.2), 3) for t in (0.0, 0.1, 0.2, 0.6, 1.0)]
        [0.0, 0.05, 0.1, 0.05, 0.0]

    Reference:
        Loshchilov and Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, 2017.
    """
    progress = min(max(progress, 0.0), 1.0)
    if progress < warmup:
        return highest * progress / warmup
    return highest * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) / 2


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """A seed for torch's generator that is a function of the run's seed, the step and the rank.

    Dropout so draws the same masks in a run that was stopped and resumed as in one that was not.
    The numbers are mixed since torch's generator takes the low 32 bits alone. Step −1 stands for
    what comes before the first step.

    Example:
        >>> step_seed(0, 1) != step_seed(0, 2)
        True
    """
    mixed = np.random.SeedSequence(seed, spawn_key=(step + 1, rank))
    return int(mixed.generate_state(1, np.uint64)[0] >> 1)


class Task(pl.LightningModule):
    """Classification by cross-entropy, with the recipe's optimizer and schedule.

    Args:
        network: maps (N, …) inputs to (N, classes) scores.
        recipe: a recipe without gaps; see :func:`normdrop.training.recipes.resolve`.
        seed: of the run.
        limit: seconds after which the training stops; the learning rate is zero by then.
        threads: of every process; None leaves them as they are.
    """

    def __init__(
        self,
        network: torch.nn.Module,
        recipe: RecipeOptions,
        *,
        seed: int = 0,
        limit: float | None = None,
        threads: int | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.recipe = recipe
        self.seed = seed
        self.limit = limit
        self.threads = threads
        self.row: dict[str, float] = {}
        self.averaged: dict[str, Tensor] = {}
        self.seconds_before = 0.0
        self._begin = 0.0
        self._epoch_begin = 0.0
        self._train_seconds = 0.0
        self._sums = {split: torch.zeros(3, dtype=torch.float64) for split in ("train", "val")}
        if recipe.average:
            self.averaged = {name: value.clone() for name, value in self._moving()}

    def forward(self, x: Tensor) -> Tensor:
        """The scores (N, classes) of inputs (N, …)."""
        return cast(Tensor, self.network(x))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with Nesterov momentum; vectors (γ, α and biases) are not decayed."""
        decayed = [p for p in self.network.parameters() if p.requires_grad and p.ndim > 1]
        others = [p for p in self.network.parameters() if p.requires_grad and p.ndim <= 1]
        momentum = cast(float, self.recipe.momentum)
        return torch.optim.SGD(
            [
                {"params": decayed, "weight_decay": cast(float, self.recipe.weight_decay)},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=cast(float, self.recipe.learning_rate),
            momentum=momentum,
            nesterov=momentum > 0,
            # One pass over a weight instead of four; see docs/training-step.md.
            fused=all(p.device.type in ("cpu", "cuda") for p in decayed),
        )

    @property
    def elapsed(self) -> float:
        """Seconds of training, those before a resume included."""
        return self.seconds_before + (time.monotonic() - self._begin if self._begin else 0.0)

    def progress(self, batch: int) -> float:
        """Share of the training that is done in the middle of a step: by steps, or by the time."""
        epochs = cast(int, self.recipe.epochs)
        batches = int(self.trainer.num_training_batches)
        share: float = (self.current_epoch + (batch + 0.5) / batches) / epochs
        if self.limit is not None:
            elapsed = torch.tensor(self.elapsed, dtype=torch.float64)
            elapsed = self.trainer.strategy.broadcast(elapsed)
            share = max(share, float(elapsed) / self.limit)
        return share

    def setup(self, stage: str) -> None:
        """Set the threads, in every process."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)

    def on_train_start(self) -> None:
        """Start the clock, and bring the average to where the weights are."""
        self._begin = time.monotonic()
        self.averaged = {name: value.to(self.device) for name, value in self.averaged.items()}

    def on_train_epoch_start(self) -> None:
        """Start the epoch's sums, and tell the data which epoch it is."""
        self._epoch_begin = time.monotonic()
        self._sums["train"].zero_()
        self.trainer.datamodule.set_epoch(self.current_epoch)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Set the step's seed and learning rate, both functions of the step alone."""
        # torch.manual_seed takes 6 ms, and keeps stack traces for devices that are not there.
        seed = step_seed(self.seed, self.global_step, self.global_rank)
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        progress = self.progress(batch_idx)
        if self.limit is not None and progress >= 1:
            self.trainer.should_stop = True
        rate = learning_rate(
            progress, cast(float, self.recipe.learning_rate), cast(float, self.recipe.warmup)
        )
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = rate

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The smoothed cross-entropy of a batch."""
        x, labels = batch
        scores = self(x)
        loss = functional.cross_entropy(
            scores, labels, label_smoothing=cast(float, self.recipe.label_smoothing)
        )
        self._count("train", loss.detach(), scores.detach(), labels)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Move the average of the weights."""
        self._train_seconds = time.monotonic() - self._epoch_begin
        # Lightning's WeightAveraging also averages counters, and its average begins as a copy of
        # the weights after the first step.
        if self.averaged:
            # A young average forgets faster, or it would keep the initial weights for long.
            young = (1 + self.global_step) / (10 + self.global_step)
            decay = min(cast(float, self.recipe.average), young)
            with torch.no_grad():
                moving = dict(self._moving())
                averaged = [self.averaged[name] for name in moving]
                torch._foreach_lerp_(averaged, list(moving.values()), 1 - decay)

    def on_validation_epoch_start(self) -> None:
        """Evaluate the averaged weights, if there are any."""
        self._sums["val"].zero_()
        self._swap_average()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count a batch of the validation split; the loss is the plain cross-entropy."""
        x, labels = batch
        scores = self(x)
        self._count("val", functional.cross_entropy(scores, labels), scores, labels)

    def on_validation_epoch_end(self) -> None:
        """Make the epoch's row of metrics.csv, over all processes."""
        self._swap_average()
        sums = {
            split: self.trainer.strategy.reduce(value.to(self.device), reduce_op="sum").tolist()
            for split, value in self._sums.items()
        }
        self.row = {
            "epoch": self.current_epoch + 1,
            "step": self.global_step,
            "learning_rate": self.trainer.optimizers[0].param_groups[0]["lr"],
        }
        for split, (loss, correct, count) in sums.items():
            self.row[f"{split}_loss"] = loss / max(count, 1)
            self.row[f"{split}_accuracy"] = correct / max(count, 1)
        self.row["seconds"] = time.monotonic() - self._epoch_begin
        self.row["images_per_second"] = sums["train"][2] / max(self._train_seconds, 1e-9)

    def running(self, split: str = "train") -> tuple[float, float, int]:
        """Loss, accuracy and count of this epoch so far, on this process."""
        loss, correct, count = self._sums[split].tolist()
        return loss / max(count, 1), correct / max(count, 1), int(count)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the average and the time that went by."""
        checkpoint["averaged"] = self.averaged
        checkpoint["elapsed"] = self.elapsed

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take back the average and the time that went by."""
        self.averaged = dict(checkpoint["averaged"])
        self.seconds_before = checkpoint["elapsed"]

    def _count(self, split: str, loss: Tensor, scores: Tensor, labels: Tensor) -> None:
        correct = (scores.argmax(1) == labels).sum()
        count = len(labels)
        self._sums[split] += torch.tensor(
            [float(loss) * count, float(correct), count], dtype=torch.float64
        )

    def _moving(self) -> Iterator[tuple[str, Tensor]]:
        for name, value in self.network.state_dict().items():
            if value.is_floating_point():
                yield name, value.detach()

    @torch.no_grad()
    def _swap_average(self) -> None:
        if self.averaged:
            for name, value in self._moving():
                kept = value.clone()
                value.copy_(self.averaged[name])
                self.averaged[name].copy_(kept)
