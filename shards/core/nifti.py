"""Open NIfTI images: check the header, and read units and the position in mm."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError

from shards.core.errors import RunRefused, UserError
from shards.core.files import printable, trouble

_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 1e-3}  # mm per unit of length, by code: unknown, metre, mm, micron
_SECONDS = {0: 1.0, 8: 1.0, 16: 1e-3, 24: 1e-6}  # s per unit of time, by code: unknown, s, ms, us
CODES = {0: "unknown", 1: "scanner", 2: "aligned", 3: "Talairach", 4: "MNI152"}  # codes of qform and sform
MNI = 4
_PAIR = {".hdr": ".img", ".img": ".hdr"}
_COUNTED = 32 << 20  # for volumes larger than this many bytes, the compressed size is checked before allocating memory
_MOST_PACKED = 1100  # gzip compresses at most 1032 to 1
_HINT = "Write the image again with the software that made it, or leave it out"


def open_image(path: Path, where: str | Path, field: str = "", error: type[UserError] = RunRefused) -> nib.Nifti1Pair:
    """Open an image and check its header. No voxels are read.

    Parameters
    ----------
    path : Path
        A .nii or .nii.gz file, or one of a pair .hdr and .img.
    where, field : str
        The scan and the role of the image ("mask"), named in errors; `field` is empty for the scan itself.
    error : kind of UserError

    Raises
    ------
    UserError
        Of this kind, if the file is not NIfTI, or a field of its header is invalid.
    """
    what = f"{printable(path)}: " if field else ""
    if found := trouble(path, image=True):
        raise error(where, field, what + found.got, found.expected, found.hint)
    if (other := _PAIR.get(path.suffix)) and not path.with_suffix(other).is_file():
        raise error(where, field, f"{what}no {path.stem}{other} next to it", "both files of the pair, .hdr and .img")
    try:
        image: Any = nib.load(path)
        header_at_fault = _unsound(image) if isinstance(image, nib.Nifti1Pair) else None
    except ImageFileError:
        raise error(where, field, f"{what}a file that is not a NIfTI image", "a NIfTI image", _HINT) from None
    except Exception as fault:  # nibabel raises many types of exception for invalid headers
        header_at_fault = _field_at_fault(path) or ("header", f"{fault}", "a valid NIfTI header")
    else:
        if not isinstance(image, nib.Nifti1Pair):
            kind = "ANALYZE 7.5, which has no orientation" if "Analyze" in _bases(image) else type(image).__name__
            hint = "Convert it to NIfTI with the software that made it"
            raise error(where, field or "format", f"{what}{kind}", "NIfTI-1 or NIfTI-2", hint)
    if header_at_fault:
        name, got, expected = header_at_fault
        raise error(where, field or name, f"{what}{name + ' ' if field else ''}{got}", expected, _HINT)
    return image


def _bases(image: Any) -> str:
    return " ".join(base.__name__ for base in type(image).__mro__)


def _unsound(image: nib.Nifti1Pair) -> tuple[str, str, str] | None:
    """Invalid field, its value and what is accepted, for a header that nibabel opens; None if nothing is wrong."""
    header, shape = image.header, image.shape
    units = int(header["xyzt_units"])
    if min(shape, default=0) < 1:
        return "dim", "x".join(map(str, shape)), "sizes of 1 or more"
    if units & 7 not in _MM:
        return "xyzt_units", f"code {units & 7} for the unit of length", "1 (metre), 2 (mm) or 3 (micron)"
    if len(shape) > 3 and units & 56 not in _SECONDS:
        return "xyzt_units", f"code {units & 56} for the unit of time", "8 (s), 16 (ms) or 24 (us)"
    for look in (lambda: image.affine, header.get_slope_inter):  # nibabel checks these fields on access
        look()
    return _size(image)


def _size(image: nib.Nifti1Pair) -> tuple[str, str, str] | None:
    """Check that the file is large enough for the size in its header, before memory is allocated."""
    proxy: Any = image.dataobj
    path = Path(image.file_map["image"].filename or "")
    needed = int(proxy.offset) + math.prod(map(int, image.shape)) * proxy.dtype.itemsize
    there = path.stat().st_size
    packed = path.name.lower().endswith((".gz", ".bz2"))
    if needed <= there * (_MOST_PACKED if packed else 1):
        single = math.prod(map(int, image.shape[3:])) == 1  # masks and labels, which are read as a whole
        if not (packed and single and needed > _COUNTED) or (there := _unpacked(path, needed)) >= needed:
            return None
    size, volume = "x".join(map(str, image.shape)), math.prod(map(int, image.shape[:3])) * proxy.dtype.itemsize
    frame = max(there - int(proxy.offset), 0) // volume
    ends = f"it ends in frame {frame} of {math.prod(image.shape[3:])}, " if len(image.shape) > 3 and not packed else ""
    got = f"an incomplete file: {ends}{there} bytes for {size} voxels of {proxy.dtype}"
    return "data", got, f"a complete file of {needed} bytes"


def _unpacked(path: Path, most: int) -> int:
    """Uncompressed size of a file in bytes, counted up to `most`."""
    count = 0
    try:
        with nib.openers.ImageOpener(str(path)) as file:
            while count < most and (piece := file.read(1 << 20)):
                count += len(piece)
    except Exception:  # a damaged stream: count the bytes before the damage
        pass
    return count


def _field_at_fault(path: Path) -> tuple[str, str, str] | None:
    """Invalid field, its value and what is accepted, for a header that nibabel refuses; None if not found."""
    try:
        with nib.openers.ImageOpener(str(path)) as file:
            block = file.read(540)
        size = {int.from_bytes(block[:4], order): order for order in ("little", "big")}
        kind = nib.Nifti2Header if 540 in size else nib.Nifti1Header
        order = size.get(540, size.get(348, "little"))
        header = kind(block[: kind.sizeof_hdr], endianness="<" if order == "little" else ">", check=False)
    except Exception:  # the file is shorter than a header
        return None
    quaternion = [float(header[name]) for name in ("quatern_b", "quatern_c", "quatern_d")]
    length = sum(value**2 for value in quaternion)
    if int(header["qform_code"]) and not int(header["sform_code"]) and not length <= 1 + 3e-7:
        values = ", ".join(f"{value:.7g}" for value in quaternion)
        return "quatern_b, c, d", f"{values} with a sum of squares of {length:.7g}", "a sum of squares of at most 1"
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if slope not in (0.0,) and not math.isnan(slope) and not (math.isfinite(slope) and math.isfinite(inter)):
        return "scl_slope, scl_inter", f"{slope:g}, {inter:g}", "finite numbers"
    if int(header["datatype"]) not in nib.nifti1.data_type_codes.value_set("code"):
        return "datatype", f"code {int(header['datatype'])}", "a data type of NIfTI"
    if not 1 <= int(header["dim"][0]) <= 7 or min(header["dim"][1 : int(header["dim"][0]) + 1]) < 1:
        return "dim", ", ".join(str(int(size)) for size in header["dim"]), "1 to 7 sizes of 1 or more"
    return None


def unit_mm(image: nib.Nifti1Pair) -> float:
    """mm per unit of length in the header; without a unit, mm is assumed."""
    return _MM[int(image.header["xyzt_units"]) & 7]


def unit_s(image: nib.Nifti1Pair) -> float:
    """Seconds per unit of time in the header; without a unit, s is assumed."""
    return _SECONDS[int(image.header["xyzt_units"]) & 56]


def has_unit_of_time(image: nib.Nifti1Pair) -> bool:
    return int(image.header["xyzt_units"]) & 56 != 0


def affine_mm(image: nib.Nifti1Pair) -> np.ndarray:
    """Affine from voxel indices to mm, float64 (4, 4), converted from the unit of the header."""
    affine = np.array(image.affine, np.float64)
    affine[:3] *= unit_mm(image)
    return affine


def code_of(image: nib.Nifti1Pair) -> int:
    """Code of the form that gives the affine: of the sform, else of the qform; 0 if there is neither."""
    return int(image.header["sform_code"]) or int(image.header["qform_code"])


def code_words(image: nib.Nifti1Pair) -> str:
    """The code from `code_of` in words."""
    code = code_of(image)
    return f"header code {code} ({CODES.get(code, 'unknown')})"


def forms_disagree(image: nib.Nifti1Pair) -> str:
    """Axis codes of sform and qform if both exist and disagree about left and right; otherwise empty."""
    sform, qform = (form(coded=True) for form in (image.get_sform, image.get_qform))
    if sform[0] is None or qform[0] is None or not sform[1] or not qform[1]:
        return ""
    axes = [nib.aff2axcodes(affine) for affine, _ in (sform, qform)]
    sides = [next(((axis, side) for axis, side in enumerate(codes) if side in ("L", "R")), None) for codes in axes]
    if sides[0] == sides[1]:
        return ""
    words = ["".join(letter or "?" for letter in codes) for codes in axes]
    return f"sform {words[0]}, qform {words[1]}"
