"""Bytes that autograd keeps for backward, against PyTorch's own.

Counted by saved_tensors_hooks: every storage that autograd saves, once, parameters and buffers left
out. No clock: the figures are the same on every machine.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import normdrop.nn
import operators
import runner
from normdrop import networks
from operators import OurReLUDropout, TorchAddReLU, TorchReLU, TorchReLUDropout, our_norm

COLUMNS = ("work", "shape", "dtype", "provider", "bytes", "elements", "bytes_per_element")
KEYS = COLUMNS[:4]


def kept_bytes(module: torch.nn.Module, *inputs: Tensor) -> int:
    """Bytes of all storages that a forward of the module saves for backward."""
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    kept: dict[int, int] = {}
    alive = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # else its address could be given out again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = module(*inputs)
    del y
    return sum(kept.values())


class _Add(torch.nn.Module):
    def __init__(self, shape: operators.Shape) -> None:
        super().__init__()
        self.norm = our_norm(shape, "relu")

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        y: Tensor = self.norm(x, residual)
        return y


LAYERS: tuple[tuple[str, int, Callable[..., Any], Callable[..., Any]], ...] = (
    ("BN+ReLU", 1, TorchReLU, lambda shape: our_norm(shape, "relu")),
    ("BN+add+ReLU", 2, TorchAddReLU, _Add),
    ("BN+ReLU+dropout", 1, TorchReLUDropout, OurReLUDropout),
    (
        "dropout",
        1,
        lambda shape: torch.nn.Dropout(0.5),
        lambda shape: normdrop.nn.Dropout(0.5),
    ),
)


def layer_rows(shape: operators.Shape) -> Iterator[runner.Row]:
    for dtype in (torch.float32, torch.bfloat16):
        for work, inputs, theirs, ours in LAYERS:
            for provider, make in (("torch", theirs), ("normdrop", ours)):
                given = [torch.randn(shape).to(dtype).requires_grad_() for _ in range(inputs)]
                yield _row(work, shape, dtype, provider, kept_bytes(make(shape), *given))


def network_rows(depth: int, shape: operators.Shape) -> Iterator[runner.Row]:
    """The same network with ours and with torch's batch normalization."""
    x = torch.randn(shape)
    torch.manual_seed(0)
    network = networks.build(
        f"resnet{depth}", classes=1000 if depth > 44 else 10, input_shape=shape[1:]
    ).train()
    work = f"ResNet-{depth}"
    yield _row(work, shape, torch.float32, "normdrop", kept_bytes(network, x))
    yield _row(work, shape, torch.float32, "torch", kept_bytes(_TorchLayers(network), x))


class _TorchLayers(torch.nn.Module):
    """A network of ours whose batch normalization is torch's, addition and ReLU in place."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        for parent in list(network.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, normdrop.nn.BatchNorm2d):
                    setattr(parent, name, _TorchNorm(child))
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.network(x)
        return y


class _TorchNorm(torch.nn.Module):
    def __init__(self, ours: normdrop.nn.BatchNorm2d) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm2d(ours.num_features)
        self.has_relu = ours.activation == "relu"

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y: Tensor = self.norm(x)
        if residual is not None:
            y = y.add_(residual)
        return torch.nn.functional.relu_(y) if self.has_relu else y


def _row(
    work: str, shape: operators.Shape, dtype: torch.dtype, provider: str, count: int
) -> runner.Row:
    elements = 1
    for extent in shape:
        elements *= extent
    return {
        "work": work,
        "shape": operators.shape_name(shape),
        "dtype": operators.dtype_name(dtype),
        "provider": provider,
        "bytes": count,
        "elements": elements,
        "bytes_per_element": count / elements,
    }


def table(rows: Sequence[runner.Row]) -> str:
    """Bytes an element for layers, megabytes for networks."""
    lines = []
    seen = {(row["work"], row["shape"], row["dtype"]) for row in rows}
    for work, shape, dtype in sorted(seen, key=lambda k: (k[0].startswith("ResNet"), k)):
        found = {
            row["provider"]: row
            for row in rows
            if (row["work"], row["shape"], row["dtype"]) == (work, shape, dtype)
        }
        if "torch" not in found or "normdrop" not in found:
            continue
        lines.append(
            [
                f"{work} ({shape.replace('x', ', ')}), {dtype}",
                *(_amount(found[name], work) for name in ("torch", "normdrop")),
            ]
        )
    return runner.markdown(["kept for backward", "torch", "normdrop"], lines)


def _amount(row: runner.Row, work: str) -> str:
    if work.startswith("ResNet"):
        return f"{row['bytes'] / 1e6:.0f} MB"
    return f"{row['bytes_per_element']:.2f} bytes an element"


def main(argv: Sequence[str] | None = None) -> int:
    options = runner.parse("Count the bytes that autograd keeps for backward.", argv)
    runner.print_machine()
    layers = (2, 3, 4, 4) if options.quick else (32, 64, 56, 56)
    depths = (8,) if options.quick else (20, 50)
    rows = []
    if re.search(options.filter, "layers"):
        rows += layer_rows(layers)
    for depth in depths:
        if re.search(options.filter, f"resnet{depth}"):
            shape = (8, 3, 224, 224) if depth == 50 else (2 if options.quick else 128, 3, 32, 32)
            rows += network_rows(depth, shape)
    for row in rows:
        print(
            f"  {row['work']:18}{row['shape']:16}{row['dtype']:10}{row['provider']:22}"
            f"{row['bytes'] / 1e6:10.2f} MB {row['bytes_per_element']:10.2f} bytes an element"
        )
    path = options.output / "memory.csv"
    merged = runner.merge(path, rows, COLUMNS, KEYS)
    if options.output.resolve() == runner.RESULTS:
        runner.write_section("memory", table(merged))
    print(f"\n{path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
