"""What all benchmarks share: how they measure, keep their rows, and write their tables.

A benchmark is a :class:`Benchmark`: its claim, its columns, its cases, how one is measured, and the
tables that follow; :func:`run` is its program. Providers, each one way to do the same work, stand
side by side in one process. In every round each provider is measured once, in a new random order,
so that whatever else the machine does meets all of them alike. What is reported is the median, the
minimum and the quartiles of at least 30 rounds.

The unit beside milliseconds is the cold copy: the time of ``y.copy_(x)`` for as many bytes, at the
rate of a tensor of 26 MB that is not in the cache. It moves two tensors, one read and one written;
so the least that an operator must move, its floor, is a number of copies on every machine.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import random
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter_ns
from typing import Any, NamedTuple

import torch
from torch import Tensor

import normdrop
from normdrop.files import write_atomically, write_text
from normdrop.training.measure import machine

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")

FORWARD, BOTH = "forward", "forward+backward"

Measure = Callable[[int], dict[str, float]]
"""Does the work that many times and gives, for each pass, the seconds of one time."""

Row = dict[str, Any]

TIMES = ("median_ms", "min_ms", "p25", "p75")
"""The columns that :func:`summary` fills."""


@dataclass(frozen=True)
class Provider:
    """One way to do the work, in one memory layout."""

    name: str
    layout: str
    measure: Measure


@dataclass
class Samples:
    """Seconds of each round, by pass."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def add(self, measured: dict[str, float]) -> None:
        for name, value in measured.items():
            self.seconds.setdefault(name, []).append(value)


def autograd_measure(
    forward: Callable[[], Tensor], inputs: Sequence[Tensor], grad: Tensor
) -> Measure:
    """Forward and backward as autograd runs them, the clock read between the two.

    torch.autograd.grad runs the same engine as ``.backward(grad)`` and hands the gradients back
    instead of adding them to ``.grad``, where a leaf sometimes takes a copy that no inner layer of
    a network takes. Results are freed after the clock has stopped.
    """

    def measure(count: int) -> dict[str, float]:
        ahead = whole = 0
        for _ in range(count):
            start = perf_counter_ns()
            y = forward()
            middle = perf_counter_ns()
            grads = torch.autograd.grad(y, inputs, grad)
            end = perf_counter_ns()
            ahead += middle - start
            whole += end - start
            del y, grads
        return {FORWARD: ahead / count * 1e-9, BOTH: whole / count * 1e-9}

    return measure


def forward_measure(forward: Callable[[], Any]) -> Measure:
    """Forward alone."""

    def measure(count: int) -> dict[str, float]:
        total = 0
        for _ in range(count):
            start = perf_counter_ns()
            y = forward()
            total += perf_counter_ns() - start
            del y
        return {FORWARD: total / count * 1e-9}

    return measure


def run_in_turn(providers: Sequence[Provider], repeats: int) -> list[Samples]:
    """Measure all providers once a round, in a new order each, after two rounds of warming up."""
    order = random.Random(0)
    counts = []
    for provider in providers:
        provider.measure(1)
        seconds = max(provider.measure(1).values())
        # A sample of a short call is the mean of so many calls that it lasts about 3 ms.
        counts.append(max(1, min(200, round(3e-3 / max(seconds, 1e-9)))))
    samples = [Samples() for _ in providers]
    for _ in range(repeats):
        for i in order.sample(range(len(providers)), len(providers)):
            samples[i].add(providers[i].measure(counts[i]))
    return samples


def cold_copy_rate(repeats: int = 12, size: int = 32 * 64 * 56 * 56) -> float:
    """Bytes a second of a tensor that is copied when neither it nor its copy is in the cache.

    Three pairs of tensors are copied in turn, 154 MB in all, so each pair has left the cache when
    its turn comes.
    """
    pairs = [(torch.ones(size), torch.ones(size)) for _ in range(3)]
    seconds = []
    for i in range(repeats):
        x, y = pairs[i % 3]
        start = perf_counter_ns()
        y.copy_(x)
        seconds.append((perf_counter_ns() - start) * 1e-9)
    return 4 * size / statistics.median(seconds)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use that many threads, for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median, minimum and quartiles, in milliseconds."""
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return dict(zip(TIMES, (1e3 * s for s in (median, min(seconds), low, high)), strict=True))


def compare(row: Row, peers: Sequence[Row]) -> None:
    """Say how many times as fast a row is as the first of its peers, and as the best of them."""
    row["ratio"] = peers[0]["median_ms"] / row["median_ms"]
    row["ratio_best"] = min(peer["median_ms"] for peer in peers) / row["median_ms"]
    row["ratio_min"] = peers[0]["min_ms"] / row["min_ms"]


# ---- The program -------------------------------------------------------------------------------


class Section(NamedTuple):
    """A marked block of a document, and the table that goes there."""

    name: str
    table: Callable[[Sequence[Row]], str]
    documents: Sequence[Path] = DOCUMENTS


class Benchmark(NamedTuple):
    """One claim and the program that holds it to the machine it runs on.

    Attributes:
        claim: what it measures, in a sentence.
        stem: of its CSV.
        columns: of a row, without processor and torch, which every CSV ends with.
        keys: how many of them, from the left, tell one row from another.
        cases: what there is to measure; as text a case is what ``--filter`` matches.
        measure: the rows of one case.
        line: a row as it is printed, below the head.
        head: the head of those lines.
        sections: the tables, made of all rows of the CSV.
        finish: what else is made of them, in the folder of the results.
        holds: whether a row of a check is as it should be.
        switches: further options, and their help.
        draws: a check's number of draws, an option with this default.
    """

    claim: str
    stem: str
    columns: Sequence[str]
    keys: int
    cases: Callable[[argparse.Namespace], Iterable[Any]]
    measure: Callable[[Any, argparse.Namespace], Iterable[Row]]
    line: Callable[[Row], str]
    head: str = ""
    sections: Sequence[Section] = ()
    finish: Callable[[Sequence[Row], Path], None] = lambda rows, folder: None
    holds: Callable[[Row], bool] = lambda row: True
    switches: Mapping[str, str] = {}
    draws: int | None = None


def run(benchmark: Benchmark, argv: Sequence[str] | None = None) -> int:
    """Measure case by case; after each the CSV is whole, so an interrupted run loses little.

    Returns:
        0; 1 where a row does not hold; 2 where there is nothing to do.
    """
    options = parse(benchmark, argv)
    path = options.output / f"{benchmark.stem}.csv"
    keys = benchmark.columns[: benchmark.keys]
    failures = 0
    if options.tables:
        rows = read_rows(path)
    else:
        chosen = [c for c in benchmark.cases(options) if re.search(options.filter, str(c))]
        if not chosen:
            print(f"--filter {options.filter!r} matches no case", file=sys.stderr)
            return 2
        print_machine()
        rows = merge(path, [], benchmark.columns, keys)
        for case in chosen:
            print(f"\n{case}\n{benchmark.head}".rstrip(), flush=True)
            new = []
            for row in benchmark.measure(case, options):
                print(benchmark.line(row), flush=True)
                failures += not benchmark.holds(row)
                new.append(row)
            rows = merge(path, new, benchmark.columns, keys)
    benchmark.finish(rows, options.output)
    if options.output.resolve() == RESULTS:
        for section in benchmark.sections:
            write_section(section.name, section.table(rows), section.documents)
    print(f"\n{path}" + (f"; {failures} failed" if failures else ""))
    return min(failures, 1)


def parse(benchmark: Benchmark, argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line, and make the output folder."""
    given = argparse.ArgumentParser(description=benchmark.claim)
    add = given.add_argument
    add("--filter", metavar="REGEX", default="", help="measure only what matches, as printed")
    add("--repeats", type=int, default=40, help="rounds; at least 30 to publish")
    add(
        "--threads",
        type=int,
        nargs="+",
        default=sorted({1, torch.get_num_threads()}),
        help="numbers of threads (default: 1 and all)",
    )
    add("--quick", action="store_true", help="tiny sizes: shows that it runs, measures nothing")
    add("--tables", action="store_true", help="measure nothing: write the tables again")
    add(
        "--output",
        type=Path,
        help="folder of results; rows of a CSV that is there are kept unless measured again "
        "(default: benchmarks/results, or build/benchmarks with --quick)",
    )
    for name, text in benchmark.switches.items():
        add(f"--{name}", action="store_true", help=text)
    if benchmark.draws is not None:
        add("--draws", type=int, default=benchmark.draws, help="numbers to draw")
    options = given.parse_args(argv)
    try:
        re.compile(options.filter)
    except re.error as error:
        given.error(f"--filter: expected a regular expression, got {options.filter!r} ({error})")
    if options.repeats < 2 or min(options.threads) < 1:
        given.error("--repeats: expected at least 2, and --threads at least 1")
    if options.quick:
        options.repeats = min(options.repeats, 2)
    if options.output is None:
        options.output = ROOT / "build" / "benchmarks" if options.quick else RESULTS
    options.output.mkdir(parents=True, exist_ok=True)
    if not options.quick:
        normdrop.keep_freed_memory()
    return options


def print_machine() -> None:
    facts = machine()
    kernels = "compiled kernels" if facts["kernels"] else "no compiled kernels: plain PyTorch path"
    print(
        f"{facts['processor']}, {torch.backends.cpu.get_cpu_capability()}; "
        f"torch {facts['torch']}, normdrop {facts['normdrop']}, {kernels}"
    )


# ---- Results -----------------------------------------------------------------------------------


def machine_columns() -> dict[str, str]:
    facts = machine()
    return {"processor": facts["processor"], "torch": facts["torch"]}


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV, numbers as numbers."""
    rows = _read_text(path)
    for row in rows:
        for name in set(row) - {"processor", "torch", "version"}:
            with contextlib.suppress(ValueError):
                value = row[name]
                row[name] = float(value) if re.search(r"[.e]|nan", value) else int(value)
    return rows


def _read_text(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def merge(path: Path, new: Iterable[Row], columns: Sequence[str], keys: Sequence[str]) -> list[Row]:
    """Put new rows into the CSV, in place of those with the same keys, and give all rows.

    Rows of another processor or another torch are left out: a table is of one machine.
    """
    columns = [*columns, "processor", "torch"]
    here = machine_columns()
    rows = {
        tuple(str(row[key]) for key in keys): row
        for row in _read_text(path)  # as it stands: no rounding of what was rounded
        if set(columns) == set(row) and all(row[name] == value for name, value in here.items())
    }
    for row in new:
        rows[tuple(str(row[key]) for key in keys)] = {**row, **here}
    with write_atomically(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for row in rows.values():
            writer.writerow({name: _rounded(row[name]) for name in columns})
    return read_rows(path)


def _rounded(value: Any) -> Any:
    return f"{value:.5g}" if isinstance(value, float) and value == value else value


def write_section(name: str, text: str, documents: Sequence[Path] = DOCUMENTS) -> None:
    """Put text between ``<!-- benchmark:name -->`` and ``<!-- /benchmark:name -->``."""
    begin, end = f"<!-- benchmark:{name} -->", f"<!-- /benchmark:{name} -->"
    for document in documents:
        if not document.exists():
            continue
        before = document.read_text(encoding="utf-8")
        head, found, rest = before.partition(begin)
        _, closed, tail = rest.partition(end)
        if found and closed:
            after = f"{head}{begin}\n{text.strip()}\n{end}{tail}"
            if after != before:
                write_text(document, after)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], column: str = "--:") -> str:
    """A table; the first column is text, the others are numbers unless said."""
    lines = [header, ["---", *[column] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def pick(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """The rows with these values."""
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def best(rows: Iterable[Row], **wanted: Any) -> Row | None:
    """The fastest of the rows with these values."""
    return min(pick(rows, **wanted), key=lambda row: row["median_ms"], default=None)


def number(value: float) -> str:
    """Three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def milliseconds(row: Row | None) -> str:
    """A row's median, or nothing where there is none."""
    return "" if row is None else number(row["median_ms"])


HEAD_OF_TIMES = f"{'median':>9} {'minimum':>9}  {'quartiles':>19} ms"


def times(row: Row) -> str:
    """What stands below :data:`HEAD_OF_TIMES`."""
    return "{:9.3f} {:9.3f}  {:9.3f} {:9.3f}   ".format(*(row[name] for name in TIMES))


def in_words(shape: Sequence[int], threads: int) -> str:
    return f"({', '.join(map(str, shape))}), {threads} thread{'s' * (threads > 1)}"


def most_threads(rows: Iterable[Row]) -> int:
    """The number of threads that the tables show."""
    return max((row["threads"] for row in rows), default=1)
