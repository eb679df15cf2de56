"""The manifest of a dataset: what it contains and how it was made.

A dataset of an earlier version may lack newer fields; they are then None or empty.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StrictInt, StrictStr, model_validator
from upath import UPath

from shards.core.errors import DatasetError
from shards.core.settings import check
from shards.format import layout, remote
from shards.format.grid import Grid
from shards.format.record import Length, Number, Record, Size

_MOST_VOXELS = 1 << 31  # largest number of voxels of a grid


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
        """Make the record of a grid."""
        affine = grid.affine.tolist()
        return cls(mm=grid.mm, shape=grid.shape, patch=grid.patch, centre_mm=grid.centre_mm, affine=affine)

    def grid(self) -> Grid:
        """The grid."""
        return Grid(self.mm, self.shape, self.patch, self.centre_mm)


class WindowsRecord(Record):
    """How windows were cut and selected."""

    frames: Annotated[StrictInt, Field(ge=1, le=10_000)]
    keep: Size | Literal["all"] | None = None
    minimum: Size | None = None


class DataRecord(Record):
    """A manifest without its shards. Runs and exported models store it to describe their training data.

    Attributes
    ----------
    format : int
        Version of the format.
    configuration, configuration_hash : dict, str
        Settings and ranking of the conversion, and their hash.
    grid, windows : GridRecord, WindowsRecord
    tr, tr_range : float, list of float
        In s: the TR of the grid, and the range of TRs that are not resampled.
    normalisation : str
        Description of the stored values.
    ranker, split : dict
        What the scores depend on; how subjects were divided.
    cohorts : list of str
    sessions, subjects : dict of str to int
        Numbers for each split.
    failed : int
        Number of refused scans.
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
        """The manifest without the shards."""
        return DataRecord.model_validate({name: value for name, value in self.tree().items() if name != "shards"})

    @classmethod
    def read(cls, folder: str | Path | UPath) -> Manifest:
        """Read the manifest of a dataset, by its path or URL.

        Raises
        ------
        DatasetError
            If the folder is not a finished dataset, has another format version, or cannot be reached; or if a field is
            missing or invalid.
        """
        return check(cls, layout.read_manifest(folder), str(remote.place(folder) / layout.MANIFEST), DatasetError)
