"""The report of one run: a single page that works offline, and its figures as PNG files."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from normdrop.errors import UserError
from normdrop.files import write_text
from normdrop.study import layer_sentences, page_pictures, plots, sentences
from normdrop.study.run_folder import NormLayer, RunFolder, read_run_folder
from normdrop.study.wording import Sentence, duration, number, percent, probability

__all__ = ["write_report"]

_TEMPLATES = Path(__file__).parent / "templates"

#: More pictures would make the page large without saying more.
_SHOWN_MISTAKES = 24
#: The rest stand in run.json.
_SHOWN_SKIPPED = 8
#: Beyond this many classes the per-class table shows the weakest first and scrolls.
_LONG_TABLE = 20


@dataclasses.dataclass(frozen=True)
class _Figure:
    """One figure of the page: its picture and the two sentences under it."""

    name: str
    title: str
    svg: str
    sentence: Sentence


def write_report(run_dir: str | os.PathLike[str]) -> Path:
    """Write ``report.html`` and ``plots/*.png`` into a run folder, from the files that lie there.

    The page needs no network and no script. A run that was stopped early is reported as far as it
    went, and the page says so.

    Args:
        run_dir: the folder that ``normdrop train`` wrote.

    Returns:
        The path of the page.

    Raises:
        UserError: there is no such folder, it holds no run, one of its files is damaged, or the
            report cannot be written there.
    """
    run = read_run_folder(run_dir)
    page = run.path / "report.html"
    try:
        (run.path / "plots").mkdir(exist_ok=True)
        drawn = plots.save_all(run, run.path / "plots")
        write_text(page, _render(run, drawn))
    except OSError as error:
        raise UserError(
            f"Expected to write the report to {page}, but {error.strerror or error}: "
            "make room or give the folder write permission, then ask for the report again."
        ) from error
    return page


def _render(run: RunFolder, drawn: dict[str, Any]) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(
        number=number, percent=percent, probability=probability, duration=duration
    )
    return environment.get_template("report.html.jinja").render(_context(run, drawn))


def _context(run: RunFolder, drawn: dict[str, Any]) -> dict[str, Any]:
    """Everything that the template shows, as plain data."""

    def figure(name: str, describe: Callable[[], Sentence]) -> list[_Figure]:
        if name not in drawn:
            return []
        title, picture = drawn[name]
        sentence = describe()
        alt = f"{title}. {sentence.seen}"
        return [_Figure(name, title, page_pictures.to_svg(picture, name, alt), sentence)]

    curves = [
        *figure("loss", lambda: sentences.describe_loss(run)),
        *figure("accuracy", lambda: sentences.describe_accuracy(run)),
        *figure("learning_rate", lambda: sentences.describe_learning_rate(run)),
        *figure("speed", lambda: sentences.describe_speed(run)),
    ]
    norm = [
        shown
        for part in ("gamma", "alpha", "mean", "variance")
        for shown in figure(
            part, functools.partial(layer_sentences.describe_norm, run.norm_layers, part)
        )
    ]
    reliability = figure("reliability", lambda: sentences.describe_reliability(run))
    confusion = _confusion(run, drawn)
    per_class = _per_class(run)
    mistakes = _mistakes(run)
    dropout = layer_sentences.describe_dropout(run)
    data = sentences.describe_data(run)
    named: list[tuple[str, str, Sentence]] = [
        *((f"figure-{f.name}", f.title, f.sentence) for f in curves),
        *([("figure-confusion", "Confusion matrix", confusion["sentence"])] if confusion else []),
        *([("figure-classes", "Classes", per_class["sentence"])] if per_class else []),
        *((f"figure-{f.name}", f.title, f.sentence) for f in reliability),
        *([("mistakes", "Worst mistakes", mistakes["sentence"])] if run.result else []),
        *((f"figure-{f.name}", f.title, f.sentence) for f in norm),
        ("dropout", "Dropout", dropout),
        *([("data", "Data", data)] if data else []),
    ]
    return {
        "run": run,
        "result": run.result,
        "title": f"{run.network} on {run.data}",
        "folder": run.path.resolve().name,
        "claim": _claim(run),
        "facts": _facts(run),
        "unfinished": _unfinished(run),
        "warnings": [(anchor, title, s.sign) for anchor, title, s in named if s.warning],
        "curves": curves,
        "epochs": _epoch_rows(run),
        "confusion": confusion,
        "per_class": per_class,
        "reliability": reliability,
        "bins": _bins(run),
        "mistakes": mistakes,
        "norm": norm,
        "norm_rows": _norm_rows(run.norm_layers),
        "no_norm": _no_norm(run),
        "dropout": dropout,
        "dropout_layers": [layer for layer in run.dropout_layers or () if layer.keep < 1],
        "idle_dropout": sum(layer.keep >= 1 for layer in run.dropout_layers or ()),
        "data": data,
        "skipped": run.skipped[:_SHOWN_SKIPPED],
        "skipped_more": len(run.skipped[_SHOWN_SKIPPED:]),
        "options": _flat(run.options),
        "command": _command(run),
        "version": run.run.get("version", ""),
    }


def _command(run: RunFolder) -> str:
    command = (run.result or {}).get("command")
    if command:
        return str(command)
    if "options.yaml" in run.missing:
        return ""
    return f"normdrop train --config {run.path / 'options.yaml'}"


def _epochs(count: int) -> str:
    return f"{count} {'epoch' if count == 1 else 'epochs'}"


def _claim(run: RunFolder) -> str:
    """What was trained, on what, how well, how long and where, in one sentence."""
    result = run.result
    if result is None:
        return f"{run.network} on {run.data}: {_epochs(run.epochs)} recorded, not yet evaluated."
    low, high = result["accuracy_interval"]
    machine = result.get("machine", {})
    kernels = "with native kernels" if machine.get("kernels") else "without native kernels"
    threads = machine.get("threads")
    return (
        f"{run.network} on {run.data}: {percent(result['accuracy'], 2)} {result['split']} accuracy "
        f"(95 % interval {percent(low)} to {percent(high)}, {result['count']:,} samples), after "
        f"{_epochs(result['epochs'])} in {duration(result['train_seconds'])} "
        f"on {machine.get('processor', 'an unnamed processor')}, "
        f"{threads} {'thread' if threads == 1 else 'threads'}, torch {machine.get('torch', '?')}, "
        f"normdrop {machine.get('normdrop', '?')} {kernels}."
    )


def _facts(run: RunFolder) -> list[tuple[str, str, str]]:
    """The key figures: name, value, remark."""
    result = run.result
    if result is None:
        return []
    low, high = result["accuracy_interval"]
    parameters = result.get("parameters", {})
    facts = [
        (
            "Test accuracy",
            percent(result["accuracy"], 2),
            f"95 % interval {percent(low)} to {percent(high)}",
        ),
        ("Test loss", number(result["loss"]), f"{result['count']:,} samples"),
        (
            "Calibration error",
            f"{100 * result['calibration_error']:.1f} points",
            "mean gap between confidence and accuracy",
        ),
        (
            "Training",
            duration(result["train_seconds"]),
            f"{_epochs(result['epochs'])}, best: {result['best_epoch']}",
        ),
    ]
    if "theta" in parameters:
        facts.append(
            (
                "Parameters Θ",
                f"{parameters['theta']:,}",
                f"γ and α: {parameters.get('gamma_alpha', 0):,} "
                f"on {parameters.get('norm_nodes', 0):,} batch norm nodes",
            )
        )
    return facts


def _unfinished(run: RunFolder) -> str:
    if run.result is not None:
        missing = [name for name in run.missing if name != "metrics.csv"]
        if not missing:
            return ""
        return f"Not in this run folder: {', '.join(missing)}. What they would show is left out."
    done = f"{run.epochs} {'epoch is' if run.epochs == 1 else 'epochs are'} recorded"
    planned = run.options.get("epochs")
    if isinstance(planned, int) and planned > run.epochs:
        done += f" of {planned} planned"
    return (
        f"This run is unfinished: {done}, and there is no test result. "
        f"Not in the folder: {', '.join(run.missing)}. "
        f"Go on with: normdrop train --resume {run.path}"
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


def _confusion(run: RunFolder, drawn: dict[str, Any]) -> dict[str, Any] | None:
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


def _per_class(run: RunFolder) -> dict[str, Any] | None:
    rows = list((run.result or {}).get("per_class", ()))
    if not rows:
        return None
    return {
        "sentence": sentences.describe_per_class(run),
        "rows": sorted(rows, key=lambda row: row["f1"]),
        "long": len(rows) > _LONG_TABLE,
    }


def _mistakes(run: RunFolder) -> dict[str, Any]:
    sentence = sentences.describe_mistakes(run)
    shown: list[dict[str, Any]] = []
    pictures = () if run.mistake_pictures is None else run.mistake_pictures
    if run.probabilities is not None and run.labels is not None:
        for place, index in enumerate(run.mistakes[:_SHOWN_MISTAKES]):
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
    return {
        "sentence": sentence,
        "shown": shown,
        "pictures": any(mistake["picture"] for mistake in shown),
    }


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
    if "weights.safetensors" in run.missing and run.run.get("norm_layers"):
        return "The weights of this run are not in its folder, so there is nothing to show yet."
    return "This network was trained without batch norm layers, so there is nothing to show."


def _flat(options: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested options as dotted names with their values."""
    rows: list[tuple[str, str]] = []
    for key, value in options.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            rows += _flat(value, f"{name}.")
        elif isinstance(value, str):
            rows.append((name, value))
        else:
            rows.append((name, json.dumps(value, ensure_ascii=False, default=str)))
    return rows
