"""One BOLD run as it lies on disk: what its header says, its frames one by one, its brain mask.

Legend: x, y, z voxels of the file; T frames.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.orientations import axcodes2ornt
from nilearn.masking import compute_epi_mask
from pydantic import Field, model_validator

from shards.cohort import RunSource
from shards.errors import RunRefused
from shards.settings import Settings

LEAST_FRAMES = 4  # a cubic spline in time needs as many
_TR_RANGE = 0.05, 20.0  # s
_AGAIN = "Copy it again"


class MaskSettings(Settings):
    """What a brain mask must be like."""

    ml: tuple[float, float] = Field(
        (300, 2500), description="least and largest volume, ml; lower it for infants, slabs"
    )
    outside: float = Field(0.1, ge=0, le=1, description="largest fraction of a mask that may lie outside the grid")

    @model_validator(mode="after")
    def _ordered(self) -> MaskSettings:
        if not 0 <= self.ml[0] < self.ml[1]:
            raise ValueError(f"two rising volumes: 0 <= {self.ml[0]:g} < {self.ml[1]:g} does not hold")
        return self


@dataclass(frozen=True)
class Bold:
    """A run whose header was found sound.

    Attributes
    ----------
    run : RunSource
    image : Nifti1Image
    affine : float64 (4, 4), voxel index to mm; `image`'s unless its header has none
    tr : float, s
    assumed : str, axis codes that were assumed because the header has none, or empty
    """

    run: RunSource
    image: nib.Nifti1Image
    affine: np.ndarray
    tr: float
    assumed: str

    @property
    def shape(self) -> tuple[int, int, int]:
        x, y, z, _ = self.image.shape
        return x, y, z

    @property
    def frames(self) -> int:
        return self.image.shape[3]

    @property
    def voxel_mm(self) -> tuple[float, ...]:
        return tuple(round(float(size), 3) for size in nib.affines.voxel_sizes(self.affine))

    @property
    def centred(self) -> bool:
        """Whether the run has no place in MNI space and is moved to the middle of the grid by its mask."""
        return self.run.space == "native" or bool(self.assumed)

    def volumes(self, wanted: Iterable[int] | None = None) -> Iterator[np.ndarray]:
        """Frames one by one in time order, float32 (x, y, z), all or those of these numbers.

        The file is read front to back, one frame in memory at a time, whether it is compressed or not.

        Raises
        ------
        RunRefused
            If a value is not finite, a frame has the same value everywhere, the file ends too early, or it changes
            while it is read.
        """
        run = self.run
        proxy: Any = self.image.dataobj
        numbers = None if wanted is None else set(map(int, wanted))
        size = math.prod(self.shape) * proxy.dtype.itemsize
        before = _stamp(run.bold)
        try:
            with self.image.file_map["image"].get_prepare_fileobj("rb") as file:
                file.seek(proxy.offset)
                for frame in range(self.frames):
                    data = file.read(size)
                    if len(data) < size:
                        raise EOFError(f"it ends in frame {frame} of {self.frames}")
                    if numbers is not None and frame not in numbers:
                        continue
                    stored = np.frombuffer(data, proxy.dtype).reshape(self.shape, order="F")
                    volume = stored * np.float64(proxy.slope) + np.float64(proxy.inter)
                    with np.errstate(over="ignore"):
                        volume = volume.astype(np.float32)
                    _check_volume(run, frame, volume)
                    yield volume
                file.read(1)  # the end of a gzip file, where its checksum is compared
        except RunRefused as refused:
            raise _changed(run, before) or refused from None
        except Exception as error:  # gzip, zlib and nibabel raise many types for damaged files
            unreadable = RunRefused(run.source, "data", f"unreadable ({error})", "a complete file", _AGAIN)
            raise _changed(run, before) or unreadable from None
        if changed := _changed(run, before):
            raise changed


def _stamp(path: Path) -> tuple[int, int, int]:
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def _changed(run: RunSource, before: tuple[int, int, int]) -> RunRefused | None:
    """A refusal if the file is not the one it was when reading began."""
    try:
        now: Any = _stamp(run.bold)
    except OSError:
        now = None
    if now == before:
        return None
    got = (
        "no file any more"
        if now is None
        else f"a file that changed while it was read ({before[0]}, now {now[0]} bytes)"
    )
    return RunRefused(run.source, "data", got, "a file nobody writes to", "Convert again once it is complete")


def _check_volume(run: RunSource, frame: int, volume: np.ndarray) -> None:
    least, most = volume.min(), volume.max()  # NaN if any is
    if not (np.isfinite(least) and np.isfinite(most)):
        hint = "Repair the preprocessing, or leave the run out"
        raise RunRefused(run.source, "data", f"NaN or Inf in frame {frame}", "finite values", hint)
    if least == most:
        hint = "Cut the empty frames off, or leave the run out"
        raise RunRefused(
            run.source, "data", f"{least:g} in every voxel of frame {frame}", "an image in every frame", hint
        )


def open_bold(run: RunSource) -> Bold:
    """A run's header, checked; no voxel is read.

    Raises
    ------
    RunRefused
        If the run is no 4-D NIfTI with real numbers, its position is unknown and not stated, or its TR is missing or
        impossible.
    """
    if run.problem is not None:
        raise run.problem
    try:
        image = nib.load(run.bold)
    except FileNotFoundError:
        raise RunRefused(run.source, "", "no such file", "a NIfTI run") from None
    except Exception as error:  # nibabel raises many types for files that are no image
        raise RunRefused(run.source, "", f"no readable image ({type(error).__name__})", "a NIfTI run") from None
    if not isinstance(image, nib.Nifti1Image):
        raise RunRefused(run.source, "format", type(image).__name__, "NIfTI-1 or NIfTI-2")
    if len(image.shape) != 4 or image.shape[3] < LEAST_FRAMES:
        raise RunRefused(
            run.source,
            "dim",
            "x".join(map(str, image.shape)),
            f"x, y, z and at least {LEAST_FRAMES} frames",
            "Leave files that are no runs out of the pattern",
        )
    if image.get_data_dtype().kind not in "iuf":
        raise RunRefused(run.source, "datatype", f"complex or colour values ({image.get_data_dtype()})", "real numbers")
    affine, assumed = _position(run, image)
    return Bold(run, image, affine, _tr(run, image), assumed)


def _position(run: RunSource, image: nib.Nifti1Image) -> tuple[np.ndarray, str]:
    """The affine (mm), and the axis codes that had to be assumed for it, if any.

    Without a qform and sform neither place nor orientation is known. Where `space:` is stated the place does not matter
    (the brain is moved to the middle of the grid), and the orientation is the cohort file's, or LAS: the ANALYZE
    convention that NIfTI-1 keeps for such files ("method 1" of nifti1.h), which nibabel follows.
    """
    affine, assumed = image.affine, ""
    if int(image.header["qform_code"]) == 0 and int(image.header["sform_code"]) == 0:
        if run.space is None:
            raise RunRefused(
                run.source,
                "qform_code, sform_code",
                "0, 0: position and orientation unknown",
                "a code above 0",
                "Restore the header from the original scan, or state `space:` and `orientation:` in the cohort file",
            )
        assumed = run.orientation or "LAS"
        affine = np.zeros((4, 4))
        affine[3, 3] = 1
        for axis, (world, sign) in enumerate(axcodes2ornt(assumed)):
            affine[int(world), axis] = sign * image.header.get_zooms()[axis]
        affine[:3, 3] = -affine[:3, :3] @ ((np.array(image.shape[:3]) - 1) / 2)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-6:
        raise RunRefused(run.source, "affine", "singular or not finite", "an invertible affine")
    return affine.astype(np.float64), assumed


def _tr(run: RunSource, image: nib.Nifti1Image) -> float:
    """TR in seconds: the cohort file's, else the BIDS sidecar's, else the header's."""
    if run.tr is not None:
        return run.tr
    hint = "Set `tr` in the cohort file"
    tr, where = _sidecar_tr(run), "TR"
    if tr is None:
        zoom, unit = float(image.header.get_zooms()[3]), image.header.get_xyzt_units()[1]
        if zoom == 1 and unit == "unknown":  # what a header holds when nobody filled it in
            raise RunRefused(run.source, where, "1 of no unit, a header nobody filled in", "a TR in seconds", hint)
        # the header holds 32-bit numbers, in which 0.8 is a little more than 0.8
        tr = round(zoom * {"msec": 1e-3, "usec": 1e-6}.get(unit, 1.0), 6)
    if not _TR_RANGE[0] < tr <= _TR_RANGE[1]:
        raise RunRefused(run.source, where, f"{tr:g} s", f"{_TR_RANGE[0]:g}-{_TR_RANGE[1]:g} s", hint)
    return tr


def sidecar(bold: Path) -> Path:
    """Where the BIDS sidecar of a run would lie."""
    return bold.with_name(bold.name.split(".nii")[0] + ".json")


def _sidecar_tr(run: RunSource) -> float | None:
    path = sidecar(run.bold)
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text()).get("RepetitionTime")
    except (OSError, ValueError, AttributeError):
        raise RunRefused(path, "", "unreadable JSON", "a BIDS sidecar", "Mend or remove it") from None
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise RunRefused(path, "RepetitionTime", repr(value), "seconds", "Mend it")
    return None if value is None else float(value)


def find_mask(bold: Bold, settings: MaskSettings) -> tuple[np.ndarray, np.ndarray, str]:
    """The brain mask of a run, on any grid.

    Returns
    -------
    mask : bool (x, y, z)
    affine : float64 (4, 4), voxel index to mm
    source : str, the file it came from, or "computed"

    Raises
    ------
    RunRefused
        If it is missing, unreadable, empty, or its volume is not that of a brain.
    """
    run = bold.run
    if run.mask is None:
        mask, affine, source = _computed_mask(bold), bold.affine, "computed"
    else:
        mask, affine = _given_mask(bold, run.mask)
        source = run.mask.name
    if not mask.any():
        raise RunRefused(run.source, "mask", f"an empty mask ({source})", "a mask with brain voxels")
    ml = np.count_nonzero(mask) * abs(np.linalg.det(affine[:3, :3])) / 1000
    if not settings.ml[0] <= ml <= settings.ml[1]:
        raise RunRefused(
            run.source,
            "mask",
            f"a brain of {ml:.0f} ml ({source})",
            f"{settings.ml[0]:g} to {settings.ml[1]:g} ml",
            "Give another `mask`, or set mask.ml if it is meant",
        )
    return mask, affine, source


def _computed_mask(bold: Bold) -> np.ndarray:
    """nilearn's EPI mask of the mean of at most 100 frames spread over the run: enough for a stable mean image."""
    wanted = np.unique(np.linspace(0, bold.frames - 1, min(100, bold.frames)).astype(int))
    mean = np.zeros(bold.shape)
    for volume in bold.volumes(wanted):
        mean += volume / len(wanted)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of an empty mask, which is refused by name
            return compute_epi_mask(nib.Nifti1Image(mean.astype(np.float32), bold.affine)).get_fdata() > 0.5
    except Exception as error:  # nilearn raises many types for images without a brain
        raise RunRefused(
            bold.run.source,
            "mask",
            f"none could be computed ({error})",
            "a brain in the image",
            "Give a `mask` in the cohort file",
        ) from None


def _given_mask(bold: Bold, path: Path) -> tuple[np.ndarray, np.ndarray]:
    run = bold.run
    if not path.is_file():
        raise RunRefused(run.source, "mask", f"no file {path}", "the mask the cohort file names")
    try:
        image: Any = nib.load(path)
        values = np.asarray(image.dataobj, np.float32)
    except Exception as error:
        raise RunRefused(run.source, "mask", f"{path}: {type(error).__name__}", "a NIfTI mask") from None
    if values.ndim == 4 and values.shape[3] == 1:
        values = values[..., 0]
    if values.ndim != 3:
        raise RunRefused(run.source, "mask", f"{path} with {values.ndim} dimensions", "three dimensions")
    if not isinstance(image, nib.Nifti1Image):
        raise RunRefused(run.source, "mask", f"{path}: {type(image).__name__}", "a NIfTI mask")
    affine = image.affine
    if not int(image.header["qform_code"]) and not int(image.header["sform_code"]):
        if not bold.assumed or values.shape != bold.shape:
            raise RunRefused(
                run.source,
                "mask",
                f"{path} with qform_code and sform_code 0: position unknown",
                "a code above 0",
                "Restore the mask's header",
            )
        affine = bold.affine  # of a run whose header has none either: the same voxels
    return values > 0.5, np.asarray(affine, np.float64)
