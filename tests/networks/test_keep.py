"""Where the networks drop, how many layers do, and that nothing drops the output."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from normdrop import networks
from normdrop.errors import UserError
from normdrop.nn import Dropout

_Make = Callable[..., torch.nn.Module]

# Each with the shape of a batch and the number of places where keep_hidden acts.
_NETWORKS: dict[str, tuple[_Make, tuple[int, ...], int]] = {
    "mlp": (lambda **o: networks.mlp((48, 32, 24, 10), **o), (4, 3, 4, 4), 2),
    "vgg11": (lambda **o: networks.vgg(11, 10, width=2, hidden=64, **o), (4, 3, 32, 32), 2),
    "resnet8": (lambda **o: networks.resnet(8, 10, width=8, **o), (4, 3, 8, 8), 1),
    "resnet18": (lambda **o: networks.resnet(18, 10, width=4, **o), (4, 3, 32, 32), 1),
    "wide_resnet16_1": (lambda **o: networks.wide_resnet(16, 1, 10, **o), (4, 3, 8, 8), 6),
}
_all = pytest.mark.parametrize("name", _NETWORKS)


def _keeps(network: torch.nn.Module) -> list[float]:
    return [round(1 - m.p, 6) for m in network.modules() if isinstance(m, Dropout)]


@_all
def test_without_keep_there_is_no_dropout(name: str) -> None:
    make, _, _ = _NETWORKS[name]
    kinds = torch.nn.modules.dropout._DropoutNd
    assert not any(isinstance(m, kinds) for m in make().modules())


@_all
def test_keep_input_is_one_layer_and_keep_hidden_those_of_the_docstring(name: str) -> None:
    make, _, places = _NETWORKS[name]
    assert _keeps(make(keep_input=0.8)) == [0.8]
    assert _keeps(make(keep_hidden=0.5)) == [0.5] * places
    assert sorted(_keeps(make(keep_input=0.8, keep_hidden=0.5))) == [0.5] * places + [0.8]


@_all
@pytest.mark.parametrize("norm", [True, False])
def test_the_output_is_never_dropped(name: str, norm: bool) -> None:
    """What the network gives is the output layer's own product, to the bit."""
    make, shape, _ = _NETWORKS[name]
    network: Any = make(keep_input=0.5, keep_hidden=0.5, norm=norm).train()
    assert isinstance(network.output, torch.nn.Linear)
    assert network.output.out_features == 10
    seen: list[tuple[Tensor, Tensor]] = []
    network.output.register_forward_hook(lambda module, x, y: seen.append((x[0], y)))
    y = network(torch.randn(shape))
    ((entered, left),) = seen
    assert y is left
    torch.testing.assert_close(
        y, entered @ network.output.weight.T + network.output.bias, rtol=1e-5, atol=1e-6
    )
    assert y.ne(0).all()


@_all
def test_keep_input_drops_input_values_before_the_first_layer(name: str) -> None:
    make, shape, _ = _NETWORKS[name]
    network = make(keep_input=0.8).train()
    first = next(m for m in network.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)))
    seen: list[Tensor] = []
    first.register_forward_pre_hook(lambda module, x: seen.append(x[0]))
    network(torch.ones(shape))
    kept = seen[0].ne(0).double().mean().item()
    assert abs(kept - 0.8) < 4 * math.sqrt(0.8 * 0.2 / seen[0].numel())
    torch.testing.assert_close(seen[0].max().item(), 1 / 0.8)
    network.eval()
    network(torch.ones(shape))
    assert seen[1].eq(1).all()


@_all
def test_keep_hidden_leaves_the_input_whole(name: str) -> None:
    make, shape, _ = _NETWORKS[name]
    network = make(keep_hidden=0.5).train()
    first = next(m for m in network.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)))
    seen: list[Tensor] = []
    first.register_forward_pre_hook(lambda module, x: seen.append(x[0]))
    x = torch.randn(shape)
    network(x)
    assert torch.equal(seen[0].flatten(), x.flatten())


def test_resnets_keep_hidden_acts_on_the_features_that_enter_the_output() -> None:
    network = networks.resnet(8, 10, width=64, keep_hidden=0.5).train()
    seen: list[Tensor] = []
    network.fc.register_forward_pre_hook(lambda module, x: seen.append(x[0]))
    network(torch.randn(8, 3, 8, 8))
    kept = seen[0].ne(0).double().mean().item()
    assert abs(kept - 0.5) < 4 * math.sqrt(0.25 / seen[0].numel())


def test_wide_resnets_dropout_is_between_the_two_convolutions_of_every_branch() -> None:
    network = networks.wide_resnet(16, 2, 10, keep_hidden=0.7)
    kinds = (torch.nn.Conv2d, Dropout)
    for block in (*network.layer1, *network.layer2, *network.layer3):
        order: list[str] = []
        names = {m: n for n, m in block.named_children() if isinstance(m, kinds)}
        names.pop(block.shortcut, None)
        for module in names:
            module.register_forward_pre_hook(
                lambda m, x, names=names, order=order: order.append(names[m])
            )
        block(torch.randn(2, block.conv1.in_channels, 8, 8))
        assert order == ["conv1", "drop", "conv2"]


def test_an_mlp_takes_one_keep_for_each_hidden_layer() -> None:
    assert _keeps(networks.mlp((9, 8, 7, 6), keep_hidden=(0.9, 0.5))) == [0.9, 0.5]


@pytest.mark.parametrize(
    ("widths", "keep"), [((9, 8, 7, 6), (0.9, 0.5, 0.5)), ((9, 6), 0.5), ((9, 6), (0.5,))]
)
def test_an_mlp_whose_output_would_be_dropped_is_refused(
    widths: tuple[int, ...], keep: float | tuple[float, ...]
) -> None:
    with pytest.raises(UserError, match="would drop the output"):
        networks.mlp(widths, keep_hidden=keep)


@_all
@pytest.mark.parametrize("option", ["keep_input", "keep_hidden"])
@pytest.mark.parametrize("keep", [0, 0.0, -0.1, 1.5, math.nan, math.inf, True, "0.5", None])
def test_a_keep_outside_0_1_is_refused(name: str, option: str, keep: object) -> None:
    with torch.device("meta"), pytest.raises(UserError, match=rf"Expected `{option}` to be in \(0"):
        _NETWORKS[name][0](**{option: keep})


@_all
def test_masks_follow_the_seed(name: str) -> None:
    make, shape, _ = _NETWORKS[name]
    network, x = make(keep_input=0.5, keep_hidden=0.5).train(), torch.randn(shape)
    torch.manual_seed(1)
    y1 = network(x)
    y2 = network(x)
    torch.manual_seed(1)
    assert torch.equal(network(x), y1)
    assert not torch.equal(y1, y2)
