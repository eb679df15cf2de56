"""Forecast what a run needs: memory by part, the largest batch, FLOPs, hours, disk space."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shards.core.errors import ConfigError
from shards.format.reader import Dataset
from slim.config import AUTO, PretrainSettings
from slim.planning import chunks
from slim.planning.rates import CALL_US, LOAD_MS, Rates, rates_of
from slim.planning.step_cost import Cost, cost
from slim.planning.steps import Brain, Steps, largest_brain

ASSUMED_TFLOPS = 100
LEFT_OUT = "CUDA context, workspaces of kernels, fragmentation, buffers of NCCL"
# fp32 numbers that DeepSpeed writes for each parameter: weight, two moments, and a master copy at stages 1 and 2.
_SAVED = {0: 3, 1: 4, 2: 4, 3: 3}


def present(settings: PretrainSettings, required: bool) -> list[Dataset]:
    """The datasets of a configuration; an empty list if a folder does not exist and is not `required`.

    Raises
    ------
    DatasetError
        If a folder exists but is not a dataset, or does not exist and is `required`.
    """
    paths = [item.path for item in settings.data]
    if not required and not any("://" in path or Path(path).exists() for path in paths):
        return []
    return [Dataset(path) for path in paths]


@dataclass(frozen=True, kw_only=True)
class Forecast(Cost):
    """The forecast for a configuration.

    Attributes
    ----------
    parameters, tokens, peak_memory_bytes, memory_parts, step_flops, flops_parts
        Cost of a step, as in `slim.planning.step_cost.Cost`.
    basis : str
        Source of the brain mask.
    model, precision, batch, accumulate, processes, zero_stage
        From the configuration.
    chunk_tokens : int or None
        Tokens of a chunk of the local stages; None for all tokens. `chunk_chosen` is True if `auto` chose it.
    counted_batches : list of int
        Values of `run.batch` with a counted step. All other values are extrapolated from these.
    left_out : str
        What the counts do not include.
    gpu_memory_bytes : int or None
        Memory of a GPU. Without it, `fits` and `largest_batch` (0 if no batch fits) are None.
    samples_per_epoch, steps, hours, shards_bytes, sessions
        None if unknown, without the data or without `run.steps`.
    tflops : float
        TFLOP/s of a GPU. `tflops_assumed` is True if the default is used.
    rates : Rates
        Samples per second by arithmetic, launches and loading.
    checkpoint_bytes, checkpoints_kept : int
        Size of one checkpoint, and the number of checkpoints on disk.
    """

    basis: str
    model: str
    precision: str
    batch: int
    accumulate: int
    processes: int
    zero_stage: int
    chunk_tokens: int | None
    chunk_chosen: bool
    counted_batches: list[int]
    left_out: str
    gpu_memory_bytes: int | None
    fits: bool | None
    largest_batch: int | None
    samples_per_epoch: int | None
    steps: int | None
    tflops: float
    tflops_assumed: bool
    rates: Rates
    hours: float | None
    checkpoint_bytes: int
    checkpoints_kept: int
    shards_bytes: int | None
    sessions: int | None


def forecast(
    settings: PretrainSettings,
    datasets: list[Dataset],
    gpu_memory: int | None = None,
    tflops: float | None = None,
    begun: Callable[[str], None] = lambda what: None,
    peak_tflops: float | None = None,
    call_us: float = CALL_US,
    load_ms: float = LOAD_MS,
) -> Forecast:
    """Forecast the needs of a configuration.

    Parameters
    ----------
    settings : PretrainSettings
    datasets : list of Dataset
        The datasets of the configuration; if empty, the MNI152 mask on the default grid is used as the brain.
    gpu_memory : int, optional
        Memory of a GPU in bytes, for the largest batch.
    tflops : float, optional
        TFLOP/s that a GPU sustains; by default `ASSUMED_TFLOPS`.
    begun : callable
        Called with a text before each count, which takes some seconds at full size.
    peak_tflops, call_us, load_ms : float
        As in `slim.planning.rates`; the peak is by default `tflops`.

    Raises
    ------
    ConfigError
        If the model's units do not fit the grid, the datasets do not fit together, there are no training sessions, or
        states are offloaded.
    """
    if settings.zero.offload_optimizer:
        raise ConfigError(
            "zero",
            "offload_optimizer",
            "true",
            "false: the forecast does not count what is moved to CPU memory",
            "Set it to false; the forecast is then an upper bound",
        )
    run, brain = settings.run, Brain.of(settings, datasets)
    counter = _steps_of(settings, brain, gpu_memory, begun)
    step = counter.cost(run.batch)
    most = None if gpu_memory is None else counter.largest_batch(gpu_memory)
    steps = run.steps if brain.per_epoch is None else run.steps_in_all(brain.per_epoch, run.processes)
    speed = tflops or ASSUMED_TFLOPS
    return Forecast(
        **vars(step),
        basis=brain.basis,
        model=settings.model_name,
        precision=settings.precision,
        batch=run.batch,
        accumulate=run.accumulate,
        processes=run.processes,
        zero_stage=settings.zero_stage,
        chunk_tokens=counter.settings.tokens_at_once,
        chunk_chosen=settings.chunk_tokens == AUTO,
        counted_batches=sorted(counter.counted),
        left_out=LEFT_OUT,
        gpu_memory_bytes=gpu_memory,
        fits=None if gpu_memory is None else step.peak_memory_bytes <= gpu_memory,
        largest_batch=most,
        samples_per_epoch=brain.per_epoch,
        steps=steps,
        tflops=speed,
        tflops_assumed=tflops is None,
        rates=rates_of(run, step, peak_tflops or speed, call_us, load_ms),
        hours=None if steps is None else steps * step.step_flops / (speed * 1e12) / 3600,
        checkpoint_bytes=checkpoint_bytes(settings, step, math.prod(brain.geometry.cells)),
        checkpoints_kept=run.keep,
        shards_bytes=sum(shard.bytes for d in datasets for shard in d.manifest.shards) if datasets else None,
        sessions=sum(len(dataset.sessions) for dataset in datasets) if datasets else None,
    )


def _steps_of(settings: PretrainSettings, brain: Brain, gpu_memory: int | None, begun: Callable[[str], None]) -> Steps:
    """The steps of a run on a GPU. If its memory is not known, `chunk_tokens: auto` counts as all tokens at once."""
    if settings.chunk_tokens != AUTO:
        return Steps(settings, brain, begun)
    if gpu_memory is None:
        return Steps(settings.model_copy(update={"chunk_tokens": None}), brain, begun)
    return chunks.choose_for(settings, brain, int(chunks.GPU_SHARE * gpu_memory), on_gpu=True, begun=begun)[1]


def checkpoint_bytes(settings: PretrainSettings, found: Cost, cells: int) -> int:
    """Size of a checkpoint in bytes: `weights.safetensors`, and DeepSpeed's files of all processes."""
    trained = found.parameters["encoder"] + found.parameters["predictor"]
    width = settings.model.embed * 2 ** (len(settings.model.depths) - 1)
    jepa, sig, _ = settings.loss_weights
    means = (bool(jepa) + bool(sig)) * (cells * (width + 1) + width)
    weights = found.parameters["encoder"] + found.parameters["target"] + means
    return 4 * (weights + _SAVED[settings.zero_stage] * trained)


def flops_per_token(settings: PretrainSettings, dataset: Dataset) -> float:
    """FLOPs of a step per token of brain, counted for one session (see `slim.planning.step_cost`).

    Most layers cost the same for every token, so the number is used for all sessions.
    """
    brain_XYZ, _ = largest_brain([dataset])
    alone = settings.run.model_copy(update={"batch": 1, "accumulate": 1})
    loss = settings.loss.model_copy(update={"sig_samples": None})
    one = settings.model_copy(update={"run": alone, "loss": loss})
    found = cost(one, dataset.grid, dataset.frames, brain_XYZ)
    return found.step_flops / found.tokens["brain"]
