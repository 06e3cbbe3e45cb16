"""What an option means that nobody gave."""

import pytest

from normdrop.runs.options import DataOptions, Options
from normdrop.training.recipes import COMMON, DATA, FAMILY, resolve, resolve_data


def test_recipes_name_options_only():
    names = Options().flat().keys()
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
