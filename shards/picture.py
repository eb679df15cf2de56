"""One session drawn: orthogonal slices of its mean image, and its parcels, saliency and signals on one time axis.

Legend: X, Y, Z voxels of the grid (RAS+); R parcels; T frames; W windows; K kept windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.ndimage import map_coordinates

from shards import html, quality
from shards.grid import Grid
from shards.patches import scatter

Extent = tuple[float, float, float, float]  # mm: left, right, bottom, top
View = tuple[str, np.ndarray, Extent, str]  # title, picture, extent, letters of the left and right margin

_BEST = 8  # most salient windows marked: as many as a published training sample holds


def slices(volume_XYZ: np.ndarray, grid: Grid, place: Sequence[int]) -> list[View]:
    """Sagittal, coronal and axial slice of a volume, ready for `imshow(origin="lower")`.

    Parameters
    ----------
    volume_XYZ : ndarray
        On the grid, RAS+.
    grid : Grid
    place : three int
        Voxel the slices go through.

    Returns
    -------
    list of (title, picture, extent, ends)
        `picture` has rows from bottom to top; `extent` (left, right, bottom, top) is in mm; `ends` are the
        letters of the left and right margin: L is on the left, so the left of the picture is the left of the
        brain.
    """
    low_3 = grid.affine[:3, 3] - grid.mm / 2
    high_3 = low_3 + grid.mm * np.asarray(grid.shape)
    found = []
    for axis, (name, ends) in enumerate((("Sagittal, x", "PA"), ("Coronal, y", "LR"), ("Axial, z", "LR"))):
        across, up = (other for other in range(3) if other != axis)
        mm = grid.affine[axis, 3] + grid.mm * place[axis]
        extent = (low_3[across], high_3[across], low_3[up], high_3[up])
        found.append((f"{name} = {mm:g} mm", np.take(volume_XYZ, place[axis], axis=axis).T, extent, ends))
    return found


def template() -> tuple[np.ndarray, np.ndarray]:
    """The MNI152 brain mask that nilearn carries with it, and its affine."""
    from nilearn.datasets import load_mni152_brain_mask  # takes seconds to import; only pages need it

    image = load_mni152_brain_mask(resolution=2)
    return np.asarray(image.dataobj, np.float32), image.affine


class Shown:
    """One session as it is drawn.

    Parameters
    ----------
    grid : Grid
    frames : int
        Frames of a window.
    session : dict
        Its line of `sessions.jsonl`.
    arrays : dict of ndarray
        `baseline`, `brain`, `patch`, `roi`, `scores`, `start`.
    """

    def __init__(self, grid: Grid, frames: int, session: dict[str, Any], arrays: dict[str, np.ndarray]):
        self.grid, self.frames, self.tr = grid, frames, session["tr"]
        patch_P3 = arrays["patch"]
        self.brain_XYZ = scatter(arrays["brain"], patch_P3, grid.shape, grid.patch) > 0
        self.baseline_XYZ = scatter(arrays["baseline"], patch_P3, grid.shape, grid.patch)
        roi_RT = arrays["roi"].astype(np.float64)
        sd_R1 = roi_RT.std(axis=1, keepdims=True)
        self.z_RT = (roi_RT - roi_RT.mean(axis=1, keepdims=True)) / np.maximum(sd_R1, 1e-12)
        percent_TR = 100 * roi_RT.T / max(abs(roi_RT.mean()), 1e-12)  # of the mean over parcels and frames
        self.global_T = percent_TR.mean(axis=1) - percent_TR.mean()
        self.dvars_T = quality.dvars(percent_TR)
        low, high = np.percentile(self.dvars_T, [25, 75])
        self.limit = high + 1.5 * (high - low)
        self.scores_W = arrays["scores"]
        self.kept_K = arrays["start"] // frames  # in rank order
        self.best_K = self.kept_K[:_BEST]

    def words(self) -> str:
        """How the most salient windows lie to outlying frames."""
        # DVARS at place t is the change from frame t to t + 1; the later frame is the one it is charged to.
        window_T = (np.flatnonzero(self.dvars_T > self.limit) + 1) // self.frames
        struck = np.unique(window_T[window_T < len(self.scores_W)])
        among = int(np.isin(self.best_K, struck).sum())
        chance = len(self.best_K) * len(struck) / len(self.scores_W)
        return (
            f"Windows with a frame above the DVARS line: {among} of the {len(self.best_K)} most salient "
            f"({chance:.1f} expected of as many drawn at random)."
        )

    def draw(self, template: tuple[np.ndarray, np.ndarray]) -> Figure:
        """Slices on the left, signals over time on the right."""
        figure = Figure(figsize=(11, 6.4), layout="constrained")
        left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(2.6, 8.4))[0]
        place = [int(places.mean().round()) for places in np.nonzero(self.brain_XYZ)]
        limits = np.percentile(self.baseline_XYZ[self.brain_XYZ], [2, 98])
        views = slices(np.where(self.brain_XYZ, self.baseline_XYZ, np.nan), self.grid, place)
        masks = slices(self.brain_XYZ, self.grid, place)
        for axis, axes in enumerate(left.subplots(3, 1)):
            draw_slice(axes, views[axis], masks[axis][1], limits)
            mm = self.grid.affine[axis, 3] + self.grid.mm * place[axis]
            _draw_template(axes, template, axis, mm, views[axis][2])
        self._draw_signals(right)
        return figure

    def _draw_signals(self, figure: Any) -> None:
        end = self.z_RT.shape[1] * self.tr
        matrix, saliency, dvars, whole = figure.subplots(4, 1, sharex=True, height_ratios=(2.6, 1.3, 1, 1))
        image = matrix.imshow(
            self.z_RT,
            aspect="auto",
            cmap="RdBu_r",
            vmin=-3,
            vmax=3,
            origin="lower",
            extent=(0, end, 0, len(self.z_RT)),
            interpolation="nearest",
        )
        matrix.set(title="Parcels over time", ylabel="parcel")
        figure.colorbar(image, ax=matrix, label="z", pad=0.01, fraction=0.025, aspect=14)

        width = self.frames * self.tr
        kind_W = np.zeros(len(self.scores_W), int)
        kind_W[self.kept_K], kind_W[self.best_K] = 1, 2
        best = f"the {len(self.best_K)} most salient"
        kinds = ((2, html.BLUE, best), (1, html.SKY, "kept"), (0, html.PALE, "dropped"))
        for kind, colour, name in kinds:
            at = np.flatnonzero(kind_W == kind)
            if len(at):
                saliency.bar(
                    at * width, self.scores_W[at], width, align="edge", color=colour, label=name, ec="white", lw=0.3
                )
        saliency.set(title="Saliency of the windows", ylabel="score")
        saliency.legend(loc="lower right", bbox_to_anchor=(1, 0.98), ncols=3, borderaxespad=0)
        dvars.plot(np.arange(1, len(self.dvars_T) + 1) * self.tr, self.dvars_T, color=html.INK, lw=0.9)
        dvars.axhline(self.limit, color=html.RED, lw=1, ls="--", label="outlying above (box-plot rule)")
        dvars.legend(loc="lower right", bbox_to_anchor=(1, 0.98), borderaxespad=0)
        dvars.set(title="DVARS of the parcels", ylabel="% of mean")
        whole.plot(np.arange(len(self.global_T)) * self.tr, self.global_T, color=html.INK, lw=0.9)
        whole.set(title="Global signal", ylabel="% of mean", xlabel="time, s", xlim=(0, end))
        for axes in (dvars, whole):
            axes.grid(axis="y")
            for number in self.best_K:
                axes.axvspan(number * width, (number + 1) * width, color=html.BLUE, alpha=0.13, lw=0)


def draw_slice(axes: Axes, view: View, mask: np.ndarray, limits: np.ndarray) -> None:
    title, picture, extent, ends = view
    axes.imshow(
        picture, cmap="gray", vmin=limits[0], vmax=limits[1], origin="lower", extent=extent, interpolation="nearest"
    )
    if mask.any() and not mask.all():
        fine = np.kron(mask, np.ones((4, 4)))  # so that the outline follows the voxels' edges
        axes.contour(fine, levels=[0.5], colors=html.ORANGE, linewidths=1.3, origin="lower", extent=extent)
    axes.set_title(title, fontsize=9)
    axes.set_axis_off()
    for x, letter in zip((-0.05, 1.05), ends, strict=True):
        axes.text(x, 0.5, letter, transform=axes.transAxes, ha="center", va="center", weight="bold")


def _draw_template(axes: Axes, template: tuple[np.ndarray, np.ndarray], axis: int, mm: float, extent: Extent) -> None:
    """Outline of the MNI152 brain in the plane of a slice."""
    mask, affine = template
    across = np.arange(extent[0], extent[1], 2.0)
    up = np.arange(extent[2], extent[3], 2.0)
    plane = np.empty((3, len(up), len(across)))
    first, second = (other for other in range(3) if other != axis)
    plane[axis], plane[first], plane[second] = mm, across[None], up[:, None]
    inverse = np.linalg.inv(affine)
    index = np.einsum("ij,jkl->ikl", inverse[:3, :3], plane) + inverse[:3, 3, None, None]
    inside = map_coordinates(mask, index, order=1, mode="constant")
    if inside.max() > 0.5 > inside.min():
        axes.contour(across, up, inside, levels=[0.5], colors=html.BLUE, linewidths=1, linestyles="dashed")
