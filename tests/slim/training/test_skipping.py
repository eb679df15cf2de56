"""Damaged samples and non-finite steps are skipped, counted and recorded, alike in all processes."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from helpers.commands import Command
from helpers.in_process import only_rank
from helpers.training import metrics, pretrain, weights
from launchers.job import prepare
from launchers.run_setup import prepare_run
from shards.core.errors import UserError
from shards.core.settings import check
from shards.format.reader import Dataset
from shards.format.stream import Item
from slim.checkpoints import exchange
from slim.config import PRESETS, PretrainSettings, load_config, load_run
from slim.data.collate import load_batch
from slim.data.samples import geometry_for
from slim.model.inputs import Batch
from slim.pretrain.learner import PretrainLearner
from slim.pretrain.objective import Objective
from slim.pretrain.task import PretrainTask
from slim.training.callbacks import Callback, Step
from slim.training.optim import GuardedAdamW
from slim.training.skipped import NOT_FINITE, Skipped
from slim.training.trainer import Trainer


def damage(dataset: Path, copy: Path, count: int) -> list[str]:
    """A copy in which this many training sessions are damaged: their keys."""
    shutil.copytree(dataset, copy)
    lines = [json.loads(text) for text in (copy / "sessions.jsonl").read_text().splitlines()]
    chosen = [line for line in lines if line["split"] == "train"][:count]
    for line in chosen:
        with open(copy / "shards" / line["shard"], "r+b") as file:
            file.seek(line["zarr_offset"])
            file.write(bytes(line["zarr_size"]))
    return [line["key"] for line in chosen]


def notes(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]


def test_a_damaged_sample_is_left_out_and_named(command: Command, dataset: Path, tmp_path: Path) -> None:
    """With one sample a micro-batch its process has nothing there, and takes part all the same."""
    (key,) = damage(dataset, tmp_path / "data", 1)
    done = pretrain(command, tmp_path / "data", tmp_path / "run", "run.batch=1", steps=6)
    assert done.returncode == 0, done.stderr
    found = notes(tmp_path / "run")
    assert {note["key"] for note in found} == {key} and len(found) > 1  # once in each epoch
    assert all("got" in note["reason"] for note in found)
    assert done.stderr.count(f"{key} is damaged and was left out") == 1
    lines = metrics(tmp_path / "run")
    assert [line["damaged"] for line in lines] == sorted(line["damaged"] for line in lines)
    assert lines[-1]["damaged"] == 1 and all(np.isfinite(line["loss"]) for line in lines)
    assert min(line["tokens_kept"] for line in lines) < 0.8 * max(line["tokens_kept"] for line in lines)


def test_too_many_damaged_samples_stop_the_run(command: Command, dataset: Path, tmp_path: Path) -> None:
    keys = damage(dataset, tmp_path / "data", 2)
    done = pretrain(command, tmp_path / "data", tmp_path / "run", steps=6)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "run.damaged: got 2 damaged sessions of" in done.stderr and "expected at most 1" in done.stderr
    assert {note["key"] for note in notes(tmp_path / "run")} == set(keys)


def test_an_empty_micro_batch_adds_nothing(dataset: Path, tmp_path: Path) -> None:
    keys = damage(dataset, tmp_path / "data", 2)
    opened = Dataset(tmp_path / "data")
    settings = check(
        PretrainSettings, {"data": "x", "model": PRESETS["tiny"].model_dump(), "run": {"out": "x"}}, "test"
    )
    geometry = geometry_for(settings, [opened])
    items = [Item(0, session, 0) for session in opened.of_split("train")]
    bad = [item for item in items if item.session.key in keys]
    mixed = load_batch([bad[0], items[-1]], [opened], geometry, settings).to("cpu")
    assert mixed.keys == [items[-1].session.key] and list(mixed.damaged) == [keys[0]] and not mixed.empty
    batch = load_batch(bad, [opened], geometry, settings).to("cpu")
    assert batch.empty and set(batch.damaged) == set(keys)

    learner = PretrainLearner(settings, Objective(settings, geometry, opened.grid.voxels))
    losses = learner.losses(batch, 0)
    losses.total.backward()
    assert losses.total == 0 and losses.logs == {} and losses.features["target"] is None
    gradients = [parameter.grad for parameter in learner.model.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)
    assert not any(mean._sums.any() for mean in learner.means.values())


def test_no_step_on_gradients_that_are_not_finite() -> None:
    torch.manual_seed(0)
    ours, plain = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    plain.load_state_dict(ours.state_dict())
    guarded, adam = GuardedAdamW(ours.parameters(), lr=0.1), torch.optim.AdamW(plain.parameters(), lr=0.1, fused=True)
    x = torch.randn(5, 3)
    for bad in (False, True, False, True, True, False):
        for model, optimizer in ((ours, guarded), (plain, adam)):
            if model is plain and bad:
                continue
            optimizer.zero_grad()
            loss = model(x).square().sum()
            (loss * (float("nan") if bad else 1.0)).backward()
            optimizer.step()
        assert guarded.skipped == bad
    assert all(torch.equal(*pair) for pair in zip(ours.parameters(), plain.parameters(), strict=True))


class States(Callback):
    """What was trained, after each step."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []
        self.trainer: Trainer | None = None

    def on_step(self, step: Step) -> None:
        state = self.trainer.learner.state(self.trainer.full)
        self.seen.append(torch.cat([state[name].detach().flatten() for name in sorted(state)]).clone())


def train(dataset: Path, tmp_path: Path, stage: int, bad: set[int], *words: str) -> list[torch.Tensor]:
    """Train six steps in this process, with a loss that is no number in the steps of `bad` (from 0)."""
    chosen = [f"data={dataset}", f"run.out={tmp_path / 'run'}", "run.steps=6", f"zero.stage={stage}", *words]
    quick = ["run.batch=2", "run.workers=0", "run.wandb=disabled", "precision=fp32"]
    config = prepare_run(load_config("configs/pretrain/tiny.yaml", [*chosen, *quick]))
    states = States()
    with only_rank():
        prepare(on_gpu=False)
        states.trainer = trainer = Trainer(PretrainTask(load_run(config)), torch.device("cpu"), [states])
        plain = trainer.learner.losses

        def losses(batch: Batch, step: int, forward: Any = None) -> Any:
            found = plain(batch, step, forward)
            if step in bad:
                found.total = found.total * float("nan")
                trainer.learner.means["target_mean"]._sums += float("nan")
            return found

        trainer.learner.losses = losses
        trainer.run()
    return states.seen


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_that_is_no_number_changes_nothing(dataset: Path, tmp_path: Path, stage: int) -> None:
    seen = train(dataset, tmp_path, stage, {2, 4})
    assert [torch.equal(*pair) for pair in pairwise(seen)] == [False, True, False, True, False]
    assert all(state.isfinite().all() for state in seen)
    assert {(note["step"], note["reason"]) for note in notes(tmp_path / "run")} == {(3, NOT_FINITE), (5, NOT_FINITE)}
    trained = {session.key for session in Dataset(dataset).of_split("train")}
    assert {note["key"] for note in notes(tmp_path / "run")} <= trained
    assert all(value.isfinite().all() for value in weights(tmp_path / "run").values())


def test_too_many_such_steps_in_a_row_stop_the_run(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not finite in 3 consecutive steps, the last of them step 4"):
        train(dataset, tmp_path, 2, {1, 2, 3, 4}, "run.not_finite=2")


def test_a_run_that_continues_keeps_what_was_left_out_before(tmp_path: Path, monkeypatch) -> None:
    """Lines of the steps before the checkpoint stay; those of later steps, which are done again, are dropped."""
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(exchange, "gather", lambda found: [found])
    before = Skipped(tmp_path, sessions=100, damaged=0.1, in_a_row=3)
    before.damaged(2, {"sub-1": "bad checksum"})
    state = before.state()
    before.damaged(4, {"sub-2": "bad checksum"})
    with open(before.path, "a") as file:
        file.write('{"step": 5, "key": "su')  # cut by a kill
    after = Skipped(tmp_path, sessions=100, damaged=0.1, in_a_row=3)
    after.load(state, step=3)
    assert notes(tmp_path) == [{"step": 2, "key": "sub-1", "reason": "bad checksum"}] and after.keys == {"sub-1"}
