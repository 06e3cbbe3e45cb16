"""Batch normalization and dropout against PyTorch's own: ``make bench``.

Every operator, shape, type and number of threads is one case. In a case torch and normdrop run in
turn, in both memory layouts, forward alone and forward with backward, as a module's user calls them
and with autograd. Printed, and written to kernels.csv: median, minimum and quartiles, the median
in cold copies beside the floor (see operators.py), and the ratio to torch in the same layout and in
torch's better layout. Then kernels.png and the tables in README.md, docs/benchmarks.md and
docs/dropout.md.
"""

from __future__ import annotations

import math
import sys
import textwrap
from argparse import Namespace
from collections.abc import Sequence

import torch

from benchmarks import harness, peers, plots
from benchmarks.harness import BOTH, FORWARD, Benchmark, Row, Section, best, number, pick
from benchmarks.operators import SHAPES, TITLES, Case, cases, dtype_name, providers, shape_name

COLUMNS = (
    *("operator", "shape", "layout", "dtype", "threads", "pass", "provider", *harness.TIMES),
    *("copies", "floor_copies", "ratio", "ratio_best", "ratio_min", "samples"),
)
KEYS = 7

HEADLINES = (
    ("batch_norm+relu", "32x64x56x56"),
    ("batch_norm+relu", "128x16x32x32"),
    ("batch_norm+relu", "256x1024"),
    ("batch_norm+add+relu", "32x64x56x56"),
    ("batch_norm", "32x64x56x56"),
    ("dropout", "32x64x56x56"),
    ("dropout", "256x1024"),
)
"""What the README shows, of all that is measured."""

OVERHEAD = 1 << 16
"""Bytes up to which a call costs more than its memory, so that copies say nothing."""


def measure(case: Case, options: Namespace) -> list[Row]:
    """All rows of a case."""
    with harness.threads(case.threads):
        torch.manual_seed(0)
        ways = list(providers(case))
        if options.peers:
            ways += peers.providers(case)
        before = harness.cold_copy_rate()
        samples = harness.run_in_turn(ways, options.repeats)
        rate = max(before, harness.cold_copy_rate())
    size = math.prod(case.shape) * case.dtype.itemsize
    rows: list[Row] = [
        {
            "operator": case.operator.name,
            "shape": shape_name(case.shape),
            "layout": way.layout,
            "dtype": dtype_name(case.dtype),
            "threads": case.threads,
            "pass": which,
            "provider": way.name,
            **harness.summary(seconds),
            "floor_copies": case.floor(way.layout, which),
            "samples": len(seconds),
        }
        for way, sample in zip(ways, samples, strict=True)
        for which, seconds in sample.seconds.items()
    ]
    for row in rows:
        row["copies"] = row["median_ms"] * 1e-3 * rate / size
        eager = pick(rows, provider="torch", **{"pass": row["pass"]})
        # torch in the same layout comes first.
        harness.compare(row, sorted(eager, key=lambda r: r["layout"] != row["layout"]))
    return rows


HEAD = (
    f"  {'layout':14}{'pass':18}{'provider':14}{harness.HEAD_OF_TIMES}"
    f"{'copies':>8} {'floor':>6} {'× torch':>8} {'× best':>7}"
)


def line(row: Row) -> str:
    return (
        f"  {row['layout']:14}{row['pass']:18}{row['provider']:14}{harness.times(row)}"
        f"{row['copies']:8.2f} {row['floor_copies']:6.1f} "
        f"{row['ratio']:8.2f} {row['ratio_best']:7.2f}"
    )


# ---- Tables ------------------------------------------------------------------------------------


def is_small(row: Row) -> bool:
    width = 4 if row["dtype"] == "float32" else 2
    return math.prod(map(int, row["shape"].split("x"))) * width <= OVERHEAD


def copies(row: Row) -> str:
    return "" if is_small(row) else f"{row['copies']:.1f}"


def floor(row: Row) -> str:
    return "" if is_small(row) else f"{row['floor_copies']:g}"


def headline(rows: Sequence[Row]) -> str:
    """The README's table: float32, all threads, forward and backward, both layouts in a row."""
    threads = harness.most_threads(rows)
    header = [
        *("forward + backward, ms", "torch", "normdrop", "times faster"),
        *("torch, channels_last", "normdrop, channels_last", "times faster"),
    ]
    lines = []
    passes = [(operator, shape, BOTH) for operator, shape in HEADLINES]
    passes.insert(5, ("batch_norm", "32x64x56x56", FORWARD))
    for operator, shape, which in passes:
        one = {"operator": operator, "shape": shape, "dtype": "float32", "threads": threads}
        cells = []
        for layout in ("contiguous", "channels_last"):
            found = pick(rows, **one, layout=layout, **{"pass": which})
            theirs, ours = best(found, provider="torch"), best(found, provider="normdrop")
            ratio = f"{ours['ratio']:.1f}" if ours else ""
            cells += [harness.milliseconds(theirs), harness.milliseconds(ours), ratio]
        if any(cells):
            title = TITLES[operator] + (", forward alone" if which == FORWARD else "")
            lines.append([f"{title} ({shape.replace('x', ', ')})", *cells])
    facts = next(iter(rows), {})
    claim = (
        f"{facts.get('processor', '')}, {threads} threads, float32, torch {facts.get('torch', '')}"
        "; medians, with autograd; torch adds and activates in place."
    )
    claim = textwrap.fill(claim, 100)
    return f"{harness.markdown(header, lines)}\n\n{claim}" if lines else "Not measured yet."


def details(rows: Sequence[Row]) -> str:
    """The first shape's rows of each type and number of threads; the CSV holds the others."""
    header = [
        *("operator", "shape", "layout", "pass", "torch ms", "normdrop ms", "quartiles"),
        *("torch copies", "normdrop copies", "floor", "× torch", "× torch's better layout"),
    ]
    parts = []
    groups = sorted({(r["dtype"] != "float32", -r["threads"], r["dtype"]) for r in rows})
    for _, negative, dtype in groups:
        ours = pick(rows, provider="normdrop", dtype=dtype, threads=-negative)
        shown = pick(ours, shape=shape_name(SHAPES[0]))
        lines = [_detail(row, theirs) for row in shown if (theirs := _torchs(rows, row))]
        title = f"### {dtype}, {-negative} thread{'s' * (negative < -1)}"
        link = "[kernels.csv](../benchmarks/results/kernels.csv)"
        rest = f"{len(ours) - len(shown)} more rows: {link}."
        parts.append(f"{title}\n\n{harness.markdown(header, lines)}\n\n{rest}")
    return "\n\n".join(parts) or "Not measured yet."


def _torchs(rows: Sequence[Row], row: Row) -> Row | None:
    return best(rows, provider="torch", **{name: row[name] for name in COLUMNS[: KEYS - 1]})


def _detail(row: Row, theirs: Row) -> list[str]:
    return [
        TITLES.get(row["operator"], row["operator"]),
        row["shape"].replace("x", "×"),
        row["layout"],
        row["pass"].replace("+", " + "),
        number(theirs["median_ms"]),
        number(row["median_ms"]),
        f"{number(row['p25'])}–{number(row['p75'])}",
        copies(theirs),
        copies(row),
        floor(row),
        f"{row['ratio']:.2f}",
        f"{row['ratio_best']:.2f}",
    ]


def dropout_rows(rows: Sequence[Row]) -> str:
    """docs/dropout.md's table: forward and backward, all threads."""
    header = ["shape, layout, type", "normdrop, median", "minimum", "median in cold copies"]
    header += ["torch, median", "times faster"]
    wanted = {"operator": "dropout", "threads": harness.most_threads(rows), "pass": BOTH}
    lines = [
        [
            f"({row['shape'].replace('x', ', ')}), {row['layout']}, {row['dtype']}",
            number(row["median_ms"]),
            number(row["min_ms"]),
            copies(row),
            number(theirs["median_ms"]),
            f"{row['ratio']:.1f}",
        ]
        for row in pick(rows, provider="normdrop", **wanted)
        if (theirs := _torchs(rows, row))
    ]
    return harness.markdown(header, lines) if lines else "Not measured yet."


# ---- The program -------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    return harness.run(BENCHMARK, argv)


BENCHMARK = Benchmark(
    claim="Measure batch normalization and dropout against PyTorch's own.",
    stem="kernels",
    columns=COLUMNS,
    keys=KEYS,
    cases=lambda options: cases(options.threads, options.quick),
    measure=measure,
    head=HEAD,
    line=line,
    sections=(
        Section("kernels", headline),
        Section("kernels-all", details),
        Section("dropout", dropout_rows, [harness.ROOT / "docs" / "dropout.md"]),
    ),
    finish=lambda rows, folder: plots.ratios(rows, folder / "kernels.png"),
    switches={"peers": "measure torch.compile and, where it is installed, JAX, too"},
)

if __name__ == "__main__":
    sys.exit(main())
