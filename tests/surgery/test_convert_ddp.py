"""A converted model trains under DistributedDataParallel as the original does."""

import copy

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import normdrop

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch without torch.distributed"
)

STEPS, BATCH = 2, 16


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(3)
        self.conv2 = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + x)


def network():
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Flatten(), nn.Linear(3 * 8 * 8, 4))


def train(model, shard):
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for number in range(STEPS):
        x = torch.randn(BATCH, 3, 8, 8, generator=torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        model(x[shard]).square().mean().backward()
        optimizer.step()


def worker(rank, size, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size
    )
    shard = slice(rank * BATCH // size, (rank + 1) * BATCH // size)
    original = network()
    # One is converted before it is wrapped, the other inside the wrapper.
    models = [normdrop.convert(copy.deepcopy(original)), copy.deepcopy(original), original]
    wrapped = [DistributedDataParallel(model) for model in models]
    normdrop.convert(wrapped[1])
    for model in wrapped:
        train(model, shard)
    torch.save([model.state_dict() for model in models], f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_two_processes_train_as_with_the_original(tmp_path):
    torch.multiprocessing.spawn(worker, (2, str(tmp_path)), nprocs=2)
    states = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for converted, inside, original in states:
        torch.testing.assert_close(converted, original, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(inside, original, rtol=1e-4, atol=1e-4)
    # Every process has the same weights, and statistics of its own shard.
    first, second = (state[0] for state in states)
    assert torch.equal(first["0.conv1.weight"], second["0.conv1.weight"])
    assert not torch.equal(first["0.conv1.weight"], network()[0].conv1.weight)
    assert not torch.equal(first["1.bn2.running_mean"], second["1.bn2.running_mean"])
