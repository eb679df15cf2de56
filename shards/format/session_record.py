"""The facts of a scan and of its session in a dataset: `KEY.json` and a line of `sessions.jsonl`.

A dataset of an earlier version may lack the newer facts: they are None, or empty.
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
Key = Annotated[StrictStr, Field(max_length=255, pattern=r"^[A-Za-z0-9_+-][A-Za-z0-9._+-]*$")]  # names files of results


class ScanFacts(Record):
    """What is found in the files of a scan.

    Attributes
    ----------
    tr, source_tr : float
        Seconds, on the grid and of the scan.
    tr_source : str
        Where the TR is from: the cohort file, a sidecar, the header.
    space, space_assumed : str
        Its space, and in words what was assumed of it.
    orientation_assumed, forms_disagree : str
        What the header does not tell, or contradicts.
    centred_by_mm : list of float
        Of a scan in native space: how far it was moved.
    mask_source, mask_rule : str
        Where the brain mask is from.
    mask_outside_grid, mask_outside_scan, dead_share : float
        Shares of the mask.
    mni_dice : float
        Overlap with the MNI152 brain.
    repeated_frames, dropped_frames, dvars_outliers : int
        Volumes that repeat an earlier one, left out at the start, or with an outlying DVARS.
    mean_fd_mm, tsnr, brain_ml, global_mean, global_sd : float
        Quality numbers.
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
    """A converted scan: what its `KEY.json` says.

    `n_kept` and `zarr_size` are known once it is ranked, `fingerprint` once it is written, `split` once it is packed.
    """

    key: Key
    cohort: StrictStr
    subject: StrictStr
    labels: Labels
    people: StrictStr = ""  # whose subjects they are
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
        """Who was scanned: equal for the same subject of cohorts that share people."""
        return self.people or self.cohort, self.subject

    def fact(self, name: str) -> Any:
        """A label of the subject, or else a fact of the session; None where it has neither."""
        if name in self.labels:
            return self.labels[name]
        if name in type(self).model_fields:
            return getattr(self, name)
        return (self.model_extra or {}).get(name)

    def member(self) -> dict[str, object]:
        """For JSON: the scan's `KEY.json`, which does not say where it lies."""
        return {name: value for name, value in self.tree().items() if name not in _LOCATION}


class SessionRecord(ScanRecord):
    """A session of a dataset, a line of `sessions.jsonl`: the scan, and where its two members lie in the shards."""

    n_kept: Size
    zarr_size: Size
    split: StrictStr
    shard: StrictStr
    zarr_offset: Size
    json_offset: Size | None = None
    json_size: Size | None = None


_LOCATION = ("shard", "json_offset", "json_size", "zarr_offset", "zarr_size", "fingerprint")


def read_sessions(folder: Path | UPath, manifest: Manifest) -> list[SessionRecord]:
    """The sessions of a dataset.

    Raises
    ------
    DatasetError
        If they are not as many as the manifest says, or one is not as it must be or lies outside the shards; it names
        the first such line and its field.
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
            raise DatasetError(place, "shard", shown(shard), "one of the manifest's", layout.DAMAGED)
        if session.zarr_offset + session.zarr_size > size[shard]:
            got = f"{session.zarr_size} bytes at {session.zarr_offset} of {shard}"
            raise DatasetError(place, "zarr_offset, zarr_size", got, f"a part of its {size[shard]}", layout.DAMAGED)
        if key in sessions:
            raise DatasetError(place, "key", f"{shown(key)} a second time", "a key for each session", layout.DAMAGED)
        sessions[key] = session
    return list(sessions.values())
