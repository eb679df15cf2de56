"""The tables of the experiments: means over seeds, intervals over people, and a verdict that follows from them."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from sklearn.decomposition import PCA

from helpers.commands import Command
from launchers.experiments import comparison
from launchers.experiments.kinds import Kind
from launchers.experiments.trials import Experiments
from launchers.experiments.voxels import VoxelComponents
from shards.format.reader import Dataset
from slim.evaluation.results import Estimate

TASKS = ("group", "score", "fingerprint", "state")


def write(
    out: Path,
    name: str,
    value: float,
    spread: float = 0.01,
    rank: float | None = None,
    tasks: tuple[str, ...] = TASKS,
) -> None:
    """Draws of one encoder on all tasks, as probing leaves them; with a rank, the log of its run."""
    rng = np.random.default_rng(0)
    names = [task if "/" in task else f"synthetic_{task}" for task in tasks]
    draws = {task: np.concatenate([[value], value + spread * rng.normal(size=200)]) for task in names}
    if name.startswith("poolings-"):
        draws |= {f"synthetic_{task}/mean": draws[f"synthetic_{task}"] for task in tasks[:3] if "/" not in task}
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
    for name in ("poolings-default-snr0.9-seed0", "poolings-random-default-snr0.9-seed0"):
        write(tmp_path, name, 0.5)
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


def test_trials_are_made_once_however_many_parts_ask_for_them(tmp_path: Path):
    work, kinds = Experiments(tmp_path, 3, 2, []), [Kind.of_snr(0.9), Kind.of_snr(0.3)]
    main = [trial.name for trial in work.trials(["main"], kinds)]
    assert len(main) == len(set(main)) == 2 * 3 * 4 and main[0] == "default-snr0.9-seed0"
    fine = [trial.name for trial in work.trials(["fine"], kinds)]
    assert fine == [f"default-fine-snr0.9-seed{seed}" for seed in range(3)]
    people = work.trials(["fine", "people"], kinds)
    assert len(people) == 3 + 4 * 2 and {trial.variant.people for trial in people} == {15, 30, 60, 120, 240}
    assert [trial.name for trial in work.trials(["windows"], kinds)] == fine[:1]
    assert work.dataset("probed", kinds[0]).name == "probed-snr0.9-mutual"  # as runs of earlier versions have it


def test_people_and_windows_have_tables_and_a_figure(command: Command, tmp_path: Path):
    tasks = ("group", "score", "fine_group", "fine_score", "fingerprint", "state")
    for seed in (0, 1):
        for name, value in (("people-15", 0.5), ("people-60", 0.7), ("default", 0.8)):
            write(tmp_path, f"{name}-fine-snr0.9-seed{seed}", value + 0.02 * seed, rank=10.0, tasks=tasks)
    for name, value in (("connectome_kept", 0.55), ("voxels", 0.75), ("parcels", 0.5)):
        write(tmp_path, f"{name}-fine-snr0.9", value, tasks=tasks)
    write(tmp_path, "default-snr0.9-seed0", 0.9, rank=12.0)
    for step, value in ((500, 0.6), (1000, 0.8)):
        (tmp_path / "runs" / "default-snr0.9-seed0" / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
        write(tmp_path, f"step-{step:08d}-default-snr0.9-seed0", value)
    for ranker, count in (("mutual", 8), ("mutual", "all"), ("random", 8)):
        write(tmp_path, f"windows-fine-snr0.9-{ranker}-{count}", 0.6, tasks=("group", "connectome/synthetic_group"))
    words = ("--out", tmp_path, "--tables", "--seeds", 2, "--snr", "0.9", "--only", "fine,people,windows,checkpoint")
    done = command("tools/experiments.py", *words)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "tables.md").read_text()
    fine = text[text.index("| fine traits, SNR 0.9 |") :]
    assert "fine group, AUROC | fine score, r" in fine and "functional connectivity, 400 parcels" in fine
    people = [line for line in text.splitlines() if line.split(" | ")[0].endswith(" people")]
    assert [line.split(" ")[1] for line in people] == ["15", "60", "120"] and ".51" in people[0] and ".81" in people[2]
    rows = [line.split(" | ")[0] for line in text.splitlines() if " windows" in line and ": " in line.split(" | ")[0]]
    assert rows == [
        f"| {words}: {method}"
        for words in ("8 windows, ranked", "all windows", "8 windows, in random order")
        for method in ("default", "functional connectivity")
    ]
    steps = [line.split(" | ")[:2] for line in text.splitlines() if line.startswith("| after ")]
    assert [row[0] for row in steps] == ["| after 500 steps", "| after 1000 steps"] and ".80 [" in steps[1][1]
    figure = plt.imread(tmp_path / "people.png")
    assert figure.shape[0] > 300 and figure[..., :3].std() > 0.05


def test_poolings_of_a_kind_have_a_table_of_their_own(command: Command, tmp_path: Path):
    """Fine traits: the encoder under `patterns`, beside random weights with the same pooling and the same baselines."""
    tasks = ("fine_group", "fine_score", "fingerprint", "group", "score")
    pooled = tuple(f"synthetic_{task}/patterns" for task in tasks)
    for name, value in (("default", 0.9), ("random-default", 0.5), ("control-default", 0.7)):
        write(
            tmp_path,
            f"{name}-fine-snr0.9-seed0",
            0.6,
            rank=10.0 if name == "default" else None,
            tasks=(*tasks, "state"),
        )
        under_both = comparison.load(tmp_path / "draws" / f"{name}-fine-snr0.9-seed0.npz")
        under_both |= {name: under_both[name.split("/")[0]] - 0.6 + value for name in pooled}
        comparison.save(tmp_path / "draws" / f"{name}-fine-snr0.9-seed0.npz", under_both)
    write(tmp_path, "voxels-fine-snr0.9", 0.8, tasks=tasks)
    done = command("tools/experiments.py", "--out", tmp_path, "--tables", "--seeds", 1, "--only", "fine")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "tables.md").read_text()
    usual, own = text.split("| fine traits, SNR 0.9, patterns |")
    assert "| JEPA + SIG + MAE (default) | .60 [" in usual and "| JEPA + SIG + MAE (default) | .90 [" in own
    assert "| random weights, small positions | .70 [" in own and "| voxel components, kept windows | .80 [" in own
    less = own.split("| the default less, fine traits, SNR 0.9, patterns |")[1]
    rows = {line.split(" | ")[0].strip("| "): line for line in less.splitlines() if line.startswith("|")}
    assert "**+.100" in rows["voxel components, kept windows"]
    assert rows["random weights"].endswith("| fine group, fine score, fingerprint, group, score |")
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["fine traits, SNR 0.9, patterns"]["random weights"]["synthetic_group"]["value"] == pytest.approx(0.5)


def test_noise_that_is_real_is_left_out_with_a_word(command: Command, tmp_path: Path, monkeypatch):
    monkeypatch.delenv("SLIM_REAL_DATA", raising=False)
    done = command("tools/experiments.py", "--out", tmp_path, "--tables", "--snr", "0.9", "--only", "noise")
    assert done.returncode == 0 and "SLIM_REAL_DATA" in done.stderr


def test_voxel_components_are_those_of_scikit_learn(dataset: Path):
    """Correlations of the leading components of z-scored voxels, fitted on the training rows alone."""
    opened = Dataset(dataset).most_salient(6)
    sessions = opened.sessions
    rival = VoxelComponents(opened, sessions, components=4)
    train = np.arange(3)
    series = []
    for session in sessions:
        arrays = opened.read(session)
        z_KFW = arrays["windows"][:, :, arrays["brain"] > 0] / arrays["spread"][arrays["brain"] > 0]
        series.append(z_KFW.reshape(30, -1).astype(np.float64))
    centred = [x_TV - x_TV.mean(axis=0) for x_TV in series]
    axes = PCA(4, svd_solver="full").fit(np.concatenate([centred[row] for row in train])).components_
    for found_E, x_TV in zip(rival.vectors(train), series, strict=True):
        expected_QQ = np.corrcoef((x_TV @ axes.T).T)
        expected_E = expected_QQ[np.triu_indices(4, 1)]
        np.testing.assert_allclose(np.abs(found_E), np.abs(expected_E), atol=0.02)  # a component has no sign
    assert not np.allclose(rival.vectors(train), rival.vectors(np.arange(2, 5)), atol=1e-3)
