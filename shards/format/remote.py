"""Remote datasets: on a web server, in a bucket, or with any other protocol of fsspec.

Only requested byte ranges are transferred, many at the same time. The backends raise errors of any type; they are
converted to errors of this package that name the URL.
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

_TOGETHER = 16  # number of requests for sizes at the same time
_TAIL = 16 << 10  # bytes at the end of a sample that contain its zip directory (70 bytes per member)
_NEAR = 64 << 10  # ranges closer than this are fetched in one request, which is faster than two
_HINT = "Check the address and the connection"
_AGAIN = "Give the URL with its user and password (https://USER:PASSWORD@HOST/...) or its token: they are never stored"
_DENIED = (401, 403)


def place(folder: str | Path | UPath) -> Path | UPath:
    """Convert a path or URL of a folder to a Path or UPath, which can be joined with `/`.

    Raises
    ------
    DatasetError
        If the protocol of the URL is unknown, is a chain, or needs a package that is not installed.
    """
    if "://" not in str(folder):
        return Path(str(folder))
    if not isinstance(folder, UPath):
        folder = keep(str(folder))
    if "::" in str(folder):
        raise DatasetError(str(folder), "protocol", "a chain (::)", "a single protocol, such as https or s3")
    try:
        found = folder if isinstance(folder, UPath) else UPath(folder, **options(str(folder)))
        found.fs  # noqa: B018 (imports the package of the protocol)
    except ImportError as error:
        raise DatasetError(
            str(folder),
            "protocol",
            f"a protocol without an installed package ({error})",
            "an installed package",
            "Install it: pip install 'slim-brain[http]' for http and https, 'slim-brain[s3]' for s3",
        ) from None
    except ValueError as error:
        raise DatasetError(str(folder), "protocol", error, "a protocol of fsspec, such as https or s3") from None
    return Path(found.path) if found.protocol in ("file", "local") else found


def read_text(path: Path | UPath) -> str | None:
    """Content of a file; None if it does not exist."""
    if isinstance(path, Path):
        try:
            return path.read_text(encoding="utf-8") if path.is_file() else None
        except (OSError, UnicodeDecodeError) as error:
            got = error.strerror if isinstance(error, OSError) else "bytes that are not UTF-8"
            raise DatasetError(str(path), "", got, "a readable file", "Copy the dataset again") from None
    try:
        return path.fs.cat_file(path.path).decode()
    except Exception as error:
        if _is_missing(error):
            return None
        raise DatasetError(str(path), "", _reason(error), "a readable file", _hint(error)) from None


def sizes(paths: Sequence[Path | UPath]) -> list[int | None]:
    """Size of each file in bytes; None if it does not exist."""
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
        raise DatasetError(str(path), "", _reason(error), "a shard", _hint(error)) from None
    if size is None:
        raise DatasetError(str(path), "", "no size from the server", "a Content-Length", "Use another web server")
    return size


def require_ranges(path: UPath, size: int) -> None:
    """Check that a web server supports byte ranges, by a request for the second byte of a file.

    Raises
    ------
    DatasetError
        If it does not send this byte only.
    """
    if path.protocol not in ("http", "https"):
        return
    try:
        with path.fs.open(path.path, size=size, block_size=1, cache_type="none") as file:
            file.seek(1)
            count = len(file.read(1))
    except ValueError:  # raised by fsspec after reading the header of the response, without its body
        count = size
    except Exception as error:
        raise DatasetError(str(path), "", _reason(error), "a shard", _hint(error)) from None
    if count != 1:
        raise DatasetError(
            str(path),
            "Range",
            f"{count} bytes for a request of one byte",
            "a server that supports byte ranges",
            "Use another web server, or copy the dataset to this machine",
        )


def _is_missing(error: Exception) -> bool:
    """Whether an error means a missing file. fsspec reports all failed HEAD requests as missing files, with a cause."""
    cause = error.__cause__
    of_network = type(cause).__module__.startswith("aiohttp") or isinstance(cause, TimeoutError)
    return isinstance(error, FileNotFoundError) and (not of_network or getattr(cause, "status", None) == 404)


def _cause(error: Exception) -> BaseException:
    """The error of the network behind an error of fsspec."""
    return error.__cause__ or error if isinstance(error, FileNotFoundError) else error


def _reason(error: Exception) -> str:
    if _is_missing(error):
        return "no such file"
    cause = _cause(error)
    if (status := getattr(cause, "status", None)) is not None:
        return f"{status} {getattr(cause, 'message', '')}".strip()
    return f"{type(cause).__name__}: {cause}".removesuffix(": ")


def _hint(error: Exception) -> str:
    cause = _cause(error)
    denied = getattr(cause, "status", None) in _DENIED or isinstance(cause, PermissionError)
    return _AGAIN if denied else _HINT


class RemoteSpan(Span):
    """A byte range of a remote file.

    Fetched bytes are kept. Other bytes are fetched when they are read.

    Parameters
    ----------
    path : UPath
    offset, size : int
    where : str
        Name of the sample in errors.
    """

    def __init__(self, path: UPath, offset: int, size: int, where: str):
        super().__init__(offset, size)
        self._path, self._where = path, where
        self._parts: dict[int, memoryview] = {}  # by the position of their first byte

    def fetch(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Fetch the ranges (start, stop) that are missing, all at the same time.

        Raises
        ------
        SampleCorrupt
            If the file is missing, too short, or cannot be reached.
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
            raise SampleCorrupt(self._where, "", _reason(error), "bytes of a shard", _hint(error)) from None
        for start, begin, end, part in zip(starts, begins, ends, parts, strict=True):
            if len(part) != end - begin:
                raise SampleCorrupt(
                    self._where,
                    f"bytes {begin}-{end - 1}",
                    f"{len(part)} bytes",
                    f"{end - begin} bytes",
                    "The shard has changed, or the server does not support byte ranges: check both",
                )
            self._parts[start] = memoryview(part)

    def fetch_members(self, choose: Callable[[list[str]], Collection[str]]) -> None:
        """Fetch the directory of the zip, then the members that `choose` selects by name."""
        self.fetch([(max(0, self._size - _TAIL), self._size)])
        try:
            with zipfile.ZipFile(self) as archive:
                begin = {info.filename: info.header_offset for info in archive.infolist()}
                bounds = sorted([*begin.values(), archive.start_dir])
        except SampleCorrupt:
            raise
        except Exception:  # a damaged directory: reading the zip will report it
            return
        end = dict(itertools.pairwise(bounds))
        self.fetch([(begin[name], min(end[begin[name]], self._size)) for name in choose([*begin])])

    def _held(self, at: int) -> memoryview:
        """The fetched bytes from `at` on, possibly none."""
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
