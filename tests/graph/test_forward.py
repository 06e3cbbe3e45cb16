"""Fused code runs as long as what it was made from is the same; otherwise the model's own does."""

import copy
import gc
import inspect
import io
import operator
import pickle
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normdrop


class Network(nn.Module):
    """A block whose forward depends on whatever may be changed from outside."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(3)
        self.act = nn.LeakyReLU()
        self.active = True
        self.options = {"scale": 1.0}
        self.powers = [1]

    def forward(self, x, shift=0.0, *, double=False):
        y = self.bn(self.conv(x))
        if self.active:
            y = self.act(y)
        for power in self.powers:
            y = y**power
        if double:
            y = 2 * y
        return y * self.options["scale"] + shift


@pytest.fixture
def pair():
    original = Network()
    return normdrop.convert(copy.deepcopy(original)), original


def check(converted, original, x, *args, **kwargs):
    for training in (True, False):
        ours = converted.train(training)(x, *args, **kwargs)
        theirs = original.train(training)(x, *args, **kwargs)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_it_is_fused_at_first(pair, images, fused_calls):
    check(*pair, images)
    assert fused_calls == [(False, "leaky_relu")] * 2


CHANGES = {
    "attribute": lambda m: setattr(m, "active", False),
    "dictionary": lambda m: m.options.update(scale=3.0),
    "list": lambda m: m.powers.append(2),
    "slope": lambda m: setattr(m.act, "negative_slope", 0.5),
    "activation": lambda m: setattr(m, "act", nn.Tanh()),
    "no_activation": lambda m: setattr(m, "act", nn.Sequential()),
    "norm": lambda m: setattr(m, "bn", nn.InstanceNorm2d(3, affine=True)),
    "forward": lambda m: setattr(m.act, "forward", torch.sigmoid),
    "class": lambda m: setattr(m, "__class__", Doubled),
}


class Doubled(Network):
    def forward(self, x, shift=0.0, *, double=False):
        return super().forward(x, shift, double=True)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_after_conversion_counts(change, pair, images, fused_calls):
    converted, original = pair
    converted(images)
    original(images)
    fused_calls.clear()
    for model in pair:
        CHANGES[change](model)
    check(converted, original, images)
    assert all(activation is None for _, activation in fused_calls)


@pytest.mark.parametrize(
    ("args", "options"),
    [((1.5,), {}), ((), {"shift": 2.0}), ((), {"double": True}), ((torch.ones(12),), {})],
)
def test_other_arguments_run_the_models_own_code(args, options, pair, images, fused_calls):
    check(*pair, images, *args, **options)
    assert fused_calls == [(False, None)] * 2


def test_an_input_by_name_is_the_same_call(pair, images, fused_calls):
    converted, original = pair
    torch.testing.assert_close(converted(x=images), original(x=images), rtol=1e-4, atol=1e-4)
    assert fused_calls == [(False, "leaky_relu")]


def test_a_wrong_call_fails_as_it_does_unconverted(pair):
    for model in pair:
        with pytest.raises(TypeError, match=r"forward\(\) missing 1 required positional"):
            model()


def test_the_signature_is_that_of_the_model(pair):
    """Trainers look there for the names of the columns that a model takes."""
    signatures = [inspect.signature(model.forward) for model in pair]
    assert signatures[0] == signatures[1]


def test_exchanged_layers_outside_the_pattern_are_used(pair, images, fused_calls):
    converted, original = pair
    for model in pair:
        torch.manual_seed(1)
        model.conv = nn.Conv2d(3, 3, 1)
    check(converted, original, images)
    assert fused_calls == [(False, "leaky_relu")] * 2


@pytest.mark.parametrize("frozen", [["bn"], ["bn", "act"], ["inner"]])
def test_a_frozen_norm_keeps_its_statistics(frozen, images, as_original):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.BatchNorm2d(3))
            self.bn = nn.BatchNorm2d(3)
            self.act = nn.ReLU()

        def train(self, mode=True):
            super().train(mode)
            for name in frozen:
                getattr(self, name).eval()
            return self

        def forward(self, x):
            return self.act(self.inner(x)) + self.act(self.bn(x))

    original = Outer().train()
    for p in original.bn.parameters():
        p.requires_grad_(False)
    converted = normdrop.convert(copy.deepcopy(original))
    converted(images)
    layer = converted.inner[0] if frozen == ["inner"] else converted.bn
    assert layer.num_batches_tracked == 0
    assert torch.equal(layer.running_mean, torch.zeros(3))
    assert not converted.bn.weight.requires_grad


def test_mixed_types_are_added_as_the_model_does(images):
    class Added(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x):
            return F.relu(self.bn(x) + x.double())

    original = Added()
    y = normdrop.convert(copy.deepcopy(original))(images)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, original(images), rtol=1e-4, atol=1e-4)


class IntoTheOther(nn.Module):
    """The sum is written to the other summand, whose type it has."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1).double(), nn.BatchNorm2d(3).double()
        self.other = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        y = self.bn(self.conv(x.double()))
        z = self.other(x)
        z += y
        return F.relu(z)


@pytest.mark.parametrize("tool", [normdrop.convert, normdrop.fold])
def test_a_sum_has_the_type_of_what_it_is_written_to(tool, images):
    original = IntoTheOther().eval()
    with torch.inference_mode():
        y = tool(copy.deepcopy(original))(images)
        assert y.dtype == torch.float32
        torch.testing.assert_close(y, original(images), rtol=1e-4, atol=1e-4)


class SeenAfterwards(nn.Module):
    """The other summand is read again, once before and once after the sum is written to it."""

    def __init__(self, writes):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.other, self.writes = nn.Conv2d(3, 3, 1), writes

    def forward(self, x):
        z = self.other(x)
        y = self.bn(self.conv(x))
        total = operator.iadd(z, y) if self.writes else z + y
        return F.relu(total) + 0.5 * z


@pytest.mark.parametrize("tool", [normdrop.convert, normdrop.fold])
@pytest.mark.parametrize("writes", [True, False])
def test_a_summand_that_is_read_afterwards_is_what_it_shall_be(writes, tool, images):
    original = SeenAfterwards(writes).eval()
    with torch.inference_mode():
        y = tool(copy.deepcopy(original))(images)
        torch.testing.assert_close(y, original(images), rtol=1e-4, atol=1e-4)


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, saved, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["deepcopy", "saved", "pickled"],
)
def test_copies_are_fused_and_stand_alone(copied, pair, images, fused_calls):
    converted, _ = pair
    converted(images)
    other = copied(converted)
    fused_calls.clear()
    expected = converted.eval()(images)
    assert torch.equal(other.eval()(images), expected)
    assert fused_calls == [(False, "leaky_relu")] * 2
    # The copy is not tied to the original's layers.
    with torch.no_grad():
        other.bn.weight.zero_()
    assert torch.equal(converted(images), expected)
    assert not torch.equal(other(images), expected)


class Perhaps(Network):
    """A layer outside of the pattern that may be taken away."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Tanh()

    def forward(self, x):
        y = super().forward(x)
        return y if self.drop is None else self.drop(y)


def test_a_layer_that_is_taken_away_is_not_called(images):
    original = Perhaps()
    converted = normdrop.convert(copy.deepcopy(original))
    check(converted, original, images)
    converted.drop = original.drop = None
    check(converted, original, images)


def test_a_layer_that_is_added_is_called(images):
    original = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
    converted = normdrop.convert(copy.deepcopy(original))
    check(converted, original, images)
    for model in (converted, original):
        model.append(nn.Tanh())
    check(converted, original, images)


COPIES = {
    "deepcopy": copy.deepcopy,
    "saved": saved,
    "pickled": lambda m: pickle.loads(pickle.dumps(m)),
    "shallow": copy.copy,
    "deepcopy of a shallow copy": lambda m: copy.deepcopy(copy.copy(m)),
    "a copy's copy": lambda m: copy.deepcopy(copy.deepcopy(m)),
}


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("tool", [normdrop.convert, normdrop.fold])
def test_a_change_of_a_copy_that_was_never_called_counts(copied, change, tool, images):
    original = Network().eval()
    with torch.no_grad():
        original.bn.running_var.uniform_(0.5, 2.0)
    other = COPIES[copied](tool(copy.deepcopy(original)))
    if tool is normdrop.fold and change == "norm":
        change = "no_activation"  # a folded norm is gone
    for model in (other, original):
        CHANGES[change](model)
        model.eval()
    with torch.inference_mode():
        torch.testing.assert_close(other(images), original(images), rtol=1e-4, atol=1e-4)


def test_a_shallow_copy_runs_its_own_attributes_and_the_original_goes_on(pair, images):
    converted, original = pair
    other = copy.copy(converted)
    other.active = False
    check(converted, original, images)
    original.active = False
    check(other, original, images)


class CopiesItself(Network):
    """What a copy has is another thing than what it was copied from."""

    def __getstate__(self):
        return {**super().__getstate__(), "active": False}


@pytest.mark.parametrize("copied", ["deepcopy", "pickled"])
def test_a_class_that_says_how_it_is_copied(copied, images):
    original = CopiesItself()
    check(
        COPIES[copied](normdrop.convert(copy.deepcopy(original))), COPIES[copied](original), images
    )


class Locks(Network):
    """Holds what no copy can have."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()

    def __getstate__(self):
        return {**super().__getstate__(), "lock": None}


@pytest.mark.parametrize("copied", ["deepcopy", "pickled"])
def test_what_a_class_leaves_out_of_copies_is_left_out(copied, images):
    converted = normdrop.convert(Locks())
    other = COPIES[copied](converted)
    assert other.lock is None
    check(other, converted, images)


class Holds(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
        self.hidden = lambda x: x

    def forward(self, x):
        return super().forward(x)


@pytest.mark.parametrize("tool", [normdrop.convert, normdrop.fold])
def test_what_is_exchanged_and_cannot_be_pickled_is_no_hindrance(tool, images):
    model = tool(Holds().eval())
    assert "forward" in vars(model)
    model.hidden = None
    other = pickle.loads(pickle.dumps(model))
    assert torch.equal(other(images), model(images))


def test_revert_of_a_part_leaves_the_rest_right(images, fused_calls):
    original = nn.Sequential(Network(), Network())
    converted = normdrop.convert(copy.deepcopy(original))
    normdrop.revert(converted[0])
    check(converted, original, images)
    assert type(converted[0].bn) is nn.BatchNorm2d
    assert fused_calls == [(False, "leaky_relu")] * 2


def test_revert_gives_every_attribute_back(images):
    original = nn.Sequential(Network(), nn.Dropout(0.3))
    before = [dict(vars(m)) for m in original.modules()]
    normdrop.convert(original)
    original(images)
    normdrop.revert(original)
    for module, attributes in zip(original.modules(), before, strict=True):
        assert {**vars(module), "training": True}.keys() == attributes.keys()
        assert "forward" not in vars(module)


def test_a_converted_model_is_freed(images):
    model = normdrop.convert(Network())
    model(images)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_functional_call_takes_the_given_parameters(pair, images):
    _, original = pair
    given = {name: torch.rand_like(p) for name, p in original.named_parameters()}
    results = [torch.func.functional_call(model, given, (images,)) for model in pair]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
