"""What holds for every network: sizes, norm and input_norm, initial weights, small images."""

import copy
import math
import pickle
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

from normdrop import networks, nn
from normdrop.errors import UserError

_BatchNorm = torch.nn.modules.batchnorm._BatchNorm
_Make = Callable[..., Any]

_NETWORKS: dict[str, tuple[_Make, tuple[int, ...]]] = {
    "mlp": (lambda **o: networks.mlp((48, 32, 24, 10), **o), (4, 3, 4, 4)),
    "vgg11": (lambda **o: networks.vgg(11, 10, width=2, hidden=8, **o), (4, 3, 32, 32)),
    "resnet8": (lambda **o: networks.resnet(8, 10, width=4, **o), (4, 3, 8, 8)),
    "resnet18": (lambda **o: networks.resnet(18, 10, width=4, **o), (4, 3, 32, 32)),
    "wide_resnet10_1": (lambda **o: networks.wide_resnet(10, 1, 10, **o), (4, 3, 8, 8)),
}
_all = pytest.mark.parametrize("name", _NETWORKS)


def _size(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        # torchvision's weights: documented with each.
        ("resnet18", {}, 11_689_512),
        ("resnet34", {}, 21_797_672),
        ("resnet50", {}, 25_557_032),
        ("resnet101", {}, 44_549_160),
        ("resnet152", {}, 60_192_808),
        ("vgg11", {"norm": False}, 132_863_336),
        ("vgg13", {"norm": False}, 133_047_848),
        ("vgg16", {"norm": False}, 138_357_544),
        ("vgg19", {"norm": False}, 143_667_240),
        ("vgg16_bn", {}, 138_365_992),
    ],
)
def test_sizes_are_the_published_ones(name: str, options: dict[str, Any], size: int) -> None:
    with torch.device("meta"):
        network = networks.build(name, classes=1000, input_shape=(3, 224, 224), **options)
    assert _size(network) == size


@pytest.mark.parametrize(
    ("name", "millions", "digits"),
    [
        # He et al. 2015, table 6.
        ("resnet20", 0.27, 2),
        ("resnet32", 0.46, 2),
        ("resnet44", 0.66, 2),
        ("resnet56", 0.85, 2),
        ("resnet110", 1.7, 1),
        # Zagoruyko and Komodakis 2016, tables 4 and 5.
        ("wide_resnet40_4", 8.9, 1),
        ("wide_resnet16_8", 11.0, 1),
        ("wide_resnet28_10", 36.5, 1),
    ],
)
def test_sizes_for_small_images_are_the_papers(name: str, millions: float, digits: int) -> None:
    with torch.device("meta"):
        network = networks.build(name, classes=10, input_shape=(3, 32, 32))
    assert round(_size(network) / 1e6, digits) == millions


@_all
def test_every_network_gives_one_row_of_logits_a_sample(name: str) -> None:
    make, shape = _NETWORKS[name]
    network = make()
    assert network(torch.randn(shape)).shape == (4, 10)
    assert network.eval()(torch.randn(1, *shape[1:])).shape == (1, 10)


@_all
def test_without_norm_there_is_no_batch_norm_and_every_layer_has_its_bias(name: str) -> None:
    make, shape = _NETWORKS[name]
    network = make(norm=False)
    assert not any(isinstance(module, _BatchNorm) for module in network.modules())
    assert not list(network.buffers())
    for module in network.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            assert module.bias is not None
    y = network(torch.randn(shape))
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@_all
def test_with_norm_the_layers_are_ours_and_no_bias_but_vggs_stands_before_one(name: str) -> None:
    make, _ = _NETWORKS[name]
    modules = list(make().modules())
    norms = [m for m in modules if isinstance(m, _BatchNorm)]
    assert norms
    assert all(type(m) in (nn.BatchNorm1d, nn.BatchNorm2d) for m in norms)
    before = [m for m, norm in pairwise(modules) if isinstance(norm, _BatchNorm)]
    layers = [m for m in before if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    assert layers
    assert {m.bias is not None for m in layers} == {name.startswith("vgg")}


@_all
@pytest.mark.parametrize("norm", [True, False])
def test_input_norm_normalizes_the_input_and_adds_nothing_else(name: str, norm: bool) -> None:
    make, shape = _NETWORKS[name]
    network, without = make(norm=norm, input_norm=True), make(norm=norm)
    added = {key.split(".")[0] for key in set(network.state_dict()) - set(without.state_dict())}
    assert added == {"input_norm"}
    seen: list[torch.Tensor] = []
    network.input_norm.register_forward_hook(lambda module, x, y: seen.append(y))
    network(torch.randn(shape) * 50 + 100)
    dims = [dim for dim in range(seen[0].dim()) if dim != 1]
    mean, std = seen[0].mean(dims), seen[0].std(dims, correction=0)
    torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-4, rtol=0)
    torch.testing.assert_close(std, torch.ones_like(std), atol=1e-4, rtol=0)


@_all
def test_first_dropout_comes_after_input_norm(name: str) -> None:
    """A dropped pixel is its channel's mean then."""
    make, shape = _NETWORKS[name]
    network = make(keep_input=0.5, input_norm=True)
    first = next(m for m in network.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)))
    seen: list[torch.Tensor] = []
    first.register_forward_pre_hook(lambda module, x: seen.append(x[0]))
    network(torch.rand(shape) + 5)
    assert 0.3 < seen[0].eq(0).double().mean() < 0.7


@pytest.mark.parametrize("depth", [8, 50])
@pytest.mark.parametrize("norm", [True, False])
def test_zero_init_last_makes_every_block_its_shortcut(depth: int, norm: bool) -> None:
    network: Any = networks.resnet(depth, 10, width=2, zero_init_last=True, norm=norm)
    blocks = [m for m in network.modules() if hasattr(m, "zero_last")]
    assert len(blocks) == {8: 3, 50: 16}[depth]
    for block in blocks:
        x = torch.randn(2, block.conv1.in_channels, 8, 8)
        shortcut = x if block.downsample is None else block.downsample(x)
        torch.testing.assert_close(block(x), shortcut.relu())
    last = blocks[-1].bn3 if depth == 50 else blocks[-1].bn2
    zero = last.weight if norm else (blocks[-1].conv3 if depth == 50 else blocks[-1].conv2).weight
    network(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert zero.grad.abs().sum() > 0


def test_zero_init_last_of_a_wide_resnet_makes_every_block_its_shortcut_and_can_learn() -> None:
    network: Any = networks.wide_resnet(16, 1, 10, zero_init_last=True)
    for stage in (network.layer1, network.layer2, network.layer3):
        for block in stage:
            x = torch.randn(2, block.conv1.in_channels, 8, 8)
            expected = x if block.shortcut is None else block.shortcut(block.bn1(x).relu())
            torch.testing.assert_close(block(x), expected)
    network(torch.randn(4, 3, 8, 8)).square().sum().backward()
    for stage in (network.layer1, network.layer2, network.layer3):
        assert all(block.conv2.weight.grad.abs().sum() > 0 for block in stage)


@_all
def test_weights_begin_by_hes_rule_and_the_first_loss_is_that_of_a_guess(name: str) -> None:
    make, shape = _NETWORKS[name]
    network = make()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d) and module.weight.numel() > 1000:
            fan = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            torch.testing.assert_close(
                module.weight.std().item(), math.sqrt(2 / fan), rtol=0.1, atol=0
            )
        if isinstance(module, torch.nn.Linear):
            expected = math.sqrt(2 / module.in_features)
            expected = 0.01 if module is network.output else expected
            torch.testing.assert_close(module.weight.std().item(), expected, rtol=0.25, atol=0)
        if getattr(module, "bias", None) is not None:
            assert module.bias.eq(0).all()
        if isinstance(module, _BatchNorm):
            assert module.weight.eq(1).all()
            assert module.bias.eq(0).all()
    loss = torch.nn.functional.cross_entropy(network(torch.randn(shape)), torch.arange(4))
    assert abs(loss.item() - math.log(10)) < 0.3


@pytest.mark.parametrize(
    ("make", "least"),
    [
        (lambda: networks.vgg(11, 10, width=2, hidden=8), 32),
        (lambda: networks.resnet(18, 10, width=2), 17),
        (lambda: networks.resnet(18, 10, width=2, stem="small"), 5),
        (lambda: networks.resnet(8, 10, width=2), 3),
        (lambda: networks.resnet(8, 10, width=2, stem_stride=2), 5),
        (lambda: networks.wide_resnet(10, 1, 10), 3),
        (lambda: networks.wide_resnet(10, 1, 10, stem_stride=2), 5),
    ],
)
def test_images_below_the_least_size_are_refused_with_that_size(make: _Make, least: int) -> None:
    network = make()
    assert network.least_size == least
    assert network(torch.randn(2, 3, least, least)).shape == (2, 10)
    sizes = rf"at least {least}x{least} pixels but got {least}x{least - 1}"
    with pytest.raises(UserError, match=sizes):
        network(torch.randn(2, 3, least, least - 1))


def test_stem_stride_2_takes_a_quarter_of_the_pixels() -> None:
    network = networks.resnet(8, 10, stem_stride=2)
    seen: list[torch.Tensor] = []
    network.layer1.register_forward_hook(lambda module, x, y: seen.append(y))
    network(torch.randn(2, 3, 28, 28))
    assert seen[0].shape == (2, 16, 14, 14)


@_all
def test_copies_and_pickles_give_the_same_output(name: str) -> None:
    make, shape = _NETWORKS[name]
    network, x = make(keep_hidden=0.5).eval(), torch.randn(shape)
    y = network(x)
    assert torch.equal(copy.deepcopy(network)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(network))(x), y)


@_all
def test_channels_last_images_give_the_same_output(name: str) -> None:
    make, shape = _NETWORKS[name]
    network, x = make().double(), torch.randn(shape, dtype=torch.float64)
    other = copy.deepcopy(network).to(memory_format=torch.channels_last)
    y = other(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(y, network(x), rtol=1e-9, atol=1e-9)


@_all
def test_a_tool_may_write_an_output_of_its_own_to_every_module(name: str) -> None:
    """BackPACK keeps what each module gave, and deletes it again."""
    make, shape = _NETWORKS[name]
    network = make(keep_hidden=0.5)
    layer = network.output
    network.register_forward_hook(lambda module, x, y: setattr(module, "output", y))
    y = network(torch.randn(shape))
    assert network.output is y
    del network.output
    assert network.output is layer
    assert layer in network.modules()


@_all
@pytest.mark.parametrize("norm", [True, False])
def test_torch_fx_traces_every_network_with_its_check(name: str, norm: bool) -> None:
    make, shape = _NETWORKS[name]
    network = make(norm=norm, keep_input=0.9).eval()
    traced, x = torch.fx.symbolic_trace(network), torch.randn(shape)
    torch.testing.assert_close(traced(x), network(x))
    if name != "mlp":
        with pytest.raises(UserError, match="at least"):
            traced(torch.randn(2, 3, 2, 2))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: networks.resnet(21), "18, 34, 50, 101 or 152, or 6n"),
        (lambda: networks.resnet(2), "6n"),
        (lambda: networks.resnet(20, 0), "`classes` to be a whole number of at least 1 but got 0"),
        (lambda: networks.resnet(20, width=1.5), "`width` to be a whole number"),
        (lambda: networks.resnet(20, stem="tiny"), '`stem` to be "large" or "small"'),
        (lambda: networks.resnet(20, stem_stride=3), "`stem_stride` to be 1 or 2 but got 3"),
        (lambda: networks.resnet(18, stem_stride=2), 'is for stem="small"'),
        (lambda: networks.resnet(20, shortcut="none"), '"projection" or "pad"'),
        (lambda: networks.vgg(12), "11, 13, 16 or 19 but got 12"),
        (lambda: networks.vgg(11, hidden=0), "`hidden` to be a whole number"),
        (lambda: networks.wide_resnet(20), r"6n\+4 \(10, 16, 22, 28, 40, …\) but got 20"),
        (lambda: networks.wide_resnet(10, 0), "`widen` to be a whole number"),
        (lambda: networks.wide_resnet(10, 1, stem_stride=4), "`stem_stride` to be 1 or 2"),
        (lambda: networks.mlp((10,)), "such as"),
        (lambda: networks.mlp((10, 0, 3)), "`widths` to be a whole number"),
        (lambda: networks.mlp((10, 4, 4, 3), keep_hidden=(0.5,)), "each of the 2 hidden layers"),
    ],
)
def test_options_out_of_range_are_named(make: _Make, expected: str) -> None:
    with torch.device("meta"), pytest.raises(UserError, match=expected):
        make()
