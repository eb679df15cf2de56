"""Choose `chunk_tokens: auto` from the memory of the device, by the forecast of a step.

Chunks save memory and cost time: with them, a GPU has to launch all operations of the local stages once for each chunk,
and the backward pass computes them again. So the largest of `CHOICES` is taken whose forecast fits. The losses do not
depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from shards.format.reader import Dataset
from slim.config import PretrainSettings, TrainSettings
from slim.planning.available_memory import available_bytes
from slim.planning.step_cost import brain_patches
from slim.planning.steps import Brain, Steps
from slim.pretrain.objective import Objective

CHOICES = (None, 65_536, 16_384, 4_096)  # tokens of a chunk, from the fastest to the one with the least memory
# The share of the free memory that a step may take. The rest of a GPU's is for what a forecast leaves out; on a CPU,
# loading processes and other programs use the same memory.
GPU_SHARE, CPU_SHARE = 0.8, 0.5
# Numbers that a block keeps for each channel of a token, at most: queries, keys and values with padding, hidden
# channels of the MLP, gradients. Numbers for each parameter: weight, gradient, moments, copies of DeepSpeed, target.
_OF_CHANNEL, _OF_VOXEL, _OF_PARAMETER = 32, 16, 12


@dataclass(frozen=True)
class Choice:
    """What was chosen, and why.

    Attributes
    ----------
    chunk_tokens : int or None
        Tokens of a chunk; None for all tokens.
    needed : int
        Forecast of the peak of a step, in bytes; an upper bound if `counted` is False.
    allowed : int
        Bytes that a step may take.
    counted : bool
        Whether a step was counted. What is certain to fit is not.
    """

    chunk_tokens: int | None
    needed: int
    allowed: int
    counted: bool

    def __str__(self) -> str:
        chosen = "null" if self.chunk_tokens is None else self.chunk_tokens
        least = "" if self.counted else "at most "
        fits = "fits in" if self.needed <= self.allowed else "is the smallest choice, but may not fit in"
        return f"chunk_tokens auto: {chosen}: a step of {least}{_gib(self.needed)} {fits} {_gib(self.allowed)}"


def choose(
    settings: TrainSettings,
    datasets: Sequence[Dataset],
    allowed: int,
    on_gpu: bool,
    begun: Callable[[str], None] = lambda what: None,
) -> Choice:
    """The chunk for a run of one process with `allowed` bytes.

    A step of fine-tuning counts as one of pretraining whose context is the whole brain; it needs less.

    Parameters
    ----------
    settings : TrainSettings
    datasets : sequence of Dataset
        As in `slim.planning.steps.Brain.of`.
    allowed : int
        Bytes that a step may take.
    on_gpu : bool
    begun : callable
        Called with a text before each count.
    """
    like = _pretraining(settings)
    brain = Brain.of(like, list(datasets))
    return choose_for(like, brain, allowed, on_gpu, not isinstance(settings, PretrainSettings), begun)[0]


def choose_for(
    settings: PretrainSettings,
    brain: Brain,
    allowed: int,
    on_gpu: bool,
    all_context: bool = False,
    begun: Callable[[str], None] = lambda what: None,
) -> tuple[Choice, Steps]:
    """As `choose`, for a brain, with the steps of the choice; with `all_context`, the context is the whole brain."""

    def steps(tokens: int | None) -> Steps:
        return Steps(settings.model_copy(update={"chunk_tokens": tokens}), brain, begun, on_gpu, all_context)

    if (bound := _at_most(settings, brain)) <= allowed:
        return Choice(None, bound, allowed, counted=False), steps(None)
    for tokens in CHOICES:
        chosen = steps(tokens)
        peak = chosen.cost(settings.run.batch).peak_memory_bytes
        if peak <= allowed:
            break
    return Choice(tokens, peak, allowed, counted=True), chosen


def _pretraining(settings: TrainSettings) -> PretrainSettings:
    """Settings of a pretraining step with the same encoder and samples, and any number of samples in a SIG group."""
    if isinstance(settings, PretrainSettings):
        loss = settings.loss.model_copy(update={"sig_samples": None})
        return settings.model_copy(update={"loss": loss})
    shared = {name: getattr(settings, name) for name in TrainSettings.model_fields}
    return PretrainSettings(**shared, objective="mae")


def _at_most(settings: PretrainSettings, brain: Brain) -> int:
    """An upper bound of the bytes of a step without chunks, without counting it."""
    with torch.device("meta"):
        model = Objective(settings, brain.geometry, brain.grid.voxels)
    geometry, encoder = brain.geometry, model.encoder
    token_N = np.flatnonzero(np.tile(brain_patches(geometry, brain.brain_XYZ).any(axis=1), geometry.tokens[0]))
    numbers = _OF_VOXEL * brain.grid.voxels * len(token_N)
    level, rows, dim = 0, len(token_N), settings.model.embed  # a block that pools has the tokens below it as keys
    for index in range(encoder.n):
        dim *= 2 if index in encoder.ends[:-1] else 1
        numbers += _OF_CHANNEL * dim * rows
        if index in encoder.pooled:
            rows, level = len(np.unique(geometry.ancestors[level][token_N])), level + 1
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return 4 * (settings.run.batch * numbers + _OF_PARAMETER * parameters)


def allowed_bytes(device: torch.device, processes: int) -> int:
    """Bytes that a step on a device may take; `processes` of this machine share the memory of a CPU."""
    if device.type == "cuda":
        return int(GPU_SHARE * torch.cuda.mem_get_info(device)[0])
    return int(CPU_SHARE * available_bytes() / processes)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
