"""Checkpoints: complete or absent after any kill, refused by name when a byte is not as written, kept, mirrored."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.conversions import contents
from helpers.kills import Killed, kill_at
from slim.checkpoints import checkpoint, run_folder
from slim.checkpoints.checkpoint import COMPLETE, LATEST, CheckpointError, tag
from slim.checkpoints.mirror import Mirror, at_a_glance, recover

pytestmark = pytest.mark.usefixtures("alone")


class Engine:
    """Writes files named as DeepSpeed names its own."""

    def save_checkpoint(self, folder: str, tag: str, client_state: dict, save_latest: bool) -> None:
        assert not save_latest
        torch.save(client_state, Path(folder) / tag / "mp_rank_00_model_states.pt")
        torch.save(torch.arange(40.0), Path(folder) / tag / "zero_pp_rank_0_mp_rank_00_optim_states.pt")


def save(run: Path, step: int) -> Path:
    (run / "config.yaml").parent.mkdir(parents=True, exist_ok=True)
    for name in run_folder.ABOUT_RUN:
        (run / name).write_text(f"{name} of a run")
    weights = {"encoder.a": torch.full((3, 4), float(step)), "target.a": torch.zeros(2)}
    return checkpoint.save(Engine(), run / "checkpoints", step, {"step": step}, weights, {"zero_stage": 2})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("saved"), 7)


def test_complete_lists_everything(saved: Path) -> None:
    about = checkpoint.facts(saved)
    assert about["step"] == 7 and about["zero_stage"] == 2 and about["world_size"] == 1
    assert set(about["versions"]) == {"python", "torch", "deepspeed"}
    assert {*about["files"], COMPLETE} == {path.name for path in saved.iterdir()}
    assert (saved.parent / LATEST).read_text() == "step-00000007\n"
    assert checkpoint.fault(saved) is None and checkpoint.newest(saved.parent) == saved
    umask = os.umask(0o022)
    os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in saved.iterdir()} == {0o666 & ~umask}


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_flipped_bit_anywhere_is_found_and_its_file_named(saved, tmp_path_factory, data) -> None:
    copy = tmp_path_factory.mktemp("flipped") / saved.name
    shutil.copytree(saved, copy)
    path = data.draw(st.sampled_from(sorted(copy.iterdir())))
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    found = checkpoint.fault(copy)
    assert found is not None and found.where == str(path)
    assert checkpoint.newest_intact(copy.parent)[0] is None


def test_a_missing_or_cut_file_is_found_without_reading_any(saved: Path, tmp_path: Path) -> None:
    for name in checkpoint.facts(saved)["files"]:
        copy = tmp_path / name
        shutil.copytree(saved, copy)
        size = (copy / name).stat().st_size
        (copy / name).unlink()
        found = checkpoint.fault(copy, ())
        assert found is not None and found.where == str(copy / name) and not checkpoint.is_complete(copy)
        (copy / name).write_bytes(bytes(size - 1))
        assert f"got {size - 1} bytes, expected {size} bytes" in checkpoint.fault(copy, ()).line()


def test_the_one_before_is_used_and_what_was_refused_is_named(tmp_path: Path) -> None:
    run = tmp_path / "run"
    first, second, third = (save(run, step) for step in (1, 2, 3))
    (third / COMPLETE).unlink()  # never finished: nobody was promised anything
    assert recover(run, None) == (second, [])
    assert (run / "checkpoints" / LATEST).read_text() == "step-00000002\n"
    (second / "weights.safetensors").write_bytes(bytes((second / "weights.safetensors").stat().st_size))
    found, (line,) = recover(run, None)
    assert found == first
    assert f"{second}/weights.safetensors: SHA-256: got" in line and "The run resumes from step-00000001" in line
    (first / "dataset.json").unlink()
    with pytest.raises(CheckpointError, match=r"step-00000002.*No checkpoint of the run is intact"):
        recover(run, None)
    assert at_a_glance(run, None) == second  # bytes are not looked at
    (second / "config.yaml").unlink()
    with pytest.raises(CheckpointError, match=r"config.yaml.*No checkpoint of the run is intact"):
        at_a_glance(run, tmp_path / "nowhere")


def test_a_run_that_has_saved_nothing_begins(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / tag(1)).mkdir(parents=True)
    assert recover(tmp_path, tmp_path / "nowhere") == (None, [])
    assert at_a_glance(tmp_path, tmp_path / "nowhere") is None


def test_killed_before_any_file_operation_the_newest_complete_one_is_loadable(monkeypatch, tmp_path: Path) -> None:
    """Saving and pruning, at every moment, on top of two checkpoints of which one has to go."""
    start = tmp_path / "start"
    for step in (1, 2):
        save(start, step)

    def step_three(run: Path) -> None:
        checkpoint.prune((save(run, 3)).parent, 2, None)

    shutil.copytree(start, tmp_path / "whole")
    with monkeypatch.context() as patch:
        count = kill_at(patch, None)
        step_three(tmp_path / "whole")
    expected, total = contents(tmp_path / "whole"), count[0]
    assert total > 8
    newest = []
    for number in range(total):
        run = tmp_path / f"killed-{number}"
        shutil.copytree(start, run)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_at(patch, number)
            step_three(run)
        latest = (run / "checkpoints" / LATEST).read_text().strip()
        assert checkpoint.fault(run / "checkpoints" / latest) is None
        found, refused = recover(run, None)
        assert not refused and (run / "checkpoints" / LATEST).read_text() == found.name + "\n"
        newest.append(found.name)
        step_three(run)
        assert contents(run) == expected
    assert set(newest) == {tag(2), tag(3)} and newest == sorted(newest)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("step-*"))


def test_the_last_ones_and_every_so_many_steps_are_kept(tmp_path: Path) -> None:
    for step in range(1, 10):
        spared = {tmp_path / "checkpoints" / tag(5)}
        save(tmp_path, step)
        checkpoint.prune(tmp_path / "checkpoints", 2, 4, spared)
    assert names(tmp_path) == [tag(step) for step in (4, 5, 8, 9)]
    (tmp_path / "checkpoints" / tag(4) / "config.yaml").unlink()
    save(tmp_path, 6)  # gone on from before 8 and 9, which were refused
    checkpoint.prune(tmp_path / "checkpoints", 2, 4)
    assert names(tmp_path) == [tag(5), tag(6)]


COPIES = (
    "step-00000002-copy",
    "step-00000002.bak",
    "step-00000002 (copy)",
    "step-000000020",
    "step-2",
    "old-step-00000002",
)


def test_copies_that_somebody_made_stay_and_are_no_checkpoints(tmp_path: Path) -> None:
    """Of the second of nine checkpoints, under names that are other ones and under that of a later step."""
    own, kept = tmp_path / "checkpoints", [*COPIES, tag(9)]
    for step in (1, 2):
        save(tmp_path, step)
    for name in kept:
        shutil.copytree(own / tag(2), own / name)
    shutil.copyfile(own / LATEST, own / "latest.old")
    (own / tag(7)).write_text("a note")
    shutil.copytree(own / tag(1), tmp_path / "archive" / tag(1))
    shutil.rmtree(own / tag(1))
    (own / tag(1)).symlink_to(tmp_path / "archive" / tag(1))
    before = {name: contents(own / name) for name in kept}

    assert recover(tmp_path, None) == (own / tag(2), [])
    assert at_a_glance(tmp_path, None) == own / tag(2) and checkpoint.newest(own) == own / tag(2)
    for step in (3, 4):
        save(tmp_path, step)
        checkpoint.prune(own, 1, None)
        assert checkpoint.newest(own) == own / tag(step)
    assert {path.name for path in own.iterdir()} == {*kept, tag(1), tag(4), tag(7), LATEST, "latest.old"}
    assert {name: contents(own / name) for name in kept} == before
    assert checkpoint.fault(own / tag(1)) is None
    assert checkpoint.fault(own / COPIES[0]) is None  # it can be read where it is named

    save(tmp_path, 9)
    (aside,) = own.glob(f"{tag(9)}-copy-*")
    assert contents(aside) == before[tag(9)] and checkpoint.newest(own) == own / tag(9)

    mirror = Mirror(tmp_path, tmp_path / "mirror", 1, None)
    shutil.copytree(own / COPIES[0], tmp_path / "mirror" / "checkpoints" / COPIES[0])
    mirror.offer(own / tag(9))
    mirror.close()
    assert mirror.trouble is None and names(tmp_path / "mirror") == [COPIES[0], tag(9)]


def test_a_mirror_holds_what_the_run_saved(tmp_path: Path) -> None:
    run, folder = tmp_path / "run", tmp_path / "mirror"
    mirror = Mirror(run, folder, 2, 2)
    for step in range(1, 6):
        mirror.offer(save(run, step))
        mirror.close()
    assert mirror.trouble is None and not mirror.needed
    assert names(folder) == [tag(2), tag(4), tag(5)]
    for name in names(folder):
        assert contents(folder / "checkpoints" / name) == contents(run / "checkpoints" / name)
    (run / "metrics.jsonl").write_text("lines")
    (run / "configs").mkdir()
    (run / "configs/step-00000000.yaml").write_text("the first configuration")
    mirror.offer(save(run, 6))
    mirror.close()
    assert (folder / "metrics.jsonl").read_text() == "lines"
    assert (folder / "configs/step-00000000.yaml").read_text() == "the first configuration"

    (run / "checkpoints" / tag(6) / "weights.safetensors").write_bytes(b"")
    (run / "metrics.jsonl").write_text("more lines")
    assert at_a_glance(run, folder) == folder / "checkpoints" / tag(6)
    found, lines = recover(run, folder)
    assert found == run / "checkpoints" / tag(6) and checkpoint.fault(found) is None
    assert "got 0 bytes" in lines[0] and lines[1] == f"{tag(6)} was copied from the mirror {folder}"
    assert (run / "metrics.jsonl").read_text() == "more lines"
    shutil.rmtree(run)
    assert recover(run, folder)[0] == found and (run / "metrics.jsonl").read_text() == "lines"
    assert (run / "configs/step-00000000.yaml").read_text() == "the first configuration"


def test_training_does_not_wait_for_the_mirror_and_the_newest_goes_first(monkeypatch, tmp_path: Path) -> None:
    copied, begun, go_on, copy = [], threading.Event(), threading.Event(), checkpoint.copy

    def slow_copy(folder: Path, target: Path) -> Path:
        begun.set()
        assert go_on.wait(30)
        copied.append(folder.name)
        return copy(folder, target)

    monkeypatch.setattr(checkpoint, "copy", slow_copy)
    mirror = Mirror(tmp_path / "run", tmp_path / "mirror", 3, None)
    mirror.offer(save(tmp_path / "run", 1))
    assert begun.wait(30)
    for step in (2, 3):
        mirror.offer(save(tmp_path / "run", step))
        assert mirror.needed == {tmp_path / "run" / "checkpoints" / tag(n) for n in (1, step)}
    go_on.set()
    mirror.close()
    assert copied == [tag(1), tag(3)]


def test_a_mirror_that_fails_is_told_and_tried_again(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    mirror = Mirror(tmp_path / "run", tmp_path / "file" / "mirror", 3, None)
    mirror.offer(save(tmp_path / "run", 1))
    mirror.close()
    assert f"{tag(1)} was not copied to {tmp_path}/file/mirror: Not a directory" in mirror.trouble
    (tmp_path / "file").unlink()
    mirror.offer(save(tmp_path / "run", 2))
    mirror.close()
    assert mirror.trouble is None and names(tmp_path / "file" / "mirror") == [tag(2)]
    (tmp_path / "run" / "checkpoints" / tag(2) / "config.yaml").write_text("config.yaml of b run")
    (tmp_path / "file" / "mirror" / "checkpoints" / tag(2) / COMPLETE).unlink()
    mirror.offer(tmp_path / "run" / "checkpoints" / tag(2))
    mirror.close()
    assert "config.yaml: SHA-256" in mirror.trouble
    assert checkpoint.newest(tmp_path / "file" / "mirror" / "checkpoints") is None


def test_weights_are_read_back(saved: Path) -> None:
    assert torch.equal(checkpoint.read_weights(saved / "weights.safetensors", "encoder.")["a"], torch.full((3, 4), 7.0))
    assert json.loads((saved / COMPLETE).read_text())["files"]
