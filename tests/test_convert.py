"""Cohorts to datasets: the same bytes however the work was cut or killed, nothing done twice, refusals by name."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import GRID, ROOT

from shards import layout, writer
from shards.cohort import find_runs
from shards.console import DONE, REFUSED, WRONG
from shards.convert import Conversion, ConvertSettings, fingerprint
from shards.errors import ConfigError, DatasetError
from shards.harmonise import harmonise
from shards.patches import voxel_slots
from shards.reader import Dataset
from shards.settings import check, override
from slim.saliency import make_ranker
from slim.temporal import parcels_from_mask

SETTINGS = check(ConvertSettings, override({}, GRID), "test")
RIDGE = {"name": "ridge", "extractor": None}


@pytest.fixture
def make_shards(monkeypatch):
    """The command in this process: its exit status."""
    spec = importlib.util.spec_from_file_location("make_shards", ROOT / "tools" / "make_shards.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    def write_page(out: Path) -> Path:
        """In place of the page, which has its own tests and takes longer than the rest."""
        path = out / layout.REPORT / "index.html"
        layout.write_atomically(path, "page")
        return path

    monkeypatch.setattr(tool.page, "write", write_page)

    def call(*words: object) -> int:
        workers = [] if "--workers" in words else ["--workers", 1]
        monkeypatch.setattr(sys, "argv", ["make_shards.py", *map(str, words), *map(str, workers), *GRID])
        with pytest.raises(SystemExit) as ended:
            tool.run(tool.main)
        return ended.value.code

    return call


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
    return {path.as_posix(): path.stat().st_mtime_ns for path in dataset.rglob("*")}


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


def conversion(cohorts: list[Path], out: Path, **changes) -> Conversion:
    return Conversion(cohorts, out, SETTINGS.model_copy(update=changes), RIDGE, parcels_from_mask, 1)


@pytest.mark.slow
def test_two_workers_write_what_one_writes(cohort, dataset, make_shards, tmp_path):
    assert make_shards(cohort / "cohort.yaml", "--out", tmp_path / "out", "--ranker", "ridge", "--workers", 2) == DONE
    same(tmp_path / "out", dataset)


@pytest.mark.slow
def test_steps_one_by_one_write_what_one_call_writes(cohort, dataset, make_shards, tmp_path):
    call = [cohort / "cohort.yaml", "--out", tmp_path / "out", "--ranker", "ridge", "--only"]
    assert make_shards(*call, "pack") == WRONG  # too early, and told so
    assert make_shards(*call, "find,harmonise") == DONE
    assert not (tmp_path / "out" / layout.MANIFEST).exists()
    for bold in bold_files(copy := Path(shutil.copytree(cohort, tmp_path / "copy"))):
        make_unreadable(bold)  # from here on the runs need not be read
    call[0] = copy / "cohort.yaml"
    assert make_shards(*call, "rank") == DONE
    assert make_shards(*call, "pack") == DONE
    same(tmp_path / "out", dataset)


def test_a_second_call_reads_nothing_and_writes_nothing(cohort, dataset, make_shards, tmp_path):
    source, out = copy_cohort(cohort, tmp_path / "cohort"), Path(shutil.copytree(dataset, tmp_path / "out"))
    for bold in bold_files(tmp_path / "cohort"):
        make_unreadable(bold)
    before = times(out)
    assert make_shards(source, "--out", out, "--ranker", "ridge") == DONE
    assert times(out) == before


@pytest.mark.slow
def test_a_new_subject_alone_is_read_and_the_bytes_are_those_of_all_at_once(cohort, dataset, make_shards, tmp_path):
    source, out = copy_cohort(cohort, tmp_path / "cohort", 5), tmp_path / "out"
    assert make_shards(source, "--out", out, "--ranker", "ridge") == DONE
    for bold in bold_files(tmp_path / "cohort"):
        make_unreadable(bold)
    shutil.copytree(cohort / "sub-06", tmp_path / "cohort" / "sub-06")
    assert make_shards(source, "--out", out, "--ranker", "ridge") == DONE
    same(out, dataset)


def children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to see the workers")
def test_killed_at_random_moments_it_goes_on_to_the_same_bytes(cohort, dataset, make_shards, tmp_path):
    out = tmp_path / "out"
    words = ["tools/make_shards.py", cohort / "cohort.yaml", "--out", out, "--ranker", "ridge", "--workers", 2, *GRID]
    rng, workers = random.Random(0), []
    for attempt in range(4):
        process = subprocess.Popen(
            [sys.executable, *map(str, words)],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        members = out / layout.WORK / "members"
        patience = time.monotonic() + 60
        # wait until there is something to lose, then a random moment more
        while process.poll() is None and time.monotonic() < patience:
            if len(list(members.glob("[!.]*.json"))) > attempt or (out / layout.MANIFEST).exists():
                break
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        workers += children(process.pid)
        process.kill()
        process.wait()
    assert make_shards(*words[1 : -len(GRID)]) == DONE
    same(out, dataset)
    assert workers
    patience = time.monotonic() + 20
    while any(map(alive, workers)) and time.monotonic() < patience:
        time.sleep(0.05)
    assert not any(map(alive, workers)), "workers outlive the command that was killed"


LONG_WORK = """
import multiprocessing, time
from concurrent.futures import ProcessPoolExecutor
from shards.convert import _end_with_parent
if __name__ == "__main__":
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _end_with_parent)
    print(pool.submit(abs, -1).result(), flush=True)
    pool.submit(time.sleep, 600)
    time.sleep(600)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to see the workers")
def test_workers_end_in_the_midst_of_a_run_when_the_command_is_killed(tmp_path):
    (tmp_path / "long_work.py").write_text(LONG_WORK)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "long_work.py"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout.readline() == b"1\n"
    workers = children(process.pid)
    assert workers
    process.kill()
    process.wait()
    process.stdout.close()
    patience = time.monotonic() + 10
    while any(map(alive, workers)) and time.monotonic() < patience:
        time.sleep(0.05)
    left = [pid for pid in workers if alive(pid)]
    for pid in left:
        os.kill(pid, 9)
    assert not left


class Killed(BaseException):
    """What stands for kill -9 in one process: nothing after it is done."""


FILE_OPERATIONS = [(os, "fsync"), (Path, "rename"), (Path, "unlink"), (shutil, "rmtree"), (Path, "mkdir")]


def kill_at(monkeypatch, number: int | None) -> list[int]:
    """Let the process "die" before its file operation of this number; returns the count of operations."""
    count = [0]
    for owner, name in FILE_OPERATIONS:
        original = getattr(owner, name)

        def counted(*args, _original=original, **kwargs):
            count[0] += 1
            if number is not None and count[0] > number:
                raise Killed
            return _original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)
    return count


def sessions_of(number: int) -> list[dict]:
    return [
        {
            "key": f"k{i}",
            "cohort": "c",
            "subject": str(i),
            "split": "train" if i else "val",
            "zarr_size": 600,
            "fingerprint": str(number),
        }
        for i in range(number)
    ]


def pack_into(folder: Path, number: int) -> None:
    writer.finish_commit(folder)
    writer.pack(
        folder,
        sessions_of(number),
        [],
        {"format": 1, "number": number},
        1000,
        lambda s: (layout.dump({"key": s["key"]}).encode(), f"{number} {s['key']}".encode() * 100),
        lambda count, note: None,
    )


def test_killed_before_any_file_operation_the_old_or_the_new_dataset_is_whole(monkeypatch, tmp_path):
    """All moments of putting a set in place, one after the other, on top of an older set and on an empty folder."""
    for existing in (0, 3):
        start, new = tmp_path / f"start{existing}", tmp_path / f"new{existing}"
        start.mkdir()
        if existing:
            pack_into(start, existing)
        old = contents(start)
        shutil.copytree(start, new)
        with monkeypatch.context() as patch:
            count = kill_at(patch, None)
            pack_into(new, 4)
        expected, total = contents(new), count[0]
        assert total > 10 and expected != old
        whole = []
        for number in range(total):
            folder = tmp_path / f"{existing}-{number}"
            shutil.copytree(start, folder)
            with monkeypatch.context() as patch, pytest.raises(Killed):
                kill_at(patch, number)
                pack_into(folder, 4)
            writer.finish_commit(folder)
            assert contents(folder) in (old, expected), number
            whole.append(contents(folder) == expected)
            pack_into(folder, 4)
            assert contents(folder) == expected
        assert whole == sorted(whole) and True in whole and False in whole  # the new one from some moment on


def test_shards_are_closed_at_their_size(tmp_path):
    pack_into(tmp_path, 5)
    manifest = layout.read_manifest(tmp_path)
    assert [(s["name"], s["samples"]) for s in manifest["shards"]] == [
        ("train-000000.tar", 2),
        ("train-000001.tar", 2),
        ("val-000000.tar", 1),
    ]


@pytest.fixture(scope="module")
def opened(cohort, dataset, tmp_path_factory) -> Iterator[tuple[Path, Path]]:
    out = tmp_path_factory.mktemp("opened") / "out"
    shutil.copytree(dataset, out)
    yield cohort / "cohort.yaml", out


def test_two_configurations_in_one_folder_are_refused(opened, tmp_path):
    source, out = opened
    before = contents(out)
    conversion([source], out).open()
    other = SETTINGS.windows.model_copy(update={"keep": 16})
    with pytest.raises(DatasetError, match="configuration"):
        conversion([source], out, windows=other).open()
    half = conversion([source], tmp_path / "half")  # before anything is packed as well
    half.open()
    assert not (tmp_path / "half").exists()  # a call that is wrong in its cohorts leaves nothing behind
    half.begin()
    with pytest.raises(DatasetError, match="configuration"):
        conversion([source], tmp_path / "half", windows=other).open()
    assert contents(out) == before


def test_another_extractor_in_one_folder_is_refused(opened):
    """Say the folder of the extractor was lost and another was trained: scores would not be comparable."""
    source, out = opened
    again = conversion([source], out)
    again.open()
    again.find()
    with pytest.raises(DatasetError, match="extractor"):
        again.pack({**make_ranker("ridge").identity(), "extractor": "another"})


def test_a_dataset_is_not_made_of_fewer_cohorts(opened, cohort, tmp_path):
    _, out = opened
    tree = yaml.safe_load((cohort / "cohort.yaml").read_text())
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump({**tree, "name": "other", "root": str(cohort)}))
    again = conversion([other], out)
    again.open()
    with pytest.raises(DatasetError, match="synthetic"):
        again.find()


def test_the_same_cohort_twice_is_refused(opened, tmp_path):
    source, _ = opened
    with pytest.raises(ConfigError, match="a second time"):
        conversion([source, source], tmp_path / "out").find()


@pytest.mark.parametrize("content", ["a file", "a folder with other files", "a path below a file"])
def test_a_folder_that_is_no_dataset_is_left_alone(opened, tmp_path, content):
    out = tmp_path / "out"
    if content == "a folder with other files":
        out.mkdir()
        (out / "thesis.tex").write_text("precious")
    else:
        out.write_text("precious")
    if content == "a path below a file":
        out = out / "below"
    wrong = conversion([opened[0]], out)
    with pytest.raises(DatasetError, match="--out"):
        wrong.open()
        wrong.begin()


def test_a_stratum_is_divided_like_the_whole(opened, tmp_path):
    source, _ = opened
    settings = SETTINGS.split.model_copy(update={"stratify": "group"})
    found = conversion([source], tmp_path / "out", split=settings)
    found.find()
    assert set(found.splits) == {("synthetic", f"0{number}") for number in range(1, 7)}
    with pytest.raises(ConfigError, match=r"split\.stratify"):
        conversion([source], tmp_path / "out", split=SETTINGS.split.model_copy(update={"stratify": "age"})).find()


def test_everything_a_sample_depends_on_changes_its_fingerprint(cohort, tmp_path):
    source = copy_cohort(cohort, tmp_path / "cohort", 1)
    (run,) = find_runs(source)
    seen = {fingerprint(run)}
    assert fingerprint(find_runs(source)[0]) in seen

    def changed() -> bool:
        now = fingerprint(find_runs(source)[0])
        new = now not in seen
        seen.add(now)
        return new

    assert run.mask and run.confounds
    for path in (run.bold, run.mask, run.confounds, run.bold.with_name(run.bold.name.replace(".nii.gz", ".json"))):
        path.write_bytes(path.read_bytes() + b" ")
        assert changed(), path
    table = tmp_path / "cohort" / "participants.tsv"
    table.write_text(table.read_text().replace("\tA\t", "\tC\t").replace("\tB\t", "\tC\t"))
    assert changed()
    source.write_text(source.read_text() + "tr: 0.75\n")
    assert changed()


@pytest.mark.slow
def test_broken_runs_are_refused_by_name_and_the_rest_goes_on(cohort, dataset, make_shards, tmp_path, capsys):
    source, out = copy_cohort(cohort, tmp_path / "cohort"), tmp_path / "out"
    first, second, *_ = bold_files(tmp_path / "cohort")
    intact = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (first, second)}
    first.write_bytes(b"this is no image")
    second.write_bytes(intact[second][0][:-2000])
    words = [source, "--out", out, "--ranker", "ridge", "--json"]
    assert make_shards(*words) == REFUSED
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (facts["sessions"], facts["refused"]) == (4, 2)
    failed = layout.read_lines(out / layout.FAILED)
    for line, path, why in zip(failed, (first, second), ("a NIfTI run", "a complete file"), strict=True):
        assert line["source"] == path.relative_to(tmp_path / "cohort").as_posix() and why in line["reason"]
        assert line["source"] in line["reason"] and "\n" not in line["reason"] and line["key"] in line["key"]
    kept = {session["key"] for session in Dataset(out).sessions}
    assert len(kept) == 4 and not kept & {line["key"] for line in failed}

    before = times(out)
    assert make_shards(*words) == REFUSED  # told again, and nothing written anew
    assert "a NIfTI run" in capsys.readouterr().out
    after = times(out)
    assert {path: at for path, at in after.items() if f"/{layout.WORK}" not in path} == {
        path: at for path, at in before.items() if f"/{layout.WORK}" not in path
    }

    for path, (content, mtime) in intact.items():
        path.write_bytes(content)
        os.utime(path, ns=(mtime, mtime))
    assert make_shards(*words) == DONE  # mended
    same(out, dataset)


def test_a_run_that_is_too_short_is_refused(cohort, make_shards, tmp_path, capsys):
    source = copy_cohort(cohort, tmp_path / "cohort", 1)
    assert make_shards(source, "--out", tmp_path / "out", "--ranker", "ridge", "windows.minimum=13") == WRONG
    error = capsys.readouterr().err.splitlines()[-1]
    assert "12 windows of 5 frames" in error and "at least 13" in error and "sub-01" in error


def test_dry_run_writes_nothing_and_lists_what_was_found(cohort, make_shards, tmp_path, capsys):
    before = times(cohort)
    assert make_shards(cohort / "cohort.yaml", "--out", tmp_path / "out", "--dry-run", "--json") == DONE
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == {"runs": 6, "subjects": 6}
    assert sum("sub-0" in line and "desc-brain_mask" in line for line in lines) == 6
    assert not (tmp_path / "out").exists() and times(cohort) == before


@pytest.mark.slow
def test_the_trained_ranker_end_to_end(cohort, make_shards, tmp_path, capsys):
    """Mutual masked reconstruction: the extractor is trained once, kept beside the dataset, and named by it."""
    source, out = copy_cohort(cohort, tmp_path / "cohort", 4), tmp_path / "out"
    steps = "extractor.steps=3"
    (out / layout.EXTRACTOR).mkdir(parents=True)  # what a call leaves that is killed while it saves the extractor
    (out / layout.WORK).mkdir()
    (out / layout.EXTRACTOR / "extractor.safetensors").write_bytes(b"half")
    assert make_shards(source, "--out", out, steps, "windows.keep=5") == DONE
    dataset = Dataset(out)
    ranker = make_ranker("mutual", out / layout.EXTRACTOR)
    assert dataset.manifest["ranker"] == ranker.identity() and dataset.manifest["ranker"]["extractor"]
    for session in dataset.sessions:
        arrays = dataset.read(session, ("roi", "roi_centre", "scores", "saliency", "start"))
        scores = ranker.scores(arrays["roi"], arrays["roi_centre"], 5)
        np.testing.assert_allclose(arrays["scores"], scores, rtol=1e-5)
        best = np.sort(arrays["scores"])[::-1][:5]
        np.testing.assert_array_equal(arrays["saliency"], best)
        np.testing.assert_array_equal(arrays["scores"][arrays["start"] // 5], best)
        assert len(arrays["scores"]) == 12

    given = tmp_path / "given"
    assert make_shards(source, "--out", given, steps, "windows.keep=5", "--extractor", out / layout.EXTRACTOR) == DONE
    assert [path.read_bytes() for path in sorted((given / "shards").iterdir())] == [
        path.read_bytes() for path in sorted((out / "shards").iterdir())
    ]
    assert make_shards(source, "--out", given, "--ranker", "ridge", "--extractor", out / layout.EXTRACTOR) == WRONG
    assert "--extractor" in capsys.readouterr().err.splitlines()[-1]


def test_windows_are_those_of_the_harmonised_run(cohort, dataset):
    """Frame for frame where `start` says, within a thousandth of each voxel's SD."""
    ours = Dataset(dataset)
    for run, session in zip(find_runs(cohort / "cohort.yaml"), ours.sessions, strict=True):
        arrays = ours.read(session)
        result = harmonise(run, SETTINGS.grid)
        zscored_TN = (result.raw_TN - result.raw_TN.mean(dtype=float)) / result.raw_TN.std(dtype=float)
        squares, brain = 0.0, arrays["brain"].astype(bool)
        slots = np.argsort(voxel_slots(result.brain_XYZ, arrays["patch"], 4))
        for start, window in zip(arrays["start"], arrays["windows"].astype(float), strict=True):
            stored = (arrays["baseline"] + window)[:, brain]
            squares += (stored - zscored_TN[start : start + 5][:, slots]) ** 2
        error = np.sqrt(squares.sum(axis=0) / (5 * len(arrays["start"])))
        assert (error <= 1.01e-3 * arrays["spread"][brain]).all()


@pytest.mark.slow
def test_a_run_that_is_no_longer_found_is_left_out_and_said(cohort, dataset, make_shards, tmp_path, capsys):
    """What vanished from the cohort does not vanish from the dataset without a word."""
    shutil.copytree(dataset, tmp_path / "out")
    fewer = copy_cohort(cohort, tmp_path / "cohort", subjects=5)
    assert make_shards(fewer, "--out", tmp_path / "out", "--ranker", "ridge") == DONE
    said = capsys.readouterr().out
    gone = next(line["key"] for line in Dataset(dataset).sessions if line["subject"] == "06")
    assert f"left out: {gone} is no longer found" in said
    assert gone not in {line["key"] for line in Dataset(tmp_path / "out").sessions}
