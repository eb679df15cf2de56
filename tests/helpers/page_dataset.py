"""A small dataset for tests of its page."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from helpers.pages import NASTY
from helpers.records import data_record
from shards.conversion import writer
from shards.core import files
from shards.format import layout, sample
from shards.format.grid import Grid
from shards.format.manifest import GridRecord
from shards.format.patches import gather, patch_places
from shards.format.refusal import Refusal
from shards.format.session_record import ScanRecord

GRID = Grid(mm=12.0, shape=(16, 16, 16))
FRAMES, WINDOWS, KEEP = 5, 12, 8


def brain() -> np.ndarray:
    place = np.stack(np.meshgrid(*[np.arange(16)] * 3, indexing="ij")) - 7.5
    return (place[0] / 5.6) ** 2 + (place[1] / 7) ** 2 + (place[2] / 6) ** 2 < 1


def session(key: str, cohort: str, subject: str, split: str, **changes) -> ScanRecord:
    facts = {
        "key": key,
        "cohort": cohort,
        "subject": subject,
        "session": "1",
        "run": "",
        "task": "rest",
        "split": split,
        "source": f"{key}.nii.gz",
        "space": "MNI",
        "labels": {},
        "n_patches": 20,
        "frames": 62,
        "tr": 0.72,
        "source_tr": 0.72,
        "n_windows": WINDOWS,
        "n_kept": KEEP,
        "tsnr": 60.0,
        "dvars_outliers": 2,
        "brain_ml": 1500.0,
        "mask_outside_grid": 0.0,
        "mni_dice": 0.9,
        "mean_fd_mm": 0.1,
        "fingerprint": "0",
        "zarr_size": 0,
        **changes,
    }
    return ScanRecord.model_validate(facts)


def changed(record: ScanRecord, **changes) -> ScanRecord:
    return record.model_copy(update=changes)


def make_dataset(folder: Path, sessions: list[ScanRecord], failed: list[Refusal], **more: np.ndarray) -> Path:
    """Samples without the parts of their scores, unless these are among `more` arrays."""
    mask = brain()
    patch = patch_places(mask, GRID.patch)
    rng = np.random.default_rng(0)
    scores = rng.random(WINDOWS, np.float32)
    order = np.argsort(-scores)[:KEEP]
    baseline = gather(np.where(mask, rng.random(mask.shape), 0), patch, GRID.patch)
    content = sample.pack(
        {
            "baseline": baseline,
            "spread": baseline,
            "patch": patch,
            "brain": gather(mask, patch, GRID.patch),
            "start": order * FRAMES,
            "windows": rng.standard_normal((KEEP, FRAMES, *baseline.shape)).astype(np.float16),
            "saliency": scores[order],
            "scores": scores,
            "roi": 1000 + rng.standard_normal((30, 62)),
            "roi_number": np.arange(30),
            "roi_centre": np.zeros((30, 3)),
            "carpet": rng.integers(-60, 60, (40, 62)),
            **more,
        }
    )
    data = data_record(
        format=layout.FORMAT,
        configuration_hash="c0ffee" * 8,
        grid=GridRecord.of(GRID),
        tr=0.72,
        normalisation="global z",
        windows={"frames": FRAMES, "keep": KEEP, "minimum": 2},
        ranker={"name": "variance"},
        cohorts=sorted({line.cohort for line in [*sessions, *failed]}),
    )
    writer.pack(
        folder,
        sessions,
        failed,
        data,
        10**8,
        lambda line: (files.dump(line.tree()).encode(), content),
        lambda count, note: None,
    )
    return folder


def mixed_dataset(folder: Path) -> Path:
    """Eleven sessions of two cohorts, of which some are outlying, moved or lack a measure; and a refused scan."""
    sessions = [
        session(f"one_sub-{n:02}", "one", f"{n:02}", ("train", "train", "val", "test")[n % 4], tsnr=60.0 + n % 3)
        for n in range(10)
    ]
    sessions[4] = changed(sessions[4], tsnr=11.0, mean_fd_mm=None)
    sessions[5] = changed(sessions[5], source_tr=0.8)
    sessions += [
        session(
            "two_sub-x",
            "two",
            NASTY,
            "train",
            source_tr=2.0,
            space="native",
            centred_by_mm=[3.0, -4.0, 12.0],
            orientation_assumed="LAS",
            dropped_frames=4,
            mask_source="computed",
            cleaned=f"6 motion parameters {NASTY}",
        )
    ]
    failed = [
        Refusal(
            key=f"two_{NASTY}",
            cohort="two",
            source=f"{NASTY}.nii.gz",
            fingerprint="0",
            reason=f"{NASTY}.nii.gz: TR: got 0 s, expected 0.05-20 s. Set `tr` in the cohort file",
            hint="Set `tr` in the cohort file",
        )
    ]
    return make_dataset(folder, sessions, failed)


def repeated(folder: Path, number: int) -> Path:
    """A dataset of `number` sessions of five cohorts, with made-up measures; all have the bytes of one sample."""
    make_dataset(folder, [session("c0_sub-0", "c0", "0", "train")], [])
    (first,) = layout.read_lines(folder / layout.SESSIONS)
    rng = np.random.default_rng(0)
    lines = []
    for place in range(number):
        cohort, subject = f"c{place % 5}", f"{place // 2:05}"
        measured = {
            "tsnr": round(float(rng.normal(60, 6)), 3),
            "dvars_outliers": int(rng.poisson(2)),
            "mean_fd_mm": None if place % 7 == 0 else round(float(rng.lognormal(-2, 0.4)), 4),
            "brain_ml": round(float(rng.normal(1500, 100)), 1),
            "mni_dice": round(float(rng.normal(0.9, 0.01)), 4),
        }
        names = {"key": f"{cohort}_sub-{subject}_ses-{place % 2}_task-rest", "cohort": cohort, "subject": subject}
        lines.append({**first, **names, **measured})
    files.write_atomically(folder / layout.SESSIONS, "".join(files.dump(line) + "\n" for line in lines))
    manifest = json.loads((folder / layout.MANIFEST).read_text())
    manifest["sessions"]["train"], manifest["cohorts"] = number, sorted({line["cohort"] for line in lines})
    files.write_atomically(folder / layout.MANIFEST, files.dump(manifest))
    return folder
