"""Exported programs hold torch's own operators: they run in ONNX Runtime, and without normdrop."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import normdrop
from normdrop import networks, nn
from normdrop.ops import context

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore:.*torch.jit.*",
    "ignore:Exporting a model while it is in training mode",
)


class Images(torch.nn.Module):
    """What a user wrote: batch normalization, additions, activations and dropout of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn1 = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.BatchNorm2d(8)
        self.second, self.bn2 = torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.BatchNorm2d(8)
        self.channels, self.elements = torch.nn.Dropout2d(0.3), torch.nn.Dropout(0.5)
        self.linear, self.bn3 = torch.nn.Linear(8, 5), torch.nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.first(x)))
        y = self.channels(torch.nn.functional.silu(self.bn2(self.second(y)) + y))
        return self.bn3(self.linear(self.elements(torch.relu(y)).mean((2, 3))))


def layers() -> torch.nn.Module:
    return torch.nn.Sequential(
        nn.BatchNorm2d(3, activation="silu"),
        nn.BatchNorm2d(3, activation="leaky_relu(0.2)", nonfinite="raise"),
        nn.BatchNorm2d(3, nonfinite="skip", momentum=None),
        nn.Dropout(0.4, scaling="test"),
        nn.AlphaDropout(0.2),
        nn.FeatureAlphaDropout(0.2),
        nn.Dropout2d(keep=0.9),
    )


KEEP = {"keep_input": 0.8, "keep_hidden": 0.5}
MODELS: dict[str, tuple[Callable[[], torch.nn.Module], tuple[int, ...]]] = {
    "converted": (lambda: normdrop.convert(Images()), (4, 3, 8, 8)),
    "converted, low memory": (lambda: normdrop.convert(Images(), memory="low"), (4, 3, 8, 8)),
    "converted, layout": (lambda: normdrop.convert(Images(), layout="auto"), (4, 3, 8, 8)),
    "layers": (layers, (4, 3, 8, 8)),
    "resnet": (
        lambda: networks.resnet(depth=8, classes=3, input_norm=True, **KEEP),
        (4, 3, 8, 8),
    ),
    "wide resnet": (lambda: networks.wide_resnet(depth=10, classes=3, **KEEP), (2, 3, 8, 8)),
    "mlp": (lambda: networks.mlp(widths=(12, 9, 3), input_norm=True, **KEEP), (4, 12)),
}


def make_model(name: str) -> tuple[torch.nn.Module, Tensor]:
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model, x = make(), torch.randn(shape)
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(shape) * 2 + 1)  # running statistics of some data
    return model, x


def operators_of(program: torch.export.ExportedProgram) -> set[str]:
    """The namespaces of the operators, in all graphs of the program."""
    return {
        node.target.namespace
        for module in program.graph_module.modules()
        if isinstance(module, torch.fx.GraphModule)
        for node in module.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
    }


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize(
    ("name", "strict"), [*((name, False) for name in MODELS), ("layers", True), ("converted", True)]
)
def test_exported_programs_hold_torchs_operators_only(name, training, strict):
    model, x = make_model(name)
    model.train(training)
    program = torch.export.export(model, (x,), strict=strict)
    assert operators_of(program) == {"aten"}
    module = program.module()
    if not training:
        torch.testing.assert_close(module(x), model(x), rtol=1e-4, atol=1e-4)
        return
    counts = [t for name, t in module.state_dict().items() if name.endswith("batches_tracked")]
    before = [int(t) for t in counts]
    first, second = module(x), module(x)
    assert [int(t) for t in counts] == [n + 2 for n in before]
    assert not torch.equal(first, second)  # dropout is drawn anew


def test_torch_compile_sees_our_operator():
    if not normdrop.has_kernels():
        pytest.skip("there is no operator")
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    torch.compile(nn.BatchNorm2d(3, activation="relu"), backend=backend)(torch.randn(2, 3, 4, 4))
    assert "normdrop.batch_norm.default" in seen


def test_exported_training_is_that_of_torch():
    torch.manual_seed(1)
    model = Images()
    for layer in (model.channels, model.elements):
        layer.p = 0.0
    theirs = torch.export.export(model, (torch.randn(4, 3, 8, 8),)).module()
    ours = normdrop.convert(model)
    exported = torch.export.export(ours, (torch.randn(4, 3, 8, 8),)).module()
    x = torch.randn(4, 3, 8, 8)
    results = []
    for module in (theirs, exported):
        y = module(x)
        results.append([y, *torch.autograd.grad(y.sin().sum(), list(module.parameters()))])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(theirs.state_dict(), exported.state_dict())


WITHOUT = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "normdrop":
            raise ImportError("normdrop is not installed here")

sys.meta_path.insert(0, Blocked())
import torch
x, wanted = torch.load(sys.argv[2])
module = torch.export.load(sys.argv[1]).module()
torch.testing.assert_close(module(x), wanted, rtol=1e-4, atol=1e-4)
assert not any(name.startswith("normdrop") for name in sys.modules)
"""


def test_exported_program_runs_where_normdrop_is_not_installed(tmp_path: Path):
    model, x = normdrop.convert(Images()).eval(), torch.randn(4, 3, 8, 8)
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "model.pt2")
    torch.save((x, model(x).detach()), tmp_path / "tensors.pt")
    command = [sys.executable, "-c", WITHOUT, tmp_path / "model.pt2", tmp_path / "tensors.pt"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "training"),
    [
        *((name, False) for name in ("converted", "layers", "resnet", "wide resnet", "mlp")),
        *((name, True) for name in ("converted", "layers", "mlp")),
    ],
)
def test_onnx_runtime_runs_what_the_default_exporter_gives(name, training, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, x = make_model(name)
    model.train(training)
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(model, (x,), path, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})[:1]
    if training:  # dropout is drawn by the runtime
        assert y.shape == model(x).shape
    else:
        torch.testing.assert_close(torch.from_numpy(y), model(x).detach(), rtol=1e-3, atol=1e-4)


def test_onnx_keeps_dropout_and_normalization_in_training(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model = torch.nn.Sequential(nn.BatchNorm2d(3, activation="relu"), nn.Dropout(0.5))
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(model, (torch.randn(2, 3, 4, 4),), path, verbose=False)
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    assert "Relu" in kinds
    assert any("normdrop" not in kind and "Drop" in kind for kind in kinds), kinds


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced_training_holds_torchs_operators_only():
    model = torch.nn.Sequential(nn.BatchNorm2d(3, activation="relu"), nn.Dropout(0.5))
    traced = torch.jit.trace(model, torch.randn(2, 3, 4, 4), check_trace=False)
    assert "normdrop::" not in str(traced.inlined_graph)
    assert traced(torch.randn(2, 3, 4, 4)).shape == (2, 3, 4, 4)


def test_exporting_ends_with_the_export():
    torch.export.export(nn.BatchNorm2d(3), (torch.randn(2, 3, 4, 4),))
    assert not context.is_exported()
