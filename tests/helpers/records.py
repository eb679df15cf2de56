"""Records of sessions and data, of what a test wants to say of them."""

from __future__ import annotations

from typing import Any

from shards.format import layout
from shards.format.manifest import DataRecord
from shards.format.session_record import ScanFacts, ScanRecord, SessionRecord

_SCAN = {
    "key": "k",
    "cohort": "c",
    "subject": "1",
    "labels": {},
    "source": "bold.nii.gz",
    "tr": 0.72,
    "source_tr": 0.72,
    "frames": 60,
    "n_windows": 12,
    "n_patches": 8,
}
_DATA = {"grid": {"mm": 2.0, "shape": [8, 8, 8], "patch": 4, "centre_mm": [0.0, 0.0, 0.0]}, "windows": {"frames": 5}}


def scan_facts(**facts: Any) -> ScanFacts:
    """What is found in the files of a scan."""
    return ScanFacts.model_validate({"tr": 0.72} | facts)


def scan_record(**facts: Any) -> ScanRecord:
    """What is known of a converted scan."""
    return ScanRecord.model_validate(_SCAN | facts)


def session_record(**facts: Any) -> SessionRecord:
    """A session of a dataset."""
    place = {"split": "train", "n_kept": 8, "shard": "train-000000.tar", "zarr_offset": 0, "zarr_size": 0}
    return SessionRecord.model_validate(_SCAN | place | facts)


def data_record(**facts: Any) -> DataRecord:
    """What is known of a dataset."""
    return DataRecord.model_validate(_DATA | {"format": layout.FORMAT, "sessions": {}} | facts)
