"""The sections of the page: what each shows, and what stands out in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from normdrop.report import layer_sentences, page_pictures, plots, sentences
from normdrop.report.wording import Sentence, number, percent
from normdrop.runs.folder import WEIGHTS, command_to_repeat
from normdrop.runs.read import NormLayer, RunFolder

__all__ = ["Finding", "Section", "sections"]

Drawn = dict[str, tuple[str, Figure]]

#: The rest stand in run.json.
_SHOWN_SKIPPED = 8
#: Beyond this many classes the per-class table shows the weakest first and scrolls.
_LONG_TABLE = 20


class Finding(NamedTuple):
    """What the page says in one of its places; a warning is repeated at its top."""

    anchor: str
    name: str
    sentence: Sentence


class Section(NamedTuple):
    """One part of the page, written by the template that is named as its anchor."""

    anchor: str
    heading: str
    #: Its name in the list of sections; empty for one that is not listed.
    link: str
    shown: dict[str, Any]
    findings: tuple[Finding, ...] = ()


class _Plot(NamedTuple):
    """One figure of the page: its picture and the two sentences under it."""

    name: str
    title: str
    svg: str
    sentence: Sentence

    @property
    def finding(self) -> Finding:
        return Finding(f"figure-{self.name}", self.title, self.sentence)


def sections(run: RunFolder, drawn: Drawn) -> list[Section]:
    """Every section that the run has something for, from top to bottom."""
    made = (
        _curves(run, drawn),
        _classes(run, drawn),
        _calibration(run, drawn),
        _mistakes(run),
        _batch_norm(run, drawn),
        _dropout(run),
        _data(run),
        _options(run),
        _again(run),
    )
    return [section for section in made if section is not None]


def _plots(drawn: Drawn, describe: dict[str, Callable[[], Sentence]]) -> list[_Plot]:
    """Those of the figures that were drawn, with their sentences."""
    made = []
    for name in describe.keys() & drawn.keys():
        title, picture = drawn[name]
        sentence = describe[name]()
        svg = page_pictures.to_svg(picture, name, f"{title}. {sentence.seen}")
        made.append(_Plot(name, title, svg, sentence))
    return sorted(made, key=lambda plot: list(describe).index(plot.name))


def _curves(run: RunFolder, drawn: Drawn) -> Section:
    shown = _plots(
        drawn,
        {
            "loss": lambda: sentences.describe_loss(run),
            "accuracy": lambda: sentences.describe_accuracy(run),
            "learning_rate": lambda: sentences.describe_learning_rate(run),
            "speed": lambda: sentences.describe_speed(run),
        },
    )
    return Section(
        "curves",
        "Curves",
        "Curves" if shown else "",
        {"curves": shown, "epochs": _epoch_rows(run)},
        tuple(plot.finding for plot in shown),
    )


def _epoch_rows(run: RunFolder) -> list[list[str]]:
    m = run.metrics

    def shown(value: float, form: Callable[[float], str]) -> str:
        return form(value) if np.isfinite(value) else "–"

    forms: list[tuple[str, Callable[[float], str]]] = [
        ("epoch", lambda v: f"{v:.0f}"),
        ("learning_rate", number),
        ("train_loss", lambda v: f"{v:.4f}"),
        ("val_loss", lambda v: f"{v:.4f}"),
        ("train_accuracy", lambda v: percent(v, 2)),
        ("val_accuracy", lambda v: percent(v, 2)),
        ("seconds", lambda v: f"{v:.1f}"),
        ("images_per_second", lambda v: f"{v:,.0f}"),
    ]
    return [[shown(m[name][row], form) for name, form in forms] for row in range(run.epochs)]


def _classes(run: RunFolder, drawn: Drawn) -> Section | None:
    confusion, per_class = _confusion_table(run, drawn), _per_class(run)
    findings = []
    if confusion:
        findings.append(Finding("figure-confusion", "Confusion matrix", confusion["sentence"]))
    if per_class:
        findings.append(Finding("figure-classes", "Classes", per_class["sentence"]))
    if not findings:
        return None
    shown = {"confusion": confusion, "per_class": per_class}
    return Section("classes", "Classes", "Classes", shown, tuple(findings))


def _confusion_table(run: RunFolder, drawn: Drawn) -> dict[str, Any] | None:
    """A table of cells where it fits a page, a picture where there are many classes."""
    if run.result is None or "confusion" not in drawn:
        return None
    counts = np.asarray(run.result["confusion"], dtype=np.int64)
    names = run.classes
    if len(names) != len(counts):
        return None
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    sentence = sentences.describe_confusion(run, counts)
    written = len(counts) <= plots.WRITTEN_CLASSES
    wrong = counts - np.diag(np.diag(counts))
    order = np.argsort(-wrong, axis=None, kind="stable")[: 5 if written else 12]
    pairs = [
        (names[t], names[g], int(wrong[t, g]), percent(share[t, g]))
        for t, g in zip(*np.unravel_index(order, wrong.shape), strict=True)
        if wrong[t, g] > 0
    ]
    svg = ""
    if not written:
        alt = f"Confusion matrix. {sentence.seen}"
        svg = page_pictures.to_svg(drawn["confusion"][1], "confusion", alt)
    rows = [
        (
            names[t],
            [
                (int(counts[t, g]), f"{np.sqrt(share[t, g]):.3f}", t == g)
                for g in range(len(counts))
            ],
        )
        for t in range(len(counts) if written else 0)
    ]
    return {
        "sentence": sentence,
        "names": names,
        "short": max(map(len, names)) <= 3,
        "rows": rows,
        "svg": svg,
        "pairs": pairs,
    }


def _per_class(run: RunFolder) -> dict[str, Any] | None:
    rows = list((run.result or {}).get("per_class", ()))
    if not rows:
        return None
    return {
        "sentence": sentences.describe_per_class(run),
        "rows": sorted(rows, key=lambda row: row["f1"]),
        "long": len(rows) > _LONG_TABLE,
    }


def _calibration(run: RunFolder, drawn: Drawn) -> Section | None:
    shown = _plots(drawn, {"reliability": lambda: sentences.describe_reliability(run)})
    if not shown:
        return None
    findings = tuple(plot.finding for plot in shown)
    content = {"reliability": shown, "bins": _bins(run)}
    return Section("calibration", "Calibration", "Calibration", content, findings)


def _bins(run: RunFolder) -> list[tuple[str, str, str, str]]:
    """The filled bins of the reliability diagram: range, samples, confidence, accuracy."""
    table = (run.result or {}).get("reliability") or {}
    return [
        (f"{low:.2f} – {high:.2f}", f"{int(count):,}", percent(confidence), percent(accuracy))
        for low, high, count, confidence, accuracy in zip(
            table.get("edges", ())[:-1],
            table.get("edges", ())[1:],
            table.get("count", ()),
            table.get("confidence", ()),
            table.get("accuracy", ()),
            strict=True,
        )
        if count
    ]


def _mistakes(run: RunFolder) -> Section:
    sentence = sentences.describe_mistakes(run)
    shown: list[dict[str, Any]] = []
    pictures = () if run.mistake_pictures is None else run.mistake_pictures
    if run.probabilities is not None and run.labels is not None:
        for place, index in enumerate(run.mistakes):
            row = run.probabilities[index]
            truth, guess = int(run.labels[index]), int(row.argmax())
            picture = pictures[place] if place < len(pictures) else None
            shown.append(
                {
                    "name": run.mistake_names[place] if place < len(run.mistake_names) else "",
                    "truth": run.classes[truth],
                    "guess": run.classes[guess],
                    "guess_probability": float(row[guess]),
                    "truth_probability": float(row[truth]),
                    "picture": "" if picture is None else page_pictures.picture_uri(picture),
                    "size": (0, 0) if picture is None else picture.shape[:2],
                }
            )
    content = {
        "sentence": sentence,
        "shown": shown,
        "pictures": any(mistake["picture"] for mistake in shown),
    }
    finding = Finding("mistakes", "Worst mistakes", sentence)
    return Section("mistakes", "Worst mistakes", "Mistakes", {"mistakes": content}, (finding,))


def _batch_norm(run: RunFolder, drawn: Drawn) -> Section:
    layers = run.norm_layers
    shown = _plots(
        drawn,
        {
            "gamma": lambda: layer_sentences.describe_norm(layers, "gamma"),
            "alpha": lambda: layer_sentences.describe_norm(layers, "alpha"),
            "mean": lambda: layer_sentences.describe_norm(layers, "mean"),
            "variance": lambda: layer_sentences.describe_norm(layers, "variance"),
        },
    )
    return Section(
        "batch-norm",
        "What batch norm learned",
        "Batch norm",
        {"norm": shown, "norm_rows": _norm_rows(layers), "no_norm": _no_norm(run)},
        tuple(plot.finding for plot in shown),
    )


def _norm_rows(layers: tuple[NormLayer, ...]) -> list[dict[str, Any]]:
    rows = []
    for layer in layers:
        parts = []
        for part in ("gamma", "alpha", "mean", "variance"):
            values = getattr(layer, part)
            finite = values[np.isfinite(values)] if values is not None else np.zeros(0)
            parts.append(
                {
                    "path": page_pictures.histogram(values),
                    "low": number(finite.min(), 2) if len(finite) else "–",
                    "median": number(np.median(finite)) if len(finite) else "–",
                    "high": number(finite.max(), 2) if len(finite) else "–",
                }
            )
        dead = layer_sentences.dead_channels(layer).tolist()
        channels = ", ".join(map(str, dead[:6])) + (", …" if len(dead) > 6 else "")
        rows.append(
            {
                "name": layer.name,
                "features": layer.features,
                "parts": parts,
                "dead": f"{len(dead)} ({channels})" if dead else "0",
                "has_dead": bool(dead),
            }
        )
    return rows


def _no_norm(run: RunFolder) -> str:
    if run.norm_layers:
        return ""
    if WEIGHTS in run.missing and run.record.get("norm_layers"):
        return "The weights of this run are not in its folder, so there is nothing to show yet."
    return "This network was trained without batch norm layers, so there is nothing to show."


def _dropout(run: RunFolder) -> Section:
    sentence = layer_sentences.describe_dropout(run)
    layers = run.dropout_layers or ()
    content = {
        "dropout": sentence,
        "dropout_layers": [layer for layer in layers if layer.keep < 1],
        "idle_dropout": sum(layer.keep >= 1 for layer in layers),
    }
    finding = Finding("dropout", "Dropout", sentence)
    return Section("dropout", "What dropout did", "Dropout", content, (finding,))


def _data(run: RunFolder) -> Section | None:
    sentence = sentences.describe_data(run)
    if sentence is None:
        return None
    content = {
        "data": sentence,
        "skipped": run.skipped[:_SHOWN_SKIPPED],
        "skipped_more": len(run.skipped[_SHOWN_SKIPPED:]),
    }
    return Section("data", "Data", "Data", content, (Finding("data", "Data", sentence),))


def _options(run: RunFolder) -> Section:
    values = run.options.flat() if run.options else {}
    rows = [
        (name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        for name, value in values.items()
    ]
    return Section("options", "Options", "Options", {"options": rows})


def _again(run: RunFolder) -> Section:
    command = command_to_repeat(run.path) if run.options else ""
    if run.result is not None:
        command = str(run.result.get("command", command))
    return Section("again", "Run it again", "Run it again", {"command": command})
