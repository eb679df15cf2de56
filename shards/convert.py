"""Cohorts in, a dataset out: find, harmonise, rank, pack.

Each step leaves its results under `DATASET/work/`, so a conversion that was stopped goes on where it was; a session
whose source and configuration are unchanged is not read again. The ranker is handed in: this package does not know how
windows are scored.

Legend: T frames of the run, F frames of a window, W windows, K kept windows, P patches, V voxels, R parcels.
"""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from pydantic import Field, model_validator

from shards import layout, quality, writer
from shards.cohort import RunSource, find_runs, sidecar
from shards.console import progress
from shards.errors import ConfigError, DatasetError, RunRefused, Stopped
from shards.harmonise import GridSettings, harmonise
from shards.patches import gather, parcel_means
from shards.reader import Dataset
from shards.settings import Settings, digest
from shards.split import split_subjects


class Ranker(Protocol):
    """Scores the windows of a run; see `slim.saliency` for those there are."""

    name: str

    def identity(self) -> dict[str, Any]:
        """What the scores depend on, for the manifest."""

    def scores(self, roi_RT: np.ndarray, centre_R3: np.ndarray, frames: int) -> np.ndarray:
        """Saliency of each window in time order, float32 (W,)."""


Parcels = Callable[[np.ndarray, float], np.ndarray]


class WindowSettings(Settings):
    frames: int = Field(5, ge=1, le=100, description="frames of a window")
    keep: int = Field(32, ge=1, description="most salient windows kept")
    minimum: int = Field(8, ge=2, description="a run with fewer windows is refused")


class SplitSettings(Settings):
    seed: int = 0
    shares: tuple[float, float, float] = (0.7, 0.1, 0.2)
    stratify: str | None = Field(None, description="a column of the participants table")

    @model_validator(mode="after")
    def _sum(self) -> SplitSettings:
        if min(self.shares) < 0 or abs(sum(self.shares) - 1) > 1e-6:
            raise ValueError(f"shares of 0 or more that add up to 1, not to {sum(self.shares):g}")
        return self


class ExtractorSettings(Settings):
    """The temporal extractor that is trained on the way when none is given."""

    sessions: int = Field(64, ge=1, description="training sessions it is trained on")
    steps: int = Field(1200, ge=1, description="optimizer steps")
    seed: int = 0


class ShardSettings(Settings):
    mb: float = Field(1000, gt=0, description="a shard is closed at this size, in 10^6 bytes")


class ConvertSettings(Settings):
    """Everything a conversion depends on beside its cohorts and its ranker."""

    grid: GridSettings = GridSettings()
    windows: WindowSettings = WindowSettings()
    split: SplitSettings = SplitSettings()
    extractor: ExtractorSettings = ExtractorSettings()
    shards: ShardSettings = ShardSettings()


class Conversion:
    """One dataset in the making.

    Parameters
    ----------
    cohorts : sequence of paths
        Cohort files; all that the dataset is to hold.
    folder : Path
        The dataset.
    settings : ConvertSettings
    ranking : dict
        Which ranker will be used (name, a given extractor's checksum), part of the configuration.
    parcels : callable
        `parcels(brain_XYZ, mm) -> labels_XYZ`, a module-level function (worker processes import it).
    workers : int
        Processes.

    Raises
    ------
    DatasetError
        If `folder` holds a dataset of another configuration, or one of cohorts that are not named here.
    """

    def __init__(
        self,
        cohorts: Sequence[Path],
        folder: Path,
        settings: ConvertSettings,
        ranking: dict[str, Any],
        parcels: Parcels,
        workers: int,
    ):
        self.cohorts, self.folder, self.settings = [Path(c) for c in cohorts], Path(folder), settings
        self.parcels, self.workers = parcels, workers
        self.configuration = {"settings": settings.model_dump(mode="json"), "ranking": ranking}
        self.hash = digest(self.configuration)
        self.work = self.folder / layout.WORK
        self.previous: Dataset | None = None
        self.before: dict[str, dict[str, Any]] = {}  # its sessions by key
        self.runs: list[RunSource] = []
        self.splits: dict[tuple[str, str], str] = {}

    def open(self) -> None:
        """Finish what a killed run left, and refuse to mix two configurations in one folder; begins nothing."""
        if not self.folder.exists():
            return
        if not self.folder.is_dir():
            raise DatasetError(self.folder, "--out", "a file", "a folder")
        if any(self.folder.iterdir()) and not self.work.exists() and not (self.folder / layout.MANIFEST).exists():
            raise DatasetError(self.folder, "--out", "a folder with other files", "a new folder or a dataset")
        writer.finish_commit(self.folder)
        if (self.folder / layout.MANIFEST).exists():
            self.previous = Dataset(self.folder)
            self.before = {line["key"]: line for line in self.previous.sessions}
            self._same_configuration(self.previous.manifest["configuration_hash"])
        stamp = self.work / "configuration"
        if stamp.exists():
            self._same_configuration(stamp.read_text().strip())

    def begin(self) -> None:
        """Make the folder and write down which configuration it is for; `open` and `find` come first."""
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            if not (self.work / "configuration").exists():
                layout.write_atomically(self.work / "configuration", self.hash)
        except OSError as error:
            raise DatasetError(self.folder, "--out", error.strerror, "a folder that can be written") from None

    def _same_configuration(self, found: str) -> None:
        if found != self.hash:
            raise DatasetError(
                self.folder,
                "configuration",
                f"hash {self.hash[:12]}",
                f"{found[:12]}, that of the sessions already there",
                "Use the settings it was made with (manifest.json), or another --out",
            )

    def find(self) -> list[RunSource]:
        """List the runs of all cohorts and assign every subject to a split; reads no image."""
        runs = [run for path in self.cohorts for run in find_runs(path)]
        names = {run.cohort for run in runs}
        seen: dict[str, str] = {}
        for run in runs:
            if run.key in seen:
                raise ConfigError(run.bold, "key", f"{run.key} a second time ({seen[run.key]})", "one cohort per name")
            seen[run.key] = run.source
        if self.previous is not None:
            lost = set(self.previous.manifest["cohorts"]) - names
            if lost:
                raise DatasetError(
                    self.folder,
                    "cohorts",
                    f"only {', '.join(sorted(names))}",
                    f"also {', '.join(sorted(lost))}, which the dataset holds",
                    "Name all cohort files, or another --out",
                )
        column = self.settings.split.stratify
        strata = {}
        for run in runs:
            if column is not None and column not in run.labels:
                raise ConfigError(
                    run.source,
                    "split.stratify",
                    f"no label {column} for subject {run.subject}",
                    "a column of the participants table",
                )
            label = "" if column is None else f"/{run.labels[column]}"
            strata[run.cohort, run.subject] = run.cohort + label
        self.splits = split_subjects(strata, self.settings.split.shares, self.settings.split.seed)
        self.runs = sorted(runs, key=lambda run: run.key)
        return self.runs

    def extractor_runs(self) -> list[RunSource]:
        """The training-split runs the extractor learns from: a choice that depends on seed and keys alone."""
        chosen = self.settings.extractor
        train = [run for run in self.runs if self.splits[run.cohort, run.subject] == "train"]
        train.sort(key=lambda run: hashlib.sha256(f"{chosen.seed}/{run.key}".encode()).hexdigest())
        return sorted(train[: chosen.sessions], key=lambda run: run.key)

    def harmonise(self, runs: Iterable[RunSource]) -> None:
        """Harmonise runs and keep the results under `work/harmonised/` until they are ranked."""
        todo = [run for run in runs if not self._done(run) and not _is_current(self._harmonised(run), run)]
        self._map("harmonise", todo, None)

    def parcel_series(self, runs: Iterable[RunSource]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(roi_RT, centre_R3) of the harmonised runs among `runs`; refused runs are left out."""
        series = []
        for run in runs:
            path = self._harmonised(run)
            if path.exists():
                with np.load(path) as arrays:
                    series.append((arrays["roi"], arrays["roi_centre"]))
            elif self._done(run):
                arrays = self._done_arrays(run, ("roi", "roi_centre"))
                series.append((arrays["roi"], arrays["roi_centre"]))
        return series

    def rank(self, ranker: Ranker, only_harmonised: bool = False) -> None:
        """Rank every run that is not done and write its members, harmonising it first where that was not done."""
        todo = [run for run in self.runs if not self._done(run)]
        if only_harmonised:
            todo = [run for run in todo if self._harmonised(run).exists()]
        self._map("rank", todo, ranker)

    def pack(self, identity: dict[str, Any]) -> dict[str, Any]:
        """Write the dataset from the finished sessions; does nothing if it is there already.

        Returns
        -------
        dict
            The manifest.
        """
        sessions, failed = [], []
        if self.previous is not None and self.previous.manifest["ranker"] != identity:
            raise DatasetError(
                self.folder,
                "ranker",
                "another extractor than the one its sessions were ranked with",
                "the extractor of the sessions already there",
                "Restore it, or give another --out",
            )
        for run in self.runs:
            meta_path, _ = writer.member_paths(self.folder, run.key)
            refused = layout.read_lines(self._refusal(run))
            if refused and refused[0]["fingerprint"] == fingerprint(run):
                failed += refused
                continue
            if not self._done(run):
                raise DatasetError(
                    self.folder,
                    "--only",
                    f"{run.key} neither ranked nor refused",
                    "all runs ranked before they are packed",
                    "Run it without --only",
                )
            meta = layout.read_lines(meta_path)[0] if meta_path.exists() else self.before[run.key]
            sessions.append({**meta, "split": self.splits[run.cohort, run.subject]})
        if not sessions:
            first = failed[0]
            raise DatasetError(
                self.folder,
                "",
                f"no run that could be converted (the first: {first['reason']})",
                "at least one",
                "See failed runs above",
            )
        failed.sort(key=lambda line: line["key"])
        if self.previous is not None and not self._changed(sessions, failed):
            self._clean()
            return self.previous.manifest
        settings = self.settings
        grid = settings.grid.grid()
        manifest = {
            "format": layout.FORMAT,
            "configuration": self.configuration,
            "configuration_hash": self.hash,
            "grid": {
                "mm": grid.mm,
                "shape": list(grid.shape),
                "patch": grid.patch,
                "centre_mm": list(grid.centre_mm),
                "affine": grid.affine.tolist(),
            },
            "tr": settings.grid.tr,
            "tr_range": list(settings.grid.tr_range),
            "normalisation": "global z inside the mask; baseline = voxel mean, windows = fluctuation around it",
            "windows": settings.windows.model_dump(),
            "ranker": identity,
            "split": settings.split.model_dump(mode="json"),
            "cohorts": sorted({run.cohort for run in self.runs}),
        }
        (self.folder / layout.REPORT / "index.html").unlink(missing_ok=True)  # it shows the dataset as it was
        with progress("pack", len(sessions), "sessions") as advance:
            manifest = writer.pack(
                self.folder, sessions, failed, manifest, int(settings.shards.mb * 1e6), self._members, advance
            )
        self._clean()
        return manifest

    def _clean(self) -> None:
        """Remove what the dataset now holds."""
        for name in ("members", "harmonised", "failed"):
            shutil.rmtree(self.work / name, ignore_errors=True)

    def refused(self) -> list[dict[str, Any]]:
        """Lines of the refused runs, before they are packed or after."""
        waiting = [layout.read_lines(path)[0] for path in sorted((self.work / "failed").glob("*.json"))]
        return waiting or layout.read_lines(self.folder / layout.FAILED)

    def _changed(self, sessions: list[dict[str, Any]], failed: list[dict[str, Any]]) -> bool:
        def identity(lines: Iterable[dict[str, Any]]) -> list[tuple[str, str, str]]:
            return sorted((line["key"], line["fingerprint"], line.get("split", "")) for line in lines)

        assert self.previous is not None
        return identity(sessions) != identity(self.previous.sessions) or identity(failed) != identity(
            layout.read_lines(self.folder / layout.FAILED)
        )

    def _members(self, session: dict[str, Any]) -> tuple[bytes, bytes]:
        """Bytes of a session's two members, from `work/` or from the dataset as it is."""
        inner = ("shard", "json_offset", "json_size", "zarr_offset", "zarr_size", "fingerprint")
        meta = layout.dump({name: value for name, value in session.items() if name not in inner}).encode()
        _, data_path = writer.member_paths(self.folder, session["key"])
        if data_path.exists():
            return meta, data_path.read_bytes()
        with open(self.folder / layout.SHARDS / session["shard"], "rb") as file:
            file.seek(session["zarr_offset"])
            return meta, file.read(session["zarr_size"])

    def _done_arrays(self, run: RunSource, names: tuple[str, ...]) -> dict[str, np.ndarray]:
        """Arrays of a finished session, from `work/` or from the dataset as it is."""
        _, data_path = writer.member_paths(self.folder, run.key)
        if data_path.exists():
            with open(data_path, "rb") as file:
                return layout.unpack(file, str(data_path), names)
        assert self.previous is not None
        return self.previous.read(self.before[run.key], names)

    def _refusal(self, run: RunSource) -> Path:
        return self.work / "failed" / f"{run.key}.json"

    def _harmonised(self, run: RunSource) -> Path:
        return self.work / "harmonised" / f"{run.key}.npz"

    def _done(self, run: RunSource) -> bool:
        """Whether a run's members are written, here or in the dataset, from the source as it is now."""
        meta_path, data_path = writer.member_paths(self.folder, run.key)
        lines = layout.read_lines(meta_path) if meta_path.exists() and data_path.exists() else []
        lines += [self.before[run.key]] if run.key in self.before else []
        return bool(lines) and lines[0]["fingerprint"] == fingerprint(run)

    def _map(self, step: str, runs: list[RunSource], ranker: Ranker | None) -> None:
        """Run `_convert` over runs in worker processes; a refused run is written down and the rest goes on."""
        if not runs:
            return
        context = multiprocessing.get_context("spawn")
        # One thread per process: the processes are the parallelism, and sums come out the same at any worker count.
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        threads = {name: os.environ.get(name) for name in names}
        os.environ.update(dict.fromkeys(threads, "1"))
        try:
            with (
                progress(step, len(runs), "runs") as advance,
                ProcessPoolExecutor(min(self.workers, len(runs)), context, _end_with_parent) as pool,
            ):
                queue = list(reversed(runs))
                pending: dict[Future, RunSource] = {}
                while queue or pending:
                    while queue and len(pending) < 2 * self.workers:
                        run = queue.pop()
                        pending[pool.submit(_convert, run, self.settings, self.folder, self.parcels, ranker)] = run
                    finished, _ = wait(pending, return_when=FIRST_COMPLETED)
                    for future in finished:
                        run = pending.pop(future)
                        try:
                            refused = future.result()
                        except OSError as error:
                            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                                raise
                            raise Stopped(
                                f"no space left in {self.folder} for {run.key}; make room, then the same "
                                "command goes on from there"
                            ) from None
                        note = self._refusal(run)
                        if refused is None:
                            note.unlink(missing_ok=True)
                        else:
                            layout.write_atomically(note, layout.dump(refused) + "\n")
                        advance(1, run.key if refused is None else f"{run.key} refused: {refused['reason']}")
        except BrokenProcessPool:
            raise Stopped(
                f"a worker process died during {step}, perhaps for want of memory; the same command goes "
                "on from there, with fewer --workers if need be"
            ) from None
        finally:
            for name, value in threads.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def fingerprint(run: RunSource) -> str:
    """What a session's sample depends on beside the configuration: its files' sizes and times, labels, TR, space."""

    def stamp(path: Path | None) -> list[Any] | None:
        if path is None or not path.exists():
            return None
        stat = path.stat()
        return [path.name, stat.st_size, stat.st_mtime_ns]

    files = [stamp(path) for path in (run.bold, run.mask, run.confounds, sidecar(run.bold))]
    return digest([run.key, run.source, files, run.tr, run.space, run.labels])[:16]


def _end_with_parent() -> None:
    """Have a worker process end when the process that started it is gone, killed perhaps."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _is_current(path: Path, run: RunSource) -> bool:
    if not path.exists():
        return False
    with np.load(path) as arrays:
        return str(arrays["fingerprint"]) == fingerprint(run)


def _convert(
    run: RunSource, settings: ConvertSettings, folder: Path, parcels: Parcels, ranker: Ranker | None
) -> dict[str, Any] | None:
    """Harmonise one run and, with a ranker, write its members. Returns its line of `failed.jsonl` if it is refused."""
    stamp = fingerprint(run)
    path = folder / layout.WORK / "harmonised" / f"{run.key}.npz"
    try:
        if _is_current(path, run):
            with np.load(path) as stored:
                arrays = dict(stored)
            meta = json.loads(str(arrays.pop("meta")))
            arrays.pop("fingerprint")
        else:
            arrays, meta = _harmonised_arrays(run, settings, parcels)
        if ranker is None:
            everything: dict[str, Any] = {**arrays, "meta": layout.dump(meta), "fingerprint": stamp}
            layout.write_atomically(path, lambda file: np.savez(file, **everything))
            return None
        data = layout.pack(_ranked(run, arrays, settings, ranker))
        meta |= {"fingerprint": stamp, "zarr_size": len(data), "n_kept": min(settings.windows.keep, meta["n_windows"])}
        meta_path, data_path = writer.member_paths(folder, run.key)
        layout.write_atomically(data_path, data)
        layout.write_atomically(meta_path, layout.dump(meta) + "\n")
        path.unlink(missing_ok=True)
    except RunRefused as refused:
        return {
            "key": run.key,
            "cohort": run.cohort,
            "source": run.source,
            "reason": refused.line(),
            "hint": refused.hint,
            "fingerprint": stamp,
        }
    return None


def _harmonised_arrays(
    run: RunSource, settings: ConvertSettings, parcels: Parcels
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """All windows of a run in time order and what is known about it."""
    grid, frames = settings.grid.grid(), settings.windows.frames
    result = harmonise(run, settings.grid)
    n_frames, n_patches, n_voxels = result.fluctuation_TPV.shape
    n_windows = n_frames // frames
    if n_windows < settings.windows.minimum:
        raise RunRefused(
            run.source,
            "frames",
            f"{n_windows} windows of {frames} frames at TR {result.tr:g} s",
            f"at least {settings.windows.minimum}",
            "The run is too short; leave it out",
        )
    labels_XYZ = parcels(result.brain_XYZ, grid.mm)
    roi_RT, centre_R3, number_R = parcel_means(result.raw_TN, labels_XYZ, result.brain_XYZ, grid.affine)
    arrays = {
        "baseline": result.baseline_PV,
        "spread": result.spread_PV,
        "patch": result.patch_P3,
        "brain": gather(result.brain_XYZ.astype(np.uint8), result.patch_P3, grid.patch),
        "carpet": quality.carpet(result.raw_TN, result.brain_XYZ),
        "roi": roi_RT,
        "roi_centre": centre_R3,
        "roi_number": number_R,
        "windows": result.fluctuation_TPV[: n_windows * frames].reshape(n_windows, frames, n_patches, n_voxels),
    }
    meta = {
        "key": run.key,
        "cohort": run.cohort,
        "subject": run.subject,
        "session": run.session,
        "run": run.run,
        "task": run.task,
        "source": run.source,
        "labels": run.labels,
        "frames": n_frames,
        "tr": result.tr,
        "source_tr": result.source_tr,
        "n_windows": n_windows,
        "n_patches": n_patches,
        **result.facts,
    }
    return arrays, meta


def _ranked(
    run: RunSource, arrays: dict[str, np.ndarray], settings: ConvertSettings, ranker: Ranker
) -> dict[str, np.ndarray]:
    """The arrays of a sample: the K most salient windows in rank order; of equal scores the earlier comes first."""
    frames = settings.windows.frames
    windows = arrays["windows"]
    try:
        scores_W = np.asarray(ranker.scores(arrays["roi"], arrays["roi_centre"], frames), np.float32)
    except RunRefused as refused:  # the ranker does not know which run it scores
        raise RunRefused(run.source, refused.field, refused.got, refused.expected, refused.hint) from None
    if scores_W.shape != (len(windows),) or not np.isfinite(scores_W).all():
        raise RunRefused(
            run.source, "saliency", f"scores that are not {len(windows)} finite numbers", "a score per window"
        )
    rank_K = np.lexsort((np.arange(len(scores_W)), -scores_W))[: settings.windows.keep]
    return {
        **{name: values for name, values in arrays.items() if name != "windows"},
        **layout.encode_windows(windows[rank_K], arrays["spread"]),
        "start": (rank_K * frames).astype(np.int32),
        "saliency": scores_W[rank_K],
        "scores": scores_W,
    }
