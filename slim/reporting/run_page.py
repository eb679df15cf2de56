"""The report page of a run: findings, curves and results.

    slim-brain report RUN

It reads `config.yaml`, `metrics.jsonl`, `checkpoints/` and the results of `slim-brain probe` and `slim-brain explain`
in `report/`, and writes `report/index.html`. It can be called during training. Fine-tuning runs have a page as well,
with their training and validation losses.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from shards.core import files
from shards.core.errors import ConfigError, UserError
from shards.core.files import without_folders
from shards.core.findings import Finding, bad, good, look
from shards.core.progress import duration
from shards.format.manifest import Manifest
from shards.reporting import html
from slim.checkpoints.checkpoint import facts, folders, is_complete
from slim.checkpoints.provenance import Provenance
from slim.checkpoints.run_folder import CHECKPOINTS, CONFIG, DATASET, EXPLAIN, METRICS, PAGE, PROBE, PROBES, REPORT
from slim.checkpoints.seen import Seen
from slim.config import AUTO, FinetuneSettings, PretrainSettings, load_run
from slim.evaluation.validation import ValidationScore, read_scores
from slim.finetune.labels import Answers
from slim.reporting import curves, run_health
from slim.training.metrics import RECENT, MetricsLine, number, read_metrics, warnings_of

_CLEAR = 0.01  # smallest gain that counts as clear


def write(
    run_folder: str | Path,
    paths: bool = False,
    remote: bool = False,
    refresh: int | None = None,
    private: bool = False,
) -> Path:
    """Write `RUN/report/index.html`.

    Parameters
    ----------
    run_folder : str or Path
    paths : bool
        Whether to show whole absolute paths. By default only their last part is shown, because pages may be shared.
    remote : bool
        Whether to open datasets with a URL, if the number of steps depends on them. The URLs of a run received from
        others may be unsafe.
    refresh : int, optional
        Seconds after which a browser loads the page again.
    private : bool
        Whether sessions are numbered, and pictures that name them are left out.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    UserError
        If the folder is not a run, or its configuration or probe report cannot be read.
    """
    folder = Path(run_folder)
    config = folder / CONFIG
    if not config.is_file():
        raise ConfigError(folder, "", "no config.yaml", "the folder of a run", "Give the run.out of a pretraining run")
    settings = load_run(config)
    merged = config.read_text(encoding="utf-8")
    merged = merged if paths else without_folders(merged)
    lines, unreadable = read_metrics(folder / METRICS)
    steps = total_steps(settings, folder, lines, remote)
    tasks, scores = run_health.read_tasks(folder / REPORT / PROBE), read_scores(folder / PROBES)
    name, guess, judged = folder.resolve().name, None, learned(lines, is_over(lines, steps))
    if isinstance(settings, FinetuneSettings):
        name, guess = f"{folder.resolve().parent.name}, {name}", Answers.read(folder).guess
        judged = answered(lines, is_over(lines, steps), guess)
    with html.drawing():
        content = html.render(
            "run.html",
            "slim.reporting",
            title=f"Run {name}",
            lead=_lead(lines, steps),
            findings=[*verdict(lines, steps, judged, unreadable), *run_health.verdict(tasks)],
            refresh=refresh,
            facts=html.Facts(_numbers(settings, lines, Provenance.read(folder), paths) | _ahead(lines, steps, scores)),
            probes=run_health.probes(tasks),
            explanations=run_health.explanations(folder / REPORT / EXPLAIN, private),
            curves=[*curves.validation(scores), *curves.sections(settings, lines, guess)],
            checkpoints=_checkpoints(folder / CHECKPOINTS),
            configuration_file=CONFIG,
            configuration=merged,
        )
    path = folder / REPORT / PAGE
    files.write_atomically(path, content)
    return path


def has_ended(run_folder: str | Path, remote: bool = False) -> bool:
    """Whether the last step of a run was logged."""
    folder = Path(run_folder)
    lines, _ = read_metrics(folder / METRICS)
    return is_over(lines, total_steps(load_run(folder / CONFIG), folder, lines, remote))


def total_steps(
    settings: PretrainSettings | FinetuneSettings, folder: Path, lines: Sequence[MetricsLine], remote: bool = False
) -> int | None:
    """Total optimizer steps of the run; None if they are given as epochs and the data cannot be read.

    Datasets with a URL are only read with `remote`. The samples per step are read from the log, because they depend on
    the number of processes.
    """
    if settings.run.steps is not None:
        return settings.run.steps
    if not lines:
        return None
    product = (lines[-1].get("samples_per_s") or 0) * (lines[-1].get("seconds") or 0)
    per_step = max(1, round(product)) if math.isfinite(product) else 1
    if isinstance(settings, FinetuneSettings):
        return max(1, math.ceil(settings.run.epochs * len(Answers.read(folder).train) / per_step))
    seen = Seen.read(folder)
    if seen is not None and len(seen.sessions) == len(settings.data):
        return _steps(settings, seen.sessions, per_step)
    try:
        if not remote and (elsewhere := [item.path for item in settings.data if "://" in item.path]):
            raise ConfigError(folder, "data", elsewhere[0], "a folder of this machine")
        sessions = [Manifest.read(item.path).sessions["train"] for item in settings.data]
    except UserError:
        note = folder / DATASET  # manifest of the first dataset, written at the start of the run
        if len(settings.data) > 1 or not note.is_file():
            return None
        try:
            sessions = [int(json.loads(note.read_text(encoding="utf-8"))["sessions"]["train"])]
            if not 0 <= sessions[0] < 2**53:
                return None
        except (ValueError, TypeError, KeyError, RecursionError):
            return None
    return _steps(settings, sessions, per_step)


def _steps(settings: PretrainSettings, sessions: Sequence[int], per_step: int) -> int:
    """Optimizer steps of the requested epochs, from the numbers of training sessions of the datasets."""
    per_epoch = sum(item.weight * count for item, count in zip(settings.data, sessions, strict=True))
    return max(1, math.ceil(settings.run.epochs * max(1, round(per_epoch)) / per_step))


def recent(lines: Sequence[MetricsLine], name: str) -> float | None:
    """Mean of a field over the last logged steps."""
    values = curves.values(lines[-RECENT:], name)
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else None


def _lead(lines: Sequence[MetricsLine], steps: int | None) -> str:
    if not lines:
        return "No step was logged yet."
    last = lines[-1]
    loss = "none" if last.get("loss") is None else f"{last['loss']:.4g}"
    gain = recent(lines, "gain")
    over = min(len(lines), RECENT)
    of = f" of {steps}" if steps else ""
    learned = "" if gain is None else f"; gain {gain:+.4f} (mean of the last {over} logged steps)"
    return f"Step {last['step']}{of}, epoch {last.get('epoch', 'unknown')}; last loss {loss}{learned}."


def is_over(lines: Sequence[MetricsLine], steps: int | None) -> bool:
    """Whether the last step was logged."""
    return bool(lines) and steps is not None and number(lines[-1], "step") >= steps


def verdict(
    lines: Sequence[MetricsLine], steps: int | None, judged: Sequence[Finding], unreadable: int = 0
) -> list[Finding]:
    """What the run looks like.

    Parameters
    ----------
    lines : sequence of dict
        Lines of metrics.jsonl.
    steps : int or None
        Total optimizer steps of the run.
    judged : sequence of Finding
        Result of `learned` or `answered`.
    unreadable : int
        Number of unreadable lines.
    """
    if not lines:
        return [look("not_begun", "Nothing was logged yet: the run is at its first step, or stopped before it.")]
    last, found = lines[-1], []
    if is_over(lines, steps):
        found.append(good("finished", f"Finished: {last['step']} of {steps} steps."))
    else:
        share = f", {number(last, 'step') / steps:.0%}" if steps else ""
        found.append(
            look(
                "unfinished",
                f"Not finished: step {last['step']} of {steps or 'an unknown number'}{share}. "
                "If it is not running, the command that started it continues from the "
                "newest checkpoint.",
            )
        )
    if (loss := last.get("loss")) is None or not math.isfinite(loss):
        found.append(
            bad(
                "loss",
                "The last loss is not finite: resume from an earlier checkpoint with a lower "
                "optimizer.lr, or with precision fp32.",
            )
        )
    found += judged
    found += [replace(one, text=f"{one.text[0].upper()}{one.text[1:]}.") for one in warnings_of(list(lines))]
    if unreadable:
        found.append(
            look(
                "unreadable",
                f"{unreadable} unreadable line{'s' * (unreadable > 1)} of {METRICS} left out; "
                "a killed run leaves an incomplete last line.",
            )
        )
    return found


def answered(lines: Sequence[MetricsLine], finished: bool, guess: float) -> list[Finding]:
    """Whether a fine-tuning answers better than whoever guesses, and whether it was long enough.

    Parameters
    ----------
    lines : sequence of dict
        Lines of metrics.jsonl.
    finished : bool
    guess : float
        Validation loss of guessing.
    """
    validated = [line for line in lines if line.get("val_loss") is not None]
    if not validated:
        return [look("validation", "Not validated yet: the first epoch is not finished.")] if lines else []
    first, last = validated[0]["step"], validated[-1]["step"]
    best = min(validated, key=lambda line: number(line, "val_loss"))
    where = f"{best['val_loss']:.4f} at step {best['step']} (guessing: {guess:.4f})"
    if number(best, "val_loss") >= guess:
        hint = "Lower optimizer.lr, try head.pooling=attentive, and compare with the probe of frozen features"
        return [bad("validation", f"The validation loss was never better than guessing: {where}. {hint}.")]
    found = [good("validation", f"The lowest validation loss is {where}; these weights are kept.")]
    if finished and len(validated) > 2 and best["step"] == last:
        found.append(look("duration", "The validation loss was lowest at the end: more run.epochs may improve it."))
    if len(validated) > 2 and best["step"] == first:
        words = "The validation loss was lowest after the first epoch: a lower optimizer.lr may improve it."
        found.append(look("rate", words))
    return found


def learned(lines: Sequence[MetricsLine], finished: bool) -> list[Finding]:
    """Findings about a pretraining: whether it learns, or has collapsed."""
    if not lines:
        return []
    last, found, gain = lines[-1], [], recent(lines, "gain")
    if last.get("gain") is None:
        found.append(
            look(
                "gain",
                "No gain is computed, because the objective has no JEPA term. Judge the run by its "
                "MAE loss and by probes.",
            )
        )
    elif gain is None:
        found.append(bad("gain", "None of the last gains is finite."))
    elif gain > _CLEAR:
        found.append(good("gain", f"Predictions beat the mean of each place: gain {gain:+.4f}."))
    elif gain > 0:
        found.append(
            look(
                "gain",
                f"Predictions hardly beat the mean of each place: gain {gain:+.4f}. Train "
                "longer, and test with a probe whether the run beats random weights.",
            )
        )
    elif finished:
        found.append(
            bad(
                "gain",
                "Collapsed, or did not learn: the gain over the mean of each place is "
                f"{gain:+.4f} at the end. Do not use these weights unless a probe beats random weights.",
            )
        )
    best, place = _best_gain(lines)
    if gain is not None and best - gain > max(0.02, 0.2 * best):
        found.append(
            look(
                "best_gain",
                f"The gain was higher before: {best:+.4f} around step {place}. Also probe a checkpoint from there.",
            )
        )
    return found


def _best_gain(lines: Sequence[MetricsLine]) -> tuple[float, int]:
    """Highest smoothed gain and its step; (-inf, 0) without gains."""
    steps, _, mean, _ = curves.thin(curves.values(lines, "step"), curves.values(lines, "gain"))
    if not len(mean):
        return -math.inf, 0
    smooth = curves.smoothed(mean)
    return float(smooth.max()), int(steps[smooth.argmax()])


def _chunks(settings: PretrainSettings | FinetuneSettings, chosen: Mapping[str, object]) -> str:
    """Tokens of a chunk, also where the run chose them."""
    tokens: object = settings.chunk_tokens
    how = " (auto)" if tokens == AUTO else ""
    if tokens == AUTO:
        if "chunk_tokens" not in chosen:
            return "auto, not chosen yet"
        tokens = chosen["chunk_tokens"]
    return f"none{how}" if tokens is None else f"{tokens} tokens{how}"


def _numbers(
    settings: PretrainSettings | FinetuneSettings, lines: Sequence[MetricsLine], provenance: Provenance, paths: bool
) -> dict[str, object]:
    data = [item.path if paths else without_folders(item.path) for item in settings.data]
    named: dict[str, object] = {
        "Data": ", ".join(data),
        "Model": settings.model_name,
        "View, windows": f"{settings.view}, {settings.windows.k}",
        **_aim(settings, provenance),
        "Precision, ZeRO stage": f"{settings.precision}, {settings.zero_stage}",
        "Chunks of the local stages": _chunks(settings, provenance.chosen),
    }
    if lines:
        last = lines[-1]
        named["Samples seen"] = f"{last['samples']:,}"
        for name, field, form in (
            ("Seconds per step", "seconds", "{:.3g}"),
            ("Samples per second", "samples_per_s", "{:.3g}"),
            ("Waiting for data", "data_wait", "{:.0%}"),
            ("Effective rank of the targets", "target_rank", "{:.1f}"),
        ):
            value = recent(lines, field)
            if value is not None:
                named[name] = form.format(value)
        if last.get("peak_memory_bytes") is not None:
            named["Peak memory per process"] = f"{number(last, 'peak_memory_bytes') / 2**30:.2f} GiB"
    return named


def _ahead(lines: Sequence[MetricsLine], steps: int | None, scores: Sequence[ValidationScore]) -> dict[str, object]:
    """The time left, and the last probe during training."""
    named: dict[str, object] = {}
    if lines and steps is not None and not is_over(lines, steps):
        logged, seconds = lines[-RECENT:], recent(lines, "seconds")
        if seconds is not None:
            named["Time left"] = f"{duration((steps - number(logged[-1], 'step')) * seconds)}, if it is running"
    if scores:
        named[f"Last probe of {scores[-1].task}"] = scores[-1].line()
    return named


def _aim(settings: PretrainSettings | FinetuneSettings, provenance: Provenance) -> dict[str, object]:
    if isinstance(settings, PretrainSettings):
        init = provenance.init
        begun = {} if init is None else {"Initial weights": f"{init.run}, step {init.step}"}
        return {"Objective": settings.objective, **begun}
    start = "random weights" if settings.start is None else "weights"
    if settings.before:
        start = f"{settings.before['run']}, step {settings.before['step']}"
    return {"Task": settings.answer.task, "Head": f"{settings.head.pooling} pooling", "Initial weights": start}


def _checkpoints(folder: Path) -> list[html.Part]:
    rows: list[list[object]] = []
    for path in folders(folder):
        if is_complete(path):
            about = facts(path)
            size = sum(about["files"].values())
            rows.append([path.name, about["step"], "complete", about["world_size"], f"{size / 1e6:,.1f}"])
        else:
            rows.append([path.name, "", "incomplete: ignored when the run is resumed", "", ""])
    if not rows:
        return [html.Text("None yet: if the run stops now, it starts again from step 0.")]
    return [html.Table(["Folder", "Step", "State", "Processes", "MB"], rows)]
