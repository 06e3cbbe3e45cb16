"""What a user can choose for a run; each group of options is one dataclass.

The command line makes a flag of every field (``keep_hidden`` becomes ``--keep-hidden``) and its
help from the docstrings, so nothing here imports torch. ``None`` means "what suits the data and
the network"; :mod:`normdrop.training.recipes` says what that is.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from normdrop.errors import UserError

__all__ = ["DataOptions", "NetworkOptions", "Options", "RecipeOptions", "RunOptions", "seconds"]


MOST_THREADS = 256


@dataclass
class DataOptions:
    """What to learn from.

    Args:
        data: digits, fashion-mnist, a folder of images by class, or a .csv or .parquet table.
        target: the column of a table to predict; by default target, label, class, or the last.
        ignore: columns of a table to leave out, as in id,date.
        missing: rows of a table with missing values are an error, or are dropped.
        folder: where Fashion-MNIST's four files lie.
        image_size: size to which the images of a folder are scaled, as in 64 or 48x64.
        validation: share of the training data held out to choose the best epoch.
        test: share held out for the test, where the data brings no test split of its own.
        augment: how to vary the training images: none, or some of shift, crop, flip, cutout,
            erase, as in shift,flip; by default what suits the data.
        skip_unreadable: list images that cannot be read and go on without them.
    """

    data: str = "digits"
    target: str | None = None
    ignore: str | None = None
    missing: Literal["error", "drop"] = "error"
    folder: str | None = None
    image_size: str | None = None
    validation: float = 0.1
    test: float = 0.2
    augment: str | None = None
    skip_unreadable: bool = False

    def check(self) -> None:
        """Raise UserError for a value that cannot be."""
        if not self.data.strip():
            raise UserError(
                "Expected data to be digits, fashion-mnist, a folder or a table, but got nothing"
            )
        _check_between("validation", self.validation, 0, 1)
        _check_between("test", self.test, 0, 1)
        if self.validation + self.test >= 1:
            raise UserError(
                "Expected validation and test to leave samples to train on, "
                f"but they sum to {self.validation + self.test:g}; make them smaller"
            )


@dataclass
class NetworkOptions:
    """What to train.

    Args:
        model: resnet20, vgg11, wide_resnet16_4, mlp_256_256 and others of their families.
        width: channels of a residual network's first stage.
        norm: batch normalization after every hidden layer; without it there is none at all, unless
            input_norm asks for the input's.
        input_norm: batch normalization of the input too, so that no mean need be given; by default
            as norm.
        keep_input: probability that dropout keeps an input, in (0, 1].
        keep_hidden: probability that dropout keeps a hidden value, in (0, 1]; for an mlp also a
            list, one for each hidden layer.
        zero_init_last: begin every residual branch as zero.
        stem_stride: stride of a small residual network's first convolution, 1 or 2.
        memory: low keeps about half as much for the backward pass, for a few per cent more time
            and with the same gradients.
    """

    model: str | None = None
    width: int | None = None
    norm: bool = True
    input_norm: bool | None = None
    keep_input: float | None = None
    keep_hidden: float | list[float] | None = None
    zero_init_last: bool | None = None
    stem_stride: int | None = None
    memory: Literal["normal", "low"] = "normal"

    def check(self) -> None:
        """Raise UserError for a value that cannot be."""
        for name in ("keep_input", "keep_hidden"):
            keeps = getattr(self, name)
            for keep in keeps if isinstance(keeps, list) else [keeps]:
                if keep is not None and not 0 < keep <= 1:
                    raise UserError(
                        f"Expected {name} in (0, 1], the probability to keep a value, "
                        f"but got {keep:g}"
                    )
        _check_positive("width", self.width)


@dataclass
class RecipeOptions:
    """How to train: SGD with Nesterov momentum, a warm-up, then a cosine down to zero.

    Args:
        epochs: passes over the training data.
        batch_size: samples a step.
        learning_rate: the highest learning rate, reached after the warm-up.
        warmup: share of the training in which the learning rate rises.
        momentum: Nesterov momentum.
        weight_decay: decay of the weights; γ, α and biases have none.
        label_smoothing: share of the target spread over all classes.
        average: decay of the moving average of the weights that is evaluated; 0 for none.
        precision: type of the computation; bfloat16 mixes with float32.
        channels_last: memory layout of images; faster for convolutions on most processors.
        convolution: auto takes our kernels for 3×3 convolutions in channels_last, about twice as
            fast in float32, with torch's numbers to rounding; keep leaves them to torch.
        flip_test: in the test and in predictions, average the class probabilities of an image and
            of its mirror image; the validation that chooses the best epoch does not.
    """

    epochs: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    warmup: float | None = None
    momentum: float | None = None
    weight_decay: float | None = None
    label_smoothing: float | None = None
    average: float | None = None
    precision: Literal["float32", "bfloat16", "float64"] = "float32"
    channels_last: bool | None = None
    convolution: Literal["auto", "keep"] = "keep"
    flip_test: bool = False

    def check(self) -> None:
        """Raise UserError for a value that cannot be."""
        _check_positive("epochs", self.epochs)
        _check_positive("learning_rate", self.learning_rate)
        for name in ("warmup", "momentum", "label_smoothing", "average"):
            _check_between(name, getattr(self, name), 0, 1, closed=True)
        if self.batch_size is not None and self.batch_size < 2:
            raise UserError(
                f"Expected batch_size of at least 2, but got {self.batch_size}; "
                "batch normalization needs more than one sample"
            )
        if self.weight_decay is not None and not 0 <= self.weight_decay < math.inf:
            raise UserError(f"Expected weight_decay ≥ 0, but got {self.weight_decay:g}")


@dataclass
class RunOptions:
    """Where and for how long.

    Args:
        name: the run's folder; by default data-model-number, with the next free number.
        runs_dir: the folder that holds the runs.
        seed: of the split, the weights, the order, the augmentation and the dropout.
        max_time: stop training after this long (90s, 20m, 1h30m), the learning rate falling to
            zero by then; the last validation and the test come on top.
        devices: processes that share every batch (data parallel).
        accelerator: where to compute; auto takes a GPU if there is one.
        threads: of one process; by default torch's choice.
        report: write the page that shows the run.
    """

    name: str | None = None
    runs_dir: str = "runs"
    seed: int = 0
    max_time: str | None = None
    devices: int = 1
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    threads: int | None = None
    report: bool = True

    def check(self) -> None:
        """Raise UserError for a value that cannot be."""
        _check_positive("devices", self.devices)
        _check_positive("threads", self.threads)
        # Far beyond, the threads cannot be made, and the process dies without a word.
        if self.threads is not None and self.threads > max(MOST_THREADS, os.cpu_count() or 1):
            raise UserError(
                f"Expected threads of at most {max(MOST_THREADS, os.cpu_count() or 1)}, "
                f"but got {self.threads}"
            )
        if not 0 <= self.seed < 2**63:
            raise UserError(f"Expected seed in [0, 2⁶³), but got {self.seed}")
        if self.max_time is not None:
            seconds(self.max_time)
        if self.name is not None and (
            self.name in ("", ".", "..") or set(self.name) & set("/\\\0")
        ):
            raise UserError(
                f"Expected name to be a folder's name, but got {self.name!r}; "
                "choose the folder around it by runs_dir"
            )


@dataclass
class Options:
    """All options of a run, in groups; ``flat`` and ``from_flat`` are the form of options.yaml."""

    data: DataOptions = field(default_factory=DataOptions)
    network: NetworkOptions = field(default_factory=NetworkOptions)
    recipe: RecipeOptions = field(default_factory=RecipeOptions)
    run: RunOptions = field(default_factory=RunOptions)

    def check(self) -> None:
        """Raise UserError for a value that cannot be."""
        for group in (self.data, self.network, self.recipe, self.run):
            group.check()

    def flat(self) -> dict[str, Any]:
        """All options by their names, as in options.yaml.

        Example:
            >>> Options().flat()["data"]
            'digits'
        """
        return {name: value for group in asdict(self).values() for name, value in group.items()}

    @classmethod
    def from_flat(cls, values: dict[str, Any]) -> Options:
        """The options that ``flat`` gave.

        Raises:
            UserError: an option is unknown.
        """
        groups = (DataOptions, NetworkOptions, RecipeOptions, RunOptions)
        known = {item.name for group in groups for item in fields(group)}
        if unknown := sorted(set(values) - known):
            raise UserError(f"Unknown option {', '.join(map(repr, unknown))} of a run")
        made: list[Any] = [
            group(**{f.name: values[f.name] for f in fields(group) if f.name in values})
            for group in groups
        ]
        return cls(*made)


def seconds(text: str) -> float:
    """The length of a time such as ``90s``, ``20m``, ``1h30m`` or ``1:30:00``, in seconds.

    Raises:
        UserError: the text is no time, or no time at all.

    Example:
        >>> seconds("20m"), seconds("1h30m"), seconds("0:45")
        (1200.0, 5400.0, 45.0)
    """
    length = 0.0
    if match := re.fullmatch(r"(?:(\d+):)?(\d+):(\d\d)", text):
        hours, minutes, rest = (int(part or 0) for part in match.groups())
        length = 3600.0 * hours + 60.0 * minutes + rest
    elif match := re.fullmatch(r"(?:([\d.]+)h)?(?:([\d.]+)m(?:in)?)?(?:([\d.]+)s?)?", text.strip()):
        try:
            hours_, minutes_, rest_ = (float(part or 0) for part in match.groups())
        except ValueError:
            hours_ = minutes_ = rest_ = 0.0
        length = 3600 * hours_ + 60 * minutes_ + rest_
    if length <= 0:
        raise UserError(f"Expected max_time such as 90s, 20m or 1h30m, but got {text!r}")
    return length


def _check_positive(name: str, value: float | None) -> None:
    if value is not None and not 0 < value < math.inf:
        raise UserError(f"Expected {name} above 0, but got {value:g}")


def _check_between(
    name: str, value: float | None, low: float, high: float, *, closed: bool = False
) -> None:
    """Values in (low, high), or with ``closed`` in [low, high)."""
    if value is None or low < value < high or (closed and value == low):
        return
    left = "[" if closed else "("
    raise UserError(f"Expected {name} in {left}{low:g}, {high:g}), but got {value:g}")
