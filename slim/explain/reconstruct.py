"""Predict a scan from itself: every place of the brain is hidden once and predicted from the other places.

The places (cells of the encoder's last stage that hold brain) are dealt to `passes` groups. In each pass one group is
hidden in all frames: the encoder gets the other places, and the predictor and the MAE head, as in pretraining, give the
z-scored voxels of the hidden ones. The mean and the SD of each voxel over the scan turn them into the units of the
scan. They come from the scan itself, hidden or not, so only the fluctuation of a voxel is predicted.

Legend: T frames of the harmonised scan; N its brain voxels; W windows; S slots; L places; P patches; V voxels of a
patch; K windows of a sample; F frames of a window; G rebuilt targets; E tokens of a cell; R rows of voxel values; M
those of rebuilt targets.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from shards.cohorts.scan import RunSource
from shards.conversion.session import assumptions
from shards.core.errors import ConfigError, RunRefused
from shards.core.extras import require
from shards.core.progress import progress
from shards.format.manifest import DataRecord
from shards.format.patches import gather, voxel_slots
from shards.format.session_record import ScanFacts
from shards.format.stream import generator
from shards.preprocessing.harmonise import Harmonised, harmonise, place
from slim.checkpoints import checkpoint, weights
from slim.checkpoints.weights import Weights
from slim.config import KINDS, PretrainSettings
from slim.data.collate import collate
from slim.data.masking import Mask
from slim.data.samples import Sample, cell_sizes, window_groups
from slim.explain.scan_space import ScanSpace
from slim.inference.cores import spread
from slim.inference.preprocessing import scan_settings
from slim.model.embedding import STILL
from slim.model.geometry import Geometry, geometry_of
from slim.model.inputs import Batch
from slim.pretrain.objective import Objective
from slim.pretrain.start import tensors_of
from slim.training.reshard import states_of

PASSES = 4
_HIDDEN = KINDS.index("cross_location")


@dataclass(frozen=True)
class Reconstructor:
    """A pretrained model with its MAE head.

    Attributes
    ----------
    model : Objective
    settings : PretrainSettings
    data : DataRecord
        Of the training data.
    about : Weights
    geometry : Geometry
    device : torch.device
    """

    model: Objective
    settings: PretrainSettings
    data: DataRecord
    about: Weights
    geometry: Geometry
    device: torch.device

    @classmethod
    def from_pretrained(cls, source: str | Path, device: torch.device | str = "cpu") -> Reconstructor:
        """Load an encoder with its predictor and MAE head.

        Parameters
        ----------
        source : str or Path
            A pretraining run (its newest complete checkpoint is used), one of its checkpoints, or an export with the
            predictor: a folder, or its name on the hub.
        device : torch.device or str

        Raises
        ------
        CheckpointError, ConfigError
            If the weights are damaged, or have no MAE head: those of a fine-tuning, of an export without the
            predictor, or of a run that was trained without the MAE term.
        """
        about = weights.find(source)
        settings = about.settings
        if not isinstance(settings, PretrainSettings):
            got = "a fine-tuned model, which has no MAE head"
            raise ConfigError(source, "", got, "a pretraining run", "Use the run that was fine-tuned")
        if not settings.loss_weights[2]:
            got = f"{settings.objective} without the MAE term, so there is no MAE head"
            hint = "Use a run with objective=default or objective=mae"
            raise ConfigError(source, "objective", got, "a run that was trained with the MAE term", hint)
        grid, frames = about.data.grid.grid(), about.data.windows.frames
        geometry = geometry_of(settings.model, (settings.windows.k * frames, *grid.patch_shape))
        with torch.random.fork_rng(devices=[]):
            model = Objective(settings, geometry, grid.voxels)
        about.load_into(model.encoder)
        tensors, where = _predictor(about, source)
        weights.fit(model.predictor, tensors, where, "")
        model = model.eval().requires_grad_(False).to(device)
        return cls(model, settings, about.data, about, geometry, torch.device(device))

    def rebuilt(self, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
        """Predict the rebuilt targets of one masked sample; see `hidden`."""
        return self.hidden(collate([sample], self.geometry, self.settings.tokens_at_once).to(self.device))

    @torch.no_grad()
    def hidden(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Predict the rebuilt targets of a batch with context and targets, as the MAE term of the loss does.

        Returns
        -------
        row_M : int array
            Rows of the batch's table of voxel values, one for each brain token of a rebuilt target.
        z_MV : float32 array
            Their voxels, z-scored.
        """
        assert batch.context is not None and batch.targets is not None
        head, voxels = self.model.predictor.rebuild, batch.brain_QV.shape[1]
        assert head is not None
        with torch.autocast(batch.brain_QV.device.type, torch.bfloat16, enabled=self.model.bf16):
            out_GW = self.model.predictor(self.model.encoder(batch.voxels, batch.context), batch)
            out_GW = out_GW[batch.targets.rebuilt_G]
            cells = self.model.rebuilt_at_once or max(1, len(out_GW))
            parts = [head(part_GW).float() for part_GW in out_GW.split(cells)]
        z_GEV = torch.cat(parts).view(len(out_GW), -1, voxels)
        known_GE = batch.targets.value_GE >= 0
        return batch.targets.value_GE[known_GE].cpu().numpy(), z_GEV[known_GE].cpu().numpy()


def _predictor(about: Weights, source: str | Path) -> tuple[dict[str, Tensor], Path]:
    """The tensors of a predictor, and where they are from."""
    if about.predictor is not None:
        return checkpoint.read_weights(about.predictor), about.predictor
    if about.path.name != checkpoint.WEIGHTS:
        got, run = "an export without the predictor", about.made["run"]
        hint = f"Use the run that was exported, {run}, or export it again with --predictor"
        raise ConfigError(source, weights.PREDICTOR, got, "a pretraining run, or an export with the predictor", hint)
    require("deepspeed")
    found = tensors_of(about, states_of(about.path.parent))
    prefix = "predictor."
    tensors = {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
    return tensors, about.path.parent


def deal(size_SL: np.ndarray, passes: int, seed: int) -> np.ndarray:
    """Deal the places with brain to the passes, in random order, so that each pass gets equally many, up to one.

    Returns
    -------
    int array (L,)
        The pass in which each place is hidden; -1 without brain.
    """
    places = np.flatnonzero(size_SL.any(axis=0))
    if not 2 <= passes <= len(places):
        expected = f"2 to {len(places)}, the places of this brain"
        raise ConfigError("command line", "--passes", passes, expected)
    pass_L = np.full(size_SL.shape[1], -1)
    pass_L[generator(seed, "reconstruct").permutation(places)] = np.arange(len(places)) % passes
    return pass_L


def hide(size_SL: np.ndarray, pass_L: np.ndarray, number: int) -> Mask:
    """The mask of a pass: its places are hidden and rebuilt in all slots, the others are the context."""
    exists = size_SL > 0
    target_K = np.flatnonzero(exists & (pass_L == number))
    context_K = np.flatnonzero(exists & (pass_L != number))
    return Mask(context_K, target_K, np.full(len(target_K), _HIDDEN), np.ones(len(target_K), bool))


@dataclass(frozen=True)
class Reconstruction:
    """A scan and its prediction, on the model's grid and TR.

    Attributes
    ----------
    scan : Harmonised
    predicted_TN : float32 array
        In the units of the scan; the mean of a voxel in frames that were not predicted.
    exists_T : bool array
        Frames that were predicted.
    explained_N : float32 array
        Share of each voxel's variance that is explained; see `explained_variance`.
    space : ScanSpace
    places, passes, seed : int
        Number of places, of passes, and the seed by which they were dealt.
    """

    scan: Harmonised
    predicted_TN: np.ndarray
    exists_T: np.ndarray
    explained_N: np.ndarray
    space: ScanSpace
    places: int
    passes: int
    seed: int


def reconstruct(ours: Reconstructor, run: RunSource, passes: int = PASSES, seed: int = 0) -> Reconstruction:
    """Predict all windows of a scan, in time order, and show the progress.

    Parameters
    ----------
    ours : Reconstructor
    run : RunSource
        The scan; see `shards.cohorts.niimg.as_run`.
    passes : int
        Number of groups of places; each is hidden once.
    seed : int
        Determines the groups.

    Raises
    ------
    RunRefused
        If the scan cannot be converted, or is shorter than a window.
    ConfigError
        If there are not enough places for so many passes.
    """
    chosen = scan_settings(ours.data, ours.about.folder)
    with threadpool_limits(1):  # as in the worker processes of a conversion, so that sums are equal
        placed = place(run, chosen.grid, chosen.mask, chosen.clean)
        scan = harmonise(run, chosen.grid, chosen.mask, chosen.clean)
    frames = chosen.windows.frames
    windows = len(scan.raw_TN) // frames
    measured_W = np.flatnonzero(~scan.repeated_T[: windows * frames].reshape(windows, frames).any(axis=1))
    if not len(measured_W):
        got = f"no window of {frames} frames at TR {scan.tr:g} s without copies of volumes"
        raise RunRefused(run.source, "frames", got, "1 or more", "The scan is too short")
    samples = _Samples.of(scan, chosen.grid.grid().patch_shape, frames)
    pass_L = deal(cell_sizes(ours.geometry, samples.place_P), passes, seed)
    mean_N, variance_N = scan.moments
    predicted_TN = np.tile(mean_N.astype(np.float32), (len(scan.raw_TN), 1))
    exists_T = np.zeros(len(scan.raw_TN), bool)
    sd_N = np.where(samples.spread_PV.ravel()[samples.slot_N] > STILL, np.sqrt(variance_N), 0).astype(np.float32)
    groups = window_groups(len(measured_W), ours.settings.windows.k)
    with progress("reconstruct", len(groups) * passes, "passes") as advance:
        for group in groups:
            start_K = measured_W[group.windows] * frames
            sample = samples.at(scan, start_K)
            z_RV = np.zeros((len(sample.second) * len(sample.place), sample.spread.shape[1]), np.float32)
            size_SL = cell_sizes(ours.geometry, sample.place, len(sample.second))
            masked = [replace(sample, mask=hide(size_SL, pass_L, turn)) for turn in range(passes)]
            for row_M, z_MV in spread(ours.rebuilt, masked, passes if ours.device.type == "cpu" else 1):
                z_RV[row_M] = z_MV
            advance(passes, "")
            fluctuation_KFN = z_RV.reshape(len(start_K), frames, -1)[:, :, samples.slot_N] * sd_N
            for start, fluctuation_FN in list(zip(start_K, fluctuation_KFN, strict=True))[group.repeated :]:
                predicted_TN[start : start + frames] += fluctuation_FN
                exists_T[start : start + frames] = True
    explained_N = explained_variance(scan.raw_TN[exists_T], predicted_TN[exists_T])
    space = ScanSpace.of(placed, scan, chosen.grid.grid(), exists_T)
    places = int(np.count_nonzero(pass_L >= 0))
    return Reconstruction(scan, predicted_TN, exists_T, explained_N, space, places, passes, seed)


def explained_variance(value_TN: np.ndarray, predicted_TN: np.ndarray) -> np.ndarray:
    """1 - sum of squared errors / sum of squares around the mean, of each voxel, float32 (N,); 0 if it is constant."""
    mean_N = value_TN.mean(axis=0, dtype=np.float64)
    error_N, square_N = np.zeros((2, value_TN.shape[1]))
    for value_N, guess_N in zip(value_TN, predicted_TN, strict=True):
        error_N += (value_N.astype(np.float64) - guess_N) ** 2
        square_N += (value_N - mean_N) ** 2
    varies_N = square_N > 0
    return np.where(varies_N, 1 - error_N / np.where(varies_N, square_N, 1), 0).astype(np.float32)


@dataclass(frozen=True)
class _Samples:
    """What all samples of a scan have in common."""

    baseline_PV: np.ndarray
    spread_PV: np.ndarray
    brain_PV: np.ndarray
    place_P: np.ndarray
    slot_N: np.ndarray
    frames: int

    @classmethod
    def of(cls, scan: Harmonised, patch_shape: tuple[int, int, int], frames: int) -> _Samples:
        brain_PV = gather(scan.brain_XYZ.astype(np.uint8), scan.patch_P3, scan.edge)
        place_P = np.ravel_multi_index(tuple(scan.patch_P3.T.astype(np.intp)), patch_shape)
        slot_N = voxel_slots(scan.brain_XYZ, scan.patch_P3, scan.edge)
        return cls(scan.baseline_PV, scan.spread_PV, brain_PV, place_P, slot_N, frames)

    def at(self, scan: Harmonised, start_K: np.ndarray) -> Sample:
        """The windows that begin at these frames, in time order."""
        value_KFPV = scan.windows(start_K, self.frames)
        second = (start_K[:, None] + np.arange(self.frames)) * scan.tr
        value_TPV = value_KFPV.reshape(-1, *value_KFPV.shape[2:])
        fixed = (self.baseline_PV, self.spread_PV, self.brain_PV, self.place_P)
        return Sample("", 0, value_TPV, *fixed, second.ravel().astype(np.float32))


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Facts about a reconstruction, as `reconstruction.json` has them.

    Attributes
    ----------
    run, step : str, int
        The weights.
    median, percentile_5, percentile_95, share_above_0 : float
        Of the explained variance of the brain voxels of the model's grid, over the frames that were predicted.
    voxels, places, passes, seed : int
        Number of these voxels, of places, of passes, and the seed by which the places were dealt.
    volumes, volumes_predicted : int
    volumes_not_predicted : list of [int, int]
        First and last volume of each gap. They hold the mean of each voxel over the scan: they were dropped at the
        start, fill no window at the end, or lie in a window with copies of an earlier volume.
    outside_the_brain : float
        Value of the voxels outside the brain.
    grid_mm, tr, source_tr : float
        Voxel edge and TR of the model's grid, and TR of the scan, in mm and s.
    interpolation_in_space, interpolation_in_time, units : str
    assumed : list of str
        What was assumed about the scan.
    """

    run: str
    step: int
    median: float
    percentile_5: float
    percentile_95: float
    share_above_0: float
    voxels: int
    places: int
    passes: int
    seed: int
    volumes: int
    volumes_predicted: int
    volumes_not_predicted: list[list[int]]
    outside_the_brain: float
    grid_mm: float
    tr: float
    source_tr: float
    interpolation_in_space: str
    interpolation_in_time: str
    units: str
    assumed: list[str]


def summarise(found: Reconstruction, ours: Reconstructor) -> Summary:
    """The facts about a reconstruction."""
    explained_N, scan, exists_J = found.explained_N, found.scan, found.space.exists_J
    facts = ScanFacts.model_validate({**scan.facts, "tr": scan.tr, "source_tr": scan.source_tr})
    low, median, high = (float(value) for value in np.percentile(explained_N, [5, 50, 95]))
    is_aligned = bool((found.space.weight_SN.data == 1).all())
    return Summary(
        run=ours.about.made["run"],
        step=ours.about.made["step"],
        median=median,
        percentile_5=low,
        percentile_95=high,
        share_above_0=float((explained_N > 0).mean()),
        voxels=len(explained_N),
        places=found.places,
        passes=found.passes,
        seed=found.seed,
        volumes=len(exists_J),
        volumes_predicted=int(exists_J.sum()),
        volumes_not_predicted=_ranges(np.flatnonzero(~exists_J)),
        outside_the_brain=0.0,
        grid_mm=ours.data.grid.grid().mm,
        tr=scan.tr,
        source_tr=scan.source_tr,
        interpolation_in_space="none: the grids are aligned" if is_aligned else "linear, among brain voxels",
        interpolation_in_time="none" if scan.tr == scan.source_tr else "cubic B-spline",
        units=f"those of the scan{f', after cleaning ({facts.cleaned})' if facts.cleaned else ''}",
        assumed=assumptions(facts.model_copy(update={"dead_share": 0})),
    )


def _ranges(number_M: np.ndarray) -> list[list[int]]:
    """Numbers in ascending order, as [first, last] of each run of consecutive ones."""
    if not len(number_M):
        return []
    parts = np.split(number_M, np.flatnonzero(np.diff(number_M) > 1) + 1)
    return [[int(part[0]), int(part[-1])] for part in parts]
