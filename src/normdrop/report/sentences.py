"""What the report says under each figure: one sentence on what is seen, one on the warning sign.

Every number comes from the run's files. A warning is given only where the run shows it; otherwise
the sentence says what the sign would be, or that the run is too short to tell.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from normdrop.report.wording import (
    Sentence,
    counted,
    listed,
    number,
    option,
    percent,
    probability,
    times,
)
from normdrop.runs.read import RunFolder

__all__ = [
    "describe_accuracy",
    "describe_confusion",
    "describe_data",
    "describe_learning_rate",
    "describe_loss",
    "describe_mistakes",
    "describe_per_class",
    "describe_reliability",
    "describe_speed",
]

Array = NDArray[Any]


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
    smoothing = run.options.recipe.label_smoothing if run.options else None
    bad = _first_bad_epoch(m, "train_loss", "val_loss") or run.diverged
    if bad is not None:
        return Sentence(
            "The loss on the training and on the validation split, epoch by epoch.",
            f"The loss or a weight was missing or not finite in epoch {bad}: "
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
        f"training loss falls; {'at the end of this run' if run.result else 'so far'} "
        "it does not.",
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
    kept = run.result is not None and np.isin(run.result["best_epoch"], epoch)
    if run.result is not None and kept:
        best = int(np.flatnonzero(epoch == run.result["best_epoch"])[0])
    seen = f"In the last epoch {percent(val[-1])} of the validation samples are classified right"
    if len(epoch) > 1:
        seen += f" (best: {percent(val[best])} in epoch {epoch[best]}"
        seen += ", whose weights were kept)" if kept else ")"
    seen += f", and {percent(train[-1])} of the training samples."
    keeps = [layer.keep for layer in run.dropout_layers or ()]
    if any(keep < 1 for keep in keeps) and train[-1] < val[-1]:
        seen += (
            " Training accuracy is measured with dropout on, so it may lie below the other curve."
        )
    if sign := _no_better_than_one_class(run, float(val[best])):
        return Sentence(seen, sign, warning=True)
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
        f"accuracy; {'this run ends' if run.result else 'so far this run is'} without one.",
    )


def _no_better_than_one_class(run: RunFolder, val: float) -> str:
    """Accuracy and the share of the most frequent class, both of the same split."""
    name, accuracy, counts = "best validation", val, run.samples.get("val")
    if counts is None and run.result is not None:  # a run that did not count its splits
        name, accuracy = "test", float(run.result["accuracy"])
        counts = [int(row["support"]) for row in run.result["per_class"]]
    if not counts or not sum(counts):
        return ""
    share = max(counts) / sum(counts)
    if accuracy > share + 0.02:
        return ""
    how = "hardly" if accuracy > share + 1e-6 else "no"  # metrics.csv has six digits
    return (
        f"The {name} accuracy, {percent(accuracy)}, is {how} better than always naming the most "
        f"frequent class ({percent(share)} of the {name.split()[-1]} split): "
        f"the network has learned nothing useful{'' if run.result else ' so far'}."
    )


def describe_data(run: RunFolder) -> Sentence | None:
    """The splits, and what was left out of them; None for a run that did not write it down."""
    if not run.samples:
        return None
    train, val, test = (sum(run.samples[split]) for split in ("train", "val", "test"))
    seen = (
        f"The data were split into {train:,} training, {val:,} validation and "
        f"{counted(test, 'test sample')} of {len(run.classes)} classes."
    )
    is_table = run.record["data"].get("kind") == "table"
    count = run.dropped if is_table else len(run.skipped)
    if is_table:
        what, why = counted(count, "row"), "for missing values"
    else:
        what, why = counted(count, "image"), "because they could not be read"
        why = why.replace("they", "it") if count == 1 else why
    if not count:
        thing = "rows" if is_table else "images"
        return Sentence(seen, f"A warning sign would be {thing} left out {why}; there are none.")
    return Sentence(
        seen,
        f"{what} {'was' if count == 1 else 'were'} left out {why}, so no figure here speaks of "
        f"{'it' if count == 1 else 'them'}.",
        warning=True,
    )


def describe_learning_rate(run: RunFolder) -> Sentence:
    """The learning rate at the end of each epoch: warm-up, peak, and where it ended."""
    epoch, rate = run.metrics["epoch"].astype(int), run.metrics["learning_rate"]
    if not np.isfinite(rate).any():
        return Sentence("The run recorded no learning rate.", "So nothing can be said about it.")
    top = int(np.nanargmax(rate))
    if len(rate) == 1 or np.ptp(rate[np.isfinite(rate)]) <= 1e-9 * rate[top]:
        return Sentence(
            f"The learning rate is {option(rate[top])} "
            f"{'in the only epoch' if len(rate) == 1 else 'in every epoch'} recorded.",
            "A warning sign would be a loss that jumps up and down from epoch to epoch: "
            "a lower rate towards the end usually calms it.",
        )
    peak = f"rises to {option(rate[top])} in epoch {epoch[top]}"
    start = f"starts at {option(rate[top])}"
    seen = f"The learning rate {peak if top > 0 else start}"
    if top == len(rate) - 1:
        seen += ", the last one recorded."
    else:
        seen += f" and ends at {option(rate[-1])}."
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
        low, high = number(speed[known].min()), number(speed[known].max())
        seen += f" (median of the epochs), from {low} to {high}"
    slow = epoch[known & (speed < 0.5 * median) & (epoch > epoch[0])]
    if len(slow):
        return Sentence(
            seen + ".",
            f"{listed([f'Epoch {e}' if i == 0 else str(e) for i, e in enumerate(slow)])} ran at "
            "less than half of the median speed; other work on the machine is the usual reason.",
            warning=True,
        )
    return Sentence(
        seen + ".",
        "A warning sign would be an epoch at less than half of the median speed; "
        "after the first epoch there is none.",
    )


def describe_confusion(run: RunFolder, confusion: Array) -> Sentence:
    """Truth against prediction: pairs that are mixed up, classes that are never named."""
    names = run.classes
    total, right = int(confusion.sum()), int(np.trace(confusion))
    wrong = confusion - np.diag(np.diag(confusion))
    seen = f"{right:,} of {counted(total, 'test sample')} lie on the diagonal, where prediction "
    seen += "and truth agree"
    if wrong.any():
        truth, guess = (int(i) for i in np.unravel_index(int(np.argmax(wrong)), wrong.shape))
        seen += (
            f"; the most frequent mistake is “{names[truth]}” taken for “{names[guess]}”, "
            f"{times(int(wrong[truth, guess]))}"
        )
    support, predicted = confusion.sum(1), confusion.sum(0)
    never = [names[k] for k in range(len(names)) if support[k] > 0 and predicted[k] == 0]
    if never:
        return Sentence(
            seen + ".",
            f"The network never names {listed([f'“{name}”' for name in never])}, "
            "although the test split holds such samples.",
            warning=True,
        )
    share = np.divide(
        wrong, support[:, None], out=np.zeros(wrong.shape), where=support[:, None] > 0
    )
    mixed = [
        f"{percent(share[t, g], 0)} of “{names[t]}” for “{names[g]}”"
        for t, g in sorted(np.argwhere(share >= 0.25).tolist(), key=lambda at: -share[at[0], at[1]])
        if support[t] >= 10
    ]
    if mixed:
        return Sentence(
            seen + ".",
            f"Some classes are mixed up: the network takes {listed(mixed)}.",
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
            f" {counted(small, 'class has', 'classes have')} fewer than 20 test samples, "
            f"so {'its' if small == 1 else 'their'} figures are uncertain."
        )
    rare = [f"“{r['class']}”" for r in rows if r["support"] >= 10 and r["recall"] < 0.5]
    if rare:
        return Sentence(
            seen,
            f"The network finds fewer than half of the samples of {listed(rare)}.",
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
        smoothing = run.options.recipe.label_smoothing if run.options else None
        if confidence < accuracy and smoothing:
            sign += f" (label smoothing, here {smoothing}, is a usual reason)"
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
            f"All {counted(len(labels), 'test sample')} are classified right.",
            "A warning sign would be test samples that also lie in the training split; "
            "this page cannot see that.",
        )
    worst = probabilities[wrong].max(1)
    shown = len(run.mistakes)
    seen = (
        f"{counted(count, 'test sample')} of {int(result.get('count', len(labels))):,} "
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
            f"In {counted(sure, 'mistake')} the network gave the wrong class 0.99 or more: check "
            f"{'this label' if sure == 1 else 'these labels'} first, since such samples are often "
            "mislabelled or ambiguous.",
            warning=True,
        )
    return Sentence(
        seen,
        "A warning sign would be a wrong class with a probability of 0.99 or more, often a "
        f"mislabelled sample; the highest here is {probability(float(worst.max()))}.",
    )
