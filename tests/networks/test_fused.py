"""The networks are written with torch's layers: what is fused, and what tools may do to them."""

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import prune
from torch.nn.utils.fusion import fuse_conv_bn_eval

import normdrop
from normdrop import networks, nn
from normdrop.nn.batch_norm import _BatchNorm
from normdrop.nn.conv2d import Conv2d
from normdrop.nn.linear import Linear
from normdrop.ops.conv2d import HAS_CONV2D
from normdrop.surgery.convolution import reason_to_keep

_Make = Callable[..., Any]
_RELU, _ADD_RELU, _NONE = (False, "relu", 1.0), (True, "relu", 1.0), (False, None, 1.0)

# With keep_hidden=0.75 and input_norm: what every batch normalization does, in the order of calls.
_NETWORKS: dict[str, tuple[_Make, tuple[int, ...], list[tuple[bool, str | None, float]]]] = {
    "mlp": (
        lambda **o: networks.mlp((48, 32, 24, 10), **o),
        (4, 3, 4, 4),
        [_NONE, *[(False, "relu", 0.75)] * 2],
    ),
    "vgg11": (
        lambda **o: networks.vgg(11, 10, width=2, hidden=8, **o),
        (4, 3, 32, 32),
        [_NONE, *[_RELU] * 8],
    ),
    "resnet8": (
        lambda **o: networks.resnet(8, 10, width=4, **o),
        (4, 3, 8, 8),
        [_NONE, _RELU, *[_RELU, _ADD_RELU] * 3],
    ),
    "resnet8, projection": (
        lambda **o: networks.resnet(8, 10, width=4, shortcut="projection", **o),
        (4, 3, 8, 8),
        [_NONE, _RELU, _RELU, _ADD_RELU, *[_RELU, _NONE, _ADD_RELU] * 2],
    ),
    "resnet50": (
        lambda **o: networks.resnet(50, 10, width=2, **o),
        (2, 3, 33, 33),
        [
            *[_NONE, _RELU],
            *[
                call
                for blocks in (3, 4, 6, 3)
                for call in [
                    _RELU,
                    _RELU,
                    _NONE,
                    _ADD_RELU,
                    *[_RELU, _RELU, _ADD_RELU] * (blocks - 1),
                ]
            ],
        ],
    ),
    "wide_resnet16_1": (
        lambda **o: networks.wide_resnet(16, 1, 10, **o),
        (4, 3, 8, 8),
        [_NONE, *[_RELU, (False, "relu", 0.75)] * 6, _RELU],
    ),
}
_all = pytest.mark.parametrize("name", _NETWORKS)
_TORCHS = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.Dropout, torch.nn.Linear)


def _with_values(network: torch.nn.Module) -> torch.nn.Module:
    """Statistics, γ and α that are not those of the beginning, which hide mistakes."""
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                for vector in (module.weight, module.bias, module.running_mean, module.running_var):
                    vector.uniform_(0.5, 1.5)
    return network


@_all
def test_each_norm_is_one_call_with_all_that_follows_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, shape, expected = _NETWORKS[name]
    calls = []
    normalize = _BatchNorm.normalize

    def spy(self: Any, x: Tensor, residual: Any, activation: Any, keep: float = 1.0) -> Tensor:
        calls.append((residual is not None, activation, keep))
        return normalize(self, x, residual, activation, keep)

    monkeypatch.setattr(_BatchNorm, "normalize", spy)
    network = make(keep_hidden=0.75, input_norm=True)
    network(torch.randn(shape))
    assert calls == expected
    network.eval()(torch.randn(shape))
    assert calls[len(expected) :] == [(*call[:2], 1.0) for call in expected]


@_all
def test_large_linear_layers_may_take_the_faster_library(name: str) -> None:
    make, _, _ = _NETWORKS[name]
    kinds = {type(m) for m in make().modules() if isinstance(m, torch.nn.Linear)}
    assert kinds == {Linear if name.startswith(("mlp", "vgg")) else torch.nn.Linear}


@_all
def test_a_shortcut_without_parameters_gives_a_gradient_in_its_inputs_layout(name: str) -> None:
    make, _, _ = _NETWORKS[name]
    for pad in (m for m in make().modules() if type(m).__name__ == "Pad"):
        x = torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last).requires_grad_()
        y = pad(x * 1)
        assert y.grad_fn.name() == "_PaddedPartBackward"


@_all
def test_revert_gives_the_network_as_it_is_written(name: str) -> None:
    make, shape, _ = _NETWORKS[name]
    network = _with_values(make(keep_input=0.9, keep_hidden=0.75, input_norm=True)).double()
    reverted = normdrop.revert(copy.deepcopy(network))
    for module in reverted.modules():
        assert not isinstance(module, _TORCHS) or type(module) in _TORCHS
        assert "forward" not in vars(module)
    assert list(reverted.state_dict()) == list(network.state_dict())
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(reverted.eval()(x), network.eval()(x), rtol=1e-9, atol=1e-9)
    converted = normdrop.convert(reverted)
    torch.testing.assert_close(converted(x), network(x), rtol=1e-12, atol=1e-12)


@_all
def test_synchronized_layers_in_the_place_of_ours_give_the_same(name: str) -> None:
    make, shape, _ = _NETWORKS[name]
    network = _with_values(make(input_norm=True)).double().eval()
    x = torch.randn(shape, dtype=torch.float64)
    y = network(x)
    exchanged = torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)
    assert not any(isinstance(m, _BatchNorm) for m in exchanged.modules())
    torch.testing.assert_close(exchanged(x), y, rtol=1e-9, atol=1e-9)


@_all
def test_torchs_fusion_of_a_convolution_and_its_norm_gives_the_same(name: str) -> None:
    make, shape, _ = _NETWORKS[name]
    network = _with_values(make()).double().eval()
    x = torch.randn(shape, dtype=torch.float64)
    y = network(x)
    fused = 0
    for block in list(network.modules()):
        children = list(block.named_children())
        for (first, convolution), (second, norm) in pairwise(children):
            # In a pre-activation block the norm before the ReLU is not the convolution's.
            if isinstance(norm, nn.BatchNorm2d) and isinstance(convolution, torch.nn.Conv2d):
                setattr(block, first, fuse_conv_bn_eval(convolution, norm))
                setattr(block, second, torch.nn.Identity())
                fused += 1
    assert fused or name == "mlp"
    torch.testing.assert_close(network(x), y, rtol=1e-9, atol=1e-9)


@_all
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_every_relu_can_be_watched_and_changed_by_hooks(name: str, training: bool) -> None:
    make, shape, _ = _NETWORKS[name]
    network = _with_values(make()).double().train(training)
    plain = normdrop.revert(copy.deepcopy(network))
    results = []
    for model in (network, plain):
        seen: list[Tensor] = []
        for module in model.modules():
            if isinstance(module, torch.nn.ReLU):
                module.register_forward_hook(lambda m, x, y, seen=seen: seen.append(y))
                # Guided backpropagation.
                module.register_full_backward_hook(lambda m, gx, gy: (gx[0].clamp(min=0),))
        x = torch.linspace(-2, 2, 3 * shape[-1] ** 2 * shape[0], dtype=torch.float64)
        x = x.sin().mul(3).view(shape).requires_grad_()
        model(x).sum().backward()
        results.append((x.grad, *seen))
    assert len(results[0]) == 1 + sum(isinstance(m, torch.nn.ReLU) for m in network.modules())
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-9)


@_all
def test_another_activation_in_the_place_of_relu_acts(name: str) -> None:
    make, shape, _ = _NETWORKS[name]
    network = _with_values(make(keep_hidden=0.75)).double()
    plain = normdrop.revert(copy.deepcopy(network))
    x, results = torch.randn(shape, dtype=torch.float64), []
    before = network.eval()(x)
    for model in (network, plain):
        for block in list(model.modules()):
            for key, child in list(block.named_children()):
                if isinstance(child, torch.nn.ReLU):
                    setattr(block, key, torch.nn.GELU())
        results.append(model.eval()(x))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(results[0], before, rtol=1e-3)


@_all
def test_pruned_weights_act_and_are_made_permanent(name: str) -> None:
    make, shape, _ = _NETWORKS[name]
    # torch.nn.utils.prune takes contiguous weights alone.
    options = {} if name == "mlp" else {"layout": "keep"}
    network = _with_values(make(**options)).double().eval()
    kinds = (torch.nn.Conv2d, torch.nn.Linear)
    x = torch.randn(shape, dtype=torch.float64)
    whole = network(x)
    for module in network.modules():
        if isinstance(module, kinds):
            prune.l1_unstructured(module, "weight", amount=0.5)
    y = network(x)
    assert not torch.allclose(y, whole, rtol=1e-3)
    for module in network.modules():
        if isinstance(module, kinds):
            prune.remove(module, "weight")
    assert torch.equal(network(x), y)


@_all
def test_memory_and_layout_are_the_constructors_and_nothing_else_is(name: str) -> None:
    make, shape, _ = _NETWORKS[name]
    torch.manual_seed(3)
    network = make(keep_hidden=0.75).double()
    torch.manual_seed(3)
    low = make(keep_hidden=0.75, memory="low").double()
    x, results = torch.randn(shape, dtype=torch.float64), []
    for model in (network, low):
        torch.manual_seed(5)
        y = model(x)
        y.sum().backward()
        results.append((y, [p.grad for p in model.parameters()]))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert low._forward_pre_hooks
    assert not network._forward_pre_hooks
    if name != "mlp":
        strides = [m.weight.stride() for m in make(layout="keep").modules() if hasattr(m, "groups")]
        assert all(stride[1] >= stride[3] for stride in strides)
        laid = make(layout="channels_last")
        for module in laid.modules():
            if isinstance(module, torch.nn.Conv2d):
                assert module.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.skipif(not HAS_CONV2D, reason="no kernels for this processor")
@pytest.mark.parametrize("name", [name for name in _NETWORKS if name != "mlp"])
def test_convolutions_are_torchs_unless_the_constructor_chooses(name: str) -> None:
    make, _, _ = _NETWORKS[name]
    for option, expected in (({}, False), ({"convolution": "auto"}, True)):
        found = [
            type(layer) is Conv2d
            for layer in make(**option).modules()
            if isinstance(layer, torch.nn.Conv2d) and reason_to_keep(layer) is None
        ]
        assert found
        assert set(found) == {expected}
