"""Datasets read from elsewhere: a real web server, memory, and everything that can be wrong with them."""

from __future__ import annotations

import io
import json
import multiprocessing
import pickle
import shutil
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from helpers.commands import ROOT, Command
from helpers.records import data_record, scan_record
from helpers.web import Web, serve
from shards.conversion import writer
from shards.core.errors import DatasetError, SampleCorrupt
from shards.format import sample
from shards.format.reader import Dataset
from shards.format.stream import Item, MicroBatches, Stream
from slim.config import load_config


@pytest.fixture(scope="module")
def web(dataset: Path) -> Iterator[Web]:
    with serve(dataset) as web:
        yield web


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset, tmp_path / "copy"))


@pytest.fixture
def bucket(dataset: Path) -> Iterator[str]:
    """The dataset in the memory of this process."""
    memory = fsspec.filesystem("memory")
    memory.put(str(dataset), "/bucket/ds", recursive=True)
    yield "memory://bucket/ds"
    memory.rm("/bucket", recursive=True)


def equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name, values in a.items():
        assert values.dtype == b[name].dtype
        np.testing.assert_array_equal(values, b[name], err_msg=name)


def same_dataset(far: Dataset, near: Dataset) -> None:
    assert far.manifest == near.manifest and far.sessions == near.sessions and len(near.sessions) == 6
    assert far.grid == near.grid and far.frames == near.frames
    for session in near.sessions:
        equal(far.read(session), near.read(session))


def test_a_web_server_gives_what_the_folder_gives(web: Web, dataset: Path) -> None:
    same_dataset(Dataset(web.url), Dataset(dataset))
    same_dataset(Dataset(web.url + "/"), Dataset(dataset))
    assert str(Dataset(web.url).folder) == web.url


def test_memory_gives_what_the_folder_gives(bucket: str, dataset: Path) -> None:
    same_dataset(Dataset(bucket), Dataset(dataset))


def test_a_file_address_is_a_plain_folder(dataset: Path) -> None:
    opened = Dataset(f"file://{dataset}")
    assert isinstance(opened.folder, Path) and opened.folder == dataset
    same_dataset(opened, Dataset(dataset))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_arrays_and_windows_are_those_of_the_folder(web: Web, dataset: Path, data: st.DataObject) -> None:
    far, near = Dataset(web.url), Dataset(dataset)
    session = data.draw(st.sampled_from(near.sessions))
    names = data.draw(st.none() | st.lists(st.sampled_from(sorted(near.read(session))), min_size=1, unique=True))
    ranks = data.draw(st.none() | st.lists(st.integers(0, session.n_kept - 1), max_size=6))
    equal(far.read(session, names, ranks), near.read(session, names, ranks))
    equal(far.read(session, names and iter(names), ranks and iter(ranks)), near.read(session, names, ranks))


def test_errors_are_those_of_the_folder(web: Web, dataset: Path) -> None:
    for names, ranks in ((("window",), None), (("windows",), [0, 999])):
        told = []
        for opened in (Dataset(web.url), Dataset(dataset)):
            with pytest.raises(SampleCorrupt) as caught:
                opened.read(opened.sessions[0], names, ranks)
            told.append(caught.value.line().removeprefix(str(opened.folder)))
        assert told[0] == told[1]


ON_A_GRID = {
    "grid": {"mm": 2.0, "shape": [96, 96, 96], "patch": 4, "centre_mm": [-1, -17, 5]},
    "windows": {"frames": 5},
}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of one sample of several MB: 64 windows of about 37 kB that cannot be compressed."""
    rng = np.random.default_rng(0)
    windows = rng.standard_normal((64, 5, 60, 64)).astype(np.float32) * np.float32(1e-6)  # int16, with a scale
    shapes = {"saliency": 64, "scores": 1, "roi": (1, 1), "roi_number": 1, "roi_centre": (1, 3), "carpet": (1, 1)}
    small = {name: rng.random(shape) for name, shape in shapes.items()}
    arrays = {
        **small,
        "baseline": rng.standard_normal((60, 64)),
        "spread": windows.std(axis=(0, 1)),
        "patch": rng.integers(0, 24, (60, 3)),
        "brain": np.ones((60, 64)),
        "start": rng.permutation(64),
        **sample.encode_windows(windows, windows.std(axis=(0, 1))),
    }
    content = sample.pack(arrays)
    session = scan_record(key="a", split="train", zarr_size=len(content), n_kept=64)
    folder = tmp_path_factory.mktemp("large") / "ds"
    writer.pack(folder, [session], [], data_record(**ON_A_GRID), 1, lambda _: (b"{}", content), lambda *_: None)
    return folder


def with_members(content: bytes, names: Collection[str]) -> io.BytesIO:
    """A zip of these members of another one."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(out, "w") as fewer:
        for name in names:
            fewer.writestr(name, archive.read(name))
    return out


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_members_that_are_fetched_are_those_that_are_read(large: Path, data: st.DataObject) -> None:
    (session,) = Dataset(large).sessions
    shard = (large / "shards" / session.shard).read_bytes()
    content = shard[session.zarr_offset :][: session.zarr_size]
    names = data.draw(st.none() | st.lists(st.sampled_from(["windows", "start", "baseline", "roi"]), min_size=1))
    ranks = data.draw(st.none() | st.lists(st.integers(0, 63), max_size=6))
    chosen = sample.members_read(zipfile.ZipFile(io.BytesIO(content)).namelist(), names, ranks)
    equal(
        sample.unpack(with_members(content, chosen), "here", names, ranks),
        sample.unpack(io.BytesIO(content), "here", names, ranks),
    )
    with pytest.raises(SampleCorrupt):  # and no other
        fewer = {*chosen} - {data.draw(st.sampled_from(chosen))}
        sample.unpack(with_members(content, fewer), "here", names, ranks)


def test_a_few_windows_cost_a_few_requests_and_few_bytes(large: Path) -> None:
    with serve(large) as web:
        far, near = Dataset(web.url), Dataset(large)
        assert len(web.of("manifest.json")) == len(web.of("sessions.jsonl")) == 1
        assert len(web.of(".tar")) == 2  # its size, and whether the server sends ranges
        (session,) = near.sessions
        names = ("baseline", "spread", "patch", "brain", "start", "windows")
        chunk = session.zarr_size / 64
        # Members are in the order of their names: those of ranks 0 and 1 are neighbours, 2 comes after 10 to 19.
        for ranks, count in (([0, 1], 2), ([*range(8)], 8), ([63, 5, 17], 5), ([], 2)):
            web.forget()
            equal(far.read(session, names, ranks), near.read(session, names, ranks))
            assert web.asked == [("GET", f"/ds/shards/{session.shard}")] * len(web.asked)
            print("COUNT", ranks, len(web.asked), web.sent / chunk)
            assert len(web.asked) <= count
            assert web.sent <= (len(ranks) + 2) * chunk < session.zarr_size / 4
        web.forget()
        equal(far.read(session), near.read(session))
        assert len(web.asked) == 2 and web.sent <= session.zarr_size + (32 << 10)


@pytest.mark.parametrize("tells", [None, "bytes", "none"])
def test_a_server_without_byte_ranges_is_refused_before_it_sends_shards(tmp_path: Path, tells: str | None) -> None:
    name, size = "train-000000.tar", 128 << 20
    (tmp_path / "shards").mkdir()
    with open(tmp_path / "shards" / name, "wb") as file:
        file.truncate(size)
    manifest = {"format": 1, "sessions": {}, "shards": [{"name": name, "bytes": size}], **ON_A_GRID}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    Dataset(tmp_path)
    with serve(tmp_path, ranges=False, tells=tells) as web:
        with pytest.raises(DatasetError, match=r"Range: got .* expected a server that supports byte ranges") as caught:
            Dataset(web.url)
        assert caught.value.where == f"{web.url}/shards/{name}"
    assert web.sent < size / 4  # what lay in the buffers of the connection when the client hung up


def test_an_address_without_a_dataset_is_refused(web: Web, bucket: str) -> None:
    for url in (web.url + "/nowhere", bucket + "x"):
        with pytest.raises(DatasetError, match=r"no manifest\.json, expected a dataset") as caught:
            Dataset(url)
        assert caught.value.line().startswith(url)


@pytest.mark.parametrize("status", [401, 403, 500, 503])
@pytest.mark.parametrize("name", ["manifest.json", "sessions.jsonl", ".tar"])
def test_a_server_that_refuses_is_told_with_its_answer(dataset: Path, name: str, status: int) -> None:
    with serve(dataset, status={name: status}) as web, pytest.raises(DatasetError, match=str(status)) as caught:
        Dataset(web.url)
    assert caught.value.where.startswith(web.url) and caught.value.where.endswith(name)


def test_a_server_that_is_not_there_is_told() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/ds"
    with pytest.raises(DatasetError, match="Connect") as caught:
        Dataset(url)
    assert caught.value.line().startswith(f"{url}/manifest.json: got ")


@pytest.mark.parametrize("name", ["manifest.json", "sessions.jsonl"])
def test_a_list_that_breaks_off_is_refused(dataset: Path, name: str) -> None:
    with serve(dataset, cut={name: 100}) as web, pytest.raises(DatasetError, match=name):
        Dataset(web.url)


def test_a_list_of_fewer_sessions_is_refused_also_here(copy: Path) -> None:
    lines = (copy / "sessions.jsonl").read_text().splitlines(keepends=True)
    (copy / "sessions.jsonl").write_text("".join(lines[:-1]))
    with serve(copy) as web:
        for folder in (copy, web.url):
            with pytest.raises(DatasetError, match=r"sessions\.jsonl: got 5 sessions, expected 6"):
                Dataset(folder)
            (copy / "sessions.jsonl").touch()


def cut(shard: Path, size: int) -> None:
    shard.write_bytes(shard.read_bytes()[:size])


SPOILED: dict[str, tuple[Callable[[Path, int], None], str, str]] = {
    "gone": (lambda shard, _: shard.unlink(), "no such file", "no such file"),
    "shorter": (
        lambda shard, end: cut(shard, end - 100),
        "bytes, expected {whole} bytes",
        "got 16284 bytes, expected 16384",
    ),
    "much shorter": (lambda shard, _: cut(shard, 20480), "20480 bytes, expected {whole} bytes", "416|got 0 bytes"),
}


@pytest.mark.parametrize("how", SPOILED)
@pytest.mark.parametrize("protocol", ["http", "memory"])
def test_a_shard_that_is_not_whole_is_told(copy: Path, how: str, protocol: str) -> None:
    """Before reading, by the manifest; and while reading, where it happens to a dataset that is open."""
    spoil, at_opening, at_reading = SPOILED[how]
    (session,) = Dataset(copy).of_split("test")
    shard = copy / "shards" / session.shard
    at_opening = at_opening.replace("{whole}", str(shard.stat().st_size))
    memory = fsspec.filesystem("memory")
    memory.put(f"{copy}/", "/spoiled/", recursive=True)
    with serve(copy) as web:
        url = {"http": web.url, "memory": "memory://spoiled"}[protocol]
        opened = Dataset(url)
        spoil(shard, session.zarr_offset + session.zarr_size)
        memory.rm("/spoiled", recursive=True)
        memory.put(f"{copy}/", "/spoiled/", recursive=True)
        where = f"{url}/shards/{shard.name}"
        with pytest.raises(DatasetError, match=at_opening) as caught:
            Dataset(url)
        assert caught.value.where == where
        with pytest.raises(SampleCorrupt, match=at_reading) as corrupt:
            opened.read(session)
        assert corrupt.value.where == f"{where} ({session.key})"
        for other in opened.of_split("train"):
            opened.read(other)
    memory.rm("/spoiled", recursive=True)


def test_an_answer_that_breaks_off_while_reading_is_told(dataset: Path) -> None:
    with serve(dataset) as web:
        opened = Dataset(web.url)
        web.cut[".tar"] = 1000
        with pytest.raises(SampleCorrupt, match="1000 of") as caught:
            opened.read(opened.sessions[0])
        assert caught.value.where.startswith(web.url) and opened.sessions[0].key in caught.value.where


def test_damaged_bytes_are_told_as_in_a_folder(copy: Path) -> None:
    (session,) = Dataset(copy).of_split("test")
    shard = copy / "shards" / session.shard
    content, end = bytearray(shard.read_bytes()), session.zarr_offset + session.zarr_size
    for at in (session.zarr_offset + session.zarr_size // 2, end - 22, end - 500):  # a chunk, and the directory
        spoiled = content.copy()
        spoiled[at : at + 20] = bytes(20)
        shard.write_bytes(spoiled)
        with serve(copy) as web:
            for opened in (Dataset(copy), Dataset(web.url)):
                with pytest.raises(SampleCorrupt, match="unreadable bytes") as caught:
                    opened.read(session)
                assert caught.value.where == f"{opened.folder}/shards/{session.shard} ({session.key})"


@pytest.mark.parametrize(
    ("url", "package"), [("https://host/ds", "aiohttp"), ("s3://bucket/ds", "s3fs"), ("gs://bucket/ds", "gcsfs")]
)
def test_a_missing_package_is_named(url: str, package: str) -> None:
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from shards.format.reader import Dataset\nfrom shards.core.errors import DatasetError\n"
        f"try: Dataset({url!r})\nexcept DatasetError as error: print(error.line())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"{url}: protocol: got a protocol without an installed package")
    assert package in line and "Install" in line


@pytest.mark.parametrize(("url", "got"), [("nosuch://x", "nosuch"), ("simplecache::https://host/ds", "a chain")])
def test_an_unknown_protocol_is_refused(url: str, got: str) -> None:
    with pytest.raises(DatasetError, match=f"^{url}: protocol: got .*{got}"):
        Dataset(url)


def _first_start(dataset: Dataset) -> np.ndarray:
    return dataset.read(dataset.sessions[0], ("start",))["start"]


def test_an_open_dataset_goes_to_other_processes(web: Web, dataset: Path) -> None:
    opened = Dataset(web.url)
    opened.read(opened.sessions[0])  # its connection is open
    same_dataset(pickle.loads(pickle.dumps(opened)), Dataset(dataset))
    with ProcessPoolExecutor(1, multiprocessing.get_context("forkserver")) as pool:
        there = pool.submit(_first_start, opened).result()
    np.testing.assert_array_equal(there, _first_start(Dataset(dataset)))


@dataclass
class Starts:
    """A micro-batch of these tests: first frames of the windows."""

    datasets: list[Dataset]

    def __call__(self, items: list[Item]) -> list[list[int]]:
        return [self.datasets[item.dataset].read(item.session, ("start",))["start"].tolist() for item in items]


def test_loading_processes_read_from_elsewhere_what_they_read_here(web: Web, dataset: Path) -> None:
    found = []
    for folder, workers in ((dataset, 0), (web.url, 2)):
        datasets = [Dataset(folder)]
        batches = MicroBatches(Stream(datasets, [1.0], "train", 0), Starts(datasets), 2, count=5)
        context = "forkserver" if workers else None
        found.append(list(DataLoader(batches, batch_size=None, num_workers=workers, multiprocessing_context=context)))
    assert found[0] == found[1] and len(found[0]) == 5


@pytest.mark.parametrize("url", ["https://host:8000/ds", "s3://bucket/ds", "memory://ds", "data/ds"])
def test_a_configuration_keeps_the_address_as_it_is(url: str, tmp_path: Path) -> None:
    path = ROOT / "configs" / "pretrain" / "tiny.yaml"
    for words in (f"data={url}", f"data=[{{path: '{url}', weight: 2}}]"):
        settings = load_config(path, [words])
        assert [item.path for item in settings.data] == [url]
        merged = tmp_path / "config.yaml"
        merged.write_text(json.dumps(json.loads(settings.model_dump_json())))
        assert load_config(merged).data == settings.data


def test_pretraining_from_elsewhere_gives_the_same_numbers(
    command: Command, web: Web, dataset: Path, tmp_path: Path
) -> None:
    results = []
    for folder in (dataset, web.url):
        out = tmp_path / str(len(results))
        done = command(
            "tools/pretrain.py",
            "configs/pretrain/tiny.yaml",
            f"data={folder}",
            f"run.out={out}",
            *("run.steps=3", "run.batch=2", "run.workers=2", "run.wandb=disabled"),
        )
        assert done.returncode == 0, done.stderr
        assert f"--data {folder} " in done.stdout
        results.append([json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()])
    assert results[0] == results[1] and len(results[0]) == 3
    task = "configs/downstream/synthetic_group.yaml"
    done = command("tools/probe.py", tmp_path / "1", "--data", f"{web.url}/nowhere", "--task", task)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {web.url}/nowhere: got no manifest.json"), done.stderr
