"""Options and times."""

import dataclasses

import pytest

from normdrop.errors import UserError
from normdrop.flags import _helps
from normdrop.runs.options import (
    DataOptions,
    NetworkOptions,
    Options,
    RecipeOptions,
    RunOptions,
    seconds,
)

GROUPS = (DataOptions, NetworkOptions, RecipeOptions, RunOptions)


@pytest.mark.parametrize("group", GROUPS)
def test_every_option_has_help(group):
    assert list(_helps(group)) == [field.name for field in dataclasses.fields(group)]


def test_no_two_groups_share_a_name():
    names = [field.name for group in GROUPS for field in dataclasses.fields(group)]
    assert len(names) == len(set(names))


def test_options_come_back_from_their_flat_form():
    options = Options.from_flat({"data": "x.csv", "epochs": 3, "keep_hidden": [0.5, 0.8]})
    assert Options.from_flat(options.flat()) == options


def test_an_unknown_option_is_named():
    with pytest.raises(UserError, match="Unknown option 'epoch' of a run"):
        Options.from_flat({"epoch": 3})


@pytest.mark.parametrize(
    ("text", "length"),
    [("90", 90), ("90s", 90), ("20m", 1200), ("20min", 1200), ("1h30m", 5400), ("1.5h", 5400),
     ("0:45", 45), ("1:00:00", 3600), ("1h1m1s", 3661)],
)  # fmt: skip
def test_times(text, length):
    assert seconds(text) == length


@pytest.mark.parametrize("text", ["", "0", "m", "1d", "-3", "1.2.3s", "nan", "0m"])
def test_what_is_no_time(text):
    with pytest.raises(UserError, match="Expected max_time such as 90s"):
        seconds(text)


def test_validation_and_test_leave_samples_to_train_on():
    DataOptions(validation=0.25, test=0.5).check()
    with pytest.raises(UserError, match="leave samples to train on, but they sum to 1; make"):
        DataOptions(validation=0.25, test=0.75).check()
