"""Converted models against the originals, on architectures that others wrote.

Each is compared twice. In float64 the converted model has to repeat outputs, gradients and running
statistics; in float32 it may be off, from the original in float64, by no more than a few times what
the original in float32 is. (Where one input of ReLU is nearly 0, rounding decides its sign, and one
model is off by much more than the other: then five inputs are tried, and the medians count.) All
dropout rates are 0 for that, since masks differ; then both train with the rates they came with, in
turn, on inputs of a useful size, and the time of a step is compared.

    python -m benchmarks.checks.architectures --filter 'pytorchcv resnet' --threads 1
"""

from __future__ import annotations

import copy
import pickle
import random
import re
import statistics
import sys
import traceback
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter_ns
from typing import Any

import numpy as np
import torch
from torch import Tensor

import normdrop
from benchmarks import harness
from benchmarks.checks.zoo import Architecture, architectures
from benchmarks.harness import Benchmark, Section
from normdrop.surgery.plan import Plan

COLUMNS = (
    *("source", "architecture", "input", "layers", "converted", "fused", "unfused", "left"),
    *("float64", "error", "error_original", "result"),
    *("timed_input", "threads", "step_ms", "step_original_ms", "speed"),
)
KEYS = 2

EPSILON = 2.0**-23
ALLOWED_FLOAT64 = 1e-10
ALLOWED_FACTOR, ALLOWED_FLOAT32 = 4.0, 2e-6

Results = dict[str, list[Tensor]]


def measure(architecture: Architecture, options: Namespace) -> Iterator[harness.Row]:
    """One row; what goes wrong is its result."""
    threads = options.threads[-1]
    with harness.threads(threads):
        yield row_of(architecture, options.repeats) | {"threads": threads}


def row_of(architecture: Architecture, repeats: int) -> harness.Row:
    row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
    row |= {
        "source": architecture.source,
        "architecture": architecture.name,
        "input": times(architecture.shape),
        "timed_input": times(architecture.timed or architecture.shape),
    }
    try:
        seed(0)
        original = architecture.make()
        scatter(original)
        row |= counts(normdrop.plan(original))
        row |= compare(architecture, original)
        row |= time_steps(architecture, original, repeats)
    except Exception as error:
        traceback.print_exc()
        text = str(error).splitlines()
        row["result"] = f"{type(error).__name__}: {text[0] if text else ''}"
    return row


def times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def counts(plan: Plan) -> dict[str, Any]:
    """What plan says, in numbers; the reasons with how often each occurs."""
    reasons: Counter[str] = Counter()
    unfused: Counter[str] = Counter()
    for row in plan:
        if row.action == "leave":
            reasons[f"{row.type}: {row.why}"] += 1
        elif row.action == "replace" and "Norm" in row.type:
            why = row.why.partition(";")[0]
            unfused[why.removeprefix("not fused: ") if "not fused" in why else ""] += 1
    return {
        "layers": len(plan),
        "converted": plan.count("replace") + plan.count("fuse"),
        "fused": plan.count("fuse"),
        "unfused": listing(unfused),
        "left": listing(reasons),
    }


def listing(counted: Counter[str]) -> str:
    return "; ".join(f"{count} {text}".strip() for text, count in counted.most_common())


# ---- The same numbers ---------------------------------------------------------------------------


def compare(architecture: Architecture, original: torch.nn.Module) -> dict[str, Any]:
    """Largest differences, of all tensors, and whether they are what rounding makes."""
    original = copy.deepcopy(original)
    drop_nothing(original)
    keys = list(original.state_dict())
    wide = copy.deepcopy(original).double()
    converted = normdrop.convert(copy.deepcopy(original))
    wide_converted = normdrop.convert(copy.deepcopy(wide))
    if list(converted.state_dict()) != keys:
        raise RuntimeError("the converted model has other names")

    differences = []
    for number in (1, 2, 3, 4, 5):
        x = torch.randn(architecture.shape, generator=torch.Generator().manual_seed(number))
        truth = run(wide, x.double())
        float64 = largest_difference(run(wide_converted, x.double()), truth)
        moved = run(copy.deepcopy(original), x * (1 + EPSILON)) if architecture.draws else {}
        theirs, ours = run(original, x), run(converted, x)
        if architecture.draws:
            # It draws other numbers in float64. So the two in float32 are compared with each other,
            # and what rounding may do is what it does to the original when its input is rounded.
            differences.append(
                (float64, largest_difference(ours, theirs), largest_difference(moved, theirs))
            )
        else:
            differences.append(
                (float64, largest_difference(ours, truth), largest_difference(theirs, truth))
            )
        float64, error, error_original = (
            statistics.median(d) for d in zip(*differences, strict=True)
        )
        is_close = error <= ALLOWED_FACTOR * error_original + ALLOWED_FLOAT32
        # As much in float64 as the original's error in float32, which tells how rounding grows.
        allowed = ALLOWED_FLOAT64 + ALLOWED_FACTOR * 2.0**-29 * error_original
        is_equal = is_close and float64 <= allowed
        if number == 1 and is_equal:
            break
    check_it_lives_on(original, converted, x)
    return {
        "float64": float64,
        "error": error,
        "error_original": error_original,
        "result": "equal" if is_equal else "differs",
    }


def run(model: torch.nn.Module, x: Tensor) -> Results:
    """Outputs and gradients in training, what its buffers are then, and the same in evaluation."""
    results: Results = {}
    for training in (True, False):
        mode = "training" if training else "evaluation"
        model.train(training)
        seed(2)
        x = x.clone().requires_grad_()
        outputs = list(tensors(model(x)))
        inputs = [x, *(p for p in model.parameters() if p.requires_grad)]
        grads = torch.autograd.grad(loss_of(outputs), inputs, allow_unused=True)
        results[f"{mode}: outputs"] = [y.detach() for y in outputs]
        results[f"{mode}: gradients"] = [
            torch.zeros_like(p) if g is None else g for p, g in zip(inputs, grads, strict=True)
        ]
    results["buffers"] = [b.detach().clone() for b in model.buffers() if b is not None]
    return results


def largest_difference(ours: Results, theirs: Results) -> float:
    """The largest |a - b| / |b| of all tensors.

    A tensor that is small beside the others of its kind is measured against 1/1000 of their root
    mean square: the gradient of a bias before batch normalization, say, is 0 but for rounding.
    """
    largest = 0.0
    for name, expected in theirs.items():
        norms = [float(b.double().norm()) for b in expected]
        elements = sum(b.numel() for b in expected)
        mean_square = sum(norm**2 for norm in norms) / max(elements, 1)
        for a, b, norm in zip(ours[name], expected, norms, strict=True):
            if not b.is_floating_point():
                if not torch.equal(a, b):
                    raise RuntimeError(f"{name}: {a} where the original has {b}")
                continue
            if not bool(torch.isfinite(a).all()):
                raise RuntimeError(f"{name}: not finite")
            floor = 1e-3 * (mean_square * b.numel()) ** 0.5
            difference = float((a.double() - b.double()).norm())
            largest = max(largest, difference / max(norm, floor, 1e-30))
    return largest


def check_it_lives_on(original: torch.nn.Module, converted: torch.nn.Module, x: Tensor) -> None:
    """It loads the original's checkpoint, copies, pickles where the original does, and reverts."""
    for model in (original, converted):  # where some forget what they keep in evaluation
        model.train()
    converted.load_state_dict(original.state_dict())
    expected = evaluate(converted, x)
    copies = [copy.deepcopy(converted)]
    if can_pickle(original):
        copies.append(pickle.loads(pickle.dumps(converted)))
    for other in copies:
        if any(not torch.equal(a, b) for a, b in zip(evaluate(other, x), expected, strict=True)):
            raise RuntimeError("a copy gives something else")
        if normdrop.plan(other).count("already") != normdrop.plan(converted).count("already"):
            raise RuntimeError("a copy is not converted")
    normdrop.revert(converted)
    if [type(m) for m in converted.modules()] != [type(m) for m in original.modules()]:
        raise RuntimeError("revert leaves other classes")
    pairs = zip(evaluate(converted, x), evaluate(original, x), strict=True)
    if any(not torch.equal(a, b) for a, b in pairs):
        raise RuntimeError("the reverted model gives something else")


def evaluate(model: torch.nn.Module, x: Tensor) -> list[Tensor]:
    seed(3)
    with torch.no_grad():
        return list(tensors(model.eval()(x)))


def can_pickle(model: torch.nn.Module) -> bool:
    try:
        pickle.dumps(model)
    except Exception:
        return False
    return True


def tensors(output: Any) -> Iterator[Tensor]:
    """The floating-point tensors in what a model returns."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        yield from tensors(list(output.values()))
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from tensors(value)


def loss_of(outputs: list[Tensor]) -> Tensor:
    """Something that every output has a part in, each element another."""
    total = torch.zeros((), dtype=outputs[0].dtype)
    for y in outputs:
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
        total = total + (y * weights).mean() + y.square().mean()
    return total


def seed(number: int) -> None:
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002, the generator that networks draw from


def scatter(model: torch.nn.Module) -> None:
    """Give every norm weights and statistics that are not 0 and 1."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            with torch.no_grad():
                if module.weight is not None:
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.uniform_(-0.5, 0.5)
                if module.running_mean is not None and module.running_var is not None:
                    module.running_mean.normal_(0, 0.2)
                    module.running_var.uniform_(0.5, 1.5)


def drop_nothing(model: torch.nn.Module) -> None:
    """Set every rate of dropout to 0, those that stand on a module or in its configuration too."""
    for module in model.modules():
        for owner in (module, getattr(module, "config", None)):
            for name, value in list(getattr(owner, "__dict__", {}).items()):
                is_rate = "drop" in name or (name == "p" and owner is module)
                if is_rate and isinstance(value, float) and 0 < value < 1:
                    setattr(owner, name, 0.0)


# ---- Time ---------------------------------------------------------------------------------------


def time_steps(
    architecture: Architecture, original: torch.nn.Module, repeats: int
) -> dict[str, Any]:
    """A step of training, in turn; the speed is the median of the rounds' ratios."""
    x = torch.randn(architecture.timed or architecture.shape)
    models = [copy.deepcopy(original), normdrop.convert(copy.deepcopy(original))]
    steps = [make_step(model.train(), x) for model in models]
    for step in steps:
        step(), step()
    seconds: list[list[float]] = [[], []]
    order = random.Random(0)
    for _ in range(repeats):
        for i in order.sample(range(2), 2):
            start = perf_counter_ns()
            loss = steps[i]()
            seconds[i].append((perf_counter_ns() - start) * 1e-9)
            if not np.isfinite(loss):
                raise RuntimeError(f"the loss is {loss} with dropout as it is")
    theirs, ours = seconds
    return {
        "step_ms": statistics.median(ours) * 1e3,
        "step_original_ms": statistics.median(theirs) * 1e3,
        "speed": statistics.median(a / b for a, b in zip(theirs, ours, strict=True)),
    }


def make_step(model: torch.nn.Module, x: Tensor) -> Callable[[], float]:
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9)

    def step() -> float:
        optimizer.zero_grad()
        loss = loss_of(list(tensors(model(x))))
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


# ---- Tables -------------------------------------------------------------------------------------


def line(row: harness.Row) -> str:
    speed = f"{row['speed']:.2f}x" if row["speed"] != "" else ""
    numbers = " ".join(
        f"{row[name]:.0e}" if row[name] != "" else "-"
        for name in ("float64", "error", "error_original")
    )
    return (
        f"{row['source']:12} {row['architecture']:34} {row['layers']:>4} {row['converted']:>4} "
        f"{row['fused']:>4}  {numbers}  {row['result']:8} {speed:6} "
        f"{row['unfused']} {('left: ' + row['left']) if row['left'] else ''}"
    ).rstrip()


def summary(rows: Sequence[harness.Row]) -> str:
    """A table by package."""
    lines = []
    sources = list(dict.fromkeys(row["source"] for row in rows))
    for source in [*sources, "all"]:
        of = [row for row in rows if source in (row["source"], "all")]
        speeds = [row["speed"] for row in of if row["speed"] != "" and row["layers"]]
        lines.append(
            (
                source,
                str(len(of)),
                str(sum(row["result"] == "equal" for row in of)),
                str(sum(row["layers"] or 0 for row in of)),
                str(sum(row["converted"] or 0 for row in of)),
                str(sum(row["fused"] or 0 for row in of)),
                f"{statistics.median(speeds):.2f}" if speeds else "",
                f"{min(speeds):.2f}-{max(speeds):.2f}" if speeds else "",
            )
        )
    header = ("from", "architectures", "equal", "layers", "converted", "fused", "median speed")
    return harness.markdown((*header, "range"), lines)


def why_not(rows: Sequence[harness.Row]) -> str:
    """The reasons for which norms are not fused, in all architectures, with how often each."""
    counted: Counter[str] = Counter()
    for row in rows:
        for part in filter(None, str(row["unfused"]).split("; ")):
            count, _, reason = part.partition(" ")
            reason = re.sub(r"used \d+ times", "used more than once", reason)
            reason = re.sub(r"the code of .* not traced.*", "the code cannot be traced", reason)
            reason = re.sub(r"what .* returns", "what its module returns", reason)
            counted[reason or "other"] += int(count)
    shown = [(reason, str(count)) for reason, count in counted.most_common(12)]
    rest = sum(counted.values()) - sum(int(count) for _, count in shown)
    return harness.markdown(("why a norm is not fused", "norms"), [*shown, ("all else", str(rest))])


BENCHMARK = Benchmark(
    claim="Compare converted models with the originals, on architectures that others wrote.",
    stem="architectures",
    columns=COLUMNS,
    keys=KEYS,
    cases=lambda options: [a for a in architectures() if a.source == "torch" or not options.quick],
    measure=measure,
    line=line,
    sections=[
        Section(
            "architectures",
            lambda rows: f"{summary(rows)}\n\n{why_not(rows)}",
            [harness.ROOT / "docs" / "convert.md"],
        )
    ],
    finish=lambda rows, folder: print(summary(rows)),
    holds=lambda row: row["result"] == "equal",
)


def main(argv: Sequence[str] | None = None) -> int:
    return harness.run(BENCHMARK, argv)


if __name__ == "__main__":
    sys.exit(main())
