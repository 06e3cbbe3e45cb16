"""Every example runs, and does what its first line says."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name, *arguments):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](*arguments)


def test_train_by_hand():
    assert run("train_by_hand") >= 0.97


def test_shards_share_a_mask():
    assert run("shards_share_a_mask")


def test_lecture_dropout():
    training, test, torchs_training, torchs_test = run("lecture_dropout")
    assert training == pytest.approx(test, rel=2e-3)
    assert torchs_training == pytest.approx(torchs_test, rel=2e-3)
    assert torchs_test * 0.8 == pytest.approx(test)


def test_no_example_is_forgotten():
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {path.stem for path in EXAMPLES.glob("*.py")} <= tested
