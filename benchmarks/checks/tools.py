"""What tools around PyTorch make of a converted model and of our networks.

Each tool is asked the same (uses.py) of a network of torch's own layers, of the same network
converted, and of the converted one inside ``with normdrop.reverted(model):``; then of our network,
as it is and inside. A model is at home in a tool when the answer is the one that torch's own layers
get. The networks are VGG-11 and, where the tool takes additions, ResNet-8; what is not installed is
left out. The table stands in docs/other-tools.md.

    python -m benchmarks.checks.tools --filter opacus
"""

from __future__ import annotations

import copy
import importlib.metadata
import logging
import re
import sys
import warnings
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

import normdrop
from benchmarks import harness, models
from benchmarks.checks.uses import USES, Use
from benchmarks.harness import Benchmark, Row, Section
from normdrop import networks

WAYS = ("converted", "converted_reverted", "network", "network_reverted")
INSIDE = ("converted_reverted", "network_reverted")
COLUMNS = ("library", "asked", "version", "torch_answer", *WAYS)
KEYS = 2

SAME, FAILS_TOO = "the same", "fails too"

SHAPE = (4, 3, 32, 32)


class Failure:
    """An error that a tool raised."""

    def __init__(self, error: Exception) -> None:
        self.kind = type(error).__name__
        lines = re.sub(r"\x1b\[\d+m", "", str(error)).strip().splitlines()
        self.text = f"{self.kind}: {lines[0]}" if lines else self.kind

    def __str__(self) -> str:
        return self.text if len(self.text) < 80 else f"{self.text[:76]} …"


def at_home(cell: str) -> bool:
    """Whether a cell says that the tool did as with torch's own layers."""
    return cell == SAME or cell.startswith(FAILS_TOO)


def pairs(use: Use) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """A name, a network as a user writes it, and ours."""
    yield "VGG-11", models.VGG11(8, 16), networks.vgg(11, 10, width=8, hidden=16, pool=1)
    if use.residual:
        block = models.BasicBlock
        theirs = models.ResNet(block, (1, 1, 1), 10, width=8, small=True)
        yield "ResNet-8", theirs, networks.resnet(8, 10, width=8, shortcut="projection")


def prepared(model: nn.Module) -> nn.Module:
    """As after training; without dropout, since masks differ, and with no ReLU in place, since
    tools that put hooks on a layer refuse its result to be written over.
    """
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.ReLU):
            module.inplace = False
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, low in ((module.weight, 0.5), (module.bias, -0.5)):
                tensor.data.uniform_(low, low + 1, generator=generator)
            module.running_mean.uniform_(-0.2, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model.train()


def answer(use: Use, model: nn.Module, inside: bool) -> Any:
    """What the tool says, or the error that it raises."""
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    model = copy.deepcopy(model)
    with warnings.catch_warnings(), normdrop.reverted(model) if inside else nullcontext():
        warnings.simplefilter("ignore")
        try:
            return use.ask(model, x)
        except ImportError:
            raise
        except Exception as error:
            return Failure(error)


def difference(given: Any, expected: Any) -> str:
    """In words, and :data:`SAME` where there is none."""
    if isinstance(given, Failure) or isinstance(expected, Failure):
        same = isinstance(given, Failure) and getattr(expected, "kind", "") == given.kind
        return f"{FAILS_TOO}: {expected}" if same else shown(given)
    if isinstance(expected, Mapping) and isinstance(given, Mapping):
        parts = [(f"{name}: ", given.get(name), value) for name, value in expected.items()]
    elif isinstance(expected, Sequence) and not isinstance(expected, str):
        if not isinstance(given, Sequence) or len(given) != len(expected):
            return shown(given)
        parts = [("", a, b) for a, b in zip(given, expected, strict=True)]
    elif isinstance(expected, Tensor) and isinstance(given, Tensor):
        if given.shape != expected.shape:
            return f"shape {tuple(given.shape)}"
        scale = float(expected.detach().abs().max())
        off = float((given - expected).detach().abs().max()) / max(scale, 1e-12)
        return SAME if off < 1e-3 else f"off by {off:.2g} of the largest"
    else:
        return SAME if given == expected else f"{shown(given)}, not {shown(expected)}"
    found = [name + said for name, a, b in parts if (said := difference(a, b)) != SAME]
    return found[0] if found else SAME


def shown(result: Any) -> str:
    """A result in a cell."""
    if isinstance(result, Mapping):
        plain = [f"{k}: {shown(v)}" for k, v in result.items() if not isinstance(v, Tensor | list)]
        return ", ".join(plain) or "numbers"
    if isinstance(result, int):
        return f"{result:,}"
    return str(result) if isinstance(result, str | Failure) else "numbers"


def measure(use: Use, options: Namespace) -> Iterator[Row]:
    row: Row = {"library": use.library, "asked": use.what, "version": version(use.library)}
    said: dict[str, list[str]] = {}
    for name, theirs, ours in list(pairs(use))[-1 if options.quick else 0 :]:
        theirs, ours = prepared(theirs), prepared(ours)
        torchs = answer(use, theirs, False)
        said.setdefault("torch_answer", []).append(shown(torchs))
        converted = normdrop.convert(copy.deepcopy(theirs))
        expected = answer(use, normdrop.revert(copy.deepcopy(ours)), False)
        for way, model, wanted in (("converted", converted, torchs), ("network", ours, expected)):
            for inside, suffix in ((False, ""), (True, "_reverted")):
                told = difference(answer(use, model, inside), wanted)
                said.setdefault(way + suffix, []).append(
                    told if at_home(told) else f"{name}: {told}"
                )
    row["torch_answer"] = said["torch_answer"][0]
    for way in WAYS:
        # What differs, of the first network where something does.
        row[way] = max(said[way], key=lambda text: (not at_home(text), text != SAME))
    yield row


def cases(options: Namespace) -> list[Use]:
    wanted = [use for use in USES if use.library == "torch" or not options.quick]
    missing = {use.library for use in wanted if version(use.library) is None}
    for library in sorted(missing):
        print(f"{library} is not installed: left out")
    return [use for use in wanted if use.library not in missing]


def version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def line(row: Row) -> str:
    answers = "\n".join(f"    {way.replace('_', ', '):24}{row[way]}" for way in WAYS)
    return f"    {'torch alone':24}{row['torch_answer']}\n{answers}"


def table(rows: Sequence[Row]) -> str:
    order = {(use.library, use.what): i for i, use in enumerate(USES)}
    lines = [
        [
            f"{row['library']} {row['version']}",
            *(str(row[name]).replace("|", "\\|") for name in ("asked", "torch_answer", *WAYS)),
        ]
        for row in sorted(rows, key=lambda r: order.get((r["library"], r["asked"]), len(order)))
    ]
    header = ["library", "asked for", "torch's own layers"]
    header += [f"{of}, {how}" for of in ("converted", "our network") for how in ("as is", "inside")]
    return harness.markdown(header, lines, "---")


BENCHMARK = Benchmark(
    claim="Ask tools around PyTorch the same of torch's layers and of ours.",
    stem="tools",
    columns=COLUMNS,
    keys=KEYS,
    cases=cases,
    measure=measure,
    line=line,
    sections=[Section("tools", table, [harness.ROOT / "docs" / "other-tools.md"])],
    holds=lambda row: all(at_home(row[way]) for way in INSIDE),
)


def main(argv: Sequence[str] | None = None) -> int:
    logging.disable(logging.WARNING)
    return harness.run(BENCHMARK, argv)


if __name__ == "__main__":
    sys.exit(main())
