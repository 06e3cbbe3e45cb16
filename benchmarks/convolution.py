"""3×3 convolutions with stride 1 and padding 1: how fast, and how exact, beside torch's.

Both take channels_last and float32, torch by oneDNN. Passes are the forward, the gradient of the
input and that of the weight, each by its own call of the operator. With one thread the time is that
thread's processor time, which other processes disturb least; with more it is the clock's. The error
is the largest difference from float64, relative to the largest value. Printed, and written to
convolution.csv; convolution.svg shows errors against channels.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import perf_counter_ns, thread_time_ns
from typing import Any, NamedTuple

import torch
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from torch import Tensor

import normdrop.ops.conv2d
from benchmarks import harness
from benchmarks.harness import Benchmark, Measure, Provider, Row, Section, pick
from benchmarks.plots import BLUE, GRID, ORANGE

PASSES = ("forward", "gradient of x", "gradient of w")
COLUMNS = (
    *("shape", "data", "threads", "provider", "pass", *harness.TIMES),
    *("ratio", "ratio_best", "ratio_min", "error", "samples"),
)
KEYS = 5

DOCUMENT = harness.ROOT / "docs" / "convolution.md"
LAST = torch.channels_last
GOAL = 2.5
"""To be reached by the three passes together, from 64 channels on."""

SHAPES = (  # samples, channels, filters, side
    (128, 16, 16, 32),
    (128, 32, 32, 16),
    (64, 160, 12, 32),
    (32, 64, 64, 32),
    (32, 128, 128, 16),
    (32, 256, 256, 8),
    (32, 512, 512, 4),
    (8, 64, 64, 56),
    (8, 128, 128, 28),
    (8, 256, 256, 14),
    (8, 512, 512, 7),
)
QUICK = ((4, 16, 16, 8),)


class Case(NamedTuple):
    """A convolution, its data and the number of threads."""

    shape: tuple[int, int, int, int]
    data: str
    threads: int

    def __str__(self) -> str:
        return f"{harness.in_words(self.shape, self.threads)}, {self.data}"


def cases(options: Namespace) -> list[Case]:
    """Normal data on every number of threads; data after a ReLU, for its error, on one."""
    shapes = QUICK if options.quick else SHAPES
    plain = [Case(shape, "normal", threads) for shape in shapes for threads in options.threads]
    return plain + [Case(shape, "after ReLU", 1) for shape in shapes]


def tensors(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """x, w and the gradient of y."""
    n, channels, filters, side = case.shape
    torch.manual_seed(0)
    x = torch.randn(n, channels, side, side)
    x = x.relu() if case.data == "after ReLU" else x
    weight = torch.randn(filters, channels, 3, 3) / (9 * channels) ** 0.5
    grad = torch.randn(n, filters, side, side)
    return tuple(t.contiguous(memory_format=LAST) for t in (x, weight, grad))  # type: ignore[return-value]


def torchs(x: Tensor, weight: Tensor, grad: Tensor) -> Sequence[Callable[[], Tensor]]:
    """The three passes by torch's operators."""
    ones = [1, 1]

    def backward(*needed: bool) -> tuple[Tensor, ...]:
        backward = torch.ops.aten.convolution_backward.default
        given = (None, ones, ones, ones, False, [0, 0], 1, [*needed, False])
        return backward(grad, x, weight, *given)  # type: ignore[no-any-return]

    return (
        lambda: torch.nn.functional.conv2d(x, weight, padding=1),
        lambda: backward(True, False)[0],
        lambda: backward(False, True)[1],
    )


def ours(x: Tensor, weight: Tensor, grad: Tensor) -> Sequence[Callable[[], Tensor]]:
    """The three passes by our operators."""
    forward = torch.ops.normdrop.conv2d.default
    backward = torch.ops.normdrop.conv2d_backward.default
    return (
        lambda: forward(x, weight, None),
        lambda: backward(grad, x, weight, True, False)[0],
        lambda: backward(grad, x, weight, False, True)[1],
    )


def pass_measure(passes: Sequence[Callable[[], Tensor]], threads: int) -> Measure:
    """Seconds of each pass."""
    clock = thread_time_ns if threads == 1 else perf_counter_ns

    def measure(count: int) -> dict[str, float]:
        seconds = {}
        for name, run in zip(PASSES, passes, strict=True):
            start = clock()
            for _ in range(count):
                run()
            seconds[name] = (clock() - start) / count * 1e-9
        return seconds

    return measure


def measure(case: Case, options: Namespace) -> Iterator[Row]:
    """Torch's rows, then ours."""
    if not normdrop.ops.conv2d.HAS_CONV2D:
        return
    given = tensors(case)
    exact = [run() for run in torchs(*(t.double() for t in given))]
    ways = {"torch": torchs(*given), "normdrop": ours(*given)}
    providers = [
        Provider(name, "channels_last", pass_measure(passes, case.threads))
        for name, passes in ways.items()
    ]
    with harness.threads(case.threads):
        samples = harness.run_in_turn(providers, options.repeats)
    for i, name in enumerate(PASSES):
        peers: list[Row] = []
        for (provider, passes), sample in zip(ways.items(), samples, strict=True):
            row: Row = {
                "shape": "x".join(map(str, case.shape)),
                "data": case.data,
                "threads": case.threads,
                "provider": provider,
                "pass": name,
                **harness.summary(sample.seconds[name]),
                "error": _error(passes[i](), exact[i]),
                "samples": len(sample.seconds[name]),
            }
            peers.append(row)
            harness.compare(row, peers[:1])
            yield row


def _error(result: Tensor, exact: Tensor) -> float:
    return ((result.double() - exact).abs().max() / exact.abs().max()).item()


def line(row: Row) -> str:
    return (
        f"  {row['provider']:10}{row['pass']:15}{harness.times(row)}"
        f"{row['ratio_min']:8.2f} {row['error']:10.1e}"
    )


# ---- The tables --------------------------------------------------------------------------------


def _rows_of(rows: Sequence[Row], shape: Sequence[int], **wanted: Any) -> dict[str, list[Row]]:
    """By provider, the rows of the three passes."""
    name = "x".join(map(str, shape))
    found = {p: pick(rows, shape=name, provider=p, **wanted) for p in ("torch", "normdrop")}
    return found if all(len(part) == len(PASSES) for part in found.values()) else {}


def speed_table(rows: Sequence[Row]) -> str:
    """Milliseconds of the three passes on one thread, and how many times as fast their sum is."""
    header = ["samples, channels, filters, side", *(f"torch, {p}" for p in PASSES)]
    header += [*(f"ours, {p}" for p in PASSES), "× torch", "to reach"]
    lines = []
    for shape in SHAPES:
        found = _rows_of(rows, shape, data="normal", threads=1)
        if not found:
            continue
        least = {p: [row["min_ms"] for row in part] for p, part in found.items()}
        ratio = sum(least["torch"]) / sum(least["normdrop"])
        goal = f"{GOAL:g}" if min(shape[1:3]) >= 64 else ""
        cells = [harness.number(ms) for p in ("torch", "normdrop") for ms in least[p]]
        lines.append([", ".join(map(str, shape)), *cells, f"{ratio:.2f}", goal])
    return harness.markdown(header, lines)


def error_table(rows: Sequence[Row]) -> str:
    """Errors of torch and of ours, in units of 10⁻⁶."""
    header = ["samples, channels, filters, side", "data"]
    header += [f"{name}: torch, ours" for name in PASSES]
    lines = []
    for shape in SHAPES:
        for data in ("normal", "after ReLU"):
            found = _rows_of(rows, shape, data=data, threads=1)
            if found:
                pairs = zip(found["torch"], found["normdrop"], strict=True)
                cells = [f"{1e6 * t['error']:.2f}, {1e6 * o['error']:.2f}" for t, o in pairs]
                lines.append([", ".join(map(str, shape)), data, *cells])
    return harness.markdown(header, lines)


def draw(rows: Sequence[Row], folder: Path) -> None:
    """Errors against channels, one panel a pass."""
    figure = Figure(figsize=(8.4, 3.2), layout="constrained")
    FigureCanvasSVG(figure)
    panels = figure.subplots(1, len(PASSES), sharey=True)
    for axes, name in zip(panels, PASSES, strict=True):
        for provider, color, marker in (("torch", ORANGE, "o"), ("normdrop", BLUE, "s")):
            found = pick(rows, provider=provider, data="after ReLU", **{"pass": name})
            points = sorted((int(row["shape"].split("x")[1]), row["error"]) for row in found)
            axes.plot(*zip(*points, strict=True), marker, color=color, label=provider)
        axes.set(title=name, xlabel="channels", xscale="log", yscale="log")
        axes.set_xticks([16, 64, 256], ["16", "64", "256"], minor=False)
        axes.minorticks_off()
        axes.grid(color=GRID)
    panels[0].set_ylabel("largest error, relative")
    panels[0].legend()
    figure.savefig(folder / "convolution.svg", metadata={"Date": None})


BENCHMARK = Benchmark(
    claim="Measure 3×3 convolutions, and their errors.",
    stem="convolution",
    columns=COLUMNS,
    keys=KEYS,
    cases=cases,
    measure=measure,
    head=f"  {'provider':10}{'pass':15}{harness.HEAD_OF_TIMES}{'× minima':>9} {'error':>9}",
    line=line,
    sections=(
        Section("convolution", speed_table, [DOCUMENT]),
        Section("convolution-error", error_table, [DOCUMENT]),
    ),
    finish=draw,
)


def main(argv: Sequence[str] | None = None) -> int:
    return harness.run(BENCHMARK, argv)


if __name__ == "__main__":
    sys.exit(main())
