"""Maps of shares: convert voxels of patches to NIfTI images, find the strongest places, and draw figures.

Legend: X, Y, Z voxels of the grid; K windows in time order; F frames; M patches; V voxels of a patch; N voxels of a
list.
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine
from scipy.ndimage import gaussian_filter

from shards.core.files import write_atomically
from shards.format.grid import Grid
from shards.format.patches import scatter
from shards.reporting import html, viewer
from slim.explain.explanation import ABSOLUTE, ANATOMY, Place, Start, view_path
from slim.explain.integrated_gradients import Attribution

_PLACES, _APART_MM = 5, 20.0  # number of strongest places, and their smallest distance
_FWHM_MM = 8.0  # smoothing of figures and places; the maps are not smoothed
_SLICES = 7
_SHOWN = 90  # percentile of the map above which a picture colours it
TITLES = {
    ABSOLUTE: "Size of the shares, mean over frames",
    "": "Shares of the fluctuation, sum over frames",
    ANATOMY: "Shares of the anatomy",
}


@dataclass
class Maps:
    """Maps of one session, or their mean, (X, Y, Z) on the dataset's grid; 0 outside the brain.

    Attributes
    ----------
    signed : sum over frames of the shares of the fluctuation
    absolute : mean over frames of their absolute values
    anatomy : shares of the means over the scan; None for the start `still`
    """

    signed: np.ndarray
    absolute: np.ndarray
    anatomy: np.ndarray | None

    @classmethod
    def of(cls, found: Attribution, grid: Grid, start: Start) -> Maps:
        def volume(value_MV: np.ndarray) -> np.ndarray:
            return scatter(value_MV.astype(np.float32), found.patch_M3, grid.shape, grid.patch)

        signed_MV = found.value_KFMV.sum(axis=(0, 1), dtype=np.float64)
        absolute_MV = np.abs(found.value_KFMV).mean(axis=(0, 1), dtype=np.float64)
        anatomy = volume(found.anatomy_MV) if start == "empty" else None
        return cls(volume(signed_MV), volume(absolute_MV), anatomy)

    def named(self) -> dict[str, np.ndarray]:
        """The maps by the ending of their files."""
        maps = {"": self.signed, ABSOLUTE: self.absolute}
        return maps if self.anatomy is None else maps | {ANATOMY: self.anatomy}


@dataclass
class Mean:
    """A running mean over sessions."""

    count: int = 0
    total: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, maps: Mapping[str, np.ndarray]) -> None:
        self.count += 1
        for name, volume in maps.items():
            self.total[name] = self.total.get(name, 0) + volume.astype(np.float64)

    def named(self) -> dict[str, np.ndarray]:
        return {name: (volume / self.count).astype(np.float32) for name, volume in self.total.items()}


def image(volume_XYZ: np.ndarray, grid: Grid, registered: bool) -> nib.Nifti1Image:
    """A map as NIfTI on the dataset's grid; in MNI space if its sessions are, else aligned with nothing but itself."""
    made = nib.Nifti1Image(volume_XYZ, grid.affine)
    code = "mni" if registered else "aligned"
    made.set_sform(grid.affine, code)
    made.set_qform(grid.affine, code)
    made.header.set_xyzt_units("mm")
    return made


def save(path: Path, made: nib.Nifti1Image) -> None:
    """Write `.nii.gz` atomically; equal maps give equal bytes."""
    write_atomically(path, gzip.compress(made.to_bytes(), compresslevel=6, mtime=0))


def smooth(made: nib.Nifti1Image) -> np.ndarray:
    """A map smoothed inside the brain (its voxels that are not 0), for the eye: shares of single voxels are noisy."""
    volume_XYZ = np.asarray(made.dataobj, np.float64)
    inside_XYZ = (volume_XYZ != 0).astype(np.float64)
    mm = float(abs(made.affine[0, 0]))
    sigma = max(_FWHM_MM, 1.5 * mm) / 2.355 / mm
    whole_XYZ = np.maximum(gaussian_filter(inside_XYZ, sigma), 1e-12)
    return np.where(inside_XYZ > 0, gaussian_filter(volume_XYZ, sigma) / whole_XYZ, 0)


def places(absolute: nib.Nifti1Image) -> tuple[Place, ...]:
    """The strongest places of a smoothed map that lie apart, the largest first."""
    smooth_XYZ = smooth(absolute)
    index_N3 = np.argwhere(smooth_XYZ > 0)
    mm_N3, value_N = apply_affine(absolute.affine, index_N3), smooth_XYZ[tuple(index_N3.T)]
    found: list[Place] = []
    while len(found) < _PLACES and (value_N > 0).any():
        best = int(value_N.argmax())
        x, y, z = (round(float(mm), 1) for mm in mm_N3[best])
        found.append(Place(mm=(x, y, z), value=float(value_N[best])))
        value_N = np.where(((mm_N3 - mm_N3[best]) ** 2).sum(axis=1) < _APART_MM**2, 0, value_N)
    return tuple(found)


def draw_maps(images: dict[str, nib.Nifti1Image], under: nib.Nifti1Image, path: Path) -> None:
    """Axial slices of each map, smoothed, on the mean image of the sessions; a PNG."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt
    from nilearn.plotting import plot_stat_map

    shown = [ending for ending in TITLES if ending in images]
    height_N = np.argwhere(np.asarray(under.dataobj) != 0)[:, 2]  # of the voxels of the brain
    low, high = np.percentile(height_N, [8, 92])
    cuts = under.affine[2, 3] + under.affine[2, 2] * np.linspace(low, high, _SLICES).round()
    figure = plt.figure(figsize=(11, 2.4 * len(shown)))
    try:
        for number, ending in enumerate(shown):
            volume_XYZ = smooth(images[ending])
            threshold, largest = _range_of(volume_XYZ)
            top = 1 - number / len(shown)
            figure.text(0.01, top - 0.01, TITLES[ending], va="top", weight="bold")
            plot_stat_map(
                nib.Nifti1Image(volume_XYZ.astype(np.float32), images[ending].affine),
                under,
                display_mode="z",
                cut_coords=cuts,
                figure=figure,
                axes=(0, top - 1 / len(shown), 1, 0.88 / len(shown)),
                threshold=threshold,
                vmax=largest,
                cmap="inferno" if ending == ABSOLUTE else "RdBu_r",
                symmetric_cbar=ending != ABSOLUTE,
                black_bg=False,
                draw_cross=False,
                cbar_tick_format="%.1g",
                resampling_interpolation="nearest",
            )
        write_atomically(path, html.png(figure))
    finally:
        plt.close(figure)


def _range_of(volume_XYZ: np.ndarray) -> tuple[float, float]:
    """Threshold of the colours, and the largest value; 0 and 1 for an empty map."""
    size = np.abs(volume_XYZ[volume_XYZ != 0])
    return (float(np.percentile(size, _SHOWN)), float(size.max())) if len(size) else (0.0, 1.0)


def write_views(
    images: dict[str, nib.Nifti1Image], under: nib.Nifti1Image, registered: bool, folder: Path, task: str
) -> None:
    """Write interactive views of the maps as they are drawn, `TASK_view.html` and so on.

    The MNI152 template is behind maps in MNI space, the mean image of the sessions behind others.
    """
    for ending in TITLES:
        path = view_path(folder, task, ending)
        if ending not in images:
            viewer.remove(path)  # of an earlier explanation
            continue
        volume_XYZ = smooth(images[ending])
        threshold, largest = _range_of(volume_XYZ)
        shown = viewer.Map(
            nib.Nifti1Image(volume_XYZ.astype(np.float32), images[ending].affine),
            f"{task}: {TITLES[ending][0].lower()}{TITLES[ending][1:]}",
            None if registered else under,
            signed=ending != ABSOLUTE,
            threshold=threshold,
            limit=largest,
        )
        viewer.write(path, shown, registered)
