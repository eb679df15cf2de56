"""Files: why a file cannot be read, names that can be printed, atomic writing, checksums."""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

_HEAD = 512  # number of bytes at the start of a file that are checked
_GZIP, _ZSTD, _ZIP, _BZIP2, _XZ = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PK\x03\x04", b"BZh", b"\xfd7zXZ"
_PACKED = ((_ZSTD, "zstd"), (_ZIP, "zip"), (_BZIP2, "bzip2"), (_XZ, "xz"))
_LFS = b"version https://git-lfs.github.com/spec/"
PARTIAL = (".part", ".partial", ".crdownload", ".tmp", ".filepart", ".download", "~")  # of downloads and editors

_LONGEST = 1 << 16  # characters of a line of a log


@dataclass(frozen=True)
class Trouble:
    """Why a file cannot be read: what was found, what is expected, what to do."""

    got: str
    expected: str
    hint: str


def printable(name: str | os.PathLike[str]) -> str:
    r"""A name as printable text: invalid UTF-8 is shown as \x.., line breaks as \n."""
    text = os.fspath(name)
    try:
        content = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON and UTF-16 can contain, is no byte
        content = text.encode("utf-8", "surrogatepass")
    text = content.decode("utf-8", "backslashreplace")
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def printable_lines(content: bytes) -> str:
    """The text of a log in printable form: lines and tabs are kept, escape sequences are shown as text."""
    text = content.decode("utf-8", "surrogateescape").replace("\r\n", "\n").replace("\r", "\n")
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in text.split("\n"))


_FOLDERS = re.compile(r"(?<![\w.:/~])/(?:[^/\s\"',\]}]+/)+(?=[^/\s\"',\]}])")


def without_folders(text: str) -> str:
    """Replace every absolute path in a text by its last part, because folders may name people and machines.

    URLs and relative paths are kept.
    """
    return _FOLDERS.sub("", text)


def share(path: str | os.PathLike[str]) -> None:
    """Give a file the usual mode of a new file (umask), after a library made it readable for this user only."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            umask = next(int(line.split()[1], 8) for line in status if line.startswith("Umask:"))
    except (OSError, StopIteration):  # on other systems the umask can only be read by setting it
        umask = os.umask(0o077)
        os.umask(umask)
    os.chmod(path, 0o666 & ~umask)


def is_partial(name: str) -> bool:
    """Whether a name is that of a hidden file (such as `._*` of macOS) or of an unfinished download."""
    return name.startswith(".") or name.lower().endswith(PARTIAL)


def trouble(path: Path, image: bool = False) -> Trouble | None:
    """Why a file cannot be read, judged from its kind and first bytes; None if nothing is wrong.

    Parameters
    ----------
    path : Path
    image : bool
        Whether it is read as NIfTI. Its compression must then agree with its name.
    """
    what = "a NIfTI image" if image else "a file with content"
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
            return Trouble(kind, what, "Give a file")
        with open(path, "rb") as file:
            head = file.read(_HEAD)
    except FileNotFoundError:
        return _missing(path, what)
    except OSError as error:  # for example no permission, a loop of links, a too long name, a failing disk
        return Trouble(f"a file that cannot be opened ({error.strerror})", what, "Check its permissions and its disk")
    return _pointer(path, head, what) or (_packing(path, head) if image else None)


def _missing(path: Path, what: str) -> Trouble:
    if not path.is_symlink():
        return Trouble("no such file", what, "Check the path")
    target = os.readlink(path)
    if "annex/objects" in target:
        got = "a link to content that is not on this machine (git-annex, datalad)"
        return Trouble(got, what, f"Run `datalad get {printable(path)}`")
    return Trouble(f"a link to {printable(target)}, which does not exist", what, "Restore the file, or remove the link")


def _pointer(path: Path, head: bytes, what: str) -> Trouble | None:
    """Why a file is a placeholder without content, such as a pointer of git-annex; None if it is not."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return Trouble("an empty file (0 bytes)", what, "Copy or download it again")
    if head.startswith(b"/annex/objects/"):
        got = "a pointer of git-annex: its content is not on this machine"
        return Trouble(got, what, f"Run `datalad get {printable(path)}`")
    if head.startswith(_LFS):
        return Trouble("a pointer of Git LFS: its content is not on this machine", what, "Run `git lfs pull`")
    if start.startswith((b"<!doctype html", b"<html")):
        hint = "Download it again: the server answered with a page, such as a login or an error"
        return Trouble("an HTML page", what, hint)
    if start.startswith(b"<?xml") and b"error" in start:  # an error message of a storage server
        return Trouble("an XML message of a server", what, "Download it again, and check your access")
    return None


def _packing(path: Path, head: bytes) -> Trouble | None:
    what, name = "a NIfTI image", path.name.lower()
    for mark, kind in _PACKED:
        if head.startswith(mark):
            return Trouble(f"a file compressed with {kind}", what, "Convert it to .nii, or to .nii.gz with gzip")
    if name.endswith((".zst", ".bz2", ".xz", ".zip")):
        ending = name.rsplit(".", 1)[1]
        return Trouble(f"a name that ends with .{ending}", ".nii or .nii.gz", "Decompress it, or correct its name")
    if head.startswith(_GZIP) and name.endswith((".nii", ".hdr", ".img")):
        got = "a gzip-compressed file with a name that does not end with .gz"
        return Trouble(got, ".nii.gz", "Rename it to .nii.gz")
    if name.endswith(".gz") and not head.startswith(_GZIP):
        got = "a file that is not compressed with gzip, although its name ends with .gz"
        hint = "Rename it to .nii if it is an image, or download it again"
        return Trouble(got, what, hint)
    return None


@contextmanager
def atomically(path: Path) -> Iterator[BinaryIO]:
    """Open a file for atomic writing: it gets a temporary name, fsync, its name, and an fsync of the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:  # for example a full disk or an interrupt: remove the temporary file
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_atomically(path: Path, data: bytes | str) -> None:
    """Write a file atomically; see `atomically`."""
    with atomically(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def sync_folder(folder: Path) -> None:
    """Flush the entries of a folder, so that a rename survives a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """SHA-256 (hex) of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def dump(tree: Any) -> str:
    """JSON with sorted keys, so that equal content gives equal bytes."""
    return json.dumps(tree, sort_keys=True, ensure_ascii=False)


def read_log(path: Path) -> tuple[list[dict[str, Any]], int]:
    """JSON objects of a log with one on each line, and how many lines hold none: a kill may cut the last one in two.

    A file that does not exist has no lines. A line is read to its first 65 536 characters.
    """
    lines: list[dict[str, Any]] = []
    unreadable = 0
    if path.is_file():
        with open(path, encoding="utf-8", errors="replace") as file:
            while text := file.readline(_LONGEST):
                try:
                    line = json.loads(text)
                except (ValueError, RecursionError):
                    line = None
                if isinstance(line, dict):
                    lines.append(line)
                else:
                    unreadable += bool(text.strip())
    return lines, unreadable


def dump_lines(trees: Iterable[Any]) -> str:
    """The content of a JSON-lines file."""
    return "".join(dump(tree) + "\n" for tree in trees)
