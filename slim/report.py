"""The page of a run: is it normal, in words and in curves.

    python tools/report.py RUN

Reads `config.yaml`, `metrics.jsonl`, `checkpoints/` and what `tools/probe.py` and `tools/explain.py` left in `report/`;
writes `report/index.html`. It can be called while the run goes on. Long runs are thinned before they are drawn.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shards import html, layout
from shards.errors import ConfigError, UserError
from slim import curves, findings
from slim.checkpoint import facts, is_complete
from slim.config import PretrainSettings, load_config
from slim.monitor import METRICS, RECENT, read_metrics, warnings_of

Line = dict[str, Any]

_CLEAR = 0.01  # a gain above this is called one


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
    tasks = findings.read_tasks(folder / layout.REPORT / findings.PROBE)
    with html.drawing():
        content = html.page(
            f"Run {folder.resolve().name}",
            _lead(lines, steps),
            html.notes([*verdict(lines, steps, unreadable), *findings.verdict(tasks)]),
            html.facts(_numbers(settings, lines)),
            html.section("Probes: is it of use?", *findings.probes(tasks)),
            html.section("Looking inside", *findings.explanations(folder / layout.REPORT / findings.EXPLAIN)),
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
