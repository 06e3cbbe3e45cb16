import numpy as np
import pytest

from normdrop.data.augment import NAMES, Augmentation, augmentation_names
from normdrop.data.batches import Batch
from normdrop.errors import UserError

SHAPES = [
    (1, 1, 8, 8),  # one sample
    (17, 3, 16, 16),  # a prime count
    (5, 1, 13, 7),  # odd and not square
    (4, 2, 32, 48),
]


def batch_of(count, first=0, total=None, epoch=0, number=0):
    return Batch(epoch, number, np.arange(count), first, count if total is None else total)


def images_of(shape):
    return np.random.default_rng(0).integers(1, 256, shape).astype(np.uint8)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_augment_is_a_pure_function_of_seed_epoch_and_batch(name, shape):
    images = images_of(shape)
    before = images.copy()
    change = Augmentation([name], seed=3)
    once = change(images, batch_of(shape[0], epoch=2, number=5))
    assert once.shape == shape
    assert once.dtype == np.uint8
    assert (images == before).all()
    np.random.seed(1)  # noqa: NPY002 - the global generator must not matter.
    assert (change(images, batch_of(shape[0], epoch=2, number=5)) == once).all()
    if shape[0] == 17:
        assert (change(images, batch_of(17, epoch=3, number=5)) != once).any()
        assert (change(images, batch_of(17, epoch=2, number=6)) != once).any()
        assert (Augmentation([name], seed=4)(images, batch_of(17, epoch=2, number=5)) != once).any()


@pytest.mark.parametrize("shape", SHAPES)
def test_augmented_shards_together_are_the_augmented_batch(shape):
    images = images_of(shape)
    change = Augmentation(NAMES, seed=0)
    whole = change(images, batch_of(shape[0]))
    cut = shape[0] // 2
    shards = [
        change(images[:cut], batch_of(cut, 0, shape[0])),
        change(images[cut:], batch_of(shape[0] - cut, cut, shape[0])),
    ]
    assert (np.concatenate(shards) == whole).all()


@pytest.mark.parametrize(("name", "pad"), [("shift", 1), ("crop", 2)])
def test_crop_gives_windows_of_the_padded_image(name, pad):
    images = images_of((40, 2, 16, 16))
    changed = Augmentation([name], seed=0)(images, batch_of(40))
    padded = np.pad(images, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    seen = set()
    for image, whole in zip(changed, padded, strict=True):
        places = [
            (y, x)
            for y in range(2 * pad + 1)
            for x in range(2 * pad + 1)
            if (whole[:, y : y + 16, x : x + 16] == image).all()
        ]
        assert places
        seen.update(places)
    assert len(seen) > pad * 4


def test_flip_mirrors_about_half_of_the_images():
    images = images_of((400, 1, 4, 6))
    changed = Augmentation(["flip"], seed=0)(images, batch_of(400))
    mirrored = (changed == images[..., ::-1]).all((1, 2, 3))
    same = (changed == images).all((1, 2, 3))
    assert (mirrored ^ same).all()
    assert 160 < mirrored.sum() < 240


def test_cutout_blanks_at_most_a_quarter():
    images = images_of((200, 3, 16, 16))
    changed = Augmentation(["cutout"], seed=0)(images, batch_of(200))
    blank = changed == 0
    assert (changed[~blank] == images[~blank]).all()
    assert (blank.all(1) == blank.any(1)).all()  # The same square in every channel.
    counts = blank[:, 0].sum((1, 2))
    assert counts.max() == 64
    assert counts.min() >= 16


def test_erase_changes_a_rectangle_in_about_half_of_the_images():
    images = np.zeros((400, 1, 20, 20), np.uint8)
    changed = Augmentation(["erase"], seed=0)(images, batch_of(400)) > 0
    hit = changed.any((1, 2, 3))
    assert 160 < hit.sum() < 240
    for image in changed[hit, 0]:
        rows, columns = np.flatnonzero(image.any(1)), np.flatnonzero(image.any(0))
        box = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
        assert box <= 0.45 * 400
        assert image.sum() > 0.8 * box  # Noise is zero once in 256.


def test_one_kind_draws_the_same_with_and_without_another():
    images = images_of((9, 1, 16, 16))
    flipped = Augmentation(["flip"], seed=0)(images, batch_of(9))
    both = Augmentation(["flip", "cutout"], seed=0)(images, batch_of(9))
    kept = both != 0
    assert (both[kept] == flipped[kept]).all()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, ("crop",)),
        (True, ("crop", "flip")),
        (False, ()),
        ("erase, crop", ("crop", "erase")),
        (["flip"], ("flip",)),
        ("", ()),
        ("none", ()),
    ],
)
def test_augment_option(given, expected):
    assert augmentation_names(given, ("crop",)) == expected


def test_unknown_augmentation_suggests_the_nearest():
    with pytest.raises(UserError, match="but got 'flop'; did you mean 'flip'"):
        augmentation_names("crop,flop", ())
