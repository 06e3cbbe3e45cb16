"""plan says what convert would do, and changes nothing."""

import pytest
import torch

import normdrop
from normdrop.errors import UserError


def test_a_plan_is_a_table_and_changes_nothing():
    model = torch.nn.Sequential(
        torch.nn.BatchNorm1d(3), torch.nn.Tanh(), torch.nn.Dropout(), torch.nn.SyncBatchNorm(3)
    )
    before = [(type(m), dict(vars(m))) for m in model.modules()]
    table = normdrop.plan(model)
    assert [(type(m), dict(vars(m))) for m in model.modules()] == before
    assert str(table).splitlines() == [
        "layer  class          action   why",
        "0      BatchNorm1d    replace  not fused: Tanh follows",
        "2      Dropout        replace",
        "3      SyncBatchNorm  leave    its statistics are those of all processes",
        "2 replace, 1 leave",
    ]
    assert len(table) == 3
    assert table.count("leave") == 1
    assert repr(table) == str(table)


def test_a_model_without_such_layers_has_an_empty_plan():
    assert str(normdrop.plan(torch.nn.Linear(2, 2))) == "no batch normalization, no dropout"


def test_layers_of_a_quantization_aware_module_are_left():
    qat = torch.nn.Module()
    inner = torch.nn.BatchNorm2d(3)
    qat.__class__ = type("ConvBn2d", (torch.nn.Module,), {"__module__": "torch.ao.nn.intrinsic"})
    qat.bn = inner
    model = torch.nn.Sequential(qat)
    normdrop.convert(model)
    assert type(inner) is torch.nn.BatchNorm2d
    assert "quantization" in next(iter(normdrop.plan(model))).why


def test_a_plan_counts_what_the_other_options_change():
    def model() -> torch.nn.Sequential:
        return torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 4, 1),
            torch.nn.Flatten(), torch.nn.Linear(4, 2),
        )  # fmt: skip

    options = {"layout": "channels_last", "linear": "auto", "memory": "low"}
    theirs = model()
    table = normdrop.plan(theirs, **options)
    assert theirs[0].weight.is_contiguous()
    assert type(theirs[4]) is torch.nn.Linear
    assert table.notes == (
        "layout: 2 convolution weights in channels_last",
        "linear: 1 linear layer may take oneDNN's products",
        "memory: outputs of batch normalization are worked out again in backward",
    )
    assert str(table).endswith("\n".join(table.notes))
    ours = normdrop.convert(model(), **options)
    for convolution in (ours[0], ours[2]):
        assert convolution.weight.is_contiguous(memory_format=torch.channels_last)
    assert type(ours[4]) is not torch.nn.Linear
    assert normdrop.plan(theirs).notes == ()


@pytest.mark.parametrize("name", ["layout", "linear", "memory"])
def test_a_plan_refuses_another_word(name):
    with pytest.raises(UserError, match=f"Expected `{name}` to be"):
        normdrop.plan(torch.nn.ReLU(), **{name: "lots"})


def test_a_fuse_that_is_no_flag_is_refused():
    with pytest.raises(TypeError, match="plan: expected `fuse` to be True or False but got 'no'"):
        normdrop.plan(torch.nn.BatchNorm1d(2), fuse="no")


def test_memory_is_noted_where_there_is_batch_normalization():
    note = "memory: outputs of batch normalization are worked out again in backward"
    assert note in str(normdrop.plan(torch.nn.BatchNorm1d(2), memory="low"))
    assert note not in str(normdrop.plan(torch.nn.Linear(2, 2), memory="low"))
