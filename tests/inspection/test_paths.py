"""describe(kernels=True) says which path each layer takes, and why it is not a faster one."""

import copy
import json
import sys
from typing import Any

import pytest
import torch

import normdrop
from normdrop import networks, nn
from normdrop.errors import UserError

_with_kernels = pytest.mark.skipif(not normdrop.has_kernels(), reason="there is one path only")


def _paths(model: torch.nn.Module, size: Any, **options: Any) -> dict[str, tuple[str, str | None]]:
    description = normdrop.describe(model, size, kernels=True, **options)
    return {layer.name: (layer.type, layer.path) for layer in description.layers}


@_with_kernels
def test_every_layer_of_a_network_has_its_path() -> None:
    network = networks.resnet(8, 10, shortcut="projection", keep_hidden=0.5, input_norm=True)
    paths = _paths(network, "16x16x3")
    assert paths["input_norm"] == ("BatchNorm2d", "kernel; not fused: Conv2d follows")
    assert paths["conv1"] == ("Conv2d", "torch")
    assert paths["bn1"] == ("BatchNorm2d+relu", "kernel")
    assert paths["layer2.0.bn2"] == ("BatchNorm2d+add+relu", "kernel")
    assert paths["layer2.0.downsample.1"] == (
        "BatchNorm2d",
        "kernel; not fused: the sum it goes into is fused with the other summand",
    )
    assert paths["hidden_drop"] == ("Dropout", "kernel")
    network = networks.mlp((13, 8, 10), keep_hidden=0.5)
    assert _paths(network, "13")["hidden.1"] == ("BatchNorm1d+relu+dropout", "kernel")


@_with_kernels
def test_what_is_torchs_says_why() -> None:
    class Mapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4, track_running_stats=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.func.vmap(self.norm)(x[None])[0]

    model = torch.nn.Sequential(
        torch.nn.BatchNorm1d(4),
        torch.nn.SiLU(),
        torch.nn.Dropout(0.5),
        type("Own", (torch.nn.BatchNorm1d,), {})(4),
        Mapped(),
        nn.BatchNorm1d(4, activation="relu"),
        nn.BatchNorm1d(4),
        torch.nn.ReLU(),
        nn.Dropout(0.0),
    )
    assert _paths(model, "4", batch_size=8) == {
        "0": ("BatchNorm1d", "torch: it is not converted; not fused: SiLU follows"),
        "1": ("SiLU", "torch"),
        "2": ("Dropout", "torch: it is not converted"),
        "3": ("Own", "torch: a subclass that normdrop does not know"),
        "4.norm": (
            "BatchNorm1d",
            "torch: torch.func or forward-mode differentiation transforms it; "
            "not fused: the code of Mapped is not traced: it branches on a tensor",
        ),
        "5": ("BatchNorm1d+relu", "kernel"),
        "6": ("BatchNorm1d", "kernel; not fused: convert would"),
        "7": ("ReLU", "torch"),
        "8": ("Dropout", "nothing to do"),
    }


@_with_kernels
def test_a_path_that_is_taken_twice_is_named_once() -> None:
    class Twice(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = normdrop.functional.dropout(x.to(torch.complex64)).real
            return normdrop.functional.dropout(normdrop.functional.dropout(x))

    reason = "the input has none of the types float32, float64, bfloat16 and float16"
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), Twice())
    assert _paths(model, "4")["1"] == ("Twice", f"torch: {reason}, kernel")


@_with_kernels
def test_fused_code_that_steps_aside_is_said() -> None:
    network = networks.resnet(8, 10)
    network.relu.register_forward_hook(lambda module, x, y: None)
    paths = _paths(network, "16x16x3")
    assert paths["bn1"] == (
        "BatchNorm2d",
        "kernel; not fused: something is not as it was when it was converted",
    )
    assert paths["layer1.0.bn1"] == ("BatchNorm2d+relu", "kernel")


def test_a_linear_layers_path_is_the_one_without_anybody_who_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What counts the products is a dispatch mode, under which oneDNN's would not be taken."""
    monkeypatch.setattr("normdrop.ops.linear.prefers_onednn", lambda: True)
    paths = _paths(networks.mlp((512, 512, 10)), "512", batch_size=64)
    assert paths["hidden.0"] == ("Linear", "oneDNN")
    assert paths["fc"] == ("Linear", "torch: the product is small")


def test_without_kernels_all_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normdrop.ops.paths.has_kernels", lambda: False)
    monkeypatch.setattr(sys.modules[normdrop.describe.__module__], "instruction_set", lambda: None)
    description = normdrop.describe(networks.mlp((5, 4, 3), keep_input=0.5), "5", kernels=True)
    paths = {layer.name: layer.path for layer in description.layers}
    assert paths["input_drop"] == paths["hidden.1"] == "torch: there are no kernels"
    assert "where no kernels are loaded." in str(description)
    assert description.kernels == "none"


@_with_kernels
def test_table_and_json_name_paths_and_instruction_set_where_asked() -> None:
    network = networks.mlp((5, 4, 3))
    asked, unasked = (normdrop.describe(network, "5", kernels=k) for k in (True, False))
    lines = str(asked).splitlines()
    assert lines[1].endswith("kept  path")
    assert next(line for line in lines if line.startswith("hidden.1")).endswith("  kernel")
    assert lines[-1] == (
        "Paths are those of training on this machine, where the kernels use "
        f"{normdrop.instruction_set()}."
    )
    assert "path" not in str(unasked).lower()
    data = json.loads(asked.to_json())
    assert data["kernels"] == normdrop.instruction_set()
    assert data["layers"][1]["path"] == "kernel"
    data = json.loads(unasked.to_json())
    assert data["kernels"] is None
    assert data["layers"][1]["path"] is None
    assert [(x.name, x.kept_bytes, x.multiply_adds) for x in asked.layers] == [
        (x.name, x.kept_bytes, x.multiply_adds) for x in unasked.layers
    ]


def test_the_model_is_as_before_and_nobody_listens_on() -> None:
    network = networks.resnet(8, 10, keep_hidden=0.5).eval()
    state = copy.deepcopy(network.state_dict())
    torch.manual_seed(1)
    normdrop.describe(network, "16x16x3", kernels=True)
    drawn = torch.rand(())
    torch.manual_seed(1)
    assert torch.rand(()) == drawn
    assert not network.training
    torch.testing.assert_close(network.state_dict(), state, rtol=0, atol=0)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    assert not any("normalize" in vars(m) for m in network.modules())
    assert normdrop.ops.paths._listeners == {}


def test_a_model_without_values_is_refused_and_so_is_what_is_no_flag() -> None:
    with torch.device("meta"):
        network = networks.mlp((5, 4, 3))
    with pytest.raises(UserError, match=r"a model with values for `kernels`.*on the meta device"):
        normdrop.describe(network, "5", kernels=True)
    with pytest.raises(TypeError, match="describe: expected `kernels` to be True or False"):
        normdrop.describe(network, "5", kernels="avx2")  # type: ignore[arg-type]
