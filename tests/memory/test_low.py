"""memory="low": less is kept for backward, and the gradients have the same bits."""

import copy
import gc
import pickle
import threading
import warnings

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import normdrop
from normdrop import networks
from normdrop.memory import recompute
from normdrop.memory.low import is_saving_memory, restore_memory, save_memory
from normdrop.ops import batch_norm

pytestmark = pytest.mark.skipif(
    not normdrop.has_kernels(), reason="outputs of the kernel are computed again"
)


class Alive(TorchDispatchMode):
    """Counts the bytes of all storages that operators made and that are not freed yet."""

    def __init__(self, *without):
        super().__init__()
        self.found = {}
        self.without = {t.untyped_storage()._cdata for t in without}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                if storage._cdata not in self.without:
                    self.found[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def bytes(self):
        return sum(size for storage, size in self.found.values() if not storage.expired())


def kept(model, x):
    with Alive(*model.parameters(), *model.buffers(), x) as alive:
        y = model(x)
    count = alive.bytes()
    del y
    return count


def step(model, x, *, seed=0, autocast=False):
    """Loss, gradients and buffers of one step."""
    torch.manual_seed(seed)
    model.zero_grad()
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(x).float().square().mean()
    loss.backward()
    return [loss.detach(), x.grad, *(p.grad for p in model.parameters()), *model.buffers()]


def gradients(model, x):
    """Of the parameters alone."""
    step(model, x)
    return [p.grad for p in model.parameters()]


def same(a, b):
    return all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


class Stem(torch.nn.Module):
    """BN, a pooling, and a chain of residual blocks, small."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.bn = normdrop.nn.BatchNorm2d(8, activation="relu")
        self.pool = torch.nn.MaxPool2d(3, 2, 1)
        self.convs = torch.nn.ModuleList(torch.nn.Conv2d(8, 8, 3, padding=1) for _ in range(4))
        self.norms = torch.nn.ModuleList(
            normdrop.nn.BatchNorm2d(8, activation="relu") for _ in range(4)
        )

    def forward(self, x):
        x = self.pool(self.bn(self.conv(x)))
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x), residual=x)
        return x.mean((2, 3))


def dropped() -> torch.nn.Module:
    """Dropout after every activation, as a part of batch normalization's operator."""
    layers = []
    for inputs in (3, 8, 8, 8):
        layers.append(torch.nn.Conv2d(inputs, 8, 3, padding=1))
        layers += [torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Dropout(0.3)]
    return normdrop.convert(torch.nn.Sequential(*layers, torch.nn.Conv2d(8, 1, 3)))


NETWORKS = {
    "residual blocks with padded shortcuts": lambda: networks.resnet(8, width=8),
    "bottlenecks": lambda: networks.resnet(50, width=4, stem="small"),
    "pooling": Stem,
    "vgg": lambda: networks.vgg(11, 10, width=4, hidden=16, pool=1, keep_hidden=0.5),
    "dropout": lambda: networks.mlp((3072, 512, 512, 10), keep_hidden=0.5),
    "dropout in the operator": dropped,
}


@pytest.fixture(params=NETWORKS.values(), ids=NETWORKS.keys())
def network(request):
    torch.manual_seed(1)
    return request.param()


def batch(layout=torch.contiguous_format):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(4, 3, 32, 32, generator=generator).contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_gradients_have_the_same_bits(network, layout, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        network = network.to(memory_format=layout)
        low = save_memory(copy.deepcopy(network))
        for seed in (0, 1):
            assert same(
                step(network, batch(layout), seed=seed), step(low, batch(layout), seed=seed)
            )
    finally:
        torch.set_num_threads(before)


def test_gradients_have_the_same_bits_under_autocast(network):
    low = save_memory(copy.deepcopy(network))
    assert same(step(network, batch(), autocast=True), step(low, batch(), autocast=True))


def test_gradients_have_the_same_bits_in_evaluation(network):
    step(network, batch())
    low = save_memory(copy.deepcopy(network).eval())
    assert same(step(network.eval(), batch()), step(low, batch()))


def test_less_is_kept(network):
    low = save_memory(copy.deepcopy(network))
    assert kept(low, batch()) < 0.8 * kept(network, batch())


def test_a_chain_of_blocks_keeps_its_inputs_alone():
    """Of conv → BN → ReLU, x is kept and y is not, nor the pooled map, nor where its maxima lay."""
    low = save_memory(Stem())
    maps = 4 * 8 * 4 * (32 * 32 + 4 * 16 * 16)
    assert maps < kept(low, batch()) < 1.06 * maps


def test_outputs_are_freed_after_backward_without_the_garbage_collector(network):
    low = save_memory(network)
    x = batch()
    gc.disable()
    try:
        with Alive(*low.parameters(), *low.buffers(), x) as alive:
            y = low(x).sum()
            y.backward()
            low.zero_grad()
            del y
        left = alive.bytes()
    finally:
        gc.enable()
    assert left < 4000  # what the network itself holds: the counters of batches


def test_recomputed_outputs_are_cached_until_their_last_use_and_no_longer(monkeypatch):
    low = save_memory(Stem())
    calls = []
    again = batch_norm._again

    def counted(*args):
        calls.append(1)
        return again(*args)

    monkeypatch.setattr(batch_norm, "_again", counted)
    low(batch()).sum().backward()
    # One for each of the five layers but the last, whose output nothing saves.
    assert len(calls) == 4


def test_backward_twice_through_the_same_graph(network):
    low = save_memory(copy.deepcopy(network))
    torch.manual_seed(0)
    loss = low(batch()).square().mean()
    first = torch.autograd.grad(loss, list(low.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(low.parameters()))
    assert same(first, second)
    assert same(first, gradients(network, batch()))


def test_a_part_of_the_gradients_then_all(network):
    low = save_memory(network)
    torch.manual_seed(0)
    loss = low(batch()).square().mean()
    parameters = list(low.parameters())
    (part,) = torch.autograd.grad(loss, parameters[-1:], retain_graph=True)
    whole = torch.autograd.grad(loss, parameters)
    assert torch.equal(part, whole[-1])


def test_second_derivatives(network):
    def penalty(model):
        torch.manual_seed(0)
        x = batch().double().requires_grad_()
        (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), list(model.parameters()), allow_unused=True)

    network = network.double()
    ours, theirs = penalty(save_memory(copy.deepcopy(network))), penalty(network)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


def test_backward_in_another_thread(network):
    low = save_memory(copy.deepcopy(network))
    before = torch.get_num_threads()

    def backward(loss):
        torch.set_num_threads(1)  # a new thread has its own number, and sums depend on it
        loss.backward()

    try:
        for model in (network, low):
            torch.manual_seed(0)
            torch.set_num_threads(1)
            loss = model(batch()).square().mean()
            thread = threading.Thread(target=backward, args=(loss,))
            thread.start()
            thread.join()
    finally:
        torch.set_num_threads(before)
    assert same([p.grad for p in low.parameters()], [p.grad for p in network.parameters()])


class InPlace(torch.nn.Module):
    """Changes the output of batch normalization in place, before or after the next layer."""

    def __init__(self, when):
        super().__init__()
        self.bn = normdrop.nn.BatchNorm2d(3)
        self.conv = torch.nn.Conv2d(3, 3, 1)
        self.when = when

    def forward(self, x):
        y = self.bn(x)
        if self.when == "before":
            y.mul_(2)
        elif self.when == "view before":
            y[:, 0].mul_(2)
        z = self.conv(y)
        if self.when == "weights":
            with torch.no_grad():
                self.conv.weight.mul_(2)
        return z


@pytest.mark.parametrize("when", ["before", "view before"])
def test_an_output_that_is_changed_in_place_is_kept(when):
    torch.manual_seed(0)
    plain = InPlace(when)
    low = save_memory(copy.deepcopy(plain))
    assert same(step(plain, batch()), step(low, batch()))


def test_a_kept_tensor_that_is_changed_in_place_is_refused_as_by_torch():
    message = "modified by an inplace operation"
    for model in (InPlace("weights"), save_memory(InPlace("weights"))):
        with pytest.raises(RuntimeError, match=message):
            model(batch()).sum().backward()


class Views(torch.nn.Module):
    """The next layers save views of the output: flattened, a slice, transposed, detached."""

    def __init__(self):
        super().__init__()
        self.bn = normdrop.nn.BatchNorm2d(3, activation="relu")
        self.fc = torch.nn.Linear(3072, 5)
        self.conv = torch.nn.Conv2d(2, 2, 3)

    def forward(self, x):
        y = self.bn(x)
        z = self.fc(y.flatten(1)).sum() + self.conv(y[:, 1:]).square().sum()
        return z + (y.transpose(2, 3) * y.detach()).sum() + (y * 2).square().sum()


def _exchange(norm):
    for parameter in norm.parameters():
        parameter.data = parameter.data * 3.0 + 1.0


def _put_into_one_vector(norm):
    vector = torch.nn.utils.parameters_to_vector(norm.parameters()).detach() * 3.0
    torch.nn.utils.vector_to_parameters(vector, norm.parameters())


def _write(norm):
    norm.weight.data.mul_(3.0)


def _turn_round(norm):
    norm.bias.data.copy_(norm.bias.data.flip(0))


def _before_a_norm(training):
    torch.manual_seed(0)
    plain = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3)
    ).train(training)
    torch.nn.init.uniform_(plain[1].bias)
    low = normdrop.convert(copy.deepcopy(plain), memory="low")
    x = torch.randn(16, 3, 20, 20)
    assert kept(low, x) < kept(normdrop.convert(copy.deepcopy(plain)), x)
    return plain, low, x


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("change", [_exchange, _put_into_one_vector])
def test_gradients_are_those_of_the_forward_though_data_was_exchanged_since(change, training):
    plain, low, x = _before_a_norm(training)
    grads = []
    for model, then in ((low, change), (plain.double(), lambda norm: None)):
        y = model(x.to(next(model.parameters()).dtype))
        then(model[1])
        y.sin().sum().backward()
        grads.append([p.grad.double() for p in model.parameters()])
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("change", [_write, _turn_round])
def test_a_norm_that_was_written_past_its_version_is_refused(change, training):
    _, low, x = _before_a_norm(training)
    y = low(x)
    change(low[1])
    with pytest.raises(RuntimeError, match=r"written through its `\.data`"):
        y.sum().backward()


@pytest.mark.parametrize("training", [True, False])
def test_a_model_can_be_traced_by_torch_jit_with_gradients(training):
    """As TensorBoard's add_graph and OpenVINO's converter do."""
    model = normdrop.convert(
        torch.nn.Sequential(
            *(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU()),
            *(torch.nn.MaxPool2d(2), torch.nn.Conv2d(4, 2, 3)),
        ),
        memory="low",
    ).train(training)
    x = torch.randn(8, 3, 20, 20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.jit's own end
        traced = torch.jit.trace(model, (x,))
        again = torch.jit.trace(model, (x,))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    for other in (traced, again):
        model.load_state_dict(before)
        want = model(x)
        model.load_state_dict(before)
        torch.testing.assert_close(other(x), want)
    model.load_state_dict(before)
    expected = gradients(model, x)
    assert all(gradient is not None for gradient in expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_views_of_an_output(layout):
    plain = Views()
    low = save_memory(copy.deepcopy(plain))
    x = batch(layout)
    assert same(step(plain, x), step(low, x))


def test_a_residual_that_nothing_else_keeps_is_not_kept_instead():
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 3, 1)
            self.bn = normdrop.nn.BatchNorm2d(3, activation="relu")
            self.last = torch.nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.last(self.bn(self.conv(x), residual=x + 1))

    plain = Odd()
    low = save_memory(copy.deepcopy(plain))
    assert kept(low, batch()) == kept(plain, batch())
    assert same(step(plain, batch()), step(low, batch()))


def test_nothing_happens_without_gradients(network, monkeypatch):
    low = save_memory(network)

    def refuse(*_):
        raise AssertionError

    monkeypatch.setattr(recompute, "Recorder", refuse)
    with pytest.raises(AssertionError):
        low(batch())
    with torch.no_grad():
        low(batch())


def test_other_hooks_decide_where_they_are(network):
    low = save_memory(copy.deepcopy(network))
    expected = gradients(network, batch())
    packed = []

    def pack(t):
        packed.append(t.shape)
        return t.detach()

    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = low(batch()).square().mean()
    loss.backward()
    assert packed
    assert same([p.grad for p in low.parameters()], expected)


def test_saving_within_a_model_that_saves():
    torch.manual_seed(0)
    plain = Stem()
    inner = copy.deepcopy(plain)
    outer = save_memory(torch.nn.Sequential(save_memory(inner)))
    assert same(step(plain, batch()), step(outer, batch()))
    assert kept(outer, batch()) == kept(save_memory(plain), batch())
    assert not list(restore_memory(outer)[0]._forward_pre_hooks)
    assert recompute.active() is None


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_forward_that_is_left_early_leaves_no_hooks(error):
    class Failing(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fails = True
            self.stem = Stem()

        def forward(self, x):
            x = self.stem(x)
            if self.fails:
                raise error
            return x

    model = save_memory(Failing())
    with pytest.raises(error):
        model(batch())
    model.fails = False
    model(batch()).sum().backward()
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    assert recompute.active() is None


def test_copies_and_pickles_save_too_and_undoing_leaves_nothing():
    model = Stem()
    hooks = [dict(vars(m)) for m in model.modules()]
    save_memory(save_memory(model))
    assert len(model._forward_pre_hooks) == 1
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert is_saving_memory(other)
        assert kept(other, batch()) == kept(model, batch())
    assert not is_saving_memory(restore_memory(model))
    for module, before in zip(model.modules(), hooks, strict=True):
        for name in ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called"):
            assert vars(module)[name] == before[name] == {}


def test_an_output_lives_no_longer_than_without():
    """The note of an output does not hold it."""

    class Watched(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = normdrop.nn.BatchNorm2d(3)
            self.conv = torch.nn.Conv2d(3, 3, 1)

        def forward(self, x):
            y = self.bn(x)
            self.seen = StorageWeakRef(y.untyped_storage())
            z = self.conv(y)
            del y
            assert self.seen.expired()
            return z

    save_memory(Watched())(batch()).sum().backward()


def torchs_block():
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(inplace=True),
        torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(8, 8, 3),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(inplace=True),
        torch.nn.Dropout(0.2),
        torch.nn.Conv2d(8, 8, 3),
    )


@pytest.mark.parametrize("fuse", [True, False])
def test_convert_with_low_memory(fuse):
    torch.manual_seed(0)
    theirs = torchs_block()
    plain = normdrop.convert(copy.deepcopy(theirs), fuse=fuse)
    low = normdrop.convert(copy.deepcopy(theirs), fuse=fuse, memory="low")
    assert same(step(plain, batch()), step(low, batch()))
    # Bytes of the maps: convolved, pooled, convolved again; and the output, which always counts.
    x, pooled, y, z = (4 * 8 * side * side * 4 for side in (30, 15, 13, 11))
    assert kept(theirs, batch()) > 2 * x + 3 * pooled + 3 * y
    # An activation that is not fused is no output of batch normalization.
    assert kept(plain, batch()) > x + 3 * pooled + 2 * y
    assert (kept(low, batch()) < 1.05 * (x + y) + z) == fuse


def test_convert_twice_and_revert():
    model = normdrop.convert(torchs_block(), memory="low")
    assert is_saving_memory(normdrop.convert(model))
    assert len(normdrop.convert(model, memory="low")._forward_hooks) == 1
    normdrop.revert(model)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert not is_saving_memory(normdrop.convert(model))


@pytest.mark.parametrize("memory", ["lo", None, True, ["low"]])
def test_another_word_is_refused_before_anything_is_changed(memory):
    model = torchs_block()
    with pytest.raises(
        normdrop.UserError, match='Expected `memory` to be "normal" or "low" but got'
    ):
        normdrop.convert(model, memory=memory)
    assert type(model[1]) is torch.nn.BatchNorm2d


@pytest.mark.parametrize("name", ["mlp", "resnet8", "vgg11", "wide_resnet10_1"])
def test_networks_take_the_option(name):
    shape = (3, 32, 32)
    for memory in ("normal", "low"):
        with torch.device("meta"):
            network = networks.build(name, classes=2, input_shape=shape, memory=memory)
        assert is_saving_memory(network) == (memory == "low")
    message = 'Expected `memory` to be "normal" or "low"'
    with torch.device("meta"), pytest.raises(normdrop.UserError, match=message):
        networks.build(name, classes=2, input_shape=shape, memory="lo")


def test_a_mark_may_be_beyond_int64():
    """Half of all hashes are; each vector has its own."""
    marks = {recompute._mark(torch.randn(8)) for _ in range(64)}
    assert len(marks) == 64
    assert max(marks) >= 2**63 > min(marks)
