"""Integrated gradients: divide a prediction into shares of voxels and frames.

    score = fit_score(features, task.pooling, task.components, fold, output=1)      # the probe, as one function
    found = integrated_gradients(model, dataset, session, score)                    # shares of its value

After Sundararajan, Taly & Yan, "Axiomatic Attribution for Deep Networks", ICML 2017. On the straight path from a start
x' to the session x, the share of voxel i is (x_i - x'_i) times the mean of df/dx_i. The sum of all shares is
f(x) - f(x'). Here f is the score of a linear probe on pooled tokens of the encoder. There are two starts:

- `still`: every voxel is at its mean over the scan (fluctuation 0), with the anatomy. The shares then explain the
  effect of the fluctuation.
- `empty`: the anatomy is removed, too (baseline 0, the mean over the brain), and has its own shares.

The spread of each voxel, by which its fluctuation is divided in the voxel view, is not changed.

The score may depend on all windows of a session, as a correlation over time does, but a gradient through the encoder
fits into memory only for one group of k windows. Each point of the path therefore needs two passes: first all tokens
without gradients, which give the gradient of the score; then, for each group, the product of this gradient and the
Jacobian of the group. The device holds one group; the CPU memory holds the windows of the session twice, as float16 and
as a float32 sum.

Legend: S time slots (s of one group), L places, C channels of a session's tokens; K windows in time order; F frames; M
patches; V voxels of a patch; R = frames of a group x M rows of voxel values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from shards.core.errors import ConfigError
from shards.format.reader import Dataset
from shards.format.session_record import SessionRecord
from slim.data.collate import collate
from slim.data.samples import read_windows, window_groups
from slim.explain.differentiable_probe import Score
from slim.explain.explanation import Start
from slim.inference.slim_brain import SlimBrain

TOLERANCE = 0.02  # share of f(x) - f(x'), or of the SD of the score over training sessions if that is larger
_FEWEST, MOST = 16, 256  # number of points of the path, doubled until the tolerance is met


@dataclass
class Attribution:
    """The score of one session, divided into shares.

    Attributes
    ----------
    key : str
        Key of the session.
    score, at_start : float
        f(x) and f(x').
    points : int
        Number of points of the path.
    allowed : float
        Largest gap that counts as complete.
    value_KFMV : float32 array
        Share of every voxel in every frame of every kept window; 0 outside the brain.
    anatomy_MV : float32 array
        Share of the mean of every voxel over the scan; zeros for the start `still`.
    patch_M3 : int array
        Position of each patch in the grid of patches.
    start_K : int array
        First frame of each window, in time order.
    """

    key: str
    score: float
    at_start: float
    points: int
    allowed: float
    value_KFMV: np.ndarray
    anatomy_MV: np.ndarray
    patch_M3: np.ndarray
    start_K: np.ndarray

    @property
    def total(self) -> float:
        """Sum of all shares, which should be `score - at_start`."""
        return float(self.value_KFMV.sum(dtype=np.float64) + self.anatomy_MV.sum(dtype=np.float64))

    @property
    def gap(self) -> float:
        """Difference of the sum of all shares from `score - at_start`."""
        return self.total - (self.score - self.at_start)

    @property
    def complete(self) -> bool:
        """Whether the path had enough points."""
        return abs(self.gap) <= self.allowed


class _Groups:
    """A session in groups of k windows, with the slots of each group, as in `SlimBrain.encode_session`."""

    def __init__(self, model: SlimBrain, dataset: Dataset, session: SessionRecord):
        model.require_dropped("an explanation")
        self.model, k, count = model, model.settings.windows.k, session.n_kept
        arrays = dataset.read(session, ("start", "patch"))
        in_time = np.argsort(arrays["start"], kind="stable")
        self.start_K, self.patch_M3 = arrays["start"][in_time], arrays["patch"]
        self.groups = window_groups(count, k)
        geometry = model.geometry
        window_S = geometry.window_of_slot(model.frames, min(count, k))
        self.batches, self.fresh = [], []
        for group in self.groups:
            sample = read_windows(dataset, session, in_time[group.windows].tolist())
            self.batches.append(collate([sample], geometry, model.settings.tokens_at_once).pack())
            self.fresh.append(torch.from_numpy(window_S >= group.repeated))
        cell_M = self.batches[0].to("cpu").whole.cell_M.numpy()
        self.places = np.unique(cell_M % math.prod(geometry.cells[1:]))
        self.shape = (min(count, k), model.frames, len(self.patch_M3), dataset.grid.voxels)

    def tokens(self, group: int, alpha: float, anatomy: float, leaves: list[Tensor] | None = None) -> Tensor:
        """Tokens (s, L, C) of the slots of a group, for its fluctuation times alpha and its baseline times anatomy.

        The inputs, (R, V) and (M, V), are added to `leaves`, if given, and have gradients.
        """
        batch = self.batches[group].to(self.model.device)
        inputs = [alpha * batch.voxels.value_RV.float(), anatomy * batch.voxels.baseline_QV]
        if leaves is not None:
            leaves += [tensor.requires_grad_() for tensor in inputs]
        voxels = replace(batch.voxels, value_RV=inputs[0], baseline_QV=inputs[1])
        x_MC = self.model.encoder(voxels, batch.whole).float()
        x_SLC = x_MC[batch.whole.cell_M.long().argsort()].unflatten(0, (len(self.fresh[group]), -1))
        return x_SLC[self.fresh[group].to(x_SLC.device)]

    def windows(self, group: int) -> slice:
        """The range of a group in the K windows."""
        return self.groups[group].windows

    def times_value(self, slope_KFMV: np.ndarray) -> np.ndarray:
        """Multiply slopes by the fluctuation. Windows in two groups are counted once."""
        product_KFMV = np.empty_like(slope_KFMV)
        for group, batch in enumerate(self.batches):
            here = self.windows(group)
            product_KFMV[here] = slope_KFMV[here] * batch.voxels.value_RV.float().numpy().reshape(self.shape)
        return product_KFMV

    def times_baseline(self, slope_MV: np.ndarray) -> np.ndarray:
        """Multiply slopes by the means over the scan."""
        return slope_MV * self.batches[0].voxels.baseline_QV.numpy()


class _Path:
    """The straight path from a start (alpha 0) to a session (alpha 1), and the sum of the score's gradients on it."""

    def __init__(self, groups: _Groups, score: Score, start: Start):
        self.groups, self.score, self.takes_anatomy = groups, score, start == "empty"
        self.at_L = torch.from_numpy(np.searchsorted(groups.places, score.places)).to(groups.model.device)
        self.sum_KFMV = np.zeros((len(groups.start_K), *groups.shape[1:]), np.float32)
        self.sum_MV = np.zeros(groups.shape[2:], np.float32)

    def _anatomy(self, alpha: float) -> float:
        return alpha if self.takes_anatomy else 1.0

    def _tokens(self, alpha: float) -> list[Tensor]:
        """All tokens, group by group, without gradients."""
        with torch.no_grad():
            return [self.groups.tokens(g, alpha, self._anatomy(alpha)) for g in range(len(self.groups.batches))]

    def score_at(self, alpha: float) -> float:
        """The score at a point."""
        with torch.no_grad():
            return float(self.score(torch.cat(self._tokens(alpha))[:, self.at_L]))

    def add(self, alpha: float, weight: float) -> None:
        """Add the gradients at a point, times a weight."""
        parts = self._tokens(alpha)
        token_SLC = torch.cat(parts).requires_grad_()
        (slope_SLC,) = torch.autograd.grad(self.score(token_SLC[:, self.at_L]), token_SLC)
        for group, slope_sLC in enumerate(slope_SLC.split([len(part) for part in parts])):
            if not slope_sLC.any():
                continue  # the score does not depend on this group
            leaves: list[Tensor] = []
            reached_sLC = self.groups.tokens(group, alpha, self._anatomy(alpha), leaves)
            slopes = torch.autograd.grad(reached_sLC, leaves if self.takes_anatomy else leaves[:1], slope_sLC)
            here_KFMV = slopes[0].cpu().numpy().reshape(self.groups.shape)
            self.sum_KFMV[self.groups.windows(group)] += weight * here_KFMV
            if self.takes_anatomy:
                self.sum_MV += weight * slopes[1].cpu().numpy()

    def shares(self, points: int) -> tuple[np.ndarray, np.ndarray]:
        """Shares (K, F, M, V) of the fluctuation and (M, V) of the anatomy, after this number of points."""
        mean_KFMV, mean_MV = self.sum_KFMV / np.float32(points), self.sum_MV / np.float32(points)
        return self.groups.times_value(mean_KFMV), self.groups.times_baseline(mean_MV)


def check_start(model: SlimBrain, start: str) -> None:
    """Check that the start `empty` is only used if the view of the model includes anatomy.

    Raises
    ------
    ConfigError
    """
    if start == "empty" and model.settings.view == "voxel":
        raise ConfigError("start", "", "empty", "still, because the view of this model (voxel) has no anatomy")


def integrated_gradients(
    model: SlimBrain,
    dataset: Dataset,
    session: SessionRecord,
    score: Score,
    start: Start = "still",
    tolerance: float = TOLERANCE,
    most: int = MOST,
) -> Attribution:
    """Divide the score of a session into shares of its voxels and frames.

    The integral is computed with the trapezoidal rule in u from 0 to 1, with alpha = u^2, because poolings that do not
    depend on the scale of the fluctuation, such as correlations, change most near the start. The number of points is
    doubled, and earlier points are used again, until the shares add up to f(x) - f(x') within the tolerance.

    Parameters
    ----------
    model : SlimBrain
    dataset : Dataset
    session : dict
        A line of `dataset.sessions`.
    score : Score
    start : "still" or "empty"
        Start of the path; see above.
    tolerance : float
        Largest gap, as a share of the difference or of the SD of the score over training sessions, whichever is larger.
    most : int
        Largest number of points. The gap may then exceed the tolerance.

    Raises
    ------
    ConfigError
        If `start` is `empty` and the view of the model has no anatomy.
    """
    check_start(model, start)
    path = _Path(_Groups(model, dataset, session), score, start)
    at_start, at_end = path.score_at(0.0), path.score_at(1.0)
    allowed = tolerance * max(abs(at_end - at_start), score.sd)
    points, new = _FEWEST, np.arange(1, _FEWEST + 1) / _FEWEST
    while True:
        for u in new:
            path.add(u**2, 2 * u * (0.5 if u == 1 else 1.0))  # at u = 0 the weight is 0
        value_KFMV, anatomy_MV = path.shares(points)
        found = Attribution(
            key=session.key,
            score=at_end,
            at_start=at_start,
            points=points,
            allowed=allowed,
            value_KFMV=value_KFMV,
            anatomy_MV=anatomy_MV,
            patch_M3=path.groups.patch_M3,
            start_K=path.groups.start_K,
        )
        if found.complete or 2 * points > most:
            return found
        new = (np.arange(points) + 0.5) / points
        points *= 2
