"""Opening a NIfTI image: its units and position in mm, and which field of a header is at fault."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError

from shards.core.errors import RunRefused, UserError
from shards.core.files import printable, trouble

_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 1e-3}  # mm per unit of length: unknown, metre, mm, micron
_SECONDS = {0: 1.0, 8: 1.0, 16: 1e-3, 24: 1e-6}  # s per unit of time: unknown, s, ms, us
CODES = {0: "unknown", 1: "scanner", 2: "aligned", 3: "Talairach", 4: "MNI152"}  # of qform and sform
MNI = 4
_PAIR = {".hdr": ".img", ".img": ".hdr"}
_COUNTED = 32 << 20  # bytes: before more are taken for one volume, the packed ones are counted
_MOST_PACKED = 1100  # gzip packs no more than 1032 to 1
_HINT = "Write the image again with the software it came from, or leave it out"


def open_image(path: Path, where: str | Path, field: str = "", error: type[UserError] = RunRefused) -> nib.Nifti1Pair:
    """An image whose header was found sound; no voxel is read.

    Parameters
    ----------
    path : Path
        A .nii or .nii.gz file, or one of a pair .hdr and .img.
    where, field : str
        Named in errors: the run, and what the image is of it ("mask"); empty for the run's own.
    error : kind of UserError

    Raises
    ------
    UserError
        Of that kind, if it is no NIfTI, or a field of its header has no meaning.
    """
    what = f"{printable(path)}: " if field else ""
    if found := trouble(path, image=True):
        raise error(where, field, what + found.got, found.expected, found.hint)
    if (other := _PAIR.get(path.suffix)) and not path.with_suffix(other).is_file():
        raise error(where, field, f"{what}no {path.stem}{other} beside it", "both files of the pair, .hdr and .img")
    try:
        image: Any = nib.load(path)
        header_at_fault = _unsound(image) if isinstance(image, nib.Nifti1Pair) else None
    except ImageFileError:
        raise error(where, field, f"{what}a file that is no NIfTI image", "a NIfTI image", _HINT) from None
    except Exception as fault:  # nibabel raises many types for headers without meaning
        header_at_fault = _field_at_fault(path) or ("header", f"{fault}", "a sound NIfTI header")
    else:
        if not isinstance(image, nib.Nifti1Pair):
            kind = "ANALYZE 7.5, which knows no orientation" if "Analyze" in _bases(image) else type(image).__name__
            hint = "Convert it to NIfTI with the software it came from"
            raise error(where, field or "format", f"{what}{kind}", "NIfTI-1 or NIfTI-2", hint)
    if header_at_fault:
        name, got, expected = header_at_fault
        raise error(where, field or name, f"{what}{name + ' ' if field else ''}{got}", expected, _HINT)
    return image


def _bases(image: Any) -> str:
    return " ".join(base.__name__ for base in type(image).__mro__)


def _unsound(image: nib.Nifti1Pair) -> tuple[str, str, str] | None:
    """Field, what it holds, and what it may hold, of a header that nibabel opens; None if nothing is wrong."""
    header, shape = image.header, image.shape
    units = int(header["xyzt_units"])
    if min(shape, default=0) < 1:
        return "dim", "x".join(map(str, shape)), "sizes of 1 or more"
    if units & 7 not in _MM:
        return "xyzt_units", f"code {units & 7} for the unit of length", "1 (metre), 2 (mm) or 3 (micron)"
    if len(shape) > 3 and units & 56 not in _SECONDS:
        return "xyzt_units", f"code {units & 56} for the unit of time", "8 (s), 16 (ms) or 24 (us)"
    for look in (lambda: image.affine, header.get_slope_inter):  # nibabel looks at these fields when it is asked
        look()
    return _size(image)


def _size(image: nib.Nifti1Pair) -> tuple[str, str, str] | None:
    """Whether the file can hold what its header promises: nothing is allocated for a header that cannot be true."""
    proxy: Any = image.dataobj
    path = Path(image.file_map["image"].filename or "")
    needed = int(proxy.offset) + math.prod(map(int, image.shape)) * proxy.dtype.itemsize
    there = path.stat().st_size
    packed = path.name.lower().endswith((".gz", ".bz2"))
    if needed <= there * (_MOST_PACKED if packed else 1):
        single = math.prod(map(int, image.shape[3:])) == 1  # masks and labels, which are read at once
        if not (packed and single and needed > _COUNTED) or (there := _unpacked(path, needed)) >= needed:
            return None
    size, volume = "x".join(map(str, image.shape)), math.prod(map(int, image.shape[:3])) * proxy.dtype.itemsize
    frame = max(there - int(proxy.offset), 0) // volume
    ends = f"it ends in frame {frame} of {math.prod(image.shape[3:])}, " if len(image.shape) > 3 and not packed else ""
    got = f"an incomplete file: {ends}{there} bytes for {size} voxels of {proxy.dtype}"
    return "data", got, f"a complete file of {needed} bytes"


def _unpacked(path: Path, most: int) -> int:
    """Bytes that a packed file holds, counted up to `most`."""
    count = 0
    try:
        with nib.openers.ImageOpener(str(path)) as file:
            while count < most and (piece := file.read(1 << 20)):
                count += len(piece)
    except Exception:  # a damaged stream: what came before it
        pass
    return count


def _field_at_fault(path: Path) -> tuple[str, str, str] | None:
    """Field, what it holds, and what it may hold, of a header that nibabel refuses; None if it is another one."""
    try:
        with nib.openers.ImageOpener(str(path)) as file:
            block = file.read(540)
        size = {int.from_bytes(block[:4], order): order for order in ("little", "big")}
        kind = nib.Nifti2Header if 540 in size else nib.Nifti1Header
        order = size.get(540, size.get(348, "little"))
        header = kind(block[: kind.sizeof_hdr], endianness="<" if order == "little" else ">", check=False)
    except Exception:  # not even a block of the right size
        return None
    quaternion = [float(header[name]) for name in ("quatern_b", "quatern_c", "quatern_d")]
    length = sum(value**2 for value in quaternion)
    if int(header["qform_code"]) and not int(header["sform_code"]) and not length <= 1 + 3e-7:
        values = ", ".join(f"{value:.7g}" for value in quaternion)
        return "quatern_b, c, d", f"{values}, whose squares add up to {length:.7g}", "at most 1"
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    if slope not in (0.0,) and not math.isnan(slope) and not (math.isfinite(slope) and math.isfinite(inter)):
        return "scl_slope, scl_inter", f"{slope:g}, {inter:g}", "finite numbers"
    if int(header["datatype"]) not in nib.nifti1.data_type_codes.value_set("code"):
        return "datatype", f"code {int(header['datatype'])}", "a code of NIfTI"
    if not 1 <= int(header["dim"][0]) <= 7 or min(header["dim"][1 : int(header["dim"][0]) + 1]) < 1:
        return "dim", ", ".join(str(int(size)) for size in header["dim"]), "1 to 7 sizes of 1 or more"
    return None


def unit_mm(image: nib.Nifti1Pair) -> float:
    """mm per unit of length of the header; where it names none, mm is taken."""
    return _MM[int(image.header["xyzt_units"]) & 7]


def unit_s(image: nib.Nifti1Pair) -> float:
    """Seconds per unit of time of the header; where it names none, s is taken."""
    return _SECONDS[int(image.header["xyzt_units"]) & 56]


def has_unit_of_time(image: nib.Nifti1Pair) -> bool:
    return int(image.header["xyzt_units"]) & 56 != 0


def affine_mm(image: nib.Nifti1Pair) -> np.ndarray:
    """Voxel index to mm, float64 (4, 4), whatever unit the header has."""
    affine = np.array(image.affine, np.float64)
    affine[:3] *= unit_mm(image)
    return affine


def code_of(image: nib.Nifti1Pair) -> int:
    """Code of the form that the affine comes from: the sform's, else the qform's; 0 where there is neither."""
    return int(image.header["sform_code"]) or int(image.header["qform_code"])


def code_words(image: nib.Nifti1Pair) -> str:
    """The same in words."""
    code = code_of(image)
    return f"header code {code} ({CODES.get(code, 'unknown')})"


def forms_disagree(image: nib.Nifti1Pair) -> str:
    """Axis codes of sform and qform where both are there and contradict each other on left and right; else empty."""
    sform, qform = (form(coded=True) for form in (image.get_sform, image.get_qform))
    if sform[0] is None or qform[0] is None or not sform[1] or not qform[1]:
        return ""
    axes = [nib.aff2axcodes(affine) for affine, _ in (sform, qform)]
    sides = [next(((axis, side) for axis, side in enumerate(codes) if side in ("L", "R")), None) for codes in axes]
    if sides[0] == sides[1]:
        return ""
    words = ["".join(letter or "?" for letter in codes) for codes in axes]
    return f"sform {words[0]}, qform {words[1]}"
