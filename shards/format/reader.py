"""Read datasets: any sample by its byte offset, and only the requested arrays and windows of it.

dataset = Dataset("DATASET")  # a folder, or a URL: https://..., s3://..., any protocol of fsspec
sample = dataset.read(dataset.sessions[0], names=("windows", "start"), windows=range(8))
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

import numpy as np
from upath import UPath

from shards.core.display import as_html, as_text
from shards.core.errors import ConfigError, DatasetError, SampleCorrupt, Stopped, UnknownSession, did_you_mean
from shards.core.settings import check
from shards.format import layout, remote, sample
from shards.format.byte_range import LocalSpan
from shards.format.grid import Grid
from shards.format.manifest import Manifest
from shards.format.session_record import ScanRecord, SessionRecord, read_sessions

if TYPE_CHECKING:
    import pandas as pd

ScanT = TypeVar("ScanT", bound=ScanRecord, contravariant=True)


class Samples(Protocol[ScanT]):
    """A source of samples: a `Dataset`, or a `shards.conversion.session.Converted` scan in memory."""

    @property
    def grid(self) -> Grid: ...

    def read(
        self, session: ScanT, names: Iterable[str] | None = None, windows: Iterable[int] | None = None
    ) -> dict[str, np.ndarray]: ...


class Dataset:
    """A local or remote dataset.

    Parameters
    ----------
    folder : str, Path or UPath
        A path, or a URL with any protocol of fsspec.

    Attributes
    ----------
    folder : Path or UPath
    manifest : Manifest
    sessions : list of SessionRecord
        Sorted by key.

    Raises
    ------
    DatasetError
        If the folder is not a finished dataset, or a shard is missing or has another size than in the manifest.
    """

    def __init__(self, folder: str | Path | UPath):
        # A UPath is not derived from Path, but has the same methods for joining and naming.
        self.folder = cast(Path, remote.place(folder))
        self.manifest = Manifest.read(self.folder)
        self.sessions = read_sessions(self.folder, self.manifest)
        shards = self.manifest.shards
        paths = [self.folder / layout.SHARDS / shard.name for shard in shards]
        for path, shard, size in zip(paths, shards, remote.sizes(paths), strict=True):
            if size != shard.bytes:
                got = "no such file" if size is None else f"{size} bytes"
                raise DatasetError(path, "", got, f"{shard.bytes} bytes", layout.DAMAGED)
        if paths and isinstance(paths[0], UPath):
            remote.require_ranges(paths[0], shards[0].bytes)

    def __len__(self) -> int:
        """Number of sessions."""
        return len(self.sessions)

    def __iter__(self) -> Iterator[SessionRecord]:
        """The sessions, sorted by key."""
        return iter(self.sessions)

    def __getitem__(self, key: str | int) -> SessionRecord:
        """A session by its key, or by its position in the order of the keys.

        Raises
        ------
        UnknownSession
            If no session has this key. It is a `KeyError`, too.
        IndexError
            If there is no such position.
        """
        if isinstance(key, str):
            if key not in self._by_key:
                hint = did_you_mean(key, self._by_key, "See the keys in to_frame().index")
                raise UnknownSession(self.folder, "key", key, f"one of the {len(self)} sessions", hint)
            return self._by_key[key]
        return self.sessions[key]

    def __contains__(self, key: object) -> bool:
        """Whether a session has this key, or is this one."""
        if isinstance(key, SessionRecord):
            return self._by_key.get(key.key) == key
        return isinstance(key, str) and key in self._by_key

    @cached_property
    def _by_key(self) -> dict[str, SessionRecord]:
        return {session.key: session for session in self.sessions}

    def to_frame(self) -> pd.DataFrame:
        """A table of the sessions.

        Returns
        -------
        pandas.DataFrame
            A row for each session, by its key. A column for each fact of `shards.format.session_record.SessionRecord`,
            and for each label a column `labels.NAME`.
        """
        import pandas as pd

        rows = [session.tree() for session in self.sessions]
        return pd.json_normalize(rows, max_level=1).set_index("key")

    def __repr__(self) -> str:
        return as_text(*self._shown())

    def _repr_html_(self) -> str:
        return as_html(*self._shown())

    def _shown(self) -> tuple[str, dict[str, object]]:
        manifest, grid = self.manifest, self.grid
        kept = "all" if (most := manifest.windows.keep) == "all" else f"the {most} most salient"
        splits = ", ".join(f"{count} {split}" for split, count in manifest.sessions.items())
        tr = "" if manifest.tr is None else f", TR {manifest.tr:g} s"
        return f"Dataset {self.folder}", {
            "sessions": f"{len(self)} ({splits})",
            "subjects": len({session.person for session in self.sessions}),
            "cohorts": ", ".join(manifest.cohorts) or None,
            "refused scans": manifest.failed or None,
            "grid": f"{' x '.join(map(str, grid.shape))} voxels of {grid.mm:g} mm",
            "windows": f"{self.frames} frames{tr}; {kept} of each scan are kept",
        }

    @property
    def grid(self) -> Grid:
        """The grid of the samples."""
        return self.manifest.grid.grid()

    @property
    def frames(self) -> int:
        """F, the number of frames of a window."""
        return self.manifest.windows.frames

    def of_split(self, split: str) -> list[SessionRecord]:
        """The sessions of `train`, `val` or `test`, or of all splits with `all`."""
        return [session for session in self.sessions if split in ("all", session.split)]

    def most_salient(self, count: int) -> Dataset:
        """This dataset with at most `count` windows of each session, the first of its ranking.

        Raises
        ------
        ConfigError
            If `count` is less than 1.
        """
        if count < 1:
            raise ConfigError("most_salient", "count", count, "1 or more windows")
        fewer = copy(self)
        fewer.sessions = [
            session.model_copy(update={"n_kept": min(count, session.n_kept)}) for session in self.sessions
        ]
        fewer.__dict__.pop("_by_key", None)
        return fewer

    def read(
        self,
        session: SessionRecord | Mapping[str, object],
        names: Iterable[str] | None = None,
        windows: Iterable[int] | None = None,
    ) -> dict[str, np.ndarray]:
        """Read arrays of one session; see `shards.format.sample.unpack`.

        Parameters
        ----------
        session : SessionRecord or mapping
            One of `sessions`, or a line of sessions.jsonl.
        names, windows
            See `shards.format.sample.unpack`.

        Raises
        ------
        DatasetError
            If a mapping is not a line of sessions.jsonl.
        SampleCorrupt
            If its bytes cannot be read. The message names the shard and the key.
        Stopped
            If the dataset cannot be reached any more.
        """
        if isinstance(session, Mapping):
            session = check(SessionRecord, session, self.folder / layout.SESSIONS, DatasetError)
        try:
            return self._read(session, names, windows)
        except SampleCorrupt:
            if (why := away(self.folder)) is not None:
                raise Stopped(why, "give the same command again when it is back") from None
            raise

    def _read(
        self, session: SessionRecord, names: Iterable[str] | None, windows: Iterable[int] | None
    ) -> dict[str, np.ndarray]:
        path = self.folder / layout.SHARDS / session.shard
        where = f"{path} ({session.key})"
        if isinstance(path, UPath):
            names, windows = (None if wanted is None else [*wanted] for wanted in (names, windows))
            far = remote.RemoteSpan(path, session.zarr_offset, session.zarr_size, where)
            far.fetch_members(lambda members: sample.members_read(members, names, windows))
            with io.BufferedReader(far, 1 << 16) as file:
                return _first_windows(session, sample.unpack(file, where, names, windows), windows)
        try:
            span = LocalSpan(path, session.zarr_offset, session.zarr_size)
        except OSError as error:
            raise SampleCorrupt(where, "", error.strerror or "unreadable", "a shard") from None
        with io.BufferedReader(span, 1 << 16) as file:
            return _first_windows(session, sample.unpack(file, where, names, windows), windows)


def _first_windows(
    session: SessionRecord, arrays: dict[str, np.ndarray], chosen: Iterable[int] | None
) -> dict[str, np.ndarray]:
    """The arrays without the windows that `Dataset.most_salient` left out; `chosen` were asked for by their rank."""
    ranked = ("start",) if chosen is not None else ("start", "windows")
    return {name: array[: session.n_kept] if name in ranked else array for name, array in arrays.items()}


def away(folder: str | Path | UPath) -> str | None:
    """Why a dataset cannot be reached at present, for example because of a lost mount; None if it can."""
    try:
        with (remote.place(folder) / layout.MANIFEST).open("rb") as file:
            file.read(1)
    except Exception as error:  # protocols of remote datasets raise errors of any type
        reason = getattr(error, "strerror", None) or type(error).__name__
        return f"the dataset {folder} cannot be reached ({reason})"
    return None
