"""The tables of the experiments: means over seeds, intervals over people, and a verdict that follows from them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from helpers.commands import Command
from launchers.experiments import comparison
from slim.evaluation.results import Estimate

TASKS = ("group", "score", "fingerprint", "state")


def write(out: Path, name: str, value: float, spread: float = 0.01, rank: float | None = None) -> None:
    """Draws of one encoder on all tasks, as probing leaves them; with a rank, the log of its run."""
    rng = np.random.default_rng(0)
    draws = {f"synthetic_{task}": np.concatenate([[value], value + spread * rng.normal(size=200)]) for task in TASKS}
    if name.endswith("seed0"):  # other poolings are asked of the first seed alone
        draws |= {f"synthetic_{task}/mean": draws[f"synthetic_{task}"] for task in TASKS[:3]}
    comparison.save(out / "draws" / f"{name}.npz", draws)
    if rank is not None:
        folder = out / "runs" / name
        folder.mkdir(parents=True)
        lines = [json.dumps({"context_rank": rank if step >= 90 else 5.0}) for step in range(100)]
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def test_seeds_are_averaged_draw_by_draw():
    draws = [{"t": np.array([0.1, 0.0, 0.4])}, {"t": np.array([0.3, 0.2, 0.0])}]
    found = comparison.summarise(draws)["t"]
    assert found.value == pytest.approx(0.2) and found.seeds == (0.1, 0.3)
    assert 0.1 <= found.low <= found.high <= 0.2
    high, low = Estimate(value=0.6, low=0.5, high=0.7), Estimate(value=0.3, low=0.2, high=0.4)
    assert high.better_than(low) and not low.better_than(high) and not high.better_than(high)


def test_differences_are_taken_draw_by_draw():
    ours = [{"t": np.array([0.5, 0.6, 0.7]), "u": np.zeros(3)}, {"t": np.array([0.7, 0.6, 0.7]), "u": np.zeros(3)}]
    found = comparison.differences(ours, [{"t": np.array([0.5, 0.5, 0.6])}])
    assert found.keys() == {"t"}  # the other was not asked of all
    assert found["t"].value == pytest.approx(0.1)
    assert found["t"].low == pytest.approx(0.1) == pytest.approx(found["t"].high)


@pytest.mark.parametrize(("ours", "better"), [(0.9, 4), (0.51, 0)])
def test_the_tables_say_what_is_there(command: Command, tmp_path: Path, ours: float, better: int):
    for seed in (0, 1):
        write(tmp_path, f"default-snr0.9-seed{seed}", ours + 0.02 * seed, rank=24.0)
        write(tmp_path, f"random-default-snr0.9-seed{seed}", 0.5)
        write(tmp_path, f"control-default-snr0.9-seed{seed}", 0.7)
    write(tmp_path, "jepa-snr0.9-seed0", 0.6, rank=3.0)
    write(tmp_path, "connectome-snr0.9", 0.95)
    words = ("--out", tmp_path, "--tables", "--seeds", 2, "--snr", "0.9", "--only", "main,pooling", "--json")
    done = command("tools/experiments.py", *words)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "tables.md").read_text()
    assert "effective rank at SNR 0.9 is 24" in text
    main, less = text.split("the default less")
    rows = {line.split(" | ")[0].strip("| "): line for line in main.splitlines() if line.startswith("|")}
    gaps = {line.split(" | ")[0].strip("| "): line for line in less.splitlines() if line.startswith("|")}
    for rival in ("random weights", "random weights, small positions"):
        assert ("group, score, fingerprint, state |" in gaps[rival]) == (better == 4)
    assert ("**+" in gaps["random weights, small positions"]) == (better == 4) and "**-" in gaps[
        "functional connectivity"
    ]
    assert f"{ours + 0.01:.2f}".lstrip("0") in rows["JEPA + SIG + MAE (default)"]
    assert rows["JEPA (1 of 2 seeds)"].rstrip(" |").endswith("3") and "functional connectivity" in rows
    assert not any(name.startswith("MAE") for name in rows) and "mean image" not in rows  # nothing is there
    assert "random weights, `mean`" in text
    results = json.loads((tmp_path / "results.json").read_text())["SNR 0.9"]
    assert len(results["better than random weights, intervals apart"]) == better
    assert "random weights, small positions" in rows


@pytest.mark.parametrize(
    ("words", "told"),
    [(("--only", "all"), "--only: got all"), (("--snr", "low"), "--snr"), (("--jobs", 0), "1 or more")],
)
def test_a_wrong_call_is_one_line(command: Command, tmp_path: Path, words: tuple, told: str):
    done = command("tools/experiments.py", "--out", tmp_path, "--tables", *words)
    assert done.returncode == 2 and told in done.stderr and len(done.stderr.strip().splitlines()) == 1
