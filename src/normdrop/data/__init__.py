"""Data for training: one shape for every source, batches that are pure functions of a seed."""

from normdrop.data.encoder import Encoder, encoder
from normdrop.data.module import DataModule
from normdrop.data.sources import load

__all__ = ["DataModule", "Encoder", "encoder", "load"]
