"""The page of a run: is it normal, in words and in curves.

    python tools/report.py RUN

Reads `config.yaml`, `metrics.jsonl`, `checkpoints/` and, where a probe left it, `report/report.json`; writes
`report/index.html`. It can be called while the run goes on. Long runs are thinned before they are drawn.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from shards import html, layout
from shards.errors import ConfigError, UserError
from slim.checkpoint import facts, is_complete
from slim.config import PretrainSettings, load_config
from slim.monitor import METRICS, RECENT, warnings_of

Line = dict[str, Any]

PROBE = "report.json"
_CLEAR = 0.01  # a gain above this is called one
_POINTS = 600  # places along the axis of a drawn curve
_KINDS = {
    "cross_time": ("cross-time: same places, other windows", html.BLUE),
    "cross_location": ("cross-location: other places, same windows", html.ORANGE),
    "double_cross": ("double-cross: both other", html.GREEN),
}
_METHODS = {"ours": "this run", "random": "same encoder, random weights",
            "connectome": "functional connectivity", "mean_image": "mean image"}


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
        raise ConfigError(folder, "", "no config.yaml", "the folder of a run",
                          "Give the run.out of a pretraining run")
    settings = load_config(config)
    lines, unreadable = read_metrics(folder / METRICS)
    steps = total_steps(settings, folder, lines)
    with html.drawing():
        content = html.page(
            f"Run {folder.resolve().name}", _lead(lines, steps),
            html.notes(verdict(lines, steps, unreadable)),
            html.facts(_numbers(settings, lines)),
            html.section("Probes: is it of use?", *_probes(folder / layout.REPORT / PROBE)),
            *_curves(settings, lines),
            html.section("Checkpoints", *_checkpoints(folder / "checkpoints")),
            html.section("Configuration", html.folded("config.yaml, as merged", config.read_text())),
        )
    path = folder / layout.REPORT / "index.html"
    layout.write_atomically(path, content)
    return path


def read_metrics(path: Path) -> tuple[list[Line], int]:
    """Lines of a metrics file, and how many could not be read: a kill may cut the last one in two."""
    lines, unreadable = [], 0
    if path.is_file():
        with open(path, errors="replace") as file:
            for text in file:
                try:
                    line = json.loads(text)
                    lines.append({**line, "step": int(line["step"])})
                except (ValueError, TypeError, KeyError):
                    unreadable += bool(text.strip())
    return lines, unreadable


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
    per_epoch = sum(item.weight * manifest["sessions"]["train"]
                    for item, manifest in zip(settings.data, manifests, strict=True))
    per_step = max(1, round(lines[-1]["samples_per_s"] * lines[-1]["seconds"]))
    return max(1, math.ceil(settings.run.epochs * max(1, round(per_epoch)) / per_step))


def _values(lines: Sequence[Line], name: str) -> np.ndarray:
    """A field of all lines; NaN where it was not logged."""
    return np.array([np.nan if line.get(name) is None else line[name] for line in lines], float)


def _recent(lines: Sequence[Line], name: str) -> float | None:
    """Mean of a field over the last logged steps."""
    values = _values(lines[-RECENT:], name)
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
        found.append(("look", f"Not finished: step {last['step']} of {steps or 'an unknown number'}{share}. "
                              "If it is not running, the command it was started with goes on from the "
                              "newest checkpoint."))
    if last.get("loss") is None or not math.isfinite(last["loss"]):
        found.append(("bad", "The last loss is not a finite number: go back to an earlier checkpoint with a "
                             "lower optimizer.lr, or precision fp32."))
    gain = _recent(lines, "gain")
    if last.get("gain") is None:
        found.append(("look", "No gain: the objective has no JEPA term, so there is no prediction to "
                              "compare with the mean of each place. Judge the run by its MAE loss and by "
                              "probes."))
    elif gain is None:
        found.append(("bad", "None of the last gains is a finite number."))
    elif gain > _CLEAR:
        found.append(("good", f"Predictions beat the mean of each place: gain {gain:+.4f}."))
    elif gain > 0:
        found.append(("look", f"Predictions hardly beat the mean of each place: gain {gain:+.4f}. Let it "
                              "train longer, and see by a probe whether it beats random weights."))
    elif finished:
        found.append(("bad", "Collapsed, or never began to learn: the gain over the mean of each place is "
                             f"{gain:+.4f} at the end. Do not use these weights before a probe has beaten "
                             "random weights."))
    found += [("bad" if "collapse" in words else "look", words[0].upper() + words[1:] + ".")
              for words in warnings_of(list(lines)).values()]
    best, place = _best_gain(lines)
    if gain is not None and best - gain > max(0.02, 0.2 * best):
        found.append(("look", f"The gain was higher before: {best:+.4f} around step {place}. Probe a "
                              "checkpoint from there too."))
    if unreadable:
        found.append(("look", f"{unreadable} unreadable line{'s' * (unreadable > 1)} of {METRICS} left out; "
                              "one at the end is what a kill leaves."))
    return found


def _best_gain(lines: Sequence[Line]) -> tuple[float, int]:
    """Highest smoothed gain and its step; (-inf, 0) without gains."""
    steps, _, mean, _ = thin(_values(lines, "step"), _values(lines, "gain"))
    if not len(mean):
        return -math.inf, 0
    smooth = smoothed(mean)
    return float(smooth.max()), int(steps[smooth.argmax()])


def _numbers(settings: PretrainSettings, lines: Sequence[Line]) -> dict[str, object]:
    named: dict[str, object] = {
        "Data": ", ".join(str(item.path) for item in settings.data), "Model": settings.model_name,
        "View, windows": f"{settings.view}, {settings.windows.k}", "Objective": settings.objective,
        "Precision, ZeRO stage": f"{settings.precision}, {settings.zero.stage}",
    }
    if lines:
        last = lines[-1]
        named["Samples seen"] = f"{last['samples']:,}"
        for name, field, form in (("Seconds a step", "seconds", "{:.3g}"),
                                  ("Samples a second", "samples_per_s", "{:.3g}"),
                                  ("Waiting for data", "data_wait", "{:.0%}"),
                                  ("Effective rank of the targets", "target_rank", "{:.1f}")):
            value = _recent(lines, field)
            if value is not None:
                named[name] = form.format(value)
        if last.get("peak_memory_bytes") is not None:
            named["Peak memory of a process"] = f"{last['peak_memory_bytes'] / 2**30:.2f} GiB"
    return named


def thin(step: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A curve in at most 600 places: step, lowest, mean and highest value of each.

    Values that are not finite are left out. Lowest and highest keep a single spike visible among 10^5 steps.
    """
    finite = np.isfinite(value)
    step, value = step[finite], value[finite]
    if not len(step):
        return step, value, value, value
    first = np.unique(np.linspace(0, len(step), min(len(step), _POINTS) + 1).astype(int)[:-1])
    count = np.diff(np.append(first, len(step)))
    return (np.add.reduceat(step, first) / count, np.minimum.reduceat(value, first),
            np.add.reduceat(value, first) / count, np.maximum.reduceat(value, first))


def smoothed(value: np.ndarray) -> np.ndarray:
    """Running mean over a thirtieth of the curve, shorter at its ends."""
    window = np.ones(max(1, len(value) // 30) | 1)
    half = len(window) // 2
    padded = np.convolve(value, window)[half : half + len(value)]
    return padded / np.convolve(np.ones(len(value)), window)[half : half + len(value)]


@dataclass(frozen=True)
class Curve:
    """One line of a plot: field of metrics.jsonl, name, colour, factor to the plotted unit."""

    field: str
    name: str = ""
    colour: str = html.BLUE
    factor: float = 1.0
    noisy: bool = True


def _plot(axes: Axes, lines: Sequence[Line], curves: Sequence[Curve], label: str, log: bool = False) -> None:
    step = _values(lines, "step")
    drawn, lowest = 0, math.inf
    for curve in curves:
        at, low, mean, high = thin(step, _values(lines, curve.field) * curve.factor)
        if len(at):
            axes.fill_between(at, low, high, color=curve.colour, alpha=0.3, lw=0.8)
            line = smoothed(mean) if curve.noisy else mean
            axes.plot(at, line, color=curve.colour, lw=1.8, label=curve.name,
                      marker="o" if len(at) == 1 else "")
            drawn, lowest = drawn + 1, min(lowest, low.min())
    if log and lowest > 0 and drawn:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    if drawn > 1:
        short = sum(len(curve.name) for curve in curves) < 40
        axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), borderaxespad=0.2,
                    ncols=len(curves) if short else 1)
    axes.set_ylabel(label)
    axes.grid(axis="y")


def _figure(
    title: str, lines: Sequence[Line], panels: Sequence[tuple[str, Sequence[Curve], bool]], caption: str,
    zero: bool = False, limit: tuple[float, str] | None = None,
) -> str:
    """Panels (y label, curves, log) over one step axis; nothing where no field was logged.

    With `zero` the line of no gain is drawn and all below it shaded; `limit` draws and names another line.
    """
    panels = [panel for panel in panels
              if any(np.isfinite(_values(lines, curve.field)).any() for curve in panel[1])]
    if not panels:
        return ""
    figure = Figure(figsize=(5.4, 3.1 if len(panels) == 1 else 0.5 + 1.3 * len(panels)), layout="constrained")
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (label, curves, log) in zip(grid, panels, strict=True):
        _plot(axes, lines, curves, label, log)
    grid[-1].set_xlabel("optimizer step")
    axes = grid[0]
    if zero:
        low, high = axes.get_ylim()
        span = max(high, 0.0) - min(low, 0.0)
        axes.set_ylim(min(low - 0.12 * span, -0.15 * span), max(high, 0.05 * span))  # room for the words
        axes.axhspan(axes.get_ylim()[0], 0, color=html.RED, alpha=0.09, lw=0)
        axes.axhline(0, color=html.RED, lw=1, ls="--")
        _say(axes, axes.get_ylim()[0], "no better than the mean of the place")
    if limit is not None:
        axes.axhline(limit[0], color=html.RED, lw=1, ls="--")
        _say(axes, *limit)
    return f"<div>{html.heading(title)}{html.picture(figure, f'{title}, by optimizer step', caption)}</div>"


def _say(axes: Axes, height: float, words: str) -> None:
    """Words just above a height, at the right end."""
    axes.annotate(words, (1, height), (-3, 3), xycoords=axes.get_yaxis_transform(),
                  textcoords="offset points", ha="right", va="bottom", fontsize=8, color="#8a3d00")


def _kinds(prefix: str) -> list[Curve]:
    return [Curve(f"{prefix}_{kind}", *drawn) for kind, drawn in _KINDS.items()]


def _curves(settings: PretrainSettings, lines: Sequence[Line]) -> list[str]:
    if not lines:
        return []
    terms = [Curve("loss", "total", html.INK), Curve("loss_jepa", "JEPA", html.BLUE),
             Curve("loss_mae", "MAE", html.ORANGE), Curve("loss_sig", "SIG", html.GREEN)]
    weights = " + ".join(f"{weight:g} {name}" for weight, name
                         in zip(settings.weights, ("JEPA", "SIG", "MAE"), strict=True) if weight)
    clip = settings.optimizer.clip
    learning = [
        _figure("Gain over the mean of each place", lines, [("gain", [Curve("gain")], False)],
                "Gain = 1 - loss / loss of a predictor that knows only the mean target of each place and "
                "slot. Zero is that predictor: no better than knowing what a place looks like on average. "
                "Normal: at or below 0 at first, then rising. A collapse: it stays at 0 or below to the "
                "end.", zero=True),
        _figure("Loss and its terms", lines, [("loss", terms, True)],
                f"Total = {weights}; the terms are drawn without their weights. MAE falls from about 1. The "
                "JEPA term may rise while the gain grows: its targets are made by the model itself and "
                "become harder as they grow richer. A JEPA loss that drops to almost nothing with a gain "
                "near 0 is a collapse, not a success."),
        _figure("Gain for each kind of target", lines, [("gain", _kinds("gain"), False)],
                "Normal: cross-location carries the dynamics and comes to lead; cross-time and "
                "double-cross, of windows minutes apart, carry the person (anatomy, "
                "connectivity).", zero=True),
        _figure("Loss for each kind of target", lines, [("loss", _kinds("loss"), False)],
                "The JEPA loss by kind of target. Compare kinds by their gain, not by this: targets of "
                "unlike kinds differ in variance."),
    ]
    health = [
        _figure("Spread of the targets", lines, [("SD", [Curve("target_std")], False)],
                "Standard deviation of the targets around the mean of their place, mean over channels. "
                "Normal: it settles well above 0. Towards 0: every sample gives the same "
                "features.", limit=(0, "all samples alike")),
        _figure("Effective rank of the targets", lines, [("effective rank", [Curve("target_rank")], False)],
                "How many directions the targets use. Normal: it falls from its start, then settles. Below "
                "5 is a dimensional collapse: raise loss.sig or "
                "loss.mae.", limit=(5, "dimensional collapse below 5")),
        _figure("Norm of the gradient", lines, [("gradient norm", [Curve("grad_norm")], True)],
                f"Before clipping at {clip:g}. Normal: falls early, then flat with rare spikes. Spikes that "
                "become frequent announce a divergence: lower optimizer.lr.", limit=(clip, "clipped above")),
        _figure("Schedules", lines, [("learning rate", [Curve("lr", noisy=False)], False),
                                     ("weight decay", [Curve("wd", noisy=False)], False),
                                     ("EMA momentum", [Curve("ema", noisy=False)], False)],
                "As planned, per optimizer step: the learning rate warms up, then falls along half a cosine "
                "and ends on the last step; weight decay and EMA momentum go from their first to their last "
                "value."),
    ]
    machine = [
        _figure("Speed", lines, [("samples / s", [Curve("samples_per_s")], False),
                                 ("data wait, %", [Curve("data_wait", factor=100)], False),
                                 ("MFU, %", [Curve("mfu", factor=100)], False)],
                "All processes together. Normal: flat. Data wait is the share of a step spent waiting for "
                "samples; where it stays high, raise run.workers."),
        _figure("Memory and tokens", lines,
                [("peak memory, GiB", [Curve("peak_memory_bytes", factor=2**-30, noisy=False)], False),
                 ("tokens kept", [Curve("tokens_kept")], False)],
                "Memory: of the GPU's allocator, or of the process where there is none; it only rises, and "
                "should soon stop rising. Tokens kept: brain tokens of the context, per sample; it varies a "
                "little with the brains."),
    ]
    how = "Line: running mean. Pale: the logged values themselves, or their range where many share a place."
    parts: list[str] = []
    for title, pictures in (("Learning", learning), ("Health", health), ("Speed and memory", machine)):
        shown = [picture for picture in pictures if picture]
        if shown:
            parts.append(html.section(title, "" if parts else html.text(how), html.pairs(*shown)))
    return parts


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
        parts = [part for name in sorted(tasks)
                 for part in _probe(name, tasks[name], about.get(name, {}).get("differences", {}))]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(path, "tasks", f"what cannot be read ({type(error).__name__}: {error})",
                          "the report of tools/probe.py", "Run the probe again") from None
    if not parts:
        return []
    return [html.text(
        "Values with 95 % intervals. The weights are worth something where this run beats the same encoder "
        "with random weights. Functional connectivity is what has to be beaten for subject traits. What the "
        "mean image can tell is anatomy, not activity."), *parts]


def _probe(name: str, task: dict[str, Any], differences: dict[str, Any]) -> list[str]:
    """One task; `differences` are those of this run minus a method, on the same draws of subjects."""
    results = {}
    for method in [*_METHODS, *sorted(set(task) - set(_METHODS))]:
        cells = task.get(method)
        found = {metric: cell for metric, cell in (cells.items() if isinstance(cells, dict) else ())
                 if isinstance(cell, dict) and "value" in cell}
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

    rows = [[_METHODS.get(method, method), *[words(cells.get(metric)) for metric in metrics]]
            for method, cells in results.items()]
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
    return [html.heading(name), html.table(["Features", *metrics], rows),
            html.picture(figure, f"Probe results of {name} with 95 % intervals", chance)]
