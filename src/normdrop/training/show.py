"""What ``normdrop evaluate`` and ``normdrop describe`` print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.table import Table

from normdrop.errors import UserError
from normdrop.runs.read import read_result
from normdrop.training.console import say

__all__ = ["conclude", "describe", "evaluate"]


def conclude(folder: Path) -> None:
    """The last lines of a run: the test accuracy, the report, the command that repeats the run."""
    result = read_result(folder)
    if "accuracy" in result:
        say(f"Test {_accuracy(result)}, calibration error {result['calibration_error']:.3f}")
    report = folder / "report.html"
    say(f"Report:  {report}" if report.exists() else f"Results: {folder}")
    say(f"Again:   {result['command']}")


def evaluate(run: Path, *, data: str | None, split: str, flip: bool | None, as_json: bool) -> None:
    """Test a run's network and print what comes out."""
    from normdrop.training.evaluate import evaluate as measure_run

    result = measure_run(run, source=data, split=split, flip=flip)
    if as_json:
        print(json.dumps(result, indent=1, ensure_ascii=False))
        return
    flipped = ", averaged over mirror images" if result["flip_test"] else ""
    say(f"{run.name} on {result['data']}, {result['split']} split{flipped}")
    say(
        f"{_accuracy(result)}, loss {result['loss']:.4f}, "
        f"calibration error {result['calibration_error']:.3f}"
    )
    say(_per_class(result))
    say(_confusion(result))


def _accuracy(result: dict[str, Any]) -> str:
    low, high = result["accuracy_interval"]
    right = round(result["accuracy"] * result["count"])
    return (
        f"accuracy {result['accuracy']:.2%} ({right:,} of {result['count']:,}; "
        f"95 % interval {low:.2%} to {high:.2%})"
    )


def _per_class(result: dict[str, Any]) -> Table:
    table = Table("class", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("precision", "recall", "f1", "support"):
        table.add_column(name, justify="right")
    for row in result["per_class"]:
        shares = [f"{row[name]:.2%}" for name in ("precision", "recall", "f1")]
        table.add_row(str(row["class"]), *shares, f"{row['support']:,}")
    return table


def _confusion(result: dict[str, Any]) -> Table:
    names = [str(row["class"]) for row in result["per_class"]]
    table = Table("truth \\ answer", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for place, counts in enumerate(result["confusion"]):
        shown = [str(count) if count else "·" for count in counts]
        shown[place] = f"[bold]{shown[place]}[/bold]"
        table.add_row(names[place], *shown)
    return table


def describe(
    run: Path | None,
    *,
    model: str,
    size: str,
    classes: int | None,
    batch_size: int,
    memory: Literal["normal", "low"] | None,
    kernels: bool,
) -> None:
    """Print a network's layers."""
    import torch

    import normdrop
    from normdrop import networks

    own = {} if memory is None else {"memory": memory}
    # On the meta device nothing is drawn or computed; the figures are the CPU's, the paths not.
    device = "cpu" if kernels else "meta"
    if run is not None:
        from normdrop.runs.network import build_network
        from normdrop.runs.read import read_record

        record = read_record(run)["network"]
        shape = tuple(record["input_shape"])
        with torch.device(device):
            network = build_network(record, **own)
        shape = _channels_last(shape)
        print(normdrop.describe(network, shape, batch_size=batch_size, kernels=kernels))
        return
    numbers = parse_size(size)
    shape = (numbers[2], *numbers[:2]) if len(numbers) == 3 else numbers
    if classes is None:
        classes = 1000 if len(numbers) == 3 and min(numbers[:2]) >= 224 else 10
    with torch.device(device):
        network = networks.build(model, classes=classes, input_shape=shape, **own)
    print(normdrop.describe(network, numbers, batch_size=batch_size, kernels=kernels))


def parse_size(text: str) -> tuple[int, ...]:
    """An input's size, as in 224x224x3 (height, width, channels) or 784.

    Example:
        >>> parse_size("224x224x3"), parse_size("784")
        ((224, 224, 3), (784,))
    """
    parts = text.lower().replace("×", "x").split("x")
    if len(parts) not in (1, 3) or not all(part.isdecimal() and int(part) for part in parts):
        raise UserError(
            "Expected input such as 224x224x3 (height, width, channels) or 784 (features), "
            f"but got {text!r}"
        )
    return tuple(int(part) for part in parts)


def _channels_last(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[1:], shape[0]) if len(shape) == 3 else shape
