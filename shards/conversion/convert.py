"""Cohorts in, a dataset out: find, harmonise, rank, pack.

Each step leaves its results under `DATASET/work/` (`shards/conversion/state.py`), so a conversion that was stopped
continues where it stopped. A session whose source and configuration are unchanged is not read again, and a scan that
was refused is not tried again before it changes. One conversion at a time holds the folder
(`shards/conversion/lock.py`); its processes may be many, on as many machines.
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
from shards.core.cli import progress
from shards.core.errors import ConfigError, DatasetError, RunRefused
from shards.core.room import stop_if_full
from shards.core.settings import digest
from shards.format import layout
from shards.format.manifest import DataRecord, GridRecord, Manifest, WindowsRecord
from shards.format.refusal import Refusal
from shards.format.session_record import ScanRecord

_SAME_SETTINGS = "Use the settings it was made with (manifest.json), or another --out"


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
        Try scans again that were refused and have not changed.

    Attributes
    ----------
    state : State
        Which scans are done.
    found : list of Cohort
        The cohorts, after `find`.
    runs : list of RunSource
        Their scans in the order of their keys, after `find`.
    splits : dict of Person to str
        The split of each person, after `find`.

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
        """Finish what a killed conversion left half done, and refuse to mix two configurations; writes nothing new."""
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
        """Read what the folder holds of an earlier conversion. The lock must be held.

        Parameters
        ----------
        alone : bool
            No other process holds the folder: finish what a killed one left half done.
        """
        if alone:
            writer.finish_commit(self.folder)
        self.state.read(self.retry)
        if self.state.dataset is not None:
            manifest = self.state.dataset.manifest
            self._same_configuration(manifest.configuration_hash, manifest.configuration)

    def begin(self) -> None:
        """Make the folder, and write down its configuration and who is in which split; `open` and `find` come first."""
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
        """Let other conversions into the folder again."""
        self.lock.close()

    @property
    def _stamp(self) -> Path:
        """Of which configuration the results under `work/` are."""
        return self.folder / layout.WORK / "configuration"

    def _same_configuration(self, found: str, before: dict[str, object] | None = None) -> None:
        if found == self.hash:
            return
        if before and (differing := _first_difference(self.configuration, before)):
            name, mine, theirs = differing
            hint, expected = _SAME_SETTINGS, f"{theirs}, as for the sessions already there"
            if theirs is None:
                expected = "no such setting: an earlier version made the sessions already there"
                hint = "Convert into another --out"
            field = f"configuration.{name.removeprefix('settings.')}"
            raise DatasetError(self.folder, field, mine, expected, hint)
        expected = f"{found[:12]}, that of the sessions already there"
        raise DatasetError(self.folder, "configuration", f"hash {self.hash[:12]}", expected, _SAME_SETTINGS)

    def find(self) -> list[RunSource]:
        """List the scans of all cohorts and assign everybody to a split; reads no image."""
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
                    f"also {', '.join(sorted(lost))}, which the dataset holds",
                    "Name all cohort files, or another --out",
                )
        runs = _once_each([run for cohort in self.found for run in cohort.runs])
        self.splits, torn = assign(runs, self.settings.split, read_table(self.folder))
        runs = [replace(run, problem=run.problem or torn.get(run.person)) for run in runs]
        self.runs = sorted(runs, key=lambda run: run.key)
        return self.runs

    def extractor_runs(self) -> list[RunSource]:
        """The training-split scans the extractor is trained on; scans that are known to be refused are left out."""
        train = [run for run in self.runs if self.splits.get(run.person) == "train" and not self.state.refusal(run)]
        return self.settings.extractor.draw(train, lambda run: run.key)

    def harmonise(self, runs: Iterable[RunSource]) -> None:
        """Harmonise scans and keep the results under `work/harmonised/` until they are ranked."""
        self._convert([run for run in runs if not is_harmonised(self.folder, run)], None)

    def parcel_series(self, runs: Iterable[RunSource]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(roi_RT, centre_R3) of the harmonised scans among `runs`; refused scans are left out."""
        return [series for run in runs if (series := self.state.parcel_series(run)) is not None]

    def unsettled(self) -> list[RunSource]:
        """The scans that are neither ranked nor refused yet."""
        return [run for run in self.runs if not self.state.is_settled(run)]

    def refused(self) -> list[Refusal]:
        """Why scans were refused, of those that were."""
        return [line for run in self.runs if (line := self.state.refusal(run))]

    def write_refused(self) -> None:
        """Write `failed.jsonl` of a conversion in which every scan was refused."""
        files.write_atomically(self.folder / layout.FAILED, files.dump_lines(line.tree() for line in self.refused()))

    def rank(self, ranker: WindowRanker, runs: Iterable[RunSource]) -> None:
        """Rank scans and write their members, harmonising them first where that was not done."""
        self._convert(runs, ranker)

    def _convert(self, runs: Iterable[RunSource], ranker: WindowRanker | None) -> None:
        """Convert scans in worker processes; a refused scan is written down, and the others continue."""
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
        """Write the dataset from the finished sessions; does nothing if it is there already.

        Parameters
        ----------
        identity : dict
            What the ranker's scores depend on, as `WindowRanker.identity`.

        Returns
        -------
        Manifest or None
            None if every scan was refused: there is nothing to pack.
        """
        before = self.state.dataset
        if before is not None and before.manifest.ranker != identity:
            raise DatasetError(
                self.folder,
                "ranker",
                "another extractor than the one its sessions were ranked with",
                "the extractor of the sessions already there",
                "Restore it, or give another --out",
            )
        sessions, refused = self._finished()
        self.state.refused = {line.key: line for line in refused}
        if not sessions:
            if before is not None:
                hint = "The dataset is left as it was; see the cohort files"
                raise DatasetError(self.folder, "", "no run that can be converted any more", "at least one", hint)
            return None
        if before is not None and self.state.is_packed(sessions, refused):
            self.state.clear()
            return before.manifest
        (self.folder / layout.REPORT / layout.PAGE).unlink(missing_ok=True)  # it shows the dataset as it was
        size = int(self.settings.shards.mb * 1e6)
        with progress("pack", len(sessions), "sessions") as advance, stop_if_full(self.folder, "the shards"):
            data = self._data(identity)
            manifest = writer.pack(self.folder, sessions, refused, data, size, self.state.members, advance)
        self.state.clear()
        return manifest

    def _finished(self) -> tuple[list[ScanRecord], list[Refusal]]:
        """All scans: those that are ranked, with their splits, and those that were refused."""
        sessions: list[ScanRecord] = []
        refused: list[Refusal] = []
        for run in self.runs:
            if refusal := self.state.refusal(run):
                refused.append(refusal)
            elif self.state.is_done(run):
                sessions.append(self.state.record(run).model_copy(update={"split": self.splits[run.person]}))
            else:
                got, expected = f"{run.key} neither ranked nor refused", "all runs ranked before they are packed"
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
            normalisation="global z inside the mask; baseline = voxel mean, windows = fluctuation around it",
            windows=WindowsRecord.model_validate(settings.windows.model_dump()),
            ranker=identity,
            split=settings.split.model_dump(mode="json"),
            cohorts=sorted({run.cohort for run in self.runs}),
            sessions={},
        )


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
