"""The cost of a training step before it is run: parameters, tokens, peak memory, FLOPs and calls.

`slim.planning.counting` counts the step of one process, without a GPU and without computing it. The step is that of
`slim.training.trainer`: targets of the EMA encoder on all brain tokens, losses, backward, clipping, AdamW, running
means and EMA. It holds weights, gradients, Adam moments, the target encoder, running means, voxel values and plans.
Instead of DeepSpeed, plain AdamW updates the weights tensor by tensor, or `slim.planning.zero_memory.Zero`, which
allocates the memory that DeepSpeed does. Autocast is that of a CPU, with layer norms in bf16; a GPU computes them in
fp32 (in our trials a difference of up to 2 % of the peak).

Legend: T frames of a sample; P patches that hold brain; V voxels of a patch; X, Y, Z voxels of the grid.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import torch
from einops import rearrange

from shards.format.grid import Grid
from slim.config import PretrainSettings
from slim.data.collate import collate
from slim.data.masking import draw
from slim.data.samples import Sample, cell_sizes
from slim.model import ragged_ops
from slim.model.geometry import Geometry, geometry_of
from slim.model.inputs import Batch
from slim.planning import merging
from slim.planning.counting import Footprint
from slim.planning.zero_memory import Plain
from slim.pretrain.learner import PretrainLearner
from slim.pretrain.objective import Objective

Drive = Callable[[PretrainSettings, torch.nn.Module, Footprint], Plain]
_APART = 20.0  # seconds from window to window


@dataclass(frozen=True)
class Cost:
    """Memory, FLOPs and calls of one process.

    Attributes
    ----------
    parameters : dict
        Number of parameters of `encoder`, `predictor` and `target` (the EMA encoder).
    tokens : dict
        Mean tokens of a sample: in the dense `grid`, with `brain`, and in the `context`.
    peak_memory_bytes, memory_parts : int, dict
        Peak memory of an optimizer step, and its parts.
    step_flops, flops_parts : int, dict
        FLOPs of an optimizer step with all its micro-batches, and of each part.
    step_calls, calls_parts : int, dict
        Calls of an optimizer step with all its micro-batches, and of each part; see `slim.planning.counting`.

    The parts are `states` (weights, moments, target, running means), `gradients`, `batch` (values and plans),
    `targets`, `encoder` (of the context), `predictor` (and losses), `backward` (with recomputation), `optimizer` and
    `means` (and the EMA).
    """

    parameters: dict[str, int]
    tokens: dict[str, int]
    peak_memory_bytes: int
    memory_parts: dict[str, int]
    step_flops: int
    flops_parts: dict[str, int]
    step_calls: int
    calls_parts: dict[str, int]


def cost(
    settings: PretrainSettings,
    grid: Grid | None = None,
    frames: int = 5,
    brain_XYZ: np.ndarray | None = None,
    dense: bool = False,
    drive: Drive = Plain,
    on_gpu: bool = False,
    all_context: bool = False,
) -> Cost:
    """Count a step of a configuration. Its data are not read.

    Parameters
    ----------
    settings : PretrainSettings
    grid : Grid, optional
        Grid of the data; by default the default grid.
    frames : int
        Number of frames of a window.
    brain_XYZ : bool (X, Y, Z), optional
        Brain mask on the grid; by default the MNI152 mask.
    dense : bool
        For comparison: count the whole grid as brain and as context.
    drive : callable
        Class that updates the weights: `slim.planning.zero_memory.Plain` or `Zero`.
    on_gpu : bool
        Count attention as a GPU computes it in half precision: one call, without padding.
    all_context : bool
        Count the whole brain as the context.

    Raises
    ------
    ConfigError
        If the model's units do not fit the grid.
    """
    return detailed(settings, grid, frames, brain_XYZ, dense, drive, on_gpu, all_context)[0]


def detailed(
    settings: PretrainSettings,
    grid: Grid | None = None,
    frames: int = 5,
    brain_XYZ: np.ndarray | None = None,
    dense: bool = False,
    drive: Drive = Plain,
    on_gpu: bool = False,
    all_context: bool = False,
) -> tuple[Cost, Footprint]:
    """As `cost`, and also return the counts."""
    grid = grid or Grid()
    geometry = geometry_of(settings.model, (settings.windows.k * frames, *grid.patch_shape))
    if dense:
        brain_XYZ = np.ones(grid.shape, bool)
    elif brain_XYZ is None:
        brain_XYZ = mni_brain(grid)
    batch = make_batch(settings, geometry, brain_XYZ, dense or all_context)
    found, learner = count(settings, geometry, batch, drive, on_gpu)

    def parameters(module: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    assert batch.context is not None
    model, samples = learner.model, len(batch.keys)
    told = Cost(
        {"encoder": parameters(model.encoder), "predictor": parameters(model.predictor)}
        | {"target": parameters(learner.target.encoder)},
        {"grid": prod(geometry.tokens)}
        | {"brain": len(batch.whole.row_N) // samples, "context": len(batch.context.row_N) // samples},
        found.peak,
        dict(+found.at_peak),
        found.flops.total(),
        dict(+found.flops),
        found.calls.total(),
        dict(+found.calls),
    )
    return told, found


def mni_brain(grid: Grid) -> np.ndarray:
    """The MNI152 brain mask on a grid, bool (X, Y, Z)."""
    import nibabel as nib  # takes seconds together with nilearn, and is not needed if a mask is given
    from nilearn.datasets import load_mni152_brain_mask
    from nilearn.image import resample_to_img

    space = nib.Nifti1Image(np.zeros(grid.shape, np.uint8), grid.affine)
    mask = resample_to_img(load_mni152_brain_mask(), space, "nearest", force_resample=True, copy_header=True)
    return np.asarray(mask.dataobj).astype(bool)


def brain_patches(geometry: Geometry, brain_XYZ: np.ndarray) -> np.ndarray:
    """The brain mask of every patch of the grid, bool (P, V)."""
    edges = dict(zip("abc", np.divide(brain_XYZ.shape, geometry.tokens[1:]).astype(int).tolist(), strict=True))
    return rearrange(brain_XYZ, "(x a) (y b) (z c) -> (x y z) (a b c)", **edges)


def make_batch(
    settings: PretrainSettings, geometry: Geometry, brain_XYZ: np.ndarray, all_context: bool = False
) -> Batch:
    """A micro-batch as from a loading process: samples with different masks, and values of zero."""
    frames, brain_PV = geometry.tokens[0], brain_patches(geometry, brain_XYZ)
    place = np.flatnonzero(brain_PV.any(axis=1))
    brain_PV = brain_PV[place].astype(np.uint8)
    value_TPV, still_PV = np.zeros((frames, *brain_PV.shape), np.float16), np.zeros(brain_PV.shape, np.float32)
    window, frame = np.divmod(np.arange(frames), frames // settings.windows.k)
    second = (window * _APART + frame).astype(np.float32)
    samples = []
    for number in range(settings.run.batch):
        key = f"sample {number}"
        mask = draw(cell_sizes(geometry, place), settings.mask, settings.run.seed, 0, key)
        if all_context:
            mask = replace(mask, context_K=np.arange(prod(geometry.cells)))
        samples.append(Sample(key, 0, value_TPV, still_PV, still_PV, brain_PV, place, second, mask))
    return collate(samples, geometry, settings.tokens_at_once)


@contextmanager
def _attention_of_a_gpu() -> Iterator[None]:
    """Attend to segments of different lengths where only the device is in the way."""
    before = ragged_ops.has_varlen
    ragged_ops.has_varlen = ragged_ops.fits_varlen
    try:
        yield
    finally:
        ragged_ops.has_varlen = before


def _merged(batch: Batch, found: Footprint, learner: PretrainLearner) -> Batch:
    """A batch whose chunks are merged; the encoders tell the footprint for how many chunks the present one stands."""
    assert batch.context is not None
    whole, context = (
        merging.merge(plan, encoder, found)
        for plan, encoder in ((batch.whole, learner.target.encoder), (batch.context, learner.model.encoder))
    )
    return replace(batch, whole=whole, context=context)


def count(
    settings: PretrainSettings,
    geometry: Geometry,
    batch: Batch,
    drive: Drive = Plain,
    on_gpu: bool = False,
    merged: bool = True,
) -> tuple[Footprint, PretrainLearner]:
    """Count a step on a micro-batch; also returns the learner, with fake tensors of floats.

    With `merged`, many chunks are counted as a few; see `slim.planning.merging`.
    """
    packed = batch.pack()  # as a loading process sends it
    with torch.device("meta"):
        model = Objective(settings, geometry, batch.brain_QV.shape[1])
    with Footprint() as found, _attention_of_a_gpu() if on_gpu else nullcontext():
        model.to_empty(device="cpu")
        with warnings.catch_warnings():  # copying a fake module reads the address of its data
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor", UserWarning)
            learner = PretrainLearner(settings, model)
        driver = drive(settings, model, found)
        with found.called("batch"):
            batch = packed.to("cpu")
            batch.brain_QV = found.add(batch.brain_QV)
            batch.voxels = replace(batch.voxels, **{name: found.add(v) for name, v in vars(batch.voxels).items()})
        if merged:
            batch = _merged(batch, found, learner)
        for part, module in (("targets", learner.target.encoder), ("encoder", model), ("predictor", model.predictor)):
            module.register_forward_pre_hook(lambda *_, part=part: setattr(found, "part", part))
        found.restart()

        micro_batches = min(settings.run.accumulate, 2)  # a third costs as much as the second: gradients exist already
        for number in range(micro_batches):
            with found.called("targets"):  # the hooks set the names of the other parts
                losses = learner.losses(batch, 0)
            with found.called("backward"):
                losses.total.backward()
                driver.reduce(number == micro_batches - 1)
        with found.called("optimizer"):
            driver.step()
        with found.called("means"):
            learner.commit(0, 2, full=driver.whole)
    for counts in (found.flops, found.calls, found.waits):
        for part in counts.keys() - {"optimizer", "means"}:
            counts[part] = counts[part] * settings.run.accumulate // micro_batches
    return found, learner
