"""What follows batch normalization becomes part of it, however it is written, and only then."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normdrop


def conv(inputs=3, outputs=3):
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)


def spread(model):
    """Weights that are not 1 and 0, so that a lost γ or α shows."""
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.uniform_(0.5, 1.5)
    return model


class Block(nn.Module):
    """conv → BN, and then what ``tail(self, y, x)`` does."""

    def __init__(self, tail, **children):
        super().__init__()
        self.conv = conv()
        self.bn = nn.BatchNorm2d(3)
        self.relu = nn.ReLU()
        for name, child in children.items():
            setattr(self, name, child)
        self.tail = tail

    def forward(self, x):
        return self.tail(self, self.bn(self.conv(x)), x)


def add_in_place(m, y, x):
    y += x
    return F.relu(y)


def add_method_in_place(m, y, x):
    return y.add_(x).relu_()


ACTIVATIONS = {
    "module": (lambda m, y, x: m.relu(y), {}),
    "module_in_place": (lambda m, y, x: m.relu(y), {"relu": nn.ReLU(inplace=True)}),
    "functional": (lambda m, y, x: F.relu(y), {}),
    "functional_in_place": (lambda m, y, x: F.relu(y, inplace=True), {}),
    "functional_underscore": (lambda m, y, x: F.relu_(y), {}),
    "torch": (lambda m, y, x: torch.relu(y), {}),
    "method": (lambda m, y, x: y.relu(), {}),
    "method_in_place": (lambda m, y, x: y.relu_(), {}),
    "attribute": (lambda m, y, x: m.activate(y), {"activate": F.relu}),
    "sequential": (lambda m, y, x: m.rest(y), {"rest": nn.Sequential(nn.ReLU())}),
}
ADDITIONS = {
    "first": lambda m, y, x: m.relu(y + x),
    "second": lambda m, y, x: m.relu(x + y),
    "torch": lambda m, y, x: m.relu(torch.add(y, x)),
    "method": lambda m, y, x: m.relu(x.add(y)),
    "in_place": add_in_place,
    "method_in_place": add_method_in_place,
}


@pytest.mark.parametrize("spelling", ACTIVATIONS)
def test_relu_is_fused(spelling, convert_checked, fused_calls, images):
    tail, children = ACTIVATIONS[spelling]
    model = convert_checked(spread(Block(tail, **children)), {"bn": "with relu"})
    fused_calls.clear()
    model(images)
    model.eval()(images)
    assert fused_calls == [(False, "relu")] * 2


@pytest.mark.parametrize("slope", [0.01, 0.1, 0.2, -0.5])
def test_leaky_relu_is_fused_with_its_slope(slope, convert_checked, fused_calls, images):
    name = "leaky_relu" if slope == 0.01 else f"leaky_relu({slope})"
    tails = {
        "module": (lambda m, y, x: m.act(y), {"act": nn.LeakyReLU(slope)}),
        "function": (lambda m, y, x: F.leaky_relu(y, slope), {}),
        "keyword": (lambda m, y, x: F.leaky_relu(y + x, negative_slope=slope), {}),
    }
    for spelling, (tail, children) in tails.items():
        added = "add, " if spelling == "keyword" else ""
        model = convert_checked(spread(Block(tail, **children)), {"bn": f"with {added}{name}"})
        fused_calls.clear()
        model(images)
        assert fused_calls == [(bool(added), name)]


@pytest.mark.parametrize("spelling", ADDITIONS)
def test_addition_and_relu_are_fused(spelling, convert_checked, fused_calls, images):
    model = convert_checked(spread(Block(ADDITIONS[spelling])), {"bn": "with add, relu"})
    fused_calls.clear()
    model(images)
    assert fused_calls == [(True, "relu")]


def test_addition_alone_is_fused(convert_checked):
    convert_checked(spread(Block(lambda m, y, x: y + x)), {"bn": "with add"})


def test_identities_in_between_are_no_hindrance(convert_checked):
    """As in the residual networks of transformers, where no activation is an Identity."""

    def tail(m, y, x):
        y = m.none(y)
        y += x
        return m.none(m.drop(m.none(m.relu(m.none(y)))))

    block = spread(Block(tail, none=nn.Identity(), drop=nn.Dropout(0.0)))
    convert_checked(block, {"bn": "with add, relu, dropout"})
    convert_checked(spread(Block(lambda m, y, x: m.none(y), none=nn.Identity())), {})
    hooked = spread(Block(tail, none=nn.Identity(), drop=nn.Dropout(0.0)))
    hooked.none.register_forward_hook(lambda m, x, y: None)
    convert_checked(hooked, {})


@pytest.mark.parametrize("act", [nn.ReLU6(), nn.Hardswish(), nn.SiLU(), nn.PReLU(), nn.Tanh()])
def test_other_activations_stay(act, convert_checked):
    original = spread(Block(lambda m, y, x: m.act(y), act=act))
    convert_checked(original, {})
    (row,) = normdrop.plan(original)
    assert row.why == f"not fused: {type(act).__name__} follows"


def test_dropout_after_the_activation_is_part_of_it(convert_checked, fused_calls, images):
    block = spread(Block(lambda m, y, x: m.drop(m.relu(y)), drop=nn.Dropout(0.0)))
    model = convert_checked(block, {"bn": "with relu, dropout"})
    model.drop.p = 0.5
    y = model(images)
    model.drop.p = 0.0
    whole = model(images)
    kept = y != 0
    assert 0.45 < kept.sum() / (whole != 0).sum() < 0.55
    torch.testing.assert_close(y[kept], 2 * whole[kept])
    # Its own flag counts, as in a model where only dropout is set to train.
    whole = model.eval()(images)
    model.drop.p = 0.5
    assert torch.equal(model(images), whole)
    model.drop.train()
    assert 0.45 < (model(images) != 0).sum() / (whole != 0).sum() < 0.55


@pytest.mark.skipif(not normdrop.has_kernels(), reason="there is no operator")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_dropout_in_training_is_in_the_same_operator(layout):
    block = Block(lambda m, y, x: m.drop(m.relu(y + x)), drop=nn.Dropout(0.3))
    model = normdrop.convert(spread(block).to(memory_format=layout))
    x = torch.randn(16, 3, 24, 24).to(memory_format=layout).requires_grad_()

    def run():
        torch.manual_seed(5)
        with torch.profiler.profile() as profile:
            y = model(x)
            grads = torch.autograd.grad(y.square().sum(), [x, *model.parameters()])
        events = [
            e.name.removeprefix("normdrop::") for e in profile.events() if "normdrop" in e.name
        ]
        return events, (y, *grads)

    events, results = run()
    assert events == ["batch_norm", "batch_norm_update", "batch_norm_backward"]
    # A module of another class, though it does the same, is called on its own.
    model.drop.__class__ = type("Other", (normdrop.nn.Dropout,), {})
    events, apart = run()
    assert [name for name in events if name.startswith("dropout")]
    for one, two in zip(results, apart, strict=True):
        torch.testing.assert_close(one, two)
    assert torch.equal(results[0] != 0, apart[0] != 0)


@pytest.mark.skipif(not normdrop.has_kernels(), reason="there is no operator")
@pytest.mark.parametrize("change", ["scaling", "p", "norm in evaluation", "channels"])
def test_dropout_of_another_kind_is_not_in_the_operator(change, monkeypatch):
    drop = nn.Dropout2d(0.3) if change == "channels" else nn.Dropout(0.3)
    block = Block(lambda m, y, x: m.drop(m.relu(y)), drop=drop)
    model = normdrop.convert(spread(block))
    if change == "scaling":
        model.drop.scaling = "test"
    elif change == "p":
        model.drop.p = 1.0
    elif change == "norm in evaluation":
        model.bn.eval()
    x = torch.randn(16, 3, 24, 24)
    calls = []
    forward = type(model.drop).forward
    monkeypatch.setattr(
        type(model.drop), "forward", lambda self, y: calls.append(self) or forward(self, y)
    )
    with torch.no_grad():
        y = model(x)
        normal = model.relu(model.bn(model.conv(x)))
    assert calls == [model.drop]
    kept = y != 0
    scale = {"scaling": 1.0, "p": 0.0}.get(change, 1 / 0.7)
    torch.testing.assert_close(y[kept], scale * normal[kept])


class Residual(nn.Module):
    """As torchvision writes it: one ReLU for all, the shortcut normalized too."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv1 = conv(inputs, outputs)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


def residual_network():
    return spread(nn.Sequential(Residual(3, 4), Residual(4, 4), Residual(4, 4)))


def test_residual_network(convert_checked, fused_calls, images):
    original = residual_network()
    expected = {}
    for i in range(3):
        expected |= {f"{i}.bn1": "with relu", f"{i}.bn2": "with add, relu"}
    model = convert_checked(original, expected)
    rows = {row.path: row.why for row in normdrop.plan(original) if row.action == "replace"}
    assert rows == {
        "0.downsample.1": "not fused: the sum it goes into is fused with the other summand"
    }
    fused_calls.clear()
    model(images)
    first = [(False, "relu"), (False, None), (True, "relu")]
    assert fused_calls == first + 2 * [(False, "relu"), (True, "relu")]


class ConvBlock(nn.Module):
    """As many packages write it: the activation is an option, None or what makes a module."""

    def __init__(self, activation, use_bn=True):
        super().__init__()
        self.conv, self.use_bn, self.activate = conv(), use_bn, activation is not None
        if use_bn:
            self.bn = nn.BatchNorm2d(3)
        if activation is not None:
            self.activ = activation()

    def forward(self, x):
        x = self.conv(x)
        if self.use_bn:
            x = self.bn(x)
        if self.activate:
            x = self.activ(x)
        return x


class Unit(nn.Module):
    """The body's norm lies two modules deep, the addition here."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(ConvBlock(lambda: nn.ReLU(inplace=True)), ConvBlock(None))
        self.activ = nn.ReLU(inplace=True)

    def forward(self, x):
        identity = x
        x = self.body(x)
        x = x + identity
        return self.activ(x)


def test_blocks_of_blocks(convert_checked):
    model = convert_checked(
        spread(nn.Sequential(Unit(), ConvBlock(nn.ReLU), ConvBlock(nn.ReLU, use_bn=False))),
        {"0.body.0.bn": "with relu", "0.body.1.bn": "with add, relu", "1.bn": "with relu"},
    )
    assert [name for name, _ in model.named_modules()] == [
        name for name, _ in nn.Sequential(Unit(), *model[1:]).named_modules()
    ]


@pytest.mark.parametrize("shape", [(64, 5), (32, 5, 9), (16, 5, 3, 4, 5)])
def test_vectors_sequences_and_volumes(shape):
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 5: nn.BatchNorm3d}[len(shape)]
    original = spread(nn.Sequential(kind(5), nn.ReLU()))
    model = normdrop.convert(copy.deepcopy(original))
    assert normdrop.plan(model).rows[0].why == "with relu"
    x = torch.randn(shape)
    for _ in range(2):
        torch.testing.assert_close(model(x), original(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.state_dict(), original.state_dict())
        model.eval()
        original.eval()


# ---- What must not be fused ---------------------------------------------------------------------


def see_the_norms_output_change(m, y, x):
    view = y.flatten(1)
    torch.relu_(y)
    return view.mean() + y


def keep_the_norms_output(m, y, x):
    return m.relu(y) * y.sigmoid()


def add_into_the_other(m, y, x):
    x = x * 1.0
    kept = x
    x += y
    return m.relu(x) + kept


def twice_the_same_norm(m, y, x):
    z = m.bn(m.conv(x * 2.0 + 1.0))
    return m.relu(y) + m.relu(z) * 0.5


def add_itself(m, y, x):
    return m.relu(y + y)


def scaled(m, y, x):
    return m.relu(torch.add(y, x, alpha=2))


def broadcast(m, y, x):
    return m.relu(y + x.mean((2, 3), keepdim=True))


def no_gradient(m, y, x):
    with torch.no_grad():
        z = m.relu(m.bn(x))
    return y + z


def branch_on_values(m, y, x):
    return m.relu(y) if y.mean() > 10 else torch.tanh(y)


SEEN = {
    # Two uses, or another operation.
    see_the_norms_output_change: {},
    keep_the_norms_output: {},
    add_into_the_other: {},
    add_itself: {},
    scaled: {},
    # Traced through, it would lose the context or a branch.
    no_gradient: {},
    branch_on_values: {},
    # Fused, and right: in the order of the calls, with the addition that broadcasts.
    twice_the_same_norm: {"bn": "with relu"},
    broadcast: {"bn": "with add, relu"},
}


@pytest.mark.parametrize("tail", SEEN, ids=lambda f: f.__name__)
def test_what_someone_sees_stays(tail, convert_checked):
    convert_checked(spread(Block(tail, bn2=nn.BatchNorm2d(3))), SEEN[tail])


@pytest.mark.parametrize("late", [False, True])
def test_a_norm_does_not_wait_for_the_addition_where_its_input_is_written(late, images):
    """In evaluation without gradients: otherwise autograd refuses the write, in torch as well."""

    def tail(m, y, x):
        z = m.bn(x)
        if late:
            x.mul_(3.0)
        return m.relu(z + y)

    original = spread(Block(tail)).eval()
    plan = normdrop.plan(original)
    assert plan.rows[0].why == ("not fused: add follows" if late else "with add, relu")
    converted = normdrop.convert(copy.deepcopy(original))
    with torch.no_grad():
        expected = original(images.clone())
        torch.testing.assert_close(converted(images.clone()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("writes", [False, True])
def test_a_norm_does_not_wait_while_a_container_writes_to_its_input(writes, images):
    original = spread(
        Block(
            lambda m, y, x: m.relu(y) + m.relu(m.bn2(x) + m.rest(x)),
            bn2=nn.BatchNorm2d(3),
            rest=nn.Sequential(nn.Sequential(nn.ReLU(inplace=writes))),
        )
    ).eval()
    converted = normdrop.convert(copy.deepcopy(original))
    with torch.no_grad():
        expected = original(images.clone())
        torch.testing.assert_close(converted(images.clone()), expected, rtol=1e-4, atol=1e-4)


class OneConvolution(nn.Sequential):
    """As MONAI's: a container of its own class, of which nobody knows whether it writes."""


def test_a_shortcut_in_a_container_is_no_hindrance(convert_checked):
    def tail(m, y, x):
        z = m.relu(m.bn2(m.conv2(m.relu(y))))
        z = m.bn3(m.conv3(z))
        z += m.bn4(m.shortcut(x))
        return m.relu(z)

    children = {f"conv{i}": OneConvolution(conv()) for i in (2, 3)}
    children |= {f"bn{i}": nn.BatchNorm2d(3) for i in (2, 3, 4)}
    block = spread(Block(tail, shortcut=OneConvolution(conv()), **children))
    expected = {"bn": "with relu", "bn2": "with relu", "bn3": "with add, relu"}
    convert_checked(block, expected)


class Pair(nn.Module):
    """Gives a second tensor only where it is to; ``branches`` makes it impossible to trace."""

    def __init__(self, second, branches):
        super().__init__()
        self.second, self.branches = second, branches

    def forward(self, x):
        if self.branches and x.sum() > 1e9:
            return x, x
        return x * 2.0, (x + 1.0 if self.second else None)


def ask_here(m, y, x):
    y, z = m.pair(y)
    y = m.relu(m.bn2(y))
    return y if z is None else y + z


def ask_in_a_function(m, y, x):
    y, z = m.pair(y)
    return add_where_there_is_one(m.relu(m.bn2(y)), z)


def add_where_there_is_one(y, z):
    return y + z if z is not None else y


def ask_in_a_module(m, y, x):
    y, z = m.pair(y)
    return m.add(m.relu(m.bn2(y)), z)


class AddWhereThereIsOne(nn.Module):
    def forward(self, y, z=None):
        if None is not z:
            y = y + z
        return y


class Asking(Block):
    def forward(self, x):
        return self.tail(self, self.bn(self.conv(x)), x)


class AskingHere(Asking):
    def forward(self, x):
        return ask_here(self, self.bn(self.conv(x)), x)


class AskingInAFunction(Asking):
    def forward(self, x):
        return ask_in_a_function(self, self.bn(self.conv(x)), x)


@pytest.mark.parametrize("second", [True, False])
@pytest.mark.parametrize("branches", [True, False])
@pytest.mark.parametrize("kind", [AskingHere, AskingInAFunction, Asking])
def test_what_another_module_gives_may_be_none(kind, branches, second, images, as_original):
    """A proxy of it would never be; found with the octave convolutions of pytorchcv."""
    children = {"pair": Pair(second, branches), "add": AddWhereThereIsOne()}
    original = spread(kind(ask_in_a_module, bn2=nn.BatchNorm2d(3), **children))
    converted = normdrop.convert(copy.deepcopy(original))
    as_original(converted, original)
    if not branches:
        assert normdrop.plan(original).count("fuse") == 1


class Counting(Block):
    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x)


def test_code_that_counts_goes_on_counting(convert_checked, images):
    model = convert_checked(Counting(lambda m, y, x: m.relu(y)), {})
    for _ in range(3):
        model(images)
    assert model.calls == 3


class Recording(Block):
    def __init__(self, tail):
        super().__init__(tail)
        self.seen = []

    def forward(self, x):
        y = self.bn(x)
        self.seen.append(y)
        return self.relu(y)


def test_code_that_keeps_its_tensors_goes_on_keeping(images):
    model = normdrop.convert(Recording(None))
    assert model.seen == []
    y = model(images)
    assert len(model.seen) == 1
    assert model.seen[0].min() < 0 <= y.min()


def by_chance(m, y, x):
    return m.relu(y) if random.random() < 0.5 else m.relu(y) + x


def test_chance_stays_chance(convert_checked, images):
    original = Block(by_chance)
    random.seed(3)
    before = random.getstate()
    assert normdrop.plan(original).count("fuse") == 0
    assert random.getstate() == before
    model = normdrop.convert(copy.deepcopy(original)).eval()
    original.eval()
    for number in range(6):
        random.seed(number)
        ours = model(images)
        random.seed(number)
        torch.testing.assert_close(ours, original(images), rtol=1e-4, atol=1e-4)


class Squared(torch.autograd.Function):
    """Says that its gradient is 3, which no trace through it would keep."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 3 * grad


def test_a_backward_of_its_own_stays(convert_checked):
    convert_checked(Block(lambda m, y, x: Squared.apply(m.relu(y))), {})


@pytest.mark.parametrize("layer", ["bn", "relu"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_never_across_a_hook(layer, when, images, as_original):
    model, seen = Block(ACTIVATIONS["module"][0]).double(), []
    images = images.double()
    original = copy.deepcopy(model)
    hook = lambda m, x, y: seen.append(y.detach())  # noqa: E731
    if when == "before":
        getattr(model, layer).register_forward_hook(hook)
        (row,) = normdrop.plan(model)
        assert row.action == "replace"
        assert "has a hook" in row.why
    normdrop.convert(model)
    if when == "after":
        model(images)
        original(images)
        getattr(model, layer).register_forward_hook(hook)
    model(images)
    original(images)
    assert len(seen) == 1
    assert (seen[0].min() < 0) == (layer == "bn")
    as_original(model, original)


def test_a_hook_on_a_block_sees_its_call_and_the_rest_is_fused(images, fused_calls):
    model, seen = nn.Sequential(Unit(), Unit()), []
    model[0].body.register_forward_hook(lambda m, x, y: seen.append(y.min() < 0))
    model[1].register_full_backward_hook(lambda m, gx, gy: seen.append("backward"))
    normdrop.convert(model)
    model(images).sum().backward()
    assert seen == [True, "backward"]
    # The addition of the first unit lies beyond the hook.
    assert fused_calls == [(False, "relu"), (False, None), (False, "relu"), (True, "relu")]


def test_a_global_hook_sees_every_call(images):
    model = normdrop.convert(Block(ACTIVATIONS["module"][0]))
    model(images)
    seen = []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda m, x, y: seen.append(type(m).__name__)
    )
    try:
        model(images)
    finally:
        handle.remove()
    assert seen == ["Conv2d", "BatchNorm2d", "ReLU", "Block"]


def test_nothing_is_fused_where_not_asked(images, fused_calls):
    original = residual_network()
    assert normdrop.plan(original, fuse=False).count("fuse") == 0
    normdrop.convert(original, fuse=False)(images)
    assert {activation for _, activation in fused_calls} == {None}
