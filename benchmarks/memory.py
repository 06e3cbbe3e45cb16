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
import math
import os
import re
import statistics
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import perf_counter_ns
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import normdrop
import normdrop.nn
from benchmarks import harness, models, operators
from benchmarks.harness import Benchmark, Section
from benchmarks.operators import OurReLUDropout, TorchAddReLU, TorchReLU, TorchReLUDropout, our_norm

COLUMNS = (
    "work", "shape", "dtype", "provider", "bytes", "elements", "bytes_per_element", "peak_mb",
    "threads", "median_ms", "min_ms", "ratio",
)  # fmt: skip
KEYS = 4

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


def layer_rows(shape: operators.Shape) -> Iterator[harness.Row]:
    for dtype in (torch.float32, torch.bfloat16):
        for work, inputs, theirs, ours in LAYERS:
            for provider, make in (("torch", theirs), ("normdrop", ours)):
                given = [torch.randn(shape).to(dtype).requires_grad_() for _ in range(inputs)]
                yield _row(work, shape, dtype, provider, kept_bytes(make(shape), *given))


class Network(NamedTuple):
    """A network and its batch."""

    work: str
    make: Callable[[], torch.nn.Module]
    shape: operators.Shape

    def __str__(self) -> str:
        return self.work


NETWORKS = (
    Network("ResNet-50", models.resnet50, (8, 3, 224, 224)),
    Network("ResNet-18", models.resnet18, (32, 3, 32, 32)),
    Network("ResNet-20", models.resnet20, (128, 3, 32, 32)),
    Network("VGG-11", models.VGG11, (16, 3, 64, 64)),
    Network("DenseNet-40", models.DenseNet, (64, 3, 32, 32)),
)
QUICK = (Network("ResNet-20", lambda: models.resnet20(4), (2, 3, 32, 32)),)

LAYERS_CASE = "layers"


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


def network_rows(case: Network, options: Namespace) -> Iterator[harness.Row]:
    x = torch.randn(case.shape)
    networks = {provider: built(case.make, provider) for provider in (TORCH, OURS, LOW)}
    timed = time_in_turn([networks[OURS], networks[LOW]], x, options)
    for provider, network in networks.items():
        row = _row(case.work, case.shape, torch.float32, provider, kept_bytes(network, x))
        row["peak_mb"] = "" if options.quick else peak_mb(case.work, provider)
        if provider != TORCH:
            row |= timed[provider == LOW]
        yield row


def time_in_turn(
    networks: Sequence[torch.nn.Module], x: Tensor, options: Any
) -> list[dict[str, float]]:
    """Milliseconds of a step, and how many times those of the first network it takes."""
    count = max(options.threads)
    with harness.threads(count):
        providers = [harness.Provider("", "", _measure(network, x)) for network in networks]
        samples = [s.seconds[harness.BOTH] for s in harness.run_in_turn(providers, options.repeats)]
    rows = []
    for seconds in samples:
        summary = harness.summary(seconds)
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


def _measure(network: torch.nn.Module, x: Tensor) -> harness.Measure:
    def measure(count: int) -> dict[str, float]:
        start = perf_counter_ns()
        for _ in range(count):
            step(network, x)
        return {harness.BOTH: (perf_counter_ns() - start) / count * 1e-9}

    return measure


def peak_mb(work: str, provider: str) -> float:
    """Megabytes that two steps take at most, in a process of its own."""
    found = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", "--peak", work, provider],
        cwd=harness.ROOT,
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"},
    )
    return float(found.stdout)


def print_peak(work: str, provider: str) -> None:
    """What :func:`peak_mb` runs; the network and its input are there before."""
    case = next(network for network in NETWORKS if network.work == work)
    network = built(case.make, provider)
    x = torch.randn(case.shape)
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
) -> harness.Row:
    elements = math.prod(shape)
    row: harness.Row = dict.fromkeys(COLUMNS, "")
    return row | {
        "work": work,
        "shape": operators.shape_name(shape),
        "dtype": operators.dtype_name(dtype),
        "provider": provider,
        "bytes": count,
        "elements": elements,
        "bytes_per_element": count / elements,
    }


def table(rows: Sequence[harness.Row]) -> str:
    """Bytes an element for layers; megabytes and the time for networks."""
    layers, nets = [], []
    for (work, shape, dtype), found in _grouped(rows).items():
        name = f"{work} ({shape.replace('x', ', ')})"
        if work in (name for name, *_ in LAYERS) and {TORCH, OURS} <= set(found):
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
        parts.append(harness.markdown(head, sorted(layers)))
    if nets:
        head = ["megabytes", "kept: torch", "normdrop", "low", "low to torch"]
        head += ["peak: torch", "normdrop", "low", "time, low to normdrop"]
        parts.append(harness.markdown(head, nets))
    return "\n\n".join(parts)


def _grouped(rows: Sequence[harness.Row]) -> dict[tuple[str, str, str], dict[str, harness.Row]]:
    groups: dict[tuple[str, str, str], dict[str, harness.Row]] = {}
    for row in rows:
        key = (row["work"], row["shape"], row["dtype"])
        groups.setdefault(key, {})[row["provider"]] = row
    return groups


def line(row: harness.Row) -> str:
    text = (
        f"  {row['work']:18}{row['shape']:16}{row['dtype']:10}{row['provider']:14}"
        f"{row['bytes'] / 1e6:10.2f} MB kept, {row['bytes_per_element']:8.2f} bytes an element"
    )
    if row["peak_mb"] != "":
        text += f", peak {row['peak_mb']:.0f} MB"
    if row["ratio"] != "":
        text += f", {row['median_ms']:.1f} ms ({row['ratio']:.3f})"
    return text


def cases(options: Namespace) -> list[Network | str]:
    return [LAYERS_CASE, *(QUICK if options.quick else NETWORKS)]


def measure(case: Network | str, options: Namespace) -> Iterator[harness.Row]:
    if isinstance(case, Network):
        return network_rows(case, options)
    return layer_rows((2, 3, 4, 4) if options.quick else (32, 64, 56, 56))


BENCHMARK = Benchmark(
    claim="Count the bytes that autograd keeps for backward.",
    stem="memory",
    columns=COLUMNS,
    keys=KEYS,
    cases=cases,
    measure=measure,
    line=line,
    sections=[Section("memory", table)],
)


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["--peak"]:
        print_peak(*argv[1:])
        return 0
    return harness.run(BENCHMARK, argv)


if __name__ == "__main__":
    sys.exit(main())
