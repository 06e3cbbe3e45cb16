"""The command line: plain typed functions, each callable from Python.

Every function in ``COMMANDS`` is a command; its arguments are flags and its docstring the help. An
argument that is a dataclass of options gives one flag a field. Heavy imports stay inside the
functions, so that help needs no torch.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from normdrop.errors import UserError
from normdrop.training.options import (
    DataOptions,
    NetworkOptions,
    Options,
    RecipeOptions,
    RunOptions,
)

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

    Without arguments: a small residual network on scikit-learn's digits, in less than a minute.

    Args:
        data: the data.
        network: the network.
        recipe: the recipe.
        run: the run.
        resume: a run folder to go on with; its own options hold.
    """
    from normdrop.training.fit import train

    train(Options(data, network, recipe, run), resume=resume)


def evaluate(
    run: Path,
    *,
    data: str | None = None,
    split: Literal["test", "val", "train"] = "test",
    json: bool = False,
) -> None:
    """Test a trained network: accuracy, per class, confusion and calibration.

    Args:
        run: a run folder.
        data: other data to test on, with the classes of the run; by default the run's test split.
        split: which split of the run's own data.
        json: print JSON instead of tables.
    """
    from normdrop.training.show import evaluate

    evaluate(run, data=data, split=split, as_json=json)


def predict(
    run: Path,
    files: list[Path],
    *,
    format: Literal["table", "csv", "json"] = "table",
    output: Path | None = None,
) -> None:
    """Predict the class of images, or of the rows of a table, with a trained network.

    Args:
        run: a run folder.
        files: images, or .csv or .parquet tables.
        format: of the output.
        output: a file to write; by default the output is printed.
    """
    from normdrop.training.predict import predict

    predict(run, files, form=format, output=output)


def describe(
    run: Path | None = None,
    *,
    model: str = "resnet18",
    input: str = "224x224x3",
    classes: int | None = None,
) -> None:
    """Show a network's layers, their shapes, Θ, and the γ and α that batch norm adds.

    Args:
        run: a run folder, to show its network; or choose by model and input.
        model: resnet18, vgg16, mlp…
        input: the input's size, height x width x channels, or the number of features.
        classes: number of classes; by default 1000 for 224x224 images, else 10.
    """
    from normdrop.training.show import describe

    describe(run, model=model, size=input, classes=classes)


def report(run: Path) -> None:
    """Write the page of a finished run again.

    Args:
        run: a run folder.
    """
    from normdrop.study.report import write_report

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
    """Run a command; give the exit code: 0, 2 for what the user gave, 130 for Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["--version"]:
        arguments = ["version"]
    try:
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            print(_overview())
            return 0
        name = arguments[0]
        if name not in COMMANDS:
            raise UserError(_unknown("command", name, COMMANDS))
        COMMANDS[name](**_parse(name, arguments[1:]))
    except UserError as error:
        print(f"normdrop: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except KeyboardInterrupt as stop:
        print(f"\n{stop or 'Stopped.'}", file=sys.stderr)
        return 130
    return 0


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


def _unknown(what: str, name: str, known: typing.Iterable[str]) -> str:
    from difflib import get_close_matches

    near = get_close_matches(name, list(known), 1)
    hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(known)}"
    return f"Unknown {what} {name!r}; {hint}"


def _parse(name: str, arguments: list[str]) -> dict[str, Any]:
    """The command's arguments by name, its dataclasses made."""
    from jsonargparse import ArgumentParser

    command = COMMANDS[name]
    parser = ArgumentParser(
        prog=f"normdrop {name}",
        description=(inspect.getdoc(command) or "").partition("\n\nArgs:")[0],
        exit_on_error=False,
    )
    if name == "train":
        parser.add_argument(
            "--config", action="config", help="a file of options, such as a run's options.yaml"
        )
    groups = _add_arguments(parser, command)
    values: dict[str, Any] = vars(_checked(parser, name, arguments))
    values.pop("config", None)
    made = {
        key: group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
        for key, group in groups.items()
    }
    return made | values


def _add_arguments(parser: Any, command: Callable[..., None]) -> dict[str, type]:
    """Add a flag for every argument; give the arguments that are dataclasses of flags."""
    hints = typing.get_type_hints(command)
    helps = _argument_helps(command)
    groups: dict[str, type] = {}
    for key, parameter in inspect.signature(command).parameters.items():
        if dataclasses.is_dataclass(hints[key]):
            group = groups[key] = typing.cast(type, hints[key])
            section = parser.add_argument_group(_first_line(group))
            field_helps, field_hints = _argument_helps(group), typing.get_type_hints(group)
            defaults = group()
            for field in dataclasses.fields(group):
                _add_flag(
                    section,
                    field.name,
                    field_hints[field.name],
                    getattr(defaults, field.name),
                    field_helps[field.name],
                )
        elif parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            optional = parameter.default is not parameter.empty
            many = hints[key] == list[Path]
            parser.add_argument(
                key,
                type=Path if many else hints[key],
                nargs="+" if many else "?" if optional else None,
                metavar=key.upper().removesuffix("S") if many else key.upper(),
                help=helps[key],
            )
        else:
            _add_flag(parser, key, hints[key], parameter.default, helps[key])
    return groups


def _add_flag(section: Any, name: str, hint: Any, default: Any, text: str) -> None:
    from jsonargparse import ActionYesNo

    flag = "--" + name.replace("_", "-")
    if bool in (hint, *typing.get_args(hint)):
        section.add_argument(flag, action=ActionYesNo(no_prefix="no-"), default=default, help=text)
    else:
        section.add_argument(flag, type=hint, default=default, help=text)


def _checked(parser: Any, name: str, arguments: list[str]) -> Any:
    """Parse; what cannot be parsed becomes one sentence."""
    from jsonargparse import ArgumentError

    try:
        return parser.parse_args(arguments)
    except ArgumentError as error:
        sentence = " ".join(str(error).split())
        raise UserError(f"{sentence}; normdrop {name} --help shows the options") from error


def _first_line(thing: Any) -> str:
    return (inspect.getdoc(thing) or "").splitlines()[0].rstrip(".")


def _argument_helps(thing: Any) -> dict[str, str]:
    """What the docstring's Args section says of each argument."""
    from docstring_parser import parse

    return {
        item.arg_name: " ".join((item.description or "").split())
        for item in parse(inspect.getdoc(thing) or "").params
    }


if __name__ == "__main__":
    sys.exit(main())
