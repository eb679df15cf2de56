"""Single scans, given as files or as images in memory.

with as_run("sub-01_bold.nii.gz", tr=2.0) as run: ...
with as_run(nib.load("sub-01_bold.nii.gz"), tr=2.0) as run: ...  # the same file, mask, confounds and sidecar
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import nibabel as nib
import numpy as np
from nibabel.spatialimages import SpatialImage

from shards.cohorts.bids import files_beside, sidecars, top_folder
from shards.cohorts.cohort_file import CohortSettings
from shards.cohorts.scan import RunSource
from shards.core.errors import ArgumentError, ConfigError, RunRefused, UserError, did_you_mean
from shards.core.nifti import affine_mm, open_image
from shards.core.settings import check

if TYPE_CHECKING:
    import pandas as pd

Niimg = str | os.PathLike[str] | nib.Nifti1Image
Scan = Niimg | Sequence[Niimg]
Table: TypeAlias = "str | os.PathLike[str] | pd.DataFrame"

_WHERE = "arguments"
_ENDINGS = (".nii.gz", ".nii", ".img.gz", ".img", ".hdr.gz", ".hdr")
_AFFINE = 1e-4  # mm; affines that were stored as 32-bit numbers differ by less
_ONE_SCAN = "Encode one scan at a time; SlimBrainTransformer accepts many"
_IMAGE = "a path or a nibabel image"


@contextmanager
def as_run(
    image: Scan,
    mask: Niimg | None = None,
    confounds: Table | None = None,
    *,
    space: str | None = None,
    tr: float | None = None,
    dummy: int | str = "auto",
    orientation: str | None = None,
) -> Iterator[RunSource]:
    """Context that provides a scan to convert. Images in memory are written to temporary files.

    An image that was loaded from a file and not changed is replaced by the file, so `nib.load(path)` is the same as
    `path`. If its header, affine or voxels were changed, the changed image is used, with the mask, confounds and
    sidecars next to its file (but not the sidecars if the TR of the header was changed). An image without a file has
    none of these.

    Parameters
    ----------
    image : path, Nifti1Image, or list of them
        One 4-D BOLD scan. A list holds the 3-D images of one scan, of the same shape and affine, in time order. Their
        headers have no TR, so `tr` must be given, and files next to them are not used.
    mask : path or Nifti1Image, optional
        Brain mask; by default the one that fMRIPrep wrote next to the file, otherwise it is computed.
    confounds : path or DataFrame, optional
        Confounds, one row for each frame; by default the table that fMRIPrep wrote next to the file.
    space : "MNI" or "native", optional
        By default as in the file name or header.
    tr : float, optional
        Repetition time in seconds; by default from the sidecar or header.
    dummy : "auto" or int
        Number of volumes to drop at the start; "auto" drops those that are brighter than the rest.
    orientation : str, optional
        Axis codes such as "LAS", for an image without orientation in its header.

    Raises
    ------
    ArgumentError
        If an argument has the wrong type (a TypeError).
    ConfigError
        If the value of an argument is not accepted (a ValueError).
    RunRefused
        If an image of a list, or the voxels of an image, cannot be read.
    """
    known = _check_stated(space, tr, dummy, orientation)
    with tempfile.TemporaryDirectory(prefix="slim-brain-") as name:
        folder = Path(name)
        if isinstance(image, list | tuple):
            scan = _join(image, known.tr, folder)
        else:
            scan = _take(image, "image", folder, f"{_IMAGE}, or a list of 3-D images with tr=")
        beside = (None, None) if scan.file is None else files_beside(scan.file)
        brain = None if mask is None else _take(mask, "mask", folder, _IMAGE)
        table = None if confounds is None else _table(confounds, folder)
        run = RunSource(
            cohort="run",
            subject=_stem(scan.path),
            session="",
            task="",
            run="",
            bold=scan.path,
            source=scan.source,
            space=known.space,
            mask=beside[0] if brain is None else brain.path,
            confounds=beside[1] if table is None else table.path,
            orientation=known.orientation,
            tr=known.tr,
            dummy=known.dummy,
            stated="as an argument",
        )
        try:
            yield run
        except UserError as error:  # replace the names of temporary files
            named = [given for given in (scan, brain, table) if given is not None and given.path.is_relative_to(folder)]
            if not named:
                raise
            raise _renamed(error, {str(given.path): given.source for given in named}) from None


@dataclass(frozen=True)
class _Given:
    """An argument as a file.

    Attributes
    ----------
    path : Path
        The file that is read.
    source : str
        Its name in errors.
    file : Path or None
        The original file, next to which mask, confounds and sidecar are searched.
    """

    path: Path
    source: str
    file: Path | None = None


def file_of(image: Any) -> Path | None:
    """The file of a path or image; None for an image made in memory, and for other objects."""
    if isinstance(image, SpatialImage):
        image = image.get_filename()
    return Path(image).expanduser() if isinstance(image, str | os.PathLike) else None


def unchanged(image: SpatialImage) -> Path | None:
    """The file from which an image was loaded or to which it was saved, if the image was not changed since."""
    file = file_of(image)
    try:
        there: Any = None if file is None else nib.load(file)
    except Exception:  # nibabel raises many types; the error is reported when the image is read
        return None
    if file is None or type(there) is not type(image) or there.shape != image.shape:
        return None
    if not (np.array_equal(there.affine, image.affine, equal_nan=True) and _header(there) == _header(image)):
        return None
    read_from = getattr(image.dataobj, "file_like", None)  # set if the voxels are still on disk
    if isinstance(read_from, str | os.PathLike) and Path(read_from).exists() and os.path.samefile(read_from, file):
        return file
    try:
        same = np.array_equal(_voxels(image), _voxels(there), equal_nan=True)
    except (OSError, EOFError, TypeError, ValueError):  # a damaged file, or voxels that are not numbers
        return None
    return file if same else None


def check_voxels(image: Any, field: str, source: str) -> None:
    """Refuse an image with two different sets of voxels: nibabel saves `dataobj`, but nilearn uses the cached array."""
    for name in ("_fdata_cache", "_data_cache"):
        cache = getattr(image, name, None)
        if cache is None or cache is image.dataobj:
            continue
        try:
            values = np.asanyarray(image.dataobj)
        except Exception as error:  # gzip, zlib and nibabel raise many types for damaged files
            raise _unreadable(source, error) from None
        if not np.array_equal(cache, values.astype(cache.dtype), equal_nan=cache.dtype.kind == "f"):
            raise ConfigError(
                source,
                field,
                "voxels of get_fdata() that were changed in place, so that dataobj differs",
                "equal voxels in both",
                "Make a new image: nib.Nifti1Image(image.get_fdata(), image.affine, image.header)",
            )


def _header(image: Any) -> Any:
    """A header without the fields that describe how the voxels are stored."""
    header = image.header.copy()
    if isinstance(header, nib.Nifti1Header):
        for field in ("vox_offset", "magic", "scl_slope", "scl_inter", "datatype", "bitpix"):
            header[field] = 0
    return header


def _voxels(image: Any) -> np.ndarray:
    """Values of an image as 32-bit floats, the precision in which scans are read."""
    values = np.asanyarray(image.dataobj)
    if values.dtype.kind in "biuf":
        with np.errstate(over="ignore"):
            values = values.astype(np.float32, copy=False)
    return values


def _take(image: Any, field: str, folder: Path, accepted: str) -> _Given:
    """An image as a file: its own file, or a temporary one with the same name."""
    if isinstance(image, str | os.PathLike):
        if not os.fspath(image):
            raise ConfigError(_WHERE, field, "an empty text", accepted)
        return _Given(Path(image).expanduser(), str(image), Path(image).expanduser())
    if not isinstance(image, SpatialImage):
        raise _wrong_type(field, image, accepted)
    file = file_of(image)
    source = ("an image in memory" if field == "image" else f"an image given as {field}") if file is None else str(file)
    check_voxels(image, field, source)
    if (same := unchanged(image)) is not None:
        return _Given(same, source, same)
    if not isinstance(image, nib.Nifti1Pair):
        hint = "Convert it to NIfTI: nib.Nifti1Image(image.dataobj, image.affine)"
        raise ArgumentError(_WHERE, field, type(image).__name__, "a Nifti1Image", hint)
    if file is None:
        return _Given(_write(image, folder / field / f"{field}.nii", source), source)
    top = top_folder(file)
    below = file.relative_to(top).with_name(f"{_stem(file)}.nii")  # names hold information such as the space
    path = _write(image, folder / field / below, source)
    if field == "image" and not _other_tr(image, file):
        for sidecar in sidecars(file):  # to the same relative paths, where they will be searched
            if sidecar.is_file() or sidecar.is_symlink():
                (folder / field / sidecar.relative_to(top)).symlink_to(sidecar.absolute())
    return _Given(path, f"{source} (changed in memory)", file)


def _other_tr(image: Any, file: Path) -> bool:
    """Whether the TR in the header of an image differs from its file."""

    def tr(header: Any) -> tuple[Any, ...]:
        return (*header.get_zooms()[3:], header.get_xyzt_units()[1])

    try:
        there: Any = nib.load(file)
        return tr(there.header) != tr(image.header)
    except Exception:  # the file was removed, or has invalid units
        return False


def _join(images: Sequence[Any], tr: float | None, folder: Path) -> _Given:
    """Join the 3-D images of one scan to one file."""
    if not images:
        raise ConfigError(_WHERE, "image", "an empty list", f"{_IMAGE}, or the 3-D images of one scan")
    loaded: list[Any] = []
    names: list[str] = []
    for number, item in enumerate(images):
        place = f"image[{number}]"
        if isinstance(item, str | os.PathLike):
            names.append(f"{place}: {item}")
            loaded.append(open_image(Path(item).expanduser(), names[-1]))
        elif isinstance(item, nib.Nifti1Pair):
            names.append(f"{place}: {file_of(item) or 'an image in memory'}")
            check_voxels(item, "image", names[-1])
            loaded.append(item)
        else:
            raise _wrong_type(place, item, _IMAGE)
        _check_frame(loaded[-1], names[-1], loaded[0], names[0])
    if tr is None:
        expected = "the repetition time in seconds, which headers of 3-D images do not have"
        raise ConfigError(_WHERE, "tr", "none for a list of 3-D images", expected, "Give tr=, such as tr=2.0")
    first = loaded[0]
    values = np.empty((*first.shape[:3], len(loaded)), np.float32, order="F")
    for number, (item, name) in enumerate(zip(loaded, names, strict=True)):
        try:
            values[..., number] = _voxels(item).reshape(first.shape[:3])
        except Exception as error:  # gzip, zlib and nibabel raise many types for damaged files and colour images
            raise _unreadable(name, error) from None
    joined = _kind(first)(values, first.affine, first.header, dtype=np.float32)
    source = f"{len(loaded)} images, the first {file_of(first) or 'in memory'}"
    return _Given(_write(joined, folder / "image" / "images.nii", source), source)


def _check_frame(image: Any, name: str, first: Any, first_name: str) -> None:
    """Check that an image can be a frame of the same scan as `first`."""
    if len(image.shape) < 3 or any(size != 1 for size in image.shape[3:]):
        got = f"{len(image.shape)}-D, {'x'.join(map(str, image.shape))}"
        raise ConfigError(name, "shape", got, "3-D: a list must hold the 3-D images of one scan", _ONE_SCAN)
    if image.shape[:3] != first.shape[:3]:
        got, expected = ("x".join(map(str, size[:3])) for size in (image.shape, first.shape))
        raise ConfigError(name, "shape", got, f"{expected}, as {first_name}", "Give the images of one scan")
    if not np.allclose(affine_mm(image), affine_mm(first), rtol=0, atol=_AFFINE):
        hint = "Resample them to one grid first, for example with nilearn.image.resample_to_img"
        raise ConfigError(name, "affine", "another position or voxel size", f"the affine of {first_name}", hint)


def _kind(image: Any) -> type[nib.Nifti1Image]:
    """The type of the written image: NIfTI-2 stays NIfTI-2; a pair of files becomes one file."""
    return type(image) if isinstance(image, nib.Nifti1Image) else nib.Nifti1Image


def _write(image: Any, path: Path, source: str) -> Path:
    try:
        values = _voxels(image)
    except Exception as error:  # gzip, zlib and nibabel raise many types for damaged files
        raise _unreadable(source, error) from None
    copy = _kind(image)(values, image.affine, image.header, dtype=values.dtype)
    copy.header.set_slope_inter(1, 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(copy, path)
    return path


def _table(confounds: Any, folder: Path) -> _Given:
    if isinstance(confounds, str | os.PathLike):
        return _Given(Path(confounds).expanduser(), str(confounds))
    import pandas as pd

    if not isinstance(confounds, pd.DataFrame):
        raise _wrong_type("confounds", confounds, "the path of a table (.tsv), or a pandas DataFrame")
    path = folder / "confounds.tsv"
    confounds.to_csv(path, sep="\t", na_rep="n/a", index=False)
    return _Given(path, "the DataFrame of confounds")


def check_names(given: Iterable[str]) -> None:
    """Check that all names are arguments of `as_run`.

    Raises
    ------
    ArgumentError
        If one is not.
    """
    known = ("image", "mask", "confounds", "space", "tr", "dummy", "orientation")
    for name in given:
        if name in known:
            continue
        hint = did_you_mean(name.lower(), known)
        raise ArgumentError(_WHERE, name, "an unknown argument", f"one of {', '.join(known)}", hint)


def _check_stated(space: Any, tr: Any, dummy: Any, orientation: Any) -> CohortSettings:
    """Check the arguments that describe the scan."""
    if tr is not None and not _is(tr, Real):
        raise _wrong_type("tr", tr, "a number of seconds, such as 2.0")
    if not (dummy == "auto" if isinstance(dummy, str) else _is(dummy, Integral)):
        raise _wrong_type("dummy", dummy, "'auto' or a whole number from 0 to 100")
    for name, value, accepted in (
        ("space", space, "'MNI' or 'native'"),
        ("orientation", orientation, "axis codes such as 'LAS'"),
    ):
        if not isinstance(value, str | None):
            raise _wrong_type(name, value, accepted)
    given = {
        "space": space,
        "tr": None if tr is None else float(tr),
        "dummy": dummy if isinstance(dummy, str) else int(dummy),
        "orientation": orientation,
    }
    try:
        return check(CohortSettings, {"name": "run", "root": ".", **given}, _WHERE)
    except ConfigError as error:
        hint = error.hint
        if error.field == "space":
            hint = f"Did you mean {'MNI' if str(space).lower().startswith('mni') else 'native'}?"
        elif error.field == "tr":
            hint = "Give it in seconds"
        raise ConfigError(error.where, error.field, error.got, error.expected, hint) from None


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool | np.bool_)


def _wrong_type(field: str, value: Any, accepted: str) -> ArgumentError:
    got, hint = type(value).__name__, ""
    if isinstance(value, np.ndarray):
        got = f"ndarray of {value.dtype} and shape {value.shape}"
        if "image" in accepted:
            hint = "Make an image from it: nib.Nifti1Image(array, affine)"
    elif value is None:
        got = "None"
    elif isinstance(value, str | Real):
        got = f"{value!r} ({got})"
    elif isinstance(value, list | tuple) and "image" in field:
        hint = _ONE_SCAN
    return ArgumentError(_WHERE, field, got, accepted, hint)


def _unreadable(source: str, error: Exception) -> RunRefused:
    return RunRefused(source, "data", f"unreadable ({error})", "a complete file", "Copy it again")


def _renamed(error: UserError, names: dict[str, str]) -> UserError:
    """Replace the names of temporary files in an error by what the user gave."""
    parts = [error.where, error.field, str(error.got), str(error.expected), error.hint]
    for path, name in names.items():
        parts = [part.replace(path, name) for part in parts]
    return type(error)(*parts)


def _stem(path: Path) -> str:
    ending = next((ending for ending in _ENDINGS if path.name.lower().endswith(ending)), path.suffix)
    return path.name[: len(path.name) - len(ending)] or path.name
