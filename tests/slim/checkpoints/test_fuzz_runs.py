"""Damaged and hostile runs, checkpoints and exports: read, or refused in one line; see `fuzzing`.

What seals a file needs no key, so the files are sealed anew: their content is what is tried. Nothing outside of the
folder is written, and nothing in it is executed.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import strategies as st

from helpers.fuzzing import NESTED, answer, counts, damaged, hold, json_bytes, texts, trees
from helpers.pretrained import ALIGNED, sum_again, write_run
from shards.core.errors import UserError
from slim.checkpoints import checkpoint, mirror, zero_states
from slim.checkpoints.checkpoint import COMPLETE, WEIGHTS
from slim.checkpoints.weights import CONFIG, MODEL, SUMS, find
from slim.inference import export
from slim.inference.slim_brain import SlimBrain
from slim.reporting import run_page
from slim.training.metrics import read_metrics, warnings_of

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")
SPARE = 64 << 20  # bytes, beside what `answer` grants: of the model that is made


class Payload:
    """A pickle of it makes a folder when it is read."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = write_run(tmp_path_factory.mktemp("fuzzed") / "run", dataset, ALIGNED)
    line = {"step": 1, "epoch": 0, "samples": 2, "loss": 1.0, "samples_per_s": 2.0, "seconds": 1.0, "gain": 0.1}
    (run / "metrics.jsonl").write_text("".join(json.dumps({**line, "step": step}) + "\n" for step in range(1, 20)))
    return run


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    export.write(SlimBrain.from_pretrained(run), run.parent / "export")
    return run.parent / "export"


def _few(inputs: int) -> int:
    """Of what makes a model each time."""
    return inputs // 5


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def sealed_again(folder: Path) -> None:
    about = {key: value for key, value in checkpoint.facts(folder).items() if key not in ("seal", "files", "sha256")}
    (folder / COMPLETE).unlink()
    checkpoint.seal(folder, about)


def tensors(seed: bytes) -> st.SearchStrategy[bytes]:
    """A safetensors file with another header, or damaged anywhere."""
    size = int.from_bytes(seed[:8], "little")
    header, body = json.loads(seed[8 : 8 + size]), seed[8 + size :]

    def file(tree: Any) -> bytes:
        text = json_bytes(tree)
        return len(text).to_bytes(8, "little") + text + body

    return st.one_of(trees([header]).map(file), damaged([seed], [b'"F64"', b"[1000000000000]", b"-1", b"NaN"]))


def tried(path: Path, call: Callable[[], Any], content: bytes, seal: Callable[[], None] | None = None) -> None:
    """A call while a file has another content; the file is as it was afterwards."""
    whole = path.read_bytes()
    path.write_bytes(content)
    try:
        if seal is not None:
            seal()
        answer(call, len(content) + len(whole) + SPARE)
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("part", ["config.yaml", "dataset.json", WEIGHTS])
@counts
def test_checkpoints(inputs: int, part: str, run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "sent" / "run")
    folder = copy / "checkpoints" / checkpoint.tag(7)
    seed, before = (folder / part).read_bytes(), names(tmp_path)

    def target(content: bytes) -> None:
        tried(folder / part, lambda: SlimBrain.from_pretrained(copy), content, partial(sealed_again, folder))
        assert names(tmp_path) == before

    found = [json_bytes({**yaml.safe_load(seed), "data": []})] if part == "config.yaml" else []
    hold(_few(inputs), contents(part, seed), target, found)


def contents(part: str, seed: bytes) -> st.SearchStrategy[bytes]:
    if part.endswith(".safetensors"):
        return tensors(seed)
    tree = yaml.safe_load(seed.decode())
    return st.one_of(trees([tree]).map(json_bytes), texts([json.dumps(tree)], NESTED))


@counts
def test_what_complete_says(inputs: int, run: Path, tmp_path: Path) -> None:
    """Sealed anew where it is a mapping; read, recovered from a mirror, and shown."""
    sent = shutil.copytree(run, tmp_path / "sent" / "run")
    folder = sent / "checkpoints" / checkpoint.tag(7)
    about, before = checkpoint.facts(folder), names(tmp_path / "sent")
    about.pop("seal")

    def target(tree: Any) -> None:
        sealed = tree
        if isinstance(tree, dict):
            with contextlib.suppress(UnicodeEncodeError):  # of lone surrogates there is no hash
                sealed = {**tree, "seal": checkpoint._seal(tree)}
        content = json_bytes(sealed)
        mine = tmp_path / "mine"

        def call() -> None:
            checkpoint.newest_intact(sent / "checkpoints")
            checkpoint.step_of(folder)
            mirror.recover(mine, sent)

        tried(folder / COMPLETE, call, content)
        tried(folder / COMPLETE, lambda: find(sent), content)
        outside = names(tmp_path) - {"sent", "mine"}
        assert all(name.startswith(("sent/", "mine/")) for name in outside) and names(tmp_path / "sent") == before
        shutil.rmtree(mine, ignore_errors=True)

    hold(inputs, trees([about]), target, [{**about, "files": "\ud800"}])


@counts
def test_files_of_torch(inputs: int, tmp_path: Path) -> None:
    """Shards of the optimizer: damaged anywhere, or only the pickle inside them, with a payload among the seeds."""
    marker, path = tmp_path / "executed", tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    seeds = []
    for more in (None, Payload(marker)):
        for zipped in (True, False):
            state = {"step": 3, "part": torch.arange(40.0), "names": ["a", "b"], "more": more}
            torch.save(state, path, _use_new_zipfile_serialization=zipped)
            seeds.append(path.read_bytes())

    def inside(content: bytes) -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(seeds[0])) as archive, zipfile.ZipFile(out, "w") as made:
            for name in archive.namelist():
                made.writestr(name, content if name.endswith("data.pkl") else archive.read(name))
        return out.getvalue()

    pickles = []
    for seed in (seeds[0], seeds[2]):
        with zipfile.ZipFile(io.BytesIO(seed)) as archive:
            name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            pickles.append(archive.read(name))
    words = [b"cposix\nmkdir\n", b"cos\nsystem\n", b"\x93", b"R", b"\x8c\x05posix\x8c\x05mkdir\x93", b"(K\x01.", b"b."]
    strategy = st.one_of(damaged(seeds, words), damaged(pickles, words).map(inside))

    def target(content: bytes) -> None:
        path.write_bytes(content)
        for mmap in (False, True):
            told = answer(partial(zero_states.read, path, mmap=mmap), len(content))
            assert isinstance(told, dict | UserError)
        assert not marker.exists() and names(tmp_path) == {path.name}

    # in torch's older form, a text of nearly 2 GB is announced
    hold(2 * inputs, strategy, target, [seeds[1].replace(b"}q\x00(X\x10\x00\x00\x00", b"}q\x00(X\x10\x00\x00\x70", 1)])


@pytest.mark.parametrize("part", [CONFIG, MODEL, SUMS])
@counts
def test_exports(inputs: int, part: str, exported: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(exported, tmp_path / "export")
    seed, sums, before = (copy / part).read_bytes(), (copy / SUMS).read_bytes(), names(tmp_path)

    def target(content: bytes) -> None:
        seal = None if part == SUMS else partial(sum_again, copy)
        try:
            tried(copy / part, lambda: SlimBrain.from_pretrained(copy), content, seal)
        finally:
            (copy / SUMS).write_bytes(sums)
        assert names(tmp_path) == before

    strategy = texts([seed.decode()], ["../a", "/etc/passwd"]) if part == SUMS else contents(part, seed)
    hold(_few(inputs), strategy, target)


@counts
def test_metrics(inputs: int, run: Path, tmp_path: Path) -> None:
    text = (run / "metrics.jsonl").read_text()
    path = tmp_path / "metrics.jsonl"

    def target(content: bytes) -> None:
        path.write_bytes(content)

        def call() -> None:
            lines, unreadable = read_metrics(path)
            assert all(type(line["step"]) is int for line in lines) and unreadable >= 0
            warnings_of(lines)
            run_page.verdict(lines, None, [])

        answer(call, len(content))

    lines = [json.loads(line) for line in text.splitlines()]
    several = trees([lines]).map(
        lambda tree: b"".join(json_bytes(line) + b"\n" for line in (tree if isinstance(tree, list) else [tree]))
    )
    hold(inputs, st.one_of(several, texts([text], NESTED)), target)
