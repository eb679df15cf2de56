"""Resampling as linear algebra: masks and images onto the grid, series onto another TR.

Legend: X, Y, Z voxels of the target grid; S source voxels; N places; T frames; K taps of a filter; 3 the axes.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import ndimage, sparse

from shards.format.grid import Grid


def resample_mask(mask: np.ndarray, affine: np.ndarray, grid: Grid) -> np.ndarray:
    """A mask on the grid: linear interpolation of the fraction of brain, then half; bool (X, Y, Z)."""
    matrix = np.linalg.inv(affine) @ grid.affine
    values = mask.astype(np.float32)
    sigma = antialias(matrix)
    if sigma.any():
        values = ndimage.gaussian_filter(values, sigma, mode="nearest")
    resampled = ndimage.affine_transform(values, matrix[:3, :3], matrix[:3, 3], output_shape=grid.shape, order=1)
    return resampled >= 0.5


def field_of_view(shape: tuple[int, ...], affine: np.ndarray, grid: Grid) -> np.ndarray:
    """Which voxels of the grid lie inside the scanned box; bool (X, Y, Z)."""
    matrix = np.linalg.inv(affine) @ grid.affine
    indices = np.indices(grid.shape, np.float32).reshape(3, -1)
    place = matrix[:3, :3] @ indices + matrix[:3, 3:]
    inside = ((place >= -0.5) & (place <= np.array(shape)[:, None] - 0.5)).all(axis=0)
    return inside.reshape(grid.shape)


def antialias(matrix: np.ndarray) -> np.ndarray:
    """SD (source voxels) of the Gaussian that makes source voxels as wide as target voxels; 0 where they are finer.

    The full width at half maximum is sqrt(target^2 - source^2), the difference of the two point-spread functions
    (Cardoso et al., "Scale factor point spread function matching", MICCAI 2015).
    """
    # `matrix` maps target to source voxels: along each source axis, the target step measured in source voxels.
    step = np.sqrt((matrix[:3, :3] ** 2).sum(axis=1))
    return np.sqrt(np.maximum(step**2 - 1, 0)) / np.sqrt(8 * np.log(2)) * (step > 1.01)


def spline_weights(place_3N: np.ndarray, shape: tuple[int, ...]) -> sparse.csr_array:
    """Cubic B-spline interpolation as a sparse matrix (N, S): times the coefficients, it gives the values.

    The weights are the same in every frame: computed once, they make interpolation several times faster than
    `ndimage.map_coordinates` frame by frame. Places outside the lattice take the value at its border.
    """
    flat_N444, weight_N444 = np.zeros((1, 1, 1, 1), np.int32), np.ones((1, 1, 1, 1), np.float32)
    for axis, size in enumerate(shape):
        place_N = np.clip(place_3N[axis], 0, size - 1)
        below_N = np.floor(place_N)
        t_N = place_N - below_N
        weight_N4 = (
            np.stack(
                [(1 - t_N) ** 3, 3 * t_N**3 - 6 * t_N**2 + 4, 3 * (1 - t_N) ** 3 - 6 * (1 - t_N) ** 2 + 4, t_N**3],
                axis=1,
            )
            / 6
        )
        # beyond the ends the coefficients are mirrored, as `ndimage.spline_filter` takes them to be
        period = max(1, 2 * (size - 1))
        index_N4 = (below_N[:, None].astype(np.int32) + np.arange(-1, 3, dtype=np.int32)) % period
        index_N4 = np.where(index_N4 >= size, period - index_N4, index_N4)
        taps = [len(place_N), 1, 1, 1]
        taps[1 + axis] = 4
        flat_N444 = flat_N444 * np.int32(size) + index_N4.reshape(taps)
        weight_N444 = weight_N444 * weight_N4.astype(np.float32).reshape(taps)
    rows = np.arange(0, weight_N444.size + 1, 64)
    return sparse.csr_array((weight_N444.ravel(), flat_N444.ravel(), rows), (place_3N.shape[1], math.prod(shape)))


def low_pass(frames: int, source_tr: float, tr: float) -> np.ndarray:
    """A low-pass without delay, as a matrix (frames, frames): what a TR of `tr` would alias is 50 dB down.

    A linear-phase FIR filter with a Kaiser window, whose transition is the upper fifth below the Nyquist frequency of
    `tr`; at its ends the series is mirrored.
    """
    from scipy import signal  # takes a second to import

    nyquist = 0.5 / tr
    taps, beta = signal.kaiserord(50, 0.2 * nyquist / (0.5 / source_tr))
    reach = taps // 2
    kernel = signal.firwin(2 * reach + 1, 0.9 * nyquist, window=("kaiser", beta), fs=1 / source_tr)
    period = max(1, 2 * (frames - 1))
    place_TK = np.abs(np.arange(frames)[:, None] + np.arange(-reach, reach + 1)) % period
    place_TK = np.where(place_TK >= frames, period - place_TK, place_TK)
    matrix_TT = np.zeros((frames, frames))
    np.add.at(matrix_TT, (np.arange(frames)[:, None], place_TK), kernel)
    return matrix_TT
