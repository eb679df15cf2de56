"""Pack and unpack samples: a Zarr group in an uncompressed zip. Equal arrays give equal bytes.

Legend: K kept windows in rank order; F frames of a window; P patches; V voxels of a patch.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Collection, Iterable, Mapping

import numpy as np
import zarr
from numcodecs import blosc
from zarr.codecs import BloscCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import MemoryStore

from shards.core.errors import SampleCorrupt
from shards.format.layout import ARRAYS, AXES, DAMAGED, OPTIONAL, ZARR_MEMBER

_PRECISION = 1e-3  # largest RMS error of a stored voxel, in units of its SD

# Large blocks at zstd's fastest level are smaller, and several times faster to write, than small ones at higher levels.
_BLOCK_BYTES = 1 << 20

_MOST_BLOCK_BYTES = 16 << 20  # largest block read; limits the memory that damaged or malicious chunks can request

_ZIP_TIME = (1980, 1, 1, 0, 0, 0)


def encode_windows(windows_KFPV: np.ndarray, spread_PV: np.ndarray) -> dict[str, np.ndarray]:
    """Encode the fluctuation as float16 if its RMS error is at most 1e-3 SD everywhere, else as int16 and `scale`."""
    small_KFPV = np.empty(windows_KFPV.shape, np.float16)
    square_PV = np.zeros(spread_PV.shape, np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        for index in np.ndindex(windows_KFPV.shape[:2]):  # a frame fits into the processor's cache
            small_KFPV[index] = windows_KFPV[index]
            error_PV = small_KFPV[index] - windows_KFPV[index]
            error_PV *= error_PV
            square_PV += error_PV
    error_PV = np.sqrt(square_PV / math.prod(windows_KFPV.shape[:2]))
    if np.isfinite(error_PV).all() and (error_PV <= _PRECISION * spread_PV).all():
        return {"windows": small_KFPV}
    scale_PV = np.abs(windows_KFPV).max(axis=(0, 1)).astype(np.float32) / 32767
    safe_PV = np.where(scale_PV > 0, scale_PV, 1)
    return {"windows": np.rint(windows_KFPV / safe_PV).astype(np.int16), "scale": safe_PV}


def pack(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Pack arrays to the bytes of `KEY.zarr.zip`."""
    store = MemoryStore()
    group = zarr.create_group(store=store, zarr_format=3)
    for name, (dtype, chunked) in ARRAYS.items():
        if name not in arrays:
            continue
        values = np.ascontiguousarray(arrays[name])
        if name != "windows":
            values = values.astype(dtype)
        group.create_array(
            name,
            data=values,
            chunks=(1, *values.shape[1:]) if chunked else values.shape,
            compressors=BloscCodec(
                typesize=values.dtype.itemsize, cname="zstd", clevel=1, shuffle="shuffle", blocksize=_BLOCK_BYTES
            ),
            fill_value=0,
            config={"write_empty_chunks": True},  # so that a missing chunk is an error, not zeros
        )
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(sync(_list(store)), key=_place):
            buffer = sync(store.get(name, default_buffer_prototype()))
            assert buffer is not None
            info = zipfile.ZipInfo(name, _ZIP_TIME)
            info.external_attr = 0o644 << 16
            archive.writestr(info, buffer.to_bytes())
    return out.getvalue()


def _place(member: str) -> tuple[bool, str, int, str]:
    """Sort key of a member in the zip: metadata first, then chunks by number, so the best windows are contiguous."""
    return not member.endswith("zarr.json"), member.split("/")[0], len(member), member


def unpack(
    file: io.BufferedIOBase | io.BytesIO,
    where: str,
    names: Iterable[str] | None = None,
    windows: Iterable[int] | None = None,
) -> dict[str, np.ndarray]:
    """Unpack arrays of one `KEY.zarr.zip`. Only the bytes of the requested arrays are read.

    Parameters
    ----------
    file : seekable binary file
    where : str
        Name of the sample in errors.
    names : iterable of str, optional
        Requested arrays; by default all. Arrays in `OPTIONAL` are left out if the sample does not have them.
    windows : iterable of int, optional
        Requested rows of `windows`, in this order; by default all.

    Returns
    -------
    dict of str to ndarray
        `windows` stored as int16 is decoded to float32, and `scale` is left out.

    Raises
    ------
    SampleCorrupt
        If the zip is damaged (every member has a CRC-32) or lacks an array that every sample has.
    """
    wanted = list(ARRAYS) if names is None else [*names]
    try:
        with zipfile.ZipFile(file) as archive:
            found = {member.split("/")[0] for member in archive.namelist()}
            present = [name for name in ARRAYS if name in found]
            load = [name for name in present if name in wanted or (name == "scale" and "windows" in wanted)]
            if json.loads(_member(archive, "zarr.json"))["zarr_format"] != 3:
                raise ValueError("not a Zarr v3 group")
            rows = None if windows is None else [int(row) for row in windows]
            shapes = _shapes(archive, load)
            out = {name: _decode(archive, name, *shapes[name], rows, where) for name in load}
    except SampleCorrupt:
        raise
    except Exception as error:  # zipfile, zarr and blosc raise many types for damaged bytes
        raise SampleCorrupt(
            where,
            ZARR_MEMBER,
            f"unreadable bytes ({type(error).__name__}: {error})",
            "an undamaged sample",
            DAMAGED,
        ) from None
    missing = [name for name in wanted if name not in out and name not in OPTIONAL]
    if missing:
        raise SampleCorrupt(where, ZARR_MEMBER, f"no array {missing[0]}", f"arrays {', '.join(wanted)}", DAMAGED)
    scale = out.pop("scale", None)
    if "windows" in out and out["windows"].dtype == np.int16:
        if scale is None:
            raise SampleCorrupt(where, ZARR_MEMBER, "no array scale", "the scale of int16 windows", DAMAGED)
        out["windows"] = out["windows"] * scale
    return out


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    """Read a member of the zip. It is not compressed, so it cannot be larger than the zip."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or info.header_offset + info.compress_size > archive.start_dir:
        raise ValueError(f"{name} is compressed, or larger than its zip")
    return archive.read(info)


def _shapes(archive: zipfile.ZipFile, names: Iterable[str]) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shapes and dtypes of the arrays of an open sample, checked against the format before memory is allocated.

    Raises
    ------
    ValueError
        If an array has another dtype, number of axes, chunks or codecs than in this format, or arrays disagree about
        the size of an axis.
    """
    found: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    sizes: dict[str, int] = {}
    for name in names:
        meta = json.loads(_member(archive, f"{name}/zarr.json"))
        shape, axes, chunked = meta["shape"], AXES[name], ARRAYS[name][1]
        dtypes = ("float16", "int16") if name == "windows" else (ARRAYS[name][0],)
        if meta["data_type"] not in dtypes:
            raise ValueError(f"{name} with another dtype than {' or '.join(dtypes)}")
        if len(shape) != len(axes) or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"{name} without {len(axes)} axes")
        for axis, size in zip(axes, shape, strict=True):
            if sizes.setdefault(axis, int(axis) if axis.isdigit() else size) != size:
                raise ValueError(f"{name} with {size} along {axis}, where other arrays have {sizes[axis]}")
        codecs = [codec["name"] for codec in meta["codecs"]]
        order = meta["codecs"][0].get("configuration", {}).get("endian", "little")
        chunk_shape = meta["chunk_grid"]["configuration"]["chunk_shape"]
        if codecs != ["bytes", "blosc"] or order != "little" or chunk_shape != ([1, *shape[1:]] if chunked else shape):
            raise ValueError(f"{name} with other chunks or codecs than in this format")
        found[name] = tuple(shape), np.dtype(meta["data_type"]).newbyteorder("<")
    return found


def _decode(
    archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], dtype: np.dtype, rows: list[int] | None, where: str
) -> np.ndarray:
    """Decode an array of an open sample, or the given rows of an array that is chunked along its first axis.

    Chunks are decompressed directly into the result. Zarr would use an event loop, threads and copies, which take
    longer than the decompression.
    """
    chunked = ARRAYS[name][1]
    part_shape = (1, *shape[1:]) if chunked else shape
    chunks = [0] if not chunked else range(shape[0]) if rows is None else rows
    part_bytes = math.prod(part_shape) * dtype.itemsize
    out: np.ndarray | None = None
    for place, chunk in enumerate(chunks):
        if chunked and not 0 <= chunk < shape[0]:
            raise SampleCorrupt(where, name, f"{shape[0]} windows", f"window {chunk} among them")
        data = _member(archive, "/".join([name, "c", str(chunk), *["0"] * (len(shape) - 1)]))
        _check_chunk(name, data, part_bytes)
        if out is None:  # allocate memory after the first valid chunk
            out = np.empty((len(chunks), *part_shape), dtype)
        blosc.decompress(data, out[place])
    if out is None:
        out = np.empty((0, *part_shape), dtype)
    return out[:, 0] if chunked else out[0]


def _check_chunk(name: str, data: bytes, part_bytes: int) -> None:
    """Refuse a Blosc chunk if the sizes in its header do not fit the array, or are too large for the chunk."""
    unpacked, block, packed = (int.from_bytes(data[at : at + 4], "little") for at in (4, 8, 12))
    if unpacked != part_bytes or packed != len(data):
        raise ValueError(f"{name} with a chunk of another size")
    is_copy = len(data) > 2 and data[2] & 2
    if is_copy:
        sound = packed == unpacked + 16
    else:  # 16 bytes of header, then 4 bytes for the position of each block
        sound = 0 < block <= _MOST_BLOCK_BYTES and 16 + 4 * -(-unpacked // block) <= packed
    if unpacked and not sound:
        raise ValueError(f"{name} with a chunk that is too small for its size in the header")


def members_read(members: Iterable[str], names: Collection[str] | None, windows: Collection[int] | None) -> list[str]:
    """The members of a `KEY.zarr.zip` that `unpack` reads for these arrays and windows."""
    wanted = {*(ARRAYS if names is None else names)}
    if "windows" in wanted:
        wanted.add("scale")
    rows = None if windows is None else {str(int(row)) for row in windows}

    def is_read(member: str) -> bool:
        name, *rest = member.split("/")  # zarr.json, NAME/zarr.json or NAME/c/ROW/0/0/0
        if not rest:
            return True
        is_row = rest[0] == "c" and name in ARRAYS and ARRAYS[name][1]
        return name in wanted and (rows is None or not is_row or rest[1] in rows)

    return [member for member in members if is_read(member)]


async def _list(store: MemoryStore) -> list[str]:
    return [name async for name in store.list()]
