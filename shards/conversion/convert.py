"""Cohorts in, a dataset out: find, harmonise, rank, pack.

Each step leaves its results under `DATASET/work/`, so a conversion that was stopped goes on where it was; a session
whose source and configuration are unchanged is not read again, and a run that was refused is not tried again before it
changes. One conversion at a time holds the folder; its processes may be many, on as many machines (`join`).
"""

from __future__ import annotations

import fcntl
import hashlib
import multiprocessing
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import Field

from shards.cohorts.cohort_file import Cohort, find_cohort
from shards.cohorts.scan import RunSource
from shards.conversion import writer
from shards.conversion.session import (
    Parcels,
    SessionSettings,
    WindowRanker,
    convert,
    fingerprint,
    harmonised_path,
    is_harmonised,
)
from shards.conversion.splits import DatasetSplitSettings, Person, assign, read_table, write_table
from shards.core import files
from shards.core.cli import progress
from shards.core.errors import ConfigError, DatasetError, RunRefused, Stopped, is_full
from shards.core.settings import Settings, Unit, digest
from shards.core.workers import end_with_parent, why_no_workers
from shards.format import layout, sample
from shards.format.reader import Dataset

S = TypeVar("S")


class ExtractorSettings(Settings):
    """The temporal extractor that is trained on the way when none is given."""

    sessions: Annotated[int, Unit("sessions")] = Field(
        24, ge=1, le=256, description="training sessions it is trained on, drawn from all of them"
    )
    steps: Annotated[int, Unit("steps")] = Field(1200, ge=1, description="optimizer steps")
    seed: int = Field(0, ge=0, description="of the draw of sessions, the weights, crops and masks")

    def draw(self, sessions: Iterable[S], key: Callable[[S], str]) -> list[S]:
        """The sessions it learns from, in the order of their keys: a choice that depends on seed and keys alone."""
        shuffled = sorted(sessions, key=lambda s: hashlib.sha256(f"{self.seed}/{key(s)}".encode()).hexdigest())
        return sorted(shuffled[: self.sessions], key=key)


class ShardSettings(Settings):
    """Files of the dataset."""

    mb: Annotated[float, Unit("MB")] = Field(1000, gt=0, description="size at which a shard is closed, in 10^6 bytes")


class ConvertSettings(SessionSettings):
    """Everything a conversion depends on beside its cohorts and its ranker."""

    split: DatasetSplitSettings = DatasetSplitSettings()
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
        `parcels(brain_XYZ) -> labels_XYZ` as `settings.parcels` asks for; worker processes get it by pickle.
    workers : int
        Processes.
    retry : bool
        Try runs again that were refused and have not changed.

    Raises
    ------
    DatasetError
        If `folder` holds a dataset of another configuration, or one of cohorts that are not named here, or another
        conversion holds it.
    """

    def __init__(
        self,
        cohorts: Sequence[Path],
        folder: Path,
        settings: ConvertSettings,
        ranking: dict[str, Any],
        parcels: Parcels,
        workers: int,
        retry: bool = False,
    ):
        self.cohorts, self.folder, self.settings = [Path(c) for c in cohorts], Path(folder), settings
        self.parcels, self.workers, self.retry = parcels, workers, retry
        self.configuration = {"settings": settings.model_dump(mode="json"), "ranking": ranking}
        self.hash = digest(self.configuration)
        self.work = self.folder / layout.WORK
        self.previous: Dataset | None = None
        self.before: dict[str, dict[str, Any]] = {}  # its sessions by key
        self.refused_before: dict[str, dict[str, Any]] = {}  # its refused runs by key
        self.found: list[Cohort] = []
        self.runs: list[RunSource] = []
        self.splits: dict[Person, str] = {}
        self._lock: int | None = None

    def open(self) -> None:
        """Finish what a killed run left, and refuse to mix two configurations in one folder; begins nothing."""
        if not self.folder.exists():
            return
        if not self.folder.is_dir():
            raise DatasetError(self.folder, "--out", "a file", "a folder")
        if any(self.folder.iterdir()) and not self.work.exists() and not (self.folder / layout.MANIFEST).exists():
            raise DatasetError(self.folder, "--out", "a folder with other files", "a new folder or a dataset")
        self.hold()
        self.resume(alone=True)
        stamp = self.work / "configuration"
        if stamp.exists():
            self._same_configuration(stamp.read_text(encoding="utf-8").strip())

    def resume(self, alone: bool) -> None:
        """Read what the folder holds of an earlier conversion; `hold` comes first.

        Parameters
        ----------
        alone : bool
            No other process holds the folder: what a killed one left half done is finished.
        """
        if alone:
            writer.finish_commit(self.folder)
        if (self.folder / layout.MANIFEST).exists():
            self.previous = Dataset(self.folder)
            self.before = {line["key"]: line for line in self.previous.sessions}
            self._same_configuration(
                self.previous.manifest["configuration_hash"], self.previous.manifest.get("configuration")
            )
        if not self.retry:
            self.refused_before = {line["key"]: line for line in layout.read_lines(self.folder / layout.FAILED)}

    def begin(self) -> None:
        """Make the folder; write down which configuration it is for and who is in which split.

        `open` and `find` come first.
        """
        try:
            self.hold()
            for left_over in self.work.rglob(".*.tmp"):  # by a process that was killed while it wrote
                left_over.unlink()
            if not (self.work / "configuration").exists():
                files.write_atomically(self.work / "configuration", self.hash)
            if self.retry:
                self.refused_before = {}
                shutil.rmtree(self.work / "failed", ignore_errors=True)
            if read_table(self.folder) != self.splits:
                write_table(self.folder, self.splits)
        except OSError as error:
            raise DatasetError(self.folder, "--out", error.strerror, "a folder that can be written") from None

    def hold(self, who: str = "", together: bool = False, patience: float = 0) -> None:
        """Keep other conversions out of the folder until this process ends, however it ends.

        Parameters
        ----------
        who : str
            What others are told about this process; by default its number.
        together : bool
            Share the folder with processes that hold it together, too: the tasks of one conversion, which must have
            been begun by one that held it alone.
        patience : float
            Seconds to wait for those that hold it now.

        Raises
        ------
        DatasetError
            If another conversion holds it.
        """
        if self._lock is not None:
            return
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.work / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            what = f"a folder that cannot be written ({error.strerror})"
            raise DatasetError(self.folder, "--out", what, "a folder that can be written") from None
        end = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(self._lock, (fcntl.LOCK_SH if together else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() < end:
                    time.sleep(0.2)
                    continue
                holder = os.read(self._lock, 200).decode(errors="replace").strip() or "another process"
                self.close()
                raise DatasetError(
                    self.folder,
                    "--out",
                    f"a folder that {holder} is writing to",
                    "one conversion at a time",
                    "Wait for it, or give another --out",
                ) from None
            except OSError as error:  # some network file systems are mounted without locks
                what = f"{self.folder} cannot be locked ({error.strerror})"
                print(f"{what}: start no second conversion there", file=sys.stderr)
                return
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, (who or f"process {os.getpid()} on {socket.gethostname()}").encode(), 0)

    def close(self) -> None:
        """Let other conversions into the folder again."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __getstate__(self) -> dict[str, Any]:
        """A conversion that was begun goes to other processes by pickle; the lock stays with the one that holds it."""
        return {**self.__dict__, "_lock": None}

    def _same_configuration(self, found: str, before: dict[str, Any] | None = None) -> None:
        if found != self.hash:
            if before and (differing := _first_difference(self.configuration, before)):
                name, mine, theirs = differing
                hint = "Use the settings it was made with (manifest.json), or another --out"
                expected = f"{theirs}, as for the sessions already there"
                if theirs is None:
                    expected = "no such setting: an earlier version made the sessions already there"
                    hint = "Convert into another --out"
                field = f"configuration.{name.removeprefix('settings.')}"
                raise DatasetError(self.folder, field, mine, expected, hint)
            raise DatasetError(
                self.folder,
                "configuration",
                f"hash {self.hash[:12]}",
                f"{found[:12]}, that of the sessions already there",
                "Use the settings it was made with (manifest.json), or another --out",
            )

    def find(self) -> list[RunSource]:
        """List the runs of all cohorts and assign everybody to a split; reads no image."""
        split = self.settings.split
        needed = {column for column in (split.stratify, split.family, split.column) if column}
        self.found = [find_cohort(path, needed) for path in self.cohorts]
        names = [cohort.settings.name for cohort in self.found]
        for number, name in enumerate(names):
            if name in names[:number]:
                raise ConfigError(self.cohorts[number], "name", f"{name} a second time", "one cohort per name")
        if self.previous is not None:
            lost = set(self.previous.manifest["cohorts"]) - set(names)
            if lost:
                raise DatasetError(
                    self.folder,
                    "cohorts",
                    f"only {', '.join(sorted(names))}",
                    f"also {', '.join(sorted(lost))}, which the dataset holds",
                    "Name all cohort files, or another --out",
                )
        runs = _once_each([run for cohort in self.found for run in cohort.runs])
        self.splits, torn = assign(runs, self.settings.split, read_table(self.folder))
        runs = [replace(run, problem=run.problem or torn.get(run.person)) for run in runs]
        self.runs = sorted(runs, key=lambda run: run.key)
        return self.runs

    def extractor_runs(self) -> list[RunSource]:
        """The training-split runs the extractor learns from; runs that are known to be refused are passed over."""
        train = [run for run in self.runs if self.splits.get(run.person) == "train" and not self._refusal(run)]
        return self.settings.extractor.draw(train, lambda run: run.key)

    def harmonise(self, runs: Iterable[RunSource]) -> None:
        """Harmonise runs and keep the results under `work/harmonised/` until they are ranked."""
        todo = [run for run in runs if not self._settled(run) and not is_harmonised(self.folder, run)]
        self._map("harmonise", todo, None)

    def parcel_series(self, runs: Iterable[RunSource]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(roi_RT, centre_R3) of the harmonised runs among `runs`; refused runs are left out."""
        series = []
        for run in runs:
            if is_harmonised(self.folder, run):
                with np.load(harmonised_path(self.folder, run)) as arrays:
                    series.append((arrays["roi"], arrays["roi_centre"]))
            elif self._done(run):
                arrays = self._done_arrays(run, ("roi", "roi_centre"))
                series.append((arrays["roi"], arrays["roi_centre"]))
        return series

    def unsettled(self) -> list[RunSource]:
        """The runs that are neither ranked nor refused yet."""
        return [run for run in self.runs if not self._settled(run)]

    def rank(self, ranker: WindowRanker, runs: Iterable[RunSource]) -> None:
        """Rank runs and write their members, harmonising them first where that was not done."""
        self._map("rank", [run for run in runs if not self._settled(run)], ranker)

    def pack(self, identity: dict[str, Any]) -> dict[str, Any] | None:
        """Write the dataset from the finished sessions; does nothing if it is there already.

        Returns
        -------
        dict or None
            The manifest; None if every run was refused: there is nothing to pack.
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
            if refused := self._refusal(run):
                failed.append(refused)
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
            sessions.append({**meta, "split": self.splits[run.person]})
        failed.sort(key=lambda line: line["key"])
        self.refused_before = {line["key"]: line for line in failed}
        if not sessions:
            if self.previous is not None:
                hint = "The dataset is left as it was; see the cohort files"
                raise DatasetError(self.folder, "", "no run that can be converted any more", "at least one", hint)
            return None
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
        (self.folder / layout.REPORT / layout.PAGE).unlink(missing_ok=True)  # it shows the dataset as it was
        with progress("pack", len(sessions), "sessions") as advance, self._room("the shards"):
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
        """Lines of the refused runs."""
        return [line for run in self.runs if (line := self._refusal(run))]

    def write_refused(self) -> None:
        """Write `failed.jsonl` where nothing else can be written."""
        files.write_atomically(self.folder / layout.FAILED, files.dump_lines(self.refused()))

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
        meta = files.dump({name: value for name, value in session.items() if name not in inner}).encode()
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
                return sample.unpack(file, str(data_path), names)
        assert self.previous is not None
        return self.previous.read(self.before[run.key], names)

    def _refusal_path(self, run: RunSource) -> Path:
        return self.work / "failed" / f"{run.key}.json"

    def _refusal(self, run: RunSource) -> dict[str, Any] | None:
        """The line of a run that was refused, in this conversion or an earlier one, and has not changed since."""
        lines = layout.read_lines(self._refusal_path(run))
        lines += [self.refused_before[run.key]] if run.key in self.refused_before else []
        current = bool(lines) and lines[0]["fingerprint"] == fingerprint(run) and not self._done(run)
        return lines[0] if current else None

    def _settled(self, run: RunSource) -> bool:
        """Whether there is nothing left to do for a run."""
        return self._done(run) or self._refusal(run) is not None

    def _done(self, run: RunSource) -> bool:
        """Whether a run's members are written, here or in the dataset, from the source as it is now."""
        meta_path, data_path = writer.member_paths(self.folder, run.key)
        lines = layout.read_lines(meta_path) if meta_path.exists() and data_path.exists() else []
        lines += [self.before[run.key]] if run.key in self.before else []
        return bool(lines) and lines[0]["fingerprint"] == fingerprint(run)

    @contextmanager
    def _room(self, what: str) -> Iterator[None]:
        """A full disk, or an exhausted quota, stops the conversion; nothing that was finished is lost."""
        try:
            yield
        except OSError as error:
            if not is_full(error):
                raise
            raise Stopped(
                f"no space left in {self.folder} for {what}", "make room, then the same command continues from there"
            ) from None

    def _map(self, step: str, runs: list[RunSource], ranker: WindowRanker | None) -> None:
        """Run `convert` over runs in worker processes; a refused run is written down and the rest goes on."""
        if not runs:
            return
        if (why := why_no_workers()) is not None:
            raise ConfigError("/dev/shm", "", why, "shared memory", "In a container: docker run --shm-size=1g")
        context = multiprocessing.get_context("spawn")
        # One thread per process: the processes are the parallelism, and sums come out the same at any worker count.
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        threads = {name: os.environ.get(name) for name in names}
        os.environ.update(dict.fromkeys(threads, "1"))
        try:
            with (
                progress(step, len(runs), "runs") as advance,
                ProcessPoolExecutor(min(self.workers, len(runs)), context, end_with_parent) as pool,
            ):
                queue = list(reversed(runs))
                pending: dict[Future, RunSource] = {}
                while queue or pending:
                    while queue and len(pending) < 2 * self.workers:
                        run = queue.pop()
                        pending[pool.submit(convert, run, self.settings, self.folder, self.parcels, ranker)] = run
                    finished, _ = wait(pending, return_when=FIRST_COMPLETED)
                    for future in finished:
                        run = pending.pop(future)
                        with self._room(run.key):
                            refused = future.result()
                            if refused is None:
                                self._refusal_path(run).unlink(missing_ok=True)
                            else:
                                files.write_atomically(self._refusal_path(run), files.dump(refused) + "\n")
                        advance(1, run.key if refused is None else f"{run.key} refused: {refused['reason']}")
        except BrokenProcessPool:
            raise Stopped(
                f"a worker process died during {step}, perhaps because memory ran out",
                "the same command continues from there, with fewer --workers if need be",
            ) from None
        finally:
            for name, value in threads.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def _first_difference(mine: Any, theirs: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """The first setting in which two configurations differ: its dotted name, and both values (None: not there)."""
    if not (isinstance(mine, dict) and isinstance(theirs, dict)):
        return None if mine == theirs else (name, mine, theirs)
    for key in [*mine, *(key for key in theirs if key not in mine)]:
        found = _first_difference(mine.get(key), theirs.get(key), f"{name}.{key}".lstrip("."))
        if found:
            return found
    return None


def _once_each(runs: list[RunSource]) -> list[RunSource]:
    """The runs, of which one whose file another run has already (a link perhaps) is refused."""
    seen: dict[Path, RunSource] = {}
    result = []
    for run in runs:
        first = seen.setdefault(run.bold.resolve(), run)
        if first is not run and run.problem is None:
            hint = "List every file once; cohorts of the same people share a name in `people`"
            run = replace(
                run, problem=RunRefused(run.source, "key", f"the file of {first.key} again", "a file of its own", hint)
            )
        result.append(run)
    return result
