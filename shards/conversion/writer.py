"""Write sessions to tar files, and replace the dataset by the new files in one commit.

The new tar files, `sessions.jsonl`, `failed.jsonl` and `manifest.json` are first written to `work/next/`. Then a marker
file is written and all files are moved into place; a later conversion that finds the marker finishes the moves. After a
kill at any moment, the dataset is therefore either the old one or the new one.
"""

from __future__ import annotations

import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from shards.conversion.splits import SPLITS
from shards.core import files
from shards.format import layout
from shards.format.manifest import DataRecord, Manifest, ShardRecord
from shards.format.refusal import Refusal
from shards.format.session_record import ScanRecord, SessionRecord

_MARKER = "commit"


def member_paths(folder: Path, key: str) -> tuple[Path, Path]:
    """The files of the two members of a session that is not packed yet."""
    members = folder / layout.WORK / "members"
    return members / f"{key}.{layout.JSON_MEMBER}", members / f"{key}.{layout.ZARR_MEMBER}"


def pack(
    folder: Path,
    sessions: list[ScanRecord],
    failed: list[Refusal],
    data: DataRecord,
    shard_bytes: int,
    read_members: Callable[[ScanRecord], tuple[bytes, bytes]],
    advance: Callable[[int, str], None],
) -> Manifest:
    """Write the shards of a dataset and put them in place.

    Parameters
    ----------
    folder : Path
        Folder of the dataset.
    sessions, failed : list of ScanRecord, list of Refusal
    data : DataRecord
        The manifest without shards; its counts are replaced.
    shard_bytes : int
        Size at which a shard is closed, in bytes.
    read_members : callable
        Returns the bytes of the JSON and Zarr members of a session.
    advance : callable
        Called once per session, to show progress.

    Returns
    -------
    Manifest
        The written manifest.
    """
    following = folder / layout.WORK / "next"
    shutil.rmtree(following, ignore_errors=True)
    (following / layout.SHARDS).mkdir(parents=True)
    lines: list[SessionRecord] = []
    shards: list[ShardRecord] = []
    for split in SPLITS:
        ordered = sorted((s for s in sessions if s.split == split), key=lambda s: s.key)
        for number, part in enumerate(_fill(ordered, shard_bytes)):
            path = following / layout.SHARDS / f"{split}-{number:06d}.tar"
            _write_tar(path, part, read_members, advance)
            size, checksum = path.stat().st_size, files.sha256(path)
            shards.append(ShardRecord(name=path.name, split=split, samples=len(part), bytes=size, sha256=checksum))
            lines += _locate(path, part)
    files.sync_folder(following / layout.SHARDS)
    lines.sort(key=lambda line: line.key)
    counts = Counter(line.split for line in lines)
    subjects = {split: len({(line.cohort, line.subject) for line in lines if line.split == split}) for split in SPLITS}
    sizes = {
        "sessions": {split: counts.get(split, 0) for split in SPLITS},
        "subjects": subjects,
        "failed": len(failed),
        "shards": [shard.tree() for shard in shards],
    }
    manifest = Manifest.model_validate(data.tree() | sizes)
    files.write_atomically(following / layout.SESSIONS, files.dump_lines(line.tree() for line in lines))
    files.write_atomically(following / layout.FAILED, files.dump_lines(line.tree() for line in failed))
    files.write_atomically(following / layout.MANIFEST, files.dump(manifest.tree()) + "\n")
    files.write_atomically(folder / layout.WORK / _MARKER, "")
    finish_commit(folder)
    return manifest


def finish_commit(folder: Path) -> None:
    """Move new files into place, if they were written completely."""
    marker = folder / layout.WORK / _MARKER
    if not marker.exists():
        return
    following, old = folder / layout.WORK / "next", folder / layout.WORK / "old"
    if (following / layout.SHARDS).exists():
        if (folder / layout.SHARDS).exists():
            shutil.rmtree(old, ignore_errors=True)
            (folder / layout.SHARDS).rename(old)
        (following / layout.SHARDS).rename(folder / layout.SHARDS)
    for name in (layout.SESSIONS, layout.FAILED, layout.MANIFEST):
        if (following / name).exists():
            (following / name).rename(folder / name)
    files.sync_folder(folder)
    marker.unlink()
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(following, ignore_errors=True)


def _fill(sessions: list[ScanRecord], shard_bytes: int) -> Iterator[list[ScanRecord]]:
    """Divide sessions, in order, into shards of about `shard_bytes`."""
    part: list[ScanRecord] = []
    size = 0
    for session in sessions:
        part.append(session)
        size += session.zarr_size
        if size >= shard_bytes:
            yield part
            part, size = [], 0
    if part:
        yield part


def _write_tar(
    path: Path,
    sessions: list[ScanRecord],
    read_members: Callable[[ScanRecord], tuple[bytes, bytes]],
    advance: Callable[[int, str], None],
) -> None:
    import webdataset as wds  # imported here, because only this function needs it

    with open(path, "wb") as file:
        # fixed owner, mode and time, so that equal samples give equal bytes
        with wds.TarWriter(
            file, encoder=False, mtime=0, user="slim", group="slim", mode=0o644, format="GNU_FORMAT"
        ) as tar:
            for session in sessions:
                meta, data = read_members(session)
                tar.write({"__key__": session.key, layout.JSON_MEMBER: meta, layout.ZARR_MEMBER: data})
                advance(1, "")
        file.flush()
        os.fsync(file.fileno())


def _locate(path: Path, sessions: list[ScanRecord]) -> list[SessionRecord]:
    """Add the byte offset and size of both members to the sessions."""
    with tarfile.open(path) as tar:
        at = {member.name: (member.offset_data, member.size) for member in tar}
    lines = []
    for session in sessions:
        line = {**session.tree(), "shard": path.name}
        for short, suffix in (("json", layout.JSON_MEMBER), ("zarr", layout.ZARR_MEMBER)):
            line[f"{short}_offset"], line[f"{short}_size"] = at[f"{session.key}.{suffix}"]
        lines.append(SessionRecord.model_validate(line))
    return lines
