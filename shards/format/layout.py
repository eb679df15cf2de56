"""The layout of a dataset on disk: names of files, members and arrays, and their dtypes.

A dataset folder::

    manifest.json     what the dataset contains and how it was made
    sessions.jsonl    a line per session: its KEY.json + position of both members (shard, byte offset, size)
    failed.jsonl      a line per refused scan: source, reason, what to do
    splits.tsv        the split of each subject, kept when scans are added
    shards/           train-000000.tar, val-000000.tar, test-000000.tar ...
    extractor/        the temporal extractor that ranked the windows (model.safetensors, config.json)
    report/           index.html

A sample is one session: `KEY.json` and `KEY.zarr.zip`, a Zarr v3 group in an uncompressed zip. The zip is written with
fixed times and in a fixed order, so equal arrays give equal bytes.

Legend: K kept windows in rank order; W all windows in time order; F frames of a window; P patches; V voxels of a
patch; R parcels; M voxels of the carpet; T frames of the scan.
"""

from __future__ import annotations

import json
from pathlib import Path

from upath import UPath

from shards.core.errors import DatasetError
from shards.format import remote

FORMAT = 1
MANIFEST, SESSIONS, FAILED = "manifest.json", "sessions.jsonl", "failed.jsonl"
SPLITS_TABLE = "splits.tsv"
SHARDS, EXTRACTOR, REPORT, WORK = "shards", "extractor", "report", "work"
PAGE = "index.html"  # in REPORT
JSON_MEMBER, ZARR_MEMBER = "json", "zarr.zip"

# name: (dtype, chunked along the first axis). `windows` is float16, or int16 with the array `scale`.
ARRAYS: dict[str, tuple[str, bool]] = {
    "baseline": ("float32", False),  # (P, V) mean over the scan, global z; background 0
    "spread": ("float32", False),  # (P, V) SD over the scan, global-SD units
    "patch": ("int16", False),  # (P, 3) position in the patch grid, ascending flat order
    "brain": ("uint8", False),  # (P, V) 1 for brain voxels
    "start": ("int32", False),  # (K,) first frame of the window in the harmonised scan
    "saliency": ("float32", False),  # (K,) descending
    "scores": ("float32", False),  # (W,) scores of all windows in time order
    "scores_space": ("float32", False),  # (W,) part of the score predicted from other parcels
    "scores_time": ("float32", False),  # (W,) part of the score predicted from other windows
    "roi": ("float32", False),  # (R, T) parcel means over the whole scan, as used by the ranker
    "roi_number": ("int32", False),  # (R,) label of each parcel
    "roi_centre": ("float32", False),  # (R, 3) mm
    "carpet": (
        "int8",
        False,
    ),  # (M, T) brain voxels over the whole scan, z times CARPET_STEPS, from the edge to the centre of the brain
    "displacement": ("float32", False),  # (T,) framewise displacement, mm; NaN where it is missing
    "scale": ("float32", False),  # (P, V) only with int16 windows: windows * scale is the fluctuation
    "windows": ("float16", True),  # (K, F, P, V) fluctuation around the mean over the scan, global-SD units
}
OPTIONAL = {"displacement", "scale", "scores_space", "scores_time"}  # arrays that a sample may lack
# Axes, by letters of the legend. Axes with the same letter have the same size in all arrays; digits are sizes.
AXES = {
    "baseline": "PV",
    "spread": "PV",
    "patch": "P3",
    "brain": "PV",
    "start": "K",
    "saliency": "K",
    "scores": "W",
    "scores_space": "W",
    "scores_time": "W",
    "roi": "RT",
    "roi_number": "R",
    "roi_centre": "R3",
    "carpet": "MT",
    "displacement": "T",
    "scale": "PV",
    "windows": "KFPV",
}
CARPET_STEPS = 20  # a carpet value of 20 is one SD of the voxel
DAMAGED = "Copy the dataset again, or convert the cohorts again into another folder"


def read_json(text: str, where: str, expected: str, hint: str = "") -> dict[str, object]:
    """Parse the JSON object in a text.

    Raises
    ------
    DatasetError
        If the text is not JSON, is nested too deeply, has numbers with too many digits, or is not an object.
    """
    try:
        tree = json.loads(text)
    except RecursionError:
        raise DatasetError(where, "", "JSON that is nested too deeply", expected, hint) from None
    except ValueError as error:  # a JSONDecodeError, or a number with thousands of digits
        raise DatasetError(where, "", f"invalid JSON ({error})", expected, hint) from None
    if not isinstance(tree, dict):
        raise DatasetError(where, "", f"JSON that is a {type(tree).__name__}", expected, hint)
    return tree


def read_lines(path: Path | UPath) -> list[dict[str, object]]:
    """Read the objects of a JSON lines file. A missing file gives an empty list.

    Raises
    ------
    DatasetError
        If a line is not a JSON object.
    """
    text = remote.read_text(path) or ""
    return [
        read_json(line, f"{path}: line {number}", "one JSON object per line")
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    ]


def read_manifest(folder: str | Path | UPath) -> dict[str, object]:
    """Read the manifest of a dataset, by its path or URL.

    Raises
    ------
    DatasetError
        If the folder is not a finished dataset, has another format version, or cannot be reached.
    """
    root = remote.place(folder)
    path = root / MANIFEST
    text = remote.read_text(path)
    if text is None:
        got = "no such folder" if isinstance(root, Path) and not root.is_dir() else "no manifest.json"
        raise DatasetError(str(root), "", got, "a dataset written by slim-brain make-shards", "Convert a cohort first")
    manifest = read_json(text, str(path), "a manifest", "Run slim-brain make-shards again")
    if manifest.get("format") != FORMAT:
        raise DatasetError(str(path), "format", manifest.get("format"), FORMAT, "Convert the cohort with this version")
    return manifest
