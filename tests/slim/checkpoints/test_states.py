"""Files of a checkpoint run nothing when they are read, whoever wrote them."""

from __future__ import annotations

import os
import subprocess
import sys
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


def processes(count: int, folder: Path, stage: int, what: str) -> list[str]:
    """What so many processes of `tests/helpers/states.py` print."""
    store = folder / f"store-{what}-{count}"
    store.unlink(missing_ok=True)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "tests/helpers/states.py"]
    started = [
        subprocess.Popen(
            [*words, *map(str, (rank, count, store, folder, stage, what))],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    ended = [child.communicate(timeout=300) for child in started]
    assert all(child.returncode in (0, 2) for child in started), ended
    return [out.strip() for out, _ in ended]


def poison(folder: Path, marker: Path) -> list[Path]:
    """Put a payload beside what DeepSpeed wrote into each of its files, and seal the checkpoint again."""
    files = sorted(folder.glob("*.pt"))
    for path in files:
        content = torch.load(path, weights_only=False)
        torch.save({**content, "more": Payload(marker)}, path)
    facts = {"step": 2, "world_size": checkpoint.facts(folder)["world_size"]}
    (folder / checkpoint.COMPLETE).unlink()
    checkpoint.seal(folder, facts)
    assert checkpoint.fault(folder) is None
    return files


@pytest.mark.parametrize(
    ("stage", "saved_by"),
    [
        (0, 1),
        (2, 1),
        *(pytest.param(stage, count, marks=pytest.mark.slow) for stage, count in ((1, 1), (2, 2), (3, 1), (3, 2))),
    ],
)
def test_a_payload_in_a_checkpoint_is_refused_by_as_many_processes_and_by_others(
    tmp_path: Path, stage: int, saved_by: int
) -> None:
    processes(saved_by, tmp_path, stage, "save")
    counts = (1,) if stage == 0 else (1, 2)  # stage 0 has one way for any number
    good = {line for count in counts for line in processes(count, tmp_path, stage, "load")}
    assert len(good) == 1 and "LOADED {'step': 2, 'consumed': 2" in good.pop()
    marker = tmp_path / "executed"
    folder = tmp_path / "checkpoints" / checkpoint.tag(2)
    poison(folder, marker)
    for count in counts:
        for line in processes(count, tmp_path, stage, "load"):
            assert line.startswith(f"REFUSED {folder}/") and ".pt: got a pickle that contains " in line
            assert "mkdir" in line and len(line.splitlines()) == 1
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
