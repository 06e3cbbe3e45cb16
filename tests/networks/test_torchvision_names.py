"""The 224×224 family has torchvision's parameters, so that published weights load.

``torchvision_names.json`` holds names and shapes as torchvision gives them, in its order.
"""

import json
from pathlib import Path

import pytest
import torch

from normdrop import networks

_NAMES = json.loads((Path(__file__).parent / "torchvision_names.json").read_text())


def _make(name: str) -> torch.nn.Module:
    with torch.device("meta"):
        if name.startswith("resnet"):
            return networks.resnet(int(name[6:]), 1000)
        depth = int(name[3:5])
        return networks.vgg(depth, 1000, norm=name.endswith("_bn"))


@pytest.mark.parametrize("name", _NAMES)
def test_state_dict_has_torchvisions_names_shapes_and_order(name: str) -> None:
    ours = [(key, list(tensor.shape)) for key, tensor in _make(name).state_dict().items()]
    assert ours == list(_NAMES[name].items())


@pytest.mark.parametrize("name", _NAMES)
def test_parameters_come_in_torchvisions_order(name: str) -> None:
    """An optimizer's state is saved by position."""
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    theirs = [key for key in _NAMES[name] if not key.endswith(buffers)]
    assert [key for key, _ in _make(name).named_parameters()] == theirs


def test_a_published_state_dict_loads_strictly() -> None:
    shapes = _NAMES["resnet18"]
    state = {key: torch.full(shape, 0.5) for key, shape in shapes.items()}
    network = networks.resnet(18, 1000, keep_input=0.9, keep_hidden=0.5, zero_init_last=True)
    network.load_state_dict(state)
    assert network.layer1[0].bn2.running_var[0] == 0.5


def test_by_name_torchvisions_options_give_torchvisions_network() -> None:
    with torch.device("meta"):
        network = networks.build("vgg11_bn", classes=1000, input_shape=(3, 224, 224))
    assert list(network.state_dict()) == list(_NAMES["vgg11_bn"])
