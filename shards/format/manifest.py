"""The manifest of a dataset: what it is and how it was made.

A dataset of another version may lack the newer facts: they are None, or empty.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, StrictInt, StrictStr, model_validator
from upath import UPath

from shards.core.errors import DatasetError
from shards.core.settings import check
from shards.format import layout, remote
from shards.format.grid import Grid
from shards.format.record import Length, Number, Record, Size

_MOST_VOXELS = 1 << 31  # of a grid


class ShardRecord(Record):
    """A file of samples."""

    name: StrictStr = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    bytes: Size
    split: StrictStr = ""
    samples: Size = 0
    sha256: StrictStr = ""


class GridRecord(Record):
    """The grid, as `shards.format.grid.Grid`."""

    mm: Length
    shape: tuple[Size, Size, Size]
    patch: Size
    centre_mm: tuple[Number, Number, Number]
    affine: list[list[Number]] | None = None

    @model_validator(mode="after")
    def _whole(self) -> GridRecord:
        x, y, z = self.shape
        if not 0 < x * y * z <= _MOST_VOXELS or self.patch < 1 or any(size % self.patch for size in self.shape):
            raise ValueError("a patch that divides every entry of a shape of a grid")
        return self

    @classmethod
    def of(cls, grid: Grid) -> GridRecord:
        """That of a grid."""
        affine = grid.affine.tolist()
        return cls(mm=grid.mm, shape=grid.shape, patch=grid.patch, centre_mm=grid.centre_mm, affine=affine)

    def grid(self) -> Grid:
        """The grid."""
        return Grid(self.mm, self.shape, self.patch, self.centre_mm)


class WindowsRecord(Record):
    """How windows were cut and chosen."""

    frames: Annotated[StrictInt, Field(ge=1, le=10_000)]
    keep: Size | None = None
    minimum: Size | None = None


class DataRecord(Record):
    """A manifest without its shards, as a run and an exported model keep it of the data they were made with.

    Attributes
    ----------
    format : int
        Version of the format.
    configuration, configuration_hash : dict, str
        Settings and ranking of the conversion, and their hash.
    grid, windows : GridRecord, WindowsRecord
    tr, tr_range : float, list of float
        Seconds: the TR of the grid, and those that are resampled to it.
    normalisation : str
        What the stored values are, in words.
    ranker, split : dict
        What the scores depend on; how people were divided.
    cohorts : list of str
    sessions, subjects : dict of str to int
        Of each split.
    failed : int
        Refused scans.
    """

    format: Size = layout.FORMAT
    configuration: dict[str, Any] = Field(default_factory=dict)
    configuration_hash: StrictStr = ""
    grid: GridRecord
    tr: Number | None = None
    tr_range: list[Number] = Field(default_factory=list)
    normalisation: StrictStr = ""
    windows: WindowsRecord
    ranker: dict[str, Any] = Field(default_factory=dict)
    split: dict[str, Any] = Field(default_factory=dict)
    cohorts: list[StrictStr] = Field(default_factory=list)
    sessions: dict[str, Size]
    subjects: dict[str, Size] = Field(default_factory=dict)
    failed: Size = 0


class Manifest(DataRecord):
    """`manifest.json` of a dataset."""

    shards: tuple[ShardRecord, ...]

    @property
    def data(self) -> DataRecord:
        """All of it but the shards."""
        return DataRecord.model_validate({name: value for name, value in self.tree().items() if name != "shards"})

    @classmethod
    def read(cls, folder: str | Path | UPath) -> Manifest:
        """The manifest of a dataset, by its path or URL.

        Raises
        ------
        DatasetError
            If the folder is no finished dataset, or one of another format version, or cannot be reached; if a field is
            missing or holds what it cannot.
        """
        return check(cls, layout.read_manifest(folder), str(remote.place(folder) / layout.MANIFEST), DatasetError)
