"""Check whether a scan is in MNI space: as given, or from the header code and the overlap with the MNI152 brain.

Legend: X, Y, Z voxels of the grid.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from shards.core.errors import RunRefused
from shards.core.nifti import MNI, code_of, code_words
from shards.format.grid import Grid
from shards.preprocessing.bold import Bold
from shards.preprocessing.resampling import resample_mask


def template() -> tuple[np.ndarray, np.ndarray]:
    """The MNI152 brain mask included in nilearn, float32 at 2 mm, and its affine."""
    from nilearn.datasets import load_mni152_brain_mask  # takes a second to import

    image = load_mni152_brain_mask(resolution=2)
    return np.asarray(image.dataobj, np.float32), image.affine


@lru_cache(maxsize=2)
def _template_on(grid: Grid) -> np.ndarray:
    mask, affine = template()
    return resample_mask(mask > 0, affine, grid)


def mni_dice(brain_XYZ: np.ndarray, grid: Grid) -> float:
    """Dice overlap of a brain mask on the grid with the MNI152 brain: 2 |A and B| / (|A| + |B|)."""
    mni_XYZ = _template_on(grid)
    both, one, other = (int(mask.sum()) for mask in (brain_XYZ & mni_XYZ, brain_XYZ, mni_XYZ))
    return 2 * both / max(one + other, 1)


def check_space(bold: Bold, brain_XYZ: np.ndarray, grid: Grid, least: float) -> tuple[float | None, str]:
    """Check whether a scan can be used as a scan in MNI space.

    Parameters
    ----------
    bold : Bold
    brain_XYZ : bool array
        Brain mask on the grid.
    grid : Grid
    least : float
        Smallest Dice overlap with the MNI152 brain for scans without a given space.

    Returns
    -------
    dice : float or None
        None for a scan that is centred in the grid, because its overlap is not informative.
    assumed : str
        What was assumed, and why; empty if nothing was.

    Raises
    ------
    RunRefused
        If `space` is not given and the overlap is too small.
    """
    run = bold.run
    if bold.centred:
        return None, ""
    dice = round(mni_dice(brain_XYZ, grid), 4)
    header = code_words(bold.image)
    if run.says_mni:
        low = f"stated as MNI, but its brain overlaps the MNI152 brain by Dice {dice:.2f} only: check the registration"
        return dice, low if dice < least else ""
    if dice < least:
        raise RunRefused(
            run.source,
            "space",
            f"{header}, and a brain that overlaps the MNI152 brain by Dice {dice:.2f}",
            f"a scan in MNI space, with a Dice overlap of {least:g} or more",
            f"Give `space` {run.stated}: `native` centres the brain in the grid, `MNI` uses the scan as it is",
        )
    taken = f"taken as MNI: {header}, but its brain overlaps the MNI152 brain by Dice {dice:.2f}"
    return dice, taken if code_of(bold.image) != MNI else ""
