"""A whole step of training, of networks as a user of PyTorch writes them.

A step is the forward, the cross-entropy, the backward, and SGD with Nesterov momentum as
``torch.optim.SGD`` comes, gradients set to None. Every network stands as its user writes it
(models.py), in NCHW and in channels_last; the same given to ``normdrop.convert``, without and with
our convolutions, and the network of ours where there is one, in the layout that they choose. All
take their steps in turn in one process. ``--fused`` adds ``SGD(fused=True)``, ``--peers`` adds
torch.compile, and JAX where it is installed. Printed, and written to training_step.csv: median,
minimum and quartiles, and how many times as fast as torch eager in NCHW and in its better layout.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Any, NamedTuple

import torch
from torch import Tensor

import normdrop
from benchmarks import harness, models, training_peers
from benchmarks.harness import Benchmark, Measure, Provider, Row, Section, best, milliseconds, pick
from normdrop import networks

COLUMNS = (
    *("network", "batch", "threads", "provider", "layout", *harness.TIMES),
    *("ratio", "ratio_best", "ratio_min", "samples"),
)
KEYS = 5

DOCUMENT = harness.ROOT / "docs" / "training-step.md"

SECOND = harness.RESULTS / "training_step_second.csv"
"""What another machine measured; its figures stand in the document beside this one's."""

STEP = "step"

CONTIGUOUS, CHANNELS_LAST, AUTO = "contiguous", "channels_last", "auto"

SGD = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}


@dataclass(frozen=True)
class Network:
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


NETWORKS = (
    Network("MLP", models.MLP, _mlp(False), (128, 784), (1.5, 1.5)),
    Network("MLP with BN", lambda: models.MLP(norm=True), _mlp(True), (128, 784), (1.5, 1.5)),
    Network("ResNet-20", models.resnet20, _resnet(20), (128, 3, 32, 32), (1.4, 1.15)),
    Network("DenseNet-40", models.DenseNet, None, (64, 3, 32, 32), (1.4, 1.2)),
    Network("ResNet-18", models.resnet18, _resnet(18, stem="small"), (32, 3, 32, 32), (1.17, 1.0)),
    Network(
        "VGG-11-BN",
        models.VGG11,
        lambda: networks.vgg(11, 10, hidden=512, pool=1, keep_hidden=0.5),
        (16, 3, 64, 64),
        (1.13, 1.0),
    ),
    Network("ResNet-50", models.resnet50, _resnet(50, 1000), (8, 3, 224, 224), (1.2, 1.0)),
)

QUICK = (
    Network("MLP", lambda: models.MLP(8), None, (4, 784), (1.5, 1.5)),
    Network(
        "ResNet-20", lambda: models.resnet20(4), _resnet(20, width=4), (4, 3, 8, 8), (1.4, 1.15)
    ),
    Network("DenseNet-40", lambda: models.DenseNet(10, 4), None, (4, 3, 8, 8), (1.4, 1.2)),
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


class Case(NamedTuple):
    """A network on a number of threads."""

    network: Network
    threads: int

    def __str__(self) -> str:
        return f"{self.network.name} {harness.in_words(self.network.shape, self.threads)}"

    @property
    def keys(self) -> Row:
        batch = "x".join(map(str, self.network.shape))
        return {"network": self.network.name, "batch": batch, "threads": self.threads}


def cases(options: Namespace) -> list[Case]:
    networks_ = QUICK if options.quick else NETWORKS
    return [Case(network, threads) for network in networks_ for threads in options.threads]


def providers(
    network: Network, with_fused: bool = False, with_peers: bool = False
) -> Iterator[Provider]:
    """Torch in both layouts, ours converted and ours built; and what was asked for beyond."""
    torch.manual_seed(0)
    x = torch.randn(network.shape)
    labels = torch.randint(network.classes, network.shape[:1])
    original = network.theirs().train()
    state = original.state_dict()

    def copy() -> Any:
        model = network.theirs().train()
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

    def converted(name: str, fused: bool = False, **options: Any) -> Provider:
        model = normdrop.convert(copy(), layout="auto", linear="auto", **options)
        return Provider(name, AUTO, step_measure(model, model.parameters(), x, labels, fused))

    yield from torchs("torch")
    yield converted("convert")
    if last is not None:
        yield converted("convert, convolution", convolution="auto")
    if network.ours is not None:
        ours = network.ours().train()
        yield Provider("network", AUTO, step_measure(ours, ours.parameters(), x, labels))
    if with_fused:
        yield from torchs("torch, fused SGD", fused=True)
        yield converted("convert, fused SGD", fused=True)
    if with_peers:
        torch.compiler.reset()
        yield from torchs("torch.compile", compiled=True)
        yield from training_peers.providers(original, x, labels, SGD)


def measure(case: Case, options: Namespace) -> list[Row]:
    """All rows of a case."""
    with harness.threads(case.threads):
        ways = list(providers(case.network, options.fused, options.peers))
        samples = harness.run_in_turn(ways, options.repeats)
    rows: list[Row] = [
        {
            **case.keys,
            "provider": way.name,
            "layout": way.layout,
            **harness.summary(sample.seconds[STEP]),
            "samples": len(sample.seconds[STEP]),
        }
        for way, sample in zip(ways, samples, strict=True)
    ]
    for row in rows:  # torch's first row is in NCHW
        harness.compare(row, pick(rows, provider="torch"))
    return rows


HEAD = (
    f"  {'provider':20}{'layout':15}{harness.HEAD_OF_TIMES}"
    f"{'× NCHW':>8} {'× best':>7} {'× NCHW, minima':>15}"
)


def line(row: Row) -> str:
    return (
        f"  {row['provider']:20}{row['layout']:15}{harness.times(row)}"
        f"{row['ratio']:8.2f} {row['ratio_best']:7.2f} {row['ratio_min']:15.2f}"
    )


# ---- The table ---------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """Milliseconds of a step, and how many times as fast ours is; all threads."""
    header = ["a step, ms", "torch", "torch, channels_last", "torch.compile", "JAX"]
    header += ["converted", "our network", "× torch", "× better layout", "to reach"]
    lines = []
    for network in NETWORKS:
        found = pick(rows, network=network.name, threads=harness.most_threads(rows))
        ours = best(found, provider="convert")
        if ours is None:
            continue
        lines.append(
            [
                f"{network.name} ({', '.join(map(str, network.shape))})",
                milliseconds(best(found, provider="torch", layout=CONTIGUOUS)),
                milliseconds(best(found, provider="torch", layout=CHANNELS_LAST)),
                milliseconds(best(found, provider="torch.compile")),
                milliseconds(best(found, provider="jax")),
                milliseconds(ours),
                milliseconds(best(found, provider="network")),
                *reached(ours, network),
            ]
        )
    return harness.markdown(header, lines)


def reached(ours: Row, network: Network) -> list[str]:
    """How many times as fast ours is, and what was to be reached."""
    ratios = [f"{ours['ratio']:.2f}", f"{ours['ratio_best']:.2f}"]
    return [*ratios, " / ".join(f"{goal:g}" for goal in network.goals)]


def fused_table(rows: Sequence[Row]) -> str:
    """The same step with the user's optimizer and with its fused form."""
    lines = []
    for network in NETWORKS:
        found = pick(rows, network=network.name, threads=harness.most_threads(rows))
        names = [name + end for name in ("torch", "convert") for end in ("", ", fused SGD")]
        four = [best(found, provider=name) for name in names]
        if all(four):
            lines.append([network.name, *map(milliseconds, four)])
    header = ["a step, ms", "torch, better layout", "with fused=True", "converted"]
    return harness.markdown([*header, "with fused=True"], lines)


BENCHMARK = Benchmark(
    claim="Measure whole steps of training.",
    stem="training_step",
    columns=COLUMNS,
    keys=KEYS,
    cases=cases,
    measure=measure,
    head=HEAD,
    line=line,
    sections=(
        Section("training-step", table, [DOCUMENT]),
        Section("training-step-fused", fused_table, [DOCUMENT]),
        Section("training-step-second", lambda _: table(harness.read_rows(SECOND)), [DOCUMENT]),
    ),
    switches={
        "fused": "also with SGD(fused=True)",
        "peers": "also torch.compile, and JAX where installed",
    },
)


def main(argv: Sequence[str] | None = None) -> int:
    return harness.run(BENCHMARK, argv)


if __name__ == "__main__":
    sys.exit(main())
