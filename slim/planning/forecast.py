"""What a run will need of a machine: memory by part, the largest batch, FLOPs, hours, disk.

Steps of one and of two samples are counted by `slim.planning.step_cost` with the buffers of
`slim.planning.zero_memory`. Everything else follows from them: what the second sample adds, each further one adds, too.
(Of two and of three where the local stages are computed in chunks from the second sample on only, or of as many samples
as share a SIG test.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from shards.core.errors import ConfigError, SampleCorrupt
from shards.format.grid import Grid
from shards.format.patches import scatter
from shards.format.reader import Dataset
from shards.format.stream import Stream
from slim.config import PretrainSettings
from slim.data.samples import geometry_for
from slim.model.geometry import geometry_of
from slim.planning.counting import Footprint
from slim.planning.step_cost import Cost, cost, detailed, make_batch, mni_brain
from slim.planning.zero_memory import Zero

T = TypeVar("T")
Counted = tuple[Cost, Footprint]
_LOOKED_AT = 8  # sessions of a dataset among which the largest brain is looked for
ASSUMED_TFLOPS = 100
LEFT_OUT = "CUDA context, workspaces of kernels, fragmentation, buffers of NCCL"
# Numbers of 4 bytes that DeepSpeed writes for each parameter: weights, two moments, at stages 1 and 2 a master copy.
_SAVED = {0: 3, 1: 4, 2: 4, 3: 3}


def present(settings: PretrainSettings, required: bool) -> list[Dataset]:
    """The datasets of a configuration; none where its folders are not there and need not be.

    Raises
    ------
    DatasetError
        If a folder is there but no dataset, or is not there and `required`.
    """
    paths = [item.path for item in settings.data]
    if not required and not any("://" in path or Path(path).exists() for path in paths):
        return []
    return [Dataset(path) for path in paths]


def largest_brain(datasets: list[Dataset]) -> tuple[np.ndarray, str]:
    """Brain mask (X, Y, Z) with the most patches among the first training sessions, and where it is from.

    Raises
    ------
    ConfigError
        If there is no session to train on.
    """
    best: tuple[np.ndarray, str] | None = None
    most = 0
    for dataset in datasets:
        for session in dataset.of_split("train")[:_LOOKED_AT]:
            try:
                arrays = dataset.read(session, names=("patch", "brain"), windows=())
            except SampleCorrupt:
                continue  # a run that meets it leaves it out and names it
            if len(arrays["patch"]) > most:
                most = len(arrays["patch"])
                brain_XYZ = scatter(arrays["brain"], arrays["patch"], dataset.grid.shape, dataset.grid.patch)
                best = brain_XYZ.astype(bool), f"session {session.key} of {dataset.folder}"
    if best is None:
        raise ConfigError(datasets[0].folder, "train", "no session", "at least one session to train on")
    return best


def forecast(
    settings: PretrainSettings,
    datasets: list[Dataset],
    gpu_memory: int | None = None,
    tflops: float | None = None,
    begun: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Everything that can be said of a configuration before it is run.

    Parameters
    ----------
    settings : PretrainSettings
    datasets : list of Dataset
        Of the configuration; with none, the MNI152 mask on the default grid stands for a brain.
    gpu_memory : int, optional
        Bytes of a GPU, for the largest batch.
    tflops : float, optional
        TFLOP/s that a GPU sustains; `ASSUMED_TFLOPS` if it is not given.
    begun : callable
        Told what is being counted; at full size a count takes up to a minute.

    Raises
    ------
    ConfigError
        If the model's units do not fit the grid, datasets do not fit each other, there is nothing to train on, or
        states are offloaded.
    """
    run = settings.run
    if settings.zero.offload_optimizer:
        raise ConfigError(
            "zero",
            "offload_optimizer",
            "true",
            "false: what it moves to the host is not counted",
            "Without it the forecast is an upper bound",
        )
    if datasets:
        geometry = geometry_for(settings, datasets)
        weights = [item.weight for item in settings.data]
        per_epoch = Stream(datasets, weights, "train", run.seed, settings.windows.k).per_epoch
        grid, frames = datasets[0].grid, datasets[0].frames
        brain_XYZ, basis = largest_brain(datasets)
    else:
        per_epoch, grid, frames = None, Grid(), 5
        geometry = geometry_of(settings.model, (settings.windows.k * frames, *grid.patch_shape))
        brain_XYZ, basis = mni_brain(grid), f"MNI152 mask at {grid.mm:g} mm; no dataset at {settings.data[0].path}"

    def of_batch(batch: int) -> PretrainSettings:
        return settings.model_copy(update={"run": run.model_copy(update={"batch": batch})})

    counted: dict[int, Counted] = {}

    def count(batch: int) -> Counted:
        if batch not in counted:
            begun(f"counting a step with run.batch={batch}")
            counted[batch] = detailed(of_batch(batch), grid, frames, brain_XYZ, drive=Zero)
        return counted[batch]

    def streams(batch: int) -> bool:
        context = make_batch(of_batch(batch), geometry, brain_XYZ).context
        return context is not None and len(context.chunks) > 1

    unit = settings.loss.sig_samples or 1
    first = unit if settings.chunk_tokens is None or streams(unit) or not streams(2 * unit) else 2 * unit
    second = first + unit
    if run.batch <= second:
        step = count(run.batch)[0]
    else:
        step = extrapolate(count(first), count(second), (run.batch - first) // unit + 1)
    most = None
    if gpu_memory is not None:
        most = first + unit * (largest(count(first), count(second), gpu_memory) - 1)
        if 0 < most < first and count(most)[0].peak_memory_bytes > gpu_memory:
            most = 0

    steps = run.steps if per_epoch is None else run.steps_in_all(per_epoch, run.processes)
    checkpoint = checkpoint_bytes(settings, step, math.prod(geometry.cells))
    speed = tflops or ASSUMED_TFLOPS
    return asdict(step) | {
        "basis": basis,
        "model": settings.model_name,
        "precision": settings.precision,
        "batch": run.batch,
        "accumulate": run.accumulate,
        "processes": run.processes,
        "zero_stage": settings.zero.stage,
        "counted_batches": sorted(counted),
        "left_out": LEFT_OUT,
        "gpu_memory_bytes": gpu_memory,
        "fits": None if gpu_memory is None else step.peak_memory_bytes <= gpu_memory,
        "largest_batch": most,
        "samples_per_epoch": per_epoch,
        "steps": steps,
        "tflops": speed,
        "tflops_assumed": tflops is None,
        "hours": None if steps is None else steps * step.step_flops / (speed * 1e12) / 3600,
        "checkpoint_bytes": checkpoint,
        "checkpoints_kept": run.keep,
        "shards_bytes": sum(shard.bytes for d in datasets for shard in d.manifest.shards) if datasets else None,
        "sessions": sum(len(dataset.sessions) for dataset in datasets) if datasets else None,
    }


def extrapolate(one: Counted, two: Counted, times: int) -> Cost:
    """A step that has `times` - 1 further portions of samples than `one`, of which `two` has one.

    At each moment of the step a further portion adds as much as that of `two`. Which moment has the peak may change:
    from AdamW's update, which samples add little to, to the backward pass.
    """

    def further(first: Mapping[T, int], second: Mapping[T, int]) -> dict[T, int]:
        line = {name: first.get(name, 0) + (times - 1) * (size - first.get(name, 0)) for name, size in second.items()}
        return {name: size for name, size in line.items() if size > 0}

    totals = further(_totals(one), _totals(two))
    moment = max(totals, key=totals.__getitem__)
    memory = further(one[1].peaks.get(moment, {}), two[1].peaks[moment])
    flops = further(one[0].flops_parts, two[0].flops_parts)
    return Cost(one[0].parameters, two[0].tokens, sum(memory.values()), memory, sum(flops.values()), flops)


def largest(one: Counted, two: Counted, memory: int) -> int:
    """The largest `times` of `extrapolate` at which the peak is within so many bytes; 0 if that of `one` is not."""
    first, second = _totals(one), _totals(two)
    if max(first.values()) > memory:
        return 0
    grown = {moment: total - first.get(moment, 0) for moment, total in second.items()}
    return int(min(1 + (memory - first.get(moment, 0)) // more for moment, more in grown.items() if more > 0))


def _totals(counted: Counted) -> dict[tuple[str, int], int]:
    """Bytes at the peak of each moment."""
    return {moment: live.total() for moment, live in counted[1].peaks.items()}


def checkpoint_bytes(settings: PretrainSettings, found: Cost, cells: int) -> int:
    """Bytes of a checkpoint: `weights.safetensors`, and DeepSpeed's files of all processes."""
    trained = found.parameters["encoder"] + found.parameters["predictor"]
    width = settings.model.embed * 2 ** (len(settings.model.depths) - 1)
    jepa, sig, _ = settings.loss_weights
    means = (bool(jepa) + bool(sig)) * (cells * (width + 1) + width)
    weights = found.parameters["encoder"] + found.parameters["target"] + means
    return 4 * (weights + _SAVED[settings.zero.stage] * trained)


def flops_per_token(settings: PretrainSettings, dataset: Dataset) -> float:
    """FLOPs of a step per token of brain, counted for one session (see `slim.planning.step_cost`).

    Most layers cost the same for every token, so it serves for all sessions.
    """
    brain_XYZ, _ = largest_brain([dataset])
    alone = settings.run.model_copy(update={"batch": 1, "accumulate": 1})
    loss = settings.loss.model_copy(update={"sig_samples": None})
    one = settings.model_copy(update={"run": alone, "loss": loss})
    found = cost(one, dataset.grid, dataset.frames, brain_XYZ)
    return found.step_flops / found.tokens["brain"]
