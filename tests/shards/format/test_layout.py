"""The on-disk contract, read without this project's code; damage; precision; patches; splits."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from zarr.storage import ZipStore

from helpers.samples import sample_arrays
from shards.conversion.splits import SPLITS
from shards.core.display import as_html
from shards.core.errors import DatasetError, SampleCorrupt
from shards.format import layout
from shards.format.patches import gather, parcel_means, patch_places, scatter, voxel_slots
from shards.format.reader import Dataset
from shards.format.sample import encode_windows, pack, unpack

DTYPES = {
    "baseline": "float32",
    "spread": "float32",
    "patch": "int16",
    "brain": "uint8",
    "start": "int32",
    "saliency": "float32",
    "scores": "float32",
}


def read_plainly(dataset: Path, folder: Path) -> dict[str, tuple[dict, dict[str, np.ndarray], zipfile.ZipFile]]:
    """Every sample of a dataset by webdataset and zarr alone: its JSON, arrays and zip."""
    samples = {}
    for tar in sorted((dataset / "shards").glob("*.tar")):
        for sample in wds.WebDataset(str(tar), shardshuffle=False, empty_check=False):
            path = folder / f"{sample['__key__']}.zip"
            path.write_bytes(sample["zarr.zip"])
            group = zarr.open_group(ZipStore(path, mode="r"), mode="r")
            arrays = {name: array[...] for name, array in group.arrays()}
            arrays["chunks"] = {name: array.chunks for name, array in group.arrays()}
            samples[sample["__key__"]] = (json.loads(sample["json"]), arrays, zipfile.ZipFile(path))
    return samples


@pytest.fixture(scope="module")
def samples(dataset, tmp_path_factory):
    return read_plainly(dataset, tmp_path_factory.mktemp("plain"))


def test_plain_tools_read_what_the_reader_reads(dataset, samples):
    ours = Dataset(dataset)
    assert sorted(samples) == [session.key for session in ours.sessions] and len(samples) == 6
    for session in ours.sessions:
        meta, arrays, _ = samples[session.key]
        for name, values in ours.read(session).items():
            expected = arrays[name]
            if name == "windows" and "scale" in arrays:
                expected = expected.astype(np.float32) * arrays["scale"]
            np.testing.assert_array_equal(values, expected)
        assert {name: session.tree()[name] for name in meta} == meta


def test_a_sample_holds_what_the_contract_says(dataset, samples):
    manifest = json.loads((dataset / "manifest.json").read_text())
    for key, (meta, arrays, archive) in samples.items():
        assert meta["key"] == key
        for name in (
            "cohort",
            "subject",
            "session",
            "run",
            "task",
            "split",
            "source",
            "frames",
            "tr",
            "source_tr",
            "n_windows",
            "n_kept",
            "n_patches",
            "tsnr",
            "dvars_outliers",
            "brain_ml",
            "mask_outside_grid",
            "mean_fd_mm",
        ):
            assert name in meta, name
        assert not Path(meta["source"]).is_absolute()
        for name, dtype in DTYPES.items():
            assert arrays[name].dtype == dtype, name
        k, f, p, v = arrays["windows"].shape
        assert arrays["windows"].dtype in (np.float16, np.int16) and (arrays["windows"].dtype == np.int16) == (
            "scale" in arrays
        )
        assert (k, f, p, v) == (meta["n_kept"], manifest["windows"]["frames"], meta["n_patches"], 64)
        assert arrays["chunks"]["windows"] == (1, f, p, v)
        assert arrays["baseline"].shape == arrays["spread"].shape == arrays["brain"].shape == (p, v)
        assert arrays["patch"].shape == (p, 3) and arrays["start"].shape == arrays["saliency"].shape == (k,)
        assert arrays["scores"].shape == (meta["n_windows"],) and meta["n_windows"] == meta["frames"] // f
        flat = np.ravel_multi_index(arrays["patch"].T, [size // 4 for size in manifest["grid"]["shape"]])
        assert (np.diff(flat) > 0).all()  # ascending flat order
        brain = arrays["brain"].astype(bool)
        assert set(np.unique(arrays["brain"])) <= {0, 1} and brain.any(axis=1).all()
        assert not arrays["baseline"][~brain].any() and not arrays["windows"][:, :, ~brain].any()
        # rank order: the kept windows are the best, the best first
        order = np.argsort(-arrays["scores"], kind="stable")[:k]
        np.testing.assert_array_equal(arrays["start"], order * f)
        np.testing.assert_array_equal(arrays["saliency"], arrays["scores"][order])
        assert (np.diff(arrays["saliency"]) <= 0).all()
        for part in ("scores_space", "scores_time"):  # joined by the ranker `ridge`
            assert arrays[part].dtype == np.float32 and (arrays[part] >= arrays["scores"] - 1e-6).all()
        assert meta["n_parcels"] == len(arrays["roi"])
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        assert json.loads(archive.read("zarr.json"))["zarr_format"] == 3


def test_sessions_point_at_the_members_and_the_manifest_at_the_shards(dataset, samples):
    manifest = json.loads((dataset / "manifest.json").read_text())
    sessions = [json.loads(line) for line in (dataset / "sessions.jsonl").read_text().splitlines()]
    assert [s["key"] for s in sessions] == sorted(s["key"] for s in sessions)
    for session in sessions:
        content = (dataset / "shards" / session["shard"]).read_bytes()
        assert session["shard"].startswith(session["split"] + "-")
        member = content[session["json_offset"] : session["json_offset"] + session["json_size"]]
        assert json.loads(member) == samples[session["key"]][0]
        archive = content[session["zarr_offset"] : session["zarr_offset"] + session["zarr_size"]]
        assert zipfile.ZipFile(io.BytesIO(archive)).testzip() is None
    assert {shard["name"] for shard in manifest["shards"]} == {path.name for path in (dataset / "shards").iterdir()}
    for shard in manifest["shards"]:
        content = (dataset / "shards" / shard["name"]).read_bytes()
        assert (shard["bytes"], shard["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
        assert shard["samples"] == sum(session["shard"] == shard["name"] for session in sessions)
    assert manifest["sessions"] == {split: sum(s["split"] == split for s in sessions) for split in SPLITS}
    np.testing.assert_array_equal(manifest["grid"]["affine"], Dataset(dataset).grid.affine)


def test_equal_arrays_give_equal_bytes():
    assert pack(sample_arrays()) == pack(dict(reversed(sample_arrays().items())))
    assert pack(sample_arrays()) != pack(sample_arrays(1))


def test_no_array_of_zeros_is_left_out():
    """Zarr omits chunks of zeros unless told; then a lost chunk could not be told from zeros."""
    arrays = {name: np.zeros_like(values) for name, values in sample_arrays().items()}
    names = zipfile.ZipFile(io.BytesIO(pack(arrays))).namelist()
    assert {f"windows/c/{k}/0/0/0" for k in range(6)} | {"start/c/0", "patch/c/0/0"} <= set(names)


def test_a_sample_without_the_parts_of_its_scores_is_whole():
    """Those of rankers that have none, or of a version that did not keep them; other arrays may not be missing."""
    arrays = sample_arrays()
    parts = {name: arrays.pop(name) for name in ("scores_space", "scores_time")}
    old, new = (io.BytesIO(pack(kept)) for kept in (arrays, arrays | parts))
    assert unpack(new, "here").keys() - unpack(old, "here").keys() == parts.keys()
    assert unpack(old, "here", ("scores", *parts)).keys() == {"scores"}
    assert unpack(new, "here", ("scores", *parts)).keys() == {"scores", *parts}
    del arrays["saliency"]
    with pytest.raises(SampleCorrupt, match="no array saliency"):
        unpack(io.BytesIO(pack(arrays)), "here")


def test_the_best_windows_lie_side_by_side():
    names = zipfile.ZipFile(io.BytesIO(pack(sample_arrays(k=12)))).namelist()
    chunks = [name for name in names if name.startswith("windows/c/")]
    assert chunks == [f"windows/c/{rank}/0/0/0" for rank in range(12)]
    assert names[names.index(chunks[0]) :] == chunks


class Watched(io.BytesIO):
    """A file that remembers which of its bytes were read."""

    def __init__(self, data: bytes):
        super().__init__(data)
        self.touched = np.zeros(len(data), bool)

    def read(self, size: int | None = -1) -> bytes:
        at = self.tell()
        data = super().read(size)
        self.touched[at : at + len(data)] = True
        return data


@pytest.mark.parametrize("ranks", [[0, 1], [5, 2], [3], []])
def test_chosen_windows_touch_only_their_chunks(ranks):
    arrays = sample_arrays()
    data = pack(arrays)
    file = Watched(data)
    got = unpack(file, "here", ("windows", "start"), ranks)
    np.testing.assert_array_equal(got["windows"], unpack(io.BytesIO(data), "here")["windows"][ranks])
    assert set(got) == {"windows", "start"}
    archive = zipfile.ZipFile(io.BytesIO(data))
    for info in archive.infolist():
        content = slice(info.header_offset + 30 + len(info.filename), None)
        touched = file.touched[content][: info.file_size].any()
        name = info.filename
        wanted = name.endswith("zarr.json") and name.split("/")[0] in ("zarr.json", "windows", "start", "scale")
        wanted |= name in {f"windows/c/{rank}/0/0/0" for rank in ranks} | {"start/c/0"}
        assert touched == wanted or name.startswith("scale"), name


@pytest.mark.parametrize("row", [6, 100, -1])
def test_a_window_that_is_not_there_is_refused(row):
    with pytest.raises(SampleCorrupt, match="windows"):
        unpack(io.BytesIO(pack(sample_arrays())), "here", ("windows",), [0, row])


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000), exponent=st.floats(-6, 3), spike=st.sampled_from([0.0, 3.0, 30.0]), still=st.booleans()
)
def test_windows_are_kept_to_a_thousandth_of_each_voxels_sd(seed, exponent, spike, still):
    """Over all scales: float16 where that is precise enough, int16 with a scale per voxel elsewhere."""
    rng = np.random.default_rng(seed)
    run = rng.standard_normal((300, 2, 8)).astype(np.float32)
    run[rng.integers(300)] += np.float32(spike)
    run[:, 1] *= np.float32(1e-3)  # a voxel of very different size
    if still:
        run[:, 0, 0] = 0
    run = (run - run.mean(axis=0)) * np.float32(10.0**exponent)
    spread = run.std(axis=0)
    windows = run.reshape(60, 5, 2, 8)[rng.permutation(60)[:32]]
    encoded = encode_windows(windows, spread)
    arrays = {**sample_arrays(k=32, p=2, v=8), "spread": spread}
    arrays.pop("scale", None)
    arrays |= encoded
    got = unpack(io.BytesIO(pack(arrays)), "here")["windows"].astype(np.float64)
    error = np.sqrt(np.mean((got - windows) ** 2, axis=(0, 1)))
    assert (error <= 1e-3 * spread * (1 + 1e-6)).all()
    half = windows.astype(np.float16).astype(np.float32)
    enough = np.isfinite(half).all() and (np.sqrt(np.mean((half - windows) ** 2, axis=(0, 1))) <= 1e-3 * spread).all()
    assert encoded["windows"].dtype == (np.float16 if enough else np.int16) and ("scale" in encoded) != enough


def test_both_ways_of_storing_windows_occur():
    windows = sample_arrays()["windows"].astype(np.float32)
    assert encode_windows(windows, windows.std(axis=(0, 1)))["windows"].dtype == np.float16
    for factor in (1e-6, 1e7):
        scaled = windows * np.float32(factor)
        assert encode_windows(scaled, scaled.std(axis=(0, 1)))["windows"].dtype == np.int16


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), data=st.data())
def test_a_flipped_bit_is_told_or_changes_nothing(where, bit, data):
    intact = pack(sample_arrays(k=3, p=2))
    names = data.draw(st.sampled_from([None, ("windows",), ("windows", "baseline")]))
    tail = data.draw(st.booleans())  # the directory of the zip is small and deserves as many tries
    start = intact.index(b"PK\x01\x02") if tail else 0
    content = bytearray(intact)
    content[start + int(where * (len(intact) - start))] ^= 1 << bit
    expected = unpack(io.BytesIO(intact), "here", names)
    try:
        got = unpack(io.BytesIO(bytes(content)), "here", names)
    except SampleCorrupt:
        return
    assert got.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(got[name], values)


def test_damage_names_shard_and_key_and_spares_the_rest(dataset, tmp_path):
    copy = Path(shutil.copytree(dataset, tmp_path / "copy"))
    session, *others = Dataset(copy).sessions
    path = copy / "shards" / session.shard
    content = bytearray(path.read_bytes())
    first = session.zarr_offset
    member = bytes(content[first : first + session.zarr_size])
    info = zipfile.ZipFile(io.BytesIO(member)).getinfo("windows/c/4/0/0/0")
    content[first + info.header_offset + 100] ^= 0x10
    path.write_bytes(content)
    damaged = Dataset(copy)
    with pytest.raises(SampleCorrupt) as caught:
        damaged.read(session)
    assert session.shard in caught.value.line() and session.key in caught.value.line()
    with pytest.raises(SampleCorrupt):
        damaged.read(session, ("windows",), [0, 4])
    assert len(damaged.read(session, ("windows",), [0, 3])["windows"]) == 2  # the other windows are whole
    for other in others:
        damaged.read(other)


def spoil_size(members: dict[str, bytes]) -> None:
    members["windows/c/1/0/0/0"] = members["baseline/c/0/0"]


def spoil_chunks(members: dict[str, bytes]) -> None:
    members["windows/zarr.json"] = members["windows/zarr.json"].replace(b'"blosc"', b'"gzip"')


def spoil_absent(members: dict[str, bytes]) -> None:
    del members["windows/c/1/0/0/0"]


@pytest.mark.parametrize("spoil", [spoil_size, spoil_chunks, spoil_absent])
def test_a_sample_at_odds_with_its_description_is_refused(spoil):
    """Every member whole by its checksum, yet not what another says of it."""
    with zipfile.ZipFile(io.BytesIO(pack(sample_arrays()))) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    spoil(members)
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(SampleCorrupt, match=r"here: zarr\.zip: got unreadable bytes"):
        unpack(data, "here", ("windows",), [0, 1])
    assert unpack(data, "here", ("baseline",))["baseline"].shape == (7, 64)


@pytest.mark.parametrize("spoil", ["shorter", "gone"])
def test_a_shard_that_is_not_whole_is_refused_before_reading(dataset, tmp_path, spoil):
    copy = Path(shutil.copytree(dataset, tmp_path / "copy"))
    path = next((copy / "shards").iterdir())
    if spoil == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(DatasetError, match=path.name):
        Dataset(copy)


def test_a_manifest_of_another_format_is_refused(dataset, tmp_path):
    copy = Path(shutil.copytree(dataset, tmp_path / "copy"))
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(DatasetError, match="format: got 99, expected 1"):
        Dataset(copy)
    (copy / "manifest.json").write_text("{")
    with pytest.raises(DatasetError, match="invalid JSON"):
        Dataset(copy)
    with pytest.raises(DatasetError, match="no such folder"):
        Dataset(tmp_path / "nowhere")


GRIDS = st.tuples(*[st.integers(1, 4)] * 3)


@settings(max_examples=60, deadline=None)
@given(places=GRIDS, edge=st.integers(1, 4), seed=st.integers(0, 10**6), share=st.floats(0.01, 1))
def test_patches_gather_and_scatter_are_inverse(places, edge, seed, share):
    rng = np.random.default_rng(seed)
    shape = tuple(edge * n for n in places)
    brain = rng.random(shape) < share
    volume = rng.standard_normal(shape).astype(np.float32) * brain
    patch_P3 = patch_places(brain, edge)
    gathered = gather(volume, patch_P3, edge)
    np.testing.assert_array_equal(scatter(gathered, patch_P3, shape, edge), volume)
    # by the definition: voxel (i, j, k) of a patch is number (i * edge + j) * edge + k
    kept = []
    for x in range(places[0]):
        for y in range(places[1]):
            for z in range(places[2]):
                block = (
                    slice(x * edge, (x + 1) * edge),
                    slice(y * edge, (y + 1) * edge),
                    slice(z * edge, (z + 1) * edge),
                )
                if brain[block].any():
                    np.testing.assert_array_equal(gathered[len(kept)], volume[block].ravel())
                    kept.append((x, y, z))
    assert [tuple(place) for place in patch_P3.tolist()] == kept
    slots = voxel_slots(brain, patch_P3, edge)
    np.testing.assert_array_equal(gathered.ravel()[slots], volume[brain])
    assert len(set(slots.tolist())) == brain.sum()


@settings(max_examples=30, deadline=None)
@given(
    brain=hnp.arrays(bool, (6, 5, 4)),
    labels=hnp.arrays(np.int32, (6, 5, 4), elements=st.integers(0, 4)),
    seed=st.integers(0, 1000),
)
def test_parcel_means_are_means(brain, labels, seed):
    if not (brain & (labels > 0)).any():
        return
    values = np.random.default_rng(seed).standard_normal((7, brain.sum())).astype(np.float32)
    affine = np.array([[0, -3, 0, 1], [2, 0, 0, -5], [0, 0, 4, 7], [0, 0, 0, 1.0]])
    roi, centre, number = parcel_means(values, labels, brain, affine)
    assert number.tolist() == np.unique(labels[brain & (labels > 0)]).tolist()
    for row, place, label in zip(roi, centre, number, strict=True):
        np.testing.assert_allclose(row, values[:, labels[brain] == label].mean(axis=1), atol=1e-5)
        voxels = np.argwhere(brain & (labels == label)).mean(axis=0)
        np.testing.assert_allclose(place, affine[:3, :3] @ voxels + affine[:3, 3], atol=1e-4)


def test_a_dataset_is_a_collection_of_sessions(dataset: Path):
    opened = Dataset(dataset)
    assert len(opened) == 6 and list(opened) == opened.sessions
    first = opened.sessions[0]
    assert opened[first.key] is opened[0] is first and opened[-1] is opened.sessions[-1]
    assert first.key in opened and "nobody" not in opened and first in opened and 0 not in opened
    assert first.model_copy(update={"frames": 7}) not in opened
    with pytest.raises(KeyError) as error:
        opened[first.key[:-1]]
    assert str(error.value).endswith(f"Did you mean {first.key}?") and isinstance(error.value, DatasetError)
    with pytest.raises(IndexError):
        opened[6]


def test_a_line_of_the_sessions_is_read_like_its_record(dataset: Path):
    """Version 0.1 gave sessions as dictionaries."""
    opened = Dataset(dataset)
    line = layout.read_lines(dataset / layout.SESSIONS)[0]
    record = next(one for one in opened.sessions if one.key == line["key"])
    found, expected = (opened.read(one, ("roi", "start")) for one in (line, record))
    assert found.keys() == expected.keys() and all(np.array_equal(found[name], expected[name]) for name in expected)
    with pytest.raises(DatasetError, match=r"sessions\.jsonl: zarr_offset: got nothing"):
        opened.read({name: value for name, value in line.items() if name != "zarr_offset"})


def test_a_dataset_is_a_table(dataset: Path, tmp_path: Path):
    opened = Dataset(dataset)
    table = opened.to_frame()
    assert list(table.index) == [session.key for session in opened] and table.index.name == "key"
    lines = [json.loads(line) for line in (dataset / "sessions.jsonl").read_text().splitlines()]
    assert table["frames"].tolist() == [line["frames"] for line in lines]
    assert table["labels.score"].tolist() == [line["labels"]["score"] for line in lines]


def test_a_dataset_shows_what_it_holds(dataset: Path):
    opened = Dataset(dataset)
    text, page = repr(opened), opened._repr_html_()
    for part in (str(dataset), "6 (", "synthetic", "TR 0.72 s"):
        assert part in text and part in page, part
    assert "<script>" not in as_html("<script>", {"<script>": "<script>"})
