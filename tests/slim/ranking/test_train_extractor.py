"""tools/train_extractor.py: a function of datasets and seed, the same as on the way, and only what is drawn is read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from helpers.conversions import copy_cohort
from helpers.records import data_record, scan_record
from launchers.commands import train_extractor
from shards.conversion import writer
from shards.conversion.settings import ExtractorSettings
from shards.core.cli import DONE, WRONG, run
from shards.format import layout, sample
from shards.format.reader import Dataset
from shards.format.session_record import SessionRecord
from slim.ranking.extractor import Extractor

FILES = ("config.json", "extractor.safetensors")


def parcels_alone(folder: Path, splits: list[str], frames: int = 5, seed: int = 0) -> Path:
    """A dataset whose samples hold parcels and nothing else, all of them the same ones."""
    rng = np.random.default_rng(seed)
    data = sample.pack({"roi": rng.standard_normal((12, 60)), "roi_centre": rng.uniform(-60, 60, (12, 3))})
    sessions = [
        scan_record(
            key=f"lab{seed}_sub-{n:04}", cohort="lab", subject=str(n), split=split, n_kept=0, zarr_size=len(data)
        )
        for n, split in enumerate(splits)
    ]
    writer.pack(
        folder,
        sessions,
        [],
        data_record(windows={"frames": frames}),
        10**8,
        lambda line: (b"{}", data),
        lambda count, note: None,
    )
    return folder


@pytest.fixture
def train(capsys):
    """The command in this process: its status, what it printed, and the error line."""

    def call(*words: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            run(lambda: train_extractor.main([*map(str, words)]))
        printed = capsys.readouterr()
        return ended.value.code, printed.out, printed.err

    return call


def files(folder: Path) -> list[bytes]:
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    return [(folder / name).read_bytes() for name in FILES]


def test_the_same_seed_and_data_give_the_same_bytes(dataset, command, train, tmp_path):
    """In a process of its own and in this one, whatever drew random numbers here before."""
    done = command("tools/train_extractor.py", dataset, "--out", tmp_path / "one", "--steps", 3, "--json")
    assert done.returncode == DONE, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    extractor = Extractor.load(tmp_path / "one")
    manifest = layout.read_manifest(dataset)
    assert facts["checksum"] == extractor.checksum and facts["sessions"] == manifest["sessions"]["train"]
    assert (extractor.config.steps, extractor.config.seed, extractor.config.frames) == (3, 0, 5)
    assert "train the temporal extractor: 3/3 steps" in done.stderr
    assert f"--extractor {tmp_path / 'one'}" in done.stdout
    np.random.default_rng().random()
    assert train(dataset, "--out", tmp_path / "two" / "deep", "--steps", 3)[0] == DONE
    assert files(tmp_path / "two" / "deep") == files(tmp_path / "one")
    assert train(dataset, "--out", tmp_path / "three", "--steps", 3, "--seed", 1)[0] == DONE
    assert Extractor.load(tmp_path / "three").checksum != extractor.checksum


def test_it_is_the_extractor_of_a_conversion_and_ranks_the_next_one(cohort, make_shards, train, tmp_path):
    source, out = copy_cohort(cohort, tmp_path / "cohort", 4), tmp_path / "out"
    assert make_shards(source, "--out", out, "extractor.steps=3", "extractor.sessions=2", "extractor.seed=5") == DONE
    trained = tmp_path / "trained"
    words = ("--out", trained, "--steps", 3, "--sessions", 2, "--seed", 5)
    assert train(out, *words)[0] == DONE
    assert files(trained) == files(out / layout.EXTRACTOR)
    assert make_shards(source, "--out", tmp_path / "next", "--extractor", trained) == DONE
    ranker = layout.read_manifest(tmp_path / "next")["ranker"]
    assert ranker["name"] == "mutual" and ranker["extractor"] == Extractor.load(trained).checksum


def test_of_thousands_of_sessions_only_those_drawn_are_read(train, tmp_path, monkeypatch):
    splits = ["train", "train", "train", "val", "test"] * 500
    folder = parcels_alone(tmp_path / "data", splits)
    read: list[SessionRecord] = []
    reading = Dataset.read

    def watched(self, session, names=None, windows=None):
        read.append(session)
        assert set(names) == {"roi", "roi_centre"}
        return reading(self, session, names, windows)

    monkeypatch.setattr(Dataset, "read", watched)
    status, printed, _ = train(folder, "--out", tmp_path / "out", "--steps", 1, "--json")
    facts = json.loads(printed.splitlines()[-1])
    assert status == DONE and (facts["sessions"], facts["of"]) == (24, 1500)
    assert len({session.key for session in read}) == len(read) == 24
    assert {session.split for session in read} == {"train"}


def test_sessions_are_drawn_by_seed_and_key_alone():
    keys = [f"lab_sub-{n:04}" for n in range(3000)]
    drawn = {seed: ExtractorSettings(seed=seed).draw(keys, str) for seed in range(3)}
    for seed, chosen in drawn.items():
        assert chosen == sorted(chosen) and len(set(chosen)) == 24
        assert ExtractorSettings(seed=seed).draw(reversed(keys), str) == chosen
    assert len({tuple(chosen) for chosen in drawn.values()}) == 3
    assert set(drawn[0]) < set(ExtractorSettings(sessions=200).draw(keys, str))
    tenths = [int(key[-4:]) // 300 for seed in range(40) for key in ExtractorSettings(seed=seed).draw(keys, str)]
    assert np.bincount(tenths).min() > 60 and np.bincount(tenths).max() < 140  # 96 expected of each tenth


def test_several_datasets_are_one_pool(train, tmp_path):
    one = parcels_alone(tmp_path / "one", ["train"] * 3)
    two = parcels_alone(tmp_path / "two", ["train"] * 2 + ["val"], seed=1)
    status, printed, _ = train(one, two, "--out", tmp_path / "both", "--steps", 2, "--json")
    facts = json.loads(printed.splitlines()[-1])
    assert status == DONE and (facts["sessions"], facts["of"]) == (5, 5)
    assert train(two, one, "--out", tmp_path / "turned", "--steps", 2)[0] == DONE
    assert files(tmp_path / "turned") == files(tmp_path / "both")
    assert train(one, "--out", tmp_path / "alone", "--steps", 2)[0] == DONE
    assert Extractor.load(tmp_path / "alone").checksum != facts["checksum"]


def test_calls_that_cannot_be_meant_are_refused_in_one_line(train, tmp_path):
    data = parcels_alone(tmp_path / "data", ["train"])
    untrained = parcels_alone(tmp_path / "untrained", ["val", "test"])
    longer = parcels_alone(tmp_path / "longer", ["train"], frames=6)
    other, file, killed = tmp_path / "other", tmp_path / "file", tmp_path / "killed"
    for folder in (other, killed):
        folder.mkdir()
    (other / "notes.txt").write_text("mine")
    file.write_text("mine")
    new = tmp_path / "new"
    for words, told in (
        ((data, "--out", other), [other, "--out: got a folder with notes.txt, expected a new or empty folder"]),
        ((data, "--out", file), [file, "--out: got a file, expected a folder"]),
        ((data, "--out", file / "below"), [file / "below", "--out: got Not a directory"]),
        ((untrained, "--out", new), [untrained, "train: got no session, expected at least one to learn from"]),
        ((data, untrained, "--out", new), [untrained, "train: got no session"]),
        ((data, longer, "--out", new), [longer, "windows.frames: got 6, expected 5, those of", data]),
        ((data, data, "--out", new), [data, "a second time"]),
        ((tmp_path / "none", "--out", new), [tmp_path / "none", "no such folder"]),
        ((data, "--out", new, "--steps", 0), ["steps: got 0, expected greater than or equal to 1"]),
        ((data, "--out", new, "--sessions", 257), ["sessions: got 257, expected less than or equal to 256"]),
        ((data, "--out", new, "--seed", -1), ["seed: got -1"]),
    ):
        status, _, error = train(*words)
        assert status == WRONG and error.count("\n") == 1, error
        for part in told:
            assert str(part) in error
        assert not new.exists()
    assert (other / "notes.txt").read_text() == file.read_text() == "mine"

    (killed / FILES[1]).write_bytes(b"half")  # what a call leaves that is killed while it saves
    (killed / f".{FILES[0]}.1.tmp").write_bytes(b"half")
    assert train(data, "--out", killed, "--steps", 1)[0] == DONE
    before = Extractor.load(killed).checksum
    status, _, error = train(data, "--out", killed, "--steps", 2)  # a trained extractor is nobody's to overwrite
    assert status == WRONG and "config.json" in error and Extractor.load(killed).checksum == before
