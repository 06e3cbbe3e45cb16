"""Modules that subclass torch's, so that checkpoints load; what they compute is in functional."""

from normdrop.nn.batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d
from normdrop.nn.dropout import (
    AlphaDropout,
    Dropout,
    Dropout1d,
    Dropout2d,
    Dropout3d,
    FeatureAlphaDropout,
)

__all__ = [
    "AlphaDropout",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "FeatureAlphaDropout",
]
