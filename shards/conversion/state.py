"""The state of a conversion: scans that are in the dataset, and results under `work/` that are not packed yet.

    DATASET/work/harmonised/KEY.npz               a harmonised scan, not ranked yet
    DATASET/work/members/KEY.json, KEY.zarr.zip   a ranked scan, not packed yet
    DATASET/work/failed/KEY.json                  why a scan was refused

A result is only used as long as its scan is unchanged: it holds the fingerprint of the files from which it was made.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from shards.cohorts.scan import RunSource
from shards.conversion import writer
from shards.conversion.session import fingerprint, harmonised_path, is_harmonised
from shards.core import files
from shards.core.errors import DatasetError
from shards.core.settings import check
from shards.format import layout, sample
from shards.format.reader import Dataset
from shards.format.refusal import Refusal, read_refusals
from shards.format.session_record import ScanRecord, SessionRecord


class State:
    """The state of the scans in the folder of a dataset.

    Parameters
    ----------
    folder : Path
        Folder of the dataset.

    Attributes
    ----------
    dataset : Dataset or None
        The dataset as it was last packed.
    sessions : dict of str to SessionRecord
        Its sessions by key.
    refused : dict of str to Refusal
        Its refused scans by key.
    """

    def __init__(self, folder: Path):
        self.folder, self.work = folder, folder / layout.WORK
        self.dataset: Dataset | None = None
        self.sessions: dict[str, SessionRecord] = {}
        self.refused: dict[str, Refusal] = {}

    def read(self, retry: bool) -> None:
        """Read the existing dataset, if there is one; with `retry`, ignore which scans it refused."""
        if (self.folder / layout.MANIFEST).exists():
            self.dataset = Dataset(self.folder)
            self.sessions = {session.key: session for session in self.dataset.sessions}
        self.refused = {} if retry else {line.key: line for line in read_refusals(self.folder / layout.FAILED)}

    def prepare(self, retry: bool) -> None:
        """Remove incomplete files of killed processes and, with `retry`, the refusals of scans."""
        for left_over in self.work.rglob(".*.tmp"):
            left_over.unlink()
        if retry:
            self.refused = {}
            shutil.rmtree(self.work / "failed", ignore_errors=True)

    def is_settled(self, run: RunSource) -> bool:
        """Whether a scan is ranked or refused, so that nothing is left to do."""
        return self.is_done(run) or self.refusal(run) is not None

    def is_done(self, run: RunSource) -> bool:
        """Whether a scan is ranked from its present files, in `work/` or in the dataset."""
        _, data_path = writer.member_paths(self.folder, run.key)
        scan = (self._ranked(run) if data_path.exists() else None) or self.sessions.get(run.key)
        return scan is not None and scan.fingerprint == fingerprint(run)

    def record(self, run: RunSource) -> ScanRecord:
        """The record of a ranked scan."""
        return self._ranked(run) or self.sessions[run.key]

    def refusal(self, run: RunSource) -> Refusal | None:
        """Why a scan was refused, now or in an earlier conversion, if it has not changed since."""
        here = read_refusals(self._refusal_path(run))
        found = here[0] if here else self.refused.get(run.key)
        current = found is not None and found.fingerprint == fingerprint(run) and not self.is_done(run)
        return found if current else None

    def settle(self, run: RunSource, found: ScanRecord | Refusal) -> None:
        """Record that a scan was refused, or is no longer refused."""
        path = self._refusal_path(run)
        if isinstance(found, Refusal):
            files.write_atomically(path, files.dump(found.tree()) + "\n")
        else:
            path.unlink(missing_ok=True)

    def parcel_series(self, run: RunSource) -> tuple[np.ndarray, np.ndarray] | None:
        """Parcel time series (R, T) of a scan and the parcels' centres (R, 3), mm; None if it is not harmonised."""
        if is_harmonised(self.folder, run):
            with np.load(harmonised_path(self.folder, run)) as arrays:
                return arrays["roi"], arrays["roi_centre"]
        if self.is_done(run):
            arrays = self._arrays(run, ("roi", "roi_centre"))
            return arrays["roi"], arrays["roi_centre"]
        return None

    def members(self, scan: ScanRecord) -> tuple[bytes, bytes]:
        """Bytes of the two members of a sample, from `work/` or from the existing dataset."""
        meta = files.dump(scan.member()).encode()
        _, data_path = writer.member_paths(self.folder, scan.key)
        if data_path.exists():
            return meta, data_path.read_bytes()
        session = self.sessions[scan.key]
        with open(self.folder / layout.SHARDS / session.shard, "rb") as file:
            file.seek(session.zarr_offset)
            return meta, file.read(session.zarr_size)

    def is_packed(self, sessions: Sequence[ScanRecord], refused: Sequence[Refusal]) -> bool:
        """Whether the existing dataset has exactly these sessions and refused scans."""

        def of(scans: Sequence[ScanRecord]) -> list[tuple[str, str, str]]:
            return sorted((scan.key, scan.fingerprint, scan.split) for scan in scans)

        def of_refused(lines: Sequence[Refusal]) -> list[tuple[str, str]]:
            return sorted((line.key, line.fingerprint) for line in lines)

        if self.dataset is None:
            return False
        there = read_refusals(self.folder / layout.FAILED)
        return of(sessions) == of(self.dataset.sessions) and of_refused(refused) == of_refused(there)

    def clear(self) -> None:
        """Remove the results that are now in the dataset."""
        for name in ("members", "harmonised", "failed"):
            shutil.rmtree(self.work / name, ignore_errors=True)

    def _arrays(self, run: RunSource, names: tuple[str, ...]) -> dict[str, np.ndarray]:
        _, data_path = writer.member_paths(self.folder, run.key)
        if data_path.exists():
            with open(data_path, "rb") as file:
                return sample.unpack(file, str(data_path), names)
        assert self.dataset is not None
        return self.dataset.read(self.sessions[run.key], names)

    def _refusal_path(self, run: RunSource) -> Path:
        return self.work / "failed" / f"{run.key}.json"

    def _ranked(self, run: RunSource) -> ScanRecord | None:
        """The record of a ranked scan that is not packed yet."""
        path, _ = writer.member_paths(self.folder, run.key)
        lines = layout.read_lines(path)
        return check(ScanRecord, lines[0], path, DatasetError) if lines else None
