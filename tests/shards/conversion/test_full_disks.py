"""A disk that is full or cannot be written, output that nobody reads, long names: one line, and nothing is left."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.commands import ROOT
from shards.core.files import atomically, write_atomically
from slim.config import load_config

_MOUNT = ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
mounts = pytest.mark.skipif(
    shutil.which("unshare") is None or subprocess.run(_MOUNT, capture_output=True).returncode != 0,
    reason="this user may mount nothing here",
)
# A command that writes a file of so many bytes and prints so many lines.
_COMMAND = """
import sys
from pathlib import Path
from shards.core.cli import run
from shards.core.files import write_atomically

def main():
    _, place, size, lines = sys.argv
    for number in range(int(lines)):
        print("line", number, "äöü")
    write_atomically(Path(place), b"0" * int(size))
    print(len(list(Path(place).parent.iterdir())), "file")
    return 0

run(main)
"""


def write(place: Path | str, size: int = 10, lines: int = 0, shell: str = 'exec "$@"', **environment: str):
    script = Path(os.environ["PYTEST_COMMAND"])
    return subprocess.run(
        ["bash", "-c", shell, "bash", sys.executable, script, place, str(size), str(lines)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        timeout=60,
    )


@pytest.fixture(autouse=True)
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "kommando-ü.py"
    path.write_text(_COMMAND, encoding="utf-8")
    monkeypatch.setenv("PYTEST_COMMAND", str(path))


def test_a_write_that_fails_leaves_what_was_there_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    write_atomically(path, "before")
    with pytest.raises(KeyboardInterrupt), atomically(path) as file:
        file.write(b"after")
        raise KeyboardInterrupt
    assert path.read_text() == "before" and os.listdir(path.parent) == ["file"]


@mounts
def test_a_full_disk_is_status_3_and_nothing_is_left(tmp_path: Path) -> None:
    shell = 'mount -t tmpfs -o size=64k none /mnt && "$@"; status=$?; ls -A /mnt; exit $status'
    done = write("/mnt/file", size=10**6, shell=f"exec unshare --mount bash -c '{shell}' bash \"$@\"")
    assert (done.returncode, done.stdout) == (3, b"")
    assert done.stderr.startswith(b"stopped: no space left for ") and done.stderr.count(b"\n") == 1


@mounts
def test_a_disk_that_cannot_be_written_is_status_2() -> None:
    shell = 'mount -t tmpfs -o ro none /mnt && "$@"'
    done = write("/mnt/file", shell=f"exec unshare --mount bash -c '{shell}' bash \"$@\"")
    assert done.returncode == 2
    assert b"got Read-only file system, expected" in done.stderr and done.stderr.count(b"\n") == 1


def test_a_name_that_is_too_long_is_status_2(tmp_path: Path) -> None:
    done = write(tmp_path / ("n" * 300))
    assert done.returncode == 2
    assert b"got a name that is too long, expected names of at most 255 bytes" in done.stderr
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize(
    "shell", ['"$@" | head -1; exit ${PIPESTATUS[0]}', 'exec "$@" >&-', 'exec "$@" >&- 2>&- <&-', 'exec "$@" 2>&-']
)
def test_work_is_done_whoever_reads_its_output(shell: str, tmp_path: Path) -> None:
    done = write(tmp_path / "out" / "file", lines=20_000, shell=shell)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "out" / "file").read_bytes() == b"0" * 10


def test_a_locale_of_ascii_takes_all_names(tmp_path: Path) -> None:
    given = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    done = write(tmp_path / "größer" / "ö", lines=1, **given)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == b"line 0 \\xe4\\xf6\\xfc\n1 file\n"
    assert (tmp_path / "größer" / "ö").exists()


def test_a_run_may_be_called_001() -> None:
    words = ["data=data", "run.out=001", "run.steps=0012", "optimizer.lr=0.001"]
    settings = load_config(ROOT / "configs" / "pretrain" / "tiny.yaml", words)
    assert (settings.run.out, settings.run.steps, settings.optimizer.lr) == ("001", 12, 0.001)


@mounts
@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        ("-o ro", 2, "error: /mnt/new: --out: got a folder that cannot be written (Read-only file system)"),
        ("-o size=64k", 3, "stopped: no space left for /mnt/new; make room, then give the same command again"),
    ],
)
def test_where_results_cannot_go_is_told_before_the_work(options: str, status: int, said: str) -> None:
    words = [sys.executable, "tools/embed.py", "WEIGHTS", "run.nii.gz", "--out", "/mnt/new/vectors.npz"]
    shell = f'mount -t tmpfs {options} none /mnt && exec "$@"'
    done = subprocess.run(
        ["unshare", "--mount", "bash", "-c", shell, "bash", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == status
    assert done.stderr.startswith(said) and done.stderr.count("\n") == 1
