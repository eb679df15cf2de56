"""The records of a scan and of its session in a dataset: `KEY.json` and a line of `sessions.jsonl`.

A dataset of an earlier version may lack newer fields; they are then None or empty.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, StrictStr
from upath import UPath

from shards.core.errors import DatasetError
from shards.core.settings import check, shown
from shards.format import layout
from shards.format.manifest import Manifest
from shards.format.record import Length, Number, Record, Size

Label = str | int | float | bool | None
Labels = dict[str, Label]  # by column of the participants table
Key = Annotated[StrictStr, Field(max_length=255, pattern=r"^[A-Za-z0-9_+-][A-Za-z0-9._+-]*$")]  # used in file names


class ScanFacts(Record):
    """Facts found in the files of a scan.

    Attributes
    ----------
    tr, source_tr : float
        TR after harmonising, and TR of the scan, in s.
    tr_source : str
        Source of the TR: the cohort file, a sidecar, or the header.
    space, space_assumed : str
        Space of the scan, and what was assumed about it.
    orientation_assumed, forms_disagree : str
        Axis codes that were assumed without orientation in the header; axis codes of sform and qform that disagree.
    centred_by_mm : list of float
        Shift of a scan in native space.
    mask_source, mask_rule : str
        Source of the brain mask, and how it was thresholded.
    mask_outside_grid, mask_outside_scan, dead_share : float
        Shares of the mask outside the grid, outside the scan, and without signal.
    mni_dice : float
        Dice overlap with the MNI152 brain.
    repeated_frames, dropped_frames, dvars_outliers : int
        Numbers of volumes that are copies of an earlier one, were dropped at the start, or have an outlying DVARS.
    mean_fd_mm, tsnr, brain_ml, global_mean, global_sd : float
        Quality measures.
    cleaned : str
        What was regressed out or filtered.
    """

    tr: Length
    source_tr: Length | None = None
    tr_source: StrictStr | None = None
    space: StrictStr | None = None
    space_assumed: StrictStr | None = None
    orientation_assumed: StrictStr | None = None
    forms_disagree: StrictStr | None = None
    centred_by_mm: list[Number] | None = None
    mask_source: StrictStr | None = None
    mask_rule: StrictStr | None = None
    mask_outside_grid: Number | None = None
    mask_outside_scan: Number | None = None
    dead_share: Number | None = None
    mni_dice: Number | None = None
    repeated_frames: Size | None = None
    dropped_frames: Size | None = None
    dvars_outliers: Size | None = None
    mean_fd_mm: Number | None = None
    tsnr: Number | None = None
    brain_ml: Number | None = None
    global_mean: Number | None = None
    global_sd: Number | None = None
    cleaned: StrictStr | None = None


class ScanRecord(ScanFacts):
    """A converted scan, as in its `KEY.json`.

    `n_kept` and `zarr_size` are set when it is ranked, `fingerprint` when it is written, `split` when it is packed.
    """

    key: Key
    cohort: StrictStr
    subject: StrictStr
    labels: Labels
    people: StrictStr = ""  # name of the population of the subject
    session: StrictStr = ""
    run: StrictStr = ""
    variant: StrictStr = ""
    task: StrictStr = ""
    source: StrictStr
    source_tr: Length
    frames: Size
    n_windows: Size
    n_patches: Size
    n_parcels: Size | None = None
    n_kept: Size = 0
    zarr_size: Size = 0
    fingerprint: StrictStr = ""
    split: StrictStr = ""

    @property
    def person(self) -> tuple[str, str]:
        """The subject: equal for the same subject in cohorts with the same `people`."""
        return self.people or self.cohort, self.subject

    def fact(self, name: str) -> Any:
        """A label of the subject or, if there is none, a fact of the session; None if there is neither."""
        if name in self.labels:
            return self.labels[name]
        if name in type(self).model_fields:
            return getattr(self, name)
        return (self.model_extra or {}).get(name)

    def member(self) -> dict[str, object]:
        """The content of `KEY.json`, without the position of the members."""
        return {name: value for name, value in self.tree().items() if name not in _LOCATION}


class SessionRecord(ScanRecord):
    """A session of a dataset, a line of `sessions.jsonl`: the scan, and the position of its members in the shards."""

    n_kept: Size
    zarr_size: Size
    split: StrictStr
    shard: StrictStr
    zarr_offset: Size
    json_offset: Size | None = None
    json_size: Size | None = None


_LOCATION = ("shard", "json_offset", "json_size", "zarr_offset", "zarr_size", "fingerprint")


def read_sessions(folder: Path | UPath, manifest: Manifest) -> list[SessionRecord]:
    """Read the sessions of a dataset.

    Raises
    ------
    DatasetError
        If their number differs from the manifest, or a line is invalid or points outside the shards. It names the first
        such line and its field.
    """
    where = folder / layout.SESSIONS
    lines = layout.read_lines(where)
    expected = sum(manifest.sessions.values())
    if len(lines) != expected:
        raise DatasetError(str(where), "", f"{len(lines)} sessions", f"{expected}", layout.DAMAGED)
    size = {shard.name: shard.bytes for shard in manifest.shards}
    sessions: dict[str, SessionRecord] = {}
    for number, line in enumerate(lines, 1):
        place = f"{where}: line {number}"
        session = check(SessionRecord, line, place, DatasetError)
        shard, key = session.shard, session.key
        if shard not in size:
            raise DatasetError(place, "shard", shown(shard), "a shard in the manifest", layout.DAMAGED)
        if session.zarr_offset + session.zarr_size > size[shard]:
            got = f"{session.zarr_size} bytes at {session.zarr_offset} of {shard}"
            inside = f"a range inside its {size[shard]} bytes"
            raise DatasetError(place, "zarr_offset, zarr_size", got, inside, layout.DAMAGED)
        if key in sessions:
            raise DatasetError(place, "key", f"{shown(key)} a second time", "a unique key", layout.DAMAGED)
        sessions[key] = session
    return list(sessions.values())
