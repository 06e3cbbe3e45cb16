"""The data of a run: loaded by its options, and held against those that it was started with."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from normdrop import data
from normdrop.data.sources import SOURCES
from normdrop.errors import UserError
from normdrop.runs.options import DataOptions, Options
from normdrop.runs.read import read_record

__all__ = ["check_same_data", "load_data", "located"]


def load_data(options: Options) -> data.DataModule:
    """The data of a run, not yet read."""
    chosen = asdict(options.data)
    source, ignore = chosen.pop("data"), chosen.pop("ignore")
    return data.load(
        source,
        batch_size=options.recipe.batch_size or 128,
        seed=options.run.seed,
        ignore=ignore or (),
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


def check_same_data(folder: Path, datamodule: data.DataModule) -> None:
    """Raise UserError where the data are not those that the run was started with."""
    then = read_record(folder)["digest"]
    if then != datamodule.digest:
        raise UserError(
            f"The data changed since the run {folder} was started; "
            "bring the old data back, or start a new run"
        )
