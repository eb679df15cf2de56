"""Files of a checkpoint run nothing when they are read, whoever wrote them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from helpers.commands import ROOT
from helpers.pretrained import STRADDLING, write_run
from slim.checkpoints import checkpoint, weights, zero_states
from slim.checkpoints.checkpoint import CheckpointError


class Payload:
    """A pickle of it calls `os.mkdir` where it is read."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def processes(count: int, store: Path, what: str, runs: Sequence[str]) -> list[list[str]]:
    """The lines that each of so many processes of `tests/helpers/states.py` prints."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen(
            [sys.executable, "tests/helpers/states.py", str(rank), str(count), str(store), what, *runs],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    ended = [child.communicate(timeout=300) for child in started]
    assert all(child.returncode == 0 for child in started), ended
    return [[line for line in out.splitlines() if line.startswith(("LOADED", "REFUSED"))] for out, _ in ended]


def poison(run: Path, kind: str, marker: Path) -> None:
    """Put a payload beside what DeepSpeed wrote into the files of one kind, and seal the checkpoint again."""
    folder = run / "checkpoints" / checkpoint.tag(2)
    paths = sorted(folder.glob(f"*{kind}.pt"))
    for path in paths:
        content = torch.load(path, weights_only=False)
        torch.save({**content, "more": Payload(marker)}, path)
    facts = {"step": 2, "world_size": checkpoint.facts(folder)["world_size"]}
    (folder / checkpoint.COMPLETE).unlink()
    checkpoint.seal(folder, facts)
    assert paths and checkpoint.fault(folder) is None


STAGES = (0, 1, 2, 3)
KINDS = ("model_states", "optim_states")  # of files; stage 0 writes the first only


@pytest.fixture(scope="module", params=[1, 2])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each ZeRO stage, saved by one process or by two."""
    folder = tmp_path_factory.mktemp("states")
    runs = [f"{folder}/stage-{stage}:{stage}" for stage in STAGES]
    processes(request.param, folder / "store", "save", runs)
    return folder


@pytest.mark.parametrize("count", [1, 2])
def test_a_payload_in_a_checkpoint_of_any_stage_is_refused(saved: Path, count: int, tmp_path: Path) -> None:
    """By as many processes as wrote it and by others; from the run, and from its mirror when the run is lost."""
    marker = tmp_path / "executed"
    good, bad = [], []
    for stage in STAGES:
        shutil.copytree(saved / f"stage-{stage}", tmp_path / f"good-{stage}")
        good.append(f"{tmp_path}/good-{stage}:{stage}")
        for kind in KINDS[: 1 if stage == 0 else 2]:
            run = shutil.copytree(saved / f"stage-{stage}", tmp_path / f"{kind}-{stage}")
            poison(run, kind, marker)
            bad += [f"{run}:{stage}", f"{run}-lost:{stage}:{run}"]
    for lines in processes(count, tmp_path / "store", "load", good + bad):
        loaded = [json.loads(line.removeprefix("LOADED ")) for line in lines[: len(good)]]
        refused = lines[len(good) :]
        assert all((state["step"], state["consumed"]) == (2, 2) for state in loaded)
        assert all(state["losses"] == pytest.approx(loaded[0]["losses"], rel=1e-5) for state in loaded), loaded
        for told, line in zip(bad, refused, strict=True):
            assert line.startswith(f"REFUSED {told.split(':')[0]}/checkpoints/{checkpoint.tag(2)}/"), line
            assert ".pt: got a pickle that contains " in line and "mkdir" in line
    assert not marker.exists()


def test_what_torch_cannot_read_is_one_line_with_the_files_name(tmp_path: Path) -> None:
    path, marker = tmp_path / "a.pt", tmp_path / "executed"
    torch.save({"a": torch.arange(3), "b": [1, "two", None]}, path)
    assert zero_states.read(path)["b"] == [1, "two", None]
    torch.save({"a": Payload(marker)}, path, _use_new_zipfile_serialization=False)
    for mmap in (False, True):
        with pytest.raises(CheckpointError, match=r"a\.pt: got .*, expected tensors, numbers and text"):
            zero_states.read(path, mmap=mmap)
    for content in (b"", b"PK\x03\x04", b"\x80\x04.", bytes(100)):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"a\.pt: got a"):
            zero_states.read(path)
    torch.save({"a": torch.arange(3)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"a\.pt: got a file that is not a zip archive"):
        zero_states.read(path)
    torch.save({"a": torch.zeros(10**5)}, path)
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in archive.namelist():
            bomb.writestr(name, archive.read(name))
    with pytest.raises(CheckpointError, match=r"b\.pt: got a compressed zip archive"):
        zero_states.read(tmp_path / "b.pt")
    torch.save([1], path)
    with pytest.raises(CheckpointError, match="an object of type list"):
        zero_states.read(path)
    with pytest.raises(CheckpointError, match="No such file"):
        zero_states.read(tmp_path / "nothing.pt")
    assert not marker.exists()


@pytest.mark.parametrize(
    "state", [{}, {"step": -1, "consumed": 0}, {"step": 1, "consumed": "2"}, {"step": 1, "consumed": 2, "skipped": 3}]
)
def test_a_state_without_its_numbers_is_refused(tmp_path: Path, state: dict) -> None:
    with pytest.raises(CheckpointError, match=r": (step|consumed|skipped): got .*, expected "):
        checkpoint.checked_state(tmp_path, state)


def test_fine_tuning_and_features_read_no_pickle(dataset: Path, tmp_path: Path) -> None:
    """They begin with the safetensors of a checkpoint, whatever lies beside it."""
    folder = write_run(tmp_path / "run", dataset, STRADDLING) / "checkpoints" / checkpoint.tag(7)
    marker = tmp_path / "executed"
    torch.save({"more": Payload(marker)}, folder / "mp_rank_00_model_states.pt")
    (folder / checkpoint.COMPLETE).unlink()
    checkpoint.seal(folder, {"step": 7})
    found = weights.find(tmp_path / "run")
    assert checkpoint.read_weights(found.path, found.prefix) and not marker.exists()
