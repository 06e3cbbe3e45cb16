"""Quantization-aware training (torch.ao.quantization) is left as it was."""

import copy

import pytest
import torch

import normdrop

quantization = pytest.importorskip("torch.ao.quantization")
quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx")
qat = pytest.importorskip("torch.ao.nn.intrinsic.qat")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*reduce_range.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions.*:UserWarning"),
]


class Network(torch.nn.Module):
    """Batch normalization that is fused for quantization, and a second that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.quant = quantization.QuantStub()
        self.conv = torch.nn.Conv2d(3, 8, 3)
        self.bn = torch.nn.BatchNorm2d(8)
        self.relu = torch.nn.ReLU()
        self.dequant = quantization.DeQuantStub()
        self.head_norm = torch.nn.BatchNorm2d(8)
        self.head_norm.qconfig = None

    def forward(self, x):
        x = self.dequant(self.relu(self.bn(self.conv(self.quant(x)))))
        return self.head_norm(x)


def eager():
    model = Network()
    model.qconfig = quantization.get_default_qat_qconfig("x86")
    model.head_norm.qconfig = None
    model = quantization.fuse_modules_qat(model, [["conv", "bn", "relu"]])
    return quantization.prepare_qat(model)


def traced():
    mapping = quantization.get_default_qat_qconfig_mapping("x86")
    mapping = mapping.set_module_name("head_norm", None)
    return quantize_fx.prepare_qat_fx(Network().train(), mapping, (torch.randn(2, 3, 6, 6),))


def train(model):
    """Losses and state of three steps from the same seed."""
    torch.manual_seed(7)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(torch.randn(4, 3, 8, 8)).sin().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("prepare", [eager, traced])
def test_quantization_aware_modules_are_left_named_and_train_on(prepare):
    theirs = prepare()
    fused = [m for m in theirs.modules() if isinstance(m, qat.ConvBnReLU2d)]
    assert fused, "torch did not prepare a fused module"
    ours = copy.deepcopy(theirs)
    rows = {row.path: row for row in normdrop.plan(ours)}
    normdrop.convert(ours)
    for path, module in theirs.named_modules():
        twin = ours.get_submodule(path)
        if isinstance(module, torch.nn.BatchNorm2d):
            if path == "head_norm":
                assert type(twin) is normdrop.nn.BatchNorm2d
                assert rows[path].action == "replace"
            else:
                assert type(twin) is type(module)
                assert rows[path].action == "leave"
                assert "quantization" in rows[path].why
        elif not isinstance(module, torch.fx.GraphModule):  # each of which has a class of its own
            assert type(twin) is type(module)
    torch.testing.assert_close(train(ours), train(theirs), rtol=1e-5, atol=1e-5)


def test_conversion_before_preparation_is_undone_by_revert():
    """What converts for training in float, and quantizes afterwards, takes torch's layers back."""
    model = normdrop.revert(normdrop.convert(Network()))
    model.qconfig = quantization.get_default_qat_qconfig("x86")
    model = quantization.fuse_modules_qat(model.train(), [["conv", "bn", "relu"]])
    assert isinstance(quantization.prepare_qat(model).conv, qat.ConvBnReLU2d)


def test_converted_model_becomes_an_int8_model():
    """After convert, torch's own conversion to int8 gives what it gave without."""
    results = []
    for change in (lambda model: model, normdrop.convert):
        torch.manual_seed(0)
        model = change(eager())
        for _ in range(2):
            model(torch.randn(4, 3, 8, 8))
        integer = quantization.convert(model.eval())
        results.append(integer(torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
