"""Small runs for the tests: an egg-shaped head in millimetres, written with any affine."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine

from shards.cohorts.scan import RunSource
from shards.format.patches import scatter
from shards.preprocessing.harmonise import GridSettings, Harmonised

SMALL = GridSettings(mm=6, shape=(24, 28, 24))
FRAMES = 24


def oblique(zooms: tuple[float, float, float], degrees: float, centre_mm, shape) -> np.ndarray:
    """An affine of the given voxel sizes, turned about two axes, with the middle of the box at `centre_mm`."""
    a, b = np.deg2rad([degrees, degrees / 2])
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_z = np.array([[np.cos(b), -np.sin(b), 0], [np.sin(b), np.cos(b), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = about_x @ about_z @ np.diag(zooms)
    affine[:3, 3] = np.asarray(centre_mm) - affine[:3, :3] @ ((np.asarray(shape) - 1) / 2)
    return affine


def brain(affine: np.ndarray, shape: tuple[int, int, int], centre_mm=(-1, -17, 5)) -> tuple[np.ndarray, np.ndarray]:
    """(mask, smooth anatomy) of an egg-shaped head, functions of millimetres alone."""
    mm = apply_affine(affine, np.indices(shape).reshape(3, -1).T) - centre_mm
    inside = ((mm / [55, 65, 50]) ** 2).sum(axis=1) < 1
    anatomy = 1000 + 200 * np.sin(mm[:, 0] / 25) * np.cos(mm[:, 1] / 30) + 3 * mm[:, 2] + mm[:, 0]
    return inside.reshape(shape), anatomy.reshape(shape)


def signal(affine: np.ndarray, shape: tuple[int, int, int], seconds: np.ndarray) -> np.ndarray:
    """Anatomy with slow smooth fluctuations, (x, y, z, t)."""
    _, anatomy = brain(affine, shape)
    mm = apply_affine(affine, np.indices(shape).reshape(3, -1).T)
    waves = [
        np.sin(mm @ direction / 30)[:, None] * np.sin(2 * np.pi * seconds / period + phase)
        for direction, period, phase in (([1, 0.3, 0], 13, 0), ([0, 1, 0.5], 21, 1), ([0.2, 0, 1], 34, 2))
    ]
    return anatomy[..., None] + 10 * sum(waves).reshape(*shape, -1)


def save(path: Path, data: np.ndarray, affine: np.ndarray, tr: float = 0.72, codes: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(data, affine)
    image.set_sform(affine, codes)
    image.set_qform(affine, codes)
    if data.ndim == 4:
        image.header.set_zooms((*image.header.get_zooms()[:3], tr))
        image.header.set_xyzt_units("mm", "sec")
    nib.save(image, path)
    return path


def source(bold: Path, mask: Path | None, **fields) -> RunSource:
    return RunSource(
        cohort="c",
        subject="01",
        session="",
        task="",
        run="",
        bold=bold,
        source=bold.name,
        **{"space": "MNI", "mask": mask, **fields},
    )


def saved(folder: Path, data: np.ndarray, mask: np.ndarray, affine: np.ndarray) -> RunSource:
    """A run and its mask, written."""
    return source(save(folder / "b.nii", data, affine), save(folder / "m.nii", mask.astype("u1"), affine))


def grid_image(grid: GridSettings) -> tuple[np.ndarray, tuple[int, int, int]]:
    return grid.grid().affine, grid.shape


def whole(result: Harmonised, values_PV: np.ndarray, grid: GridSettings) -> np.ndarray:
    return scatter(values_PV, result.patch_P3, grid.shape, grid.patch)


def fluctuation(result: Harmonised) -> np.ndarray:
    """All frames as one window, (T, P, V)."""
    return result.windows(np.array([0]), len(result.raw_TN))[0]


def zscored(result: Harmonised) -> np.ndarray:
    """The global z-score that the three parts hold, (T, P, V)."""
    return result.baseline_PV + fluctuation(result)
