"""memory="low" with the rest of PyTorch: the same bits as without, or it steps aside."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import normdrop
from normdrop.memory import recompute
from normdrop.memory.low import is_saving_memory, save_memory

pytestmark = pytest.mark.skipif(
    not normdrop.has_kernels(), reason="outputs of the kernel are computed again"
)


@pytest.fixture
def trio(pair):
    """Ours, the same with low memory, and a count of what is computed again."""

    def make(**options):
        ours, _ = pair(**options)
        return ours, save_memory(copy.deepcopy(ours))

    return make


@pytest.fixture
def again(monkeypatch):
    """A list that grows with every output that is computed again."""
    calls = []
    values = recompute.Output.values

    def counted(self):
        calls.append(self)
        return values(self)

    monkeypatch.setattr(recompute.Output, "values", counted)
    return calls


def check_same(ours, low):
    for (name, one), two in zip(ours.named_parameters(), low.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad), name
    torch.testing.assert_close(ours.state_dict(), low.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(trio, images, step, again, dtype):
    ours, low = trio()
    x = images()
    for model in (ours, low):
        with torch.autocast("cpu", dtype):
            y = model(x)
        y.float().sin().sum().backward()
    assert again
    check_same(ours, low)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_around(trio, images, step, reentrant):
    ours, low = trio(drop=0.5)
    x = images().requires_grad_()
    for model in (ours, low):
        torch.manual_seed(1)
        step(lambda x, model=model: checkpoint(model, x, use_reentrant=reentrant), x)
    check_same(ours, low)
    assert recompute.active() is None


class Outer(torch.nn.Module):
    """One part in a checkpoint and one not."""

    def __init__(self, inner, reentrant):
        super().__init__()
        self.first, self.second = (
            inner,
            torch.nn.Sequential(
                torch.nn.Conv2d(3, 3, 3), normdrop.nn.BatchNorm2d(3), torch.nn.Conv2d(3, 3, 3)
            ),
        )
        self.reentrant = reentrant

    def forward(self, x):
        aside = self.second(x).mean()
        return checkpoint(self.first, x, use_reentrant=self.reentrant) + aside


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_within(pair, step, again, reentrant):
    inner, _ = pair()
    ours = Outer(inner, reentrant)
    low = save_memory(copy.deepcopy(ours))
    x = torch.randn(16, 3, 24, 24, requires_grad=True)
    for model in (ours, low):
        step(model, x)
    assert len(again) == 1  # that of the part outside
    check_same(ours, low)
    assert recompute.active() is None


def test_saving_on_cpu_decides_itself(trio, images, step, again):
    ours, low = trio()
    x = images()
    step(ours, x)
    with torch.autograd.graph.save_on_cpu():
        step(low, x)
    assert not again
    check_same(ours, low)


def test_gradient_accumulation(trio, images, step, again):
    ours, low = trio()
    x = images(32)
    for model in (ours, low):
        with normdrop.accumulate(model):
            for part in x.chunk(2):
                step(model, part)
    assert again
    check_same(ours, low)


def test_func_steps_aside(trio, images, again):
    ours, low = trio()
    x = images()

    def loss(parameters, model):
        return torch.func.functional_call(model, parameters, (x,)).sin().sum()

    found = [torch.func.grad(loss)(dict(m.named_parameters()), m.eval()) for m in (ours, low)]
    assert not again
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name])


def test_functional_call_saves(trio, images, step, again):
    """No transform of torch.func's, only other parameters."""
    _, low = trio()
    parameters = {name: p.detach().requires_grad_() for name, p in low.named_parameters()}
    step(lambda x: torch.func.functional_call(low, parameters, (x,)), images())
    assert again
    assert all(p.grad is not None for p in parameters.values())


@pytest.mark.parametrize("pair", ["written"], indirect=True)
def test_compile_steps_aside(pair, images, step, again):
    ours, _ = pair()
    low = save_memory(copy.deepcopy(ours))
    x = images()
    for model in (ours, low):
        torch._dynamo.reset()
        step(torch.compile(model, backend="aot_eager", fullgraph=True), x)
    assert not again
    check_same(ours, low)


@pytest.mark.parametrize("pair", ["written"], indirect=True)
@pytest.mark.parametrize("strict", [False, True])
def test_export_steps_aside(pair, images, strict):
    ours, _ = pair()
    low = save_memory(copy.deepcopy(ours)).eval()
    exported = torch.export.export(low, (images(),), strict=strict).module()
    x = images()
    torch.testing.assert_close(exported(x), ours.eval()(x))


def test_saved_and_copied_models_save_too(trio, images, tmp_path, step, again):
    _, low = trio()
    torch.save(low, tmp_path / "model.pt")
    for other in (torch.load(tmp_path / "model.pt", weights_only=False), copy.deepcopy(low)):
        assert is_saving_memory(other)
        step(other, images())
        assert again
        again.clear()


PROCESS = """
import sys
import torch
import normdrop
from normdrop import networks
from torch.nn.parallel import DistributedDataParallel

torch.set_num_threads(1)
rank, meeting = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", meeting, rank=rank, world_size=2)
found = []
for memory in ("normal", "low"):
    torch.manual_seed(0)
    network = networks.resnet(8, width=8, memory=memory)
    model = DistributedDataParallel(network)
    torch.manual_seed(rank)
    for _ in range(2):
        model(torch.randn(8, 3, 32, 32)).sin().sum().backward()
    found.append([*(p.grad for p in network.parameters()), *network.buffers()])
assert all(map(torch.equal, *found))
torch.distributed.destroy_process_group()
"""


def test_two_processes_of_ddp(tmp_path):
    meeting = f"file://{tmp_path}/meeting"
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error::UserWarning", "-c", PROCESS, str(rank), meeting],
            env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        try:
            _, errors = process.communicate(timeout=120)
        finally:
            process.kill()
        assert process.returncode == 0, errors
