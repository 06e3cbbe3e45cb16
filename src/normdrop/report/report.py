"""The report of one run: a single page that works offline, and its figures as PNG files."""

from __future__ import annotations

import os
from pathlib import Path

from normdrop.errors import UserError
from normdrop.files import write_text
from normdrop.report import plots
from normdrop.report.sections import Drawn, sections
from normdrop.report.wording import counted, duration, number, percent, probability
from normdrop.runs.folder import METRICS, command_to_resume
from normdrop.runs.read import RunFolder, read_run

__all__ = ["write_report"]

_TEMPLATES = Path(__file__).parent / "templates"


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
    run = read_run(run_dir)
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


def _render(run: RunFolder, drawn: Drawn) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(percent=percent, probability=probability)
    made = sections(run, drawn)
    written = [
        (section, environment.get_template(f"{section.anchor}.html.jinja").render(section.shown))
        for section in made
    ]
    findings = [finding for section in made for finding in section.findings]
    return environment.get_template("report.html.jinja").render(
        title=f"{run.network} on {run.data}",
        folder=run.path.resolve().name,
        claim=_claim(run),
        facts=_facts(run),
        unfinished=_unfinished(run),
        finished=run.result is not None,
        warnings=[finding for finding in findings if finding.sentence.warning],
        sections=written,
        version=run.record.get("version", ""),
    )


def _claim(run: RunFolder) -> str:
    """What was trained, on what, how well, how long and where, in one sentence."""
    result = run.result
    if result is None:
        done = counted(run.epochs, "epoch")
        state = "not yet evaluated" if run.diverged is None else "then it diverged"
        return f"{run.network} on {run.data}: {done} recorded, {state}."
    low, high = result["accuracy_interval"]
    machine = result.get("machine", {})
    kernels = "with native kernels" if machine.get("kernels") else "without native kernels"
    threads = machine.get("threads")
    return (
        f"{run.network} on {run.data}: {percent(result['accuracy'], 2)} {result['split']} accuracy "
        f"(95 % interval {percent(low)} to {percent(high)}, {result['count']:,} samples), after "
        f"{counted(result['epochs'], 'epoch')} in {duration(result['train_seconds'])} "
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
            f"{counted(result['epochs'], 'epoch')}, best: {result['best_epoch']}",
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
    if run.diverged is not None:
        best = run.result["best_epoch"] if run.result else 0
        what = (
            f"the test and the weights are those of epoch {best}"
            if best
            else "there is no test result"
        )
        return (
            f"This run diverged: in epoch {run.diverged} the loss or a weight was no longer "
            f"finite, so {what}. Train again with a lower learning rate."
        )
    if run.result is not None:
        missing = [name for name in run.missing if name != METRICS]
        if not missing:
            return ""
        return f"Not in this run folder: {', '.join(missing)}. What they would show is left out."
    done = counted(run.epochs, "epoch is", "epochs are") + " recorded"
    planned = run.options.recipe.epochs if run.options else None
    if planned is not None and planned > run.epochs:
        done += f" of {planned} planned"
    return (
        f"This run is unfinished: {done}, and there is no test result. "
        f"Not in the folder: {', '.join(run.missing)}. "
        f"Go on with: {command_to_resume(run.path)}"
    )
