"""The command line: plain typed functions, each callable from Python.

Every function in ``COMMANDS`` is a command; its arguments are flags and its docstring the help. An
argument that is a dataclass of options gives one flag a field. Heavy imports stay inside the
functions, so that help needs no torch.
"""

from __future__ import annotations

import inspect
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from normdrop.errors import Diverged, UserError
from normdrop.flags import parse, unknown
from normdrop.runs.options import (
    DataOptions,
    NetworkOptions,
    Options,
    RecipeOptions,
    RunOptions,
)
from normdrop.training.recipes import in_words

__all__ = ["COMMANDS", "describe", "evaluate", "main", "predict", "report", "train", "version"]


def train(
    data: DataOptions = DataOptions(),
    network: NetworkOptions = NetworkOptions(),
    recipe: RecipeOptions = RecipeOptions(),
    run: RunOptions = RunOptions(),
    *,
    resume: Path | None = None,
) -> None:
    """Train a network on data, test it once, and leave everything in runs/NAME/.

    Without options: a small residual network on scikit-learn's digits, in less than a minute.
    Ctrl-C stops a run; --resume goes on with it, to the very weights of a run never stopped.

    Args:
        data: the data.
        network: the network.
        recipe: the recipe.
        run: the run.
        resume: a run folder to go on with; its own options hold, but for
            --max-time and --no-report.
    """
    from normdrop.memory.allocator import keep_freed_memory_unless_told
    from normdrop.training.fit import train
    from normdrop.training.show import conclude

    keep_freed_memory_unless_told()
    diverged = None
    try:
        folder = train(Options(data, network, recipe, run), resume=resume)
    except Diverged as error:
        diverged, folder = error, error.folder
    if run.report:
        from normdrop.report.report import write_report

        write_report(folder)
    conclude(folder)
    if diverged is not None:
        raise diverged


def evaluate(
    run: Path,
    *,
    data: str | None = None,
    split: Literal["test", "val", "train"] = "test",
    flip_test: bool | None = None,
    json: bool = False,
) -> None:
    """Test a trained network: accuracy, per class, confusion and calibration.

    Args:
        run: a run folder.
        data: other data to test on, with the classes of the run; by default the run's test split.
        split: which split of the run's own data.
        flip_test: average the probabilities of an image and of its mirror image; by default as
            the run was told.
        json: print JSON instead of tables.
    """
    from normdrop.training.show import evaluate

    evaluate(run, data=data, split=split, flip=flip_test, as_json=json)


def predict(
    run: Path,
    files: list[Path],
    *,
    format: Literal["table", "csv", "json"] | None = None,
    output: Path | None = None,
    skip_unreadable: bool = False,
) -> None:
    """Predict the class of images, or of the rows of a table, with a trained network.

    Args:
        run: a run folder.
        files: images, or .csv or .parquet tables.
        format: of the output; by default what the output's name ends with, or a table.
        output: a file to write; by default the output is printed.
        skip_unreadable: list images that cannot be read and go on without them.
    """
    from normdrop.training.predict import predict

    predict(run, files, form=format, output=output, skip_unreadable=skip_unreadable)


def describe(
    run: Path | None = None,
    *,
    model: str = "resnet18",
    input: str = "224x224x3",
    classes: int | None = None,
    batch_size: int = 2,
    memory: Literal["normal", "low"] | None = None,
    kernels: bool = False,
) -> None:
    """Show a network's layers, their shapes, Θ, and the γ and α that batch norm adds.

    Args:
        run: a run folder, to show its network; or choose by model and input.
        model: resnet18, vgg16, mlp…
        input: the input's size, height x width x channels, or the number of features.
        classes: number of classes; by default 1000 for 224x224 images, else 10.
        batch_size: samples in the batch for which the kept bytes are counted.
        memory: low or normal, what training with this option keeps; by default the run's own.
        kernels: say which path each layer takes on this machine, a kernel or torch and why.
    """
    from normdrop.training.show import describe

    describe(
        run,
        model=model,
        size=input,
        classes=classes,
        batch_size=batch_size,
        memory=memory,
        kernels=kernels,
    )


def report(run: Path) -> None:
    """Write the page of a finished run again.

    Args:
        run: a run folder.
    """
    from normdrop.report.report import write_report

    print(f"Report: {write_report(run)}")


def version() -> None:
    """Show the version, and whether the kernels are there."""
    import normdrop

    kernels = "with" if normdrop.has_kernels() else "without"
    print(f"normdrop {normdrop.__version__} ({kernels} kernels)")


COMMANDS: dict[str, Callable[..., None]] = {
    command.__name__: command for command in (train, evaluate, predict, describe, report, version)
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; give the exit code.

    0, 1 for a run that diverged, 2 for what the user gave, 130 for Ctrl-C.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["--version"]:
        arguments = ["version"]
    try:
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            print(_overview())
            return 0
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            _run(arguments[0], arguments[1:])
    except UserError as error:
        print(f"normdrop: {error}", file=sys.stderr)
        return 1 if isinstance(error, Diverged) else 2
    except SystemExit as done:  # The help of a command was shown.
        return int(done.code or 0)
    except BrokenPipeError:
        # Whoever reads the output has gone; without this, Python would complain at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt as stop:
        print(f"\n{stop or 'Stopped.'}", file=sys.stderr)
        return 130
    return 0


def _run(name: str, arguments: list[str]) -> None:
    if name not in COMMANDS:
        raise UserError(unknown("command", name, COMMANDS))
    notes = in_words() if name == "train" else ""
    COMMANDS[name](**parse(COMMANDS[name], arguments, prog=f"normdrop {name}", notes=notes))


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """A warning is one sentence, without the line of code that gave it."""
    text = str(message).removeprefix("normdrop: ")
    print(f"normdrop: warning: {text}", file=sys.stderr)


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [
        "normdrop trains a network with batch normalization and dropout on your data.",
        "",
        "usage: normdrop COMMAND …      (normdrop COMMAND --help shows its options)",
        "",
    ]
    lines += [
        f"  {name:{width}}  {(inspect.getdoc(command) or '').splitlines()[0]}"
        for name, command in COMMANDS.items()
    ]
    return "\n".join([*lines, "", "Start with: normdrop train"])


if __name__ == "__main__":
    sys.exit(main())
