"""What `manifest.json` and `sessions.jsonl` must hold, checked before anything is read by them.

They may hold more: other versions add facts, and a page or a probe asks for them by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, model_validator
from upath import UPath

from shards.core.errors import DatasetError
from shards.core.settings import check, shown
from shards.format import layout

Size = Annotated[StrictInt, Field(ge=0, lt=2**62)]
_MOST_VOXELS = 1 << 31  # of a grid
Length = Annotated[float, Field(gt=0, lt=1e6, strict=True)]


class _Facts(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class _Shard(_Facts):
    name: StrictStr = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    bytes: Size


class _Grid(_Facts):
    mm: Length
    shape: tuple[Size, Size, Size]
    patch: Size
    centre_mm: tuple[float, float, float]

    @model_validator(mode="after")
    def _whole(self) -> _Grid:
        x, y, z = self.shape
        if not 0 < x * y * z <= _MOST_VOXELS or self.patch < 1 or any(size % self.patch for size in self.shape):
            raise ValueError("a patch that divides every entry of a shape of a grid")
        return self


class _Windows(_Facts):
    frames: Annotated[StrictInt, Field(ge=1, le=10_000)]


class _Manifest(_Facts):
    sessions: dict[str, Size]
    shards: tuple[_Shard, ...]
    grid: _Grid
    windows: _Windows


class _Session(_Facts):
    """A line of `sessions.jsonl`, as far as reading and probing need it."""

    key: StrictStr = Field(max_length=255, pattern=r"^[A-Za-z0-9_+-][A-Za-z0-9._+-]*$")  # names files of results
    cohort: StrictStr
    subject: StrictStr
    split: StrictStr
    labels: dict[str, Any]
    tr: Length
    n_kept: Size
    shard: StrictStr
    zarr_offset: Size
    zarr_size: Size


def check_manifest(manifest: dict[str, Any], where: Path | UPath) -> None:
    """Refuse a manifest that lacks something, or holds what it cannot.

    Raises
    ------
    DatasetError
        Naming the field.
    """
    check(_Manifest, manifest, str(where), DatasetError)


def check_sessions(sessions: list[dict[str, Any]], manifest: dict[str, Any], where: Path | UPath) -> None:
    """Refuse sessions that are not as many as the manifest says, or that lie outside the dataset's shards.

    Raises
    ------
    DatasetError
        Naming the first such line and its field.
    """
    expected = sum(manifest["sessions"].values())
    if len(sessions) != expected:
        raise DatasetError(str(where), "", f"{len(sessions)} sessions", f"{expected}", layout.DAMAGED)
    size = {shard["name"]: shard["bytes"] for shard in manifest["shards"]}
    keys: set[str] = set()
    for number, session in enumerate(sessions, 1):
        place = f"{where}: line {number}"
        check(_Session, session, place, DatasetError)
        shard, key = session["shard"], session["key"]
        if shard not in size:
            raise DatasetError(place, "shard", shown(shard), "one of the manifest's", layout.DAMAGED)
        if session["zarr_offset"] + session["zarr_size"] > size[shard]:
            got = f"{session['zarr_size']} bytes at {session['zarr_offset']} of {shard}"
            raise DatasetError(place, "zarr_offset, zarr_size", got, f"a part of its {size[shard]}", layout.DAMAGED)
        if key in keys:
            raise DatasetError(place, "key", f"{shown(key)} a second time", "a key for each session", layout.DAMAGED)
        keys.add(key)
