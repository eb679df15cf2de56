"""Scans in the form of Brainmarks: the voxels of a template, z-scored over time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from scipy.ndimage import affine_transform, distance_transform_edt

from shards.preprocessing import space
from slim.brainmarks.template import AFFINE, SHAPE, Template

VOXELS = 228_483  # in the mask of MNI152NLin6Asym at 2 mm
FEW = 60_000  # 480 ml: enough for a brain, and little memory


def template(voxels: int = FEW) -> Template:
    """A stub for the template, which would be downloaded: the innermost voxels of another MNI brain."""
    mask, affine = space.template()
    matrix = np.linalg.inv(affine) @ AFFINE
    brain_XYZ = affine_transform(mask, matrix[:3, :3], matrix[:3, 3], output_shape=SHAPE, order=0) > 0
    depth_XYZ = distance_transform_edt(brain_XYZ) - distance_transform_edt(~brain_XYZ)
    stub_XYZ = np.zeros(SHAPE, bool)
    stub_XYZ.ravel()[np.argsort(-depth_XYZ, axis=None, kind="stable")[:voxels]] = True
    return Template(stub_XYZ)


def write_template(home: Path, voxels: int = FEW) -> Path:
    """A stub as templateflow keeps it; returns `home`, the folder for TEMPLATEFLOW_HOME."""
    folder = home / "tpl-MNI152NLin6Asym"
    folder.mkdir(parents=True)
    image = nib.Nifti1Image(template(voxels).mask_XYZ.astype(np.uint8), AFFINE)
    nib.save(image, folder / "tpl-MNI152NLin6Asym_res-02_desc-brain_mask.nii.gz")
    return home


def flat(volume_XYZT: np.ndarray, mask_XYZ: np.ndarray) -> np.ndarray:
    """A scan as the suite flattens it, by its own way: transposed to (t, z, y, x), then masked; (T, V)."""
    return np.ascontiguousarray(volume_XYZT.T)[:, mask_XYZ.T]


def volume(value_TV: np.ndarray, mask_XYZ: np.ndarray) -> np.ndarray:
    """The inverse of `flat`: 0 outside the mask."""
    value_TZYX = np.zeros((len(value_TV), *mask_XYZ.T.shape), value_TV.dtype)
    value_TZYX[:, mask_XYZ.T] = value_TV
    return value_TZYX.T


def sample(value_TV: np.ndarray, tr: float, **labels: Any) -> dict[str, Any]:
    """A sample as the suite stores it."""
    mean_1V, sd_1V = value_TV.mean(axis=0, keepdims=True), value_TV.std(axis=0, keepdims=True)
    bold_TV = (value_TV - mean_1V) / np.where(sd_1V > 0, sd_1V, 1)
    arrays = {"bold": bold_TV, "mean": mean_1V, "std": sd_1V}
    return {**{name: array.astype(np.float32) for name, array in arrays.items()}, "tr": tr, **labels}


def on_template(bold: Path) -> np.ndarray:
    """A scan of another voxel size, interpolated to the voxels of the template; float32 (X, Y, Z, T)."""
    image = nib.load(bold)
    matrix = np.linalg.inv(image.affine) @ AFFINE
    frames = np.moveaxis(image.get_fdata(dtype=np.float32), 3, 0)
    found = [affine_transform(one, matrix[:3, :3], matrix[:3, 3], output_shape=SHAPE, order=1) for one in frames]
    return np.stack(found, axis=-1)


def scan(seed: int, frames: int, mask_XYZ: np.ndarray) -> np.ndarray:
    """A made-up scan in the order of the suite: anatomy, and fluctuations over space and time; float32 (T, V)."""
    rng = np.random.default_rng(seed)
    place_V3 = np.argwhere(mask_XYZ.T)[:, ::-1] / np.array(SHAPE) * 2 - 1
    anatomy_V = 1000 + 200 * np.sin(3 * place_V3[:, 0]) * np.cos(4 * place_V3[:, 1]) + 100 * place_V3[:, 2]
    wave_V8 = np.sin(place_V3 @ rng.normal(scale=4, size=(3, 8)))
    course_T8 = rng.standard_normal((frames, 8)).cumsum(axis=0)
    return (anatomy_V + 10 * course_T8 @ wave_V8.T).astype(np.float32)
