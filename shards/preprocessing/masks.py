"""The brain mask of a run: the given one, by its range of values, or one that is computed from the run.

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
from shards.core.settings import Settings, Unit
from shards.preprocessing.bold import Bold

_MEAN_OF = 100  # frames: enough for a stable mean image
_EDGE = 0.05  # share of the largest value below which a voxel belongs to a soft edge
_LEVEL, _NEAR, _PLATEAU = 0.75, 0.98, 0.25
_FEW = 10  # largest label of tissues; masks in per cent and of 0 to 255 have larger values


class BrainMaskSettings(Settings):
    """What a brain mask must be like."""

    ml: Annotated[tuple[float, float], Unit("ml")] = Field(
        (300, 2500), description="least and largest volume; lower it for infants or slabs"
    )
    outside: Annotated[float, Unit("share")] = Field(
        0.1, ge=0, le=1, description="largest fraction of a mask that may lie outside the grid"
    )
    dead: Annotated[float, Unit("share")] = Field(
        0.25, ge=0, le=1, description="largest fraction of a mask that may be without signal"
    )
    mni_dice: Annotated[float, Unit("Dice")] = Field(
        0.75, ge=0, le=1, description="least Dice overlap with the MNI152 brain where `space` is not stated"
    )

    @model_validator(mode="after")
    def _ordered(self) -> BrainMaskSettings:
        if not 0 <= self.ml[0] < self.ml[1]:
            raise ValueError(f"two rising volumes: 0 <= {self.ml[0]:g} < {self.ml[1]:g} does not hold")
        return self


@dataclass(frozen=True)
class Mask:
    """A brain mask on any grid.

    Attributes
    ----------
    brain : bool (x, y, z)
    affine : float64 (4, 4), voxel index to mm
    source : str, the file it came from, or "computed"
    rule : str, how its values were made a mask, where they were not 0 and 1; else empty
    """

    brain: np.ndarray
    affine: np.ndarray
    source: str
    rule: str


def find_mask(bold: Bold, settings: BrainMaskSettings) -> Mask:
    """The brain mask of a run.

    Raises
    ------
    RunRefused
        If it is missing, unreadable, empty, or its volume is not that of a brain.
    """
    run = bold.run
    mask = Mask(_computed(bold), bold.affine, "computed", "") if run.mask is None else _given(bold, run.mask)
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
    """Which voxels of a mask image are brain, and the rule in words where its values are not 0 and 1 alone.

    A mask is nearly flat inside: in a probability map, a mask in per cent or one of 0 to 255, most voxels have the
    largest value, and half of it is the border. In a skull-stripped image the values inside differ, and in an image of
    tissue labels they are few whole numbers: all above 0 is brain.

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


def _given(bold: Bold, path: Path) -> Mask:
    run = bold.run
    image = open_image(path, run.source, "mask")
    shape = image.shape
    if len(shape) < 3 or any(size != 1 for size in shape[3:]):
        got = f"{path} with {len(shape)} dimensions ({'x'.join(map(str, shape))})"
        raise RunRefused(run.source, "mask", got, "three dimensions")
    try:
        values = np.asarray(image.dataobj, np.float32).reshape(shape[:3])
    except Exception as error:  # gzip, zlib and nibabel raise many types for damaged files; colours are no numbers
        got = f"{path}, which cannot be read ({error})"
        raise RunRefused(run.source, "mask", got, "a NIfTI mask", "Copy it again") from None
    affine = affine_mm(image)
    if not code_of(image):
        if not bold.assumed or values.shape != bold.shape:
            got = f"{path} with qform_code and sform_code 0: position unknown"
            raise RunRefused(run.source, "mask", got, "a code above 0", "Restore the mask's header")
        affine = bold.affine  # of a run whose header has none either: the same voxels
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-6:
        got = f"{path} with an affine that is singular or not finite"
        raise RunRefused(run.source, "mask", got, "an invertible affine", "Restore the mask's header")
    brain, rule = threshold(values)
    return Mask(brain, affine, path.name, rule)


def _computed(bold: Bold) -> np.ndarray:
    """nilearn's EPI mask of the mean of frames that are spread over the run."""
    from nilearn.masking import compute_epi_mask  # takes seconds to import

    wanted = np.unique(np.linspace(0, bold.frames - 1, min(_MEAN_OF, bold.frames)).astype(int))
    mean = np.zeros(bold.shape)
    for volume in bold.volumes(wanted):
        mean += volume / len(wanted)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of an empty mask, which is refused by name
            return compute_epi_mask(nib.Nifti1Image(mean.astype(np.float32), bold.affine)).get_fdata() > 0.5
    except Exception as error:  # nilearn raises many types for images without a brain
        got = f"none could be computed ({error})"
        raise RunRefused(
            bold.run.source, "mask", got, "a brain in the image", f"Give a `mask` {bold.run.stated}"
        ) from None
