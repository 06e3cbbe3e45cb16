"""What a training step keeps for backward, the peak that follows from it, and what less costs.

Kept bytes are those of every storage that operators made in the forward and that autograd's graph
alone still holds when it is over; parameters and buffers are none of them. No clock: the figures
are the same on every machine. The networks are as a user of PyTorch writes them: torch's own,
``convert(model, layout="auto")``, and the same with ``memory="low"``; these two are timed in turn.
Peak memory is the resident set of a process of its own that makes two steps, less what it held
before; there, glibc is told to hand every freed tensor back, as other allocators do by themselves.
"""

from __future__ import annotations

import gc
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import models
import normdrop
import normdrop.nn
import operators
import runner
from operators import OurReLUDropout, TorchAddReLU, TorchReLU, TorchReLUDropout, our_norm

COLUMNS = (
    "work", "shape", "dtype", "provider", "bytes", "elements", "bytes_per_element", "peak_mb",
    "threads", "median_ms", "min_ms", "ratio",
)  # fmt: skip
KEYS = COLUMNS[:4]

TORCH, OURS, LOW = "torch", "normdrop", "normdrop, low"


class Alive(TorchDispatchMode):
    """Knows the storages that operators made, and which of them are not freed yet."""

    def __init__(self) -> None:
        super().__init__()
        self._found: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._found[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def bytes(self, without: Sequence[Tensor]) -> int:
        own = {tensor.untyped_storage()._cdata for tensor in without}
        return sum(
            size
            for cdata, (storage, size) in self._found.items()
            if cdata not in own and not storage.expired()
        )


def kept_bytes(module: torch.nn.Module, *inputs: Tensor) -> int:
    """Bytes of all storages that a forward of the module keeps for backward."""
    with Alive() as alive:
        # Of a copy, nobody but autograd holds the storage.
        y = module(*(tensor.clone() for tensor in inputs))
        graph = y.grad_fn
        del y
        gc.collect()
    count = alive.bytes([*module.parameters(), *module.buffers()])
    del graph
    return count


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


NETWORKS: dict[str, tuple[Callable[[], torch.nn.Module], operators.Shape]] = {
    "ResNet-50": (models.resnet50, (8, 3, 224, 224)),
    "ResNet-18": (models.resnet18, (32, 3, 32, 32)),
    "ResNet-20": (models.resnet20, (128, 3, 32, 32)),
    "VGG-11": (models.VGG11, (16, 3, 64, 64)),
    "DenseNet-40": (models.DenseNet, (64, 3, 32, 32)),
}

QUICK: dict[str, tuple[Callable[[], torch.nn.Module], operators.Shape]] = {
    "ResNet-20": (lambda: models.resnet20(4), (2, 3, 32, 32))
}


def built(make: Callable[[], torch.nn.Module], provider: str) -> torch.nn.Module:
    """The network in training mode, with the weights of all others."""
    torch.manual_seed(0)
    network = make()
    if provider == TORCH:
        return network
    memory: Any = "low" if provider == LOW else "normal"
    return normdrop.convert(network, layout="auto", memory=memory)


def step(network: torch.nn.Module, x: Tensor) -> None:
    """Forward, a loss, backward."""
    network.zero_grad()
    network(x).square().mean().backward()


def network_rows(
    work: str,
    make: Callable[[], torch.nn.Module],
    shape: operators.Shape,
    options: Any,
) -> Iterator[runner.Row]:
    x = torch.randn(shape)
    networks = {provider: built(make, provider) for provider in (TORCH, OURS, LOW)}
    timed = time_in_turn([networks[OURS], networks[LOW]], x, options)
    for provider, network in networks.items():
        row = _row(work, shape, torch.float32, provider, kept_bytes(network, x))
        row["peak_mb"] = "" if options.quick else peak_mb(work, provider)
        if provider != TORCH:
            row |= timed[provider == LOW]
        yield row


def time_in_turn(
    networks: Sequence[torch.nn.Module], x: Tensor, options: Any
) -> list[dict[str, float]]:
    """Milliseconds of a step, and how many times those of the first network it takes."""
    count = max(options.threads)
    with runner.threads(count):
        providers = [runner.Provider("", "", _measure(network, x)) for network in networks]
        samples = [s.seconds[runner.BOTH] for s in runner.run_in_turn(providers, options.repeats)]
    rows = []
    for seconds in samples:
        summary = runner.summary(seconds)
        ratios = (a / b for a, b in zip(seconds, samples[0], strict=True))
        rows.append(
            {
                "threads": count,
                "median_ms": summary["median_ms"],
                "min_ms": summary["min_ms"],
                "ratio": statistics.median(ratios),
            }
        )
    return rows


def _measure(network: torch.nn.Module, x: Tensor) -> runner.Measure:
    def measure(count: int) -> dict[str, float]:
        start = perf_counter_ns()
        for _ in range(count):
            step(network, x)
        return {runner.BOTH: (perf_counter_ns() - start) / count * 1e-9}

    return measure


def peak_mb(work: str, provider: str) -> float:
    """Megabytes that two steps take at most, in a process of its own."""
    found = subprocess.run(
        [sys.executable, __file__, "--peak", work, provider],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"},
    )
    return float(found.stdout)


def print_peak(work: str, provider: str) -> None:
    """What :func:`peak_mb` runs; the network and its input are there before."""
    make, shape = NETWORKS[work]
    network = built(make, provider)
    x = torch.randn(shape)
    gc.collect()
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that from here
    for _ in range(2):
        step(network, x)
    print(_resident("VmHWM") - before)


def _resident(name: str) -> float:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024 / 1e6


def _row(
    work: str, shape: operators.Shape, dtype: torch.dtype, provider: str, count: int
) -> runner.Row:
    elements = 1
    for extent in shape:
        elements *= extent
    row: runner.Row = dict.fromkeys(COLUMNS, "")
    return row | {
        "work": work,
        "shape": operators.shape_name(shape),
        "dtype": operators.dtype_name(dtype),
        "provider": provider,
        "bytes": count,
        "elements": elements,
        "bytes_per_element": count / elements,
    }


def table(rows: Sequence[runner.Row]) -> str:
    """Bytes an element for layers; megabytes and the time for networks."""
    layers, nets = [], []
    for (work, shape, dtype), found in _grouped(rows).items():
        name = f"{work} ({shape.replace('x', ', ')})"
        if work not in NETWORKS and {TORCH, OURS} <= set(found):
            amounts = (f"{found[p]['bytes_per_element']:.2f}" for p in (TORCH, OURS))
            layers.append([f"{name}, {dtype}", *amounts])
        elif {TORCH, OURS, LOW} <= set(found):
            torchs, ours, low = (found[p] for p in (TORCH, OURS, LOW))
            nets.append(
                [
                    name,
                    *(f"{row['bytes'] / 1e6:.0f}" for row in (torchs, ours, low)),
                    f"{low['bytes'] / torchs['bytes']:.2f}",
                    *(f"{float(row['peak_mb'] or 'nan'):.0f}" for row in (torchs, ours, low)),
                    f"{low['ratio']:.2f}",
                ]
            )
    parts = []
    if layers:
        head = ["kept for backward, bytes an element", TORCH, OURS]
        parts.append(runner.markdown(head, sorted(layers)))
    if nets:
        head = ["megabytes", "kept: torch", "normdrop", "low", "low to torch"]
        head += ["peak: torch", "normdrop", "low", "time, low to normdrop"]
        parts.append(runner.markdown(head, nets))
    return "\n\n".join(parts)


def _grouped(rows: Sequence[runner.Row]) -> dict[tuple[str, str, str], dict[str, runner.Row]]:
    groups: dict[tuple[str, str, str], dict[str, runner.Row]] = {}
    for row in rows:
        key = (row["work"], row["shape"], row["dtype"])
        groups.setdefault(key, {})[row["provider"]] = row
    return groups


def _printed(row: runner.Row) -> str:
    text = (
        f"  {row['work']:18}{row['shape']:16}{row['dtype']:10}{row['provider']:14}"
        f"{row['bytes'] / 1e6:10.2f} MB kept, {row['bytes_per_element']:8.2f} bytes an element"
    )
    if row["peak_mb"] != "":
        text += f", peak {row['peak_mb']:.0f} MB"
    if row["ratio"] != "":
        text += f", {row['median_ms']:.1f} ms ({row['ratio']:.3f})"
    return text


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] == ["--peak"]:
        print_peak(*arguments[1:])
        return 0
    options = runner.parse("Count the bytes that autograd keeps for backward.", arguments)
    runner.print_machine()
    rows: list[runner.Row] = []

    def add(new: Iterator[runner.Row]) -> None:
        for row in new:
            print(_printed(row), flush=True)
            rows.append(row)

    if re.search(options.filter, "layers"):
        add(layer_rows((2, 3, 4, 4) if options.quick else (32, 64, 56, 56)))
    for work, (make, shape) in (QUICK if options.quick else NETWORKS).items():
        if re.search(options.filter, work):
            add(network_rows(work, make, shape, options))
    path = options.output / "memory.csv"
    merged = runner.merge(path, rows, COLUMNS, KEYS)
    if options.output.resolve() == runner.RESULTS:
        runner.write_section("memory", table(merged))
    print(f"\n{path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
