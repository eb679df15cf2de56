"""Conversion and reading of shards, compared with nilearn and compressed NumPy files.

- *Conversion*: `slim-brain make-shards` as a process, from find to page and from the start of the interpreter on,
  beside `nilearn.image.resample_img` of the same runs to the same grid, and nothing else, inside this process. The
  source's TR is in the accepted range, so neither resamples in time.
- *Bytes*: a session's Zarr member beside the published layout, one `np.savez_compressed` of the whole harmonised run,
  float32 (T, X, Y, Z), z-scored over the brain, background 0. It is computed from nilearn's volumes.
- *Reading*: what pretraining reads of a session (`slim.data.samples.read_windows`: the best windows, baseline, spread,
  patch, brain, start) beside `np.load` of that .npz and a random crop of as many frames; and beside the limit, the time
  it takes to decompress the same chunks from memory into memory.

Legend: T frames of the run or the windows; X, Y, Z voxels of the grid; N brain voxels; P patches; V voxels of a patch.
"""

from __future__ import annotations

import io
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
from nilearn.image import resample_img
from numcodecs import blosc
from pydantic import Field, model_validator

from launchers.benches.commands import SMALL as SMALL_DATA
from launchers.benches.commands import Sizes
from launchers.benches.common import Figure, Ratio, Result, interleave
from shards.format import layout
from shards.format.patches import gather, scatter
from shards.format.reader import Dataset
from slim.data.samples import Sample, read_windows

READS = 10  # reads and decompressions in a round: they are short, so noise affects them more


class Bench(Sizes):
    """Sizes of the bench; the cohort is synthetic."""

    windows: int = Field(8, ge=1, le=32, description="windows read")

    @model_validator(mode="after")
    def _enough(self) -> Bench:
        if self.windows * 5 > self.frames:
            raise ValueError(f"{self.windows} windows of 5 frames in {self.frames} frames")
        return self


SMALL = SMALL_DATA


def run(bench: Bench, repeat: int, folder: Path, begun: Callable[[str], None]) -> Result:
    """Measure all of it; see the head of this file."""
    result = Result(notes={"settings": bench.model_dump(mode="json")})
    begun("write a synthetic cohort")
    bench.write_cohort(folder / "cohort")
    dataset, dense_TXYZ = conversion(bench, repeat, folder, begun, result)

    begun("write the .npz")
    packed = folder / "run.npz"
    np.savez_compressed(packed, run=dense_TXYZ)
    session = dataset.sessions[0]
    kept = session.n_kept * dataset.frames
    whole = session.frames
    result.figures |= {
        "bytes of a session, ours": Figure("B", (session.zarr_size,)),
        "bytes of a session, .npz": Figure("B", (packed.stat().st_size,)),
        "bytes of a frame, ours": Figure("B", (session.zarr_size / kept,)),
        "bytes of a frame, .npz": Figure("B", (packed.stat().st_size / whole,)),
    }
    for what in ("session", "frame"):
        names = f"bytes of a {what}, .npz", f"bytes of a {what}, ours"
        result.ratios.append(Ratio(f"bytes of a {what}, .npz over ours", *names))
    result.notes["npz"] = (
        f"np.savez_compressed of all {whole} frames, float32 {dense_TXYZ.shape}, z-scored over the brain, background 0"
    )
    result.notes["ours"] = (
        f"the {session.n_kept} best of {session.n_windows} windows ({kept} frames), baseline, spread, brain, "
        "parcel series and carpet, brain patches only"
    )
    result.notes["rms_difference_over_fluctuation"] = difference(dense_TXYZ, dataset, bench.windows)
    del dense_TXYZ
    reading(bench, repeat, dataset, packed, begun, result)
    return result


def conversion(
    bench: Bench, repeat: int, folder: Path, begun: Callable[[str], None], result: Result
) -> tuple[Dataset, np.ndarray]:
    """Time both; returns the dataset, and nilearn's first run as the dense array of the .npz."""
    out = folder / "shards"
    sources = sorted((folder / "cohort").rglob("*_desc-preproc_bold.nii.gz"))
    datasets: list[Dataset] = []
    images: list[nib.Nifti1Image] = []

    def ours() -> None:
        shutil.rmtree(out, ignore_errors=True)
        bench.convert(folder / "cohort", out)
        datasets.append(Dataset(out))

    def nilearn() -> None:
        grid = datasets[-1].grid
        for source in reversed(sources):
            image = resample_img(
                nib.load(source),
                target_affine=grid.affine,
                target_shape=grid.shape,
                interpolation="continuous",
                clip=False,
                force_resample=True,
                copy_header=True,
            )
        images[:] = [image]

    what = f"{bench.runs} run{'s' * (bench.runs > 1)}"
    names = {"ours": f"convert {what}, make_shards.py", "nilearn": f"resample {what}, nilearn"}
    result.figures |= interleave({names["ours"]: ours, names["nilearn"]: nilearn}, repeat, begun)
    for clock in ("wall", "CPU"):
        of, over = f"{names['ours']}, {clock}", f"{names['nilearn']}, {clock}"
        result.ratios.append(Ratio(f"conversion over nilearn, {clock}", of, over, at_most=1.5))
    for which, name in names.items():
        minutes = result.figures[f"{name}, CPU"].median / 60
        result.figures[f"runs per minute and core, {which}"] = Figure("/min", (bench.runs / minutes,))
    return datasets[-1], dense_run(images[-1], brain_of(datasets[-1]))


def brain_of(dataset: Dataset) -> np.ndarray:
    """The brain of a dataset's first session; bool (X, Y, Z)."""
    arrays = dataset.read(dataset.sessions[0], ("brain", "patch"))
    return scatter(arrays["brain"], arrays["patch"], dataset.grid.shape, dataset.grid.patch).astype(bool)


def dense_run(image: nib.Nifti1Image, brain_XYZ: np.ndarray) -> np.ndarray:
    """A run on the grid, z-scored over all brain voxels and frames, background 0; float32 (T, X, Y, Z)."""
    values_TN = np.asarray(image.dataobj)[brain_XYZ].T
    dense_TXYZ = np.zeros((len(values_TN), *brain_XYZ.shape), np.float32)
    dense_TXYZ[:, brain_XYZ] = (values_TN - values_TN.mean()) / values_TN.std()
    return dense_TXYZ


def read_sample(dataset: Dataset, windows: int) -> Sample:
    """The best windows of the first session, as a loading process of pretraining reads them."""
    return read_windows(dataset, dataset.sessions[0], range(windows))


def difference(dense_TXYZ: np.ndarray, dataset: Dataset, windows: int) -> float:
    """RMS difference of the windows to the same frames of the dense run, over the fluctuation's RMS: the same data."""
    sample, session, edge = read_sample(dataset, windows), dataset.sessions[0], dataset.grid.patch
    patch_P3 = np.stack(np.unravel_index(sample.place, dataset.grid.patch_shape), axis=1)
    brain_PV = sample.brain.astype(bool)
    gaps, values = [], []
    for value_PV, second in zip(sample.value.astype(np.float32), sample.second, strict=True):
        frame_PV = gather(dense_TXYZ[round(float(second) / session.tr)], patch_P3, edge)
        gaps.append((value_PV + sample.baseline - frame_PV)[brain_PV])
        values.append(value_PV[brain_PV])
    return float(np.sqrt(np.mean(np.square(gaps)) / np.mean(np.square(values))))


def reading(
    bench: Bench, repeat: int, dataset: Dataset, packed: Path, begun: Callable[[str], None], result: Result
) -> None:
    """Time the reading of windows, of the .npz, and the decompression alone."""
    rng = np.random.default_rng(0)
    frames = bench.windows * dataset.frames

    def npz() -> np.ndarray:
        with np.load(packed) as arrays:
            whole_TXYZ = arrays["run"]
        first = rng.integers(len(whole_TXYZ) - frames + 1)
        return whole_TXYZ[first : first + frames].copy()

    chunks = chunks_read(dataset, bench.windows)
    places = [np.empty(len(blosc.decompress(chunk)), np.uint8) for chunk in chunks]

    def decompress() -> None:
        for chunk, place in zip(chunks, places, strict=True):
            blosc.decompress(chunk, place)

    names = {
        "npz": f"np.load and a crop of {frames} frames",
        "ours": f"read {bench.windows} windows",
        "limit": "decompress the chunks of them",
    }
    work = {
        names["npz"]: npz,
        names["ours"]: lambda: read_sample(dataset, bench.windows),
        names["limit"]: decompress,
    }
    for call in list(work.values())[1:]:  # both caches and lazy imports are warm; so is the .npz, just written
        call()
    result.figures |= interleave(work, repeat, begun, {names["ours"]: READS, names["limit"]: READS}, "ms")
    for clock in ("wall", "CPU"):
        npz_figure, ours_figure, limit = (f"{names[which]}, {clock}" for which in ("npz", "ours", "limit"))
        result.ratios.append(Ratio(f"reading .npz over ours, {clock}", npz_figure, ours_figure, at_least=40))
        result.ratios.append(Ratio(f"share of the limit, {clock}", limit, ours_figure, at_least=0.5))
    result.notes["bytes_decompressed"] = sum(len(place) for place in places)


def chunks_read(dataset: Dataset, windows: int) -> list[bytes]:
    """The compressed chunks that `read_sample` needs, in memory."""
    session = dataset.sessions[0]
    with open(dataset.folder / layout.SHARDS / session.shard, "rb") as file:
        file.seek(session.zarr_offset)
        archive = zipfile.ZipFile(io.BytesIO(file.read(session.zarr_size)))
    whole = ("baseline/c/", "spread/c/", "patch/c/", "brain/c/", "start/c/", "scale/c/")
    best = tuple(f"windows/c/{rank}/" for rank in range(windows))
    return [archive.read(name) for name in archive.namelist() if name.startswith(whole + best)]
