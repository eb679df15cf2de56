"""Figures of one session: three planes of its mean image, and its signals over time.

Legend: X, Y, Z voxels of the grid (RAS+); P kept patches; E edges of patches; R parcels; M voxels of the carpet;
T frames; W windows; K kept windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from scipy.ndimage import map_coordinates

from shards.format.grid import Grid
from shards.format.layout import CARPET_STEPS
from shards.format.patches import scatter
from shards.format.session_record import SessionRecord
from shards.preprocessing import quality
from shards.reporting import html

Extent = tuple[float, float, float, float]  # mm: left, right, bottom, top
# title, picture, extent, letters of the left, right, lower and upper margin
Plane = tuple[str, np.ndarray, Extent, str]

MOVED_MM = 0.5  # a frame with more framewise displacement has moved, after Power et al. 2012
BEST = 8  # number of most salient windows marked, as in a training sample of the published model
_PLANES = (("Sagittal, x", "PAIS"), ("Coronal, y", "LRIS"), ("Axial, z", "LRPA"))
_KINDS = ((2, html.BLUE, "the {best} most salient"), (1, html.SKY, "kept"), (0, html.PALE, "dropped"))
_PARTS = (("scores_space", html.ORANGE, "space part"), ("scores_time", html.PURPLE, "time part"))
_BACK = "#10151c"  # nearly black, as usual for brain images


def slices(volume_XYZ: np.ndarray, grid: Grid, place: Sequence[int]) -> list[Plane]:
    """Sagittal, coronal and axial slice of a volume, ready for `imshow(origin="lower")`.

    Parameters
    ----------
    volume_XYZ : ndarray
        Volume on the grid, RAS+.
    grid : Grid
    place : three int
        Voxel at which the volume is cut.

    Returns
    -------
    list of (title, picture, extent, ends)
        `picture` has rows from bottom to top; `extent` (left, right, bottom, top) is in mm; `ends` are the letters at
        the left, right, lower and upper margin. The left of the picture is the left of the brain.
    """
    low_3 = grid.affine[:3, 3] - grid.mm / 2
    high_3 = low_3 + grid.mm * np.asarray(grid.shape)
    found = []
    for axis, (name, ends) in enumerate(_PLANES):
        across, up = (other for other in range(3) if other != axis)
        mm = grid.affine[axis, 3] + grid.mm * place[axis]
        extent = (low_3[across], high_3[across], low_3[up], high_3[up])
        found.append((f"{name} = {mm:g} mm", np.take(volume_XYZ, place[axis], axis=axis).T, extent, ends))
    return found


def patch_edges(patch_P3: np.ndarray, grid: Grid, axis: int, index: int) -> np.ndarray:
    """Edges of the kept patches in the slice through voxel `index` of an axis.

    Parameters
    ----------
    patch_P3 : int (P, 3)
        Positions of the kept patches in the patch grid.
    grid : Grid
    axis, index : int

    Returns
    -------
    ndarray, float64 (E, 2, 2)
        Both ends of each edge, (across, up) in mm as in `slices`. Shared edges of two patches are included once.
    """
    plane = [other for other in range(3) if other != axis]
    corner_Q2 = patch_P3[patch_P3[:, axis] == index // grid.patch][:, plane].astype(np.int64)
    square = np.array([[[0, 0], [1, 0]], [[0, 1], [1, 1]], [[0, 0], [0, 1]], [[1, 0], [1, 1]]])
    edge_E22 = np.unique((corner_Q2[:, None, None] + square).reshape(-1, 2, 2), axis=0)
    low_2 = (grid.affine[:3, 3] - grid.mm / 2)[plane]
    return low_2 + grid.mm * grid.patch * edge_E22


class Shown:
    """The data of a session for its figures.

    Parameters
    ----------
    grid : Grid
    frames : int
        Number of frames of a window.
    session : SessionRecord
    arrays : dict of ndarray
        `baseline`, `brain`, `carpet`, `patch`, `roi`, `scores`, `start`; also `scores_space` and `scores_time` if the
        sample has them, and `displacement`.
    """

    def __init__(self, grid: Grid, frames: int, session: SessionRecord, arrays: dict[str, np.ndarray]):
        self.grid, self.frames, self.tr = grid, frames, session.tr
        self.registered = session.space != "native"
        self.sure = not session.orientation_assumed
        self.patch_P3 = arrays["patch"]
        self.brain_XYZ = scatter(arrays["brain"], self.patch_P3, grid.shape, grid.patch) > 0
        self.baseline_XYZ = scatter(arrays["baseline"], self.patch_P3, grid.shape, grid.patch)
        self.carpet_MT = arrays["carpet"] / CARPET_STEPS
        roi_RT = arrays["roi"].astype(np.float64)
        sd_R1 = roi_RT.std(axis=1, keepdims=True)
        self.z_RT = (roi_RT - roi_RT.mean(axis=1, keepdims=True)) / np.maximum(sd_R1, 1e-12)
        percent_TR = 100 * roi_RT.T / max(abs(roi_RT.mean()), 1e-12)  # percent of the mean over parcels and frames
        self.global_T = percent_TR.mean(axis=1) - percent_TR.mean()
        self.dvars_T = quality.dvars(percent_TR)
        low, high = np.percentile(self.dvars_T, [25, 75])
        self.limit = high + 1.5 * (high - low)
        moved_T = arrays.get("displacement")
        self.moved_T = moved_T if moved_T is not None and np.isfinite(moved_T).any() else None
        self.scores_W = arrays["scores"]
        self.parts = [(arrays[name], colour, title) for name, colour, title in _PARTS if name in arrays]
        kept_K = arrays["start"] // frames  # in rank order
        self.best_K = kept_K[:BEST]
        self.kind_W = np.zeros(len(self.scores_W), int)  # as in _KINDS
        self.kind_W[kept_K], self.kind_W[self.best_K] = 1, 2

    def words(self) -> str:
        """Describe how many of the most salient windows contain outlying frames."""
        # DVARS at index t is the change from frame t to t + 1, and is assigned to the later frame.
        found = self._struck("above the DVARS line", np.flatnonzero(self.dvars_T > self.limit) + 1)
        if self.moved_T is not None:
            found += " " + self._struck(
                f"displaced by more than {MOVED_MM:g} mm", np.flatnonzero(self.moved_T > MOVED_MM)
            )
        return found

    def _struck(self, how: str, frames: np.ndarray) -> str:
        """How many of the most salient windows contain one of these frames."""
        window_T = frames // self.frames
        struck = np.unique(window_T[window_T < len(self.scores_W)])
        among = int(np.isin(self.best_K, struck).sum())
        chance = len(self.best_K) * len(struck) / len(self.scores_W)
        return (
            f"Windows with a frame {how}: {among} of the {len(self.best_K)} most salient "
            f"({chance:.1f} expected for random windows)."
        )

    def draw(self, template: tuple[np.ndarray, np.ndarray]) -> Figure:
        """Draw three planes of the mean image above, and signals over time below."""
        figure = Figure(figsize=(11, 11))  # its margins are fixed: to find them takes as long as to draw
        above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=(3.7, 7.3))[:, 0]
        place = [int(places.mean().round()) for places in np.nonzero(self.brain_XYZ)]
        limits = np.percentile(self.baseline_XYZ[self.brain_XYZ], [2, 98])
        views = slices(np.where(self.brain_XYZ, self.baseline_XYZ, np.nan), self.grid, place)
        masks = slices(self.brain_XYZ, self.grid, place)
        margins = {"left": 0.01, "right": 0.99, "bottom": 0.02, "top": 0.94, "wspace": 0.08}
        for axis, axes in enumerate(above.subplots(1, 3, gridspec_kw=margins)):
            draw_slice(
                axes,
                views[axis],
                masks[axis][1],
                patch_edges(self.patch_P3, self.grid, axis, place[axis]),
                limits,
                self.sure,
            )
            mm = self.grid.affine[axis, 3] + self.grid.mm * place[axis]
            if self.registered:
                _draw_template(axes, template, axis, mm, views[axis][2])
        heights = (1.5, 1.6, 2.1, 1, 1) if self.moved_T is None else (1.4, 1.5, 1.8, 0.9, 0.8, 0.9)
        margins = {"left": 0.057, "right": 0.935, "bottom": 0.06, "top": 0.965, "hspace": 0.45}
        parcels, saliency, carpet, dvars, *moved, whole = below.subplots(
            len(heights), 1, sharex=True, height_ratios=heights, gridspec_kw=margins
        )
        below.align_ylabels()
        self._draw_parcels(below, parcels)
        self.draw_saliency(saliency)
        self._draw_carpet(below, carpet)
        self._draw_dvars(dvars)
        for axes in moved:
            self._draw_displacement(axes)
        self._draw_global(whole)
        return figure

    @property
    def _end(self) -> float:
        return self.z_RT.shape[1] * self.tr

    def _draw_parcels(self, figure: Any, axes: Axes) -> None:
        """Draw the parcels in their order from below; blue and red are below and above the mean of each parcel."""
        image = axes.imshow(
            self.z_RT,
            aspect="auto",
            cmap="RdBu_r",
            vmin=-3,
            vmax=3,
            origin="lower",
            extent=(0, self._end, 0, len(self.z_RT)),
        )
        axes.set(title="Parcels over time", ylabel="parcel")
        _draw_scale(figure, axes, image)

    def draw_saliency(self, axes: Axes) -> None:
        """Draw the score of every window and its parts. Scores far below the others are marked at the bottom."""
        width = self.frames * self.tr
        low, high = np.percentile(self.scores_W, [25, 75])
        seen_W = self.scores_W >= low - 1.5 * (high - low)
        bottom = self.scores_W[seen_W].min()
        top = max(values_W.max() for values_W in (self.scores_W, *(part_W for part_W, *_ in self.parts)))
        margin = 0.12 * (top - bottom) or 1.0
        bottom -= margin
        height_W = np.maximum(self.scores_W - bottom, 0)
        for kind, colour, name in _KINDS:
            at = np.flatnonzero(self.kind_W == kind)
            if len(at):
                label = name.format(best=len(self.best_K))
                axes.bar(at * width, height_W[at], width, bottom, align="edge", color=colour, label=label)
        edge_W = np.arange(len(height_W) + 1) * width
        axes.stairs(bottom + height_W, edge_W, baseline=None, color=html.INK, lw=0.7)
        for part_W, colour, name in self.parts:  # drawn behind the score
            axes.stairs(np.maximum(part_W, bottom), edge_W, baseline=None, color=colour, lw=1, label=name, zorder=0.9)
        if not seen_W.all():
            middle = (np.flatnonzero(~seen_W) + 0.5) * width
            axes.plot(
                middle, np.full(len(middle), bottom + margin / 2), "v", color=html.RED, ms=5, label="below the axis"
            )
        axes.set(title="Saliency of the windows", ylabel="score", ylim=(bottom, top + margin))
        _legend(axes)

    def _draw_carpet(self, figure: Any, axes: Axes) -> None:
        """Draw voxels from the edge (top) to the centre of the brain, with a strip of the windows above them."""
        image = axes.imshow(
            self.carpet_MT,
            aspect="auto",
            cmap="gray",
            vmin=-2,
            vmax=2,
            origin="upper",
            extent=(0, self._end, len(self.carpet_MT), 0),
        )
        width = self.frames * self.tr
        for kind, colour, _ in _KINDS:
            spans = [(number * width, width) for number in np.flatnonzero(self.kind_W == kind)]
            axes.broken_barh(
                spans, (1.02, 0.07), color=colour, lw=0, transform=axes.get_xaxis_transform(), clip_on=False
            )
        axes.set_title("Carpet of brain voxels", pad=14)
        axes.set_ylabel("voxel")
        axes.set_yticks([0, len(self.carpet_MT)], ["rim", "depth"])
        _draw_scale(figure, axes, image)

    def _draw_dvars(self, axes: Axes) -> None:
        """Draw DVARS at the middle of the later frame, as in `words`."""
        axes.plot((np.arange(len(self.dvars_T)) + 1.5) * self.tr, self.dvars_T, color=html.INK, lw=0.9)
        axes.axhline(self.limit, color=html.RED, lw=1, ls="--", label="outlying above (box-plot rule)")
        axes.set(title="DVARS of the parcels", ylabel="% of mean")
        _legend(axes)
        self._draw_bands(axes)

    def _draw_displacement(self, axes: Axes) -> None:
        """Draw the framewise displacement at the middle of the later frame; gaps where it is missing."""
        assert self.moved_T is not None
        axes.plot((np.arange(len(self.moved_T)) + 0.5) * self.tr, self.moved_T, color=html.INK, lw=0.9)
        if np.nanmax(self.moved_T) > MOVED_MM / 2:  # otherwise the line would flatten the curve
            axes.axhline(MOVED_MM, color=html.RED, lw=1, ls="--", label=f"{MOVED_MM:g} mm")
            _legend(axes)
        axes.set(title="Framewise displacement", ylabel="mm")
        self._draw_bands(axes)

    def _draw_global(self, axes: Axes) -> None:
        """Draw the mean of the parcels, relative to its mean over time, at the middle of each frame."""
        axes.plot((np.arange(len(self.global_T)) + 0.5) * self.tr, self.global_T, color=html.INK, lw=0.9)
        axes.set(title="Global signal", ylabel="% of mean", xlabel="time, s", xlim=(0, self._end))
        self._draw_bands(axes)

    def _draw_bands(self, axes: Axes) -> None:
        """Draw bands at the most salient windows."""
        axes.grid(axis="y")
        width = self.frames * self.tr
        for number in self.best_K:
            axes.axvspan(number * width, (number + 1) * width, color=html.BLUE, alpha=0.13, lw=0)


def _draw_scale(figure: Any, axes: Axes, image: Any) -> None:
    """Draw the colours of an image beside its axes, which keep their width."""
    figure.colorbar(image, cax=axes.inset_axes((1.01, 0, 0.011, 1)), label="z")


def _legend(axes: Axes) -> None:
    """Draw a legend at the right above the axes, next to their title."""
    axes.legend(loc="lower right", bbox_to_anchor=(1, 0.98), ncols=6, borderaxespad=0)


def draw_slice(
    axes: Axes, view: Plane, mask: np.ndarray, edge_E22: np.ndarray, limits: np.ndarray, sure: bool = True
) -> None:
    """Draw a slice with the outline of the mask and the edges of the kept patches.

    Parameters
    ----------
    axes : Axes
    view : Plane
        Plane of the mean image, NaN outside the brain.
    mask : bool array
        Of the shape of the picture.
    edge_E22 : ndarray
        Result of `patch_edges`.
    limits : two float
        Values drawn in black and white.
    sure : bool
        Whether left and right are known. If not, their letters have a question mark.
    """
    title, picture, extent, ends = view
    low, high = limits
    gray = colormaps["gray"].with_extremes(bad=_BACK)
    axes.imshow(picture, gray, vmin=low, vmax=high, origin="lower", extent=extent, interpolation="nearest")
    axes.add_collection(LineCollection(list(edge_E22), colors=html.SKY, linewidths=0.6, alpha=0.6, snap=True))
    if mask.any() and not mask.all():
        fine = np.kron(mask, np.ones((4, 4)))  # so that the outline follows the edges of voxels
        axes.contour(fine, levels=[0.5], colors=html.ORANGE, linewidths=1.2, origin="lower", extent=extent)
    axes.set_title(title, fontsize=9)
    axes.set_axis_off()
    # inside the picture, so that a letter is not confused with that of the neighbouring plane
    places = ((0.02, 0.5, "left"), (0.98, 0.5, "right"), (0.5, 0.04, "center"), (0.5, 0.96, "center"))
    for letter, (x, y, ha) in zip(ends, places, strict=True):
        words = letter if sure or letter not in "LR" else f"{letter}?"
        shown = axes.text(x, y, words, transform=axes.transAxes, ha=ha, va="center", weight="bold", color="white")
        shown.set_path_effects([withStroke(linewidth=2, foreground=_BACK)])


def _draw_template(axes: Axes, template: tuple[np.ndarray, np.ndarray], axis: int, mm: float, extent: Extent) -> None:
    """Draw the outline of the MNI152 brain in the plane of a slice."""
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
        axes.contour(across, up, inside, levels=[0.5], colors="white", linewidths=1, linestyles="dashed")
