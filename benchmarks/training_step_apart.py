"""A whole step of training, each way in a process of its own, as users run it.

What training_step.py measures in one process, where all ways share what one allocator keeps, is
here measured in many: torch in NCHW and in channels_last, and the converted model, each with memory
as glibc gives and takes it, and after ``normdrop.keep_freed_memory()``. The processes take their
turns one at a time: a step that is not counted, since the others emptied the caches, and one that
is. Printed, and written to training_step_apart.csv: median, minimum and quartiles, page faults of a
step, and how many times as fast as torch eager as it comes, in NCHW and in its better layout.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import normdrop
import runner
from runner import Row
from training_step import AUTO, CASES, DOCUMENT, QUICK, STEP, Case, compare, milliseconds, providers

COLUMNS = (
    "network",
    "batch",
    "threads",
    "provider",
    "layout",
    "memory",
    "median_ms",
    "min_ms",
    "p25",
    "p75",
    "page_faults",
    "ratio",
    "ratio_best",
    "samples",
)
KEYS = COLUMNS[:6]

COMES, KEPT = "as it comes", "kept"
WARM_UP = 4


class Worker:
    """A process that takes steps of one way when told."""

    def __init__(self, case: Case, provider: str, layout: str, memory: str, options: Any) -> None:
        self.row: Row = {
            "network": case.name,
            "batch": "x".join(map(str, case.shape)),
            "threads": options.threads[0],
            "provider": provider,
            "layout": layout,
            "memory": memory,
        }
        self.seconds: list[float] = []
        self.faults: list[int] = []
        told = {**self.row, "quick": options.quick}
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--worker", json.dumps(told)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()

    def turn(self) -> None:
        assert self._process.stdin is not None
        print("step", file=self._process.stdin, flush=True)
        seconds, faults = self._answer()
        self.seconds.append(seconds)
        self.faults.append(faults)

    def close(self) -> None:
        self._process.communicate()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the process of {self.row} ended; its message stands above")
        return json.loads(line)


def work(told: dict[str, Any]) -> None:
    """What a worker does: build, warm up, and a step for each line that comes."""
    torch.set_num_threads(told["threads"])
    if told["memory"] == KEPT:
        normdrop.keep_freed_memory()
    case = next(c for c in (QUICK if told["quick"] else CASES) if c.name == told["network"])
    chosen = (told["provider"], told["layout"])
    # Each way is made when it is asked for, so those before the chosen one are made and let go.
    way = next(p for p in providers(case, False, False) if (p.name, p.layout) == chosen)
    way.measure(WARM_UP)
    print(json.dumps(None), flush=True)
    for _ in sys.stdin:
        way.measure(1)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        seconds = way.measure(1)[STEP]
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        print(json.dumps([seconds, faults]), flush=True)


def measure(case: Case, options: argparse.Namespace) -> list[Row]:
    """All rows of a case."""
    layouts = ["contiguous", "channels_last"] if len(case.shape) == 4 else ["contiguous"]
    ways = [("torch", layout) for layout in layouts] + [("convert", AUTO)]
    workers = [Worker(case, *way, memory, options) for memory in (COMES, KEPT) for way in ways]
    order = random.Random(0)
    for _ in range(options.repeats):
        for worker in order.sample(workers, len(workers)):
            worker.turn()
    rows = []
    for worker in workers:
        worker.close()
        faults = sum(worker.faults) // len(worker.faults)
        measured = {**runner.summary(worker.seconds), "samples": len(worker.seconds)}
        rows.append({**worker.row, **measured, "page_faults": faults})
    compare(rows, [r for r in rows if r["provider"] == "torch" and r["memory"] == COMES])
    return rows


HEAD = (
    f"  {'provider':10}{'layout':15}{'memory':13}{'median':>9} {'minimum':>9}  {'quartiles':>19} ms"
    f"{'faults':>8}{'× NCHW':>8} {'× best':>7}"
)


def line(row: Row) -> str:
    return (
        f"  {row['provider']:10}{row['layout']:15}{row['memory']:13}{row['median_ms']:9.2f} "
        f"{row['min_ms']:9.2f}  {row['p25']:9.2f} {row['p75']:9.2f}   {row['page_faults']:8} "
        f"{row['ratio']:7.2f} {row['ratio_best']:7.2f}"
    )


def table(rows: Sequence[Row]) -> str:
    """Milliseconds of a step as users run it; all threads."""
    threads = max((row["threads"] for row in rows), default=1)
    ways = ["torch", "torch, channels_last", "converted"]
    header = ["a step, ms", *ways, *(f"{way}, kept" for way in ways)]
    header += ["× torch", "× better layout", "to reach"]
    lines = []
    for case in CASES:
        found = {
            (r["provider"], r["layout"], r["memory"]): r
            for r in rows
            if (r["network"], r["threads"]) == (case.name, threads)
        }
        if not found:
            continue
        cells = [
            found.get((*way, memory))
            for memory in (COMES, KEPT)
            for way in (("torch", "contiguous"), ("torch", "channels_last"), ("convert", AUTO))
        ]
        ours = cells[-1]
        assert ours is not None
        lines.append(
            [
                f"{case.name} ({', '.join(map(str, case.shape))})",
                *map(milliseconds, cells),
                f"{ours['ratio']:.2f}",
                f"{ours['ratio_best']:.2f}",
                " / ".join(f"{goal:g}" for goal in case.goals),
            ]
        )
    return runner.markdown(header, lines)


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["--worker"]:
        work(json.loads(argv[1]))
        return 0
    options = runner.parse("Measure whole steps of training, each way in its own process.", argv)
    options.threads = [max(options.threads)]
    runner.print_machine()
    chosen = [c for c in (QUICK if options.quick else CASES) if re.search(options.filter, c.name)]
    if not chosen:
        print(f"--filter {options.filter!r} matches no network", file=sys.stderr)
        return 2
    path: Path = options.output / "training_step_apart.csv"
    rows: list[Row] = []
    for case in chosen:
        shape = ", ".join(map(str, case.shape))
        threads = options.threads[0]
        print(f"\n{case.name} ({shape}), {threads} thread{'s' * (threads > 1)}\n{HEAD}")
        new = measure(case, options)
        print("\n".join(map(line, new)), flush=True)
        rows = runner.merge(path, new, COLUMNS, KEYS)
    if options.output.resolve() == runner.RESULTS:
        runner.write_section("training-step-apart", table(rows), [DOCUMENT])
    print(f"\n{path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
