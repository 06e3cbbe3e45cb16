"""fold: whole models whose convolutions add and activate, and what users do with them."""

import copy
import io
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F

import normdrop
from normdrop import networks
from normdrop.graph import convolution
from normdrop.graph.absorb import FoldedForward
from normdrop.surgery.fold import fold, fold_plan

N = torch.nn


class Block(N.Module):
    """As torchvision writes it: the sum and the ReLU in place."""

    def __init__(self, channels, width, stride):
        super().__init__()
        self.conv1 = N.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = N.BatchNorm2d(width)
        self.relu = N.ReLU(inplace=True)
        self.conv2 = N.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = N.BatchNorm2d(width)
        self.downsample = None
        if stride != 1 or channels != width:
            self.downsample = N.Sequential(
                N.Conv2d(channels, width, 1, stride, bias=False), N.BatchNorm2d(width)
            )

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(N.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = N.Conv2d(3, 8, 7, 2, 3, bias=False)
        self.bn1 = N.BatchNorm2d(8)
        self.relu = N.ReLU(inplace=True)
        self.maxpool = N.MaxPool2d(3, 2, 1)
        self.layer1 = N.Sequential(Block(8, 8, 1), Block(8, 8, 1))
        self.layer2 = N.Sequential(Block(8, 16, 2), Block(16, 16, 1))
        self.avgpool = N.AdaptiveAvgPool2d((1, 1))
        self.fc = N.Linear(16, 4)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.avgpool(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(x, 1))


class Functional(N.Module):
    """Sums both ways round, other activations, an activation that two read, ``view``."""

    def __init__(self):
        super().__init__()
        self.convs = N.ModuleList(N.Conv2d(3 if i == 0 else 8, 8, 3, padding=1) for i in range(5))
        self.norms = N.ModuleList(N.BatchNorm2d(8) for _ in range(5))
        self.fc = N.Linear(8 * 5 * 6, 3)

    def forward(self, x):
        x = F.silu(self.norms[0](self.convs[0](x)))
        y = F.hardswish(x + self.norms[1](self.convs[1](x)))
        z = F.relu6(torch.add(self.norms[2](self.convs[2](y)), y)) + y
        z = F.relu(self.norms[3](self.convs[3](z)), True)
        z = self.norms[4](self.convs[4](z)) + 1
        z = F.max_pool2d(z, 2)
        return self.fc(z.view(z.size(0), -1))


class Leaky(N.Module):
    """As in Darknet: slopes of 0.1, by module and function, with and without an addition."""

    def __init__(self):
        super().__init__()
        self.convs = N.ModuleList(N.Conv2d(3 if i == 0 else 8, 8, 3, padding=1) for i in range(4))
        self.norms = N.ModuleList(N.BatchNorm2d(8) for _ in range(4))
        self.act = N.LeakyReLU(0.1, inplace=True)

    def forward(self, x):
        x = self.act(self.norms[0](self.convs[0](x)))
        y = F.leaky_relu(self.norms[1](self.convs[1](x)) + x, 0.3)
        z = F.leaky_relu(self.norms[2](self.convs[2](y)), negative_slope=0.2, inplace=True)
        return F.leaky_relu(self.norms[3](self.convs[3](z)))


class Writes(N.Module):
    """Writes to its tensors where others read them."""

    def __init__(self):
        super().__init__()
        self.a, self.b = N.Conv2d(3, 8, 3, padding=1), N.Conv2d(8, 8, 3, padding=1)
        self.bn = N.BatchNorm2d(8)

    def forward(self, x):
        y = self.a(x)
        flat = y.view(y.size(0), -1)
        flat.mul_(2.0)
        z = self.bn(self.b(y))
        y += z
        part = y[:, :2]
        part.zero_()
        return y.relu() + z.reshape(z.shape)


class WritesPart(N.Module):
    """Writes to a part of what a view was taken of before."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = N.Conv2d(3, 8, 3), N.BatchNorm2d(8)

    def forward(self, x):
        y = F.relu(self.bn(self.conv(x)))
        flat = y.view(y.size(0), -1)
        y[:, :2].zero_()
        return flat * 2.0


class AddsBroadcast(N.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = N.Conv2d(3, 8, 3), N.BatchNorm2d(8)
        self.gate = N.Parameter(torch.randn(1, 8, 1, 1))

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)) + self.gate) + 0.5 * x.mean()


class Mine(N.Module):
    """Looks into its input, so no record can be made of it, and calls view."""

    def forward(self, x):
        return x.view(len(x), -1) if float(x.detach().sum()) > -1e9 else x


def stack():
    return N.Sequential(
        N.Conv2d(3, 8, 3, bias=False),
        N.BatchNorm2d(8),
        N.ReLU(),
        N.Conv2d(8, 8, 1, groups=4),
        Mine(),
    )


def settled(model):
    for module in model.modules():
        if isinstance(module, N.modules.batchnorm._BatchNorm):
            N.init.uniform_(module.running_mean, -0.5, 0.5)
            N.init.uniform_(module.running_var, 0.3, 2.0)
            N.init.uniform_(module.weight, 0.5, 1.5)
            N.init.uniform_(module.bias, -0.5, 0.5)
    return model.eval()


def in_float64(model, x):
    with torch.no_grad():
        return copy.deepcopy(model).double()(x.double())


def assert_close(got, want):
    """Within float32 rounding of so many layers; what is compared with is float64."""
    error = float((got.detach().double() - want).abs().max())
    assert error <= 1e-5 * float(want.abs().max()), error


def fused_calls(call):
    """What the call gives, and how many of oneDNN's fused convolutions ran."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        y = call()
    names = [e.key for e in profile.key_averages() for _ in range(e.count)]
    return y, sum(name.startswith("mkldnn::_convolution_pointwise") for name in names)


needs_operators = pytest.mark.skipif(
    not convolution._HAS_OPERATORS, reason="torch without oneDNN's fused convolution"
)

MODELS = {
    "torchvision's ResNet": (ResNet, (3, 33, 40)),
    "functional": (Functional, (3, 10, 12)),
    "leaky": (Leaky, (3, 10, 12)),
    "leaky, converted": (lambda: normdrop.convert(Leaky()), (3, 10, 12)),
    "writes": (Writes, (3, 7, 6)),
    "writes to a part": (WritesPart, (3, 7, 6)),
    "broadcast": (AddsBroadcast, (3, 7, 6)),
    "view in what cannot be traced": (stack, (3, 7, 6)),
    "ours, small": (lambda: networks.resnet(8, 10, width=4), (3, 16, 16)),
    "ours, bottlenecks": (lambda: networks.resnet(50, 5, width=4), (3, 64, 64)),
    "ours, wide": (
        lambda: networks.wide_resnet(10, 1, 5),
        (3, 16, 16),
    ),
    "ours, vgg": (lambda: networks.vgg(11, 5, width=4, hidden=8, pool=1), (3, 32, 32)),
    "ours, mlp": (lambda: networks.mlp((12, 9, 4)), (12,)),
    "converted": (lambda: normdrop.convert(ResNet()), (3, 33, 40)),
}


@pytest.mark.parametrize("name", MODELS)
def test_whole_model_equals_float64(name):
    make, shape = MODELS[name]
    model = settled(make())
    folded = fold(model, torch.randn(2, *shape))
    for batch in (2, 3, 1, 2):
        x = torch.randn(batch, *shape)
        want = in_float64(model, x)
        for mode in (torch.inference_mode(), torch.no_grad(), torch.enable_grad()):
            with mode:
                y = folded(x)
                assert y.stride() == model(x).stride()
            assert_close(y, want)


@needs_operators
@pytest.mark.parametrize("name", ["leaky", "leaky, converted"])
def test_leaky_relu_is_applied_by_the_convolution(name):
    folded = fold(settled(MODELS[name][0]()))
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.inference_mode(), torch.profiler.profile(activities=activities) as profile:
        folded(torch.randn(2, 3, 10, 12))
    counts = {e.key: e.count for e in profile.key_averages()}
    # oneDNN does not apply it to a sum.
    assert counts.get("aten::leaky_relu_", 0) == 1
    assert "aten::leaky_relu" not in counts
    assert counts["mkldnn::_convolution_pointwise"] == 4


@needs_operators
def test_every_norm_sum_and_relu_of_a_resnet_is_gone():
    model = settled(ResNet())
    assert not fold_plan(model).left
    folded = fold(model)
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        y, count = fused_calls(lambda: folded(x))
    assert_close(y, in_float64(model, x))
    assert count == 10
    code = vars(folded)["forward"].codes[False].source
    assert ".relu(" not in code
    assert "iadd" not in code
    assert code.count("overwrite = True") == 4


@needs_operators
def test_layout_of_the_input_is_kept():
    model = settled(N.Sequential(N.Conv2d(3, 8, 3), N.BatchNorm2d(8), N.ReLU()))
    folded = fold(model)
    x = torch.randn(2, 3, 9, 9)
    with torch.inference_mode():
        for given in (x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3)):
            y, count = fused_calls(lambda given=given: folded(given))
            assert count == 1
            assert_close(y, in_float64(model, given))
        last = folded(x.contiguous(memory_format=torch.channels_last))
        assert last.is_contiguous(memory_format=torch.channels_last)


def test_gradients_with_respect_to_the_input():
    model = settled(ResNet())
    folded = fold(model)
    x = torch.randn(2, 3, 32, 32, requires_grad=True)
    (got,) = torch.autograd.grad(folded(x).sin().sum(), x)
    wide = x.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(copy.deepcopy(model).double()(wide).sin().sum(), wide)
    assert_close(got, want)


def test_autocast_gives_what_the_model_gives():
    model = settled(ResNet())
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        got, plain = fold(model)(x), model(x)
    assert got.dtype is plain.dtype is torch.bfloat16
    want = in_float64(model, x)
    assert float((got - want).abs().max()) <= 0.03 * float(want.abs().max())


# ---- What users do with the result ---------------------------------------------------------------


def roundtrip(folded):
    buffer = io.BytesIO()
    torch.save(folded, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "again", [copy.deepcopy, roundtrip, lambda m: pickle.loads(pickle.dumps(m))]
)
@needs_operators
def test_copies_are_as_fast_and_independent(again):
    model = settled(ResNet())
    folded = fold(model)
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        folded(x)
    other = again(folded)
    with torch.no_grad():
        folded.fc.weight.zero_()
    with torch.inference_mode():
        y, count = fused_calls(lambda: other(x))
    assert count == 10
    assert_close(y, in_float64(model, x))


def test_weights_that_change_are_seen():
    models = [settled(ResNet()), settled(ResNet())]
    folded, other = (fold(model) for model in models)
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        folded(x)
        folded.load_state_dict(other.state_dict())
        assert_close(folded(x), in_float64(models[1], x))
        folded.load_state_dict(fold(models[0]).state_dict(), assign=True)
        assert_close(folded(x), in_float64(models[0], x))
    with torch.no_grad():
        folded.layer1[0].conv1.weight.mul_(0.5)
        models[0].layer1[0].bn1.weight.mul_(0.5)
        shift = models[0].layer1[0].bn1
        shift.bias.copy_(
            folded.layer1[0].conv1.bias
            + shift.running_mean * shift.weight * (shift.running_var + shift.eps).rsqrt()
        )
        assert_close(folded(x), in_float64(models[0], x))
    moved = folded.double()
    assert_close(moved(x.double()), in_float64(models[0], x))
    with torch.inference_mode():
        assert_close(folded.float()(x), in_float64(models[0], x))


def test_functional_call_with_short_lived_weights():
    """A packed weight must not outlive the weight at whose address another one lies."""
    model = N.Sequential(N.Conv2d(3, 8, 3), N.ReLU()).eval()
    folded = fold(model)
    x = torch.randn(1, 3, 6, 6)
    with torch.inference_mode(False), torch.no_grad():
        for scale in range(1, 30):
            weight = model[0].weight.detach() * scale
            got = torch.func.functional_call(folded, {"0.weight": weight}, (x,))
            want = F.relu(F.conv2d(x.double(), weight.double(), model[0].bias.double()))
            del weight
            assert_close(got, want)


def swap_relu(model):
    model.relu = N.Tanh()


def hook(model):
    model.layer1[0].conv1.register_forward_hook(lambda module, args, output: output * 2)


def hook_on_pool(model):
    model.maxpool.register_forward_hook(lambda module, args, output: output.view(-1) and None)


def swap_conv(model):
    torch.manual_seed(3)
    model.layer1[1].conv2 = N.Conv2d(8, 8, 3, padding=1)


def own_forward(model):
    model.layer2[0].forward = lambda x: x[:, :, ::2, ::2].repeat(1, 2, 1, 1)


def skip(model):
    model.layer1[1].downsample = N.Conv2d(8, 8, 1)
    N.init.ones_(model.layer1[1].downsample.weight)
    N.init.ones_(model.layer1[1].downsample.bias)


@pytest.mark.parametrize("change", [swap_relu, hook, swap_conv, own_forward, skip])
@pytest.mark.parametrize("copied", [False, True])
def test_changes_after_folding_take_effect(change, copied):
    plain = fold(settled(ResNet()), fuse=False)
    folded = fold(plain)
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        folded(x)
    for model in (plain, folded):
        change(model)
    if copied and change is not own_forward:
        folded = copy.deepcopy(folded)
    with torch.inference_mode():
        assert_close(folded(x), in_float64(plain, x))


class Doubles(N.Module):
    """What it gives depends on an attribute."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.doubles = N.Conv2d(3, 8, 3), N.BatchNorm2d(8), False

    def forward(self, x):
        y = torch.relu(self.bn(self.conv(x)))
        return 2 * y if self.doubles else y


@pytest.mark.parametrize("surgery", [fold, normdrop.convert])
def test_copy_of_a_model_whose_attribute_was_changed(surgery):
    model = settled(Doubles())
    x = torch.randn(2, 3, 9, 9)
    want = 2 * in_float64(model, x)
    changed = surgery(model)
    with torch.inference_mode():
        changed(x)
        changed.doubles = True
        assert_close(changed(x), want)
        assert_close(copy.deepcopy(changed)(x), want)


def test_training_mode_runs_the_models_own_forward():
    model = settled(N.Sequential(N.Conv2d(3, 8, 3), N.BatchNorm2d(8), N.Dropout(0.5), N.ReLU()))
    folded = fold(model)
    folded.train()
    x = torch.randn(2, 3, 9, 9)
    assert float((folded(x) == 0).double().mean()) > 0.6
    folded.eval()
    assert_close(folded(x), in_float64(model, x))


def test_several_threads_and_shapes_at_once():
    model = settled(ResNet())
    folded = fold(model)
    inputs = [torch.randn(b, 3, 32 + 4 * b, 32) for b in (1, 2, 3, 4)]
    wanted = [in_float64(model, x) for x in inputs]
    errors = []

    def work(start):
        try:
            with torch.inference_mode():
                for i in range(8):
                    k = (start + i) % len(inputs)
                    assert_close(folded(inputs[k]), wanted[k])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_empty_batch():
    folded = fold(settled(ResNet()))
    with torch.inference_mode():
        assert folded(torch.randn(0, 3, 32, 32)).shape == (0, 4)


# ---- With the rest of PyTorch --------------------------------------------------------------------


def test_compiled():
    model = settled(Block(3, 8, 2))
    folded = fold(model)
    compiled = torch.compile(folded, fullgraph=True)
    x = torch.randn(2, 3, 8, 8)
    with torch.inference_mode():
        assert_close(compiled(x), in_float64(model, x))
        assert_close(folded(x), in_float64(model, x))


@pytest.mark.parametrize("strict", [False, True])
def test_exported(strict):
    model = settled(ResNet())
    x = torch.randn(2, 3, 32, 32)
    dynamic = ({0: torch.export.Dim("batch", min=2)},)
    program = torch.export.export(fold(model), (x,), dynamic_shapes=dynamic, strict=strict)
    assert not any("batch_norm" in str(node.target) for node in program.graph.nodes)
    for batch in (2, 5):
        x = torch.randn(batch, 3, 32, 32)
        assert_close(program.module()(x), in_float64(model, x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_jit_traced(tmp_path):
    model = settled(ResNet())
    traced = torch.jit.trace(fold(model), torch.randn(2, 3, 32, 32))
    torch.jit.save(traced, str(tmp_path / "model.pt"))
    loaded = torch.jit.load(str(tmp_path / "model.pt"))
    x = torch.randn(3, 3, 32, 32)
    assert_close(loaded(x), in_float64(model, x))


def test_symbolically_traced_and_vmapped():
    model = settled(ResNet())
    folded = fold(model)
    x = torch.randn(3, 2, 3, 32, 32)
    assert_close(torch.fx.symbolic_trace(folded)(x[0]), in_float64(model, x[0]))
    with torch.no_grad():
        got = torch.vmap(folded)(x)
    assert_close(got.flatten(0, 1), in_float64(model, x.flatten(0, 1)))


def test_graph_module_is_folded():
    model = settled(ResNet())
    folded = fold(torch.fx.symbolic_trace(model))
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert_close(folded(x), in_float64(model, x))
    assert isinstance(vars(folded)["forward"], FoldedForward)


@pytest.mark.parametrize("change", [normdrop.convert, normdrop.revert])
def test_converted_and_reverted_after_folding(change):
    model = settled(ResNet())
    model.layer1[0].bn1.train()
    folded = change(fold(model))
    folded.eval()
    model.eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert_close(folded(x), in_float64(model, x))
