"""The figure of a reconstruction: slices and distribution of the explained variance, and three voxels over time.

Legend: X, Y, Z voxels of the model's grid; N its brain voxels; T frames.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from shards.core.files import write_atomically
from shards.reporting import html, viewer
from slim.explain.reconstruct import Reconstruction

_SLICES = 6
_PERCENTILES = (95, 50, 5)  # of the explained variance, of the voxels that are drawn


def draw(found: Reconstruction, path: Path) -> None:
    """Write the figure as a PNG."""
    figure = Figure(figsize=(11, 8.5), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[1, 2.6])
    above, below = parts
    limit = max(0.05, float(np.percentile(np.abs(found.explained_N), 95)))
    _slices(above, found, limit)
    first, *others = below.subplots(1 + len(_PERCENTILES), 1)
    first.hist(np.clip(found.explained_N, -2 * limit, 1), bins=80, color=html.BLUE)
    first.axvline(float(np.median(found.explained_N)), color=html.ORANGE)
    words = f"All {len(found.explained_N)} brain voxels; the line is their median, the first bar has all lower values"
    first.set_title(words, loc="left", fontsize=10)
    for percentile, shown in zip(_PERCENTILES, others, strict=True):
        _series(shown, found, percentile)
    others[0].legend(loc="upper right", fontsize=8)
    others[-1].set_xlabel("s from the first volume that was kept")
    write_atomically(path, html.png(figure))


def write_view(found: Reconstruction, path: Path) -> None:
    """Write an interactive view of the map, on the grid of the scan; in MNI space also one on the surface."""
    space = found.space
    affine, in_mni = space.bold.affine, found.scan.facts["space"] != "native"
    under = None if in_mni else nib.Nifti1Image(space.map(found.scan.moments[0]), affine)
    explained = nib.Nifti1Image(space.map(found.explained_N), affine)
    limit = max(0.05, float(np.percentile(np.abs(found.explained_N), 95)))
    viewer.write(path, viewer.Map(explained, "Explained variance", under, signed=True, limit=limit), in_mni)


def _slices(figure: SubFigure, found: Reconstruction, limit: float) -> None:
    """Axial slices of the box around the brain."""
    brain_XYZ = found.scan.brain_XYZ
    volume_XYZ = np.full(brain_XYZ.shape, np.nan)
    volume_XYZ[brain_XYZ] = found.explained_N
    index_N3 = np.argwhere(brain_XYZ)
    (left, back, _), (right, front, _) = index_N3.min(axis=0), index_N3.max(axis=0) + 1
    low, high = np.percentile(index_N3[:, 2], [10, 90])
    axes = figure.subplots(1, _SLICES)
    for shown, z in zip(axes, np.linspace(low, high, _SLICES).round().astype(int), strict=True):
        part_XY = volume_XYZ[left:right, back:front, z]
        drawn = shown.imshow(part_XY.T, origin="lower", cmap="RdBu_r", vmin=-limit, vmax=limit)
        shown.set_axis_off()
    figure.colorbar(drawn, ax=list(axes), shrink=0.8)
    figure.suptitle("Explained variance, axial slices of the model's grid; left is left", fontsize=10)


def _series(shown: Axes, found: Reconstruction, percentile: int) -> None:
    """The measured and the predicted series of the voxel at a percentile of the explained variance."""
    order_N = np.argsort(found.explained_N, kind="stable")
    voxel = order_N[round(percentile / 100 * (len(order_N) - 1))]
    second_T = np.arange(len(found.exists_T)) * found.scan.tr
    shown.plot(second_T, found.scan.raw_TN[:, voxel], color="0.6", label="measured")
    guess_T = np.where(found.exists_T, found.predicted_TN[:, voxel], np.nan)
    shown.plot(second_T, guess_T, color=html.ORANGE, label="predicted")
    words = f"Voxel at percentile {percentile}: explained variance {found.explained_N[voxel]:.2f}"
    shown.set_title(words, loc="left", fontsize=10)
