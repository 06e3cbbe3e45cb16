"""plan says what convert would do, and changes nothing."""

import torch

import normdrop


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
