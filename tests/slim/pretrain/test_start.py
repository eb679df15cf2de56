"""Pretraining that begins with the weights of another run, an export, or another grid."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from helpers.commands import GRID, Command
from helpers.training import losses, pretrain, weights
from shards.format.grid import Grid
from slim.checkpoints.provenance import Provenance
from slim.checkpoints.seen import Seen
from slim.model.embedding import sinusoids
from slim.pretrain.start import _resampled, _stretched, _Table
from slim.training.reshard import MOMENTS, states_of

STILL = ("optimizer.lr=1e-12", "optimizer.wd=[0,0]", "optimizer.clip=1e9", "ema.start=1")  # weights stay, moments move


def checkpoint_of(run: Path) -> Path:
    return run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()


@pytest.fixture(scope="module")
def run(command: Command, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of two processes at ZeRO stage 2."""
    out = tmp_path_factory.mktemp("begun") / "run"
    done = pretrain(command, dataset, out, steps=3)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def export(command: Command, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("begun") / "export"
    done = command("tools/export.py", run, "--out", out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.slow), 3])
def test_moments_of_a_run_are_taken_at_any_stage(
    command: Command, dataset: Path, run: Path, tmp_path: Path, stage: int
) -> None:
    """After one step the moments are the old ones, decayed, beside those of a run without them."""
    words = (f"init={run}", f"zero.stage={stage}", *STILL)
    found = {}
    for taken in ("true", "false"):
        out = tmp_path / taken
        done = pretrain(command, dataset, out, *words, f"init.optimizer={taken}", processes=1, steps=1)
        assert done.returncode == 0, done.stderr
        assert ("and the moments of AdamW" in done.stdout) == (taken == "true")
        found[taken] = states_of(checkpoint_of(out))
    before = states_of(checkpoint_of(run))
    assert int(found["true"].step) == 4 and int(found["false"].step) == 1
    names = [name for name in weights(run) if name.startswith("encoder.")]
    moved = 0
    for name in [*names, "predictor.enter.weight", "predictor.features.weight"]:
        torch.testing.assert_close(found["true"].whole(name, "fp32"), before.whole(name, "fp32"), rtol=1e-5, atol=1e-6)
        for key, decay in zip(MOMENTS, (0.9, 0.95), strict=True):
            old, taken, new = before.whole(name, key), found["true"].whole(name, key), found["false"].whole(name, key)
            torch.testing.assert_close(taken - new, decay * old, rtol=1e-3, atol=1e-7)
            moved += int((old != 0).sum())
    assert moved > 1000


def test_a_run_is_taken_whole_and_keeps_where_it_began(
    command: Command, dataset: Path, run: Path, export: Path, tmp_path: Path
) -> None:
    """The encoder, its moving average and the predictor; provenance and subjects seen, also through an export."""
    out = tmp_path / "next"
    done = pretrain(command, dataset, out, f"init={run}", *STILL, processes=1, steps=1)
    assert done.returncode == 0, done.stderr
    assert f"begins with {run}: encoder of run after 3 steps" in done.stdout and "new:" not in done.stdout
    old, new = weights(run), weights(out)
    for name, value in old.items():
        if name.startswith(("encoder.", "target.")):
            torch.testing.assert_close(new[name], value, rtol=1e-5, atol=1e-6)
    made = Provenance.read(out).init
    assert made is not None and (made.run, made.step, made.weights) == ("run", 3, "encoder")
    seen = Seen.read(out)
    assert seen is not None and seen.before == Seen.read(run)
    assert command("tools/report.py", out).returncode == 0
    assert "run, step 3" in (out / "report" / "index.html").read_text()

    again = pretrain(command, dataset, out, f"init={run}", *STILL, "run.extend=constant", processes=1, steps=2)
    assert again.returncode == 0, again.stderr  # a resumed run begins with its checkpoint
    assert "begins with" not in again.stdout and Provenance.read(out).init == made and Seen.read(out) == seen
    (out / "start.safetensors").unlink()  # no longer needed
    again = pretrain(command, dataset, out, f"init={run}", *STILL, "run.extend=constant", processes=1, steps=3)
    assert again.returncode == 0 and len(losses(out)) == 3

    second = tmp_path / "second"
    done = command("tools/export.py", out, "--out", second)
    assert done.returncode == 0, done.stderr
    config = json.loads((second / "config.json").read_text())
    assert config["made"]["init"]["run"] == "run"
    assert "the encoder of `run` after 3 steps" in (second / "README.md").read_text()
    third = tmp_path / "third"
    done = pretrain(command, dataset, third, f"init={second}", processes=1, steps=1)
    assert done.returncode == 0, done.stderr
    line = Provenance.read(third).init
    assert line is not None and [one.step for one in line.line()] == [3, 3]
    seen = Seen.read(third)
    people = [session["subject"] for session in map(json.loads, (dataset / "sessions.jsonl").open())]
    assert seen is not None and seen.before is not None and seen.before.before is not None and people
    assert seen.before.salt is not None  # the export has hashes only


def test_an_export_gives_the_encoder_alone(command: Command, dataset: Path, export: Path, tmp_path: Path) -> None:
    done = pretrain(command, dataset, tmp_path / "out", f"init={export}", processes=1, steps=1)
    assert done.returncode == 0, done.stderr
    assert "new: predictor (" in done.stdout and "moving average: begins as the encoder" in done.stdout
    done = pretrain(command, dataset, tmp_path / "no", f"init={export}", "init.optimizer=true", processes=1, steps=1)
    assert done.returncode == 2 and "an export has no moments" in done.stderr
    assert not (tmp_path / "no" / "start.safetensors").exists()


def test_another_view_and_objective_say_what_is_new_and_left(
    command: Command, dataset: Path, run: Path, tmp_path: Path
) -> None:
    words = (f"init={run}", "view=both", "objective=jepa")
    done = pretrain(command, dataset, tmp_path / "out", *words, processes=1, steps=1)
    assert done.returncode == 0, done.stderr
    assert "new: encoder.embed.whole.weight" in done.stdout
    assert "left: predictor.rebuild.weight, predictor.rebuild.bias" in done.stdout
    done = pretrain(command, dataset, tmp_path / "no", *words, "init.optimizer=true", processes=1, steps=1)
    assert done.returncode == 2 and "new are encoder.embed.whole.weight" in done.stderr


def test_what_does_not_fit_is_refused_by_name(command: Command, dataset: Path, run: Path, tmp_path: Path) -> None:
    def refusal(*words: str) -> str:
        done = pretrain(command, dataset, tmp_path / "no", *words, processes=1, steps=1)
        assert done.returncode == 2 and not (tmp_path / "no" / "config.yaml").exists()
        assert done.stderr.count("\n") == 1
        return done.stderr

    assert "init: encoder.time: got (30, 32), expected (40, 32)" in refusal(f"init={run}", "windows.k=6")
    assert "Set init.positions=resample" in refusal(f"init={run}", "windows.k=6")
    assert "Use the sizes of the model" in refusal(f"init={run}", "model.embed=48")
    assert "no such folder" in refusal(f"init={tmp_path / 'nothing'}")
    assert "init.source" in refusal("init.optimizer=true")


def test_another_grid_is_refused_or_resampled(
    command: Command, cohort: Path, run: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("other")
    larger = [GRID[0], "grid.shape=[24,16,16]"]
    words = ("tools/make_shards.py", cohort / "cohort.yaml", "--out", folder / "data", "--ranker", "ridge")
    done = command(*words, "--workers", 1, *larger)
    assert done.returncode == 0, done.stderr
    done = pretrain(command, folder / "data", folder / "no", f"init={run}", processes=1, steps=1)
    assert done.returncode == 2 and "init: encoder.space" in done.stderr
    words = (f"init={run}", "init.positions=resample")
    done = pretrain(command, folder / "data", folder / "out", *words, *STILL, processes=1, steps=1)
    assert done.returncode == 0, done.stderr
    assert "interpolated: encoder.space, predictor.space" in done.stdout
    old, new = (weights(one)["encoder.space"] for one in (run, folder / "out"))
    # the longer grid has the same centre, so its inner places are those of the old grid
    inner = new.reshape(6, 4, 4, -1)[1:5]
    torch.testing.assert_close(inner, old.reshape(4, 4, 4, -1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(new.reshape(6, 4, 4, -1)[0], old.reshape(4, 4, 4, -1)[0], rtol=1e-5, atol=1e-6)


def test_positions_are_interpolated_linearly_in_mm() -> None:
    """A table that is linear in mm stays so, wherever the new places lie inside the old grid."""
    old = _Table(Grid(8.0, (24, 24, 24)), (4, 4, 4))
    new = _Table(Grid(8.0, (16, 16, 16), centre_mm=(3.0, -20.0, 9.0)), (4, 4, 4))

    def centres(table: _Table) -> np.ndarray:
        places = np.stack(np.indices([n // e for n, e in zip(table.grid.shape, table.edge, strict=True)]), axis=-1)
        voxels = places * table.edge + (np.array(table.edge) - 1) / 2
        return (voxels @ table.grid.affine[:3, :3].T + table.grid.affine[:3, 3]).reshape(-1, 3)

    slopes = np.array([[0.3, -0.1, 0.2], [1.0, 0.5, -0.7]])
    table = torch.from_numpy((centres(old) @ slopes.T).astype(np.float32))
    np.testing.assert_allclose(_resampled(table, old, new), centres(new) @ slopes.T, atol=1e-3)
    assert torch.equal(_resampled(table, old, old), table)


def test_slots_of_time_keep_their_ends() -> None:
    table = sinusoids([40], 16)
    assert torch.equal(_stretched(table, 40), table)
    twice = _stretched(torch.arange(4.0)[:, None], 8)
    assert twice[:, 0].tolist() == [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]


def test_the_setting_is_a_name_or_a_section() -> None:
    from slim.config import load_config

    short = load_config("tiny", ["data=x", "run.out=y", "init=weights"])
    long = load_config("tiny", ["data=x", "run.out=y", "init.optimizer=true", "init=weights"])
    assert short.init is not None and (short.init.source, short.init.optimizer) == ("weights", False)
    assert long.init is not None and (long.init.source, long.init.optimizer) == ("weights", True)
    assert yaml.safe_load(short.model_dump_json())["init"]["positions"] == "same"
    assert load_config("tiny", ["data=x", "run.out=y", "init=2024"]).init.source == "2024"
