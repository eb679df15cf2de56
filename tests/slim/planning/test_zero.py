"""The memory of ZeRO, against engines of DeepSpeed that take the step."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from helpers.commands import ROOT, run_command
from helpers.counted import prepared, zero_settings
from helpers.engine import BUCKET
from slim.config import PRESETS, PretrainSettings
from slim.planning import counting
from slim.planning.counting import Footprint
from slim.planning.step_cost import count
from slim.planning.zero_memory import Zero

STAGES = (0, 1, 2, 3)


def counted(given: PretrainSettings, patches: int = 8) -> tuple[Footprint, int]:
    """The count, and the bytes of all trained parameters."""
    geometry, batch = prepared(given, patches)
    found, learner = count(given, geometry, batch, partial(Zero, bucket=BUCKET))
    return found, 4 * sum(parameter.numel() for parameter in learner.model.parameters())


def measured(store: Path, processes: int, engines: list[tuple[int, int]]) -> list[int]:
    """Bytes at the peak of real engines, by stage and micro-batches: of the process that held the most."""

    def start(rank: int) -> list[int]:
        words = [f"{stage}:{accumulate}" for stage, accumulate in engines]
        done = run_command(
            "tests/helpers/engine.py", rank, processes, store, *words, PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}"
        )
        assert done.stdout, done.stderr  # it counts, not the status: libraries may abort a process while it exits
        return json.loads(done.stdout.splitlines()[-1])

    with ThreadPoolExecutor(processes) as pool:
        return [max(peaks) for peaks in zip(*pool.map(start, range(processes)), strict=True)]


@pytest.mark.parametrize(
    ("processes", "engines"),
    [
        pytest.param(1, [(0, 1), (1, 1), (2, 1), (3, 1), (0, 2), (2, 2)], marks=pytest.mark.slow),
        (2, [(1, 1), (2, 1), (3, 1), (1, 2), (2, 2)]),
    ],
)
def test_the_peak_is_that_of_real_engines(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, processes: int, engines: list[tuple[int, int]]
) -> None:
    monkeypatch.setattr(counting, "BLOCK", 1)
    held = measured(tmp_path / "store", processes, engines)
    peaks = []
    for stage, accumulate in engines:
        found, whole = counted(zero_settings(stage, accumulate, processes))
        peaks.append(found.peak)
    # So near that no copy of a process's part of the parameters can be missing, or be counted twice.
    assert 0.08 * max(held) < whole / processes
    assert peaks == pytest.approx(held, rel=0.06)


def test_processes_share_what_the_stage_divides() -> None:
    for stage in STAGES[1:]:
        (one, whole), (four, _) = (
            counted(zero_settings(stage, 1, processes, PRESETS["tiny"]), 6) for processes in (1, 4)
        )
        shared = {part: one.at_peak[part] - four.at_peak[part] for part in ("states", "master copy")}
        # Moments and master copy at every stage; at stage 3 the parameters themselves, too.
        expected = [copies * whole * 3 / 4 for copies in ((2, 1) if stage < 3 else (3, 1))]
        assert list(shared.values()) == pytest.approx(expected, abs=0.02 * whole)
