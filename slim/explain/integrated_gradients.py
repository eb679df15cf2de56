"""Integrated gradients: the voxels, and the moments, that a prediction rests on.

    score = fit_score(features, task.pooling, task.components, fold, output=1)      # the probe, as one function
    found = integrated_gradients(model, dataset, session, score)                    # its value, taken apart

Sundararajan, Taly & Yan, "Axiomatic Attribution for Deep Networks", ICML 2017: along the straight path from a start x'
to the session x, voxel i is given (x_i - x'_i) times the mean of df/dx_i on the way, and all voxels together are given
f(x) - f(x'). Here f is the score of a linear probe behind a pooling of the encoder's tokens. The start is

- `still`: every voxel rests at its run mean (fluctuation 0) and the anatomy stays, so what is explained is what the
  fluctuation adds; or
- `empty`: the anatomy is taken away too (baseline 0, the mean over the brain), and has a share of its own.

Each voxel's spread, by which its fluctuation is divided in the voxel view, is a unit and stays as it is.

A score may need all windows of a session at once (a correlation over time does), a gradient through the encoder only
one group of k windows. So a point of the path takes two passes: all tokens without gradients, of which the score has a
gradient; then, group by group, that gradient times the Jacobian of the group. The device holds what one group needs;
the host holds the session's windows twice, as float16 and as a float32 sum.

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

TOLERANCE = 0.02  # of the difference that is taken apart, or of the SD of the score over training sessions if larger
_FEWEST, MOST = 16, 256  # points of the path, doubled until the tolerance is met


@dataclass
class Attribution:
    """A score of one session, taken apart.

    Attributes
    ----------
    key : the session's key
    score, at_start : f(x) and f(x')
    points : of the path
    allowed : largest gap that counts as complete
    value_KFMV : float32, share of every voxel in every frame of every kept window; 0 outside the brain
    anatomy_MV : float32, share of every voxel's run mean; zeros from `still`
    patch_M3 : place of each patch in the grid of patches
    start_K : first frame of each window, in time order
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
        """Sum of all shares; completeness says that it is `score - at_start`."""
        return float(self.value_KFMV.sum(dtype=np.float64) + self.anatomy_MV.sum(dtype=np.float64))

    @property
    def gap(self) -> float:
        """What the sum of the shares lacks (or has too much) of `score - at_start`."""
        return self.total - (self.score - self.at_start)

    @property
    def complete(self) -> bool:
        """Whether the path was walked finely enough."""
        return abs(self.gap) <= self.allowed


class _Groups:
    """A session in the groups of k windows, and with the slots of each, that `SlimBrain.encode_session` takes."""

    def __init__(self, model: SlimBrain, dataset: Dataset, session: SessionRecord):
        self.model, k, count = model, model.settings.windows.k, session.n_kept
        arrays = dataset.read(session, ("start", "patch"))
        in_time = np.argsort(arrays["start"], kind="stable")
        self.start_K, self.patch_M3 = arrays["start"][in_time], arrays["patch"]
        self.groups = window_groups(count, k)
        geometry = model.geometry
        window_S = geometry.window_of_slot(model.frames)
        self.batches, self.fresh = [], []
        for group in self.groups:
            sample = read_windows(dataset, session, in_time[group.windows].tolist())
            self.batches.append(collate([sample], geometry, model.settings.chunk_tokens).pack())
            self.fresh.append(torch.from_numpy(window_S >= group.repeated))
        cell_M = self.batches[0].to("cpu").whole.cell_M.numpy()
        self.places = np.unique(cell_M % math.prod(geometry.cells[1:]))
        self.shape = (k, model.frames, len(self.patch_M3), dataset.grid.voxels)

    def tokens(self, group: int, alpha: float, anatomy: float, leaves: list[Tensor] | None = None) -> Tensor:
        """Tokens (s, L, C) of a group's own slots, with its fluctuation times alpha and its baseline times anatomy.

        With `leaves`, the values that went in, (R, V) and (M, V), are put there and have gradients.
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
        """The windows of a group among the K."""
        return self.groups[group].windows

    def times_value(self, slope_KFMV: np.ndarray) -> np.ndarray:
        """Slopes times the fluctuation; windows that two groups share count once."""
        product_KFMV = np.empty_like(slope_KFMV)
        for group, batch in enumerate(self.batches):
            here = self.windows(group)
            product_KFMV[here] = slope_KFMV[here] * batch.voxels.value_RV.float().numpy().reshape(self.shape)
        return product_KFMV

    def times_baseline(self, slope_MV: np.ndarray) -> np.ndarray:
        """Slopes times the run means."""
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
                continue  # the score rests on other windows
            leaves: list[Tensor] = []
            reached_sLC = self.groups.tokens(group, alpha, self._anatomy(alpha), leaves)
            slopes = torch.autograd.grad(reached_sLC, leaves if self.takes_anatomy else leaves[:1], slope_sLC)
            here_KFMV = slopes[0].cpu().numpy().reshape(self.groups.shape)
            self.sum_KFMV[self.groups.windows(group)] += weight * here_KFMV
            if self.takes_anatomy:
                self.sum_MV += weight * slopes[1].cpu().numpy()

    def shares(self, points: int) -> tuple[np.ndarray, np.ndarray]:
        """Shares (K, F, M, V) of the fluctuation and (M, V) of the anatomy, after so many points."""
        mean_KFMV, mean_MV = self.sum_KFMV / np.float32(points), self.sum_MV / np.float32(points)
        return self.groups.times_value(mean_KFMV), self.groups.times_baseline(mean_MV)


def check_start(model: SlimBrain, start: str) -> None:
    """Refuse to take an anatomy away that the model does not see.

    Raises
    ------
    ConfigError
    """
    if start == "empty" and model.settings.view == "voxel":
        raise ConfigError("start", "", "empty", "still, as this model sees no anatomy (view: voxel)")


def integrated_gradients(
    model: SlimBrain,
    dataset: Dataset,
    session: SessionRecord,
    score: Score,
    start: Start = "still",
    tolerance: float = TOLERANCE,
    most: int = MOST,
) -> Attribution:
    """Take the score of a session apart into the shares of its voxels and frames.

    The path is walked in u from 0 to 1 with alpha = u^2, by the trapezoid rule: a pooling that forgets the size of the
    fluctuation, as a correlation does, changes most near the start. The number of points is doubled, and those that
    were taken are kept, until the shares sum to f(x) - f(x') within the tolerance.

    Parameters
    ----------
    model : SlimBrain
    dataset : Dataset
    session : dict
        A line of `dataset.sessions`.
    score : Score
    start : "still" or "empty"
        Where the path begins; see above.
    tolerance : float
        Largest gap, as a share of the difference or of the score's SD over training sessions, whichever is larger.
    most : int
        Points after which the path is given up; the gap tells how far the sum is off then.

    Raises
    ------
    ConfigError
        If `start` is `empty` and the model's view holds no anatomy.
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
