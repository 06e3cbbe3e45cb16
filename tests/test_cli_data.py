"""Data that cannot be used: one sentence, exit code 2, nothing written."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from normdrop import cli


def picture(path, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(str(path))).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def pictures(folder, classes=("cat", "dog"), count=12, size=(8, 8)):
    for name in classes:
        for number in range(count):
            picture(folder / name / f"{number}.png", size)
    return folder


def an_empty_class_folder(folder):
    (pictures(folder) / "bird").mkdir()


def one_class_only(folder):
    pictures(folder, classes=("cat",))


def a_damaged_image(folder):
    (pictures(folder) / "cat" / "3.png").write_bytes(b"no picture")


def a_test_label_never_seen(folder):
    pictures(folder / "train")
    pictures(folder / "test", classes=("cat", "dog", "bird"))


def an_empty_folder(folder):
    folder.mkdir()


def no_class_folders(folder):
    picture(folder / "1.png")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (an_empty_class_folder, ["bird"]),
        (one_class_only, ["class", "cat"]),
        (a_damaged_image, ["cat/3.png", "--skip-unreadable"]),
        (a_test_label_never_seen, ["training never saw", "bird"]),
        (an_empty_folder, []),
        (no_class_folders, []),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_images_that_cannot_be_used(make, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "pets")
    assert_refused(["train", "--data", "pets"], words, tmp_path, capsys)


def test_images_smaller_than_the_network_can_take(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "pets")
    assert_refused(["train", "--data", "pets", "--model", "vgg11"], ["8"], tmp_path, capsys)


@pytest.mark.parametrize(
    ("text", "arguments", "words"),
    [
        ("x,target\n1,a\n,b\n" * 9, [], ["missing", "x (9)", "--missing drop"]),
        ("x,target\n1,a\n2,b\n", ["--target", "kind"], ["'kind'", "target"]),
        ("x,target\n" + "1,a\n" * 30, [], ["class", "'a'"]),
        ("", [], ["table.csv"]),
        ("x,target\n", [], ["table.csv", "no rows"]),
    ],
    ids=["missing values", "missing target", "one class only", "empty", "no rows"],
)
def test_tables_that_cannot_be_used(text, arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "table.csv").write_text(text)
    assert_refused(["train", "--data", "table.csv", *arguments], words, tmp_path, capsys)


def test_a_network_for_images_takes_no_table(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "table.csv").write_text("x,target\n" + "1,a\n2,b\n" * 30)
    arguments = ["train", "--data", "table.csv", "--model", "resnet20"]
    assert_refused(arguments, ["resnet20 takes images", "mlp"], tmp_path, capsys)


def assert_refused(arguments, words, folder, capsys):
    assert cli.main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("normdrop: ")
    assert shown.err.count("\n") == 1, shown.err
    for word in words:
        assert word in shown.err
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(("holes", "said"), [(1, "1 row is"), (2, "2 rows are"), (0, None)])
def test_dropped_rows_are_counted_before_training(tmp_path, capsys, monkeypatch, holes, said):
    monkeypatch.chdir(tmp_path)
    rows = [f"{'' if i < holes else i % 7},{'ab'[i % 2]}" for i in range(40)]
    (tmp_path / "t.csv").write_text("\n".join(["x,y", *rows]))
    arguments = ["--missing", "drop", "--epochs", "1", "--no-report", "--threads", "1"]
    assert cli.main(["train", "--data", "t.csv", *arguments]) == 0
    shown = capsys.readouterr().out
    if said:
        assert f"{said} left out for missing values\n" in shown
    else:
        assert "left out" not in shown


def test_damaged_images_are_skipped_and_listed(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a_damaged_image(tmp_path / "pets")
    arguments = [
        "train", "--data", "pets", "--skip-unreadable", "--model", "resnet8", "--width", "4",
        "--stem-stride", "1", "--epochs", "1", "--batch-size", "8", "--no-report", "--threads", "1",
    ]  # fmt: skip
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "1 image could not be read and is left out:" in shown
    assert "cat/3.png" in shown
    ((name, reason),) = json.loads(Path("runs/pets-resnet8-1/run.json").read_text())["skipped"]
    assert name == str(tmp_path / "pets/cat/3.png")
    assert f"  {name} ({reason})" in shown
    assert cli.main(["evaluate", "runs/pets-resnet8-1", "--data", "pets/dog/.."]) == 2
    assert "3.png" in capsys.readouterr().err
