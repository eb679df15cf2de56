"""The on-disk contract: the only file that knows the names of members, arrays and dtypes.

A dataset folder::

    manifest.json     what it is and how it was made
    sessions.jsonl    a line per session: its KEY.json + where both members lie (shard, byte offset, size)
    failed.jsonl      a line per refused run: source, reason, what to do
    splits.tsv        which split each person is in, kept when runs are added
    shards/           train-000000.tar, val-000000.tar, test-000000.tar ...
    extractor/        the temporal extractor that ranked the windows (model.safetensors, config.json)
    report/           index.html

A sample is one session: `KEY.json` and `KEY.zarr.zip`, a Zarr v3 group in an uncompressed zip. The zip is written with
fixed times and in a fixed order, so equal arrays give equal bytes.

Legend: K kept windows in rank order; W all windows in time order; F frames of a window; P patches; V voxels of a
patch; R parcels; M voxels of the carpet; T frames of the run.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import zarr
from numcodecs import blosc
from upath import UPath
from zarr.codecs import BloscCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import MemoryStore

from shards.core.errors import DatasetError, SampleCorrupt
from shards.format import remote

FORMAT = 1
MANIFEST, SESSIONS, FAILED = "manifest.json", "sessions.jsonl", "failed.jsonl"
SPLITS_TABLE = "splits.tsv"
SHARDS, EXTRACTOR, REPORT, WORK = "shards", "extractor", "report", "work"
JSON_MEMBER, ZARR_MEMBER = "json", "zarr.zip"

# name: (dtype, chunked along the first axis). `windows` is float16, or int16 with the array `scale`.
ARRAYS: dict[str, tuple[str, bool]] = {
    "baseline": ("float32", False),  # (P, V) run mean, global z; background 0
    "spread": ("float32", False),  # (P, V) SD over the run, global-SD units
    "patch": ("int16", False),  # (P, 3) place in the patch grid, ascending flat order
    "brain": ("uint8", False),  # (P, V) 1 where the voxel is brain
    "start": ("int32", False),  # (K,) first frame of the window in the harmonised run
    "saliency": ("float32", False),  # (K,) descending
    "scores": ("float32", False),  # (W,) scores of all windows in time order
    "scores_space": ("float32", False),  # (W,) what the other parcels tell of each window, where the ranker asks that
    "scores_time": ("float32", False),  # (W,) what the neighbouring windows tell of it, in the same units
    "roi": ("float32", False),  # (R, T) parcel means over the whole run, what the ranker saw
    "roi_number": ("int32", False),  # (R,) label of each parcel
    "roi_centre": ("float32", False),  # (R, 3) mm
    "carpet": (
        "int8",
        False,
    ),  # (M, T) brain voxels over the whole run, z times CARPET_STEPS, from the rim to the depth
    "scale": ("float32", False),  # (P, V) only beside int16 windows: windows * scale is the fluctuation
    "windows": ("float16", True),  # (K, F, P, V) fluctuation around the run mean, global-SD units
}
OPTIONAL = {"scale", "scores_space", "scores_time"}  # a sample may be without them
# The letters of the legend: axes of one letter have one size in all arrays of a sample. A digit is a size.
_AXES = {
    "baseline": "PV",
    "spread": "PV",
    "patch": "P3",
    "brain": "PV",
    "start": "K",
    "saliency": "K",
    "scores": "W",
    "scores_space": "W",
    "scores_time": "W",
    "roi": "RT",
    "roi_number": "R",
    "roi_centre": "R3",
    "carpet": "MT",
    "scale": "PV",
    "windows": "KFPV",
}
CARPET_STEPS = 20  # a carpet value of 20 is one SD of the voxel
_PRECISION = 1e-3  # largest RMS error of a stored voxel, in units of its own SD
# Large blocks at zstd's fastest level: smaller, and several times faster to write, than small blocks at a higher level.
_BLOCK_BYTES = 1 << 20
_MOST_BLOCK_BYTES = 16 << 20  # of blocks that are read: what a damaged or hostile chunk can claim stays near its size
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)
DAMAGED = "Copy the dataset again, or convert it anew into another folder"


def encode_windows(windows_KFPV: np.ndarray, spread_PV: np.ndarray) -> dict[str, np.ndarray]:
    """Fluctuation as stored: float16 where it keeps every voxel to 1e-3 of its SD (RMS), else int16 with `scale`."""
    small_KFPV = np.empty(windows_KFPV.shape, np.float16)
    square_PV = np.zeros(spread_PV.shape, np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        for index in np.ndindex(windows_KFPV.shape[:2]):  # a frame fits the processor's cache, all windows do not
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
    """Arrays as the bytes of `KEY.zarr.zip`."""
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
            config={"write_empty_chunks": True},  # so a chunk that is not there is a damage, never zeros
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
    """Order in the zip: descriptions first; the chunks of an array by number, so the best windows lie side by side."""
    return not member.endswith("zarr.json"), member.split("/")[0], len(member), member


async def _list(store: MemoryStore) -> list[str]:
    return [name async for name in store.list()]


def unpack(
    file: io.BufferedIOBase | io.BytesIO,
    where: str,
    names: Iterable[str] | None = None,
    windows: Iterable[int] | None = None,
) -> dict[str, np.ndarray]:
    """Arrays of one `KEY.zarr.zip`, touching only the bytes of what is asked for.

    Parameters
    ----------
    file : seekable binary file
    where : str
        Named in errors.
    names : iterable of str, optional
        Arrays wanted; all by default. Of the `OPTIONAL` ones, those that the sample has.
    windows : iterable of int, optional
        Rows of `windows` wanted, in this order; all by default.

    Returns
    -------
    dict of str to ndarray
        `windows` is decoded to float32 where it was stored as int16; `scale` is then left out.

    Raises
    ------
    SampleCorrupt
        If the zip is damaged (every member carries a CRC-32) or lacks an array that every sample has.
    """
    wanted = list(ARRAYS) if names is None else [*names]
    try:
        with zipfile.ZipFile(file) as archive:
            found = {member.split("/")[0] for member in archive.namelist()}
            present = [name for name in ARRAYS if name in found]
            load = [name for name in present if name in wanted or (name == "scale" and "windows" in wanted)]
            if json.loads(_member(archive, "zarr.json"))["zarr_format"] != 3:
                raise ValueError("no Zarr v3 group")
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
            "a sample as it was written",
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
    """A member of the zip. It is stored as it is, so it is no longer than the zip."""
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED or info.header_offset + info.compress_size > archive.start_dir:
        raise ValueError(f"{name} is packed, or longer than the zip it lies in")
    return archive.read(info)


def _shapes(archive: zipfile.ZipFile, names: Iterable[str]) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shapes and dtypes of arrays of an open sample, compared with the contract before any of it is made.

    Raises
    ------
    ValueError
        If an array has another dtype, number of axes, chunks or codecs than this format has, or two arrays have
        different sizes of one axis.
    """
    found: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    sizes: dict[str, int] = {}
    for name in names:
        meta = json.loads(_member(archive, f"{name}/zarr.json"))
        shape, axes, chunked = meta["shape"], _AXES[name], ARRAYS[name][1]
        dtypes = ("float16", "int16") if name == "windows" else (ARRAYS[name][0],)
        if meta["data_type"] not in dtypes:
            raise ValueError(f"{name} of another dtype than {' or '.join(dtypes)}")
        if len(shape) != len(axes) or not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"{name} without {len(axes)} axes")
        for axis, size in zip(axes, shape, strict=True):
            if sizes.setdefault(axis, int(axis) if axis.isdigit() else size) != size:
                raise ValueError(f"{name} with {size} along {axis}, where other arrays have {sizes[axis]}")
        codecs = [codec["name"] for codec in meta["codecs"]]
        order = meta["codecs"][0].get("configuration", {}).get("endian", "little")
        chunk_shape = meta["chunk_grid"]["configuration"]["chunk_shape"]
        if codecs != ["bytes", "blosc"] or order != "little" or chunk_shape != ([1, *shape[1:]] if chunked else shape):
            raise ValueError(f"{name} in other chunks or codecs than this format has")
        found[name] = tuple(shape), np.dtype(meta["data_type"]).newbyteorder("<")
    return found


def _decode(
    archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], dtype: np.dtype, rows: list[int] | None, where: str
) -> np.ndarray:
    """An array of an open sample; of one that is chunked along its first axis, these rows (all with `None`).

    Chunks are decompressed straight into the result. Zarr would read the same bytes, but through an event loop,
    threads and copies that cost more than the decompression.
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
        if out is None:  # the first chunk is sound: memory is taken
            out = np.empty((len(chunks), *part_shape), dtype)
        blosc.decompress(data, out[place])
    if out is None:
        out = np.empty((0, *part_shape), dtype)
    return out[:, 0] if chunked else out[0]


def _check_chunk(name: str, data: bytes, part_bytes: int) -> None:
    """Refuse a Blosc chunk whose header claims other sizes than the array has, or more than the chunk can hold."""
    unpacked, block, packed = (int.from_bytes(data[at : at + 4], "little") for at in (4, 8, 12))
    if unpacked != part_bytes or packed != len(data):
        raise ValueError(f"{name} with a chunk of another size")
    is_copy = len(data) > 2 and data[2] & 2
    if is_copy:
        sound = packed == unpacked + 16
    else:  # 16 bytes of header, then 4 bytes for the place of each block
        sound = 0 < block <= _MOST_BLOCK_BYTES and 16 + 4 * -(-unpacked // block) <= packed
    if unpacked and not sound:
        raise ValueError(f"{name} with a chunk that cannot hold what it claims")


@contextmanager
def atomically(path: Path) -> Iterator[BinaryIO]:
    """Open a file so that it is there whole or not at all: temporary name, fsync, rename, fsync of the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:  # a full disk, a stop: nothing is left beside what was there
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a file `atomically`."""
    with atomically(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so a rename survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def dump(tree: Any) -> str:
    """JSON as this project writes it: sorted keys, so equal content gives equal bytes."""
    return json.dumps(tree, sort_keys=True, ensure_ascii=False)


def dump_lines(trees: Iterable[Any]) -> str:
    """The content of a JSON-lines file."""
    return "".join(dump(tree) + "\n" for tree in trees)


def members_read(members: Iterable[str], names: Collection[str] | None, windows: Collection[int] | None) -> list[str]:
    """Of the members of a `KEY.zarr.zip`, those that `unpack` reads for these arrays and windows."""
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


def read_json(text: str, where: str, expected: str, hint: str = "") -> dict[str, Any]:
    """The JSON object in a text.

    Raises
    ------
    DatasetError
        If it is no JSON, JSON without limits (nesting, digits), or no object.
    """
    try:
        tree = json.loads(text)
    except RecursionError:
        raise DatasetError(where, "", "JSON that is nested too deeply", expected, hint) from None
    except ValueError as error:  # of a JSONDecodeError, and of numbers with thousands of digits
        raise DatasetError(where, "", f"no JSON ({error})", expected, hint) from None
    if not isinstance(tree, dict):
        raise DatasetError(where, "", f"JSON that is a {type(tree).__name__}", expected, hint)
    return tree


def read_lines(path: Path | UPath) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; an absent file is an empty list.

    Raises
    ------
    DatasetError
        If a line is no JSON object.
    """
    text = remote.read_text(path) or ""
    return [
        read_json(line, f"{path}: line {number}", "one JSON object per line")
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    ]


def read_manifest(folder: str | Path | UPath) -> dict[str, Any]:
    """The manifest of a dataset, by its path or URL.

    Raises
    ------
    DatasetError
        If the folder is no finished dataset, or one of another format version, or cannot be reached.
    """
    root = remote.place(folder)
    path = root / MANIFEST
    text = remote.read_text(path)
    if text is None:
        got = "no such folder" if isinstance(root, Path) and not root.is_dir() else "no manifest.json"
        raise DatasetError(str(root), "", got, "a dataset written by make_shards.py", "Convert a cohort first")
    manifest = read_json(text, str(path), "a manifest", "Run make_shards.py again")
    if manifest.get("format") != FORMAT:
        raise DatasetError(str(path), "format", manifest.get("format"), FORMAT, "Convert the cohort with this version")
    return manifest
