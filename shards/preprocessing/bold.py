"""Read one BOLD scan: check the header, and read frames one by one.

Legend: x, y, z voxels of the file; T frames.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.orientations import axcodes2ornt

from shards.cohorts.bids import sidecars
from shards.cohorts.scan import RunSource
from shards.core import nifti
from shards.core.errors import RunRefused
from shards.core.files import trouble

LEAST_FRAMES = 4  # number of frames that a cubic spline in time needs
_TR_RANGE = 0.05, 20.0  # s
_TR_DIGITS = 6  # digits of a TR in s; the header stores 32-bit numbers, in which 0.8 is slightly more than 0.8
_AGAIN = "Copy it again"
_SMOOTH, _ROUGHER = 0.2, 2.0  # the roughness of real images is below 0.4, and 2.7 times as high with swapped bytes


@dataclass(frozen=True)
class Bold:
    """A scan with a valid header.

    Attributes
    ----------
    run : RunSource
    image : Nifti1Pair
    affine : float64 array (4, 4)
        From voxel indices to mm. It is that of `image`, if its header has one.
    frames : int
    tr : float
        In s.
    tr_source : str
        Source of the TR: "stated", "header", or the name of a sidecar.
    assumed : str
        Axis codes that were assumed because the header has none; otherwise empty.
    """

    run: RunSource
    image: nib.Nifti1Pair
    affine: np.ndarray
    frames: int
    tr: float
    tr_source: str
    assumed: str

    @property
    def shape(self) -> tuple[int, int, int]:
        x, y, z = self.image.shape[:3]
        return x, y, z

    @property
    def voxel_mm(self) -> tuple[float, ...]:
        return tuple(round(float(size), 3) for size in nib.affines.voxel_sizes(self.affine))

    @property
    def centred(self) -> bool:
        """Whether the scan is not in MNI space and is centred in the grid by its mask."""
        return self.run.space == "native" or bool(self.assumed)

    def volumes(self, wanted: Iterable[int] | None = None) -> Iterator[np.ndarray]:
        """Iterate over all frames, or those with the wanted numbers, in time order, float32 (x, y, z).

        The file is read once from start to end, with one frame in memory at a time.

        Raises
        ------
        RunRefused
            If a value is not finite, a frame has the same value everywhere, the file is incomplete, or it changes while
            it is read.
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
                    if frame == 0:
                        _check_byte_order(run, stored)
                    _check_volume(run, frame, volume)
                    yield volume
                file.read(1)  # at the end of a gzip file, its checksum is checked
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
    """A refusal if the file has changed since reading started."""
    try:
        now: Any = _stamp(run.bold)
    except OSError:
        now = None
    if now == before:
        return None
    got = (
        "a file that was removed while it was read"
        if now is None
        else f"a file that changed while it was read ({before[0]}, now {now[0]} bytes)"
    )
    return RunRefused(run.source, "data", got, "a file that does not change", "Convert again once it is complete")


def _check_volume(run: RunSource, frame: int, volume: np.ndarray) -> None:
    least, most = volume.min(), volume.max()  # NaN if a value is NaN
    if not (np.isfinite(least) and np.isfinite(most)):
        hint = "Repair the preprocessing, or leave the scan out"
        raise RunRefused(run.source, "data", f"NaN or Inf in frame {frame}", "finite values", hint)
    if least == most:
        hint = "Remove the empty frames, or leave the scan out"
        raise RunRefused(
            run.source, "data", f"{least:g} in every voxel of frame {frame}", "an image in every frame", hint
        )


def _check_byte_order(run: RunSource, stored: np.ndarray) -> None:
    """Refuse an image with another byte order than its header: read as the header says, it looks like noise."""
    if stored.dtype.itemsize == 1 or (rough := _roughness(stored)) < _SMOOTH:
        return
    if rough > _ROUGHER * _roughness(stored.byteswap()):
        order = "big" if stored.dtype.byteorder == ">" else "little"
        got = f"voxels that are noise in the byte order of the header ({order}-endian), but an image in the other one"
        hint = "Write the image again with the software that made it"
        raise RunRefused(run.source, "data", got, "the same byte order in header and voxels", hint)


def _roughness(stored: np.ndarray) -> float:
    """Mean squared difference of neighbouring voxels, divided by twice the variance: 1 in noise, near 0 in images."""
    with np.errstate(all="ignore"):
        values = stored.astype(np.float64)
        steps = [np.square(np.diff(values, axis=axis)).mean() for axis in range(3) if values.shape[axis] > 1]
        rough = float(np.mean(steps) / (2 * values.var())) if steps else 0.0
    return rough if np.isfinite(rough) else math.inf


def open_bold(run: RunSource) -> Bold:
    """Open a scan and check its header. No voxels are read.

    Raises
    ------
    RunRefused
        If the scan is not a 4-D NIfTI image of real numbers, its position is unknown and not given, or its TR is
        missing or impossible.
    """
    if run.problem is not None:
        raise run.problem
    image = nifti.open_image(run.bold, run.source)
    longer = [axis for axis in range(3, len(image.shape)) if image.shape[axis] > 1]  # axes of length 1 do not count
    time_axis = longer[0] if longer else 3
    frames = image.shape[time_axis] if len(image.shape) > 3 else 1
    if len(longer) > 1 or frames < LEAST_FRAMES:
        raise RunRefused(
            run.source,
            "dim",
            "x".join(map(str, image.shape)),
            f"x, y, z and at least {LEAST_FRAMES} frames",
            "Give a 4-D series, and leave other images out",
        )
    if image.get_data_dtype().kind not in "iuf":
        raise RunRefused(run.source, "datatype", f"complex or colour values ({image.get_data_dtype()})", "real numbers")
    affine, assumed = _position(run, image)
    tr, tr_source = _tr(run, image, time_axis)
    return Bold(run, image, affine, frames, tr, tr_source, assumed)


def _position(run: RunSource, image: nib.Nifti1Pair) -> tuple[np.ndarray, str]:
    """The affine in mm, and the axis codes that were assumed for it, or an empty text.

    Without qform and sform, position and orientation are unknown. If `space` is given, the position is not needed,
    because the brain is centred in the grid. The orientation is then taken from the cohort file, or assumed to be LAS:
    the ANALYZE convention that NIfTI-1 keeps for such files ("method 1" in nifti1.h) and that nibabel follows.
    """
    affine, assumed = nifti.affine_mm(image), ""
    if not nifti.code_of(image):
        if run.space is None:
            raise RunRefused(
                run.source,
                "qform_code, sform_code",
                "0, 0: position and orientation unknown",
                "a code above 0",
                f"Restore the header from the original scan, or give `space` and `orientation` {run.stated}",
            )
        assumed = run.orientation or "LAS"
        affine = np.zeros((4, 4))
        affine[3, 3] = 1
        for axis, (world, sign) in enumerate(axcodes2ornt(assumed)):
            affine[int(world), axis] = sign * image.header.get_zooms()[axis] * nifti.unit_mm(image)
        affine[:3, 3] = -affine[:3, :3] @ ((np.array(image.shape[:3]) - 1) / 2)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-6:
        raise RunRefused(run.source, "affine", "singular or not finite", "an invertible affine")
    return affine.astype(np.float64), assumed


def _tr(run: RunSource, image: nib.Nifti1Pair, time_axis: int) -> tuple[float, str]:
    """TR in seconds and its source: the given TR, else a BIDS sidecar, else the header."""
    if run.tr is not None:
        return round(run.tr, _TR_DIGITS), "stated"
    hint = f"Give `tr` {run.stated}"
    tr, where = _sidecar_tr(run)
    if tr is None:
        zoom = float(image.header.get_zooms()[time_axis])
        if zoom == 1 and not nifti.has_unit_of_time(image):  # the default of an incomplete header
            raise RunRefused(run.source, "TR", "1 without a unit (an incomplete header)", "a TR in seconds", hint)
        tr, where = zoom * nifti.unit_s(image), "header"
    tr = round(tr, _TR_DIGITS) if math.isfinite(tr) else tr
    if not _TR_RANGE[0] < tr <= _TR_RANGE[1]:
        got = f"{tr:g} s ({where})"
        raise RunRefused(run.source, "TR", got, f"{_TR_RANGE[0]:g}-{_TR_RANGE[1]:g} s", hint)
    return tr, where


def _sidecar_tr(run: RunSource) -> tuple[float | None, str]:
    """RepetitionTime of the nearest sidecar that has one, and the sidecar's name."""
    for path in sidecars(run.bold):
        if not (path.is_file() or path.is_symlink()):
            continue
        if found := trouble(path):
            raise RunRefused(path, "", found.got, "a BIDS sidecar", found.hint)
        try:
            value = json.loads(path.read_bytes().decode("utf-8-sig")).get("RepetitionTime")
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            got = f"unreadable JSON ({error})"
            raise RunRefused(path, "", got, "a BIDS sidecar", "Correct or remove it") from None
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise RunRefused(path, "RepetitionTime", repr(value), "seconds", "Correct it")
        return float(value), path.name
    return None, ""
