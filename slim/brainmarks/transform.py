"""From a sample of Brainmarks to a converted scan.

Legend: X, Y, Z voxels of the template; T frames; V voxels of its mask in the order of the suite; N the same voxels in C
order of (x, y, z).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import joblib
import numpy as np
from sklearn.utils.validation import check_memory
from threadpoolctl import threadpool_limits

from shards.cohorts.niimg import as_run
from shards.conversion.session import Converted, convert_run
from shards.core.errors import DatasetError
from shards.core.settings import digest
from slim import __version__
from slim.brainmarks.template import AFFINE, Template
from slim.brainmarks.token_model import TokenModel
from slim.inference.arrays import images_of
from slim.inference.encoding import assumed
from slim.inference.preprocessing import Recipe


@dataclass(frozen=True)
class Converter:
    """Converts samples as the training data of an encoder was converted: grid, TR, normalisation, ranked windows.

    A 2 mm grid is the lattice of the template moved by whole voxels, so nothing is interpolated in space. The TR is
    that of the sample, and no volume is dropped at the start: samples of the suite are cut out of runs.

    Attributes
    ----------
    recipe : Recipe
        `settings.windows.keep` is the number of most salient windows that are kept.
    template : Template
    memory : str or None
        Folder where joblib keeps what was converted.
    """

    recipe: Recipe
    template: Template
    memory: str | None = None

    def __call__(self, sample: Mapping[str, Any]) -> Converted:
        """Convert a sample: `bold` (T, V), z-scored over time, `mean` and `std` (1, V), and `tr` in s.

        Raises
        ------
        DatasetError
            If it has another number of voxels than the template.
        RunRefused
            If the scan cannot be converted.
        """
        convert = check_memory(self.memory).cache(_convert, ignore=["converter"])
        arrays = [np.asarray(sample[name], np.float32) for name in ("bold", "mean", "std")]
        return convert(self, None if self.memory is None else self._identity(), *arrays, float(sample["tr"]))

    def _identity(self) -> str:
        """What the result depends on besides the sample."""
        settings, ranker = self.recipe.settings.model_dump(mode="json"), self.recipe.ranker.identity()
        return digest([__version__, settings, ranker, joblib.hash(self.template.mask_XYZ)])

    def values(self, bold_TV: np.ndarray, mean_1V: np.ndarray, sd_1V: np.ndarray) -> np.ndarray:
        """The scan before it was z-scored, float32 (T, N).

        An SD cannot be negative; in the suite's smoke test, which draws random numbers, its absolute value is taken.
        """
        columns = len(self.template.number_N)
        if bold_TV.ndim != 2 or bold_TV.shape[1] != columns:
            got = f"bold of shape {bold_TV.shape}"
            raise DatasetError("sample", "bold", got, f"(frames, {columns}), the voxels of the template in space mni")
        value_TN = bold_TV[:, self.template.number_N]  # a copy, which is changed in place: scans are large
        value_TN *= np.abs(sd_1V)[:, self.template.number_N]
        value_TN += mean_1V[:, self.template.number_N]
        return value_TN


def _convert(
    converter: Converter, identity: str | None, bold_TV: np.ndarray, mean_1V: np.ndarray, sd_1V: np.ndarray, tr: float
) -> Converted:
    """Convert a sample. A cache compares all arguments but the converter, for which `identity` stands."""
    value_TN = converter.values(bold_TV, mean_1V, sd_1V)
    # Template voxels without signal are outside the field of view of the scan: its mask ends there.
    signal_N = (value_TN != value_TN[:1]).any(axis=0)
    mask_XYZ = converter.template.mask_XYZ.copy()
    mask_XYZ[mask_XYZ] = signal_N
    value_TN = value_TN if signal_N.all() else value_TN[:, signal_N]
    image, mask = images_of(value_TN, mask_XYZ, AFFINE, tr)
    recipe = converter.recipe
    # One thread, as in the processes of a conversion: sums are equal.
    with as_run(image, mask, space="MNI", tr=tr, dummy=0) as run, threadpool_limits(1):
        return convert_run(run, recipe.settings, recipe.parcels, recipe.ranker)


class ScanTransform:
    """The transform of the suite.

    Parameters
    ----------
    converter : Converter
    model : TokenModel
        Its axes are fitted by `fit`.
    fit_scans : int
        Largest number of training scans on which they are fitted, spread over the training split.
    """

    def __init__(self, converter: Converter, model: TokenModel, fit_scans: int):
        self.converter, self.fit_scans, self.k = converter, fit_scans, model.settings.windows.k
        self._model: TokenModel | None = model

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_model": None}  # loading processes only convert

    def __call__(self, sample: Mapping[str, Any]) -> dict[str, object]:
        """Convert a sample; see `Converter`.

        Returns
        -------
        dict
            `scan`, the bytes of the converted scan, and `record`, its JSON, both for `TokenModel.forward`; `target`, if
            the sample has one.
        """
        made = self.converter(sample)
        for words in assumed(made.meta, self.k):
            warnings.warn(f"{made.meta.source}: {words}", stacklevel=2)
        kept = {name: sample[name] for name in ("target",) if name in sample}
        return {"scan": made.data, "record": made.meta.model_dump_json(), **kept}

    def fit(self, train_dataset: Sequence[Mapping[str, Any]]) -> None:
        """Fit the principal axes of `cov` on scans of the training split."""
        if self._model is None or not self._model.components:
            return
        count = min(self.fit_scans, len(train_dataset))
        rows = np.unique(np.linspace(0, len(train_dataset) - 1, count).round().astype(int))
        self._model.fit(self.converter(train_dataset[int(row)]) for row in rows)
