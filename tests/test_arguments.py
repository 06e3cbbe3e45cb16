"""What is no module, or no choice, is refused before anything is changed."""

import pytest
import torch

import normdrop
from normdrop.errors import UserError


def used(tool, model):
    if tool is normdrop.accumulate:
        with tool(model):
            pass
    else:
        tool(model)


TOOLS = (
    normdrop.convert,
    normdrop.plan,
    normdrop.revert,
    normdrop.fold,
    normdrop.fold_plan,
    normdrop.accumulate,
)


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.__name__)
@pytest.mark.parametrize(
    ("model", "got"),
    [
        (None, "None"),
        ([torch.nn.ReLU()], "an object of type list"),
        (torch.nn.ReLU().state_dict(), "an object of type OrderedDict"),
        (torch.nn.ReLU, "the class ReLU itself; make an instance of it"),
    ],
)
def test_what_is_no_module_is_named(tool, model, got):
    message = f"{tool.__name__}: expected `model` to be a torch.nn.Module but got {got}"
    with pytest.raises(TypeError) as error:
        used(tool, model)
    assert str(error.value) == message


@pytest.mark.parametrize("name", ["layout", "linear", "memory"])
def test_convert_changes_nothing_where_a_word_is_wrong(name):
    model = torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(4, 2)
    )
    words = {"layout": "channels_last", "linear": "auto", "memory": "low", name: "bad"}
    with pytest.raises(UserError, match=f"Expected `{name}` to be .* but got 'bad'"):
        normdrop.convert(model, **words)
    assert model[0].weight.is_contiguous()
    assert type(model[1]) is torch.nn.BatchNorm2d
    assert type(model[3]) is torch.nn.Linear
    assert not model._forward_hooks


@pytest.mark.parametrize("fuse", ["no", None, 1])
def test_convert_takes_no_word_for_fuse(fuse):
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(4), torch.nn.ReLU())
    with pytest.raises(TypeError, match=f"expected `fuse` to be True or False but got {fuse!r}"):
        normdrop.convert(model, fuse=fuse)
    assert type(model[0]) is torch.nn.BatchNorm2d


@pytest.mark.parametrize("example", ["image", [], {"x": 3}])
def test_fold_says_what_an_example_is(example):
    with pytest.raises(TypeError, match="expected `example` to be a tensor"):
        normdrop.fold(torch.nn.Conv2d(2, 4, 3).eval(), example)


def test_fold_warns_in_training_mode():
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3), torch.nn.BatchNorm2d(4))
    with pytest.warns(UserWarning, match=r"call model\.eval\(\) first"):
        normdrop.fold(model)


def test_accumulate_says_what_a_lazy_layer_needs():
    message = r"layer '\(model\)' to have its parameters.*call the model on one batch first"
    with pytest.raises(TypeError, match=message), normdrop.accumulate(torch.nn.LazyBatchNorm2d()):
        pass
