"""Options, recipes and times."""

import dataclasses

import pytest

from normdrop.errors import UserError
from normdrop.flags import _helps
from normdrop.training.options import (
    DataOptions,
    NetworkOptions,
    Options,
    RecipeOptions,
    RunOptions,
    seconds,
)
from normdrop.training.recipes import COMMON, DATA, FAMILY, resolve, resolve_data

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


def test_recipes_name_options_only():
    names = {field.name for group in GROUPS for field in dataclasses.fields(group)}
    for recipe in (COMMON, *FAMILY.values(), *DATA.values()):
        assert set(recipe) <= names


@pytest.mark.parametrize(
    ("name", "shape", "model"),
    [
        ("digits", (1, 8, 8), "resnet8"),
        ("fashion-mnist", (1, 28, 28), "resnet8"),
        ("cats", (3, 64, 64), "resnet8"),
        ("cats", (3, 224, 224), "resnet18"),
        ("iris", (4,), "mlp"),
    ],
)
def test_every_kind_of_data_has_a_network(name, shape, model):
    options = resolve(Options(), name=name, input_shape=shape)
    assert options.network.model == model
    # What stays open depends on the network alone.
    assert [k for k, v in options.flat().items() if v is None and k in COMMON] == []


def test_the_users_choice_comes_first():
    options = resolve(
        Options.from_flat({"epochs": 2, "keep_hidden": 0.3, "model": "vgg11"}),
        name="digits",
        input_shape=(1, 8, 8),
    )
    assert (options.recipe.epochs, options.network.keep_hidden) == (2, 0.3)


def test_another_network_takes_its_familys_recipe():
    for model in ("mlp", "mlp_64_64"):
        options = resolve(Options.from_flat({"model": model}), name="digits", input_shape=(1, 8, 8))
        assert options.recipe.weight_decay == FAMILY["mlp"]["weight_decay"]
        assert options.recipe.batch_size == COMMON["batch_size"]
    for model in ("vgg16", "vgg16_bn"):
        options = resolve(Options.from_flat({"model": model}), name="x", input_shape=(3, 32, 32))
        assert options.network.keep_hidden == FAMILY["vgg"]["keep_hidden"]
    wide = resolve(
        Options.from_flat({"model": "wide_resnet16_4"}), name="x", input_shape=(3, 32, 32)
    )
    assert wide.network.keep_hidden == FAMILY["wide_resnet"]["keep_hidden"]


def test_a_data_set_may_have_an_augmentation_of_its_own():
    assert resolve_data(DataOptions(), name="fashion-mnist").augment == "shift,flip"
    assert resolve_data(DataOptions(augment="none"), name="fashion-mnist").augment == "none"
    assert resolve_data(DataOptions(), name="cats").augment is None
