import json
import pickle

import numpy as np
import pytest
import torch

from normdrop.data import DataModule, load
from normdrop.data.module import InMemory, Samples
from normdrop.errors import UserError


class Made(DataModule):
    """A source out of given arrays."""

    name = "made"

    def __init__(self, labels, classes=("a", "b"), splits=None, pixels=None, **options):
        super().__init__(**options)
        labels = np.asarray(labels)
        if pixels is None:
            pixels = np.arange(len(labels) * 4, dtype=np.uint8).reshape(-1, 1, 2, 2)
        self.given = Samples(
            store=InMemory(pixels),
            labels=labels,
            classes=tuple(classes),
            names=[f"sample {i}" for i in range(len(labels))],
            splits=splits or {},
        )

    def _read(self):
        return self.given

    def _encoding(self):
        return {"channels": 1, "size": [2, 2]}


def test_module_splits_are_disjoint_and_complete():
    data = Made([0, 1] * 50, validation=0.25, test=0.2)
    data.setup()
    assert data.sizes == {"train": 60, "val": 20, "test": 20}
    names = [name for split, n in data.sizes.items() for name in data.names(split, range(n))]
    assert sorted(names) == sorted(f"sample {i}" for i in range(100))


def test_module_counts_the_classes_of_each_split():
    """A class that a split lacks counts zero, the last one too."""
    splits = {"train": np.arange(6), "val": np.array([6, 7]), "test": np.array([8])}
    data = Made([0, 1, 2, 0, 1, 2, 1, 1, 0], classes=("a", "b", "c"), splits=splits)
    assert data.class_counts() == {"train": [2, 2, 2], "val": [0, 2, 0], "test": [1, 0, 0]}
    json.dumps(data.class_counts())


def test_module_batches_pair_images_with_their_labels():
    labels = np.arange(200) % 2
    pixels = (np.arange(200) % 251).astype(np.uint8)[:, None, None, None] * np.ones(
        (1, 1, 2, 2), np.uint8
    )
    data = Made(labels, pixels=pixels, batch_size=32)
    data.setup()
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        for x, y in loader:
            assert x.dtype == torch.float32
            assert y.dtype == torch.int64
            assert x.shape[1:] == data.input_shape
            value = (x[:, 0, 0, 0] * 255).round().long()
            possible = torch.stack([value % 2, (value + 251) % 2])
            assert ((possible == y).any(0)).all()
            assert 0 <= x.min() <= x.max() <= 1


def test_module_pictures_are_the_samples_of_the_split():
    data = Made([0, 1] * 20, batch_size=64)
    data.setup()
    x, _ = next(iter(data.test_dataloader()))
    pictures = data.pictures("test", range(data.sizes["test"]))
    assert pictures[0].shape == (2, 2, 1)
    assert pictures[0].dtype == np.uint8
    assert torch.equal(x[3].permute(1, 2, 0), torch.from_numpy(pictures[3]) / 255)


def test_module_epochs_are_reproducible_and_differ():
    def epoch(number, seed=0):
        data = load("digits", seed=seed, augment="shift", batch_size=100)
        data.set_epoch(number)
        return torch.cat([x for x, _ in data.train_dataloader()])

    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = epoch(3)
    assert torch.equal(first, epoch(3))
    assert not torch.equal(first, epoch(4))
    assert not torch.equal(first, epoch(3, seed=1))
    assert torch.equal(before, torch.get_rng_state())


def test_module_set_epoch_reaches_loaders_made_before_and_after():
    data = load("digits")
    before = data.train_dataloader()
    data.set_epoch(5)
    after = data.train_dataloader()
    assert torch.equal(next(iter(before))[1], next(iter(after))[1])


@pytest.mark.parametrize("change", ["a label", "a pixel", "the classes", "the splits", "the order"])
def test_module_digest_notices(change):
    parts = {"train": np.arange(8), "val": np.arange(8, 10), "test": np.arange(10, 12)}
    pixels = np.arange(48, dtype=np.uint8).reshape(-1, 1, 2, 2)

    def digest(labels=(0, 1) * 6, **changes):
        data = Made(labels, **({"splits": parts, "pixels": pixels} | changes))
        data.setup()
        return data.digest

    assert digest() == digest()
    assert (
        digest()
        != {
            "a label": lambda: digest((1, 1, *(0, 1) * 5)),
            "a pixel": lambda: digest(pixels=pixels + np.uint8(1)),
            "the classes": lambda: digest(classes=("a", "c")),
            # The same positions, one after the other.
            "the splits": lambda: digest(
                splits=parts | {"train": np.arange(7), "val": np.arange(7, 10)}
            ),
            "the order": lambda: digest(splits=parts | {"train": np.arange(8)[::-1]}),
        }[change]()
    )


def test_module_setup_twice_reads_once():
    data = Made([0, 1] * 10)
    data.setup()
    digest = data.digest
    data._read = None
    data.setup()
    assert data.digest == digest


def test_module_digest_notices_data_labels_seed_and_split():
    pixels = np.zeros((40, 1, 2, 2), np.uint8)

    def digest(labels=(0, 1) * 20, pixels=pixels, **options):
        data = Made(labels, pixels=pixels, **options)
        data.setup()
        return data.digest

    changed = pixels.copy()
    changed[7, 0, 1, 1] = 1
    digests = [
        digest(),
        digest(pixels=changed),
        digest(labels=(1, 0) * 20),
        digest(seed=1),
        digest(validation=0.3),
        digest(classes=("a", "c")),
    ]
    assert len(set(digests)) == len(digests)
    assert digest() == digests[0]
    assert digest(batch_size=7) == digests[0]


def test_module_state_survives_json():
    data = Made([0, 1] * 10)
    assert json.loads(json.dumps(data.state())) == {
        "source": "made",
        "kind": "image",
        "classes": ["a", "b"],
        "input_shape": [1, 2, 2],
        "channels": 1,
        "size": [2, 2],
    }


def test_module_pickles_with_its_loaders():
    data = load("digits")
    x, y = next(iter(data.train_dataloader()))
    again = pickle.loads(pickle.dumps(data))
    x2, y2 = next(iter(again.train_dataloader()))
    assert torch.equal(x, x2)
    assert torch.equal(y, y2)


def test_module_without_validation_has_no_validation_loader():
    data = load("digits", validation=0)
    assert data.val_dataloader() == []
    assert data.sizes["val"] == 0


def test_module_with_one_class_is_an_error():
    with pytest.raises(UserError, match="made must have at least 2 classes, but got only 'a'"):
        Made([0, 0, 0], classes=["a"]).setup()


def test_module_with_a_class_too_small_to_split_is_an_error():
    with pytest.raises(UserError, match="class 'b' has only one sample left where the validation"):
        Made([0] * 20 + [1] * 2).setup()


@pytest.mark.parametrize("part", ["val", "test"])
def test_module_with_a_label_that_training_never_saw_is_an_error(part):
    splits = {"train": np.arange(8), part: np.arange(8, 12)}
    data = Made([0, 1] * 4 + [0, 1, 2, 2], classes=["a", "b", "c"], splits=splits)
    name = "validation" if part == "val" else part
    with pytest.raises(UserError, match=f"the {name} part of made has a class that.*: 'c'; add"):
        data.setup()


def test_module_with_an_empty_part_is_an_error():
    with pytest.raises(UserError, match="the test part of made has no samples left"):
        Made([0, 1] * 4, splits={"train": np.arange(8), "test": np.arange(0)}).setup()


def test_module_with_too_little_to_train_on_is_an_error():
    splits = {"train": np.arange(1), "test": np.arange(1, 2), "val": np.arange(1, 2)}
    data = Made([0, 0], splits=splits)
    with pytest.raises(UserError, match="training needs at least 2 samples, but made leaves 1"):
        data.train_dataloader()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, but got 0"),
        ({"seed": -1}, "seed must be at least 0, but got -1"),
        ({"test": 0}, "test must be a fraction between 0 and 1, but got 0"),
        ({"validation": 1.5}, "validation must be a fraction at least 0 and below 1"),
        ({"augment": "rotate"}, "augment must be none or name some of shift, crop"),
    ],
)
def test_module_options_are_checked_at_once(options, text):
    with pytest.raises(UserError, match=text):
        load("digits", **options)
