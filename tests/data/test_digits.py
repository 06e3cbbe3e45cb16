import numpy as np
from sklearn.datasets import load_digits

from normdrop.data import load


def test_digits_are_scikit_learns_within_rounding():
    data = load("digits")
    data.setup()
    assert data.kind == "image"
    assert data.input_shape == (1, 8, 8)
    assert data.classes == tuple("0123456789")
    assert data.augmentation == ()
    original = load_digits()
    for (x, y), split in ((next(iter(data.test_dataloader())), "test"),):
        for place, name in enumerate(data.names(split, range(len(y)))):
            where = int(name.removeprefix("digits[").removesuffix("]"))
            assert int(y[place]) == original.target[where]
            assert np.abs(x[place, 0].numpy() * 16 - original.images[where]).max() < 0.04


def test_digits_hold_out_a_stratified_fifth():
    data = load("digits", seed=11)
    data.setup()
    assert data.sizes == {"train": 1294, "val": 144, "test": 359}
    labels = np.concatenate([y.numpy() for _, y in data.test_dataloader()])
    whole = np.bincount(load_digits().target) * 0.2
    assert np.abs(np.bincount(labels) - whole).max() <= 1
