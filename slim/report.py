"""The page of a run: is it normal, in words and in curves.

    python tools/report.py RUN

Reads `config.yaml`, `metrics.jsonl`, `checkpoints/` and, where a probe left it, `report/report.json`; writes
`report/index.html`. It can be called while the run goes on. Long runs are thinned before they are drawn.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from shards import html, layout
from shards.errors import ConfigError, UserError
from slim import curves
from slim.checkpoint import facts, is_complete
from slim.config import PretrainSettings, load_config
from slim.monitor import METRICS, RECENT, read_metrics, warnings_of

Line = dict[str, Any]

PROBE = "report.json"
_CLEAR = 0.01  # a gain above this is called one
_METHODS = {
    "ours": "this run",
    "random": "same encoder, random weights",
    "connectome": "functional connectivity",
    "mean_image": "mean image",
}


def write(run_folder: str | Path) -> Path:
    """Write `RUN/report/index.html`.

    Parameters
    ----------
    run_folder : str or Path

    Returns
    -------
    Path
        The page.

    Raises
    ------
    UserError
        If the folder holds no run, or its configuration or probe report cannot be read.
    """
    folder = Path(run_folder)
    config = folder / "config.yaml"
    if not config.is_file():
        raise ConfigError(folder, "", "no config.yaml", "the folder of a run", "Give the run.out of a pretraining run")
    settings = load_config(config)
    lines, unreadable = read_metrics(folder / METRICS)
    steps = total_steps(settings, folder, lines)
    with html.drawing():
        content = html.page(
            f"Run {folder.resolve().name}",
            _lead(lines, steps),
            html.notes(verdict(lines, steps, unreadable)),
            html.facts(_numbers(settings, lines)),
            html.section("Probes: is it of use?", *_probes(folder / layout.REPORT / PROBE)),
            *curves.sections(settings, lines),
            html.section("Checkpoints", *_checkpoints(folder / "checkpoints")),
            html.section("Configuration", html.folded("config.yaml, as merged", config.read_text())),
        )
    path = folder / layout.REPORT / "index.html"
    layout.write_atomically(path, content)
    return path


def total_steps(settings: PretrainSettings, folder: Path, lines: Sequence[Line]) -> int | None:
    """Optimizer steps of the whole run; None where epochs were asked for and the data are out of reach.

    The samples of a step are taken from the log: only it knows how many processes there were.
    """
    if settings.run.steps is not None:
        return settings.run.steps
    try:
        manifests = [layout.read_manifest(item.path) for item in settings.data]
    except UserError:
        note = folder / "dataset.json"  # written at the start of a run: what its first dataset was
        if len(settings.data) > 1 or not note.is_file():
            return None
        manifests = [json.loads(note.read_text())]
    if not lines:
        return None
    per_epoch = sum(
        item.weight * manifest["sessions"]["train"] for item, manifest in zip(settings.data, manifests, strict=True)
    )
    per_step = max(1, round(lines[-1]["samples_per_s"] * lines[-1]["seconds"]))
    return max(1, math.ceil(settings.run.epochs * max(1, round(per_epoch)) / per_step))


def _recent(lines: Sequence[Line], name: str) -> float | None:
    """Mean of a field over the last logged steps."""
    values = curves.values(lines[-RECENT:], name)
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else None


def _lead(lines: Sequence[Line], steps: int | None) -> str:
    if not lines:
        return "No step was logged yet."
    last = lines[-1]
    loss = "none" if last.get("loss") is None else f"{last['loss']:.4g}"
    gain = _recent(lines, "gain")
    over = min(len(lines), RECENT)
    of = f" of {steps}" if steps else ""
    learned = "" if gain is None else f"; gain {gain:+.4f} (mean of the last {over} logged steps)"
    return f"Step {last['step']}{of}, epoch {last['epoch']}; last loss {loss}{learned}."


def verdict(lines: Sequence[Line], steps: int | None, unreadable: int = 0) -> list[tuple[str, str]]:
    """What the run looks like, in words: (`good`, `look` or `bad`, sentence), worst matters included.

    Parameters
    ----------
    lines : sequence of dict
        Of metrics.jsonl.
    steps : int or None
        Optimizer steps of the whole run.
    unreadable : int
        Lines that could not be read.
    """
    if not lines:
        return [("look", "Nothing was logged yet: the run is at its first step, or stopped before.")]
    last, found = lines[-1], []
    finished = steps is not None and last["step"] >= steps
    if finished:
        found.append(("good", f"Finished: {last['step']} of {steps} steps."))
    else:
        share = f", {last['step'] / steps:.0%}" if steps else ""
        found.append(
            (
                "look",
                f"Not finished: step {last['step']} of {steps or 'an unknown number'}{share}. "
                "If it is not running, the command it was started with goes on from the "
                "newest checkpoint.",
            )
        )
    if last.get("loss") is None or not math.isfinite(last["loss"]):
        found.append(
            (
                "bad",
                "The last loss is not a finite number: go back to an earlier checkpoint with a "
                "lower optimizer.lr, or precision fp32.",
            )
        )
    gain = _recent(lines, "gain")
    if last.get("gain") is None:
        found.append(
            (
                "look",
                "No gain: the objective has no JEPA term, so there is no prediction to "
                "compare with the mean of each place. Judge the run by its MAE loss and by "
                "probes.",
            )
        )
    elif gain is None:
        found.append(("bad", "None of the last gains is a finite number."))
    elif gain > _CLEAR:
        found.append(("good", f"Predictions beat the mean of each place: gain {gain:+.4f}."))
    elif gain > 0:
        found.append(
            (
                "look",
                f"Predictions hardly beat the mean of each place: gain {gain:+.4f}. Let it "
                "train longer, and see by a probe whether it beats random weights.",
            )
        )
    elif finished:
        found.append(
            (
                "bad",
                "Collapsed, or never began to learn: the gain over the mean of each place is "
                f"{gain:+.4f} at the end. Do not use these weights before a probe has beaten "
                "random weights.",
            )
        )
    found += [
        ("bad" if "collapse" in words else "look", words[0].upper() + words[1:] + ".")
        for words in warnings_of(list(lines)).values()
    ]
    best, place = _best_gain(lines)
    if gain is not None and best - gain > max(0.02, 0.2 * best):
        found.append(
            ("look", f"The gain was higher before: {best:+.4f} around step {place}. Probe a checkpoint from there too.")
        )
    if unreadable:
        found.append(
            (
                "look",
                f"{unreadable} unreadable line{'s' * (unreadable > 1)} of {METRICS} left out; "
                "one at the end is what a kill leaves.",
            )
        )
    return found


def _best_gain(lines: Sequence[Line]) -> tuple[float, int]:
    """Highest smoothed gain and its step; (-inf, 0) without gains."""
    steps, _, mean, _ = curves.thin(curves.values(lines, "step"), curves.values(lines, "gain"))
    if not len(mean):
        return -math.inf, 0
    smooth = curves.smoothed(mean)
    return float(smooth.max()), int(steps[smooth.argmax()])


def _numbers(settings: PretrainSettings, lines: Sequence[Line]) -> dict[str, object]:
    named: dict[str, object] = {
        "Data": ", ".join(str(item.path) for item in settings.data),
        "Model": settings.model_name,
        "View, windows": f"{settings.view}, {settings.windows.k}",
        "Objective": settings.objective,
        "Precision, ZeRO stage": f"{settings.precision}, {settings.zero.stage}",
    }
    if lines:
        last = lines[-1]
        named["Samples seen"] = f"{last['samples']:,}"
        for name, field, form in (
            ("Seconds a step", "seconds", "{:.3g}"),
            ("Samples a second", "samples_per_s", "{:.3g}"),
            ("Waiting for data", "data_wait", "{:.0%}"),
            ("Effective rank of the targets", "target_rank", "{:.1f}"),
        ):
            value = _recent(lines, field)
            if value is not None:
                named[name] = form.format(value)
        if last.get("peak_memory_bytes") is not None:
            named["Peak memory of a process"] = f"{last['peak_memory_bytes'] / 2**30:.2f} GiB"
    return named


def _checkpoints(folder: Path) -> list[str]:
    rows: list[list[object]] = []
    for path in sorted(folder.glob("step-*"), reverse=True):
        if is_complete(path):
            about = facts(path)
            size = sum(about["files"].values())
            rows.append([path.name, about["step"], "complete", about["world_size"], f"{size / 1e6:,.1f}"])
        else:
            rows.append([path.name, "", "incomplete: passed over when the run goes on", "", ""])
    if not rows:
        return [html.text("None yet: a run that stops now begins anew.")]
    return [html.table(["Folder", "Step", "State", "Processes", "MB"], rows)]


def _probes(path: Path) -> list[str]:
    """Results of `tools/probe.py`, if it left any: tables with 95 % intervals, and the intervals drawn."""
    if not path.is_file():
        return []
    try:
        report = json.loads(path.read_text())
        tasks, about = report["tasks"], report.get("facts", {})
        parts = [
            part
            for name in sorted(tasks)
            for part in _probe(name, tasks[name], about.get(name, {}).get("differences", {}))
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            path,
            "tasks",
            f"what cannot be read ({type(error).__name__}: {error})",
            "the report of tools/probe.py",
            "Run the probe again",
        ) from None
    if not parts:
        return []
    return [
        html.text(
            "Values with 95 % intervals. The weights are worth something where this run beats the same encoder "
            "with random weights. Functional connectivity is what has to be beaten for subject traits. What the "
            "mean image can tell is anatomy, not activity."
        ),
        *parts,
    ]


def _probe(name: str, task: dict[str, Any], differences: dict[str, Any]) -> list[str]:
    """One task; `differences` are those of this run minus a method, on the same draws of subjects."""
    results = {}
    for method in [*_METHODS, *sorted(set(task) - set(_METHODS))]:
        cells = task.get(method)
        found = {
            metric: cell
            for metric, cell in (cells.items() if isinstance(cells, dict) else ())
            if isinstance(cell, dict) and "value" in cell
        }
        if found:
            results[method] = found
    metrics = list(dict.fromkeys(metric for cells in results.values() for metric in cells))
    if not metrics:
        return []

    def words(cell: dict[str, Any] | None) -> str:
        if cell is None or cell["value"] is None:
            return "–"
        ends = "" if cell.get("low") is None else f" [{cell['low']:.3f}, {cell['high']:.3f}]"
        return f"{cell['value']:.3f}{ends}"

    rows = [
        [_METHODS.get(method, method), *[words(cells.get(metric)) for metric in metrics]]
        for method, cells in results.items()
    ]
    for method, cells in differences.items():
        name_of = f"this run minus {_METHODS.get(method, method)}"
        rows.append([name_of, *[words(cells.get(metric)) for metric in metrics]])
    width = min(11, 2.6 + 2.7 * len(metrics))
    figure = Figure(figsize=(width, 0.9 + 0.34 * len(results)))
    figure.set_layout_engine("constrained", wspace=0.06)
    grid = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axes, metric in zip(grid, metrics, strict=True):
        for place, (method, cells) in enumerate(results.items()):
            cell = cells.get(metric)
            if cell is None or cell["value"] is None:
                continue
            colour = html.BLUE if method == "ours" else html.GREY
            if cell.get("low") is not None:
                axes.plot([cell["low"], cell["high"]], [place, place], color=colour, lw=2.5)
            axes.plot(cell["value"], place, "o", color=colour, ms=7, mec="white")
        if metric == "auroc":
            axes.axvline(0.5, color=html.RED, lw=1, ls="--")
        axes.set(title=metric.replace("_", " "), ylim=(len(results) - 0.5, -0.5))
        axes.set_yticks(range(len(results)), [_METHODS.get(method, method) for method in results])
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
    chance = "Dashed: chance." if "auroc" in metrics else ""
    return [
        html.heading(name),
        html.table(["Features", *metrics], rows),
        html.picture(figure, f"Probe results of {name} with 95 % intervals", chance),
    ]
