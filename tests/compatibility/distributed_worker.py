"""One of two processes that train a network together; test_distributed.py starts them.

Usage: python distributed_worker.py FOLDER RANK. FOLDER holds start.pt: the weights of every kind of
network and every process's batches. What came out is written to FOLDER/RANK.pt.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

import normdrop


def load_networks() -> Any:
    """The networks of conftest.py, which is not importable by name here."""
    spec = importlib.util.spec_from_file_location(
        "networks_of_conftest", Path(__file__).with_name("conftest.py")
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wrap(how: str, model: torch.nn.Module) -> torch.nn.Module:
    """The model, distributed."""
    if how == "ddp":
        return DDP(model)
    if how == "fsdp1":
        return FSDP(model, use_orig_params=True, device_id=torch.device("cpu"))
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    if how == "fsdp2, every layer":
        for layer in [m for m in model.modules() if not list(m.children())]:
            if list(layer.parameters()):
                fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def whole(how: str, model: torch.nn.Module) -> dict[str, Tensor]:
    """All parameters and this process's buffers, gathered where they lie in pieces."""
    if how == "ddp":
        return {name: t.detach().clone() for name, t in model.module.state_dict().items()}
    if how == "fsdp1":
        with FSDP.summon_full_params(model):
            state = {name: p.detach().clone() for name, p in model.named_parameters()}
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        return {
            name.replace("_fsdp_wrapped_module.", ""): t for name, t in (state | buffers).items()
        }
    return {
        name: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone()
        for name, t in model.state_dict().items()
    }


def train(how: str, model: torch.nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """The state after a step of SGD for every batch."""
    model = wrap(how, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x in batches:
        optimizer.zero_grad()
        model(x).sin().mean().backward()
        optimizer.step()
    return whole(how, model)


def accumulate(model: torch.nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """One step of SGD for all batches, whose gradients meet at the last."""
    model = DDP(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with normdrop.accumulate(model):
        with model.no_sync():
            for x in batches[:-1]:
                model(x).sin().mean().backward()
        model(batches[-1]).sin().mean().backward()
    optimizer.step()
    return whole("ddp", model)


def two_forwards(model: torch.nn.Module, batches: list[Tensor]) -> dict[str, Tensor]:
    """One step of SGD for all batches in one backward."""
    model = DDP(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.stack([model(x).sin().mean() for x in batches]).sum().backward()
    optimizer.step()
    return whole("ddp", model)


def main(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    networks = load_networks()
    start = torch.load(folder / "start.pt")
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    results = {}
    for kind, weights in start["weights"].items():
        batches = start["batches"][rank]

        def make(how="", kind=kind, weights=weights):
            # fully_shard takes contiguous parameters only, so none in channels_last.
            is_sharded_network = kind == "network" and how.startswith("fsdp2")
            options = {"layout": "keep"} if is_sharded_network else {}
            model = networks.make_pair(kind, **options)[0]
            model.load_state_dict(weights)
            return model

        for how in ("ddp", "fsdp1", "fsdp2", "fsdp2, every layer"):
            results[kind, how] = train(how, make(how), batches)
        results[kind, "frozen"] = train("ddp", make().eval(), batches[:1])
        results[kind, "two forwards"] = two_forwards(make(), batches)
        results[kind, "accumulate"] = accumulate(make(), batches)
    torch.save(results, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
