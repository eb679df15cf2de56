"""From the grid and TR of a model back to those of a scan.

In space, values of brain voxels are interpolated linearly among the brain voxels of the grid. A voxel of the scan is in
the brain if at least half of the weight around it is. Where the grids are aligned, every value is that of one voxel.
In time, cubic B-splines give the values at the times of the scan's volumes, unless both TRs are equal.

Legend: X, Y, Z voxels of the grid; N brain voxels of the grid; T its frames; S brain voxels of the scan; J volumes of
the scan; 3 the axes.
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import scipy

from shards.core.files import atomically
from shards.format.grid import Grid
from shards.preprocessing.bold import Bold
from shards.preprocessing.harmonise import Harmonised, Placed

_CLOSE = 1e-3  # voxels; positions this close to a voxel are that voxel, as in `shards.preprocessing.harmonise`
_COPIED = (
    *("pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
)


@dataclass(frozen=True)
class ScanSpace:
    """The voxels and volumes of a scan, as weighted sums of those of the grid.

    Attributes
    ----------
    bold : Bold
        The scan, whose header the results get.
    voxel_S : int array
        Its brain voxels, flat in C order of (x, y, z).
    weight_SN : sparse array
    weight_JT : sparse array
    exists_J : bool array
        Volumes for which the grid has values.
    """

    bold: Bold
    voxel_S: np.ndarray
    weight_SN: scipy.sparse.csr_array
    weight_JT: scipy.sparse.csr_array
    exists_J: np.ndarray

    @classmethod
    def of(cls, placed: Placed, scan: Harmonised, grid: Grid, exists_T: np.ndarray) -> ScanSpace:
        """The space of a scan.

        Parameters
        ----------
        placed : Placed
            The scan before harmonisation.
        scan : Harmonised
            The scan on the grid.
        grid : Grid
        exists_T : bool array (T,)
            Frames of the grid that have values.
        """
        bold = placed.bold
        voxel_S, weight_SN = _in_space(np.linalg.inv(grid.affine) @ placed.affine, bold.shape, scan.brain_XYZ)
        dropped = scan.facts["dropped_frames"]
        assert isinstance(dropped, int)
        weight_JT, exists_J = _in_time(bold.frames, dropped, bold.tr, scan.tr, exists_T)
        return cls(bold, voxel_S, weight_SN, weight_JT, exists_J)

    def map(self, value_N: np.ndarray) -> np.ndarray:
        """A map of the brain on the scan's voxels, float32 (x, y, z); 0 outside the brain."""
        volume = np.zeros(math.prod(self.bold.shape), np.float32)
        volume[self.voxel_S] = self.weight_SN @ value_N
        return volume.reshape(self.bold.shape)

    def volumes(self, value_TN: np.ndarray, mean_N: np.ndarray) -> Iterable[np.ndarray]:
        """The volumes of the scan, float32 (x, y, z): from the frames of the grid, or the mean where there are none."""
        for frame in range(self.bold.frames):
            if not self.exists_J[frame]:
                yield self.map(mean_N)
                continue
            row = self.weight_JT[[frame]]
            # the fluctuation alone is interpolated, so that it keeps its digits
            fluctuation_N = row.data @ (value_TN[row.indices] - mean_N)
            yield self.map(fluctuation_N + mean_N)

    def save(self, path: Path, volumes: Iterable[np.ndarray], words: str, in_time: bool = True) -> None:
        """Write `.nii.gz` with the scan's header and affine, volume by volume; a single map without `in_time`."""
        header = self._header((*self.bold.shape, self.bold.frames) if in_time else self.bold.shape, words)
        with atomically(path) as file, gzip.GzipFile("", "wb", 1, file, mtime=0) as packed:
            header.write_to(packed)
            packed.write(bytes(int(header["vox_offset"]) - packed.tell()))
            for volume in volumes:
                packed.write(np.asarray(volume, header.get_data_dtype()).tobytes(order="F"))

    def _header(self, shape: tuple[int, ...], words: str) -> Any:
        """The header of a single file with the scan's orientation, codes and unit of length, and its TR in s."""
        given: Any = self.bold.image.header
        kind = nib.Nifti2Header if isinstance(given, nib.Nifti2Header) else nib.Nifti1Header
        header = kind()
        for name in _COPIED:
            header[name] = given[name]
        header.set_xyzt_units(given.get_xyzt_units()[0], "sec")
        header.set_data_dtype(np.float32)
        header.set_data_shape(shape)
        header.set_zooms((*given.get_zooms()[:3], self.bold.tr)[: len(shape)])
        header["pixdim"][0] = given["pixdim"][0]
        header.set_slope_inter(1, 0)
        header["descrip"] = words.encode()[:79]
        header["magic"] = header.single_magic
        header["vox_offset"] = header.single_vox_offset
        return header


def _in_space(
    matrix: np.ndarray, shape: tuple[int, int, int], brain_XYZ: np.ndarray
) -> tuple[np.ndarray, scipy.sparse.csr_array]:
    """Brain voxels of a scan (S,), flat, and their weights (S, N); `matrix` maps its voxels to those of the grid."""
    number_XYZ = np.full(brain_XYZ.shape, -1, np.int64)
    number_XYZ[brain_XYZ] = np.arange(count := np.count_nonzero(brain_XYZ))
    voxels, rows, columns, weights = [], [], [], []
    found = 0
    for x in range(shape[0]):  # a slab at a time, to save memory
        index_S3 = np.stack(np.meshgrid([x], np.arange(shape[1]), np.arange(shape[2]), indexing="ij"), -1).reshape(
            -1, 3
        )
        place_S3 = index_S3 @ matrix[:3, :3].T + matrix[:3, 3]
        rounded_S3 = np.rint(place_S3)
        place_S3 = np.where(np.abs(place_S3 - rounded_S3) < _CLOSE, rounded_S3, place_S3)
        below_S3 = np.floor(place_S3).astype(np.int64)
        part_S3 = place_S3 - below_S3
        number_S8 = np.full((len(index_S3), 8), -1, np.int64)
        weight_S8 = np.zeros((len(index_S3), 8))
        for corner in range(8):
            step = np.array([corner >> 2 & 1, corner >> 1 & 1, corner & 1])
            at_S3 = below_S3 + step
            inside_S = ((at_S3 >= 0) & (at_S3 < brain_XYZ.shape)).all(axis=1)
            number_S8[inside_S, corner] = number_XYZ[tuple(at_S3[inside_S].T)]
            weight_S8[:, corner] = np.where(step, part_S3, 1 - part_S3).prod(axis=1)
        weight_S8[number_S8 < 0] = 0
        total_S = weight_S8.sum(axis=1)
        kept_S = np.flatnonzero(total_S >= 0.5)
        weight_S8, number_S8 = weight_S8[kept_S] / total_S[kept_S, None], number_S8[kept_S]
        used = weight_S8 > 0
        voxels.append(kept_S + x * shape[1] * shape[2])
        rows.append(np.nonzero(used)[0] + found)
        columns.append(number_S8[used])
        weights.append(weight_S8[used])
        found += len(kept_S)
    table = (np.concatenate(weights), (np.concatenate(rows), np.concatenate(columns)))
    return np.concatenate(voxels), scipy.sparse.csr_array(table, shape=(found, count))


def _in_time(
    frames: int, dropped: int, source_tr: float, tr: float, exists_T: np.ndarray
) -> tuple[scipy.sparse.csr_array, np.ndarray]:
    """Weights (J, T) of the volumes of a scan, and which of them lie between frames that have values, bool (J,)."""
    count = len(exists_T)
    place_J = (np.arange(frames) - dropped) * source_tr / tr
    rounded_J = np.rint(place_J)
    place_J = np.where(np.abs(place_J - rounded_J) < 1e-6, rounded_J, place_J)
    below_J, above_J = np.floor(place_J).astype(np.int64), np.ceil(place_J).astype(np.int64)
    inside_J = (below_J >= 0) & (above_J < count)
    exists_J = inside_J.copy()
    exists_J[inside_J] = exists_T[below_J[inside_J]] & exists_T[above_J[inside_J]]
    weight_JT = np.zeros((frames, count), np.float32)
    if source_tr == tr:
        weight_JT[inside_J, below_J[inside_J]] = 1
    else:
        from scipy.interpolate import make_interp_spline  # takes half a second to import

        weight_JT[inside_J] = make_interp_spline(np.arange(count), np.eye(count), k=3)(place_J[inside_J])
    return scipy.sparse.csr_array(np.where(np.abs(weight_JT) > 1e-9, weight_JT, 0)), exists_J
