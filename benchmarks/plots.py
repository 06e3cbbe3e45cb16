"""The benchmarks' pictures, drawn without pyplot so that nothing global is left behind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.harness import BOTH, Row
from benchmarks.operators import OPERATORS, SHAPES, shape_name
from normdrop.files import write_atomically

# Okabe and Ito's blue and vermillion, told apart by their shape, too.
BLUE, ORANGE, INK, GRID = "#0067a6", "#c44e00", "#1d2125", "#dde1e6"
TICKS = (0.5, 1, 1.5, 2, 3, 4, 5, 7, 10, 20, 30, 50, 100)


def ratios(rows: Sequence[Row], path: Path, dtype: str = "float32") -> None:
    """How many times faster than torch, by operator, shape and layout; all threads.

    A point is the ratio to torch in the same layout; the stroke is where the ratio would be if
    memory were all that counted.
    """
    threads = max((row["threads"] for row in rows), default=1)
    panels = [_panel_rows(rows, operator.name, dtype, threads) for operator in OPERATORS]
    heights = [max(len(panel), 1) for panel in panels]
    figure = Figure(figsize=(8.4, 1.9 + 0.23 * sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    all_axes = figure.subplots(
        len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": [h + 0.6 for h in heights]}
    )[:, 0]
    for axes, operator, panel in zip(all_axes, OPERATORS, panels, strict=True):
        _panel(axes, operator.title, panel)
    for axes in all_axes[1:3]:
        axes.sharex(all_axes[0])  # the three that normalize
    all_axes[0].set_xlim(*_limits([row for panel in panels[:3] for row in panel]))
    all_axes[-1].set_xlabel("times faster than torch (logarithmic)")
    figure.suptitle(
        f"Forward + backward, {dtype}, {threads} thread{'s' if threads > 1 else ''}",
        x=0.01,
        ha="left",
        fontsize=11,
        color=INK,
    )
    figure.legend(handles=_legend(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    with write_atomically(path) as temporary:
        figure.savefig(temporary, dpi=160, format="png", metadata={"Software": None})


def _panel_rows(
    rows: Sequence[Row], operator: str, dtype: str, threads: int
) -> list[tuple[str, float, float | None, float | None, str]]:
    """Label, ratio, ratio to torch's better layout, ratio at the floor, layout."""
    order = {shape_name(shape): i for i, shape in enumerate(SHAPES)}
    wanted = {"operator": operator, "dtype": dtype, "threads": threads, "pass": BOTH}
    found = [row for row in rows if all(row[k] == v for k, v in wanted.items())]
    theirs = {(r["shape"], r["layout"]): r for r in found if r["provider"] == "torch"}
    panel = []
    for row in sorted(
        found, key=lambda r: (order.get(r["shape"], 99), r["layout"] != "contiguous")
    ):
        if row["provider"] != "normdrop":
            continue
        peer = theirs[row["shape"], row["layout"]]
        # Below a few copies of 64 KiB a call is all overhead: no floor.
        size = 4 if dtype == "float32" else 2
        for extent in row["shape"].split("x"):
            size *= int(extent)
        limit = peer["copies"] / row["floor_copies"] if size > 1 << 16 else None
        best = row["ratio_best"] if row["ratio_best"] < 0.97 * row["ratio"] else None
        label = row["shape"].replace("x", "×")
        if row["layout"] != "contiguous":
            label = "channels_last"
        panel.append((label, row["ratio"], best, limit, row["layout"]))
    return panel


def _panel(axes: Axes, title: str, panel: Sequence[Any]) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.set_xscale("log")
    for y, (_, ratio, best, limit, layout) in enumerate(panel):
        hollow = {"markerfacecolor": "white"} if layout != "contiguous" else {}
        axes.plot([1, ratio], [y, y], color=BLUE, linewidth=1.2, zorder=2)
        axes.plot(ratio, y, "o", color=BLUE, markersize=6, zorder=4, **hollow)
        if best is not None:
            axes.plot(best, y, "x", color=INK, markersize=5, zorder=3)
        if limit is not None:
            axes.plot(limit, y, "|", color=ORANGE, markersize=11, markeredgewidth=2.2, zorder=3)
    axes.axvline(1, color=INK, linewidth=0.8)
    axes.set_ylim(len(panel) - 0.4, -0.6)
    axes.set_yticks(range(len(panel)), [row[0] for row in panel], fontsize=8)
    axes.set_xlim(*_limits(panel))
    axes.xaxis.set_major_locator(FixedLocator(list(TICKS)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.tick_params(axis="both", length=0, labelsize=8, colors=INK)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)


def _limits(panel: Sequence[Any]) -> tuple[float, float]:
    values = [1.0, 2.0, *(v for row in panel for v in row[1:4] if v is not None)]
    return min(values) * 0.9, max(values) * 1.1


def _legend() -> list[Line2D]:
    none = {"linestyle": "none"}
    return [
        Line2D([], [], marker="o", color=BLUE, label="normdrop", **none),
        Line2D(
            [],
            [],
            marker="o",
            color=BLUE,
            markerfacecolor="white",
            label="normdrop, channels_last",
            **none,
        ),
        Line2D([], [], marker="x", color=INK, label="against torch's better layout", **none),
        Line2D(
            [],
            [],
            marker="|",
            color=ORANGE,
            markersize=11,
            markeredgewidth=2.2,
            label="floor: memory alone",
            **none,
        ),
    ]
