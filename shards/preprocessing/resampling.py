"""Resampling: masks and images to the grid, series to another TR.

Legend: X, Y, Z voxels of the target grid; S source voxels; N places; T frames; K taps of a filter; 3 the axes.
"""

from __future__ import annotations

import math

import numpy as np
import scipy  # its parts are imported when they are used

from shards.format.grid import Grid


def resample_mask(mask: np.ndarray, affine: np.ndarray, grid: Grid) -> np.ndarray:
    """Resample a mask to the grid, by linear interpolation and a threshold of one half; bool (X, Y, Z)."""
    matrix = np.linalg.inv(affine) @ grid.affine
    values = mask.astype(np.float32)
    sigma = antialias(matrix)
    if sigma.any():
        values = scipy.ndimage.gaussian_filter(values, sigma, mode="nearest")
    resampled = scipy.ndimage.affine_transform(values, matrix[:3, :3], matrix[:3, 3], output_shape=grid.shape, order=1)
    return resampled >= 0.5


def field_of_view(shape: tuple[int, ...], affine: np.ndarray, grid: Grid) -> np.ndarray:
    """Which voxels of the grid lie inside the field of view; bool (X, Y, Z)."""
    matrix = np.linalg.inv(affine) @ grid.affine
    indices = np.indices(grid.shape, np.float32).reshape(3, -1)
    place = matrix[:3, :3] @ indices + matrix[:3, 3:]
    inside = ((place >= -0.5) & (place <= np.array(shape)[:, None] - 0.5)).all(axis=0)
    return inside.reshape(grid.shape)


def antialias(matrix: np.ndarray) -> np.ndarray:
    """SD, in source voxels, of the Gaussian filter before downsampling; 0 on axes with finer target voxels.

    The full width at half maximum is sqrt(target^2 - source^2), the difference of the two point-spread functions
    (Cardoso et al., "Scale factor point spread function matching", MICCAI 2015).
    """
    # `matrix` maps target to source voxels; this is the target step along each source axis, in source voxels.
    step = np.sqrt((matrix[:3, :3] ** 2).sum(axis=1))
    return np.sqrt(np.maximum(step**2 - 1, 0)) / np.sqrt(8 * np.log(2)) * (step > 1.01)


def spline_weights(place_3N: np.ndarray, shape: tuple[int, ...]) -> scipy.sparse.csr_array:
    """Weights of cubic B-spline interpolation, as a sparse matrix (N, S) to multiply with the coefficients.

    The weights are equal for all frames, so computing them once is several times faster than calling
    `ndimage.map_coordinates` for each frame. Positions outside the image get the value at its border.
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
        # coefficients are mirrored at the ends, as in `ndimage.spline_filter`
        period = max(1, 2 * (size - 1))
        index_N4 = (below_N[:, None].astype(np.int32) + np.arange(-1, 3, dtype=np.int32)) % period
        index_N4 = np.where(index_N4 >= size, period - index_N4, index_N4)
        taps = [len(place_N), 1, 1, 1]
        taps[1 + axis] = 4
        flat_N444 = flat_N444 * np.int32(size) + index_N4.reshape(taps)
        weight_N444 = weight_N444 * weight_N4.astype(np.float32).reshape(taps)
    rows = np.arange(0, weight_N444.size + 1, 64)
    return scipy.sparse.csr_array((weight_N444.ravel(), flat_N444.ravel(), rows), (place_3N.shape[1], math.prod(shape)))


def low_pass(frames: int, source_tr: float, tr: float) -> np.ndarray:
    """A zero-phase low-pass filter as a matrix (frames, frames), which attenuates aliasing at a TR of `tr` by 50 dB.

    It is a linear-phase FIR filter with a Kaiser window. Its transition band is the upper fifth below the Nyquist
    frequency of `tr`. The series is mirrored at its ends.
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
