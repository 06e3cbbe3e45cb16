"""fold: where a forward may run in more than one way, or others reach into what it calls."""

import copy
import pickle

import pytest
import torch

from normdrop.errors import UserError
from normdrop.surgery.fold import fold, fold_plan

N = torch.nn


def settled(model):
    for module in model.modules():
        if isinstance(module, N.modules.batchnorm._BatchNorm):
            N.init.uniform_(module.running_mean, -0.5, 0.5)
            N.init.uniform_(module.running_var, 0.3, 2.0)
            N.init.uniform_(module.weight, 0.5, 1.5)
            N.init.uniform_(module.bias, -0.5, 0.5)
    return model.eval()


def is_float64s(folded, model, *args, **kwargs):
    """Whether a call gives what the model gives in float64."""

    def wide(value):
        return value.double() if isinstance(value, torch.Tensor) else value

    with torch.no_grad():
        got = folded(*args, **kwargs)
        exact = copy.deepcopy(model).double()
        want = exact(*map(wide, args), **{k: wide(v) for k, v in kwargs.items()})
    return torch.allclose(got.double(), want, rtol=1e-4, atol=1e-4)


def images():
    return torch.randn(2, 3, 6, 7)


class Base(N.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = N.Conv2d(3, 3, 3, padding=1), N.BatchNorm2d(3)


class Domains(Base):
    """An argument with a default chooses the norm."""

    def __init__(self):
        super().__init__()
        self.bn = None
        self.bns = N.ModuleList(N.BatchNorm2d(3) for _ in range(2))

    def forward(self, x, domain=0):
        return self.bns[domain](self.conv(x))


class InnerDomains(N.Module):
    def __init__(self):
        super().__init__()
        self.block = Domains()

    def forward(self, x, domain=0):
        return self.block(x, domain).relu()


class Switched(Base):
    """A flag with a default chooses, by name alone."""

    def forward(self, x, *, normalize=True):
        y = self.conv(x)
        return self.bn(y) if normalize else y


class Options(Base):
    def forward(self, x, **options):
        y = self.conv(x)
        return y if options.get("raw") else self.bn(y)


class Flag(Base):
    def forward(self, x, normalize=True):
        y = self.conv(x)
        return self.bn(y) if normalize else y


class Mixed(Base):
    """With a second tensor the convolution's output goes there, too."""

    def forward(self, x, other=None):
        y = self.conv(x)
        z = self.bn(y)
        return z if other is None else z + y * other


ARGUMENTS = {
    "a number": (Domains, {"domain": 1}),
    "a number, passed on": (InnerDomains, {"domain": 1}),
    "by name": (Switched, {"normalize": False}),
    "of any name": (Options, {"raw": True}),
    "a flag": (Flag, {"normalize": False}),
    "a tensor": (Mixed, {"other": torch.ones(())}),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_norm_is_left_where_an_argument_may_choose(name):
    kind, options = ARGUMENTS[name]
    model = settled(kind())
    assert "may choose what runs" in fold_plan(model).left[0].why
    folded = fold(model)
    assert is_float64s(folded, model, images())
    assert is_float64s(folded, model, images(), **options)


class Harmless(Base):
    """Arguments that choose nothing between the two layers."""

    def forward(self, x, scale=1.0, shift=None, features=False, unread=3):
        y = self.bn(self.conv(x)) * scale
        if shift is not None:
            y = y + shift
        return (y.relu() if features else y).abs()


def test_a_norm_is_folded_where_arguments_choose_nothing():
    model = settled(Harmless())
    folded = fold(model)
    assert isinstance(folded.bn, N.Identity)
    for options in ({}, {"scale": 2.0}, {"shift": torch.ones(())}, {"features": True}):
        assert is_float64s(folded, model, images(), **options)


class Around(N.Module):
    """Its own argument steers, but what lies in its block does not depend on it."""

    def __init__(self):
        super().__init__()
        self.block, self.powers = N.Sequential(N.Conv2d(3, 3, 1), N.BatchNorm2d(3)), 1

    def forward(self, x, power=1):
        return self.block(x) ** int(power)


def test_what_an_argument_does_not_reach_is_folded():
    model = settled(Around())
    folded = fold(model)
    assert isinstance(folded.block[1], N.Identity)
    assert is_float64s(folded, model, images(), 3)


class ByAttribute(Domains):
    domain = 0

    def __init__(self):
        super().__init__()
        self.domain = 0

    def forward(self, x):
        return self.bns[self.domain](self.conv(x))


class ByName(Base):
    def __init__(self):
        super().__init__()
        self.bn2, self.which = N.BatchNorm2d(3), "bn"

    def forward(self, x):
        return getattr(self, self.which)(self.conv(x))


class ByConvolution(N.Module):
    def __init__(self):
        super().__init__()
        self.convs = N.ModuleList(N.Conv2d(3, 3, 1) for _ in range(2))
        self.bn, self.which = N.BatchNorm2d(3), 0

    def forward(self, x):
        return self.bn(self.convs[self.which](x))


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [(ByAttribute, "domain", 1), (ByName, "which", "bn2"), (ByConvolution, "which", 1)],
)
def test_a_norm_is_left_where_one_of_several_is_chosen(kind, name, value):
    model = settled(kind())
    assert any("may choose" in row.why for row in fold_plan(model).left)
    folded = fold(model)
    assert is_float64s(folded, model, images())
    for changed in (folded, model):
        setattr(changed, name, value)
    assert is_float64s(folded, model, images())


class Attribute(Base):
    """Attributes, one that parts the layers and one that does not."""

    def __init__(self):
        super().__init__()
        self.normalize, self.scale = True, 1.0

    def forward(self, x, shift=0.0):
        y = self.conv(x)
        return (self.bn(y) if self.normalize else y) * self.scale + shift


class OfAttribute(N.Module):
    def __init__(self):
        super().__init__()
        self.block = Attribute()

    def forward(self, x):
        return self.block(x, 1.0).relu()


COPIES = [lambda m: m, copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))]


@pytest.mark.parametrize("copied", COPIES, ids=["itself", "deepcopy", "copy", "pickle"])
@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("kind", [Attribute, OfAttribute])
def test_an_attribute_that_is_switched_later_is_refused_or_right(kind, fuse, copied):
    model = settled(kind())
    folded = copied(fold(model, fuse=fuse))
    ours, theirs = (m if kind is Attribute else m.block for m in (folded, model))
    assert isinstance(ours.bn, N.Identity)
    ours.scale = theirs.scale = 3.0
    for _ in range(2):
        assert is_float64s(folded, model, images())
    ours.normalize = False
    for _ in range(2):
        with pytest.raises(UserError, match="fold: expected"):
            folded(images())
    again = copy.deepcopy(folded)
    with pytest.raises(UserError, match="fold: expected"):
        again(images())
    ours.normalize = True
    assert is_float64s(folded, model, images())


def test_a_copy_of_what_was_changed_is_checked():
    model = settled(Attribute())
    folded = fold(model)
    folded.scale = 2.0
    folded(images())
    other = copy.deepcopy(folded)
    other.normalize = False
    with pytest.raises(UserError):
        other(images())


def test_training_is_another_way():
    class InTraining(Base):
        def forward(self, x):
            y = self.conv(x)
            return y if self.training else self.bn(y)

    folded = fold(settled(InTraining()))
    folded(images())
    with pytest.raises(UserError):
        folded.train()(images())


def test_a_compiled_model_refuses_as_well():
    model = settled(Attribute())
    folded = torch.compile(fold(model), backend="eager")
    assert is_float64s(folded, model, images())
    folded.normalize = False
    with pytest.raises(Exception, match="fold: expected"):
        folded(images())


def test_exchanged_layers_are_the_users():
    model = settled(Attribute())
    folded = fold(model)
    x = images()
    folded.conv = N.Conv2d(3, 3, 1)
    torch.testing.assert_close(folded(x), folded.conv(x))
    folded.bn = N.ReLU()
    torch.testing.assert_close(folded(x), folded.conv(x).relu())


def test_hooks_and_wrappers_change_no_way():
    model = settled(OfAttribute())
    folded = fold(model)
    calls = []
    folded.block.register_forward_hook(lambda *_: calls.append(1))
    assert is_float64s(folded, model, images())
    folded.block.scale = model.block.scale = 2.0
    assert is_float64s(folded, model, images())
    assert calls == [1, 1]
    folded.block.normalize = False
    with pytest.raises(UserError):
        folded(images())
    folded.block.normalize = True
    folded.block = torch.compile(folded.block, backend="eager")
    assert is_float64s(folded, model, images())


# ---- Parents that cannot be traced -------------------------------------------------------------


class Asks(N.Module):
    def __init__(self):
        super().__init__()
        self.block, self.also = Attribute(), N.ReLU()

    def asks(self, x):
        return float(x.detach().sum()) > 1e9


class CallsPart(Asks):
    def forward(self, x):
        y = self.block(x)
        return y + self.block.conv(x) if not self.asks(x) else y


class ReadsWeight(Asks):
    def forward(self, x):
        return x if self.asks(x) else self.block(x) * self.block.conv.weight.sum()


class PassesFlag(Asks):
    def __init__(self):
        super().__init__()
        self.block = Flag()

    def forward(self, x):
        return x if self.asks(x) else self.block(x, normalize=False)


class InMethod(Asks):
    def part(self, x):
        conv = self.block.conv
        return conv(x)

    def forward(self, x):
        return x if self.asks(x) else self.block(x) + self.part(x)


class ByString(Asks):
    def forward(self, x):
        return x if self.asks(x) else self.block(x) + getattr(self.block, "conv")(x)  # noqa: B009


class Walks(Asks):
    def forward(self, x):
        return x if self.asks(x) else self.block(x) * sum(p.sum() for p in self.parameters())


class Aliased(Asks):
    def __init__(self):
        super().__init__()
        self.block = N.Sequential(N.Conv2d(3, 3, 1), N.BatchNorm2d(3))

    def forward(self, x):
        block = self.block
        return x if self.asks(x) else block(x) + block[0](x)


class Indexed(Aliased):
    def forward(self, x):
        return x if self.asks(x) else self.block(x) + self.block[0](x)


class Through(Asks):
    """Reaches through a module that is not traced either."""

    def __init__(self):
        super().__init__()
        self.inner = CallsBlock()
        self.inner.block = N.Sequential(N.Conv2d(3, 3, 1), N.BatchNorm2d(3))
        self.block = N.ReLU()

    def forward(self, x):
        return x if self.asks(x) else self.inner(x) + self.inner.block[0](x)


class ByBase(CallsPart):
    def forward(self, x):
        return super().forward(x)


class Taps(Aliased):
    """As for a perceptual loss: all that comes by is taken."""

    def forward(self, x):
        if self.asks(x):
            return x
        total = 0.0
        for layer in self.block:
            x = layer(x)
            total = total + x
        return total


class InList(Asks):
    def __init__(self):
        super().__init__()
        self.block = N.ModuleList([Attribute(), Attribute()])

    def forward(self, x):
        if self.asks(x):
            return x
        for layer in self.block:
            x = layer(x) + layer.conv(x)
        return x


class ListOfLists(Asks):
    def __init__(self):
        super().__init__()
        self.block = N.ModuleList([N.Sequential(N.Conv2d(3, 3, 1), N.BatchNorm2d(3))])

    def forward(self, x):
        if self.asks(x):
            return x
        for block in self.block:
            total = 0.0
            for layer in block:
                x = layer(x)
                total = total + x
        return total


class Hidden(Asks):
    """A reference that torch does not know of."""

    def __init__(self):
        super().__init__()
        object.__setattr__(self.also, "secret", self.block.conv)

    def forward(self, x):
        return x if self.asks(x) else self.block(x) + self.also.secret(x)


class HiddenInList(Hidden):
    def __init__(self):
        super().__init__()
        del self.also.secret
        self.also.secrets = {"of": [self.block.conv]}

    def forward(self, x):
        return x if self.asks(x) else self.block(x) + self.also.secrets["of"][0](x)


class HiddenWeight(Hidden):
    def __init__(self):
        super().__init__()
        del self.also.secret
        self.also.__dict__["w"] = self.block.conv.weight

    def forward(self, x):
        return x if self.asks(x) else self.block(x) * self.also.w.sum()


REACHING = [
    *(CallsPart, ReadsWeight, PassesFlag, InMethod, ByString, Walks, Aliased, Indexed, Taps),
    *(Through, ByBase),
    *(InList, ListOfLists, Hidden, HiddenInList, HiddenWeight),
]


@pytest.mark.parametrize("kind", REACHING)
def test_what_code_reaches_that_is_not_traced_is_left(kind):
    model = settled(kind())
    plan = fold_plan(model)
    assert plan.left
    assert not plan.folded
    folded = fold(model)
    assert is_float64s(folded, model, images())


def test_a_forward_without_source_is_not_seen():
    scope = {"Asks": Asks}
    body = "return x if self.asks(x) else self.block(x)"
    exec(f"class Unread(Asks):\n    def forward(self, x):\n        {body}", scope)
    assert "the code cannot be read" in fold_plan(settled(scope["Unread"]())).left[0].why


def test_a_forward_that_was_replaced_is_not_seen():
    model = settled(CallsBlock())
    model.forward = lambda x: model.block.conv(x)
    assert "the forward was replaced" in fold_plan(model).left[0].why
    x = images()
    want = model(x)
    torch.testing.assert_close(fold(model, inplace=True)(x), want, rtol=0, atol=0)


class CallsBlock(Asks):
    def __init__(self):
        super().__init__()
        self.maybe = None

    def forward(self, x):
        if self.asks(x):
            return x
        y = self.also(self.block(x))
        return y if self.maybe is None else self.maybe(y)


class CallsList(Asks):
    def __init__(self):
        super().__init__()
        self.block = N.ModuleList([Attribute(), Attribute(), Attribute()])

    def forward(self, x):
        if self.asks(x):
            return x
        for i, layer in enumerate(self.block):
            x = layer(x) + i
        return torch.stack([layer(x) for layer in self.block]).sum(0) + self.block[0](x)


class CallsFunctional(Asks):
    """A name that is a module's as well as torch's."""

    def __init__(self):
        super().__init__()
        self.block = N.Sequential()
        self.block.relu = N.Conv2d(3, 3, 1)
        self.block.bn = N.BatchNorm2d(3)

    def forward(self, x):
        return x if self.asks(x) else torch.relu(self.block(x))


@pytest.mark.parametrize("kind", [CallsBlock, CallsList, CallsFunctional])
def test_what_is_only_called_is_folded(kind):
    model = settled(kind())
    plan = fold_plan(model)
    assert plan.folded
    assert not plan.left
    folded = fold(model)
    assert is_float64s(folded, model, images())


# ---- Dimensions --------------------------------------------------------------------------------


def test_the_plan_names_other_dimensions():
    linear = settled(N.Sequential(N.Linear(5, 4), N.BatchNorm1d(4)))
    (note,) = fold_plan(linear).notes
    assert "where 1 stood, the folded model takes (N, C) behind a linear layer" in note
    assert note in str(fold_plan(linear))
    with pytest.raises(ValueError, match="expected 2 dimensions"):
        fold(linear)(torch.randn(2, 4, 5))
    convolution = settled(N.Sequential(N.Conv2d(3, 4, 1), N.BatchNorm2d(4)))
    (note,) = fold_plan(convolution).notes
    assert "where 1 stood, the folded model also takes a map without a batch" in note
    with pytest.raises(ValueError, match="expected 4D input"):
        convolution(images()[0])
    assert fold(convolution)(images()[0]).shape == (4, 6, 7)
    assert not fold_plan(N.Sequential(N.BatchNorm2d(4))).notes
