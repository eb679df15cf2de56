"""The brain mask of a scan: a given image, thresholded according to its range of values, or a computed mask.

Legend: x, y, z voxels of the mask's image.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import nibabel as nib
import numpy as np
from pydantic import Field, model_validator

from shards.core.errors import RunRefused
from shards.core.nifti import affine_mm, code_of, open_image
from shards.core.settings import Contradiction, Settings, Unit
from shards.preprocessing.bold import Bold

_MEAN_OF = 100  # number of frames of the mean image
_EDGE = 0.05  # voxels below this share of the largest value belong to a soft edge
_LEVEL, _NEAR, _PLATEAU = 0.75, 0.98, 0.25
_FEW = 10  # largest label of tissues; masks with values up to 100 or 255 have larger values


class BrainMaskSettings(Settings):
    """Limits for brain masks."""

    ml: Annotated[tuple[float, float], Unit("ml")] = Field(
        (300, 2500), description="smallest and largest accepted volume; lower it for infants or slabs"
    )
    outside: Annotated[float, Unit("share")] = Field(
        0.1, ge=0, le=1, description="largest fraction of a mask outside the grid"
    )
    dead: Annotated[float, Unit("share")] = Field(
        0.25, ge=0, le=1, description="largest fraction of a mask without signal"
    )
    mni_dice: Annotated[float, Unit("Dice")] = Field(
        0.75, ge=0, le=1, description="smallest Dice overlap with the MNI152 brain if `space` is not given"
    )

    @model_validator(mode="after")
    def _ordered(self) -> BrainMaskSettings:
        if not 0 <= self.ml[0] < self.ml[1]:
            raise Contradiction("ml", list(self.ml), "a volume of 0 or more, then a larger one")
        return self


@dataclass(frozen=True)
class BrainMask:
    """A brain mask on any grid.

    Attributes
    ----------
    brain : bool array (x, y, z)
    affine : float64 array (4, 4)
        From voxel indices to mm.
    source : str
        The file of the mask, or "computed".
    rule : str
        How the values were thresholded, if they were not 0 and 1; otherwise empty.
    """

    brain: np.ndarray
    affine: np.ndarray
    source: str
    rule: str


def find_mask(bold: Bold, settings: BrainMaskSettings) -> BrainMask:
    """Find the brain mask of a scan.

    Raises
    ------
    RunRefused
        If the mask is missing, unreadable or empty, or its volume is outside the limits.
    """
    run = bold.run
    mask = BrainMask(_computed(bold), bold.affine, "computed", "") if run.mask is None else _given(bold, run.mask)
    if not mask.brain.any():
        raise RunRefused(run.source, "mask", f"an empty mask ({mask.source})", "a mask with brain voxels")
    ml = np.count_nonzero(mask.brain) * abs(np.linalg.det(mask.affine[:3, :3])) / 1000
    if not settings.ml[0] <= ml <= settings.ml[1]:
        told = f", {mask.rule}" if mask.rule else ""
        raise RunRefused(
            run.source,
            "mask",
            f"a brain of {ml:.0f} ml ({mask.source}{told})",
            f"{settings.ml[0]:g} to {settings.ml[1]:g} ml",
            "Give another `mask`, or set mask.ml if the volume is right",
        )
    return mask


def threshold(values: np.ndarray) -> tuple[np.ndarray, str]:
    """Threshold a mask image. Returns the brain voxels, and a description of the rule if values are not only 0 and 1.

    In masks with soft values (probabilities, per cent, or 0 to 255), most voxels inside have the largest value, and the
    threshold is half of it. In skull-stripped images the values inside differ, and images of tissue labels have few
    whole numbers; in both, all voxels above 0 are brain.

    Parameters
    ----------
    values : float32 (x, y, z)
        NaN counts as 0.

    Returns
    -------
    brain : bool (x, y, z)
    rule : str
    """
    values = np.nan_to_num(values, nan=0.0, posinf=np.inf, neginf=0.0)
    inside = values[values > 0]
    if not len(inside) or not np.isfinite(inside).all():
        return np.zeros(values.shape, bool), ""
    most = float(inside.max())
    if inside.min() == most:
        return values > 0, "" if most == 1 else f"all of its values above 0 are {most:g}"
    levels = np.unique(inside) if most <= _FEW else np.zeros(0)
    labels = len(levels) > 0 and bool((levels == np.rint(levels)).all())
    body = inside[inside > _EDGE * most]
    flat = np.median(body) >= _LEVEL * most and np.mean(body >= _NEAR * most) >= _PLATEAU
    if flat and not labels:
        return values > most / 2, f"soft values from 0 to {most:g}: brain above half of it"
    kind = f"labels {', '.join(f'{level:g}' for level in levels)}" if labels else f"an image with values to {most:g}"
    return values > 0, f"{kind}: brain above 0"


def _given(bold: Bold, path: Path) -> BrainMask:
    run = bold.run
    image = open_image(path, run.source, "mask")
    shape = image.shape
    if len(shape) < 3 or any(size != 1 for size in shape[3:]):
        got = f"{path} with {len(shape)} dimensions ({'x'.join(map(str, shape))})"
        raise RunRefused(run.source, "mask", got, "three dimensions")
    try:
        values = np.asarray(image.dataobj, np.float32).reshape(shape[:3])
    except Exception as error:  # gzip, zlib and nibabel raise many types for damaged files and colour images
        got = f"{path}, which cannot be read ({error})"
        raise RunRefused(run.source, "mask", got, "a NIfTI mask", "Copy it again") from None
    affine = affine_mm(image)
    if not code_of(image):
        if not bold.assumed or values.shape != bold.shape:
            got = f"{path} with qform_code and sform_code 0: position unknown"
            raise RunRefused(run.source, "mask", got, "a code above 0", "Restore the header of the mask")
        affine = bold.affine  # the header of the scan has none either, so both are assumed to have the same voxels
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-6:
        got = f"{path} with an affine that is singular or not finite"
        raise RunRefused(run.source, "mask", got, "an invertible affine", "Restore the header of the mask")
    brain, rule = threshold(values)
    return BrainMask(brain, affine, path.name, rule)


def _computed(bold: Bold) -> np.ndarray:
    """nilearn's EPI mask of the mean image, from frames spread over the scan."""
    from nilearn.masking import compute_epi_mask  # takes seconds to import

    wanted = np.unique(np.linspace(0, bold.frames - 1, min(_MEAN_OF, bold.frames)).astype(int))
    mean = np.zeros(bold.shape)
    for volume in bold.volumes(wanted):
        mean += volume / len(wanted)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # an empty mask is refused later
            return compute_epi_mask(nib.Nifti1Image(mean.astype(np.float32), bold.affine)).get_fdata() > 0.5
    except Exception as error:  # nilearn raises many types for images without a brain
        got = f"none could be computed ({error})"
        raise RunRefused(
            bold.run.source, "mask", got, "a brain in the image", f"Give a `mask` {bold.run.stated}"
        ) from None
