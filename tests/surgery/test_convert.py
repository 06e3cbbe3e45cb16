"""convert gives torch's layers our classes and leaves all else as it is; revert undoes it."""

import copy
import io
import pickle

import pytest
import torch

import normdrop
from normdrop.surgery.classes import CLASSES


class Named(torch.nn.BatchNorm2d):
    """A subclass that does more, as timm's BatchNormAct2d.

    convert_sync_batchnorm drops what it does: https://github.com/pytorch/pytorch/issues/187298
    """

    def forward(self, input):
        return torch.tanh(super().forward(input))


def small() -> torch.nn.Sequential:
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, padding=1, bias=False),
        torch.nn.BatchNorm2d(4, eps=1e-3, momentum=0.2),
        torch.nn.ReLU(),
        torch.nn.Dropout2d(0.3),
        torch.nn.Flatten(),
        torch.nn.Linear(4 * 25, 6),
        torch.nn.BatchNorm1d(6, affine=False, momentum=None),
        torch.nn.Dropout(0.2, inplace=True),
    )


@pytest.mark.parametrize("theirs", CLASSES, ids=lambda c: c.__name__)
def test_every_class_is_replaced_in_place_and_given_back(theirs):
    layer = theirs(3) if "Norm" in theirs.__name__ else theirs(0.25, True)
    model = torch.nn.Sequential(layer).eval()
    attributes = dict(vars(layer))
    assert normdrop.convert(model) is model
    assert model[0] is layer
    assert type(layer) is CLASSES[theirs]
    assert not layer.training
    repr(model)
    normdrop.revert(model)
    assert type(layer) is theirs
    assert vars(layer) == attributes


def test_parameters_buffers_flags_and_optimizers_stay():
    model = small()
    model[1].weight.requires_grad_(False)
    model[6].eval()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    before = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    keys = list(model.state_dict())
    normdrop.convert(model)
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert list(model.state_dict()) == keys
    assert not model[1].weight.requires_grad
    assert model[1].eps == 1e-3
    assert model[1].momentum == 0.2
    assert model[6].momentum is None
    assert not model[6].training
    assert model[7].p == 0.2
    assert model[7].keep == 0.8
    assert model[7].inplace
    old = model[1].bias.detach().clone()
    model(torch.randn(4, 3, 5, 5)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model[1].bias, old)


def test_a_checkpoint_of_the_original_loads_and_theirs_takes_ours():
    original, other = small(), small()
    converted = normdrop.convert(copy.deepcopy(original))
    converted.load_state_dict(other.state_dict())
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(converted.eval()(x), other.eval()(x))
    original.load_state_dict(converted.state_dict())


def test_a_shared_layer_stays_shared():
    """torch's convert_sync_batchnorm leaves the second reference as it was."""
    layer = torch.nn.BatchNorm2d(3)
    model = torch.nn.ModuleDict({"a": layer, "b": torch.nn.Sequential(layer)})
    normdrop.convert(model)
    assert model["a"] is model["b"][0]
    assert type(model["a"]) is normdrop.nn.BatchNorm2d
    (row,) = normdrop.plan(model)
    assert row.path == "a"
    assert row.why == "also at b.0"


def test_hooks_fire_as_before():
    """torch's convert_sync_batchnorm drops them."""
    model, calls = small(), []
    model[1].register_forward_hook(lambda m, x, y: calls.append("forward"))
    model[1].register_forward_pre_hook(lambda m, x: calls.append("before"))
    model[3].register_full_backward_hook(lambda m, gx, gy: calls.append("backward"))
    normdrop.convert(model)
    model(torch.randn(4, 3, 5, 5)).sum().backward()
    assert calls == ["before", "forward", "backward"]


def test_the_model_itself_may_be_the_layer():
    layer = torch.nn.BatchNorm1d(3)
    assert normdrop.convert(layer) is layer
    assert type(layer) is normdrop.nn.BatchNorm1d
    assert str(normdrop.plan(layer)).splitlines()[1].startswith("(model)")


def _patched() -> torch.nn.Module:
    layer = torch.nn.BatchNorm2d(3)
    layer.forward = lambda x: x
    return layer


def _parametrized() -> torch.nn.Module:
    layer = torch.nn.BatchNorm2d(3)
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", torch.nn.Softplus())
    return layer


def _quantized() -> torch.nn.Module:
    layer = torch.nn.BatchNorm2d(3)
    layer.qconfig = object()
    return layer


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: torch.nn.SyncBatchNorm(3), "all processes"),
        (lambda: Named(3), "subclass"),
        (torch.nn.LazyBatchNorm2d, "lazy"),
        (_patched, "forward was replaced"),
        (_parametrized, "parametrized"),
        (_quantized, "quantization"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_what_is_left_is_named(make, reason):
    layer = make()
    model = torch.nn.Sequential(layer)
    kind = type(layer)
    normdrop.convert(model)
    assert type(layer) is kind
    (row,) = normdrop.plan(model)
    assert row.action == "leave"
    assert reason in row.why


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_scripted_layers_are_left_and_named():
    model = torch.nn.Sequential(torch.jit.script(small().eval()), torch.nn.BatchNorm2d(3))
    normdrop.convert(model)
    plan = normdrop.plan(model)
    assert plan.count("leave") == 4
    assert {row.why for row in plan if row.action == "leave"} == {"it is compiled by torch.jit"}
    assert type(model[1]) is normdrop.nn.BatchNorm2d


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_model_keeps_its_buffers_in_float32_and_trains(dtype):
    original = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU()
    ).to(dtype)
    converted = normdrop.convert(copy.deepcopy(original))
    before = dict(converted.named_buffers())
    x = torch.randn(16, 3, 10, 10, dtype=dtype)
    for model in (original, converted):
        model(x).sum().backward()
    assert all(buffer is before[name] for name, buffer in converted.named_buffers())
    assert converted[1].running_mean.dtype is converted[1].running_var.dtype is torch.float32
    options = {"rtol": 2e-2, "atol": 2e-2}
    exact = {"check_dtype": False, **options}
    torch.testing.assert_close(converted.state_dict(), original.state_dict(), **exact)
    torch.testing.assert_close(converted.eval()(x), original.eval()(x), **options)


def test_sync_batch_norm_made_of_a_converted_model_takes_over():
    """convert_sync_batchnorm puts other layers in place, which the fused code must not miss."""
    original = small().eval()
    converted = normdrop.convert(copy.deepcopy(original))
    x = torch.randn(4, 3, 5, 5)
    converted(x)
    torch.nn.SyncBatchNorm.convert_sync_batchnorm(converted)
    assert type(converted[1]) is torch.nn.SyncBatchNorm
    seen = []
    converted[1].register_forward_hook(lambda m, x, y: seen.append(m))
    torch.testing.assert_close(converted(x), original(x), rtol=1e-4, atol=1e-4)
    assert seen == [converted[1]]


def test_a_traced_model_is_converted_and_fused():
    original = torch.fx.symbolic_trace(small())
    assert normdrop.plan(original).count("fuse") == 1
    converted = normdrop.convert(copy.deepcopy(original))
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(converted.eval()(x), original.eval()(x), rtol=1e-4, atol=1e-4)


def test_layers_inside_a_wrapper_are_converted():
    original = small()
    wrapped = torch.optim.swa_utils.AveragedModel(original)
    normdrop.convert(wrapped)
    assert type(wrapped.module[1]) is normdrop.nn.BatchNorm2d
    assert type(original[1]) is torch.nn.BatchNorm2d  # the wrapper holds a copy


def test_a_converted_model_pickles_saves_and_copies():
    model = normdrop.convert(small())
    x = torch.randn(4, 3, 5, 5)
    expected = model.eval()(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ):
        torch.testing.assert_close(other(x), expected, rtol=0, atol=0)
        assert type(other[1]) is normdrop.nn.BatchNorm2d


def test_outputs_gradients_and_statistics_equal_the_originals():
    # Without dropout, from which the masks would differ.
    original = torch.nn.Sequential(*[m for m in small() if "Dropout" not in type(m).__name__])
    converted = normdrop.convert(copy.deepcopy(original))
    for training in (True, False):
        x = torch.randn(4, 3, 5, 5, requires_grad=True)
        y = original.train(training)(x)
        grads = torch.autograd.grad(y.square().sum(), [x, *original.parameters()])
        z = converted.train(training)(x)
        ours = torch.autograd.grad(z.square().sum(), [x, *converted.parameters()])
        torch.testing.assert_close(z, y, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours, grads, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(converted.state_dict(), original.state_dict())


def test_convert_twice_is_convert_once():
    model = normdrop.convert(normdrop.convert(small()))
    assert {row.action for row in normdrop.plan(model)} == {"already"}
    normdrop.revert(model)
    assert [type(m) for m in model] == [type(m) for m in small()]
    assert all(vars(a).keys() == vars(b).keys() for a, b in zip(model, small(), strict=True))


def test_revert_refuses_what_torch_has_not_and_changes_nothing():
    model = torch.nn.Sequential(
        normdrop.nn.BatchNorm2d(3), normdrop.nn.BatchNorm2d(3, activation="relu")
    )
    with pytest.raises(ValueError, match=r"got 1 with activation='relu'"):
        normdrop.revert(model)
    assert type(model[0]) is normdrop.nn.BatchNorm2d


def test_statistics_widened_in_inference_mode_train_later():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).bfloat16()
    with torch.inference_mode():
        normdrop.convert(model)
    assert model[1].running_mean.dtype is torch.float32
    normdrop.revert(model)
    model.float()(torch.randn(5, 3)).square().sum().backward()
