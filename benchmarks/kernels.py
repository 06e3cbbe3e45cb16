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
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import plots
import runner
from operators import OPERATORS, SHAPES, TITLES, Case, cases, dtype_name, providers, shape_name
from runner import BOTH, FORWARD, Row

COLUMNS = (
    "operator",
    "shape",
    "layout",
    "dtype",
    "threads",
    "pass",
    "provider",
    "median_ms",
    "min_ms",
    "p25",
    "p75",
    "copies",
    "floor_copies",
    "ratio",
    "ratio_best",
    "ratio_min",
    "samples",
)
KEYS = COLUMNS[:7]

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


def measure(case: Case, repeats: int, with_peers: bool) -> list[Row]:
    """All rows of a case."""
    with runner.threads(case.threads):
        torch.manual_seed(0)
        ways = list(providers(case))
        if with_peers:
            import peers

            ways += peers.providers(case)
        before = runner.cold_copy_rate()
        samples = runner.run_in_turn(ways, repeats)
        rate = max(before, runner.cold_copy_rate())
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
            **runner.summary(seconds),
            "copies": runner.summary(seconds)["median_ms"] * 1e-3 * rate / size,
            "floor_copies": case.floor(way.layout, which),
            "samples": len(seconds),
        }
        for way, sample in zip(ways, samples, strict=True)
        for which, seconds in sample.seconds.items()
    ]
    for row in rows:
        torch_rows = [r for r in rows if r["provider"] == "torch" and r["pass"] == row["pass"]]
        (same,) = (r for r in torch_rows if r["layout"] == row["layout"])
        row["ratio"] = same["median_ms"] / row["median_ms"]
        row["ratio_best"] = min(r["median_ms"] for r in torch_rows) / row["median_ms"]
        row["ratio_min"] = same["min_ms"] / row["min_ms"]
    return rows


HEAD = (
    f"  {'layout':14}{'pass':18}{'provider':14}{'median':>9} {'minimum':>9}  {'quartiles':>17} ms"
    f"{'copies':>8} {'floor':>6} {'× torch':>8} {'× best':>7}"
)


def line(row: Row) -> str:
    return (
        f"  {row['layout']:14}{row['pass']:18}{row['provider']:14}"
        f"{row['median_ms']:9.3f} {row['min_ms']:9.3f}  {row['p25']:8.3f} {row['p75']:8.3f}   "
        f"{row['copies']:8.2f} {row['floor_copies']:6.1f} "
        f"{row['ratio']:8.2f} {row['ratio_best']:7.2f}"
    )


# ---- Tables ------------------------------------------------------------------------------------


def pick(rows: Sequence[Row], **wanted: Any) -> Row | None:
    """The one row with these values, if there is one."""
    found = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    return found[0] if found else None


def number(value: float) -> str:
    """Three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def is_small(row: Row) -> bool:
    width = 4 if row["dtype"] == "float32" else 2
    return math.prod(map(int, row["shape"].split("x"))) * width <= OVERHEAD


def copies(row: Row) -> str:
    return "" if is_small(row) else f"{row['copies']:.1f}"


def floor(row: Row) -> str:
    return "" if is_small(row) else f"{row['floor_copies']:g}"


def shape_text(row: Row) -> str:
    return row["shape"].replace("x", "×")


def headline(rows: Sequence[Row]) -> str:
    """The README's table: float32, all threads, forward and backward, both layouts in a row."""
    threads = max((row["threads"] for row in rows), default=1)
    header = [
        "forward + backward, ms",
        "torch",
        "normdrop",
        "times faster",
        "torch, channels_last",
        "normdrop, channels_last",
        "times faster",
    ]
    lines = []
    passes = [(operator, shape, BOTH) for operator, shape in HEADLINES]
    passes.insert(5, ("batch_norm", "32x64x56x56", FORWARD))
    for operator, shape, which in passes:
        cells = []
        for layout in ("contiguous", "channels_last"):
            one = {
                "operator": operator,
                "shape": shape,
                "layout": layout,
                "dtype": "float32",
                "threads": threads,
                "pass": which,
            }
            theirs = pick(rows, **one, provider="torch")
            ours = pick(rows, **one, provider="normdrop")
            if theirs and ours:
                cells += [
                    number(theirs["median_ms"]),
                    number(ours["median_ms"]),
                    f"{ours['ratio']:.1f}",
                ]
            else:
                cells += ["", "", ""]
        if any(cells):
            title = TITLES[operator] + (", forward alone" if which == FORWARD else "")
            lines.append([f"{title} ({shape.replace('x', ', ')})", *cells])
    facts = next(iter(rows), {})
    claim = (
        f"{facts.get('processor', '')}, {threads} threads, float32, torch {facts.get('torch', '')}"
        "; medians, with autograd; torch adds and activates in place."
    )
    claim = textwrap.fill(claim, 100)
    return f"{runner.markdown(header, lines)}\n\n{claim}" if lines else "Not measured yet."


def details(rows: Sequence[Row]) -> str:
    """All rows of normdrop's, with torch's beside them, a table for each type and thread number."""
    order = {(o.name, shape_name(s)): i for i, (o, s) in enumerate(_every())}
    header = [
        "operator",
        "shape",
        "layout",
        "pass",
        "torch ms",
        "normdrop ms",
        "quartiles",
        "torch copies",
        "normdrop copies",
        "floor",
        "× torch",
        "× torch's better layout",
    ]
    parts = []
    groups = sorted({(row["dtype"], -row["threads"]) for row in rows}, reverse=True)
    for dtype, threads in sorted(groups, key=lambda g: (g[0] != "float32", g[1])):
        lines = []
        for row in sorted(rows, key=lambda r: order.get((r["operator"], r["shape"]), 99)):
            if row["provider"] != "normdrop" or (row["dtype"], -row["threads"]) != (dtype, threads):
                continue
            one = {name: row[name] for name in KEYS[:6]}
            theirs = pick(rows, **one, provider="torch")
            if theirs is None:
                continue
            lines.append(
                [
                    TITLES.get(row["operator"], row["operator"]),
                    shape_text(row),
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
            )
        plural = "s" if threads < -1 else ""
        parts.append(f"### {dtype}, {-threads} thread{plural}\n\n{runner.markdown(header, lines)}")
    return "\n\n".join(parts) or "Not measured yet."


def dropout_rows(rows: Sequence[Row]) -> str:
    """docs/dropout.md's table: forward and backward, all threads."""
    threads = max((row["threads"] for row in rows), default=1)
    header = ["shape, layout, type", "normdrop, median", "minimum", "median in cold copies"]
    header += ["torch, median", "times faster"]
    lines = []
    for row in rows:
        wanted = {"operator": "dropout", "provider": "normdrop", "threads": threads, "pass": BOTH}
        if any(row[name] != value for name, value in wanted.items()):
            continue
        theirs = pick(rows, **{name: row[name] for name in KEYS[:6]}, provider="torch")
        if theirs is not None:
            shape = row["shape"].replace("x", ", ")
            lines.append(
                [
                    f"({shape}), {row['layout']}, {row['dtype']}",
                    number(row["median_ms"]),
                    number(row["min_ms"]),
                    copies(row),
                    number(theirs["median_ms"]),
                    f"{row['ratio']:.1f}",
                ]
            )
    return runner.markdown(header, lines) if lines else "Not measured yet."


def _every() -> Iterator[tuple[Any, tuple[int, ...]]]:
    for operator in OPERATORS:
        for shape in SHAPES:
            yield operator, shape


# ---- The program -------------------------------------------------------------------------------


def run(options: Any, path: Path, chosen: Sequence[Case], with_peers: bool) -> list[Row]:
    """Measure cases one by one; after each the CSV is whole, so an interrupted run loses little."""
    runner.print_machine()
    print(f"{options.repeats} rounds, all providers in turn; times with autograd\n{HEAD}")
    rows = runner.merge(path, [], COLUMNS, KEYS)
    for case in chosen:
        print(f"\n{case}", flush=True)
        new = measure(case, options.repeats, with_peers)
        for row in new:
            print(line(row), flush=True)
        rows = runner.merge(path, new, COLUMNS, KEYS)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    options = runner.parse(
        "Measure batch normalization and dropout against PyTorch's own.",
        argv,
        peers="measure torch.compile and, where it is installed, JAX, too",
        tables="measure nothing: write the plot and the tables again",
    )
    chosen = [] if options.tables else list(cases(options.threads, options.quick))
    chosen = [case for case in chosen if re.search(options.filter, str(case))]
    if not chosen and not options.tables:
        print(f"--filter {options.filter!r} matches no case", file=sys.stderr)
        return 2
    path = options.output / "kernels.csv"
    if options.tables:
        rows = runner.read_rows(path)
    else:
        rows = run(options, path, chosen, options.peers)
    plots.ratios(rows, options.output / "kernels.png")
    if options.output.resolve() == runner.RESULTS:
        runner.write_section("kernels", headline(rows))
        runner.write_section("kernels-all", details(rows))
        runner.write_section("dropout", dropout_rows(rows), [runner.ROOT / "docs" / "dropout.md"])
    print(f"\n{path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
