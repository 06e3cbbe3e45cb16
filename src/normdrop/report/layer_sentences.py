"""What the report says of the layers: what batch norm learned, and what dropout did."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from normdrop.report.wording import Sentence, counted, listed, number, percent
from normdrop.runs.read import NormLayer, RunFolder

__all__ = ["dead_channels", "describe_dropout", "describe_norm"]

Array = NDArray[Any]

#: Below this |γ| a channel counts as dead: its output is the constant α, whatever comes in.
DEAD = 1e-3
#: Below this running variance a channel's input hardly varies from one sample to the next.
STILL = 1e-8


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
    channels = f"{counted(len(every), 'channel')} in {counted(len(known), 'layer')}"
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
                f"{counted(count, 'channel is', 'channels are')} dead (|γ| < 0.001)"
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
                f"{counted(len(closed), 'channel has', 'channels have')} α below −4·|γ|, the "
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
                f"In {counted(len(far), 'channel')} the mean is more than 100 standard "
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
                f"The input of {counted(len(still), 'channel')} hardly varies (variance < 10⁻⁸), "
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
        said = listed([f"{name} = {value}" for name, value in given.items()]) if given else ""
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
        f"In training {counted(len(active), 'layer')} kept each value with probability "
        f"{listed([f'{keep:g}' for keep in keeps])} and dropped the others; "
        "in evaluation nothing is dropped."
    )
    train, val = run.metrics["train_accuracy"], run.metrics["val_accuracy"]
    if len(train) and np.isfinite(train[-1]) and np.isfinite(val[-1]):
        seen += (
            f" The last epoch ended with {percent(train[-1])} training accuracy, dropout on, and "
            f"{percent(val[-1])} validation accuracy, dropout off."
        )
    if len(train) >= 3 and val[-1] - train[-1] > 0.1:
        return Sentence(
            seen,
            f"Validation accuracy, without dropout, ends {100 * (val[-1] - train[-1]):.0f} points "
            "above training accuracy: training was made hard (by dropout or by augmentation), and "
            "a higher keep may learn more.",
            warning=True,
        )
    few = "" if len(train) >= 3 else "; a run of fewer than three epochs cannot tell"
    return Sentence(
        seen,
        "A warning sign would be a training accuracy more than 10 points below the validation "
        f"accuracy, since then keep is probably too low{few}.",
    )
