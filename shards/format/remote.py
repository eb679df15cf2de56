"""A dataset that lies elsewhere: on a web server, in a bucket, behind any protocol of fsspec.

Only bytes that are asked for travel, many ranges at the same time. Backends raise errors of any type; here each becomes
one of this package that names the URL.
"""

from __future__ import annotations

import itertools
import zipfile
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fsspec.utils import merge_offset_ranges
from upath import UPath

from shards.core.errors import DatasetError, SampleCorrupt
from shards.core.passwords import keep, options
from shards.format.byte_range import Span

_TOGETHER = 16  # requests for sizes at the same time
_TAIL = 16 << 10  # bytes at the end of a sample that are sure to hold its zip directory (70 of a member)
_NEAR = 64 << 10  # ranges closer than this are one request: bytes in between cost less than another one
_HINT = "Check the address and the connection"


def place(folder: str | Path | UPath) -> Path | UPath:
    """A folder by its path or URL, to be joined with `/`; on this machine a plain Path.

    Raises
    ------
    DatasetError
        If the protocol of the URL is unknown, or a chain, or needs a package that is not installed.
    """
    if "://" not in str(folder):
        return Path(str(folder))
    if not isinstance(folder, UPath):
        folder = keep(str(folder))
    if "::" in str(folder):
        raise DatasetError(str(folder), "protocol", "a chain (::)", "a single one, such as https or s3")
    try:
        found = folder if isinstance(folder, UPath) else UPath(folder, **options(str(folder)))
        found.fs  # noqa: B018 (imports the package of the protocol)
    except ImportError as error:
        raise DatasetError(
            str(folder),
            "protocol",
            f"no package for it ({error})",
            "an installed one",
            "Install it: pip install 'slim-brain[http]' for http and https, 'slim-brain[s3]' for s3",
        ) from None
    except ValueError as error:
        raise DatasetError(str(folder), "protocol", error, "one of fsspec, such as https or s3") from None
    return Path(found.path) if found.protocol in ("file", "local") else found


def read_text(path: Path | UPath) -> str | None:
    """Content of a file; None where there is none."""
    if isinstance(path, Path):
        try:
            return path.read_text(encoding="utf-8") if path.is_file() else None
        except (OSError, UnicodeDecodeError) as error:
            got = error.strerror if isinstance(error, OSError) else "bytes that are no UTF-8"
            raise DatasetError(str(path), "", got, "a readable file", "Copy the dataset again") from None
    try:
        return path.fs.cat_file(path.path).decode()
    except Exception as error:
        if _is_missing(error):
            return None
        raise DatasetError(str(path), "", _reason(error), "a readable file", _HINT) from None


def sizes(paths: Sequence[Path | UPath]) -> list[int | None]:
    """Bytes of each file; None where there is none."""
    with ThreadPoolExecutor(_TOGETHER) as pool:
        return list(pool.map(_size, paths))


def _size(path: Path | UPath) -> int | None:
    if isinstance(path, Path):
        return path.stat().st_size if path.is_file() else None
    try:
        size = path.fs.info(path.path)["size"]
    except Exception as error:
        if _is_missing(error):
            return None
        raise DatasetError(str(path), "", _reason(error), "a shard", _HINT) from None
    if size is None:
        raise DatasetError(str(path), "", "no size from the server", "a Content-Length", "Use another web server")
    return size


def require_ranges(path: UPath, size: int) -> None:
    """Ask a web server for the second byte of a file, to refuse one that would send all of it every time.

    Raises
    ------
    DatasetError
        If it sends something else than this byte.
    """
    if path.protocol not in ("http", "https"):
        return
    try:
        with path.fs.open(path.path, size=size, block_size=1, cache_type="none") as file:
            file.seek(1)
            count = len(file.read(1))
    except ValueError:  # what fsspec raises, having read the header of the answer and none of its body
        count = size
    except Exception as error:
        raise DatasetError(str(path), "", _reason(error), "a shard", _HINT) from None
    if count != 1:
        raise DatasetError(
            str(path),
            "Range",
            f"{count} bytes where one was asked for",
            "a server that sends byte ranges",
            "Use another web server, or copy the dataset to this machine",
        )


def _is_missing(error: Exception) -> bool:
    """Whether there is no such file; every failure of a HEAD request comes as a missing file, with its cause."""
    cause = error.__cause__
    of_network = type(cause).__module__.startswith("aiohttp") or isinstance(cause, TimeoutError)
    return isinstance(error, FileNotFoundError) and (not of_network or getattr(cause, "status", None) == 404)


def _reason(error: Exception) -> str:
    if _is_missing(error):
        return "no such file"
    cause = error.__cause__ if isinstance(error, FileNotFoundError) else error
    return f"{type(cause).__name__}: {cause}".removesuffix(": ")


class RemoteSpan(Span):
    """A span of a file elsewhere.

    What was fetched is kept; what was not is fetched when it is read.

    Parameters
    ----------
    path : UPath
    offset, size : int
    where : str
        Named in errors.
    """

    def __init__(self, path: UPath, offset: int, size: int, where: str):
        super().__init__(offset, size)
        self._path, self._where = path, where
        self._parts: dict[int, memoryview] = {}  # by the place of their first byte

    def fetch(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Fetch these ranges (start, stop) that are not there yet, all at the same time.

        Raises
        ------
        SampleCorrupt
            If the file is gone, shorter, or cannot be reached.
        """
        wanted = [(start, stop) for start, stop in ranges if len(self._held(start)) < stop - start]
        if not wanted:
            return
        _, starts, stops = merge_offset_ranges(
            [self._path.path] * len(wanted), [start for start, _ in wanted], [stop for _, stop in wanted], _NEAR
        )
        files = [self._path.path] * len(starts)
        begins, ends = ([self._offset + at for at in bounds] for bounds in (starts, stops))
        try:
            parts = self._path.fs.cat_ranges(files, begins, ends, on_error="raise")
        except Exception as error:
            raise SampleCorrupt(self._where, "", _reason(error), "bytes of a shard", _HINT) from None
        for start, begin, end, part in zip(starts, begins, ends, parts, strict=True):
            if len(part) != end - begin:
                raise SampleCorrupt(
                    self._where,
                    f"bytes {begin}-{end - 1}",
                    f"{len(part)} bytes",
                    f"{end - begin} bytes",
                    "The shard changed, or the server sends no byte ranges: check both, and read again",
                )
            self._parts[start] = memoryview(part)

    def fetch_members(self, choose: Callable[[list[str]], Collection[str]]) -> None:
        """Fetch the directory of the zip that the span is, then of its members those that are chosen by name."""
        self.fetch([(max(0, self._size - _TAIL), self._size)])
        try:
            with zipfile.ZipFile(self) as archive:
                begin = {info.filename: info.header_offset for info in archive.infolist()}
                bounds = sorted([*begin.values(), archive.start_dir])
        except SampleCorrupt:
            raise
        except Exception:  # a damaged directory: whoever reads the zip reads the same bytes, and tells it
            return
        end = dict(itertools.pairwise(bounds))
        self.fetch([(begin[name], min(end[begin[name]], self._size)) for name in choose([*begin])])

    def _held(self, at: int) -> memoryview:
        """Bytes that are there from `at` on, perhaps none."""
        for start, part in self._parts.items():
            if start <= at < start + len(part):
                return part[at - start :]
        return memoryview(b"")

    def readinto(self, buffer: Any) -> int:
        count = self._count(buffer)
        if not self._held(self._at):
            self.fetch([(self._at, self._at + count)])
        piece = self._held(self._at)[:count]
        buffer[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)
