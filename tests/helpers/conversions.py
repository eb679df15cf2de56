"""What the tests of conversions share: comparing datasets, and copies of the small cohort."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from helpers.commands import GRID
from helpers.records import data_record, scan_record
from shards.conversion import writer
from shards.conversion.convert import Conversion
from shards.conversion.settings import ConvertSettings
from shards.core import files
from shards.core.settings import check, override
from shards.format import layout
from shards.format.session_record import ScanRecord
from shards.reporting.windows_view import Given
from slim.ranking.parcels import make_parcels

SETTINGS = check(ConvertSettings, override({}, GRID), "test")
RIDGE = {"name": "ridge", "extractor": None, "version": 2}


def contents(dataset: Path) -> dict[str, bytes]:
    """What a dataset is: all but the work folder, which may remember how it was made."""
    return {
        path.relative_to(dataset).as_posix(): path.read_bytes()
        for path in sorted(dataset.rglob("*"))
        if path.is_file() and path.relative_to(dataset).parts[0] not in (layout.WORK, layout.REPORT)
    }


def same(one: Path, two: Path) -> None:
    first, second = contents(one), contents(two)
    assert first.keys() == second.keys()
    for name in first:
        assert first[name] == second[name], name


def times(dataset: Path) -> dict[str, int]:
    return {path.as_posix(): path.stat().st_mtime_ns for path in dataset.rglob("*") if path.name != "lock"}


def copy_cohort(cohort: Path, to: Path, subjects: int = 6) -> Path:
    """The first subjects of a cohort, with the files' times."""
    shutil.copytree(
        cohort,
        to,
        dirs_exist_ok=True,
        ignore=lambda folder, names: [
            n for n in names if n.startswith("sub-") and "." not in n and "_" not in n and int(n[4:]) > subjects
        ],
    )
    return to / "cohort.yaml"


def bold_files(cohort: Path) -> list[Path]:
    return sorted(cohort.rglob("*_bold.nii.gz"))


def make_unreadable(path: Path) -> None:
    """Other content of the same size and time: whoever reads the file finds no image."""
    stat = path.stat()
    path.write_bytes(bytes(stat.st_size))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@contextmanager
def conversion(cohorts: list[Path], out: Path, **changes) -> Iterator[Conversion]:
    settings = SETTINGS.model_copy(update=changes)
    made = Conversion(cohorts, out, settings, RIDGE, make_parcels(settings.grid.grid(), settings.parcels), 1)
    try:
        yield made
    finally:
        made.close()


def renamed(cohort: Path, path: Path, **changes) -> Path:
    """The cohort file of a folder of runs, with other settings."""
    tree = yaml.safe_load((cohort / "cohort.yaml").read_text())
    path.write_text(yaml.safe_dump({**tree, "root": str(cohort), **changes}))
    return path


def sessions_of(number: int) -> list[ScanRecord]:
    return [
        scan_record(
            key=f"k{i}", subject=str(i), split="train" if i else "val", zarr_size=600, n_kept=8, fingerprint=str(number)
        )
        for i in range(number)
    ]


def pack_into(folder: Path, number: int) -> None:
    writer.finish_commit(folder)
    writer.pack(
        folder,
        sessions_of(number),
        [],
        data_record(number=number),
        1000,
        lambda s: (files.dump({"key": s.key}).encode(), f"{number} {s.key}".encode() * 100),
        lambda count, note: None,
    )


def edited(
    dataset: Path, to: Path, edit: Callable[[dict[str, Any]], Iterable[dict[str, Any]]], **manifest: Any
) -> Path:
    """A copy of a dataset in which each session is replaced by some others, over the same samples."""
    shutil.copytree(dataset, to, ignore=shutil.ignore_patterns("work", "report"))
    lines = [line for session in layout.read_lines(dataset / layout.SESSIONS) for line in edit(session)]
    files.write_atomically(to / layout.SESSIONS, files.dump_lines(lines))
    about = layout.read_manifest(dataset) | manifest
    about["sessions"] = {split: sum(line["split"] == split for line in lines) for split in about["sessions"]}
    files.write_atomically(to / layout.MANIFEST, files.dump(about))
    return to


def write_page(out: Path, private: bool = False, given: Given | None = None) -> Path:
    """In place of the page of a dataset."""
    path = out / layout.REPORT / "index.html"
    files.write_atomically(path, "page")
    return path
