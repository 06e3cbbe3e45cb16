"""What the report says under each figure: one sentence on what is seen, one on the warning sign.

Every number comes from the run's files. A warning is given only where the run shows it; otherwise
the sentence says what the sign would be, or that the run is too short to tell.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normdrop.study.run_folder import NormLayer, RunFolder

__all__ = [
    "DEAD",
    "Sentence",
    "dead_channels",
    "describe_accuracy",
    "describe_confusion",
    "describe_dropout",
    "describe_learning_rate",
    "describe_loss",
    "describe_mistakes",
    "describe_norm",
    "describe_per_class",
    "describe_reliability",
    "describe_speed",
    "duration",
    "number",
    "percent",
    "probability",
]

Array = NDArray[Any]

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
#: A space at which no line breaks.
NBSP = "\u00a0"
#: Below this |γ| a channel counts as dead: its output is the constant α, whatever comes in.
DEAD = 1e-3
#: Below this running variance a channel's input hardly varies from one sample to the next.
STILL = 1e-8


@dataclasses.dataclass(frozen=True)
class Sentence:
    """What is seen in a figure, and the warning sign: present (``warning``) or only described."""

    seen: str
    sign: str
    warning: bool = False


def number(value: float) -> str:
    """Three significant digits, with a power of ten only where they would be long without.

    Example:
        >>> number(0.123456), number(1234567.0), number(-0.00001234), number(0.0)
        ('0.123', '1,230,000', '−1.23×10⁻⁵', '0')
    """
    value = float(value)
    if not np.isfinite(value):
        return "not a number" if np.isnan(value) else ("∞" if value > 0 else "−∞")
    if value == 0:
        return "0"
    mantissa, _, power = f"{value:.2e}".partition("e")
    exponent = int(power)
    if -4 <= exponent < 7:
        text = f"{float(f'{value:.2e}'):,.{max(0, 2 - exponent)}f}"
    else:
        text = f"{mantissa}×10{str(exponent).translate(_SUPERSCRIPT)}"
    return text.replace("-", "−")


def _option(value: float) -> str:
    """A number that somebody chose, such as 0.05: without zeros at its end."""
    text = number(value)
    return text.rstrip("0").rstrip(".") if "." in text and "×" not in text else text


def percent(share: float, digits: int = 1) -> str:
    r"""A share as a percentage, with a no-break space; never rounded up to 100.

    Example:
        >>> percent(0.9754), percent(1.0), percent(0.99999)
        ('97.5\xa0%', '100\xa0%', '>\xa099.9\xa0%')
    """
    share = float(share)
    if not np.isfinite(share):
        return "not a number"
    if share in (0.0, 1.0):
        return f"{share:.0%}".replace("%", NBSP + "%")
    text = f"{100 * share:.{digits}f}"
    if float(text) >= 100:
        return f">{NBSP}{100 - 10**-digits:.{digits}f}{NBSP}%"
    if float(text) <= 0:
        return f"<{NBSP}{10**-digits:.{digits}f}{NBSP}%"
    return f"{text}{NBSP}%"


def probability(value: float) -> str:
    r"""A probability with three digits; never rounded up to 1.

    Example:
        >>> probability(0.98765), probability(0.99996)
        ('0.988', '>\xa00.999')
    """
    return f">{NBSP}0.999" if 0.9995 <= value < 1 else f"{value:.3f}"


def duration(seconds: float) -> str:
    """Seconds in words.

    Example:
        >>> duration(0.4), duration(74), duration(7380)
        ('0.4 s', '1 min 14 s', '2 h 3 min')
    """
    if not np.isfinite(seconds):
        return "an unknown time"
    if seconds < 10:
        return f"{seconds:.1f} s"
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60} min {total % 60} s"
    return f"{total // 3600} h {total % 3600 // 60} min"


def _counted(count: int, noun: str, plural: str | None = None) -> str:
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count:,} times")


def _rising_streak(values: Array) -> int:
    """How many epochs in a row, up to the last, ended higher than the epoch before."""
    streak = 0
    for before, after in zip(values[-2::-1], values[:0:-1], strict=True):
        if not after > before:
            break
        streak += 1
    return streak


def _first_bad_epoch(metrics: dict[str, Array], *names: str) -> int | None:
    """The first epoch where a loss is infinite, or NaN although others of its column are not."""
    bad = np.zeros(len(metrics["epoch"]), dtype=bool)
    for name in names:
        column = metrics[name]
        bad |= np.isinf(column)
        if np.isfinite(column).any():
            bad |= np.isnan(column)
    return int(metrics["epoch"][bad][0]) if bad.any() else None


def describe_loss(run: RunFolder) -> Sentence:
    """The curves of the loss: divergence, overfitting, no progress."""
    m = run.metrics
    epoch, train, val = m["epoch"].astype(int), m["train_loss"], m["val_loss"]
    smoothing = run.options.get("label_smoothing") or 0
    bad = _first_bad_epoch(m, "train_loss", "val_loss")
    if bad is not None:
        return Sentence(
            "The loss on the training and on the validation split, epoch by epoch.",
            f"The loss was missing or not finite in epoch {bad}: "
            "the learning rate may be too high, or the data may hold NaN or infinite values.",
            warning=True,
        )
    if len(epoch) == 1:
        return Sentence(
            f"After the only epoch the training loss is {number(train[0])} "
            f"and the validation loss {number(val[0])}.",
            "One epoch is too short to show a warning sign.",
        )
    seen = (
        f"From epoch {epoch[0]} to {epoch[-1]} the training loss went from {number(train[0])} to "
        f"{number(train[-1])} and the validation loss from {number(val[0])} to {number(val[-1])}"
    )
    if np.isfinite(val).all():
        best = int(np.argmin(val))
        seen += f"; the lowest validation loss, {number(val[best])}, came in epoch {epoch[best]}."
    else:
        return Sentence(seen + ".", "Without validation losses overfitting cannot be seen here.")
    if smoothing:
        seen += (
            f" The training loss alone includes label smoothing ({smoothing}), so compare the "
            "courses of the two curves rather than their heights."
        )
    streak = _rising_streak(val)
    if streak >= 3 and train[-1] < train[-1 - streak]:
        return Sentence(
            seen,
            f"The validation loss has risen for the last {streak} epochs, from "
            f"{number(val[-1 - streak])} to {number(val[-1])}, while the training loss fell: "
            "the network has begun to learn the training samples by heart.",
            warning=True,
        )
    if len(epoch) >= 3 and train[-1] >= train[0]:
        return Sentence(
            seen,
            "The training loss has not fallen since the first epoch: "
            "the network does not learn with these options.",
            warning=True,
        )
    if len(epoch) >= 5 and val[-1] > 1.1 * val[best] and train[-1] < train[best]:
        return Sentence(
            seen,
            f"The validation loss ends {percent(val[-1] / val[best] - 1, 0)} above its lowest, "
            f"while the training loss fell on after epoch {epoch[best]}: "
            "later epochs made the probabilities worse.",
            warning=True,
        )
    if len(epoch) < 3:
        return Sentence(seen, f"{len(epoch)} epochs are too few to show a warning sign.")
    return Sentence(
        seen,
        "A warning sign would be a validation loss that rises for several epochs while the "
        "training loss falls; at the end of this run it does not.",
    )


def describe_accuracy(run: RunFolder) -> Sentence:
    """The curves of the accuracy: a gap between the splits, or no better than chance."""
    m = run.metrics
    epoch, train, val = m["epoch"].astype(int), m["train_accuracy"], m["val_accuracy"]
    if not np.isfinite(val).any():
        return Sentence(
            f"The training accuracy ends at {percent(train[-1])}.",
            "Without validation accuracies a gap between the two cannot be seen here.",
        )
    best = int(np.nanargmax(val))
    seen = f"In the last epoch {percent(val[-1])} of the validation samples are classified right"
    if len(epoch) > 1:
        seen += f" (best: {percent(val[best])}, epoch {epoch[best]})"
    seen += f", and {percent(train[-1])} of the training samples."
    keeps = [layer.keep for layer in run.dropout_layers or ()]
    if any(keep < 1 for keep in keeps) and train[-1] < val[-1]:
        seen += (
            " Training accuracy is measured with dropout on, so it may lie below the other curve."
        )
    share = _largest_class_share(run)
    if share is not None and val[best] <= share + 0.02:
        return Sentence(
            seen,
            f"The best validation accuracy is no better than always naming the most frequent "
            f"class ({percent(share)} of the test split): the network has learned nothing useful.",
            warning=True,
        )
    gap = train[-1] - val[-1]
    if gap > 0.1:
        return Sentence(
            seen,
            f"Training accuracy ends {100 * gap:.0f} points above validation accuracy: the network "
            "fits the training samples far better than new ones; more data, augmentation, weight "
            "decay or a lower keep may help.",
            warning=True,
        )
    return Sentence(
        seen,
        "A warning sign would be a training accuracy more than 10 points above the validation "
        "accuracy; this run ends without one.",
    )


def _largest_class_share(run: RunFolder) -> float | None:
    if run.result is None:
        return None
    support = [float(row["support"]) for row in run.result.get("per_class", ())]
    return max(support) / sum(support) if support and sum(support) > 0 else None


def describe_learning_rate(run: RunFolder) -> Sentence:
    """The learning rate at the end of each epoch: warm-up, peak, and where it ended."""
    epoch, rate = run.metrics["epoch"].astype(int), run.metrics["learning_rate"]
    if not np.isfinite(rate).any():
        return Sentence("The run recorded no learning rate.", "So nothing can be said about it.")
    top = int(np.nanargmax(rate))
    if len(rate) == 1 or np.ptp(rate[np.isfinite(rate)]) <= 1e-9 * rate[top]:
        return Sentence(
            f"The learning rate is {_option(rate[top])} "
            f"{'in the only epoch' if len(rate) == 1 else 'in every epoch'} recorded.",
            "A warning sign would be a loss that jumps up and down from epoch to epoch: "
            "a lower rate towards the end usually calms it.",
        )
    peak = f"rises to {_option(rate[top])} in epoch {epoch[top]}"
    start = f"starts at {_option(rate[top])}"
    seen = f"The learning rate {peak if top > 0 else start} and ends at {_option(rate[-1])}."
    if run.result is not None and len(rate) >= 3 and rate[-1] > 0.5 * rate[top]:
        return Sentence(
            seen,
            f"The run ended while the rate was still {percent(rate[-1] / rate[top], 0)} of its "
            "peak, so the weights had no calm epochs to settle in.",
            warning=True,
        )
    return Sentence(
        seen,
        "A warning sign would be a run that ends near the peak, before the weights could settle.",
    )


def describe_speed(run: RunFolder) -> Sentence:
    """Training samples per second: a slow epoch points at other work on the machine."""
    epoch, speed = run.metrics["epoch"].astype(int), run.metrics["images_per_second"]
    known = np.isfinite(speed)
    if not known.any():
        return Sentence("The run recorded no speed.", "So nothing can be said about it.")
    median = float(np.median(speed[known]))
    seen = f"Training went through {number(median)} samples per second"
    if known.sum() > 1:
        seen += f" (median of the epochs), from {number(speed[known].min())} to {number(speed[known].max())}"
    slow = epoch[known & (speed < 0.5 * median) & (epoch > epoch[0])]
    if len(slow):
        return Sentence(
            seen + ".",
            f"{_listed([f'Epoch {e}' if i == 0 else str(e) for i, e in enumerate(slow)])} ran at "
            "less than half of the median speed; other work on the machine is the usual reason.",
            warning=True,
        )
    return Sentence(
        seen + ".",
        "A warning sign would be an epoch at less than half of the median speed; "
        "after the first epoch there is none.",
    )


def _listed(words: list[str], most: int = 4) -> str:
    if len(words) > most:
        words = [*words[: most - 1], f"{len(words) - most + 1} more"]
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def describe_confusion(run: RunFolder, confusion: Array) -> Sentence:
    """Truth against prediction: pairs that are mixed up, classes that are never named."""
    names = run.classes
    total, right = int(confusion.sum()), int(np.trace(confusion))
    wrong = confusion - np.diag(np.diag(confusion))
    seen = f"{right:,} of {_counted(total, 'test sample')} lie on the diagonal, where prediction "
    seen += "and truth agree"
    if wrong.any():
        truth, guess = (int(i) for i in np.unravel_index(int(np.argmax(wrong)), wrong.shape))
        seen += (
            f"; the most frequent mistake is “{names[truth]}” taken for “{names[guess]}”, "
            f"{_times(int(wrong[truth, guess]))}"
        )
    support, predicted = confusion.sum(1), confusion.sum(0)
    never = [names[k] for k in range(len(names)) if support[k] > 0 and predicted[k] == 0]
    if never:
        return Sentence(
            seen + ".",
            f"The network never names {_listed([f'“{name}”' for name in never])}, "
            "although the test split holds such samples.",
            warning=True,
        )
    share = np.divide(wrong, support[:, None], out=np.zeros(wrong.shape), where=support[:, None] > 0)
    mixed = [
        f"{percent(share[t, g], 0)} of “{names[t]}” for “{names[g]}”"
        for t, g in sorted(np.argwhere(share >= 0.25).tolist(), key=lambda at: -share[at[0], at[1]])
        if support[t] >= 10
    ]
    if mixed:
        return Sentence(
            seen + ".",
            f"Some classes are mixed up: the network takes {_listed(mixed)}.",
            warning=True,
        )
    return Sentence(
        seen + ".",
        "A warning sign would be a strong cell off the diagonal, with a quarter of a class or "
        "more; there is none among classes with at least 10 test samples.",
    )


def describe_per_class(run: RunFolder) -> Sentence:
    """Precision, recall and F1 of each class: the weakest one, and those rarely found."""
    rows = (run.result or {}).get("per_class", [])
    lowest = min(rows, key=lambda row: row["f1"])
    highest = max(rows, key=lambda row: row["f1"])
    seen = "F1, the harmonic mean of precision and recall, "
    if lowest["f1"] == highest["f1"]:
        seen += f"is {percent(lowest['f1'])} in every class."
    else:
        seen += (
            f"lies between {percent(lowest['f1'])} (“{lowest['class']}”) and "
            f"{percent(highest['f1'])} (“{highest['class']}”)."
        )
    small = sum(row["support"] < 20 for row in rows)
    if small:
        seen += (
            f" {_counted(small, 'class has', 'classes have')} fewer than 20 test samples, "
            f"so {'its' if small == 1 else 'their'} figures are uncertain."
        )
    rare = [f"“{r['class']}”" for r in rows if r["support"] >= 10 and r["recall"] < 0.5]
    if rare:
        return Sentence(
            seen,
            f"The network finds fewer than half of the samples of {_listed(rare)}.",
            warning=True,
        )
    return Sentence(
        seen,
        "A warning sign would be a class with at least 10 test samples of which fewer than half "
        "are found; there is none.",
    )


def describe_reliability(run: RunFolder) -> Sentence:
    """Confidence against accuracy: whether a probability can be taken at its word."""
    result = run.result or {}
    error = float(result.get("calibration_error", float("nan")))
    seen = (
        f"Where the bars follow the diagonal, a probability of 0.9 is right nine times in ten; "
        f"on average the bars miss it by {100 * error:.1f} points (the calibration error)."
    )
    if run.probabilities is None:
        return Sentence(seen, "A warning sign would be a calibration error above 5 points.")
    confidence = float(run.probabilities.max(1).mean())
    accuracy = float(result["accuracy"])
    seen += f" The mean confidence is {percent(confidence)}, the accuracy {percent(accuracy)}."
    if error > 0.05:
        side = "too sure of itself" if confidence > accuracy else "less sure than it could be"
        sign = f"The calibration error is above 5 points, and the network is {side}"
        if confidence < accuracy and run.options.get("label_smoothing"):
            sign += f" (label smoothing, here {run.options['label_smoothing']}, is a usual reason)"
        sign += ": do not read its probabilities as frequencies."
        return Sentence(seen, sign, warning=True)
    return Sentence(
        seen, "A warning sign would be a calibration error above 5 points; here it is lower."
    )


def describe_mistakes(run: RunFolder) -> Sentence:
    """The worst mistakes: how sure the network was, and what to look for."""
    result = run.result or {}
    probabilities, labels = run.probabilities, run.labels
    if probabilities is None or labels is None:
        return Sentence("The evaluation of this run is missing.", "So no mistake can be shown.")
    predicted = probabilities.argmax(1)
    wrong = predicted != labels
    count = int(wrong.sum())
    if count == 0:
        return Sentence(
            f"All {_counted(len(labels), 'test sample')} are classified right.",
            "A warning sign would be test samples that also lie in the training split; "
            "this page cannot see that.",
        )
    worst = probabilities[wrong].max(1)
    shown = len(run.mistakes)
    seen = (
        f"{_counted(count, 'test sample')} of {int(result.get('count', len(labels))):,} "
        f"{'is' if count == 1 else 'are'} classified wrong; "
        + (
            "all are shown"
            if shown >= count > 1
            else "it is shown"
            if shown >= count
            else f"the {shown} worst are shown"
        )
        + ", most confident first."
    )
    sure = int((worst >= 0.99).sum())
    if sure:
        return Sentence(
            seen,
            f"In {_counted(sure, 'mistake')} the network gave the wrong class 0.99 or more: check "
            f"{'this label' if sure == 1 else 'these labels'} first, since such samples are often "
            "mislabelled or ambiguous.",
            warning=True,
        )
    return Sentence(
        seen,
        "A warning sign would be a wrong class with a probability of 0.99 or more, often a "
        f"mislabelled sample; the highest here is {probability(float(worst.max()))}.",
    )


def dead_channels(layer: NormLayer) -> Array:
    """The channels whose |γ| is below 1e-3: their output is the constant α."""
    if layer.gamma is None:
        return np.zeros(0, dtype=np.int64)
    return np.flatnonzero(np.abs(layer.gamma) < DEAD)


def _broken(layers: tuple[NormLayer, ...], part: str) -> str | None:
    for layer in layers:
        values = getattr(layer, part)
        if values is not None and not np.isfinite(values).all():
            channel = int(np.flatnonzero(~np.isfinite(values))[0])
            return (
                f"Channel {channel} of {layer.name} is not finite: "
                "a batch with NaN or infinite values went through it."
            )
    return None


def describe_norm(layers: tuple[NormLayer, ...], part: str) -> Sentence:
    """One of γ, α, running mean and running variance over all layers of the network."""
    known = [(layer, getattr(layer, part)) for layer in layers if getattr(layer, part) is not None]
    if not known:
        return Sentence("No layer of this network holds it.", "So there is nothing to see.")
    every = np.concatenate([values.astype(np.float64) for _, values in known])
    finite = every[np.isfinite(every)]
    broken = _broken(layers, part)
    channels = f"{_counted(len(every), 'channel')} in {_counted(len(known), 'layer')}"
    if not len(finite):
        return Sentence(f"Of {channels} none is finite.", broken or "", warning=True)
    median, low, high = (number(v) for v in (np.median(finite), finite.min(), finite.max()))
    if part == "gamma":
        seen = (
            f"γ, the scale that each channel learned (usual start: 1), has median {median} and "
            f"runs from {low} to {high} over {channels}."
        )
        dead = [(layer, dead_channels(layer)) for layer, _ in known]
        count = sum(len(channel) for _, channel in dead)
        if broken is None and count:
            layer, at = next((layer, at) for layer, at in dead if len(at))
            return Sentence(
                seen,
                f"{_counted(count, 'channel is', 'channels are')} dead (|γ| < 0.001)"
                f"{', the first being' if count > 1 else ':'} channel {at[0]} of {layer.name}; "
                "what comes in there hardly matters any more.",
                warning=True,
            )
        sign = "A warning sign would be a dead channel, |γ| < 0.001; there is none."
    elif part == "alpha":
        seen = (
            f"α, the shift that each channel learned (usual start: 0; PyTorch calls it bias), has "
            f"median {median} and runs from {low} to {high}."
        )
        closed = _closed_channels(layers)
        if broken is None and closed:
            layer, channel = closed[0]
            return Sentence(
                seen,
                f"{_counted(len(closed), 'channel has', 'channels have')} α below −4·|γ|, the "
                f"first being channel {channel} of {layer.name}: if a ReLU follows directly, "
                "hardly any value passes it.",
                warning=True,
            )
        sign = (
            "A warning sign would be α below −4·|γ|, where a ReLU that follows lets hardly "
            "anything pass; there is none."
        )
    elif part == "mean":
        seen = (
            f"The running mean, which stands in for the batch mean in evaluation, has median "
            f"{median} and runs from {low} to {high}."
        )
        far = _far_channels(layers)
        if broken is None and far:
            layer, channel = far[0]
            return Sentence(
                seen,
                f"In {_counted(len(far), 'channel')} the mean is more than 100 standard "
                f"deviations from 0, the first being channel {channel} of {layer.name}: "
                "float32 loses digits there.",
                warning=True,
            )
        sign = (
            "A warning sign would be a mean more than 100 standard deviations from 0, where "
            "float32 loses digits; there is none."
        )
    else:
        seen = (
            f"The running variance, which divides in evaluation, has median {median} and runs "
            f"from {low} to {high}."
        )
        still = [
            (layer, int(channel))
            for layer, values in known
            for channel in np.flatnonzero(values < STILL)
        ]
        if broken is None and still:
            layer, channel = still[0]
            return Sentence(
                seen,
                f"The input of {_counted(len(still), 'channel')} hardly varies (variance < 10⁻⁸), "
                f"the first being channel {channel} of {layer.name}: nothing arrives there.",
                warning=True,
            )
        sign = (
            "A warning sign would be a variance below 10⁻⁸, a channel at which nothing arrives; "
            "there is none."
        )
    return Sentence(seen, broken, warning=True) if broken else Sentence(seen, sign)


def _closed_channels(layers: tuple[NormLayer, ...]) -> list[tuple[NormLayer, int]]:
    found = []
    for layer in layers:
        if layer.gamma is not None and layer.alpha is not None:
            size = np.abs(layer.gamma)
            closed = (layer.alpha < -4 * size) & (size >= DEAD)
            found += [(layer, int(channel)) for channel in np.flatnonzero(closed)]
    return found


def _far_channels(layers: tuple[NormLayer, ...]) -> list[tuple[NormLayer, int]]:
    found = []
    for layer in layers:
        if layer.mean is not None and layer.variance is not None:
            far = layer.mean.astype(np.float64) ** 2 > 1e4 * np.maximum(layer.variance, STILL)
            found += [(layer, int(channel)) for channel in np.flatnonzero(far)]
    return found


def describe_dropout(run: RunFolder) -> Sentence:
    """Where dropout was used, and what the two splits say about its strength."""
    layers = run.dropout_layers
    options = run.network_options
    given = {k: v for k, v in options.items() if k.startswith("keep") and v is not None}
    if layers is None:
        said = _listed([f"{name} = {value}" for name, value in given.items()]) if given else ""
        return Sentence(
            f"The network was trained with {said}." if said else "The run records no keep rate.",
            "The places cannot be listed, since this version cannot build that network.",
        )
    active = [layer for layer in layers if layer.keep < 1]
    if not active:
        return Sentence(
            "No value was dropped: the network has no dropout layer with keep below 1.",
            "Without dropout, watch the gap between training and validation accuracy above.",
        )
    keeps = sorted({layer.keep for layer in active})
    seen = (
        f"In training {_counted(len(active), 'layer')} kept each value with probability "
        f"{_listed([f'{keep:g}' for keep in keeps])} and dropped the others; "
        "in evaluation nothing is dropped."
    )
    train, val = run.metrics["train_accuracy"], run.metrics["val_accuracy"]
    if len(train) >= 3 and val[-1] - train[-1] > 0.1:
        return Sentence(
            seen,
            f"Validation accuracy, without dropout, ends {100 * (val[-1] - train[-1]):.0f} points "
            "above training accuracy: training was made hard (by dropout or by augmentation), and "
            "a higher keep may learn more.",
            warning=True,
        )
    return Sentence(
        seen,
        "A warning sign would be a training accuracy more than 10 points below the validation "
        "accuracy, since then keep is probably too low.",
    )
