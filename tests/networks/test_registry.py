"""Networks by name: what the command line and loaded runs ask for."""

import math
from typing import Any

import pytest
import torch

from normdrop import networks
from normdrop.errors import UserError


def _build(name: str, shape: tuple[int, ...] = (3, 32, 32), **options: Any) -> Any:
    with torch.device("meta"):
        return networks.build(name, classes=7, input_shape=shape, **options)


@pytest.mark.parametrize("name", networks.available())
def test_every_available_name_builds_a_network_for_its_classes(name: str) -> None:
    assert _build(name).output.out_features == 7


@pytest.mark.parametrize("name", ["resnet26", "wide_resnet10_1", "mlp_16", "mlp_1024_1024_2048"])
def test_other_members_of_a_family_build_too(name: str) -> None:
    assert _build(name).output.out_features == 7


def test_an_mlps_name_or_its_option_gives_the_hidden_widths() -> None:
    shapes = [(64, math.prod((3, 5, 5))), (32, 64), (7, 32)]
    for network in (
        _build("mlp_64_32", (3, 5, 5)),
        _build("mlp", (75,), hidden=[64, 32]),
        _build("mlp_64_32", (75,), hidden=(64, 32)),
    ):
        linear = [m for m in network.modules() if isinstance(m, torch.nn.Linear)]
        assert [tuple(layer.weight.shape) for layer in linear] == shapes


def test_vgg16_is_normalized_and_vgg16_bn_is_the_same_network() -> None:
    assert _build("vgg16").state_dict().keys() == _build("vgg16_bn").state_dict().keys()
    assert "features.1.weight" not in _build("vgg16", norm=False).state_dict()


def test_the_image_gives_the_channels() -> None:
    assert _build("resnet20", (1, 28, 28)).conv1.in_channels == 1
    assert _build("vgg11", (5, 32, 32)).features[0].in_channels == 5


@pytest.mark.parametrize(("side", "kernel"), [(28, 3), (64, 3), (65, 7)])
def test_small_images_get_the_small_stem_unless_told(side: int, kernel: int) -> None:
    with torch.device("meta"):
        assert _build("resnet18", (3, side, 224)).conv1.kernel_size == (kernel, kernel)
        assert _build("resnet18", (3, side, 224), stem="large").conv1.kernel_size == (7, 7)


def test_options_reach_the_network() -> None:
    network = _build("resnet20", width=8, keep_hidden=0.5, input_norm=True, stem_stride=2)
    assert network.conv1.out_channels == 8
    assert network.conv1.stride == (2, 2)
    assert network.hidden_drop.p == 0.5
    assert isinstance(network.input_norm, torch.nn.BatchNorm2d)


@pytest.mark.parametrize("name", ["mlp", "resnet20", "vgg16", "wide_resnet28_10"])
def test_the_lectures_four_options_are_everywhere(name: str) -> None:
    four = {"keep_input", "keep_hidden", "norm", "input_norm"}
    assert four <= set(networks.options(name))
    assert not {"classes", "in_channels", "widths", "depth"} & set(networks.options(name))


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("resent20", "resnet20"),
        ("ResNet-20", "resnet20"),
        ("resnet", "resnet"),
        ("vgg", "vgg"),
        ("vgg16bn", "vgg16_bn"),
        ("wide-resnet28-10", "wide_resnet28_10"),
        ("wrn28_10", "wide_resnet28_10"),
        ("mpl", "mlp"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(UserError, match=f'Unknown network "{name}"; did you mean "{nearest}'):
        _build(name)


def test_a_name_like_none_lists_all() -> None:
    with pytest.raises(UserError) as error:
        _build("transformer")
    assert "did you mean" not in str(error.value)
    assert all(name in str(error.value) for name in networks.available())


@pytest.mark.parametrize("name", ["resnet21", "vgg12", "wide_resnet20_4"])
def test_a_depth_that_a_family_lacks_is_named(name: str) -> None:
    with pytest.raises(UserError, match="expected `depth` to be"):
        _build(name)


def test_an_unknown_option_suggests_the_nearest_and_lists_all() -> None:
    with pytest.raises(
        UserError, match="resnet20 has no option `keep_hiden`: did you mean `keep_h"
    ):
        _build("resnet20", keep_hiden=0.5)
    with pytest.raises(
        UserError, match=r"mlp has no option `stem_stride`.* It takes hidden, keep_"
    ):
        _build("mlp", stem_stride=2)


@pytest.mark.parametrize("option", ["keep_output", "drop_output", "keep_out"])
@pytest.mark.parametrize("name", ["mlp", "resnet20", "vgg11"])
def test_an_output_that_would_be_dropped_is_refused(name: str, option: str) -> None:
    with pytest.raises(UserError, match="the output, which is never dropped"):
        _build(name, **{option: 0.5})


def test_an_mlp_without_hidden_layers_cannot_drop_hidden_values() -> None:
    assert len(_build("mlp", (12,), hidden=()).hidden) == 0
    with pytest.raises(UserError, match="would drop the output"):
        _build("mlp", (12,), hidden=(), keep_hidden=0.5)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("vgg16", (3, 28, 28), "vgg16 takes images of at least 32x32 pixels but got 28x28"),
        ("resnet18", (3, 4, 4), "resnet18 takes images of at least 5x5 pixels but got 4x4"),
        ("resnet20", (3, 2, 8), "resnet20 takes images of at least 3x3 pixels but got 2x8"),
        ("resnet20", (13,), "resnet20 takes images"),
        ("resnet20", (3, 0, 8), "`input_shape` to be a whole number of at least 1 but got 0"),
    ],
)
def test_an_input_that_the_network_cannot_take_is_refused(
    name: str, shape: tuple[int, ...], expected: str
) -> None:
    with pytest.raises(UserError, match=expected):
        _build(name, shape)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("resnet20", {"keep_hidden": 0}, r"`keep_hidden` to be in \(0, 1\] but got 0"),
        (
            "vgg16_bn",
            {"norm": False},
            "vgg16_bn is the normalized network; for norm=False use vgg16",
        ),
        ("mlp_64", {"hidden": (32,)}, "leave out hidden"),
        ("mlp", {"hidden": "64"}, "Expected `hidden` to be widths"),
    ],
)
def test_options_that_contradict_are_refused(
    name: str, options: dict[str, Any], expected: str
) -> None:
    with pytest.raises(UserError, match=expected):
        _build(name, **options)


def test_classes_must_be_at_least_one() -> None:
    with pytest.raises(UserError, match="`classes`"):
        networks.build("resnet20", classes=0, input_shape=(3, 32, 32))
