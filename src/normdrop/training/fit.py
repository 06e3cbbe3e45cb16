"""From options to a finished run folder."""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch.multiprocessing.spawn import ProcessRaisedException

from normdrop import data
from normdrop.data.lightning import LightningData
from normdrop.errors import Diverged, UserError
from normdrop.runs.data import check_same_data, load_data, located
from normdrop.runs.folder import (
    RESULT,
    WEIGHTS,
    best_checkpoint,
    cannot_write,
    command_to_repeat,
    command_to_resume,
    last_checkpoint,
)
from normdrop.runs.network import build_network, network_record
from normdrop.runs.options import Options, RunOptions, seconds
from normdrop.runs.read import read_options
from normdrop.runs.weights import best_weights, load_checkpoint, with_weights
from normdrop.runs.write import new_folder, remove_parts, write_result, write_start
from normdrop.training.callbacks import AtomicCheckpoints, Display, Record, silence
from normdrop.training.console import say
from normdrop.training.evaluate import conclusion, finish
from normdrop.training.measure import check_flip, count_parameters
from normdrop.training.recipes import resolve, resolve_data
from normdrop.training.task import Task, step_seed

__all__ = ["Stopped", "train"]

PRECISION = {"float32": "32-true", "bfloat16": "bf16-mixed", "float64": "64-true"}
UNITS = {"image": "images", "table": "rows"}


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
        resume: a run folder to go on with. Its options hold; only max_time and report may be
            given anew.

    Returns:
        The run folder.

    Raises:
        UserError: the data, an option or the folder cannot be used.
        Diverged: the loss or a weight is not finite; the folder holds the best epoch before.
        Stopped: Ctrl-C; the run can be resumed.
    """
    options = options or Options()
    options.check()
    accelerator = _accelerator(options.run)
    if accelerator == "cpu" and options.recipe.precision == "bfloat16":
        _warn_without_bfloat16()
    with _kept_settings():
        if resume is not None:
            options = _resumed_options(Path(resume), options)
        else:
            chosen = resolve_data(located(options.data), name=load_data(options).name)
            options = replace(options, data=chosen)
        datamodule = load_data(options)
        datamodule.setup()
        if resume is None:
            shape = datamodule.input_shape
            options = resolve(options, name=datamodule.name, input_shape=shape)
            datamodule.batch_size = cast(int, options.recipe.batch_size)
        if options.recipe.flip_test:
            check_flip(datamodule.kind)
        if options.run.threads:
            torch.set_num_threads(options.run.threads)
        torch.manual_seed(step_seed(options.run.seed, -1))
        network = _build(options, datamodule)
        if resume is None:
            folder = new_folder(options, datamodule.name)
            write_start(folder, options, network, datamodule)
        else:
            folder = Path(resume)
            check_same_data(folder, datamodule)
            remove_parts(folder)
        _announce(folder, options, network, datamodule)
        try:
            _fit(folder, options, network, datamodule, accelerator)
        except BrokenPipeError:
            raise
        except KeyboardInterrupt as error:
            if isinstance(error, Stopped):
                raise
            raise _stopped(folder) from error
        except OSError as error:
            raise cannot_write(error, folder) from error
        return folder


def _resumed_options(folder: Path, given: Options) -> Options:
    """The options that a run was started with; only the time may be given anew."""
    kept = read_options(folder)
    if (folder / RESULT).exists() and (
        (folder / WEIGHTS).exists() or not best_checkpoint(folder).exists()
    ):
        raise UserError(
            f"The run {folder} is finished; train again with: {command_to_repeat(folder)}"
        )
    if given.run.name not in (None, folder.resolve().name):
        raise UserError(
            f"A resumed run keeps its folder, {folder}; leave out --name, or start a new run "
            f"with: {command_to_repeat(folder)} --name {given.run.name}"
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


def _build(options: Options, datamodule: data.DataModule) -> torch.nn.Module:
    record = network_record(options, input_shape=datamodule.input_shape, classes=datamodule.classes)
    try:
        network = build_network(record)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        raise UserError(
            f"The network {options.network.model} does not fit into memory; choose a smaller one"
        ) from error
    return network.double() if options.recipe.precision == "float64" else network


def _fit(
    folder: Path,
    options: Options,
    network: torch.nn.Module,
    datamodule: data.DataModule,
    accelerator: str,
) -> None:
    limit = seconds(options.run.max_time) if options.run.max_time else None
    chosen = options.run
    task = Task(network, options.recipe, seed=chosen.seed, limit=limit, threads=chosen.threads)
    begin = last_checkpoint(folder) if last_checkpoint(folder).exists() else None
    checkpoint = load_checkpoint(begin, network) if begin else None
    steps = checkpoint["global_step"] if checkpoint else 0
    epochs = cast(int, options.recipe.epochs)
    trainer = pl.Trainer(
        accelerator=accelerator,
        devices=chosen.devices,
        strategy="ddp_spawn" if chosen.devices > 1 else "auto",
        precision=PRECISION[options.recipe.precision],
        max_epochs=epochs,
        min_epochs=0,
        callbacks=[Display(epochs, UNITS[datamodule.kind]), Record(folder)],
        plugins=[AtomicCheckpoints()],
        logger=TensorBoardLogger(folder, name="tensorboard", version="", purge_step=steps + 1),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        log_every_n_steps=1,
        default_root_dir=folder,
    )
    # Every further process reads the data for itself.
    own = datamodule if chosen.devices == 1 else load_data(options)
    if not (checkpoint and checkpoint["callbacks"]["Record"]["diverged"]):
        _fit_or_stop(trainer, task, own, folder, begin)
    last = load_checkpoint(last_checkpoint(folder), network)
    record = last["callbacks"]["Record"]
    end = {
        "epochs": len(record["rows"]),
        "best_epoch": record["best_epoch"],
        "diverged": record["diverged"],
        "train_seconds": last["elapsed"],
    }
    if record["best_epoch"]:
        best = load_checkpoint(best_checkpoint(folder), network)
        network = with_weights(network.cpu(), best_weights(best), best_checkpoint(folder))
        finish(folder, network, datamodule, end, flip=options.recipe.flip_test)
    else:
        write_result(folder, conclusion(folder, network, end))
    if record["diverged"]:
        raise Diverged(_how_it_diverged(folder, record), folder)


def _how_it_diverged(folder: Path, record: dict[str, Any]) -> str:
    row = record["rows"][-1]
    if not math.isfinite(row["train_loss"]):
        what = f"The loss is {row['train_loss']} in epoch {row['epoch']}"
    elif not math.isfinite(row["val_loss"]):
        what = f"The validation loss is {row['val_loss']} in epoch {row['epoch']}"
    else:
        what = f"A weight is not finite after epoch {row['epoch']}"
    best = record["best_epoch"]
    kept = f"; the weights of epoch {best} are kept and tested in {folder}" if best else ""
    return f"{what}{kept}; train again with a lower --learning-rate"


def _accelerator(chosen: RunOptions) -> str:
    """Where to compute; Lightning's own "auto" also takes GPUs without float64, which sums need."""
    gpus = torch.cuda.device_count()
    if chosen.accelerator == "gpu" and not gpus:
        raise UserError("There is no GPU that torch can use; choose --accelerator cpu")
    gpu = chosen.accelerator != "cpu" and gpus > 0
    most, what = (gpus, "GPUs") if gpu else (os.cpu_count() or 1, "cores")
    if chosen.devices > most:
        raise UserError(f"Expected devices of at most {most}, the {what}, but got {chosen.devices}")
    return "cuda" if gpu else "cpu"


def _stopped(folder: Path) -> Stopped:
    whole = last_checkpoint(folder).exists()
    kept = "the last whole epoch is kept" if whole else "no epoch was whole yet"
    return Stopped(f"Stopped; {kept}. Go on with: {command_to_resume(folder)}")


def _warn_without_bfloat16() -> None:
    # Older versions of torch do not say, nor does any of other processors.
    flags: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if flags.get("architecture") == "x86_64" and not (flags["avx512_bf16"] or flags["amx_bf16"]):
        warnings.warn(
            "this processor has no instructions for bfloat16, which makes training 8 to 24 times "
            "slower than in float32; leave out --precision bfloat16",
            stacklevel=3,
        )


def _fit_or_stop(
    trainer: pl.Trainer, task: Task, datamodule: data.DataModule, folder: Path, begin: Path | None
) -> None:
    """Fit; Lightning turns Ctrl-C into an exit of its own, which becomes ``Stopped`` here."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(task, datamodule=LightningData(datamodule), ckpt_path=begin, weights_only=True)
    except (SystemExit, KeyboardInterrupt) as error:
        signal.signal(signal.SIGINT, handler)
        if trainer.strategy.launcher is not None:
            # The other processes would train on; what they write, they write whole.
            trainer.strategy.launcher.kill(signal.SIGKILL)
        raise _stopped(folder) from error
    except ProcessRaisedException as error:
        # Another process can send only the text of what it raised.
        if match := re.search(r"^normdrop\.errors\.UserError: (.*)$", str(error), re.MULTILINE):
            raise UserError(match[1]) from error
        raise


def _announce(
    folder: Path, options: Options, network: torch.nn.Module, datamodule: data.DataModule
) -> None:
    sizes, shape = datamodule.sizes, "×".join(map(str, datamodule.input_shape))
    if datamodule.kind == "table":
        shape += " input" if datamodule.input_shape == (1,) else " inputs"
    counts = count_parameters(network)
    say(
        f"{datamodule.name}: {sizes['train']:,} training, {sizes['val']:,} validation and "
        f"{sizes['test']:,} test samples of {shape}, {len(datamodule.classes)} classes"
    )
    if datamodule.skipped:
        one = len(datamodule.skipped) == 1
        what = "1 image" if one else f"{len(datamodule.skipped)} images"
        say(f"{what} could not be read and {'is' if one else 'are'} left out:")
        for path, reason in datamodule.skipped:
            say(f"  {path} ({reason})")
    if datamodule.dropped:
        rows = "1 row is" if datamodule.dropped == 1 else f"{datamodule.dropped:,} rows are"
        say(f"{rows} left out for missing values")
    say(
        f"{options.network.model}: {counts['theta']:,} parameters Θ, and {counts['gamma_alpha']:,} "
        f"γ and α that batch norm adds"
    )
    limit = f", {options.run.max_time} at most" if options.run.max_time else ""
    epochs = options.recipe.epochs
    say(f"{epochs} epoch{'' if epochs == 1 else 's'}{limit}, into {folder}")


@contextlib.contextmanager
def _kept_settings() -> Iterator[None]:
    """Silence Lightning for a while; leave warnings, threads and torch's generator as they were."""
    threads = torch.get_num_threads()
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        silence()
        try:
            yield
        finally:
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
