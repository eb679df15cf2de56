"""Damaged NIfTI files: runs, masks and label images are read, or refused in one line; see `fuzzing`."""

from __future__ import annotations

import gzip
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import strategies as st

from helpers.fuzzing import NUMBERS, answer, counts, damaged, hold
from helpers.scans import brain, oblique, source
from shards.cohorts.scan import RunSource
from shards.core.errors import ConfigError, RunRefused
from shards.format.grid import Grid
from shards.preprocessing.bold import Bold, open_bold
from shards.preprocessing.masks import BrainMaskSettings, find_mask
from slim.ranking.parcels import read_labels

pytestmark = pytest.mark.fast

SHAPE = (9, 11, 9)
AFFINE = oblique((16, 16, 16), 0, (-1, -17, 5), SHAPE)
GRID = Grid(mm=16, shape=(12, 12, 12))
SETTINGS = BrainMaskSettings(ml=(1, 10**6))
FLOATS = (0.0, -0.0, 1.0, -1.0, 0.72, 720.0, 1e-45, 1e30, 3e38, float("nan"), float("inf"), float("-inf"))


def volumes() -> np.ndarray:
    """A head at 16 mm, (x, y, z, 6) int16."""
    mask, anatomy = brain(AFFINE, SHAPE)
    rng = np.random.default_rng(0)
    return (np.where(mask, anatomy, 0)[..., None] + rng.integers(0, 9, (*SHAPE, 6))).astype(np.int16)


def nifti(values: np.ndarray, version: type = nib.Nifti1Image, big: bool = False, tr: float = 0.72) -> bytes:
    """An image file as bytes."""
    image = version(values, AFFINE)
    image.set_sform(AFFINE, 4)
    image.set_qform(AFFINE, 4)
    image.header.set_xyzt_units("mm", "sec")
    if values.ndim > 3:
        image.header.set_zooms((*image.header.get_zooms()[:3], tr, *[1] * (values.ndim - 4)))
    if big:
        swapped = version(values, AFFINE, image.header.as_byteswapped(">"))
        image = swapped
    return image.to_bytes()


def runs() -> list[bytes]:
    values = volumes()
    return [
        nifti(values),
        nifti(values.astype(np.float32), nib.Nifti2Image),
        nifti(values.astype(np.uint8), big=True),
        nifti(values[:, :, :, None]),
    ]


def masks() -> list[bytes]:
    mask, _ = brain(AFFINE, SHAPE)
    return [
        nifti(mask.astype(np.uint8)),
        nifti(mask.astype(np.float32) * 0.99),
        nifti(mask[..., None].astype(np.int16)),
    ]


def labels() -> list[bytes]:
    mask, _ = brain(AFFINE, SHAPE)
    numbers = np.where(mask, 1 + np.indices(SHAPE)[0] // 3, 0)
    return [
        nifti(numbers.astype(np.int16)),
        nifti(numbers.astype(np.float64)),
        nifti(numbers[..., None].astype(np.uint8)),
    ]


@st.composite
def images(draw: st.DrawFn, seeds: list[bytes]) -> tuple[str, bytes, int]:
    """Ending, content and unpacked size of an image whose header was edited or whose bytes were damaged."""
    content = draw(st.sampled_from(seeds))
    kind = draw(st.sampled_from(("header", "header", "bytes", "both")))
    if kind != "bytes":
        content = draw(edited(content))
    if kind != "header":
        content = draw(damaged([content]))
    if not draw(st.booleans()):
        return ".nii", content, len(content)
    packed = gzip.compress(content, 1)
    if draw(st.integers(0, 2)) == 0:
        packed = draw(damaged([packed]))
    return ".nii.gz", packed, len(content)


@st.composite
def edited(draw: st.DrawFn, content: bytes) -> bytes:
    """An image with other values in some fields of its header."""
    big = content[0] == 0
    kind = nib.Nifti2Header if content[3 if big else 0] == 0x1C else nib.Nifti1Header
    header = kind(content[: kind.sizeof_hdr], endianness=">" if big else "<", check=False)
    fields = header.structarr
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(fields.dtype.names))
        field = fields[name]
        at = draw(st.integers(0, field.size - 1)) if field.ndim else ()
        if field.dtype.kind == "f":
            value: Any = draw(st.one_of(st.sampled_from(FLOATS), st.floats(width=32)))
        elif field.dtype.kind == "S":
            value = draw(st.binary(max_size=field.dtype.itemsize))
        else:
            limits = np.iinfo(field.dtype)
            number = draw(st.one_of(st.sampled_from(NUMBERS), st.integers(-9, 300)))
            value = draw(st.sampled_from((1, -1))) * number
            value = min(max(value, int(limits.min)), int(limits.max))
        if field.ndim:
            fields[name][at] = value
        else:
            fields[name] = value
    return fields.tobytes() + content[kind.sizeof_hdr :]


def read_run(folder: Path, image: tuple[str, bytes, int]) -> None:
    ending, content, size = image
    path = folder / f"sub-01_bold{ending}"
    path.write_bytes(content)

    def call(run: RunSource) -> Bold:
        bold = open_bold(run)
        assert np.isfinite(bold.affine).all() and 0.05 < bold.tr <= 20
        for count, volume in enumerate(bold.volumes(), 1):  # noqa: B007
            assert volume.shape == bold.shape and volume.dtype == np.float32 and np.isfinite(volume).all()
        assert count == bold.frames
        return bold

    for space in (None, "native"):
        told = answer(partial(call, source(path, None, space=space)), max(size, len(content)))
        assert isinstance(told, Bold | RunRefused)
    path.unlink()


def read_mask(folder: Path, bold: Bold, image: tuple[str, bytes, int]) -> None:
    ending, content, size = image
    path = folder / f"mask{ending}"
    path.write_bytes(content)
    run = replace(bold, run=replace(bold.run, mask=path))
    told = answer(lambda: find_mask(run, SETTINGS), max(size, len(content)))
    assert isinstance(told, RunRefused) or told.brain.any()
    path.unlink()


def compute_mask(folder: Path, image: tuple[str, bytes, int]) -> None:
    """Of a damaged run: it is computed from its frames."""
    ending, content, size = image
    path = folder / f"sub-01_bold{ending}"
    path.write_bytes(content)
    answer(lambda: find_mask(open_bold(source(path, None)), SETTINGS), max(size, len(content)))
    path.unlink()


def read_parcels(folder: Path, image: tuple[str, bytes, int]) -> None:
    ending, content, size = image
    path = folder / f"labels{ending}"
    path.write_bytes(content)
    told = answer(lambda: read_labels(path, GRID), max(size, len(content)))
    assert isinstance(told, ConfigError) or (told.shape == GRID.shape and told.min() >= 0)
    path.unlink()


@pytest.fixture
def sound(tmp_path: Path) -> Bold:
    path = tmp_path / "sound_bold.nii"
    path.write_bytes(runs()[0])
    return open_bold(source(path, None))


@counts
def test_runs(inputs: int, tmp_path: Path) -> None:
    hold(inputs, images(runs()), partial(read_run, tmp_path))


@counts
def test_masks(inputs: int, sound: Bold, tmp_path: Path) -> None:
    hold(inputs, images(masks()), partial(read_mask, tmp_path, sound))


@counts
def test_computed_masks(inputs: int, tmp_path: Path) -> None:
    hold(max(10, inputs // 4), images(runs()), partial(compute_mask, tmp_path))


@counts
def test_labels(inputs: int, tmp_path: Path) -> None:
    hold(inputs, images(labels()), partial(read_parcels, tmp_path))


def test_a_header_that_promises_more_than_the_file_unpacks_to_takes_no_memory(sound: Bold, tmp_path: Path) -> None:
    """Half a megabyte of noise whose header promises 400."""
    header = nib.Nifti1Header()
    header.set_data_shape((1000, 1000, 400))
    header.set_data_dtype(np.uint8)
    header.set_sform(AFFINE, 4)
    header["magic"], header["vox_offset"] = b"n+1", 352
    path = tmp_path / "mask.nii.gz"
    noise = np.random.default_rng(0).bytes(500_000)
    path.write_bytes(gzip.compress(header.binaryblock + bytes(4) + noise))
    run = replace(sound, run=replace(sound.run, mask=path))
    for call in (partial(find_mask, run, SETTINGS), partial(read_labels, path, GRID)):
        told = answer(call, path.stat().st_size)
        assert isinstance(told, RunRefused | ConfigError)
        assert "an incomplete file" in told.line() and "500352 bytes for 1000x1000x400" in told.line()
