"""Small runs that several tests look at."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from normdrop.runs.options import Options
from normdrop.training.fit import train

# A network and a split small enough for a run of about a second.
SMALL = {
    "data": "digits",
    "test": 0.5,
    "validation": 0.2,
    "model": "resnet8",
    "width": 4,
    "epochs": 3,
    "batch_size": 64,
    "keep_hidden": 0.8,
    "keep_input": 0.95,
    "report": False,
    "threads": 1,
}


@pytest.fixture
def small(tmp_path: Path) -> Callable[..., Options]:
    """Give the options of a small run in the test's own folder."""

    def options(**changes: object) -> Options:
        return Options.from_flat({**SMALL, "runs_dir": str(tmp_path / "runs"), **changes})

    return options


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[float], Path]:
    """Give a finished run with a certain average of the weights; each is trained once."""

    @functools.cache
    def run(average: float) -> Path:
        folder = tmp_path_factory.mktemp("whole")
        return train(Options.from_flat({**SMALL, "runs_dir": str(folder), "average": average}))

    return run


@pytest.fixture
def finished_run(whole_run: Callable[[float], Path]) -> Path:
    """A finished run on the digits; tests that change it copy it first."""
    return whole_run(0.0)
