"""From options to a finished run folder."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import warnings
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
import yaml
from pytorch_lightning.loggers import TensorBoardLogger
from rich.console import Console

import normdrop
from normdrop import data, networks
from normdrop.errors import UserError
from normdrop.files import write_text
from normdrop.training import evaluate
from normdrop.training.callbacks import AtomicCheckpoints, Display, Record, cannot_write, silence
from normdrop.training.options import Options, seconds
from normdrop.training.recipes import resolve
from normdrop.training.task import Task, step_seed

__all__ = ["Stopped", "build_network", "load_data", "train"]

PRECISION = {"float32": "32-true", "bfloat16": "bf16-mixed", "float64": "64-true"}


class Stopped(KeyboardInterrupt):
    """Ctrl-C during a run; the message says how to go on."""


def train(options: Options | None = None, *, resume: str | os.PathLike[str] | None = None) -> Path:
    """Train a network, test it once, and leave everything in a run folder.

    The split, the weights, the order, the augmentation and dropout's masks are functions of the
    seed and the step, so a run that was stopped and resumed ends with the very weights of one that
    was not. The best epoch is chosen on the validation split; the test split is looked at once, at
    the end, with the weights of that epoch.

    Args:
        options: what to train on what; None for the defaults.
        resume: a run folder to go on with. Its options hold; only max_time may be given anew.

    Returns:
        The run folder.

    Raises:
        UserError: the data, an option or the folder cannot be used.
        Stopped: Ctrl-C; the run can be resumed.
    """
    options = options or Options()
    options.check()
    with _terminal_kept():
        if resume is not None:
            folder = Path(resume)
            options = _resumed_options(folder, options)
        if options.run.threads:
            torch.set_num_threads(options.run.threads)
        datamodule = load_data(options)
        options = resolve(options, name=datamodule.name, kind=datamodule.kind)
        datamodule = load_data(options)
        torch.manual_seed(step_seed(options.run.seed, -1))
        network = build_network(options, datamodule)
        if resume is None:
            folder = _new_folder(options, datamodule.name)
            _write_folder(folder, options, network, datamodule)
        else:
            _check_same_data(folder, datamodule)
        _announce(folder, options, network, datamodule)
        try:
            return _fit(folder, options, network, datamodule)
        except OSError as error:
            raise cannot_write(error, folder) from error


def load_data(options: Options) -> data.DataModule:
    """The data of a run, read and split."""
    chosen = options.data
    extra: dict[str, Any] = {}
    if chosen.target is not None:
        extra["target"] = chosen.target
    if chosen.skip_unreadable:
        extra["skip_unreadable"] = True
    datamodule = data.load(
        chosen.data,
        batch_size=options.recipe.batch_size or 128,
        seed=options.run.seed,
        validation=chosen.validation,
        test=chosen.test,
        augment=_augmentation(chosen.augment),
        **extra,
    )
    datamodule.setup()
    return datamodule


def _augmentation(text: str | None) -> bool | list[str] | None:
    if text is None or text == "none":
        return None if text is None else False
    return [name.strip() for name in text.split(",")]


def network_options(options: Options) -> dict[str, Any]:
    """The options that ``networks.build`` takes, from a run's options."""
    chosen = asdict(options.network)
    del chosen["model"]
    return {name: value for name, value in chosen.items() if value is not None}


def build_network(options: Options, datamodule: data.DataModule) -> torch.nn.Module:
    """The network of a run, freshly initialised."""
    return networks.build(
        cast(str, options.network.model),
        classes=len(datamodule.classes),
        input_shape=datamodule.input_shape,
        **network_options(options),
    )


def _fit(
    folder: Path, options: Options, network: torch.nn.Module, datamodule: data.DataModule
) -> Path:
    limit = seconds(options.run.max_time) if options.run.max_time else None
    task = Task(network, options.recipe, seed=options.run.seed, limit=limit)
    if options.recipe.channels_last and datamodule.kind == "image":
        task = task.to(memory_format=torch.channels_last)
    record = Record(folder)
    begin = record.last if record.last.exists() else None
    state = evaluate.load_checkpoint(begin, network) if begin else {"global_step": 0}
    epochs = cast(int, options.recipe.epochs)
    trainer = pl.Trainer(
        accelerator=options.run.accelerator,
        devices=options.run.devices,
        strategy="ddp_spawn" if options.run.devices > 1 else "auto",
        precision=PRECISION[options.recipe.precision],
        max_epochs=epochs,
        min_epochs=0,
        callbacks=[Display(epochs), record],
        plugins=[AtomicCheckpoints()],
        logger=TensorBoardLogger(
            folder, name="tensorboard", version="", purge_step=state["global_step"] + 1
        ),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        log_every_n_steps=1,
        default_root_dir=folder,
    )
    _fit_or_stop(trainer, task, datamodule, folder, begin)
    best = evaluate.load_checkpoint(record.best, network)
    last = evaluate.load_checkpoint(record.last, network)
    rows = last["callbacks"]["Record"]["rows"]
    network = evaluate.with_weights(network, evaluate.best_weights(best), record.best)
    result = evaluate.finish(
        folder,
        network.float() if options.recipe.precision != "float64" else network,
        datamodule,
        epochs=len(rows),
        best_epoch=last["callbacks"]["Record"]["best_epoch"],
        train_seconds=last["elapsed"],
    )
    _report(folder, options, result)
    return folder


def _fit_or_stop(
    trainer: pl.Trainer, task: Task, datamodule: data.DataModule, folder: Path, begin: Path | None
) -> None:
    """Fit; Lightning turns Ctrl-C into an exit of its own, which becomes ``Stopped`` here."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(task, datamodule=datamodule, ckpt_path=begin, weights_only=True)
    except SystemExit as error:
        signal.signal(signal.SIGINT, handler)
        whole = Record(folder).last.exists()
        raise Stopped(
            "Stopped; the last whole epoch is kept. "
            if whole
            else "Stopped before the first epoch was whole. "
            f"Go on with: normdrop train --resume {folder}"
        ) from error


def _new_folder(options: Options, source: str) -> Path:
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


def _write_folder(
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


def _resumed_options(folder: Path, given: Options) -> Options:
    """The options that a run was started with; only the time may be given anew."""
    kept = read_options(folder)
    if (folder / "result.json").exists():
        raise UserError(
            f"The run {folder} is finished; train again with: "
            f"normdrop train --config {folder / 'options.yaml'}"
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
    options.check()
    return options


def _check_same_data(folder: Path, datamodule: data.DataModule) -> None:
    then = evaluate.read_run(folder)["digest"]
    if then != datamodule.digest:
        raise UserError(
            f"The data changed since the run {folder} was started, so it cannot go on; "
            "bring the old data back, or start a new run"
        )


def _announce(
    folder: Path, options: Options, network: torch.nn.Module, datamodule: data.DataModule
) -> None:
    sizes, shape = datamodule.sizes, "×".join(map(str, datamodule.input_shape))
    counts = evaluate.count_parameters(network)
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"{datamodule.name}: {sizes['train']:,} training, {sizes['val']:,} validation and "
        f"{sizes['test']:,} test samples of {shape}, {len(datamodule.classes)} classes"
    )
    console.print(
        f"{options.network.model}: {counts['theta']:,} parameters Θ, and {counts['gamma_alpha']:,} "
        f"γ and α that batch norm adds"
    )
    console.print(f"{options.recipe.epochs} epochs into {folder}")


def _report(folder: Path, options: Options, result: dict[str, Any]) -> None:
    page = None
    if options.run.report:
        with contextlib.suppress(ImportError):
            from normdrop.study.report import write_report

            page = write_report(folder)
    console = Console(highlight=False, soft_wrap=True)
    low, high = result["accuracy_interval"]
    right = round(result["accuracy"] * result["count"])
    console.print(
        f"Test accuracy {result['accuracy']:.2%} ({right:,} of {result['count']:,}; 95 % interval "
        f"{low:.2%} to {high:.2%}), calibration error {result['calibration_error']:.3f}"
    )
    console.print(f"Report:  {folder / 'report.html'}" if page else f"Results: {folder}")
    console.print(f"Again:   {result['command']}")


@contextlib.contextmanager
def _terminal_kept() -> Iterator[None]:
    """Silence Lightning for a while, and leave the caller's warnings and threads as they were."""
    threads = torch.get_num_threads()
    with warnings.catch_warnings():
        silence()
        try:
            yield
        finally:
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
