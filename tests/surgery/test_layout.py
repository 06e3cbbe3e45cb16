"""channels_last by the weights: same numbers, other strides."""

import copy
import io
import pickle

import pytest
import torch

import normdrop
from normdrop import networks
from normdrop.errors import UserError
from normdrop.surgery.layout import set_layout

LAST = torch.channels_last


class Net(torch.nn.Module):
    """Plain, grouped, depthwise and transposed convolutions, and a shortcut."""

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = torch.nn.BatchNorm2d(8)
        self.grouped = torch.nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.depthwise = torch.nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up = torch.nn.ConvTranspose2d(8, 4, 2, 2)
        self.fc = torch.nn.Linear(4, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.depthwise(self.grouped(x)) + x)
        return self.fc(self.up(x).mean((2, 3)))


def is_last(weight):
    return weight.is_contiguous(memory_format=LAST) and not weight.is_contiguous()


def convolution_weights(model):
    """Those whose two layouts differ: a depthwise or 1×1 weight is the same in both."""
    weights = [p for p in model.parameters() if p.dim() == 4]
    return [w for w in weights if w.shape[1] > 1 and w.shape[2] > 1]


def train(model, x, steps=3, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, **options)
    labels = torch.arange(len(x)) % 5
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
@pytest.mark.parametrize("images", [torch.contiguous_format, LAST], ids=str)
def test_training_in_channels_last_gives_the_weights_of_torch_in_float64(images, fused):
    torch.manual_seed(0)
    model = Net()
    x = torch.randn(6, 3, 9, 7)
    expected = train(copy.deepcopy(model).double(), x.double())
    converted = normdrop.convert(model, layout="channels_last")
    train(converted, x.contiguous(memory_format=images), fused=fused)
    for (name, weight), truth in zip(
        converted.named_parameters(), expected.parameters(), strict=True
    ):
        assert (weight - truth).abs().max() < 2e-5, name


def test_parameters_stay_the_same_objects_with_other_strides():
    model = Net()
    parameters = list(model.parameters())
    before = copy.deepcopy(model.state_dict())
    normdrop.convert(model, layout="channels_last")
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(is_last(w) for w in convolution_weights(model))
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert model.stem(torch.randn(2, 3, 8, 8)).is_contiguous(memory_format=LAST)


def test_convert_keeps_the_layout_unless_told():
    for options in ({}, {"layout": "keep"}):
        model = normdrop.convert(Net(), **options)
        assert all(w.is_contiguous() for w in convolution_weights(model))


def test_auto_takes_channels_last_on_the_cpu_but_not_for_float64_or_elsewhere():
    assert all(is_last(w) for w in convolution_weights(normdrop.convert(Net(), layout="auto")))
    for other in (Net().double(), Net().to("meta")):
        normdrop.convert(other, layout="auto")
        assert all(w.is_contiguous() for w in convolution_weights(other))


def test_volumes_and_sequences_keep_their_layout():
    model = torch.nn.Sequential(torch.nn.Conv3d(2, 3, 3), torch.nn.Conv1d(2, 3, 3))
    set_layout(model, "channels_last")
    assert all(m.weight.is_contiguous() for m in model)


def test_lazy_and_shared_convolutions_pass():
    shared = torch.nn.Conv2d(3, 3, 3, padding=1)
    model = torch.nn.Sequential(shared, torch.nn.LazyConv2d(4, 3), shared)
    set_layout(model, "channels_last")
    assert is_last(shared.weight)
    assert isinstance(model[1].weight, torch.nn.UninitializedParameter)


def test_a_gradient_follows_its_weight():
    # torch.optim.SGD(fused=True) reads both in memory order.
    model = Net()
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    before = model.stem.weight.grad.clone()
    set_layout(model, "channels_last")
    assert is_last(model.stem.weight.grad)
    assert torch.equal(model.stem.weight.grad, before)


def test_an_unknown_layout_is_refused_before_anything_changes():
    model = Net()
    with pytest.raises(UserError, match='"auto", "channels_last" or "keep" but got \'nhwc\''):
        normdrop.convert(model, layout="nhwc")
    assert type(model.norm) is torch.nn.BatchNorm2d


@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "save"])
def test_copies_keep_the_layout(copied):
    model = normdrop.convert(Net(), layout="channels_last").eval()
    if copied == "deepcopy":
        other = copy.deepcopy(model)
    elif copied == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert all(is_last(w) for w in convolution_weights(other))
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(other(x), model(x))


def test_checkpoints_load_either_way():
    plain, last = Net(), normdrop.convert(Net(), layout="channels_last")
    last.load_state_dict(plain.state_dict())
    assert is_last(last.stem.weight)
    assert torch.equal(last.stem.weight, plain.stem.weight)
    plain.load_state_dict(normdrop.convert(Net(), layout="channels_last").state_dict())
    assert plain.stem.weight.is_contiguous()


def test_autocast_and_export_take_it():
    model = normdrop.convert(Net(), layout="auto")
    x = torch.randn(4, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = model.stem(x)
        assert y.dtype is torch.bfloat16
        assert y.is_contiguous(memory_format=LAST)
        model(x).float().sum().backward()
    assert is_last(model.stem.weight.grad)
    model.eval()
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))


def test_compiled_gradients_equal_those_of_eager():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), normdrop.nn.BatchNorm2d(4, activation="relu")
    )
    set_layout(model, "channels_last")
    compiled = copy.deepcopy(model)
    x = torch.randn(4, 3, 66, 66)
    model(x).square().sum().backward()
    torch.compile(compiled, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    assert is_last(compiled[0].weight.grad)
    for a, b in zip(model.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "size"), [("resnet8", 16), ("vgg11", 32), ("wide_resnet10_1", 16)]
)
def test_networks_pick_channels_last_and_give_the_same_numbers(name, size):
    options = {"classes": 5, "input_shape": (3, size, size), "width": 4}
    if name == "vgg11":
        options |= {"hidden": 8, "pool": 1}
    networks_ = []
    for layout in ({}, {"layout": "keep"}, {"layout": "channels_last"}):
        torch.manual_seed(0)
        networks_.append(networks.build(name, **options, **layout).double())
    auto, keep, last = networks_
    assert all(is_last(w) for w in convolution_weights(auto))
    assert all(w.is_contiguous() for w in convolution_weights(keep))
    x = torch.randn(4, 3, size, size, dtype=torch.float64)
    for other in (auto, last):
        torch.testing.assert_close(other(x), keep(x), rtol=1e-9, atol=1e-9)


def test_a_model_converted_in_inference_mode_trains_later():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    with torch.inference_mode():
        normdrop.convert(model, layout="channels_last")
    assert is_last(model[0].weight)
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    assert is_last(model[0].weight.grad)


def test_a_model_made_in_inference_mode_stays_so_and_folds():
    with torch.inference_mode():
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).eval()
    normdrop.convert(model, layout="channels_last")
    assert is_last(model[0].weight)
    assert model[0].weight.is_inference()
    x = torch.randn(2, 3, 8, 8)
    with torch.inference_mode():
        torch.testing.assert_close(normdrop.fold(model)(x), model(x))
