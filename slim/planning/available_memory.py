"""The memory that this process can still get, on Linux: of the machine, and of the control groups (cgroups) it runs in.

A container or a SLURM job limits memory by control groups. Of version 1 and 2, the limits of the group of this process
and of all groups above it hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_KIB = 1024
# files of a control group: limit, bytes in use; and in memory.stat: bytes in use that the system would give up
_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


def available_bytes(root: Path = Path("/")) -> int:
    """Bytes that this process can still get; `root` is the folder with proc and sys.

    Raises
    ------
    OSError
        If /proc/meminfo cannot be read.
    """
    lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
    free = next(int(line.split()[1]) * _KIB for line in lines if line.startswith("MemAvailable:"))
    return max(0, min([free, *(left for group, of in _groups(root) if (left := _left(group, of)) is not None)]))


def _groups(root: Path) -> Iterator[tuple[Path, int]]:
    """The control groups of this process that may limit memory, with the version of each."""
    mounted = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        version, top = (1, mounted / "memory") if controllers else (2, mounted)
        group = top / path.lstrip("/")  # in a container, this may be a path of the machine outside, which is not there
        for place in (group, *group.parents):
            yield place, version
            if place == top:
                break


def _left(group: Path, version: int) -> int | None:
    """Bytes that a control group can still get; None without a limit."""
    limit, used, given_up = _FILES[version]
    try:
        most = (group / limit).read_text(encoding="ascii").strip()
        held = int((group / used).read_text(encoding="ascii"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        return None if most == "max" else int(most) - held + int(stat.get(given_up, 0))
    except (OSError, ValueError):
        return None
