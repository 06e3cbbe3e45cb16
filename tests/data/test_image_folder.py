import numpy as np
import pytest
import torch
from PIL import Image

from normdrop.data import load
from normdrop.errors import UserError


def test_folder_is_split_by_the_seed_class_by_class(image_folder):
    root = image_folder({"cat": 20, "dog": 30})
    data = load(root, seed=4, batch_size=8)
    data.setup()
    assert data.name == "pets"
    assert data.classes == ("cat", "dog")
    assert data.input_shape == (3, 16, 16)
    assert data.sizes == {"train": 36, "val": 4, "test": 10}
    assert data.augmentation == ("crop", "flip")
    names = data.names("test", range(10))
    assert sum("cat" in name for name in names) == 4
    x, y = next(iter(data.test_dataloader()))
    assert [data.classes[int(c)] in name for c, name in zip(y, names, strict=False)] == [True] * 8
    image = np.asarray(Image.open(names[2])) / 255
    assert np.abs(x[2].permute(1, 2, 0).numpy() - image).max() < 1e-6


@pytest.mark.parametrize(("own", "sizes"), [
    (("train", "test"), {"train": 18, "val": 2, "test": 10}),
    (("train", "test", "val"), {"train": 20, "val": 10, "test": 10}),
    (("training", "Testing", "validation"), {"train": 20, "val": 10, "test": 10}),
    (("train", "val"), {"train": 16, "val": 10, "test": 4}),
    (("train",), {"train": 14, "val": 2, "test": 4}),
])  # fmt: skip
def test_folder_keeps_its_own_parts_and_cuts_the_missing_ones_from_train(image_folder, own, sizes):
    counts = {f"{part}/{c}": 10 if "train" in part else 5 for part in own for c in ("cat", "dog")}
    data = load(image_folder(counts))
    data.setup()
    assert data.classes == ("cat", "dog")
    assert data.sizes == sizes
    if "test" in own:
        assert all("/test/" in name for name in data.names("test", range(sizes["test"])))


def test_folder_may_have_a_class_called_train(image_folder):
    data = load(image_folder({"train": 6, "bus": 6}))
    data.setup()
    assert data.classes == ("bus", "train")


def test_grey_set_stays_one_channel_and_is_not_flipped(image_folder):
    data = load(image_folder({"a": 5, "b": 5}, mode="L"))
    data.setup()
    assert data.input_shape == (1, 16, 16)
    assert data.augmentation == ("crop",)


def test_mixed_modes_and_sizes_become_one(image_folder):
    root = image_folder({"a": 5, "b": 5}, size=(40, 60))
    for i, mode in enumerate(["L", "RGBA", "P", "CMYK", "1", "LA"]):
        suffix = "jpg" if mode == "CMYK" else "png"
        Image.new(mode, (50 + i, 30 + 7 * i)).save(root / "a" / f"{mode}.{suffix}")
    Image.fromarray(np.zeros((99, 44), np.uint16)).save(root / "b" / "deep.png")
    data = load(root)
    data.setup()
    # The middle of the shorter sides is 40: the next smaller side of the list is 32.
    assert data.input_shape == (3, 32, 32)


def test_image_size_option(image_folder):
    root = image_folder({"a": 5, "b": 5}, size=(40, 60))
    for size, shape in [
        (24, (3, 24, 24)),
        ((20, 28), (3, 20, 28)),
        ("8x9", (3, 8, 9)),
        ("12", (3, 12, 12)),
        (None, (3, 40, 60)),
    ]:
        data = load(root, image_size=size)
        data.setup()
        assert data.input_shape == shape
    for wrong in (0, (3, 4, 5), (8, -1), "big", ""):
        with pytest.raises(UserError, match="image_size must be one or two numbers of at least 1"):
            load(root, image_size=wrong)


def test_large_images_of_one_size_become_a_square_that_a_network_can_take(image_folder):
    data = load(image_folder({"a": 4, "b": 4}, size=(300, 400)))
    data.setup()
    assert data.input_shape == (3, 224, 224)


def test_folder_beyond_the_memory_budget_gives_the_same_batches(image_folder):
    root = image_folder({"a": 12, "b": 9}, size=(20, 16))
    kept, lazy = load(root, batch_size=5), load(root, batch_size=5, memory_budget=0)
    for data in (kept, lazy):
        data.set_epoch(1)
    pairs = zip(kept.train_dataloader(), lazy.train_dataloader(), strict=True)
    for (x, y), (x2, y2) in pairs:
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)
    assert len(lazy.pictures("val", [0])) == 1


def test_image_that_vanishes_during_a_run_is_named(image_folder):
    root = image_folder({"a": 6, "b": 6})
    data = load(root, memory_budget=0)
    data.setup()
    (root / "a" / "3.png").unlink()
    loaders = [data.train_dataloader(), data.val_dataloader(), data.test_dataloader()]
    with pytest.raises(UserError, match=r"a/3\.png' cannot be read any more"):
        _ = [list(loader) for loader in loaders]


@pytest.mark.parametrize("memory_budget", [0, 2**20])
def test_unreadable_images_stop_the_run_or_are_skipped(image_folder, memory_budget):
    root = image_folder({"a": 12, "b": 12})
    for i in range(7):
        (root / "a" / f"broken{i}.jpg").write_bytes(b"no image")
    photo = root / "b" / "photo.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)).save(photo)
    photo.write_bytes(photo.read_bytes()[:-80])
    with pytest.raises(UserError) as caught:
        load(root, memory_budget=memory_budget).setup()
    text = str(caught.value)
    assert text.startswith("8 images cannot be read: ")
    assert text.count("broken") == 5
    assert "; and 3 more; repair or remove them, or go on without by --skip-unreadable" in text
    data = load(root, skip_unreadable=True, memory_budget=memory_budget)
    data.setup()
    assert len(data.skipped) == 8
    assert data.skipped[-1][0] == str(photo)
    assert "truncated" in data.skipped[-1][1]
    assert sum(data.sizes.values()) == 24


def test_one_unreadable_image_is_named_with_its_reason(image_folder):
    root = image_folder({"a": 3, "b": 3})
    (root / "a" / "x.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"^1 image cannot be read: .*a/x\.png \(it is no image"):
        load(root).setup()


def test_class_without_a_readable_image_is_an_error_even_when_skipping(image_folder):
    root = image_folder({"a": 4, "b": 4, "c": 4})
    for path in (root / "b").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="class 'b' has no readable image"):
        load(root, skip_unreadable=True).setup()


def test_part_without_a_readable_image_is_an_error_even_when_skipping(image_folder):
    root = image_folder({"train/a": 4, "train/b": 4, "test/a": 1})
    (root / "test" / "a" / "0.png").write_bytes(b"")
    with pytest.raises(UserError, match="the test part of pets has no samples left"):
        load(root, skip_unreadable=True).setup()


def test_files_that_are_no_images_are_left_alone(image_folder):
    root = image_folder({"a": 6, "b": 6})
    for name in (".DS_Store", "Thumbs.db", "notes.txt"):
        (root / name).write_bytes(b"x")
        (root / "a" / name).write_bytes(b"x")
    (root / ".git").mkdir()
    data = load(root)
    data.setup()
    assert data.classes == ("a", "b")
    assert data.skipped == []
    assert sum(data.sizes.values()) == 12


def test_images_may_lie_deeper_below_their_class(image_folder):
    data = load(image_folder({"a/2023": 4, "a/2024": 4, "b": 8}))
    data.setup()
    assert data.classes == ("a", "b")
    assert sum(data.sizes.values()) == 16


@pytest.mark.parametrize("junk", [False, True])
def test_empty_class_folder_is_an_error(image_folder, junk):
    root = image_folder({"a": 4, "b": 4})
    (root / "empty").mkdir()
    if junk:
        (root / "empty" / ".DS_Store").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"class folder .*empty holds no images; put images into it"
    ):
        load(root).setup()


def test_folder_with_one_class_is_an_error(image_folder):
    with pytest.raises(UserError, match="pets must have at least 2 classes, but got only 'a'"):
        load(image_folder({"a": 4})).setup()


def test_folder_with_loose_images_is_an_error(image_folder, tmp_path):
    with pytest.raises(UserError, match="one folder of images per class, but it holds 4 files"):
        load(image_folder({".": 4})).setup()
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="but it holds neither folders nor images"):
        load(tmp_path / "bare").setup()


def test_class_in_test_that_training_never_saw_is_an_error(image_folder):
    root = image_folder({"train/a": 4, "train/b": 4, "test/a": 2, "test/bird": 1})
    with pytest.raises(UserError, match=r"the test part of pets has a class that.*: 'bird'"):
        load(root).setup()


def test_class_with_too_few_images_to_split_is_an_error(image_folder):
    with pytest.raises(UserError, match="class 'b' has only one sample left"):
        load(image_folder({"a": 10, "b": 1})).setup()


def test_folder_digest_notices_a_changed_image_but_not_a_moved_folder(image_folder, tmp_path):
    root = image_folder({"a": 5, "b": 5})

    def digest(path, **options):
        data = load(path, **options)
        data.setup()
        return data.digest

    first = digest(root)
    lazy = digest(root, memory_budget=0)
    moved = root.rename(tmp_path / "moved")
    assert digest(moved) == first
    assert digest(moved, image_size=8) != first
    Image.new("RGB", (16, 16)).save(moved / "a" / "0.png")
    assert digest(moved) != first
    assert digest(moved, memory_budget=0) != lazy


def test_a_size_beyond_the_memory_is_refused(image_folder):
    with pytest.raises(UserError, match="at most 4096 pixels a side, but got '20000'"):
        load(image_folder({"a": 2, "b": 2}), image_size="20000")
