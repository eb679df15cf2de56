"""A full disk is known by its errno or by measuring, never by words; other failures delete nothing."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from shards.core.errors import Stopped
from shards.core.room import has_room
from slim.checkpoints import checkpoint, run_folder

pytestmark = pytest.mark.usefixtures("alone")


class Engine:
    def __init__(self, error: Exception):
        self.error = error

    def save_checkpoint(self, folder: str, tag: str, **_: object) -> None:
        (Path(folder) / tag / "mp_rank_00_model_states.pt").write_bytes(b"written")
        raise self.error


def save(run: Path, error: Exception, size: int = 1) -> Path:
    for name in run_folder.ABOUT_RUN:
        (run / name).write_text("of a run")
    weights = {"a": torch.zeros(1).expand(size)}  # of that size, in no memory
    return checkpoint.save(Engine(error), run / "checkpoints", 3, {"step": 3}, weights, {})


WORDS = [
    "inline_container.cc: no such member",
    "the quota of a server is not known",
    "No space left between layers",
    "[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598",
]


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("kind", [RuntimeError, OSError, ValueError, SafetensorError])
def test_words_are_no_full_disk_and_delete_nothing(kind: type[Exception], words: str, tmp_path: Path) -> None:
    with pytest.raises(kind):
        save(tmp_path, kind(words))
    assert (tmp_path / "checkpoints" / checkpoint.tag(3) / "mp_rank_00_model_states.pt").read_bytes() == b"written"


@pytest.mark.parametrize(
    ("error", "size"),
    [
        (OSError(errno.ENOSPC, "whatever a system calls it"), 1),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 1),
        (RuntimeError("words of torch"), 2**48),  # for so many bytes no disk has room
        (SafetensorError("words of safetensors"), 2**48),
    ],
)
def test_a_full_disk_stops_the_run_and_leaves_no_half_of_a_checkpoint(error, size: int, tmp_path: Path) -> None:
    with pytest.raises(Stopped, match=r"no space left for .*step-00000003"):
        save(tmp_path, error, size)
    assert not list((tmp_path / "checkpoints").glob("step-*"))


def test_room_is_measured_and_leaves_nothing(tmp_path):
    assert has_room(tmp_path) and has_room(tmp_path, 1000)
    assert not has_room(tmp_path, 2**50)
    assert has_room(tmp_path / "nowhere"), "what is not known is no full disk"
    assert not list(tmp_path.iterdir())
