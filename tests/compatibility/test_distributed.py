"""DistributedDataParallel and both FSDPs on two processes, against torch's layers in one.

DDP refuses every subclass of torch.nn.SyncBatchNorm on the CPU; ours are none.
"""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WRAPPERS = ["ddp", "fsdp1", "fsdp2", "fsdp2, every layer"]
KINDS = ["written", "converted", "low memory", "network"]

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="torch without gloo",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, make_networks):
    """What both processes got, the networks they began with, and their batches."""
    folder = tmp_path_factory.mktemp("processes")
    torch.manual_seed(3)
    theirs = {kind: make_networks(kind)[1] for kind in KINDS}
    batches = [[torch.randn(16, 3, 12, 12) for _ in range(2)] for _ in range(2)]
    weights = {kind: model.state_dict() for kind, model in theirs.items()}
    torch.save({"weights": weights, "batches": batches}, folder / "start.pt")
    worker = Path(__file__).with_name("distributed_worker.py")
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, worker, folder, str(rank)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)], theirs, batches


def average_gradients(replicas):
    for pair in zip(*(r.parameters() for r in replicas), strict=True):
        mean = torch.stack([p.grad for p in pair]).mean(0)
        for p in pair:
            p.grad = mean.clone()


def train_here(model, batches, broadcast):
    """The same without processes: a replica for each, and the mean of their gradients."""
    replicas = [copy.deepcopy(model) for _ in batches]
    optimizers = [torch.optim.SGD(r.parameters(), lr=0.1) for r in replicas]
    for step in zip(*batches, strict=True):
        if broadcast:
            for mine, first in zip(replicas[1].buffers(), replicas[0].buffers(), strict=True):
                mine.data.copy_(first)
        for replica, x in zip(replicas, step, strict=True):
            replica.zero_grad()
            replica(x).sin().mean().backward()
        average_gradients(replicas)
        for optimizer in optimizers:
            optimizer.step()
    return replicas


def same(states, models):
    for state, model in zip(states, models, strict=True):
        torch.testing.assert_close(state, dict(model.state_dict()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", WRAPPERS)
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_as_two_replicas(trained, kind, how):
    results, theirs, batches = trained
    # DDP sends the first process's buffers to all before each forward.
    replicas = train_here(theirs[kind], batches, broadcast=how == "ddp")
    same([result[kind, how] for result in results], replicas)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_with_frozen_statistics_train_as_one_with_the_whole_batch(trained, kind):
    results, theirs, batches = trained
    model = copy.deepcopy(theirs[kind]).eval()
    model(torch.cat([b[0] for b in batches])).sin().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    same([result[kind, "frozen"] for result in results], [model, model])


@pytest.mark.parametrize("kind", KINDS)
def test_two_forwards_before_one_backward(trained, kind):
    """DDP sends the buffers again before the second forward (pytorch#22095, #175024)."""
    results, theirs, batches = trained
    replicas = [copy.deepcopy(theirs[kind]) for _ in batches]
    for replica, mine in zip(replicas, batches, strict=True):
        sum(replica(x).sin().mean() for x in mine).backward()
    average_gradients(replicas)
    for replica, result in zip(replicas, results, strict=True):
        torch.optim.SGD(replica.parameters(), lr=0.1).step()
        state = result[kind, "two forwards"]
        for name, p in replica.named_parameters():
            torch.testing.assert_close(state[name], p, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_accumulate_as_two_replicas(trained, kind):
    """The first layer's statistics are those of the process's whole batch, and move once."""
    results, theirs, batches = trained
    replicas = [copy.deepcopy(theirs[kind]) for _ in batches]
    for replica, mine in zip(replicas, batches, strict=True):
        for x in mine:
            replica(x).sin().mean().backward()
    average_gradients(replicas)
    for replica, mine, result in zip(replicas, batches, results, strict=True):
        torch.optim.SGD(replica.parameters(), lr=0.1).step()
        state = result[kind, "accumulate"]
        for name, p in replica.named_parameters():
            torch.testing.assert_close(state[name], p, rtol=1e-4, atol=1e-5)
        moved = copy.deepcopy(theirs[kind])
        moved(torch.cat(mine))
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            wanted = moved.get_buffer(f"bn1.{name}")
            torch.testing.assert_close(state[f"bn1.{name}"], wanted, rtol=1e-4, atol=1e-5)
