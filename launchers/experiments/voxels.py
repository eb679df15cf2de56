"""A rival without an encoder: principal components of the voxels of the kept windows, and their correlations.

It reads the same frames and voxels as the encoder, and learns nothing but the directions of largest variance.

Legend: N sessions; T frames of the kept windows; V voxels that are brain in all sessions; Q components; E pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from sklearn.decomposition import PCA

from launchers.experiments.comparison import Question
from shards.format.reader import Dataset
from shards.format.session_record import SessionRecord
from slim.evaluation import baselines
from slim.evaluation.linear import Linear
from slim.evaluation.results import Draws
from slim.model.pooling import correlations

COMPONENTS = 64


class VoxelComponents:
    """Correlations over the kept frames between principal components of voxels, fitted on training sessions.

    Parameters
    ----------
    dataset : Dataset
    sessions : list of SessionRecord
        The session of each row.
    components : int
    """

    def __init__(self, dataset: Dataset, sessions: Sequence[SessionRecord], components: int = COMPONENTS):
        self.components = components
        values, numbers = [], []
        for session in sessions:
            arrays = dataset.read(session, ("windows", "spread", "brain", "patch"), range(session.n_kept))
            inside = arrays["brain"] > 0
            # A voxel in units of its SD over the scan, as the view `voxel` of an encoder has it.
            values.append((arrays["windows"][:, :, inside] / arrays["spread"][inside]).astype(np.float16))
            numbers.append(baselines.voxel_numbers(dataset, arrays))
        common = baselines.common_voxels(dataset, numbers)
        self._series = [
            value_KFW.reshape(-1, value_KFW.shape[2])[:, baselines.rows_of(number_W, common)]
            for value_KFW, number_W in zip(values, numbers, strict=True)
        ]
        self._fitted: tuple[np.ndarray, np.ndarray] | None = None

    def vectors(self, train: np.ndarray) -> np.ndarray:
        """The correlations of all rows, (N, E), with the components of the training rows, int (n,)."""
        if self._fitted is None or not np.array_equal(self._fitted[0], train):
            together_TV = np.concatenate([self._series[row] - self._mean(row) for row in train])
            axes = PCA(self.components, svd_solver="randomized", random_state=0).fit(together_TV.astype(np.float32))
            vector_NE = np.stack([self._correlations(row, axes.components_) for row in range(len(self._series))])
            self._fitted = train, vector_NE
        return self._fitted[1]

    def _mean(self, row: int) -> np.ndarray:
        return self._series[row].mean(axis=0, dtype=np.float32)

    def _correlations(self, row: int, axis_QV: np.ndarray) -> np.ndarray:
        score_TQ = self._series[row].astype(np.float32) @ axis_QV.T
        return correlations(torch.from_numpy(score_TQ).double()).float().numpy()


def draws(dataset: Dataset, questions: Sequence[Question]) -> Draws:
    """Draws of the rival by task; tasks of windows are left out, since its vectors are those of sessions."""
    found, made = {}, {}
    for question in questions:
        if question.task.type == "state":
            continue
        keys = tuple(session.key for session in question.cases.sessions)
        if keys not in made:
            made[keys] = VoxelComponents(dataset, question.cases.sessions)
        found[question.task.name] = question.draws(Linear(made[keys].vectors))
    return found
