"""Convert one scan to a session: harmonise it, rank its windows, and write the two members of its sample.

The ranker is an argument, because this package does not import rankers.

Legend: T frames of the scan, F frames of a window, W windows, K kept windows, N brain voxels, P patches, V voxels,
R parcels.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import numpy as np
from pydantic import BeforeValidator, Field, field_serializer, field_validator

from shards.cohorts.bids import sidecars
from shards.cohorts.scan import RunSource
from shards.conversion import writer
from shards.core import files, nifti
from shards.core.errors import RunRefused
from shards.core.settings import Settings, Unit, check, digest, whole_number
from shards.format import layout, sample
from shards.format.grid import Grid
from shards.format.patches import gather, parcel_means
from shards.format.refusal import Refusal
from shards.format.session_record import ScanFacts, ScanRecord
from shards.preprocessing import quality
from shards.preprocessing.bold import Bold, open_bold
from shards.preprocessing.confounds import CleanSettings
from shards.preprocessing.harmonise import GridSettings, Harmonised, frames_at, harmonise, place, read_confounds
from shards.preprocessing.masks import BrainMaskSettings


class WindowRanker(Protocol):
    """Scores the windows of a scan. The rankers are in `slim.ranking.rankers`."""

    name: str

    def identity(self) -> dict[str, object]:
        """What the scores depend on, for the manifest."""

    def parts(self, roi_RT: np.ndarray, centre_R3: np.ndarray, frames: int) -> dict[str, np.ndarray]:
        """Saliency of each window in time order, float32 (W,), as `scores`. Rankers that use space and time also return
        their parts as `scores_space` and `scores_time`."""


Parcels = Callable[[np.ndarray], np.ndarray]  # maps brain_XYZ to labels_XYZ; picklable


class WindowSettings(Settings):
    """Windows of a scan, and how many are kept."""

    frames: Annotated[int, Unit("frames")] = Field(5, ge=1, le=100, description="number of frames of a window")
    keep: Annotated[int | Literal["all"], Unit("windows"), BeforeValidator(whole_number("all", 1))] = Field(
        32, description="number of most salient windows kept, or `all`, in the order of their saliency"
    )
    minimum: Annotated[int, Unit("windows")] = Field(8, ge=1, description="scans with fewer windows are refused")

    def kept_of(self, count: int) -> int:
        """How many of `count` windows are kept."""
        return count if self.keep == "all" else min(self.keep, count)


class ParcelSettings(Settings):
    """The parcels from which the temporal extractor and the ranker take their time series."""

    image: Path | None = Field(None, description="label image in MNI space; without one, cubes of the brain mask")
    cube_mm: Annotated[float, Unit("mm")] = Field(24.0, gt=0, le=200, description="edge of a cube")
    least_brain: Annotated[float, Unit("share")] = Field(
        0.1, ge=0, le=1, description="parcels with a smaller share of brain are left out"
    )

    @field_validator("image")
    @classmethod
    def _is_there(cls, image: Path | None) -> Path | None:
        if image is not None and not image.is_file():
            raise ValueError("an existing file, a NIfTI label image in MNI space")
        return image

    @field_serializer("image")
    def _content(self, image: Path | None) -> dict[str, str] | None:
        """Describe an image by its content, so that a changed image is another configuration."""
        if image is None:
            return None
        return {"name": image.name, "sha256": files.sha256(image)}


class SessionSettings(Settings):
    """The settings that a sample depends on, besides its scan and the ranker."""

    grid: GridSettings = GridSettings()
    mask: BrainMaskSettings = BrainMaskSettings()
    clean: CleanSettings = CleanSettings()
    parcels: ParcelSettings = ParcelSettings()
    windows: WindowSettings = WindowSettings()


def fingerprint(run: RunSource) -> str:
    """Hash of what a sample depends on, besides the configuration: sizes and times of files, labels, TR, space."""

    def stamp(path: Path | None) -> list[Any] | None:
        if path is None or not path.exists():
            return None
        stat = path.stat()
        return [path.name, stat.st_size, stat.st_mtime_ns]

    pair = [run.bold.with_suffix(".hdr")] if run.bold.suffix == ".img" else []
    own, *inherited = sidecars(run.bold)
    files = [stamp(path) for path in (run.bold, run.mask, run.confounds, own)]
    files += [stamp(path) for path in (*pair, *inherited)]
    stated = [run.tr, run.space, run.orientation, run.dummy, run.people, run.labels]
    return digest([run.key, run.source, files, stated, run.problem and run.problem.line()])[:16]


def harmonised_path(folder: Path, run: RunSource) -> Path:
    """The file of a harmonised scan that is not ranked yet."""
    return folder / layout.WORK / "harmonised" / f"{run.key}.npz"


def is_harmonised(folder: Path, run: RunSource) -> bool:
    """Whether a scan is harmonised, from its present files, and not ranked yet."""
    path = harmonised_path(folder, run)
    if not path.exists():
        return False
    with np.load(path) as arrays:
        return str(arrays["fingerprint"]) == fingerprint(run)


def assumptions(facts: ScanFacts) -> list[str]:
    """What was assumed about a scan, and what is contradictory or missing, one sentence each."""
    found = []
    if words := facts.space_assumed:
        found.append(f"space {words}")
    if words := facts.orientation_assumed:
        found.append(f"orientation {words} assumed, because the header has none: check left and right")
    if words := facts.forms_disagree:
        found.append(f"{words}: they disagree on left and right; the sform was used")
    if facts.tr_source == "header" and (facts.source_tr or facts.tr) == 1:
        found.append("TR 1 s is from the header, where 1 is often a default: check it")
    if words := facts.mask_rule:
        found.append(f"mask of {words}")
    if share := facts.dead_share:
        found.append(f"{share:.1%} of the mask has no signal and was left out")
    if count := facts.repeated_frames:
        found.append(f"{count} volumes are copies of an earlier one; windows with them were not kept")
    return found


def by_assumption(sessions: Iterable[ScanRecord]) -> dict[str, list[str]]:
    """Every sentence of `assumptions`, with the keys of its sessions."""
    found: dict[str, list[str]] = {}
    for session in sessions:
        for words in assumptions(session):
            found.setdefault(words, []).append(session.key)
    return found


class Survey(ScanFacts):
    """Facts about a scan that are known before its frames are read."""

    tr_source: str
    frames: int
    shape: tuple[int, int, int]
    voxel_mm: tuple[float, float, float]


def survey(run: RunSource, settings: SessionSettings) -> Survey:
    """Collect the facts about a scan that are known before its frames are read.

    Raises
    ------
    RunRefused
        If it is already certain that the scan will be refused.
    """
    bold = _open(run, settings)
    facts: dict[str, object] = {"tr_source": bold.tr_source}
    if run.mask is not None:
        facts = place(run, settings.grid, settings.mask, settings.clean).facts
    else:  # the mask will be computed from the frames
        read_confounds(bold, settings.clean)
        if not bold.centred and not run.says_mni:
            words = f"not given, {nifti.code_words(bold.image)}: the overlap of the brain with MNI152 will decide"
            facts["space_assumed"] = words
    about = {"frames": bold.frames, "tr": bold.tr, "shape": bold.shape, "voxel_mm": bold.voxel_mm}
    return Survey.model_validate(facts | about)


def convert(
    run: RunSource, settings: SessionSettings, folder: Path, parcels: Parcels, ranker: WindowRanker | None
) -> ScanRecord | Refusal:
    """Harmonise one scan and, with a ranker, write its members.

    Returns
    -------
    ScanRecord or Refusal
        The record of the scan, or why it cannot be converted.
    """
    stamp = fingerprint(run)
    path = harmonised_path(folder, run)
    try:
        if is_harmonised(folder, run):
            session = _load(path)
        else:
            session = _harmonise(run, settings, parcels)
            if ranker is None:
                session.save(path, stamp)
        if ranker is None:
            return session.meta
        made = _converted(run, session, settings, ranker)
        meta_path, data_path = writer.member_paths(folder, run.key)
        files.write_atomically(data_path, made.data)
        meta = made.meta.model_copy(update={"fingerprint": stamp})
        files.write_atomically(meta_path, files.dump(meta.tree()) + "\n")
        path.unlink(missing_ok=True)
    except RunRefused as refused:
        reason, hint = refused.line(), refused.hint
        return Refusal(key=run.key, cohort=run.cohort, source=run.source, reason=reason, hint=hint, fingerprint=stamp)
    return meta


@dataclass(frozen=True)
class Converted:
    """One converted scan in memory.

    Attributes
    ----------
    meta : ScanRecord
    data : bytes
        The Zarr member.
    grid : Grid
    """

    meta: ScanRecord
    data: bytes
    grid: Grid

    def read(
        self, session: ScanRecord, names: Iterable[str] | None = None, windows: Iterable[int] | None = None
    ) -> dict[str, np.ndarray]:
        """Read arrays of the scan, like `shards.format.reader.Dataset.read`."""
        return sample.unpack(io.BytesIO(self.data), session.source, names, windows)


def convert_run(run: RunSource, settings: SessionSettings, parcels: Parcels, ranker: WindowRanker) -> Converted:
    """Convert a scan in memory, without writing files.

    Raises
    ------
    RunRefused
        If the scan cannot be converted.
    """
    return _converted(run, _harmonise(run, settings, parcels), settings, ranker)


@dataclass
class _Session:
    """A harmonised scan with its parcels and facts."""

    result: Harmonised
    roi_RT: np.ndarray
    centre_R3: np.ndarray
    number_R: np.ndarray
    meta: ScanRecord

    def save(self, path: Path, stamp: str) -> None:
        """Save the scan until it is ranked: brain voxels only, uncompressed."""
        arrays: dict[str, Any] = {
            "fingerprint": stamp,
            "meta": files.dump(self.meta.tree()),
            "roi": self.roi_RT,
            "roi_centre": self.centre_R3,
            "roi_number": self.number_R,
            "brain": self.result.brain_XYZ,
            "edge": self.result.edge,
            "raw": self.result.raw_TN,
            "repeated": self.result.repeated_T,
        }
        if self.result.displacement_T is not None:
            arrays["displacement"] = self.result.displacement_T
        with files.atomically(path) as file:
            np.savez(file, **arrays)


def _load(path: Path) -> _Session:
    with np.load(path) as stored:
        arrays = dict(stored)
    meta = check(ScanRecord, json.loads(str(arrays["meta"])), path)
    result = Harmonised(
        arrays["raw"],
        arrays["brain"],
        int(arrays["edge"]),
        meta.tr,
        meta.source_tr,
        {},
        arrays["repeated"],
        arrays.get("displacement"),
    )
    return _Session(result, arrays["roi"], arrays["roi_centre"], arrays["roi_number"], meta)


def _open(run: RunSource, settings: SessionSettings) -> Bold:
    """Open a scan and check its header and settings, before frames are read."""
    bold = open_bold(run)
    if settings.parcels.image is not None and bold.centred:
        got = "native" if run.space == "native" else "a header without position"
        expected = f"MNI space, as for the parcels of {settings.parcels.image.name}"
        hint = "Register the scan, or remove parcels.image: cubes need no registration"
        raise RunRefused(run.source, "space", got, expected, hint)
    frames = bold.frames - (run.dummy if isinstance(run.dummy, int) else 0)
    resampled = frames_at(settings.grid, bold.tr, frames)
    _check_length(run, resampled, bold.tr if resampled == frames else settings.grid.tr, settings)
    return bold


def _check_length(run: RunSource, frames: int, tr: float, settings: SessionSettings) -> None:
    windows = settings.windows
    if frames // windows.frames < windows.minimum:
        got = f"{frames // windows.frames} windows of {windows.frames} frames at TR {tr:g} s"
        hint = "The scan is too short; leave it out"
        raise RunRefused(run.source, "frames", got, f"at least {windows.minimum}", hint)


def _harmonise(run: RunSource, settings: SessionSettings, parcels: Parcels) -> _Session:
    grid = settings.grid.grid()
    _open(run, settings)
    result = harmonise(run, settings.grid, settings.mask, settings.clean)
    frames = len(result.raw_TN)  # fewer if dummy volumes were dropped
    _check_length(run, frames, result.tr, settings)
    labels_XYZ = parcels(result.brain_XYZ)
    roi_RT, centre_R3, number_R = parcel_means(result.raw_TN, labels_XYZ, result.brain_XYZ, grid.affine)
    if len(number_R) < 2:
        got, hint = f"{len(number_R)} with enough brain voxels", "Check the brain mask, or choose smaller parcels"
        raise RunRefused(run.source, "parcels", got, "at least 2", hint)
    meta = {
        "key": run.key,
        "cohort": run.cohort,
        "people": run.person[0],
        "subject": run.subject,
        "session": run.session,
        "run": run.run,
        "variant": run.variant,
        "task": run.task,
        "source": run.source,
        "labels": run.labels,
        "frames": frames,
        "tr": result.tr,
        "source_tr": result.source_tr,
        "n_windows": frames // settings.windows.frames,
        "n_patches": len(result.patch_P3),
        "n_parcels": len(number_R),
        **result.facts,
    }
    return _Session(result, roi_RT, centre_R3, number_R, ScanRecord.model_validate(meta))


def _converted(run: RunSource, session: _Session, settings: SessionSettings, ranker: WindowRanker) -> Converted:
    arrays = _ranked(run, session, settings, ranker)
    data = sample.pack(arrays)
    meta = session.meta.model_copy(update={"zarr_size": len(data), "n_kept": len(arrays["start"])})
    return Converted(meta, data, settings.grid.grid())


def _ranked(
    run: RunSource, session: _Session, settings: SessionSettings, ranker: WindowRanker
) -> dict[str, np.ndarray]:
    """The arrays of a sample, with the K most salient windows in rank order; for equal scores, the earlier is first.

    Windows with volumes that are copies of an earlier one are never kept, and get the lowest score of the others.
    """
    frames, result, n_windows = settings.windows.frames, session.result, session.meta.n_windows
    measured_W = ~result.repeated_T[: n_windows * frames].reshape(n_windows, frames).any(axis=1)
    if (count := int(np.count_nonzero(measured_W))) < settings.windows.minimum:
        got = f"{count} of {n_windows} windows without volumes that are copies of an earlier one"
        hint = "The scanner may have stopped, or censored volumes were replaced by copies: leave the scan out"
        raise RunRefused(run.source, "data", got, f"at least {settings.windows.minimum}", hint)
    try:
        parts = ranker.parts(session.roi_RT, session.centre_R3, frames)
    except RunRefused as refused:  # the ranker does not know the name of the scan
        raise RunRefused(run.source, refused.field, refused.got, refused.expected, refused.hint) from None
    for name, values_W in parts.items():
        if values_W.shape != (n_windows,) or not np.isfinite(values_W).all():
            raise RunRefused(run.source, name, f"values that are not {n_windows} finite numbers", "one per window")
    parts = {name: np.where(measured_W, values_W, values_W[measured_W].min()) for name, values_W in parts.items()}
    scores_W = parts["scores"].astype(np.float32)
    rank_K = np.lexsort((np.arange(n_windows), -scores_W, ~measured_W))[: settings.windows.kept_of(count)]
    start_K = rank_K * frames
    moved = {} if result.displacement_T is None else {"displacement": result.displacement_T.astype(np.float32)}
    return {
        "baseline": result.baseline_PV,
        "spread": (spread_PV := result.spread_PV),
        "patch": result.patch_P3,
        "brain": gather(result.brain_XYZ.astype(np.uint8), result.patch_P3, result.edge),
        "roi": session.roi_RT,
        "roi_centre": session.centre_R3,
        "roi_number": session.number_R,
        "carpet": quality.carpet(result.raw_TN, result.brain_XYZ),
        **sample.encode_windows(result.windows(start_K, frames), spread_PV),
        "start": start_K.astype(np.int32),
        "saliency": scores_W[rank_K],
        **parts,
        **moved,
    }
