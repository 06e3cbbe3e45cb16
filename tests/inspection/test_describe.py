"""``describe`` counts what runs, and leaves the model as it was."""

import contextlib
import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor

import normdrop
from normdrop import networks
from normdrop.errors import UserError
from normdrop.inspection import Description, Layer


def _on_meta(name: str, side: int, **options: Any) -> normdrop.inspection.Description:
    with torch.device("meta"):
        classes = 1000 if side == 224 else 10
        model = networks.build(name, classes=classes, input_shape=(3, side, side), **options)
    return normdrop.describe(model, (side, side, 3))


def _row(description: normdrop.inspection.Description, name: str) -> Layer:
    (layer,) = (layer for layer in description.layers if layer.name == name)
    return layer


def test_the_lectures_case_conv3_64_has_64_nodes_64_gammas_and_64_alphas() -> None:
    description = _on_meta("vgg16", 224)
    convolution, norm = description.layers[:2]
    assert description.input_shape == (3, 224, 224)
    assert convolution.type == "Conv2d"
    assert convolution.output_shape == (64, 224, 224)
    assert convolution.theta == 3 * 3 * 3 * 64 + 64
    assert convolution.norm_nodes == convolution.gamma_alpha == 0
    assert norm.type == "BatchNorm2d+relu"
    assert norm.output_shape == (64, 224, 224)
    assert norm.norm_nodes == 64
    assert norm.gamma_alpha == 64 + 64
    assert norm.theta == 0
    assert "224×224×64" in str(description).splitlines()[3]


@pytest.mark.parametrize("size", ["224x224x3", "224×224×3", (224, 224, 3), (3, 224, 224)])
def test_an_images_size_is_taken_in_the_lectures_order_and_in_torchs(size: Any) -> None:
    with torch.device("meta"):
        model = networks.vgg(11, 10, width=2, hidden=8)
    assert normdrop.describe(model, size).input_shape == (3, 224, 224)


def test_the_first_convolution_says_which_side_is_the_channels() -> None:
    with torch.device("meta"):
        model = torch.nn.Conv2d(8, 2, 3)
    assert normdrop.describe(model, (32, 5, 8)).input_shape == (8, 32, 5)
    assert normdrop.describe(model, (8, 5, 32)).input_shape == (8, 5, 32)


def test_where_there_is_no_convolution_the_first_batch_norm_says_it() -> None:
    model = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.BatchNorm2d(8))
    assert normdrop.describe(model, (32, 5, 8)).input_shape == (8, 32, 5)
    assert normdrop.describe(networks.mlp((12, 4, 10)), (6, 2, 1)).input_shape == (1, 6, 2)


@pytest.mark.parametrize("size", ["", "224x", "axb", "0x3x3", "-3", (), (3, 0), (2.5,), None, 7])
def test_a_size_that_is_none_is_refused(size: Any) -> None:
    with pytest.raises(UserError, match='such as "224x224x3"'):
        normdrop.describe(torch.nn.Linear(3, 3), size)


@pytest.mark.parametrize(
    ("name", "side", "published"),
    [
        # He et al. 2015, table 1.
        ("resnet18", 224, 1.8e9),
        ("resnet34", 224, 3.6e9),
        # The paper's 3.8e9 has the stride at the 1x1 convolution; at the 3x3 it is 4.1e9.
        ("resnet50", 224, 4.1e9),
        ("resnet101", 224, 7.8e9),
        ("vgg16", 224, 15.5e9),
        # Zagoruyko and Komodakis' network, as counted by others.
        ("wide_resnet28_10", 32, 5.2e9),
    ],
)
def test_multiply_adds_are_the_published_ones(name: str, side: int, published: float) -> None:
    assert _on_meta(name, side).multiply_adds == pytest.approx(published, rel=0.02)


def test_multiply_adds_of_a_small_case_are_those_of_the_formula() -> None:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(4, 6, 3, padding=1, groups=2),
        torch.nn.Flatten(),
        torch.nn.Linear(6 * 5 * 7, 10),
    )
    layers = normdrop.describe(model, (4, 5, 7), batch_size=3).layers
    assert layers[0].multiply_adds == (5 * 7 * 6) * (4 // 2 * 3 * 3)
    assert layers[2].multiply_adds == 6 * 5 * 7 * 10


@pytest.mark.parametrize("norm", [True, False])
def test_parameters_add_up_to_the_models(norm: bool) -> None:
    model = networks.resnet(8, 10, norm=norm, input_norm=True)
    description = normdrop.describe(model, "32x32x3")
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert description.norm_nodes == sum(m.num_features for m in norms)
    assert description.gamma_alpha == 2 * description.norm_nodes
    everything = sum(p.numel() for p in model.parameters())
    assert description.theta + description.gamma_alpha == everything


def test_batch_norm_without_gamma_and_alpha_still_adds_its_nodes() -> None:
    description = normdrop.describe(torch.nn.BatchNorm1d(5, affine=False), "5")
    assert (description.norm_nodes, description.gamma_alpha) == (5, 0)


class _Shared(torch.nn.Module):
    """One layer called twice, one parameter of its own, and one layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = torch.nn.Linear(4, 4)
        self.scale = torch.nn.Parameter(torch.ones(4))
        self.never = torch.nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": self.twice(self.twice(x)) * self.scale}


def test_a_shared_layer_counts_its_parameters_once_and_its_work_twice() -> None:
    description = normdrop.describe(_Shared(), "4")
    rows = [(r.name, r.type, r.output_shape, r.theta, r.multiply_adds) for r in description.layers]
    assert rows == [
        ("", "_Shared", (4,), 4, 0),
        ("twice", "Linear", (4,), 20, 16),
        ("twice", "Linear", (4,), 0, 16),
        ("never", "BatchNorm1d", None, 0, 0),
    ]
    assert (description.norm_nodes, description.gamma_alpha) == (3, 6)


def test_kept_bytes_of_a_small_case_are_those_that_backward_needs() -> None:
    """Linear keeps its input; ReLU keeps its result, which the next linear layer shares."""
    model = torch.nn.Sequential(
        torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2), torch.nn.Sigmoid()
    )
    layers = normdrop.describe(model, "3", batch_size=7).layers
    assert [layer.kept_bytes for layer in layers] == [7 * 3 * 4, 7 * 5 * 4, 0, 7 * 2 * 4]


def test_our_batch_norm_keeps_no_more_than_torchs_two_layers() -> None:
    theirs = torch.nn.Sequential(torch.nn.BatchNorm2d(8), torch.nn.ReLU())
    # Larger than what is handed to torch's own operator.
    shape, element = (8, 64, 64), 2 * 8 * 64 * 64 * 4
    kept = normdrop.describe(theirs, shape).kept_bytes
    assert 2 * element <= kept <= 2 * element + 4 * 8 * 4
    ours = normdrop.describe(normdrop.nn.BatchNorm2d(8, activation="relu"), shape).kept_bytes
    assert ours <= kept
    if normdrop.has_kernels():
        # Its input, and μ and σ² in float64.
        assert ours == element + 2 * 8 * 8


@pytest.mark.parametrize("name", ["resnet8", "wide_resnet10_1", "mlp_16"])
def test_kept_bytes_are_those_of_the_storages_that_autograd_saves(name: str) -> None:
    model = networks.build(
        name, classes=10, input_shape=(3, 16, 16), keep_input=0.8, keep_hidden=0.6
    )
    x = torch.rand(4, 3, 16, 16)
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    described = normdrop.describe(model, x)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = model.train()(x)
    kept = {pointer: t.untyped_storage().nbytes() for pointer, t in saved.items()}
    assert described.kept_bytes == sum(n for pointer, n in kept.items() if pointer not in own)
    assert described.batch_size == 4
    del y


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_with_little_memory_what_is_worked_out_again_is_not_counted(device: str) -> None:
    def model() -> torch.nn.Sequential:
        with torch.device(device):
            return torch.nn.Sequential(
                torch.nn.Conv2d(3, 4, 3, bias=False),
                normdrop.nn.BatchNorm2d(4, activation="relu"),
                torch.nn.MaxPool2d(2),
                torch.nn.Conv2d(4, 5, 1, bias=False),
            )

    normal = normdrop.describe(model(), "34x34x3", batch_size=8)
    low = normdrop.describe(normdrop.convert(model(), memory="low"), "34x34x3", batch_size=8)
    activated, pooled = 8 * 4 * 32 * 32 * 4, 8 * 4 * 16 * 16 * 4
    positions = 2 * pooled  # of the maxima, in int64
    assert normal.kept_bytes - low.kept_bytes == activated + pooled + positions
    assert [layer.kept_bytes for layer in low.layers if layer.type == "MaxPool2d"] == [0]


class TwoBlocks(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(4)
        self.conv2 = torch.nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(4)
        self.head = torch.nn.Conv2d(4, 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.head(torch.relu(self.bn2(self.conv2(x)) + x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("memory", ["normal", "low"])
def test_a_converted_model_is_described_as_it_runs_fused(memory: str) -> None:
    model = normdrop.convert(TwoBlocks(), memory=memory)
    map_bytes = 8 * 4 * 32 * 32 * 4  # of each tensor between the layers
    description = normdrop.describe(model, "32x32x3", batch_size=8)
    kept = {layer.name: layer.kept_bytes for layer in description.layers}
    # Each norm keeps what it normalizes; bits of the sum's signs; μ and σ² in float64.
    bits = 8 * 4 * 32 * 32 // 8 + 8 * 4
    assert kept["bn1"] == map_bytes + 2 * 4 * 8
    assert kept["bn2"] == map_bytes + 2 * 4 * 8 + bits
    assert kept["conv2"] == (0 if memory == "low" else map_bytes)
    assert kept["head"] == (0 if memory == "low" else map_bytes)
    assert (description.norm_nodes, description.gamma_alpha) == (8, 16)
    assert "normalize" not in vars(model.bn1)
    assert [row.action for row in normdrop.plan(model)] == ["already", "already"]


def test_a_folded_model_is_described_layer_by_layer() -> None:
    model = networks.resnet(8, 10).eval()
    before = normdrop.describe(model, "32x32x3")
    after = normdrop.describe(normdrop.fold(model), "32x32x3")
    assert after.multiply_adds == before.multiply_adds
    assert {layer.name for layer in after.layers} >= {
        layer.name for layer in before.layers if layer.type in ("Conv2d", "Linear")
    }


def test_frozen_models_keep_nothing() -> None:
    model = networks.resnet(8, 10).requires_grad_(False)
    assert normdrop.describe(model, "16x16x3").kept_bytes == 0


@pytest.mark.parametrize("name", ["resnet8", "vgg11", "wide_resnet10_1"])
def test_the_meta_device_gives_the_same_figures(name: str) -> None:
    options = {"width": 4, "hidden": 8, "keep_input": 0.8, "keep_hidden": 0.5, "input_norm": True}
    options = {key: value for key, value in options.items() if key in networks.options(name)}
    real = networks.build(name, classes=10, input_shape=(3, 32, 32), **options)
    assert normdrop.describe(real, "32x32x3") == _on_meta(name, 32, **options)


def test_the_meta_device_stays_the_models() -> None:
    with torch.device("meta"):
        model = networks.resnet(8, 10)
    normdrop.describe(model, "32x32x3")
    assert all(t.is_meta and type(t) is torch.nn.Parameter for t in model.parameters())
    assert all(t.is_meta for t in model.buffers())


def test_a_compiled_model_is_described_as_the_model_within() -> None:
    model = networks.mlp((9, 8, 7))
    compiled: Any = torch.compile(model, backend="eager")
    assert normdrop.describe(compiled, "9") == normdrop.describe(model, "9")


def test_a_tied_parameter_counts_once() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert [layer.theta for layer in normdrop.describe(model, "4").layers] == [20, 4]


def _state(model: torch.nn.Module) -> Any:
    tensors = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    objects = [id(tensor) for tensor in (*model.parameters(), *model.buffers())]
    return tensors, torch.get_rng_state(), (flags, hooks, objects)


def _assert_same(before: Any, after: Any) -> None:
    for key, tensor in before[0].items():
        assert torch.equal(tensor, after[0][key]), key
    assert torch.equal(before[1], after[1])
    assert before[2] == after[2]


@pytest.mark.parametrize("grad", [True, False])
def test_the_model_is_left_as_it_was(grad: bool) -> None:
    model: Any = networks.resnet(8, 10, keep_input=0.5, keep_hidden=0.5, input_norm=True)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    model.layer2.eval()
    gradient = model.fc.weight.grad.clone()
    before = _state(model)
    with torch.set_grad_enabled(grad):
        first = normdrop.describe(model, "8x8x3")
        second = normdrop.describe(model, "8x8x3")
    _assert_same(before, _state(model))
    assert torch.equal(model.fc.weight.grad, gradient)
    assert first == second
    assert first.kept_bytes > 0


def test_inference_mode_outside_does_not_matter() -> None:
    model = networks.resnet(8, 10)
    expected = normdrop.describe(model, "8x8x3")
    with torch.inference_mode():
        assert normdrop.describe(model, "8x8x3") == expected


def test_the_model_is_left_as_it_was_when_it_fails() -> None:
    model = networks.resnet(8, 10, keep_input=0.5).eval()
    before = _state(model)
    with pytest.raises(RuntimeError, match="channels"):
        normdrop.describe(model, (8, 8, 5))
    with pytest.raises(UserError, match="at least 3x3"):
        normdrop.describe(model, "2x2x3")
    with pytest.raises(UserError, match="`batch_size`"):
        normdrop.describe(model, "8x8x3", batch_size=0)
    _assert_same(before, _state(model))


def test_a_backward_pass_that_waits_is_not_disturbed() -> None:
    """Its saved running statistics must not be written to."""
    model = networks.resnet(8, 10).eval()
    loss = model(torch.randn(2, 3, 8, 8)).sum()
    normdrop.describe(model, "8x8x3")
    loss.backward()


def test_example_inputs_may_be_given_instead_of_a_size() -> None:
    embedding = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Linear(4, 3))
    described = normdrop.describe(embedding, torch.randint(0, 10, (5, 6)))
    assert described.input_shape == (6,)
    assert described.batch_size == 5
    assert described.layers[1].multiply_adds == 6 * 4 * 3
    bilinear = torch.nn.Bilinear(3, 4, 2)
    x1, x2 = torch.rand(5, 3), torch.rand(5, 4)
    by_place = normdrop.describe(bilinear, (x1, x2))
    by_name = normdrop.describe(bilinear, {"input1": x1, "input2": x2})
    assert by_place == by_name
    assert by_place.theta == 2 * 3 * 4 + 2


def test_lazy_layers_without_parameters_are_named() -> None:
    with pytest.raises(UserError, match="lazy layers"):
        normdrop.describe(torch.nn.LazyLinear(3), "3")


def test_the_table_names_layers_and_sums_them() -> None:
    text = str(normdrop.describe(networks.resnet(8, 10, keep_hidden=0.5), "32x32x3"))
    lines = text.splitlines()
    assert lines[0] == "ResNet, input 32×32×3"
    assert lines[1].split() == [
        "layer",
        "type",
        "output",
        "Θ",
        "K",
        "γ,",
        "α",
        *lines[1].split()[-2:],
    ]
    assert lines[3].split()[:4] == ["conv1", "Conv2d", "32×32×16", "432"]
    assert any(line.startswith("hidden_drop") for line in lines)
    assert not any("Identity" in line for line in lines)
    total = next(line for line in lines if line.startswith("total"))
    assert total.split()[1:4] == ["74,810", "240", "480"]
    assert "adds 240 nodes (K) with 480 parameters (γ, α), 0.64% of 75,290." in text


def test_the_share_of_gamma_and_alpha_is_of_all_parameters() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    text = str(normdrop.describe(model, "2"))
    assert "adds 3 nodes (K) with 6 parameters (γ, α), 40.00% of 15." in text


@pytest.mark.parametrize(
    ("count", "text"),
    [(999, "999 B"), (1000, "1.0 kB"), (999_940, "999.9 kB"), (999_960, "1.0 MB"), (0, "")],
)
def test_bytes_are_in_the_unit_that_keeps_them_below_1000(count: int, text: str) -> None:
    layer = Layer("layer", "Layer", kept_bytes=count)
    line = str(Description("Model", (1,), 1, [layer])).splitlines()[3]
    assert line.removeprefix("layer  Layer").strip() == text


def test_what_code_between_layers_keeps_has_a_row_of_its_own() -> None:
    class Sine(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x).sin()

    model = torch.nn.Sequential(torch.nn.Linear(2, 3, bias=False), Sine())
    layers = {layer.name: layer for layer in normdrop.describe(model, "2", batch_size=4).layers}
    assert layers.keys() == {"0", "1"}
    assert layers["1"].kept_bytes == 4 * 3 * 4


def test_a_last_side_of_up_to_four_is_the_channels_where_no_layer_says_so() -> None:
    for channels in (1, 3, 4):
        shape = normdrop.describe(torch.nn.Flatten(), (9, 8, channels)).input_shape
        assert shape == (channels, 9, 8)
    assert normdrop.describe(torch.nn.Flatten(), (9, 8, 5)).input_shape == (9, 8, 5)


@pytest.mark.parametrize("fuse", [True, False])
def test_what_follows_a_failure_that_the_model_catches_counts_at_the_model(fuse: bool) -> None:
    class Careful(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.ReLU())
            self.fc = torch.nn.Linear(3, 2, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with contextlib.suppress(ValueError):  # one value a channel
                x = self.block(x)
            return self.fc(x).sin()

    model = normdrop.convert(Careful(), fuse=fuse)
    layers = {layer.name: layer for layer in normdrop.describe(model, "3", batch_size=1).layers}
    assert layers[""].kept_bytes == 2 * 4
    assert layers["block.0"].kept_bytes == 0


def test_the_table_says_where_there_is_no_batch_norm() -> None:
    text = str(normdrop.describe(torch.nn.Linear(3, 2), "3"))
    assert "It has no batch normalization." in text
    assert "adds" not in text.replace("multiply-adds", "").replace("Multiply-adds", "")


def test_json_holds_the_layers_and_the_totals() -> None:
    description = normdrop.describe(networks.mlp((9, 8, 7)), "9")
    data = json.loads(description.to_json())
    assert data["layers"][0]["name"] == "hidden.0"
    assert data["layers"][0]["output_shape"] == [8]
    totals = {key: data[key] for key in ("theta", "norm_nodes", "gamma_alpha", "multiply_adds")}
    assert totals == {
        "theta": 9 * 8 + 8 * 7 + 7,
        "norm_nodes": 8,
        "gamma_alpha": 16,
        "multiply_adds": 9 * 8 + 8 * 7,
    }
    assert data["kept_bytes"] == description.kept_bytes


def test_half_precision_models_are_described_in_their_precision() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    kept = normdrop.describe(model, "4").kept_bytes
    assert normdrop.describe(copy.deepcopy(model).bfloat16(), "4").kept_bytes == kept // 2
