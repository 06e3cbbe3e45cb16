"""The figures of a report: each is drawn once and saved twice, as SVG for the page and as PNG.

In the SVG every colour is a CSS variable of the page, so the figures follow its light and dark
mode; in the PNG the colours are those of paper. Figures are made without pyplot, so nothing global
is left behind.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from normdrop.files import write_atomically
from normdrop.report.layer_sentences import dead_channels
from normdrop.report.wording import power_of_ten, probability
from normdrop.runs.read import RunFolder

__all__ = ["BLUE", "GRID", "INK", "MUTED", "ORANGE", "figures", "save_all", "save_png", "style"]

Array = NDArray[Any]

# Okabe and Ito's blue and vermillion, which stay apart for every common kind of colour blindness.
INK, MUTED, GRID, BLUE, ORANGE = "#1d2125", "#5b636c", "#dde1e6", "#0067a6", "#c44e00"

#: Up to this many classes the cells of a confusion matrix are large enough for their numbers.
WRITTEN_CLASSES = 20

#: A bin of the reliability diagram with fewer samples than this is drawn pale.
FEW = 10

#: Inches that a PNG is higher than the figure on the page, for its title.
_TITLE = 0.3

_PARTS = {
    "gamma": ("γ, the scale", 1.0),
    "alpha": ("α, the shift", 0.0),
    "mean": ("Running mean", 0.0),
    "variance": ("Running variance", 1.0),
}

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "normdrop",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "axes.formatter.use_mathtext": False,
    # An offset or a factor of all ticks would be written over the legend.
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-9, 9),
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Matplotlib's settings for every figure of a report, for a while."""
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # Class names may be in any script; the page shows them all, the PNG those that it can.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def figures(run: RunFolder) -> dict[str, tuple[str, Figure]]:
    """Draw every figure that the run has data for: name → (title, figure)."""
    drawn: dict[str, tuple[str, Figure]] = {}
    with style():
        if run.epochs:
            for name, (title, draw) in _CURVES.items():
                drawn[name] = (title, _panel(run, draw))
        if run.result is not None:
            if run.result.get("confusion"):
                drawn["confusion"] = ("Confusion matrix", _confusion(run))
            if run.result.get("reliability"):
                drawn["reliability"] = ("Reliability diagram", _reliability(run))
        if run.mistake_pictures is not None and len(run.mistake_pictures):
            drawn["mistakes"] = ("Worst mistakes", _mistakes(run))
        for part, (title, start) in _PARTS.items():
            if any(getattr(layer, part) is not None for layer in run.norm_layers):
                drawn[part] = (title, _ranges(run, part, start))
        for _, figure in drawn.values():
            # The layout takes half of the time, so it is worked out once for SVG and PNG.
            engine = figure.get_layout_engine()
            if isinstance(engine, ConstrainedLayoutEngine):
                engine.set(w_pad=0.07, h_pad=0.05)
                engine.execute(figure)
                figure.set_layout_engine("none")
            figure.set_facecolor("none")
    return drawn


def save_png(figure: Figure, title: str, path: str | os.PathLike[str]) -> None:
    """Save a figure with its title on white paper, whole or not at all."""
    width, height = figure.get_size_inches()
    places = [axes.get_position() for axes in figure.axes]
    with style():
        figure.set_size_inches(width, height + _TITLE)
        for axes in figure.axes:
            place = axes.get_position().bounds * np.array([1, height, 1, height])
            axes.set_position(place / [1, height + _TITLE, 1, height + _TITLE])
        heading = figure.text(
            0.02, 1 - 0.08 / (height + _TITLE), title, va="top", fontsize=11, fontweight="bold"
        )
        figure.set_facecolor("white")
        figure.set_dpi(150)
        try:
            with write_atomically(path) as temporary:
                FigureCanvasAgg(figure).print_png(temporary)
        finally:
            heading.remove()
            figure.set_facecolor("none")
            figure.set_size_inches(width, height)
            for axes, before in zip(figure.axes, places, strict=True):
                axes.set_position(before)


def _panel(run: RunFolder, draw: Callable[[Axes, RunFolder], None]) -> Figure:
    figure = Figure(figsize=(5.0, 3.1), layout="constrained")
    axes = figure.subplots()
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.spines["left"].set_visible(False)
    draw(axes, run)
    axes.set_xlabel("epoch")
    first, last = run.metrics["epoch"][[0, -1]]
    if first == last:
        axes.set_xlim(first - 1, last + 1)
        axes.set_xticks([int(first)])
    else:
        margin = 0.02 * (last - first)
        axes.set_xlim(first - margin, last + margin)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    return figure


def _line(axes: Axes, run: RunFolder, column: str, colour: str, label: str, style: str) -> None:
    epoch, values = run.metrics["epoch"], run.metrics[column].copy()
    values[~np.isfinite(values)] = np.nan
    known = int(np.isfinite(values).sum())
    marker = "o" if known < 3 or np.isnan(values).any() else ""
    axes.plot(epoch, values, color=colour, label=label, linestyle=style, marker=marker, ms=4)


def _legend(axes: Axes, handles: list[Any] | None = None) -> None:
    axes.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.0),
        ncols=3,
        borderaxespad=0.2,
        handlelength=1.8,
        columnspacing=1.4,
    )


def _plain(value: float, _: int | None = None) -> str:
    return f"{value:g}"


def _decade(value: float, _: int | None = None) -> str:
    exponent = round(np.log10(value))
    return f"{value:g}" if -4 < exponent < 4 else power_of_ten(exponent)


def _log_scale(axes: Axes, ratio: float) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if ratio < 1000 else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(_decade if ratio >= 1000 else _plain))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _mark_best(axes: Axes, run: RunFolder) -> None:
    best = (run.result or {}).get("best_epoch")
    if best is not None and run.epochs > 1:
        axes.axvline(float(best), color=MUTED, linewidth=0.9, linestyle=":", label="best epoch")


def _draw_loss(axes: Axes, run: RunFolder) -> None:
    _line(axes, run, "train_loss", BLUE, "training", "--")
    _line(axes, run, "val_loss", ORANGE, "validation", "-")
    _mark_best(axes, run)
    both = np.concatenate([run.metrics["train_loss"], run.metrics["val_loss"]])
    both = both[np.isfinite(both)]
    if len(both) and both.min() > 0 and both.max() / both.min() > 30:
        _log_scale(axes, both.max() / both.min())
    elif len(both):
        axes.set_ylim(bottom=0, top=1.05 * both.max() or 1)
    _legend(axes)


def _draw_accuracy(axes: Axes, run: RunFolder) -> None:
    _line(axes, run, "train_accuracy", BLUE, "training", "--")
    _line(axes, run, "val_accuracy", ORANGE, "validation", "-")
    _mark_best(axes, run)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g} %"))
    both = np.concatenate([run.metrics["train_accuracy"], run.metrics["val_accuracy"]])
    both = both[np.isfinite(both)]
    if len(both):
        low = float(both.min())
        axes.set_ylim(max(0.0, low - 0.1 * (1 - low) - 0.005), 1.0 + 0.02 * (1 - low) + 0.001)
    _legend(axes)


def _draw_learning_rate(axes: Axes, run: RunFolder) -> None:
    _line(axes, run, "learning_rate", BLUE, "learning rate", "-")
    axes.set_ylim(0, 1.1 * axes.dataLim.ymax if axes.dataLim.ymax > 0 else 1)


def _draw_speed(axes: Axes, run: RunFolder) -> None:
    _line(axes, run, "images_per_second", BLUE, "speed", "-")
    axes.set_ylim(0, 1.1 * axes.dataLim.ymax if axes.dataLim.ymax > 0 else 1)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


_CURVES: dict[str, tuple[str, Callable[[Axes, RunFolder], None]]] = {
    "loss": ("Loss", _draw_loss),
    "accuracy": ("Accuracy", _draw_accuracy),
    "learning_rate": ("Learning rate", _draw_learning_rate),
    "speed": ("Speed, samples per second", _draw_speed),
}


def _confusion(run: RunFolder) -> Figure:
    """Cells hold the share of their row; the picture is transparent where nothing is."""
    counts = np.asarray((run.result or {})["confusion"], dtype=np.float64)
    classes = len(counts)
    names = run.classes if len(run.classes) == classes else tuple(map(str, range(classes)))
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    right = np.eye(classes, dtype=bool)
    rgba = np.zeros((classes, classes, 4))
    # These two can be told apart on white and on black; a picture cannot follow the page's mode.
    rgba[..., :3] = to_rgb("#dd7430")
    rgba[right, :3] = to_rgb("#2f8ccb")
    written = classes <= WRITTEN_CLASSES
    # The square root lets rare mistakes be seen; written cells stay light under their numbers.
    rgba[..., 3] = np.sqrt(share) * (0.65 if written else 1.0)
    size = float(np.clip(0.42 * classes + 1.6, 4.2, 7.5)) if classes <= 30 else 5.4
    figure = Figure(figsize=(size, size), layout="constrained")
    axes = figure.subplots()
    axes.imshow(rgba, interpolation="none")
    if written:
        for truth, guess in np.argwhere(counts > 0):
            axes.text(guess, truth, f"{counts[truth, guess]:.0f}", ha="center", va="center", size=8)
    if classes <= 30:
        turned = 90 if max(map(len, names)) > 3 else 0
        axes.set_xticks(range(classes), [_short(n) for n in names], rotation=turned)
        axes.set_yticks(range(classes), [_short(n) for n in names])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set_color(GRID)
    axes.set_xlabel("prediction" if classes <= 30 else "prediction (number of the class)")
    axes.set_ylabel("truth" if classes <= 30 else "truth (number of the class)")
    return figure


def _short(name: str, most: int = 16) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _reliability(run: RunFolder) -> Figure:
    table = (run.result or {})["reliability"]
    edges = np.asarray(table["edges"], dtype=np.float64)
    accuracy, confidence, count = (
        np.array([np.nan if v is None else v for v in table[key]], dtype=np.float64)
        for key in ("accuracy", "confidence", "count")
    )
    filled = (np.nan_to_num(count) > 0) & np.isfinite(accuracy) & np.isfinite(confidence)
    left, width = edges[:-1][filled], np.diff(edges)[filled]
    accuracy, confidence, count = accuracy[filled], confidence[filled], count[filled]
    figure = Figure(figsize=(5.0, 4.6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3.2, 1))
    for axes in (top, bottom):
        axes.grid(axis="y", color=GRID, linewidth=0.8)
        axes.spines["left"].set_visible(False)
    few = count < FEW
    for chosen, alpha in ((~few, 0.6), (few, 0.22)):
        top.bar(
            left[chosen], accuracy[chosen], width[chosen], align="edge", color=BLUE, alpha=alpha
        )
    top.plot([0, 1], [0, 1], color=MUTED, linestyle=":", linewidth=1.2)
    top.scatter(confidence, confidence, marker="_", s=90, color=ORANGE, linewidths=2.2, zorder=3)
    top.vlines(confidence, accuracy, confidence, color=ORANGE, linewidth=1.4)
    handles: list[Any] = [
        Patch(color=BLUE, alpha=0.6, linewidth=0, label="accuracy"),
        Line2D([], [], color=ORANGE, label="mean confidence"),
    ]
    if few.any():
        pale = Patch(color=BLUE, alpha=0.22, linewidth=0, label=f"under {FEW} samples")
        handles.insert(1, pale)
    top.set_ylim(0, 1.02)
    _legend(top, handles)
    bottom.bar(left, count, width, align="edge", color=MUTED, alpha=0.6, linewidth=0)
    bottom.set_title("samples in the bin", loc="left", fontsize=9, color=MUTED)
    bottom.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=3))
    bottom.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    bottom.set_xlabel("probability of the predicted class")
    bottom.set_xlim(float(edges[0]), float(edges[-1]))
    return figure


def _ranges(run: RunFolder, part: str, start: float) -> Figure:
    """One column a layer: thin from lowest to highest, thick over the middle half, dot = median."""
    figure = Figure(figsize=(5.0, 3.1), layout="constrained")
    axes = figure.subplots()
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.spines["left"].set_visible(False)
    places, quantiles, dead = [], [], []
    for place, layer in enumerate(run.norm_layers, start=1):
        values = getattr(layer, part)
        if values is None:
            continue
        finite = values[np.isfinite(values)].astype(np.float64)
        if part == "variance":
            finite = np.maximum(finite, 1e-12)
        if len(finite):
            places.append(place)
            quantiles.append(np.quantile(finite, [0, 0.25, 0.5, 0.75, 1]))
        if part == "gamma" and len(dead_channels(layer)):
            dead.append(place)
    axes.axhline(start, color=MUTED, linewidth=1, linestyle=":", label=f"usual start, {start:g}")
    if places:
        low, first, middle, third, high = np.array(quantiles).T
        thick = float(np.clip(140 / len(run.norm_layers), 1.6, 9))
        axes.vlines(places, low, high, color=BLUE, linewidth=1, alpha=0.6)
        bars = axes.vlines(places, first, third, color=BLUE, linewidth=thick, alpha=0.55)
        bars.set_capstyle("butt")
        dot = float(np.clip(500 / len(run.norm_layers), 4, 22))
        axes.scatter(places, middle, s=dot, color=INK, linewidths=0, zorder=3, label="median")
        if part == "variance" and high.max() / low.min() > 30:
            _log_scale(axes, high.max() / low.min())
    if dead:
        axes.scatter(dead, [0] * len(dead), marker="x", s=30, color=ORANGE, zorder=4, label="dead")
    axes.set_xlabel("batch norm layer, from input to output")
    axes.set_xlim(0.4, len(run.norm_layers) + 0.6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10, min_n_ticks=1))
    _legend(axes)
    return figure


def _mistakes(run: RunFolder) -> Figure:
    pictures = run.mistake_pictures
    assert pictures is not None
    shown = min(len(pictures), 15)
    columns = min(5, shown)
    rows = -(-shown // columns)
    width, height = max(1.5 * columns, 3.2), 1.9 * rows
    figure = Figure(figsize=(width, height))
    for place in range(shown):
        row, column = divmod(place, columns)
        left, low = 1.5 * column + 0.1, height - 1.9 * row - 1.85
        axes = figure.add_axes((left / width, low / height, 1.3 / width, 1.3 / height))
        axes.axis("off")
        picture = pictures[place]
        picture = picture.squeeze(-1) if picture.shape[-1] == 1 else picture
        axes.imshow(picture, cmap="gray", vmin=0, vmax=255)
        axes.set_title(_mistake_title(run, place), fontsize=7.5)
    return figure


def _mistake_title(run: RunFolder, place: int) -> str:
    if run.probabilities is None or run.labels is None:
        return ""
    index = int(run.mistakes[place])
    row = run.probabilities[index]
    guess = int(row.argmax())
    names = run.classes
    return (
        f"{_short(names[int(run.labels[index])])}\n→ {_short(names[guess])}, "
        f"{probability(float(row[guess]))}"
    )


def save_all(run: RunFolder, folder: Path) -> dict[str, tuple[str, Figure]]:
    """Draw every figure and save each as ``folder/<name>.png``; see :func:`figures`."""
    drawn = figures(run)
    for name, (title, figure) in drawn.items():
        save_png(figure, title, folder / f"{name}.png")
    return drawn
