"""A whole step of training, of networks as a user of PyTorch writes them.

A step is the forward, the cross-entropy, the backward, and SGD with Nesterov momentum as
``torch.optim.SGD`` comes, gradients set to None. Every network stands as its user writes it
(models.py), in NCHW and in channels_last; the same given to ``normdrop.convert``, and the network
of ours where there is one, in the layout that they choose. All take their steps in turn in one
process. ``--fused`` adds ``SGD(fused=True)``, ``--peers`` adds torch.compile, and JAX where it is
installed. Printed, and written to
training_step.csv: median, minimum and quartiles, and how many times as fast as torch eager in NCHW
and in its better layout.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Any

import torch
from torch import Tensor

import models
import normdrop
import runner
import training_peers
from normdrop import networks
from runner import Measure, Provider, Row

COLUMNS = (
    "network",
    "batch",
    "threads",
    "provider",
    "layout",
    "median_ms",
    "min_ms",
    "p25",
    "p75",
    "ratio",
    "ratio_best",
    "ratio_min",
    "samples",
)
KEYS = COLUMNS[:5]

DOCUMENT = runner.ROOT / "docs" / "training-step.md"

SECOND = runner.RESULTS / "training_step_second.csv"
"""What another machine measured; its figures stand in the document beside this one's."""

STEP = "step"

CONTIGUOUS, CHANNELS_LAST, AUTO = "contiguous", "channels_last", "auto"

SGD = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}


@dataclass(frozen=True)
class Case:
    """One network and its batch.

    Attributes:
        name: as printed.
        theirs: makes it as a user writes it.
        ours: makes ours of the same architecture, or None.
        shape: of the batch.
        quick: the same three in tiny.
        goals: what is to be reached, to eager NCHW and to torch's better layout.
    """

    name: str
    theirs: Callable[[], torch.nn.Module]
    ours: Callable[[], torch.nn.Module] | None
    shape: tuple[int, ...]
    goals: tuple[float, float]

    @property
    def classes(self) -> int:
        return 1000 if self.shape[-1] == 224 else 10


def _resnet(depth: int, classes: int = 10, **options: Any) -> Callable[[], torch.nn.Module]:
    return lambda: networks.resnet(depth, classes, **options)


def _mlp(norm: bool) -> Callable[[], torch.nn.Module]:
    return lambda: networks.mlp((784, 1024, 1024, 10), keep_input=0.8, keep_hidden=0.5, norm=norm)


CASES = (
    Case("MLP", models.MLP, _mlp(False), (128, 784), (1.5, 1.5)),
    Case("MLP with BN", lambda: models.MLP(norm=True), _mlp(True), (128, 784), (1.5, 1.5)),
    Case("ResNet-20", models.resnet20, _resnet(20), (128, 3, 32, 32), (1.4, 1.15)),
    Case("DenseNet-40", models.DenseNet, None, (64, 3, 32, 32), (1.4, 1.2)),
    Case("ResNet-18", models.resnet18, _resnet(18, stem="small"), (32, 3, 32, 32), (1.17, 1.0)),
    Case(
        "VGG-11-BN",
        models.VGG11,
        lambda: networks.vgg(11, 10, hidden=512, pool=1, keep_hidden=0.5),
        (16, 3, 64, 64),
        (1.13, 1.0),
    ),
    Case("ResNet-50", models.resnet50, _resnet(50, 1000), (8, 3, 224, 224), (1.2, 1.0)),
)

QUICK = (
    Case("MLP", lambda: models.MLP(8), None, (4, 784), (1.5, 1.5)),
    Case("ResNet-20", lambda: models.resnet20(4), _resnet(20, width=4), (4, 3, 8, 8), (1.4, 1.15)),
    Case("DenseNet-40", lambda: models.DenseNet(10, 4), None, (4, 3, 8, 8), (1.4, 1.2)),
)


def step_measure(
    model: Callable[..., Any], parameters: Any, x: Tensor, labels: Tensor, fused: bool = False
) -> Measure:
    """Steps of training, the time of each from the forward to the new weights."""
    optimizer = torch.optim.SGD(parameters, **SGD, fused=fused or None)
    loss_of = torch.nn.CrossEntropyLoss()

    def measure(count: int) -> dict[str, float]:
        start = perf_counter_ns()
        for _ in range(count):
            optimizer.zero_grad()
            loss = loss_of(model(x), labels)
            loss.backward()
            optimizer.step()
        return {STEP: (perf_counter_ns() - start) / count * 1e-9}

    return measure


def providers(case: Case, with_fused: bool, with_peers: bool) -> Iterator[Provider]:
    """Torch in both layouts, ours converted and ours built; and what was asked for beyond."""
    torch.manual_seed(0)
    x = torch.randn(case.shape)
    labels = torch.randint(case.classes, case.shape[:1])
    original = case.theirs().train()
    state = original.state_dict()

    def copy() -> Any:
        model = case.theirs().train()
        model.load_state_dict(state)
        return model

    last = None
    if x.dim() == 4:
        last = x.contiguous(memory_format=torch.channels_last)

    formats = {CONTIGUOUS: torch.contiguous_format, CHANNELS_LAST: torch.channels_last}

    def torchs(name: str, fused: bool = False, compiled: bool = False) -> Iterator[Provider]:
        for layout, batch in ((CONTIGUOUS, x), (CHANNELS_LAST, last)):
            if batch is None:
                continue
            model = copy().to(memory_format=formats[layout])
            parameters = model.parameters()
            run = torch.compile(model) if compiled else model
            yield Provider(name, layout, step_measure(run, parameters, batch, labels, fused))

    def converted(name: str, fused: bool = False) -> Provider:
        model = normdrop.convert(copy(), layout="auto", linear="auto")
        return Provider(name, AUTO, step_measure(model, model.parameters(), x, labels, fused))

    yield from torchs("torch")
    yield converted("convert")
    if case.ours is not None:
        ours = case.ours().train()
        yield Provider("network", AUTO, step_measure(ours, ours.parameters(), x, labels))
    if with_fused:
        yield from torchs("torch, fused SGD", fused=True)
        yield converted("convert, fused SGD", fused=True)
    if with_peers:
        torch.compiler.reset()
        yield from torchs("torch.compile", compiled=True)
        yield from training_peers.providers(original, x, labels, SGD)


def measure(case: Case, threads: int, repeats: int, fused: bool, peers: bool) -> list[Row]:
    """All rows of a case."""
    with runner.threads(threads):
        ways = list(providers(case, fused, peers))
        samples = runner.run_in_turn(ways, repeats)
    rows: list[Row] = [
        {
            "network": case.name,
            "batch": "x".join(map(str, case.shape)),
            "threads": threads,
            "provider": way.name,
            "layout": way.layout,
            **runner.summary(sample.seconds[STEP]),
            "samples": len(sample.seconds[STEP]),
        }
        for way, sample in zip(ways, samples, strict=True)
    ]
    compare(rows, [row for row in rows if row["provider"] == "torch"])
    return rows


def compare(rows: Sequence[Row], eager: Sequence[Row]) -> None:
    """Say of every row how many times as fast it is as torch eager, whose first row is in NCHW."""
    for row in rows:
        row["ratio"] = eager[0]["median_ms"] / row["median_ms"]
        row["ratio_best"] = min(r["median_ms"] for r in eager) / row["median_ms"]
        row["ratio_min"] = eager[0]["min_ms"] / row["min_ms"]


HEAD = (
    f"  {'provider':20}{'layout':15}{'median':>9} {'minimum':>9}  {'quartiles':>19} ms"
    f"{'× NCHW':>8} {'× best':>7} {'× NCHW, minima':>15}"
)


def line(row: Row) -> str:
    return (
        f"  {row['provider']:20}{row['layout']:15}{row['median_ms']:9.2f} {row['min_ms']:9.2f}  "
        f"{row['p25']:9.2f} {row['p75']:9.2f}   {row['ratio']:8.2f} {row['ratio_best']:7.2f} "
        f"{row['ratio_min']:15.2f}"
    )


# ---- The table ---------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """Milliseconds of a step, and how many times as fast ours is; all threads."""
    threads = max((row["threads"] for row in rows), default=1)
    header = ["a step, ms", "torch", "torch, channels_last", "torch.compile", "JAX"]
    header += ["converted", "our network", "× torch", "× better layout", "to reach"]
    lines = []
    for case in CASES:
        found = [r for r in rows if (r["network"], r["threads"]) == (case.name, threads)]
        ours = best(found, "convert")
        if ours is None:
            continue
        goals = " / ".join(f"{goal:g}" for goal in case.goals)
        lines.append(
            [
                f"{case.name} ({', '.join(map(str, case.shape))})",
                milliseconds(best(found, "torch", CONTIGUOUS)),
                milliseconds(best(found, "torch", CHANNELS_LAST)),
                milliseconds(best(found, "torch.compile")),
                milliseconds(best(found, "jax")),
                milliseconds(ours),
                milliseconds(best(found, "network")),
                f"{ours['ratio']:.2f}",
                f"{ours['ratio_best']:.2f}",
                goals,
            ]
        )
    return runner.markdown(header, lines)


def fused_table(rows: Sequence[Row]) -> str:
    """The same step with the user's optimizer and with its fused form."""
    threads = max((row["threads"] for row in rows), default=1)
    lines = []
    for case in CASES:
        found = [r for r in rows if (r["network"], r["threads"]) == (case.name, threads)]
        four = [best(found, n + end) for n in ("torch", "convert") for end in ("", ", fused SGD")]
        if all(four):
            lines.append([case.name, *map(milliseconds, four)])
    header = ["a step, ms", "torch, better layout", "with fused=True", "converted"]
    return runner.markdown([*header, "with fused=True"], lines)


def best(rows: Sequence[Row], provider: str, layout: str | None = None) -> Row | None:
    """The fastest row of a provider."""
    found = [r for r in rows if r["provider"] == provider and layout in (None, r["layout"])]
    return min(found, key=lambda row: row["median_ms"], default=None)


def milliseconds(row: Row | None) -> str:
    if row is None:
        return ""
    value = row["median_ms"]
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def main(argv: Sequence[str] | None = None) -> int:
    options = runner.parse(
        "Measure whole steps of training.",
        argv,
        fused="also with SGD(fused=True)",
        peers="also torch.compile, and JAX where installed",
    )
    runner.print_machine()
    chosen = [c for c in (QUICK if options.quick else CASES) if re.search(options.filter, c.name)]
    if not chosen:
        print(f"--filter {options.filter!r} matches no network", file=sys.stderr)
        return 2
    path = options.output / "training_step.csv"
    rows: list[Row] = []
    for case in chosen:
        for threads in options.threads:
            shape = ", ".join(map(str, case.shape))
            print(f"\n{case.name} ({shape}), {threads} thread{'s' * (threads > 1)}\n{HEAD}")
            new = measure(case, threads, options.repeats, options.fused, options.peers)
            print("\n".join(map(line, new)), flush=True)
            rows = runner.merge(path, new, COLUMNS, KEYS)
    if options.output.resolve() == runner.RESULTS:
        runner.write_section("training-step", table(rows), [DOCUMENT])
        runner.write_section("training-step-fused", fused_table(rows), [DOCUMENT])
        runner.write_section("training-step-second", table(runner.read_rows(SECOND)), [DOCUMENT])
    print(f"\n{path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
