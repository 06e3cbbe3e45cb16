"""Run folders: made, described, read again."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml

import normdrop
from normdrop import data, networks
from normdrop.data.sources import SOURCES
from normdrop.errors import UserError
from normdrop.files import write_text
from normdrop.training.options import DataOptions, Options

__all__ = [
    "cannot_write",
    "check_same_data",
    "command_to_repeat",
    "command_to_resume",
    "load_data",
    "located",
    "network_options",
    "new_folder",
    "read_options",
    "read_run",
    "remove_parts",
    "resumed_options",
    "write_start",
]


def load_data(options: Options) -> data.DataModule:
    """The data of a run, not yet read."""
    chosen = asdict(options.data)
    source, augment = chosen.pop("data"), chosen.pop("augment")
    chosen["ignore"] = chosen["ignore"] or ()
    return data.load(
        source,
        batch_size=options.recipe.batch_size or 128,
        seed=options.run.seed,
        augment=_augmentation(augment),
        **chosen,
    )


def located(chosen: DataOptions) -> DataOptions:
    """The same options with whole paths, so that they hold in every folder."""
    whole: dict[str, Any] = {
        name: str(Path(value).expanduser().resolve())
        for name in ("data", "folder")
        if (value := getattr(chosen, name)) and value not in SOURCES and Path(value).exists()
    }
    return replace(chosen, **whole)


def command_to_resume(folder: Path) -> str:
    """What to type to go on with a run."""
    return f"normdrop train --resume {shlex.quote(str(folder))}"


def command_to_repeat(folder: Path) -> str:
    """What to type to run a run again."""
    return f"normdrop train --config {shlex.quote(str(folder / 'options.yaml'))}"


def _augmentation(text: str | None) -> bool | list[str] | None:
    if text is None or text == "none":
        return None if text is None else False
    return [name.strip() for name in text.split(",")]


def network_options(options: Options) -> dict[str, Any]:
    """The options that ``networks.build`` takes, from a run's options."""
    chosen = asdict(options.network)
    model = chosen.pop("model")
    if "layout" in networks.options(model):
        chosen["layout"] = "channels_last" if options.recipe.channels_last else "keep"
    return {name: value for name, value in chosen.items() if value is not None}


def new_folder(options: Options, source: str) -> Path:
    """Make the run's folder: the name given, or the source, the model and the next free number."""
    runs = Path(options.run.runs_dir)
    try:
        runs.mkdir(parents=True, exist_ok=True)
        if options.run.name is not None:
            folder = runs / options.run.name
            try:
                folder.mkdir()
            except FileExistsError:
                raise UserError(
                    f"The run {folder} exists; go on with it by --resume {folder}, "
                    "or choose another --name"
                ) from None
            return folder
        stem = re.sub(r"[^\w.-]+", "-", f"{source}-{options.network.model}").strip("-.")
        for number in range(1, 10**6):
            folder = runs / f"{stem}-{number}"
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                return folder
    except OSError as error:
        raise UserError(
            f"Cannot make a run folder in {runs} ({error.strerror}); choose another by --runs-dir"
        ) from error
    raise UserError(f"All numbers are taken in {runs}; choose a --name")


def write_start(
    folder: Path, options: Options, network: torch.nn.Module, datamodule: data.DataModule
) -> None:
    """What stands in the folder before the first step: options.yaml and run.json."""
    flat = options.flat()
    # A run that is run again takes the next free name.
    del flat["name"]
    norms = [
        {"name": name, "features": module.num_features}
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
    ]
    run = {
        "version": normdrop.__version__,
        "network": {
            "name": options.network.model,
            "options": network_options(options),
            "input_shape": list(datamodule.input_shape),
            "classes": list(datamodule.classes),
        },
        "data": datamodule.state(),
        "digest": datamodule.digest,
        "samples": datamodule.class_counts(),
        "skipped": [list(pair) for pair in datamodule.skipped],
        "dropped": datamodule.dropped,
        "norm_layers": norms,
    }
    try:
        (folder / "checkpoints").mkdir()
        write_text(folder / "run.json", json.dumps(run, indent=1, ensure_ascii=False) + "\n")
        write_text(
            folder / "options.yaml",
            "# normdrop train --config THIS FILE runs this again.\n"
            + yaml.safe_dump(flat, sort_keys=False, allow_unicode=True),
        )
    except OSError as error:
        raise UserError(
            f"Cannot write to {folder} ({error.strerror}); choose another folder by --runs-dir"
        ) from error


def resumed_options(folder: Path, given: Options) -> Options:
    """The options that a run was started with; only the time may be given anew."""
    kept = read_options(folder)
    if (folder / "result.json").exists():
        raise UserError(
            f"The run {folder} is finished; train again with: {command_to_repeat(folder)}"
        )
    default, now, then = Options().flat(), given.flat(), kept.flat()
    free = {"max_time", "name", "runs_dir", "report"}
    if changed := [k for k, v in now.items() if k not in free and v not in (default[k], then[k])]:
        name = changed[0]
        raise UserError(
            f"A resumed run keeps its options: {name} is {then[name]!r}, but got {now[name]!r}; "
            f"leave out --{name.replace('_', '-')}, or start a new run"
        )
    run = replace(kept.run, report=given.run.report)
    if given.run.max_time is not None:
        run = replace(run, max_time=given.run.max_time)
    return replace(kept, run=run)


def read_options(folder: Path) -> Options:
    """The options of a run folder."""
    path = folder / "options.yaml"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"Expected a run folder with options.yaml, but {folder} has none"
            if folder.is_dir()
            else f"There is no run folder {folder}"
        ) from None
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"Cannot read {path}: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"Expected {path} to hold options, but it holds {values!r:.60}")
    options = Options.from_flat(values)
    try:
        options.check()
    except TypeError as error:
        raise UserError(f"An option in {path} has the wrong type: {error}") from error
    return options


def read_run(folder: Path) -> dict[str, Any]:
    """What run.json of a run folder holds."""
    path = folder / "run.json"
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        run["network"]["name"], run["data"], run["digest"]
    except FileNotFoundError:
        raise UserError(
            f"Expected a run folder with run.json, but {folder} has none"
            if folder.is_dir()
            else f"There is no run folder {folder}"
        ) from None
    except NotADirectoryError:
        raise UserError(f"Expected a run folder, but {folder} is a file") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"Cannot read {path}: {error}; it was cut off or changed") from error
    return dict(run)


def remove_parts(folder: Path) -> None:
    """Remove the temporary files of a run that was killed while it wrote."""
    for part in folder.rglob(".*.part"):
        part.unlink(missing_ok=True)


def check_same_data(folder: Path, datamodule: data.DataModule) -> None:
    then = read_run(folder)["digest"]
    if then != datamodule.digest:
        raise UserError(
            f"The data changed since the run {folder} was started; "
            "bring the old data back, or start a new run"
        )


def cannot_write(error: OSError, folder: Path) -> UserError:
    """One sentence for a full disk or a folder that cannot be written."""
    whole = (folder / "checkpoints" / "last.ckpt").exists()
    return UserError(
        f"Cannot write to {folder} ({error.strerror or error}); make room or allow writing there, "
        f"then {'go on from the last whole epoch' if whole else 'start again'} with: "
        f"{command_to_resume(folder)}"
    )
