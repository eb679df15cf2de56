"""A run outside of any cohort: a file, or an image in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from shards.bids import files_beside
from shards.cohort import CohortSettings, RunSource
from shards.errors import ConfigError
from shards.settings import check

Niimg = str | Path | nib.Nifti1Image


@contextmanager
def as_run(
    image: Niimg, mask: Niimg | None = None, confounds: str | Path | None = None, **stated: Any
) -> Iterator[RunSource]:
    """A run to convert; an image in memory lies in a temporary file meanwhile.

    Parameters
    ----------
    image : path or Nifti1Image
        4-D BOLD.
    mask : path or Nifti1Image, optional
        Its brain mask; without one that which fMRIPrep wrote beside the file, else it is computed.
    confounds : path, optional
        Its table; without one that which fMRIPrep wrote beside the file.
    **stated
        `space`, `tr`, `dummy`, `orientation` as in a cohort file.

    Raises
    ------
    ConfigError
        If an argument cannot be meant.
    """
    unknown = stated.keys() - {"space", "tr", "dummy", "orientation"}
    if unknown:
        raise ConfigError("run", min(unknown), "an unknown argument", "mask, confounds, space, tr, dummy, orientation")
    known = check(CohortSettings, {"name": "run", "root": ".", **stated}, "run")
    with tempfile.TemporaryDirectory(prefix="slim-brain-") as folder:
        bold = _file(image, "image", Path(folder))
        in_memory = bold.parent == Path(folder)
        beside = (None, None) if in_memory else files_beside(bold)
        yield RunSource(
            cohort="run",
            subject=bold.name.split(".nii")[0],
            session="",
            task="",
            run="",
            bold=bold,
            source="an image in memory" if in_memory else str(image),
            space=known.space,
            mask=beside[0] if mask is None else _file(mask, "mask", Path(folder)),
            confounds=beside[1] if confounds is None else Path(confounds),
            orientation=known.orientation,
            tr=known.tr,
            dummy=known.dummy,
        )


def _file(image: Niimg, field: str, folder: Path) -> Path:
    """Where an image lies; one in memory is written, in 32-bit floats, which is what a run is read as."""
    if isinstance(image, str | Path):
        return Path(image)
    if not isinstance(image, nib.Nifti1Image):
        raise ConfigError("run", field, type(image).__name__, "a path or a Nifti1Image")
    values = np.asanyarray(image.dataobj)
    if values.dtype.kind in "biuf":
        with np.errstate(over="ignore"):
            values = values.astype(np.float32)
    path = folder / f"{field}.nii"
    copy = type(image)(values, image.affine, image.header, dtype=values.dtype)
    copy.header.set_slope_inter(1, 0)
    nib.save(copy, path)
    return path
