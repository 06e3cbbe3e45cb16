"""A data module as Lightning's Trainer takes it; the only file of this room that imports it."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl

from normdrop.data.module import DataModule

__all__ = ["LightningData"]


class LightningData(pl.LightningDataModule):
    """Gives a Trainer the batches of a data module.

    Args:
        data: as :func:`normdrop.data.load` makes it.
    """

    def __init__(self, data: DataModule) -> None:
        super().__init__()
        self.data = data

    def setup(self, stage: str | None = None) -> None:
        """Read and split the data."""
        self.data.setup()

    def train_dataloader(self) -> Any:
        """Shuffled, augmented batches of the training samples."""
        return self.data.train_dataloader()

    def val_dataloader(self) -> Any:
        """Batches of the validation samples; an empty list where there are none."""
        return self.data.val_dataloader()

    def test_dataloader(self) -> Any:
        """Batches of the test samples."""
        return self.data.test_dataloader()

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and augmentation of the epoch that the training loaders give next."""
        self.data.set_epoch(epoch)
