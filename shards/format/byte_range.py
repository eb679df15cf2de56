"""File objects for a byte range of a file, to read a sample inside a shard without the rest."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any


class Span(io.RawIOBase):
    """A read-only view of `size` bytes of a file from `offset` on. Subclasses implement the reading."""

    def __init__(self, offset: int, size: int):
        self._offset, self._size, self._at = offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def _count(self, buffer: Any) -> int:
        """Number of remaining bytes that fit into a buffer."""
        return max(0, min(len(buffer), self._size - self._at))


class LocalSpan(Span):
    """A span of a file on this machine."""

    def __init__(self, path: Path, offset: int, size: int):
        super().__init__(offset, size)
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed by `close`)

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._offset + self._at)
        read = self._file.readinto(memoryview(buffer)[: self._count(buffer)]) or 0
        self._at += read
        return read

    def close(self) -> None:
        # the attribute is missing if the file could not be opened
        if not self.closed and hasattr(self, "_file"):
            self._file.close()
        super().close()
