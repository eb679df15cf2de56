"""The on-disk contract: the only file that knows the names of members, arrays and dtypes.

A dataset folder::

    manifest.json     what it is and how it was made
    sessions.jsonl    a line per session: its KEY.json + where both members lie (shard, byte offset, size)
    failed.jsonl      a line per refused run: source, reason, what to do
    splits.tsv        which split each person is in, kept when runs are added
    shards/           train-000000.tar, val-000000.tar, test-000000.tar ...
    extractor/        the temporal extractor that ranked the windows (model.safetensors, config.json)
    report/           index.html

A sample is one session: `KEY.json` and `KEY.zarr.zip`, a Zarr v3 group in an uncompressed zip. The zip is written with
fixed times and in a fixed order, so equal arrays give equal bytes.

Legend: K kept windows in rank order; W all windows in time order; F frames of a window; P patches; V voxels of a
patch; R parcels; M voxels of the carpet; T frames of the run.
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
    "baseline": ("float32", False),  # (P, V) run mean, global z; background 0
    "spread": ("float32", False),  # (P, V) SD over the run, global-SD units
    "patch": ("int16", False),  # (P, 3) place in the patch grid, ascending flat order
    "brain": ("uint8", False),  # (P, V) 1 where the voxel is brain
    "start": ("int32", False),  # (K,) first frame of the window in the harmonised run
    "saliency": ("float32", False),  # (K,) descending
    "scores": ("float32", False),  # (W,) scores of all windows in time order
    "scores_space": ("float32", False),  # (W,) what the other parcels tell of each window, where the ranker asks that
    "scores_time": ("float32", False),  # (W,) what the neighbouring windows tell of it, in the same units
    "roi": ("float32", False),  # (R, T) parcel means over the whole run, what the ranker saw
    "roi_number": ("int32", False),  # (R,) label of each parcel
    "roi_centre": ("float32", False),  # (R, 3) mm
    "carpet": (
        "int8",
        False,
    ),  # (M, T) brain voxels over the whole run, z times CARPET_STEPS, from the rim to the depth
    "scale": ("float32", False),  # (P, V) only beside int16 windows: windows * scale is the fluctuation
    "windows": ("float16", True),  # (K, F, P, V) fluctuation around the run mean, global-SD units
}
OPTIONAL = {"scale", "scores_space", "scores_time"}  # a sample may be without them
# The letters of the legend: axes of one letter have one size in all arrays of a sample. A digit is a size.
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
    "scale": "PV",
    "windows": "KFPV",
}
CARPET_STEPS = 20  # a carpet value of 20 is one SD of the voxel
DAMAGED = "Copy the dataset again, or convert it anew into another folder"


def read_json(text: str, where: str, expected: str, hint: str = "") -> dict[str, object]:
    """The JSON object in a text.

    Raises
    ------
    DatasetError
        If it is no JSON, JSON without limits (nesting, digits), or no object.
    """
    try:
        tree = json.loads(text)
    except RecursionError:
        raise DatasetError(where, "", "JSON that is nested too deeply", expected, hint) from None
    except ValueError as error:  # of a JSONDecodeError, and of numbers with thousands of digits
        raise DatasetError(where, "", f"no JSON ({error})", expected, hint) from None
    if not isinstance(tree, dict):
        raise DatasetError(where, "", f"JSON that is a {type(tree).__name__}", expected, hint)
    return tree


def read_lines(path: Path | UPath) -> list[dict[str, object]]:
    """The objects of a JSON-lines file; an absent file is an empty list.

    Raises
    ------
    DatasetError
        If a line is no JSON object.
    """
    text = remote.read_text(path) or ""
    return [
        read_json(line, f"{path}: line {number}", "one JSON object per line")
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    ]


def read_manifest(folder: str | Path | UPath) -> dict[str, object]:
    """The manifest of a dataset, by its path or URL.

    Raises
    ------
    DatasetError
        If the folder is no finished dataset, or one of another format version, or cannot be reached.
    """
    root = remote.place(folder)
    path = root / MANIFEST
    text = remote.read_text(path)
    if text is None:
        got = "no such folder" if isinstance(root, Path) and not root.is_dir() else "no manifest.json"
        raise DatasetError(str(root), "", got, "a dataset written by make_shards.py", "Convert a cohort first")
    manifest = read_json(text, str(path), "a manifest", "Run make_shards.py again")
    if manifest.get("format") != FORMAT:
        raise DatasetError(str(path), "format", manifest.get("format"), FORMAT, "Convert the cohort with this version")
    return manifest
