"""Inference of ResNet-18 and ResNet-50 at 224×224: folded, against PyTorch's own ways and others.

The network is the one a user writes with torch's layers, addition and ReLU in place, in evaluation
mode. All providers get the same images in NCHW (``eager channels_last`` in its own layout), give
the same logits (that is checked), and run in turn in one process.
"""

from __future__ import annotations

import copy
import os
import sys
import tempfile
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import normdrop
from benchmarks import harness, models
from benchmarks.harness import FORWARD, Benchmark, Measure, Provider, Section, best, pick

COLUMNS = (
    *("network", "batch", "threads", "provider", *harness.TIMES),
    *("ratio", "ratio_min", "difference"),
)
KEYS = 4

EAGER = "eager"
TITLES = {
    EAGER: "eager, NCHW",
    "channels_last": "eager, channels_last",
    "fold": "`fold`",
    "fold unfused": "`fold(fuse=False)`",
    "compile": "torch.compile, freezing",
    "onnxruntime": "ONNX Runtime",
}

Function = Callable[[], Tensor]


def user_network(depth: int, classes: int, width: int) -> torch.nn.Module:
    """A residual network of torch's layers, with statistics as after training."""
    torch.manual_seed(0)
    block, counts = {
        18: (models.BasicBlock, (2, 2, 2, 2)),
        50: (models.Bottleneck, (3, 4, 6, 3)),
    }[depth]
    model = models.ResNet(block, counts, classes, width=width, small=False)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.7, 1.4)
    return model.eval()


def functions(model: torch.nn.Module, x: Tensor, folder: Path) -> Iterator[tuple[str, Function]]:
    """The providers by name; what is not installed is left out."""
    yield EAGER, lambda: model(x)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    x_last = x.contiguous(memory_format=torch.channels_last)
    yield "channels_last", lambda: last(x_last)
    folded, unfused = normdrop.fold(model), normdrop.fold(model, fuse=False)
    yield "fold", lambda: folded(x)
    yield "fold unfused", lambda: unfused(x)
    compiled = _compiled(model)
    yield "compile", lambda: compiled(x)
    session = _session(model, x, folder)
    if session is not None:
        name, images = session.get_inputs()[0].name, x.numpy()
        yield "onnxruntime", lambda: torch.from_numpy(session.run(None, {name: images})[0])


def _compiled(model: torch.nn.Module) -> Callable[[Tensor], Tensor]:
    import torch._inductor.config

    torch._inductor.config.freezing = True
    torch.compiler.reset()
    function: Callable[[Tensor], Tensor] = torch.compile(copy.deepcopy(model))
    return function


def _session(model: torch.nn.Module, x: Tensor, folder: Path) -> Any:
    try:
        import onnxruntime
    except ImportError:
        return None
    path = folder / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the exporter has deprecated in itself
        torch.onnx.export(copy.deepcopy(model), (x,), str(path), dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _inference(function: Function) -> Measure:
    measure = harness.forward_measure(function)

    def run(count: int) -> dict[str, float]:
        with torch.inference_mode():
            return measure(count)

    return run


class Case(NamedTuple):
    """A residual network, a size of batch, a number of threads."""

    depth: int
    batch: int
    threads: int

    def __str__(self) -> str:
        of_threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
        return f"ResNet-{self.depth}, batch {self.batch}, {of_threads}"


def cases(options: Namespace) -> Iterator[Case]:
    depths, batches = ((18,), (2,)) if options.quick else ((18, 50), (1, 16))
    for depth in depths:
        for batch in batches:
            for threads in options.threads:
                yield Case(depth, batch, threads)


def measure(case: Case, options: Namespace) -> list[harness.Row]:
    """All rows of a case."""
    size, classes, width = (64, 10, 4) if options.quick else (224, 1000, 64)
    model = user_network(case.depth, classes, width)
    x = torch.randn(case.batch, 3, size, size)
    with torch.no_grad():
        wanted = copy.deepcopy(model).double()(x.double())
    with harness.threads(case.threads), tempfile.TemporaryDirectory() as folder:
        named = dict(functions(model, x, Path(folder)))
        with torch.inference_mode():
            differences = {
                name: _difference(function(), wanted) for name, function in named.items()
            }
        providers = [Provider(name, "", _inference(function)) for name, function in named.items()]
        samples = harness.run_in_turn(providers, options.repeats)
    rows: list[harness.Row] = [
        {
            "network": f"ResNet-{case.depth}",
            "batch": case.batch,
            "threads": case.threads,
            "provider": provider.name,
            **harness.summary(sample.seconds[FORWARD]),
            "difference": differences[provider.name],
        }
        for provider, sample in zip(providers, samples, strict=True)
    ]
    for row in rows:
        harness.compare(row, pick(rows, provider=EAGER))
    return rows


def _difference(y: Tensor, wanted: Tensor) -> float:
    """The largest difference to the logits in float64, relative to the largest logit."""
    difference = float((y.double() - wanted).abs().max() / wanted.abs().max())
    if not difference < 1e-4:
        raise RuntimeError(f"a provider gives other logits, {difference:.2g} off")
    return difference


def line(row: harness.Row) -> str:
    return f"  {row['provider']:16}{harness.times(row)}{row['ratio']:8.2f} {row['ratio_min']:7.2f}"


def table(rows: Sequence[harness.Row]) -> str:
    """Milliseconds, and how many times faster than eager NCHW, by the medians."""
    lines = []
    names = [name for name in TITLES if pick(rows, provider=name)]
    for network, batch, threads in dict.fromkeys(
        (row["network"], row["batch"], row["threads"]) for row in rows
    ):
        found = pick(rows, network=network, batch=batch, threads=threads)
        cells = []
        for name in names:
            row = best(found, provider=name)
            ratio = f" ({row['ratio']:.2f}×)" if row and name != EAGER else ""
            cells.append(harness.milliseconds(row) + ratio)
        of_threads = f"{threads} thread{'s' * (threads > 1)}"
        lines.append([f"{network}, batch {batch}, {of_threads}", *cells])
    return harness.markdown(["milliseconds", *(TITLES[name] for name in names)], lines)


BENCHMARK = Benchmark(
    claim="Measure inference of residual networks.",
    stem="inference",
    columns=COLUMNS,
    keys=KEYS,
    cases=cases,
    measure=measure,
    head=f"  {'provider':16}{harness.HEAD_OF_TIMES}{'× eager':>8} {'minima':>7}",
    line=line,
    sections=[Section("inference", table, [harness.ROOT / "docs" / "inference.md"])],
)


def main(argv: Sequence[str] | None = None) -> int:
    os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "0")
    return harness.run(BENCHMARK, argv)


if __name__ == "__main__":
    sys.exit(main())
