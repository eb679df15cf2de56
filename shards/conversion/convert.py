"""Convert cohorts to a dataset: find, harmonise, rank and pack scans.

Each step writes its results under `DATASET/work/` (`shards/conversion/state.py`), so a stopped conversion continues
where it stopped. A session with unchanged source and configuration is not read again, and a refused scan is not tried
again until it changes. Only one conversion at a time can hold the lock of the folder (`shards/conversion/lock.py`), but
it may use many processes on several machines.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from shards.cohorts.cohort_file import Cohort, find_cohort
from shards.cohorts.scan import RunSource
from shards.conversion import writer
from shards.conversion.lock import FolderLock
from shards.conversion.pool import convert_all
from shards.conversion.session import Parcels, WindowRanker, is_harmonised
from shards.conversion.settings import ConvertSettings
from shards.conversion.splits import Person, assign, read_table, write_table
from shards.conversion.state import State
from shards.core import files
from shards.core.errors import ConfigError, DatasetError, RunRefused
from shards.core.progress import progress
from shards.core.room import stop_if_full
from shards.core.settings import digest
from shards.format import layout
from shards.format.manifest import DataRecord, GridRecord, Manifest, WindowsRecord
from shards.format.refusal import Refusal
from shards.format.session_record import ScanRecord
from shards.preprocessing.harmonise import NORMALISATION

_SAME_SETTINGS = "Use the settings it was made with (manifest.json), or another --out"


class Conversion:
    """The conversion of cohorts to a dataset.

    Parameters
    ----------
    cohorts : sequence of paths
        All cohort files of the dataset.
    folder : Path
        Folder of the dataset.
    settings : ConvertSettings
    ranking : dict
        The ranker (name, checksum of a given extractor), as a part of the configuration.
    parcels : callable
        Picklable function `parcels(brain_XYZ) -> labels_XYZ` for `settings.parcels`.
    workers : int
        Number of worker processes.
    retry : bool
        Whether to try unchanged scans again that were refused.

    Attributes
    ----------
    state : State
        The scans that are done.
    found : list of Cohort
        The cohorts; set by `find`.
    runs : list of RunSource
        Their scans, sorted by key; set by `find`.
    splits : dict of Person to str
        The split of each subject; set by `find`.

    Raises
    ------
    DatasetError
        If `folder` holds a dataset with another configuration or with other cohorts, or another conversion holds its
        lock.
    """

    def __init__(
        self,
        cohorts: Sequence[Path],
        folder: Path,
        settings: ConvertSettings,
        ranking: dict[str, object],
        parcels: Parcels,
        workers: int,
        retry: bool = False,
    ):
        self.cohorts, self.folder, self.settings = [Path(c) for c in cohorts], Path(folder), settings
        self.parcels, self.workers, self.retry = parcels, workers, retry
        self.configuration = {"settings": settings.model_dump(mode="json"), "ranking": ranking}
        self.hash = digest(self.configuration)
        self.lock, self.state = FolderLock(self.folder), State(self.folder)
        self.found: list[Cohort] = []
        self.runs: list[RunSource] = []
        self.splits: dict[Person, str] = {}

    def open(self) -> None:
        """Finish the commit of a killed conversion, and check that the configuration is the same."""
        if not self.folder.exists():
            return
        if not self.folder.is_dir():
            raise DatasetError(self.folder, "--out", "a file", "a folder")
        work = self.folder / layout.WORK
        if any(self.folder.iterdir()) and not work.exists() and not (self.folder / layout.MANIFEST).exists():
            raise DatasetError(self.folder, "--out", "a folder with other files", "a new folder or a dataset")
        self.lock.acquire()
        self.resume(alone=True)
        if self._stamp.exists():
            self._same_configuration(self._stamp.read_text(encoding="utf-8").strip())

    def resume(self, alone: bool) -> None:
        """Read the results of an earlier conversion in the folder. The lock must be held.

        Parameters
        ----------
        alone : bool
            Whether no other process uses the folder, so that incomplete results of a killed process can be removed.
        """
        if alone:
            writer.finish_commit(self.folder)
        self.state.read(self.retry)
        if self.state.dataset is not None:
            manifest = self.state.dataset.manifest
            self._same_configuration(manifest.configuration_hash, manifest.configuration)

    def begin(self) -> None:
        """Make the folder, and write the configuration and the splits; call `open` and `find` before."""
        try:
            self.lock.acquire()
            self.state.prepare(self.retry)
            if not self._stamp.exists():
                files.write_atomically(self._stamp, self.hash)
            if read_table(self.folder) != self.splits:
                write_table(self.folder, self.splits)
        except OSError as error:
            raise DatasetError(self.folder, "--out", error.strerror, "a folder that can be written") from None

    def close(self) -> None:
        """Release the lock of the folder."""
        self.lock.close()

    @property
    def _stamp(self) -> Path:
        """The file with the configuration of the results under `work/`."""
        return self.folder / layout.WORK / "configuration"

    def _same_configuration(self, found: str, before: dict[str, object] | None = None) -> None:
        if found == self.hash:
            return
        if before and (differing := _first_difference(self.configuration, before)):
            name, mine, theirs = differing
            hint, expected = _SAME_SETTINGS, f"{theirs}, as for the existing sessions"
            if theirs is None:
                expected = "no such setting: an earlier version made the existing sessions"
                hint = "Convert into another --out"
            field = f"configuration.{name.removeprefix('settings.')}"
            raise DatasetError(self.folder, field, mine, expected, hint)
        expected = f"{found[:12]}, as for the existing sessions"
        raise DatasetError(self.folder, "configuration", f"hash {self.hash[:12]}", expected, _SAME_SETTINGS)

    def find(self) -> list[RunSource]:
        """List the scans of all cohorts and assign subjects to splits, without reading images."""
        split = self.settings.split
        needed = {column for column in (split.stratify, split.family, split.column) if column}
        self.found = [find_cohort(path, needed) for path in self.cohorts]
        names = [cohort.settings.name for cohort in self.found]
        for number, name in enumerate(names):
            if name in names[:number]:
                raise ConfigError(self.cohorts[number], "name", f"{name} a second time", "one cohort per name")
        if self.state.dataset is not None:
            lost = set(self.state.dataset.manifest.cohorts) - set(names)
            if lost:
                raise DatasetError(
                    self.folder,
                    "cohorts",
                    f"only {', '.join(sorted(names))}",
                    f"also {', '.join(sorted(lost))}, which is in the dataset",
                    "Give all cohort files, or another --out",
                )
        runs = _once_each([run for cohort in self.found for run in cohort.runs])
        self.splits, torn = assign(runs, self.settings.split, read_table(self.folder))
        runs = [replace(run, problem=run.problem or torn.get(run.person)) for run in runs]
        self.runs = sorted(runs, key=lambda run: run.key)
        return self.runs

    def extractor_runs(self) -> list[RunSource]:
        """The training scans of the extractor, without scans that were refused."""
        train = [run for run in self.runs if self.splits.get(run.person) == "train" and not self.state.refusal(run)]
        return self.settings.extractor.draw(train, lambda run: run.key)

    def harmonise(self, runs: Iterable[RunSource]) -> None:
        """Harmonise scans, and keep the results in `work/harmonised/` until they are ranked."""
        self._convert([run for run in runs if not is_harmonised(self.folder, run)], None)

    def parcel_series(self, runs: Iterable[RunSource]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(roi_RT, centre_R3) of the harmonised scans in `runs`, without refused scans."""
        return [series for run in runs if (series := self.state.parcel_series(run)) is not None]

    def unsettled(self) -> list[RunSource]:
        """The scans that are neither ranked nor refused yet."""
        return [run for run in self.runs if not self.state.is_settled(run)]

    def refused(self) -> list[Refusal]:
        """The refusals of all refused scans."""
        return [line for run in self.runs if (line := self.state.refusal(run))]

    def write_refused(self) -> None:
        """Write `failed.jsonl` if all scans were refused."""
        files.write_atomically(self.folder / layout.FAILED, files.dump_lines(line.tree() for line in self.refused()))

    def rank(self, ranker: WindowRanker, runs: Iterable[RunSource]) -> None:
        """Rank scans and write their members; scans that are not harmonised yet are harmonised first."""
        self._convert(runs, ranker)

    def _convert(self, runs: Iterable[RunSource], ranker: WindowRanker | None) -> None:
        """Convert scans in worker processes. A refused scan is recorded, and the others continue."""
        todo = [run for run in runs if not self.state.is_settled(run)]
        if not todo:
            return
        found = convert_all(todo, self.settings, self.folder, self.parcels, ranker, self.workers)
        with progress("rank" if ranker else "harmonise", len(todo), "runs") as advance, closing(found):
            for run, result in found:
                with stop_if_full(self.folder, run.key):
                    self.state.settle(run, result)
                advance(1, f"{run.key} refused: {result.reason}" if isinstance(result, Refusal) else run.key)

    def pack(self, identity: dict[str, object]) -> Manifest | None:
        """Write the dataset from the finished sessions, unless it is up to date.

        Parameters
        ----------
        identity : dict
            What the scores depend on, from `WindowRanker.identity`.

        Returns
        -------
        Manifest or None
            None if all scans were refused.
        """
        before = self.state.dataset
        if before is not None and before.manifest.ranker != identity:
            raise DatasetError(
                self.folder,
                "ranker",
                "another extractor than the one that ranked the existing sessions",
                "the extractor of the existing sessions",
                "Restore that extractor, or give another --out",
            )
        sessions, refused = self._finished()
        self.state.refused = {line.key: line for line in refused}
        if not sessions:
            if before is not None:
                hint = "The dataset was not changed; check the cohort files"
                raise DatasetError(self.folder, "", "no scan that can still be converted", "at least one", hint)
            return None
        if before is not None and self.state.is_packed(sessions, refused):
            self.state.clear()
            return before.manifest
        (self.folder / layout.REPORT / layout.PAGE).unlink(missing_ok=True)  # it describes the former dataset
        size = int(self.settings.shards.mb * 1e6)
        with progress("pack", len(sessions), "sessions") as advance, stop_if_full(self.folder, "the shards"):
            data = self._data(identity)
            manifest = writer.pack(self.folder, sessions, refused, data, size, self.state.members, advance)
        self.state.clear()
        return manifest

    def _finished(self) -> tuple[list[ScanRecord], list[Refusal]]:
        """All ranked scans, with their splits, and all refused scans."""
        sessions: list[ScanRecord] = []
        refused: list[Refusal] = []
        for run in self.runs:
            if refusal := self.state.refusal(run):
                refused.append(refusal)
            elif self.state.is_done(run):
                sessions.append(self.state.record(run).model_copy(update={"split": self.splits[run.person]}))
            else:
                got, expected = f"{run.key} neither ranked nor refused", "all scans ranked before packing"
                raise DatasetError(self.folder, "--only", got, expected, "Run it without --only")
        return sessions, sorted(refused, key=lambda line: line.key)

    def _data(self, identity: dict[str, object]) -> DataRecord:
        """The manifest, without shards and counts."""
        settings = self.settings
        return DataRecord(
            format=layout.FORMAT,
            configuration=self.configuration,
            configuration_hash=self.hash,
            grid=GridRecord.of(settings.grid.grid()),
            tr=settings.grid.tr,
            tr_range=list(settings.grid.tr_range),
            normalisation=NORMALISATION,
            windows=WindowsRecord.model_validate(settings.windows.model_dump()),
            ranker=identity,
            split=settings.split.model_dump(mode="json"),
            cohorts=sorted({run.cohort for run in self.runs}),
            sessions={},
        )


def _first_difference(mine: Any, theirs: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """The first setting that differs between two configurations: its dotted name, and both values (None if absent)."""
    if not (isinstance(mine, dict) and isinstance(theirs, dict)):
        return None if mine == theirs else (name, mine, theirs)
    for key in [*mine, *(key for key in theirs if key not in mine)]:
        found = _first_difference(mine.get(key), theirs.get(key), f"{name}.{key}".lstrip("."))
        if found:
            return found
    return None


def _once_each(runs: list[RunSource]) -> list[RunSource]:
    """Refuse scans with the same file as another scan, for example through a link."""
    seen: dict[Path, RunSource] = {}
    result = []
    for run in runs:
        first = seen.setdefault(run.bold.resolve(), run)
        if first is not run and run.problem is None:
            hint = "List every file once. Cohorts of the same subjects can share a name in `people`"
            run = replace(
                run, problem=RunRefused(run.source, "key", f"the same file as {first.key}", "a different file", hint)
            )
        result.append(run)
    return result
