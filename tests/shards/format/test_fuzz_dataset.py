"""Damaged datasets and reports: read, or refused in one line; see `fuzzing`.

Members of a sample are damaged inside the zip, with CRC-32 that fit, as hostile ones would be.
"""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from helpers.fuzzing import NESTED, answer, counts, damaged, hold, json_bytes, texts, trees
from helpers.samples import sample_arrays
from shards.core import files
from shards.core.errors import DatasetError, SampleCorrupt
from shards.format import layout, sample
from shards.format.reader import Dataset
from slim.evaluation.results import Report
from slim.reporting.run_health import probes, read_tasks, verdict

WORDS = [
    text.encode()
    for text in ('"O,O"', '"|O"', '"float64"', '"int64"', '"bytes"', "[1000000000000,3]", "-1", "null", "[]")
]
REPORT = {
    "tasks": {
        "sex": {
            "ours": {"auroc": {"value": 0.7, "low": 0.6, "high": 0.8, "p": 0.01}, "accuracy": {"value": 0.6}},
            "random": {"auroc": {"value": 0.5, "low": 0.4, "high": 0.6, "p": None}},
        },
        "age": {"ours": {"r": {"value": None, "low": None, "high": None, "p": None}}},
    },
    "facts": {
        "sex": {
            "type": "classification",
            "label": "sex",
            "test_subjects": 10,
            "subjects": 50,
            "pooling": "cov",
            "split": {"kind": "folds", "folds": 5, "repeats": 2},
            "seeds": [0, 1],
            "differences": {"random": {"auroc": {"value": 0.2, "low": 0.1, "high": 0.3}}},
            "subjects_seen_in_pretraining": 3,
        },
        "age": {"type": "regression", "label": "age"},
    },
}


def members(sample: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(sample)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(parts: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return out.getvalue()


def seeds() -> list[bytes]:
    """A sample with float16 windows, and one with int16 windows and their scale."""
    arrays = sample_arrays(k=3, p=4, v=8)
    arrays["windows"] = arrays["windows"].astype(np.float16)
    arrays.pop("scale", None)
    coarse = {**arrays, "windows": np.ones((3, 5, 4, 8), np.int16), "scale": np.ones((4, 8), np.float32)}
    return [sample.pack(arrays), sample.pack(coarse)]


@st.composite
def samples(draw: st.DrawFn, whole: list[bytes]) -> bytes:
    """A sample damaged anywhere, or with some of its members damaged and their checksums right."""
    if draw(st.booleans()):
        return draw(damaged(whole, WORDS))
    parts = members(draw(st.sampled_from(whole)))
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(parts)))
        kind = draw(st.sampled_from(("bytes", "tree", "lose", "swap")))
        if kind == "bytes":
            parts[name] = draw(damaged([parts[name]], WORDS))
        elif kind == "tree" and name.endswith(".json"):
            try:
                parts[name] = json_bytes(draw(trees([json.loads(parts[name])])))
            except ValueError:  # damaged before
                continue
        elif kind == "lose" and len(parts) > 1:
            del parts[name]
        elif kind == "swap":
            parts[name] = parts[draw(st.sampled_from(sorted(parts)))]
    return zipped(parts)


def unpack(content: bytes) -> None:
    def call() -> dict[str, np.ndarray]:
        return sample.unpack(io.BytesIO(content), "here")

    got = answer(call, len(content))
    assert isinstance(got, dict | SampleCorrupt)
    if isinstance(got, dict):
        assert {name: array.ndim for name, array in got.items()} == {name: len(layout.AXES[name]) for name in got}
        assert not any(array.dtype.hasobject for array in got.values())
    answer(lambda: sample.unpack(io.BytesIO(content), "here", ("windows", "start"), [2, 0]), len(content))


def open_dataset(folder: Path, part: str, content: bytes) -> None:
    """A dataset one of whose files is damaged: all of it is read."""
    path = folder / part
    whole = path.read_bytes()
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) + len(content)
    path.write_bytes(content)

    def call() -> None:
        dataset = Dataset(folder)
        assert dataset.grid.voxels > 0 and dataset.frames > 0
        for session in [session for split in ("train", "val", "test") for session in dataset.of_split(split)]:
            assert isinstance(session.labels.get("group"), object)
            dataset.read(session, ("windows", "start"), range(2))

    try:
        told = answer(call, size)
        assert told is None or isinstance(told, DatasetError)
    finally:
        path.write_bytes(whole)


def report(folder: Path, content: bytes) -> None:
    """A report that is added to, and the same one on a page."""
    path = folder / "report.json"
    path.write_bytes(content)
    answer(lambda: Report.read(path), len(content))

    def call() -> None:
        tasks = read_tasks(path)
        verdict(tasks)
        probes(tasks)

    answer(call, len(content) + (64 << 20))


@counts
def test_samples(inputs: int) -> None:
    hold(2 * inputs, samples(seeds()), unpack)


@pytest.fixture
def small(dataset: Path, tmp_path: Path) -> Path:
    return shutil.copytree(dataset, tmp_path / "dataset")


@counts
@pytest.mark.parametrize("part", [layout.MANIFEST, layout.SESSIONS])
def test_descriptions(inputs: int, part: str, small: Path) -> None:
    text = (small / part).read_text()
    lines = [json.loads(line) for line in text.splitlines()]

    def content(tree: Any) -> bytes:
        return b"".join(json_bytes(line) + b"\n" for line in tree) if isinstance(tree, list) else json_bytes(tree)

    strategy = st.one_of(trees([lines]).map(content), texts([text], NESTED))
    hold(inputs, strategy, partial(open_dataset, small, part))


@counts
def test_shards(inputs: int, small: Path) -> None:
    name = next((small / layout.SHARDS).glob("train-*.tar")).name
    seed = (small / layout.SHARDS / name).read_bytes()
    hold(inputs, damaged([seed]), partial(open_dataset, small, f"{layout.SHARDS}/{name}"))


@counts
def test_reports(inputs: int, tmp_path: Path) -> None:
    strategy = st.one_of(trees([REPORT]).map(json_bytes), texts([json.dumps(REPORT)], NESTED))
    hold(inputs, strategy, partial(report, tmp_path))


def damage(sample: bytes, name: str, **changes: Any) -> bytes:
    """A sample with other metadata of an array."""
    parts = members(sample)
    parts[f"{name}/zarr.json"] = json.dumps(json.loads(parts[f"{name}/zarr.json"]) | changes).encode()
    return zipped(parts)


def grid(*shape: int) -> dict[str, Any]:
    return {"name": "regular", "configuration": {"chunk_shape": list(shape)}}


BIG = [{"name": "bytes", "configuration": {"endian": "big"}}, {"name": "blosc"}]


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("patch", {"data_type": "|O"}, "patch with another dtype"),  # bytes as pointers: the process died
        ("windows", {"data_type": "O,O"}, "windows with another dtype"),
        ("windows", {"data_type": "float64"}, "windows with another dtype"),
        ("baseline", {"shape": [10**6, 10**6], "chunk_grid": grid(10**6, 10**6)}, "along P|another size|along V"),
        ("carpet", {"shape": [10**6, 60], "chunk_grid": grid(10**6, 60)}, "a chunk of another size"),
        ("carpet", {"shape": [-8, -60], "chunk_grid": grid(-8, -60)}, "without 2 axes"),
        ("roi", {"shape": [180], "chunk_grid": grid(180)}, "without 2 axes"),
        ("start", {"shape": [2], "chunk_grid": grid(2)}, "along K"),
        ("roi_centre", {"shape": [3, 4], "chunk_grid": grid(3, 4)}, "along 3"),
        ("baseline", {"codecs": BIG}, "other chunks or codecs"),
        ("baseline", {"codecs": [{"name": "bytes"}, {"name": "gzip"}]}, "other chunks or codecs"),
    ],
)
def test_what_an_array_claims_is_compared_with_the_contract_first(name: str, changes: dict, words: str) -> None:
    content = damage(seeds()[0], name, **changes)
    told = answer(lambda: sample.unpack(io.BytesIO(content), "here"), 0)
    assert isinstance(told, SampleCorrupt)
    with pytest.raises(SampleCorrupt, match=words):
        sample.unpack(io.BytesIO(content), "here")


def test_a_chunk_that_claims_gigabytes_takes_none() -> None:
    parts = members(seeds()[0])
    meta = json.loads(parts["carpet/zarr.json"])
    meta |= {"shape": [10**7, 60], "chunk_grid": grid(10**7, 60)}
    parts["roi/zarr.json"] = json.dumps(json.loads(parts["roi/zarr.json"])).encode()
    parts["carpet/zarr.json"] = json.dumps(meta).encode()
    chunk = bytearray(parts["carpet/c/0/0"])
    for block in (1 << 20, 1 << 30):
        chunk[2] &= ~2
        chunk[4:8], chunk[8:12] = (6 * 10**8).to_bytes(4, "little"), block.to_bytes(4, "little")
        parts["carpet/c/0/0"] = bytes(chunk)
        content = zipped(parts)
        told = answer(lambda content=content: sample.unpack(io.BytesIO(content), "here"), len(content))
        assert isinstance(told, SampleCorrupt) and "is too small for its size in the header" in told.line()


def test_packed_members_are_refused() -> None:
    """Of a zip inside which 100 MB of zeros are 100 kB."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members(seeds()[0]).items():
            archive.writestr(name, content if name != "zarr.json" else content + b" " * (200 << 20))
    told = answer(lambda: sample.unpack(io.BytesIO(out.getvalue()), "here"), len(out.getvalue()))
    assert isinstance(told, SampleCorrupt) and "is compressed" in told.line()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shard": "../manifest.json"}, "line 1: shard: got ../manifest.json, expected a shard in the manifest"),
        ({"zarr_offset": 10**12}, "zarr_offset, zarr_size: got .* bytes at 1000000000000"),
        ({"zarr_offset": -1}, "zarr_offset: got -1"),
        ({"zarr_size": 1.5}, "zarr_size: got 1.5"),
        ({"labels": None}, "labels: got None"),
        ({"key": 3}, "key: got 3"),
        ({"tr": "0.72"}, "tr: got '0.72'"),
        ({"n_kept": True}, "n_kept: got True"),
    ],
)
def test_sessions_lie_inside_the_shards(change: dict[str, Any], words: str, small: Path) -> None:
    path = small / layout.SESSIONS
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(first) | change), *rest]) + "\n")
    with pytest.raises(DatasetError, match=words):
        Dataset(small)
    path.write_text("\n".join([first, first, *rest[1:]]) + "\n")
    with pytest.raises(DatasetError, match=r"line 2: key: got .* a second time"):
        Dataset(small)


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", '{"format": ' + "9" * 5000 + "}", "{", "\udcff"])
def test_what_is_no_manifest(text: str, small: Path) -> None:
    (small / layout.MANIFEST).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DatasetError, match=r"^[^\n]*$"):
        Dataset(small)
    (small / layout.SESSIONS).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DatasetError, match=r"^[^\n]*$"):
        layout.read_lines(small / layout.SESSIONS)


@pytest.mark.parametrize("key", ["../../victim", "/etc/passwd", "..", ".hidden", "a/b", "a\nb", "", "k" * 256])
def test_a_key_that_would_name_a_file_elsewhere_is_refused(key, dataset, tmp_path):
    copy = Path(shutil.copytree(dataset, tmp_path / "copy"))
    first, *rest = layout.read_lines(copy / layout.SESSIONS)
    files.write_atomically(copy / layout.SESSIONS, files.dump_lines([{**first, "key": key}, *rest]))
    with pytest.raises(DatasetError, match=r"sessions\.jsonl: line 1: key: got ") as caught:
        Dataset(copy)
    assert "\n" not in caught.value.line()
