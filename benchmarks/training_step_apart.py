"""A whole step of training, each way in a process of its own, as users run it.

What training_step.py measures in one process, where all ways share what one allocator keeps, is
here measured in many: torch in NCHW and in channels_last, and the converted model, each with memory
as glibc gives and takes it, and after ``normdrop.keep_freed_memory()``. The processes take their
turns one at a time: a step that is not counted, since the others emptied the caches, and one that
is. Printed, and written to training_step_apart.csv: median, minimum and quartiles, page faults of a
step, and how many times as fast as torch eager as it comes, in NCHW and in its better layout.
"""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch

import normdrop
from benchmarks import harness
from benchmarks.harness import Benchmark, Row, Section, best, milliseconds, pick
from benchmarks.training_step import (
    AUTO,
    DOCUMENT,
    NETWORKS,
    QUICK,
    STEP,
    Case,
    cases,
    providers,
    reached,
)

COLUMNS = (
    *("network", "batch", "threads", "provider", "layout", "memory", *harness.TIMES),
    *("page_faults", "ratio", "ratio_best", "samples"),
)
KEYS = 6

COMES, KEPT = "as it comes", "kept"
WARM_UP = 4


class Worker:
    """A process that takes steps of one way when told."""

    def __init__(self, case: Case, provider: str, layout: str, memory: str, options: Any) -> None:
        self.row: Row = {
            **case.keys,
            "provider": provider,
            "layout": layout,
            "memory": memory,
        }
        self.seconds: list[float] = []
        self.faults: list[int] = []
        told = {**self.row, "quick": options.quick}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.training_step_apart", "--worker", json.dumps(told)],
            cwd=harness.ROOT,
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
    network = next(n for n in (QUICK if told["quick"] else NETWORKS) if n.name == told["network"])
    chosen = (told["provider"], told["layout"])
    # Each way is made when it is asked for, so those before the chosen one are made and let go.
    way = next(p for p in providers(network) if (p.name, p.layout) == chosen)
    way.measure(WARM_UP)
    print(json.dumps(None), flush=True)
    for _ in sys.stdin:
        way.measure(1)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        seconds = way.measure(1)[STEP]
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        print(json.dumps([seconds, faults]), flush=True)


def measure(case: Case, options: Namespace) -> list[Row]:
    """All rows of a case."""
    layouts = ["contiguous", "channels_last"] if len(case.network.shape) == 4 else ["contiguous"]
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
        measured = {**harness.summary(worker.seconds), "samples": len(worker.seconds)}
        rows.append({**worker.row, **measured, "page_faults": faults})
    for row in rows:
        harness.compare(row, pick(rows, provider="torch", memory=COMES))
    return rows


HEAD = (
    f"  {'provider':10}{'layout':15}{'memory':13}{harness.HEAD_OF_TIMES}"
    f"{'faults':>8}{'× NCHW':>8} {'× best':>7}"
)


def line(row: Row) -> str:
    return (
        f"  {row['provider']:10}{row['layout']:15}{row['memory']:13}{harness.times(row)}"
        f"{row['page_faults']:8} {row['ratio']:7.2f} {row['ratio_best']:7.2f}"
    )


def table(rows: Sequence[Row]) -> str:
    """Milliseconds of a step as users run it; all threads."""
    ways = ["torch", "torch, channels_last", "converted"]
    header = ["a step, ms", *ways, *(f"{way}, kept" for way in ways)]
    header += ["× torch", "× better layout", "to reach"]
    lines = []
    for network in NETWORKS:
        found = pick(rows, network=network.name, threads=harness.most_threads(rows))
        cells = [
            best(found, provider=provider, layout=layout, memory=memory)
            for memory in (COMES, KEPT)
            for provider, layout in (
                *(("torch", "contiguous"), ("torch", "channels_last"), ("convert", AUTO)),
            )
        ]
        if (ours := cells[-1]) is not None:
            name = f"{network.name} ({', '.join(map(str, network.shape))})"
            lines.append([name, *map(milliseconds, cells), *reached(ours, network)])
    return harness.markdown(header, lines)


BENCHMARK = Benchmark(
    claim="Measure whole steps of training, each way in its own process.",
    stem="training_step_apart",
    columns=COLUMNS,
    keys=KEYS,
    cases=lambda options: [c for c in cases(options) if c.threads == max(options.threads)],
    measure=measure,
    head=HEAD,
    line=line,
    sections=[Section("training-step-apart", table, [DOCUMENT])],
)


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["--worker"]:
        work(json.loads(argv[1]))
        return 0
    return harness.run(BENCHMARK, argv)


if __name__ == "__main__":
    sys.exit(main())
