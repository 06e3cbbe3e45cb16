"""Inference of ResNet-18 and ResNet-50 at 224×224: folded, against PyTorch's own ways and others.

The network is the one a user writes with torch's layers, addition and ReLU in place, in evaluation
mode. All providers get the same images in NCHW (``eager channels_last`` in its own layout), give
the same logits (that is checked), and run in turn in one process.
"""

from __future__ import annotations

import copy
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import models
import normdrop
import runner
from runner import FORWARD, Measure, Provider

COLUMNS = (
    *("network", "batch", "threads", "provider", "median_ms", "min_ms", "p25", "p75"),
    *("ratio", "ratio_min", "difference"),
)
KEYS = COLUMNS[:4]

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
    measure = runner.forward_measure(function)

    def run(count: int) -> dict[str, float]:
        with torch.inference_mode():
            return measure(count)

    return run


def rows_of(depth: int, batch: int, options: Any) -> list[runner.Row]:
    """Measure one network with one size of batch and the present number of threads."""
    size, classes, width = (64, 10, 4) if options.quick else (224, 1000, 64)
    model = user_network(depth, classes, width)
    x = torch.randn(batch, 3, size, size)
    with torch.no_grad():
        wanted = copy.deepcopy(model).double()(x.double())
    with tempfile.TemporaryDirectory() as folder:
        named = dict(functions(model, x, Path(folder)))
        with torch.inference_mode():
            differences = {
                name: _difference(function(), wanted) for name, function in named.items()
            }
        providers = [Provider(name, "", _inference(function)) for name, function in named.items()]
        samples = runner.run_in_turn(providers, options.repeats)
    figures = {
        p.name: runner.summary(s.seconds[FORWARD]) for p, s in zip(providers, samples, strict=True)
    }
    return [
        {
            "network": f"ResNet-{depth}",
            "batch": batch,
            "threads": torch.get_num_threads(),
            "provider": name,
            **figure,
            "ratio": figures[EAGER]["median_ms"] / figure["median_ms"],
            "ratio_min": figures[EAGER]["min_ms"] / figure["min_ms"],
            "difference": differences[name],
        }
        for name, figure in figures.items()
    ]


def _difference(y: Tensor, wanted: Tensor) -> float:
    """The largest difference to the logits in float64, relative to the largest logit."""
    difference = float((y.double() - wanted).abs().max() / wanted.abs().max())
    if not difference < 1e-4:
        raise RuntimeError(f"a provider gives other logits, {difference:.2g} off")
    return difference


def table(rows: Sequence[runner.Row]) -> str:
    """Milliseconds, and how many times faster than eager NCHW, by the medians."""
    lines = []
    cases = dict.fromkeys((row["network"], row["batch"], row["threads"]) for row in rows)
    names = [name for name in TITLES if any(row["provider"] == name for row in rows)]
    for case in cases:
        found = {
            row["provider"]: row
            for row in rows
            if (row["network"], row["batch"], row["threads"]) == case
        }
        network, batch, threads = case
        cells = [
            f"{found[name]['median_ms']:.1f}"
            + ("" if name == EAGER else f" ({found[name]['ratio']:.2f}×)")
            if name in found
            else ""
            for name in names
        ]
        of_threads = "1 thread" if threads == 1 else f"{threads} threads"
        lines.append([f"{network}, batch {batch}, {of_threads}", *cells])
    return runner.markdown(["milliseconds", *(TITLES[name] for name in names)], lines)


def main(argv: Sequence[str] | None = None) -> int:
    os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "0")
    options = runner.parse("Measure inference of residual networks.", argv)
    runner.print_machine()
    path = options.output / "inference.csv"
    depths, batches = ((18,), (2,)) if options.quick else ((18, 50), (1, 16))
    merged = runner.merge(path, [], COLUMNS, KEYS)
    for depth in depths:
        for batch in batches:
            for count in options.threads:
                if not re.search(options.filter, f"resnet{depth} batch {batch} threads {count}"):
                    continue
                with runner.threads(count):
                    rows = rows_of(depth, batch, options)
                for row in rows:
                    print(
                        f"  {row['network']:12}batch {row['batch']:<4}threads {row['threads']:<3}"
                        f"{row['provider']:16}{row['median_ms']:9.2f} ms, least "
                        f"{row['min_ms']:9.2f} ms{row['ratio']:8.2f}×{row['ratio_min']:8.2f}×"
                    )
                merged = runner.merge(path, rows, COLUMNS, KEYS)
    if options.output.resolve() == runner.RESULTS:
        documents = (runner.ROOT / "docs" / "inference.md",)
        runner.write_section("inference", table(merged), documents)
    print(f"\n{path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
