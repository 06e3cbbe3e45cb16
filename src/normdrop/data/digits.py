"""The handwritten digits that ship with scikit-learn: 1797 grey images of 8×8 pixels."""

from __future__ import annotations

from typing import Any

import numpy as np

from normdrop.data.module import DataModule, InMemory, Samples

__all__ = ["Digits"]


class Digits(DataModule):
    """Optical recognition of handwritten digits (Alpaydin & Kaynak 1998), embedded: no download.

    1797 images (1, 8, 8) of ten classes; a stratified share is held out for the test by the seed.

    Args:
        options: see :class:`normdrop.data.DataModule`.

    Example:
        >>> data = Digits(seed=1)
        >>> data.setup()
        >>> data.input_shape, len(data.classes), data.sizes
        ((1, 8, 8), 10, {'train': 1294, 'val': 144, 'test': 359})
    """

    name = "digits"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)

    def _read(self) -> Samples:
        from sklearn.datasets import load_digits

        digits = load_digits()
        # Ink runs from 0 to 16; 255/16 keeps the order of all 17 values in uint8.
        pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None]
        return Samples(
            store=InMemory(pixels),
            labels=digits.target.astype(np.int64),
            classes=tuple(str(name) for name in digits.target_names),
            names=[f"digits[{i}]" for i in range(len(pixels))],
        )

    def _encoding(self) -> dict[str, Any]:
        return {"channels": 1, "size": [8, 8]}
