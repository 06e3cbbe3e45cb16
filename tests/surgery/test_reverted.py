"""with reverted(model): torch's own classes for a while, then all is as it was."""

import copy
import pickle

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.optimization import fuse

import normdrop
from normdrop import networks
from normdrop.graph.forward import FusedForward
from normdrop.memory.low import is_saving_memory
from normdrop.nn.batch_norm import _BatchNorm
from normdrop.surgery.plan import CLASSES


class Net(torch.nn.Module):
    """Enough to be fused, laid out, given oneDNN's products and less memory."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = torch.nn.BatchNorm2d(8)
        self.relu = torch.nn.ReLU()
        self.pool = torch.nn.MaxPool2d(2)
        self.conv2 = torch.nn.Conv2d(8, 8, 1, stride=2)
        self.bn2 = torch.nn.BatchNorm2d(8)
        self.drop = torch.nn.Dropout(0.3)
        self.fc = torch.nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.bn1(self.conv1(x))))
        x = self.drop(self.relu(self.bn2(self.conv2(x))))
        return self.fc(x.mean((2, 3)))


def nothing(module: torch.nn.Module, *given: object) -> None:
    """A hook of the user's."""


def full() -> Net:
    """With hooks of the user's before those of memory="low" and behind them."""
    model = Net()
    model.register_forward_hook(nothing)
    model.pool.register_forward_hook(nothing)
    normdrop.convert(model, layout="channels_last", linear="auto", memory="low")
    model.register_forward_hook(nothing)
    return model


def everything(model: torch.nn.Module) -> list[object]:
    """All that a module is: class, attributes, hooks in their order, strides."""
    return [
        (
            module,
            type(module),
            {k: v for k, v in vars(module).items() if not k.startswith("_")},
            list(module._forward_pre_hooks.items()),
            list(module._forward_hooks.items()),
            list(module._forward_hooks_always_called.items()),
            [(p, p.stride()) for p in module._parameters.values() if p is not None],
            list(module._modules.items()),
        )
        for module in model.modules()
    ]


def outcome(model: torch.nn.Module) -> list[Tensor]:
    torch.manual_seed(1)
    y = model(torch.linspace(-3, 3, 16 * 3 * 24 * 24).sin().view(16, 3, 24, 24))
    return [y, *torch.autograd.grad(y.square().sum(), list(model.parameters()))]


def is_torchs(model: torch.nn.Module) -> bool:
    return all(
        type(module).__module__.startswith("torch.")
        and not hasattr(module, "nonfinite")
        and not hasattr(module, "scaling")
        for module in model.children()
    )


@pytest.fixture
def fused_calls(monkeypatch):
    """For every call of batch normalization in fused code, with what."""
    calls = []
    normalize = _BatchNorm.normalize

    def spy(self, x, residual, activation, *keep):
        calls.append((residual is not None, activation))
        return normalize(self, x, residual, activation, *keep)

    monkeypatch.setattr(_BatchNorm, "normalize", spy)
    return calls


def test_inside_all_is_torchs_and_behind_it_all_is_as_before(fused_calls):
    model = full()
    before, first = everything(model), outcome(copy.deepcopy(model))
    assert fused_calls == [(False, "relu")] * 2
    fused_calls.clear()
    with normdrop.reverted(model) as inside:
        assert inside is model
        assert is_torchs(model)
        assert "forward" not in vars(model)
        assert not is_saving_memory(model)
        assert list(model.pool._forward_hooks.values()) == [nothing]
        copy.deepcopy(model)(torch.randn(16, 3, 24, 24))
        assert fused_calls == []
    assert everything(model) == before
    assert is_saving_memory(model)
    torch.testing.assert_close(outcome(model), first, rtol=0, atol=0)
    assert fused_calls == [(False, "relu")] * 2


@pytest.mark.parametrize("theirs", CLASSES, ids=lambda c: c.__name__)
def test_every_class_comes_back_with_its_attributes(theirs):
    layer = theirs(3) if "Norm" in theirs.__name__ else theirs(0.25, True)
    model = normdrop.convert(torch.nn.Sequential(layer))
    attributes = dict(vars(layer))
    with normdrop.reverted(model):
        assert type(layer) is theirs
        assert not {"activation", "nonfinite", "scaling"} & vars(layer).keys()
    assert type(layer) is CLASSES[theirs]
    assert vars(layer) == attributes


def test_after_an_exception_all_is_as_before():
    model = full()
    before = everything(model)
    with pytest.raises(KeyError, match="in the tool"), normdrop.reverted(model):
        raise KeyError("in the tool")
    assert everything(model) == before


def test_nested_in_itself_and_around_a_part():
    model = torch.nn.Sequential(full(), full())
    before = everything(model)
    with normdrop.reverted(model[0]):
        assert is_torchs(model[0])
        assert not is_torchs(model[1])
        with normdrop.reverted(model):
            assert is_torchs(model[0])
            assert is_torchs(model[1])
            with normdrop.reverted(model):
                assert is_torchs(model[0])
            assert is_torchs(model[1])
        assert is_torchs(model[0])
        assert not is_torchs(model[1])
    assert everything(model) == before


def test_flags_hooks_and_parameters_of_meanwhile_stay():
    model = full()
    calls: list[str] = []
    early = model.register_forward_hook(lambda *_: calls.append("early"))
    model.register_forward_hook(lambda *_: calls.append("kept"))
    with normdrop.reverted(model):
        early.remove()
        model.register_forward_hook(lambda *_: calls.append("meanwhile"))
        model.bn1.eval()
        model.drop.p = 0.5
        with torch.no_grad():
            model.bn2.weight.fill_(2.0)
    assert model.training
    assert not model.bn1.training
    assert model.drop.keep == 0.5
    assert model.bn2.weight.eq(2).all()
    tracked = model.bn1.num_batches_tracked.item()
    outcome(model)
    assert model.bn1.num_batches_tracked == tracked
    assert calls == ["kept", "meanwhile"]


def test_what_was_put_in_or_exchanged_meanwhile_acts_and_stays():
    model = normdrop.convert(Net()).double().eval()
    old = model.bn1
    with normdrop.reverted(model):
        model.relu = torch.nn.GELU()
        model.bn1 = torch.nn.BatchNorm2d(8).double().eval()
        model.bn1.running_mean.fill_(0.5)
        model.more = torch.nn.BatchNorm1d(4)
        x = torch.randn(2, 3, 24, 24, dtype=torch.float64)
        inside = model(x)
    assert type(model.bn1) is torch.nn.BatchNorm2d
    assert type(model.more) is torch.nn.BatchNorm1d
    assert type(old) is normdrop.nn.BatchNorm2d
    torch.testing.assert_close(model(x), inside, rtol=1e-10, atol=1e-10)


def test_a_layer_that_got_another_class_or_a_qconfig_stays_so():
    model = normdrop.convert(Net())
    with normdrop.reverted(model):
        torch.nn.utils.parametrizations.weight_norm(model.bn1)
        model.bn2.qconfig = "somebody's"
    assert type(model.bn1).__name__ == "ParametrizedBatchNorm2d"
    assert type(model.bn2) is torch.nn.BatchNorm2d
    assert type(model.drop) is normdrop.nn.Dropout


def test_a_forward_that_was_put_on_an_instance_meanwhile_stays():
    model = normdrop.convert(Net())
    with normdrop.reverted(model):
        model.forward = lambda x: x.sum()
    assert model(torch.ones(2)) == 2


def test_copies_made_inside_are_torchs_and_stay_so():
    model = full()
    with normdrop.reverted(model):
        twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    for twin in (*twins, traced):
        assert is_torchs(twin)
        assert not twin._forward_pre_hooks


@pytest.mark.parametrize(
    ("layer", "what"),
    [
        (normdrop.nn.BatchNorm2d(8, activation="relu"), "activation='relu'"),
        (normdrop.nn.BatchNorm2d(8, nonfinite="skip"), "nonfinite='skip'"),
        (normdrop.nn.Dropout(0.5, scaling="test"), "scaling='test'"),
    ],
    ids=["activation", "nonfinite", "scaling"],
)
def test_what_torch_cannot_do_is_refused_before_anything_changes(layer, what):
    model = full()
    model.more = layer
    before = everything(model)
    with (
        pytest.raises(ValueError, match=f"reverted: expected layers .* got more with {what}"),
        normdrop.reverted(model),
    ):
        pytest.fail("it must not be entered")
    assert everything(model) == before


def test_no_module_is_refused():
    with pytest.raises(TypeError, match="reverted: expected `model`"), normdrop.reverted([]):
        pytest.fail("it must not be entered")


def test_torchs_fx_fusion_finds_our_networks_inside():
    network = networks.resnet(8, 10, input_norm=True, keep_hidden=0.5).eval()
    x = torch.randn(2, 3, 16, 16)
    y = network(x)
    with normdrop.reverted(network):
        fused = fuse(network)
    norms = [m for m in fused.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(norms) == 1  # that of the input, which follows no convolution
    torch.testing.assert_close(fused(x), y, rtol=1e-4, atol=1e-4)
    assert any(isinstance(vars(m).get("forward"), FusedForward) for m in network.modules())
    torch.testing.assert_close(network(x), y, rtol=0, atol=0)


def test_a_folded_model_comes_back_too():
    folded = normdrop.fold(networks.resnet(8, 10).eval())
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        y = folded(x)
        with normdrop.reverted(folded):
            assert not any("forward" in vars(module) for module in folded.modules())
            torch.testing.assert_close(folded(x), y, rtol=1e-4, atol=1e-5)
        assert any("forward" in vars(module) for module in folded.modules())
        torch.testing.assert_close(folded(x), y, rtol=0, atol=0)
