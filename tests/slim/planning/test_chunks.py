"""Chunks of the local stages: they change no loss, and `auto` takes what the memory allows."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.commands import Command
from helpers.counted import MIDDLE, RealStep, prepared, settings
from helpers.training import losses, pretrain
from shards.format.grid import Grid
from shards.format.reader import Dataset
from slim.checkpoints.provenance import Provenance
from slim.config import PRESETS, FinetuneSettings, PretrainSettings, load_config
from slim.model.geometry import geometry_of
from slim.planning import chunks
from slim.planning.available_memory import available_bytes
from slim.planning.forecast import forecast
from slim.planning.step_cost import Cost
from slim.planning.steps import Brain, Steps

GIB = 2**30


def brain_of(settings: PretrainSettings, patches: int = 6) -> Brain:
    """A box of a brain on a cubic grid of so many patches."""
    grid = Grid(mm=8.0, shape=(4 * patches,) * 3)
    brain_XYZ = np.zeros(grid.shape, bool)
    brain_XYZ[4:-4, 3:-2, 5 : -patches - 1] = True
    geometry = geometry_of(settings.model, (settings.windows.k * 5, *grid.patch_shape))
    return Brain(brain_XYZ=brain_XYZ, basis="a box", grid=grid, frames=5, geometry=geometry, per_epoch=None)


def test_losses_do_not_depend_on_the_chunk() -> None:
    def three(chunk_tokens: int | str | None) -> tuple[list[float], int]:
        chosen = settings(model=MIDDLE, chunk_tokens=chunk_tokens, windows={"k": 4}, run={"out": "x", "batch": 2})
        geometry, batch = prepared(chosen, 16)
        step = RealStep(chosen, geometry, batch)
        return [step() for _ in range(3)], len(batch.whole.chunks)

    whole, one = three(None)
    assert one == 1 and len(set(whole)) == 3
    for chunk_tokens, many in ((4096, 20), (65536, 1), ("auto", 1)):
        found, number = three(chunk_tokens)
        assert number > many
        assert found == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize(
    ("model", "objective", "precision"),
    [("tiny", "default", "fp32"), ("tiny", "jepa", "bf16"), ("tiny", "mae", "fp32"), ("lean", "default", "fp32")],
)
def test_what_is_certain_to_fit_needs_less(model: str, objective: str, precision: str) -> None:
    batch = 1 if model == "lean" else 3
    chosen = settings(model=PRESETS[model], objective=objective, precision=precision, run={"out": "x", "batch": batch})
    brain = brain_of(chosen, 8)
    counted = Steps(chosen, brain, print, on_gpu=False, all_context=True).count(batch)[0]
    assert counted.peak_memory_bytes < chunks._at_most(chosen, brain)


def test_the_fastest_chunk_that_fits_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHOICES", (None, 4000, 1000))
    counted: dict[int | str | None, Cost] = {}
    count = Steps.cost

    def once(self: Steps, batch: int) -> Cost:  # a count takes seconds, and the choices ask for each of them again
        key = self.settings.chunk_tokens
        counted[key] = counted.get(key) or count(self, batch)
        return counted[key]

    monkeypatch.setattr(Steps, "cost", once)
    chosen = settings(model=MIDDLE, objective="jepa", chunk_tokens="auto")
    brain, told = brain_of(chosen, 16), []

    def choice(allowed: int) -> chunks.Choice:
        return chunks.choose_for(chosen, brain, allowed, on_gpu=False, begun=told.append)[0]

    certain = choice(100 * GIB)
    assert (certain.chunk_tokens, certain.counted, told) == (None, False, [])
    peaks = [
        Steps(chosen.model_copy(update={"chunk_tokens": tokens}), brain, print, False).cost(1).peak_memory_bytes
        for tokens in chunks.CHOICES
    ]
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == 3
    for tokens, peak in zip(chunks.CHOICES, peaks, strict=True):
        found = choice(peak)
        assert (found.chunk_tokens, found.needed, found.counted) == (tokens, peak, True)
        assert "fits in" in str(found)
    none = choice(peaks[-1] - 1)
    assert none.chunk_tokens == 1000 and "may not fit in" in str(none)


def test_fine_tuning_counts_the_whole_brain() -> None:
    shared = {"data": "x", "model": PRESETS["tiny"], "windows": {"k": 2}, "run": {"out": "x", "batch": 2}}
    tuned = chunks._pretraining(FinetuneSettings(**shared, precision="fp32"))
    assert (tuned.precision, tuned.chunk_tokens, tuned.objective) == ("fp32", "auto", "mae")
    brain = brain_of(tuned)
    most, least = (Steps(tuned, brain, print, False, every).cost(2) for every in (True, False))
    assert most.tokens["context"] == most.tokens["brain"] == least.tokens["brain"] > least.tokens["context"]


def test_the_plan_of_auto_is_that_of_its_choice(dataset: Path) -> None:
    datasets = [Dataset(dataset)]

    def planned(memory: int | None, chunk_tokens: int | str | None = "auto"):
        given = {"data": str(dataset), "model": PRESETS["tiny"], "windows": {"k": 2}, "run": {"out": "x"}}
        return forecast(PretrainSettings(**given, chunk_tokens=chunk_tokens), datasets, memory)

    plenty, unknown, given = planned(GIB), planned(None), planned(None, 100)
    assert plenty.chunk_tokens is None and plenty.chunk_chosen
    assert unknown.chunk_tokens is None and unknown.chunk_chosen
    assert planned(1).chunk_tokens == 4096
    assert given.chunk_tokens == 100 and not given.chunk_chosen
    assert plenty.peak_memory_bytes == planned(GIB, None).peak_memory_bytes


def control_groups(root: Path, machine_kib: int, lines: str, **files: int | str) -> int:
    for name, text in {
        "proc/meminfo": f"MemTotal: 9 kB\nMemAvailable:   {machine_kib} kB\n",
        "proc/self/cgroup": lines,
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return available_bytes(root)


def group(place: str, limit: int | str, used: int, version: int = 2, cached: int = 0) -> dict[str, int | str]:
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    stat = f"anon 5\n{'' if version == 2 else 'total_'}inactive_file {cached}"
    return {f"{place}{names[0]}": limit, f"{place}{names[1]}": used, f"{place}memory.stat": stat}


def test_available_memory_is_what_machine_and_control_groups_leave(tmp_path: Path) -> None:
    assert control_groups(tmp_path / "a", 100, "0::/\n") == 100 * 1024
    job, above = group("job__step__", 5000, 4000, cached=300), group("job__", 9000, 8900)
    assert control_groups(tmp_path / "b", 100, "0::/job/step\n", **job) == 1300
    assert control_groups(tmp_path / "c", 100, "0::/job/step\n", **job, **above) == 100
    assert control_groups(tmp_path / "d", 100, "0::/job\n", **group("job__", "max", 5)) == 100 * 1024
    assert control_groups(tmp_path / "e", 100, "0::/job\n", **group("job__", 10, 50)) == 0
    first = group("memory__job__", 7000, 6000, version=1)
    assert control_groups(tmp_path / "f", 100, "4:memory:/job\n3:cpu:/job\n0::/\n", **first) == 1000
    # in a container, the path of the group is that of the machine outside
    assert control_groups(tmp_path / "g", 100, "0::/docker/1f\n", **group("", 3000, 1000)) == 2000


def test_the_memory_of_this_machine_is_known() -> None:
    assert 0 < chunks.allowed_bytes(torch.device("cpu"), 2) <= available_bytes() / 2 < math.inf


def test_a_run_says_what_it_chose_and_another_one_may_choose_anew(
    command: Command, dataset: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    done = pretrain(command, dataset, out, "run.max_seconds=0.01", processes=1)
    assert done.returncode == 3 and "chunk_tokens auto: null: a step of at most" in done.stderr, done.stderr
    assert Provenance.read(out).chosen["chunk_tokens"] is None
    assert Provenance.read(out / "checkpoints" / "step-00000001").chosen["chunk_tokens"] is None
    assert load_config(out / "config.yaml").chunk_tokens == "auto"

    done = pretrain(command, dataset, out, "run.max_seconds=0.01", "chunk_tokens=64", processes=1)
    assert done.returncode == 3 and "changed: chunk_tokens: auto -> 64" in done.stdout, done.stderr
    assert "chunk_tokens" not in Provenance.read(out).chosen
    done = pretrain(command, dataset, out, processes=1)
    assert done.returncode == 0 and "chunk_tokens auto: null" in done.stderr, done.stderr

    whole = tmp_path / "whole"
    assert pretrain(command, dataset, whole, "chunk_tokens=null", processes=1).returncode == 0
    assert losses(out) == pytest.approx(losses(whole), rel=1e-5)
    assert command("tools/report.py", out).returncode == 0
    assert "none (auto)" in (out / "report" / "index.html").read_text()
