"""Flags from the arguments of a typed function, and one sentence for what cannot be parsed."""

from __future__ import annotations

import dataclasses
import inspect
import re
import shutil
import typing
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import Any, Literal

from normdrop.errors import UserError

__all__ = ["parse", "unknown"]

# What other programs call these options.
SHORT = {
    "lr": "learning_rate",
    "wd": "weight_decay",
    "bs": "batch_size",
    "arch": "model",
    "dataset": "data",
    "size": "image_size",
    "amp": "precision",
    "gpus": "devices",
}


def parse(
    command: Callable[..., None], arguments: Sequence[str], *, prog: str, notes: str = ""
) -> dict[str, Any]:
    """The arguments of ``command``, by name, out of a command line.

    An argument that is a dataclass gives one flag a field, and comes back made. A function with
    such arguments also has ``--config FILE``, whose options the flags override.

    Args:
        command: typed, with a docstring whose Args section becomes the help.
        arguments: what was typed after the command.
        prog: how the command was called, for the help.
        notes: text at the end of the help.

    Raises:
        UserError: the arguments do not fit.
        SystemExit: the help was asked for and shown.
    """
    from jsonargparse import ArgumentParser, DefaultHelpFormatter

    class Formatter(DefaultHelpFormatter):
        def __init__(self, prog: str) -> None:
            width = min(shutil.get_terminal_size().columns, 100)
            super().__init__(prog, max_help_position=26, width=width)

        def _get_help_string(self, action: Any) -> str:
            text, default = action.help or "", action.default
            if default is None or default is False or not action.option_strings:
                return text
            if default in ([], inspect.Parameter.empty, "==SUPPRESS=="):
                return text
            shown = ("yes" if default else "no") if isinstance(default, bool) else str(default)
            return f"{text} (default: {shown})".replace("%", "%%")

        def _fill_text(self, text: str, width: int, indent: str) -> str:
            return text

        def _format_action_invocation(self, action: Any) -> str:
            # jsonargparse's second name for a list, --flag+ to append to it, is noise here.
            shown: str = super()._format_action_invocation(action)
            return re.sub(r", --[\w-]+\+ \S+", "", shown)

    parser = ArgumentParser(
        prog=prog,
        usage=f"{prog} [options]" + "".join(f" {name}" for name in _positional(command)),
        description=(inspect.getdoc(command) or "").partition("\n\nArgs:")[0],
        epilog=notes,
        formatter_class=Formatter,
        exit_on_error=False,
        print_config=None,
    )
    groups, hints = _add_arguments(parser, command)
    if groups:
        parser.add_argument(
            "--config",
            action="config",
            metavar="FILE",
            help="a file of options, such as a run's options.yaml",
        )
    values = _values(parser, _config_first(arguments), hints, prog)
    values.pop("config", None)
    made = {
        key: group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
        for key, group in groups.items()
    }
    return made | values


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """One sentence for a name that is not known, with the nearest that is."""
    known = list(known)
    near = get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(known)}"
    return f"Unknown {what} {name!r}; {hint}"


def _positional(command: Callable[..., None]) -> list[str]:
    hints = typing.get_type_hints(command)
    shown = []
    for key, parameter in inspect.signature(command).parameters.items():
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD and not dataclasses.is_dataclass(
            hints[key]
        ):
            name = "FILE …" if hints[key] == list[Path] else key.upper()
            shown.append(name if parameter.default is parameter.empty else f"[{name}]")
    return shown


def _add_arguments(
    parser: Any, command: Callable[..., None]
) -> tuple[dict[str, type], dict[str, Any]]:
    """Add a flag for every argument; give the dataclasses among them, and the types of all."""
    hints = typing.get_type_hints(command)
    helps = _helps(command)
    groups: dict[str, type] = {}
    flags: dict[str, Any] = {}
    for key, parameter in inspect.signature(command).parameters.items():
        if dataclasses.is_dataclass(hints[key]):
            group = groups[key] = typing.cast(type, hints[key])
            section = parser.add_argument_group(_title(group))
            group_helps, group_hints, defaults = (
                _helps(group),
                typing.get_type_hints(group),
                group(),
            )
            for name, hint in group_hints.items():
                _add_flag(section, name, hint, getattr(defaults, name), group_helps[name])
            flags |= group_hints
        elif parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            many = hints[key] == list[Path]
            optional = parameter.default is not parameter.empty
            parser.add_argument(
                key,
                type=Path if many else hints[key],
                nargs="+" if many else "?" if optional else None,
                metavar="FILE" if many else key.upper(),
                help=helps[key],
            )
        else:
            _add_flag(parser, key, hints[key], parameter.default, helps[key])
            flags[key] = hints[key]
    return groups, flags


def _add_flag(section: Any, name: str, hint: Any, default: Any, text: str) -> None:
    from jsonargparse import ActionYesNo

    flag = "--" + name.replace("_", "-")
    if bool in _kinds(hint):
        section.add_argument(flag, action=ActionYesNo(no_prefix="no-"), default=default, help=text)
    else:
        choices = next(
            (typing.get_args(k) for k in _kinds(hint) if typing.get_origin(k) is Literal), ()
        )
        metavar = "{" + ",".join(choices) + "}" if choices else _metavar(hint)
        section.add_argument(flag, type=hint, default=default, help=text, metavar=metavar)


def _kinds(hint: Any) -> list[Any]:
    """A type, and those that it is a union of."""
    return [hint, *typing.get_args(hint)]


def _metavar(hint: Any) -> str:
    for kind, shown in ((int, "N"), (float, "X"), (Path, "PATH")):
        if kind in _kinds(hint):
            return shown
    return "TEXT"


def _config_first(arguments: Sequence[str]) -> list[str]:
    """Move ``--config FILE`` to the front, so that a flag overrides it wherever it stands."""
    first, rest = [], list(arguments)
    while "--config" in rest[:-1]:
        place = rest.index("--config")
        path = Path(rest[place + 1])
        if not path.is_file():
            raise UserError(f"There is no file {rest[place + 1]!r} for --config")
        if not path.stat().st_size:
            raise UserError(f"The file of options {str(path)!r} is empty")
        if path.name == "run.json":
            raise UserError(
                f"{str(path)!r} says what a run trained, not its options; "
                f"give {str(path.with_name('options.yaml'))!r}"
            )
        first += rest[place : place + 2]
        del rest[place : place + 2]
    return first + rest


def _values(parser: Any, arguments: list[str], hints: dict[str, Any], prog: str) -> dict[str, Any]:
    from jsonargparse import ArgumentError

    try:
        return dict(vars(parser.parse_args(arguments)))
    except ArgumentError as error:
        sentence = _sentence(str(error), hints)
        raise UserError(f"{sentence}; {prog} --help shows all options") from error


def _sentence(text: str, hints: dict[str, Any]) -> str:
    """What jsonargparse says in several lines, as one sentence."""
    flags = ["--" + name.replace("_", "-") for name in hints]
    if match := re.match(r"unrecognized arguments: (\S+)", text):
        name = match[1].partition("=")[0]
        if re.match(r"--(keep|drop)-?out(put)?\b", name):
            return (
                f"There is no option {name}, since the output layer is never dropped: "
                "choose --keep-input and --keep-hidden"
            )
        if not name.startswith("-"):
            return f"Expected options, but got {name!r} too"
        meant = ["--" + SHORT.get(name.lstrip("-"), "").replace("_", "-")]
        near = [flag for flag in meant if flag in flags] or get_close_matches(name, flags, 1)
        return f"Unknown option {name}" + (f", did you mean {near[0]}?" if near else "")
    if match := re.match(r"Option '([^']+)' is not accepted", text):
        near = get_close_matches(match[1], list(hints), 1)
        return f"Unknown option {match[1]!r} in the file of options" + (
            f", did you mean {near[0]!r}?" if near else ""
        )
    key = re.match(r'Parser key "([^"]+)"', text)
    value = re.search(r"(?:Given value|Got value): (.*)", text)
    if key and value and key[1] in hints:
        flag = "--" + key[1].replace("_", "-")
        return f"Expected {flag} to be {_kind(hints[key[1]])}, but got {value[1]!r}"
    return " ".join(
        text.replace("Problems parsing config", "Cannot read the file of options").split()
    )


def _kind(hint: Any) -> str:
    """A type in words."""
    names = {int: "a whole number", float: "a number", bool: "yes or no", Path: "a path"}
    if typing.get_origin(hint) is Literal:
        return " or ".join(typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return "a list such as [0.8,0.5]"
    kinds = [kind for kind in typing.get_args(hint) if kind is not NoneType]
    if kinds:
        return " or ".join(_kind(kind) for kind in kinds)
    return names.get(hint, "a text")


def _title(group: type) -> str:
    return (inspect.getdoc(group) or "").splitlines()[0].rstrip(".")


def _helps(thing: Any) -> dict[str, str]:
    """What the docstring's Args section says of each argument."""
    from docstring_parser import parse as parse_docstring

    return {
        item.arg_name: " ".join((item.description or "").split()).removesuffix(".")
        for item in parse_docstring(inspect.getdoc(thing) or "").params
    }
