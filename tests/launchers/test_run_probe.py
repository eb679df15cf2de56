"""Probes during training: the scores of the checkpoints, without a test subject, and without a trace in the losses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.commands import Command
from helpers.conversions import edited
from helpers.finetuning import write_task
from helpers.training import losses, pretrain, settings_of
from launchers import run_probe
from launchers.run_probe import RunProbe
from launchers.run_setup import prepare_run
from shards.core.errors import ConfigError
from shards.core.settings import check
from shards.format.reader import Dataset
from slim.checkpoints.run_folder import BEST, CHECKPOINTS, PROBES
from slim.config import PRESETS, FinetuneSettings, PretrainSettings, load_run
from slim.evaluation.validation import Validation, ValidationScore, best_of, read_scores
from slim.inference.slim_brain import SlimBrain
from slim.training.callbacks import Start, Step

SIDES = {"01": "train", "02": "train", "03": "train", "04": "train", "05": "val", "06": "test"}


@pytest.fixture(scope="module")
def divided(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine people over the samples of six: five of training, three of validation, one of test."""

    def edit(session: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield session | {"split": SIDES[session["subject"]]}
        if session["subject"] in ("01", "02", "03"):
            name = f"9{session['subject']}"
            score = {"score": session["labels"]["score"] + int(name) / 500}
            side = "train" if session["subject"] == "01" else "val"
            yield session | {
                "key": f"synthetic_sub-{name}", "subject": name, "split": side, "labels": session["labels"] | score
            }  # fmt: skip

    return edited(dataset, tmp_path_factory.mktemp("divided") / "shards", edit)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task(tmp_path_factory.mktemp("task"), pooling="mean")


def probed(command: Command, data: Path, out: Path, task: Path, *words: str, steps: int = 6) -> str:
    """A run of six steps that is probed every second one; returns what it printed."""
    words = ("run.checkpoint_every=2", "run.keep=1", "run.log_every=1", *words)
    chosen = (f"run.probe.task={task}", "run.probe.every=2")
    done = pretrain(command, data, out, *words, *chosen, processes=1, steps=steps)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def run(command: Command, divided: Path, task: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("probed") / "run"
    probed(command, divided, out, task)
    return out


def test_each_checkpoint_is_scored_and_the_best_is_kept(run: Path, divided: Path, task: Path) -> None:
    scores = read_scores(run / PROBES)
    assert [score.step for score in scores] == [2, 4, 6]
    assert {(score.task, score.metric, score.subjects) for score in scores} == {("s", "r", 3)}
    best = best_of(scores)
    assert best is not None
    folder = run / CHECKPOINTS / f"step-{best.step:08}"
    assert (run / CHECKPOINTS / BEST).read_text().strip() == folder.name and folder.is_dir()
    left = {path.name for path in (run / CHECKPOINTS).glob("step-*")}
    assert left == {folder.name, "step-00000006"}  # run.keep=1, and the best
    model = SlimBrain.from_pretrained(run / CHECKPOINTS / BEST)
    assert model.step == best.step
    again = Validation.open(task, str(divided), None).score(model)
    assert again.value == pytest.approx(best.value, abs=1e-6)


def test_probes_leave_no_trace_in_the_training(run: Path, command: Command, divided: Path, tmp_path: Path) -> None:
    done = pretrain(command, divided, tmp_path / "plain", "run.log_every=1", processes=1, steps=6)
    assert done.returncode == 0 and losses(tmp_path / "plain") == losses(run)
    assert not (tmp_path / "plain" / PROBES).exists()


def test_no_session_of_a_test_subject_is_read(
    run: Path, divided: Path, task: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    original = Dataset.read

    def reading(self: Dataset, session: Any, *rest: Any, **more: Any) -> Any:
        read.append(session.key)
        return original(self, session, *rest, **more)

    monkeypatch.setattr(Dataset, "read", reading)
    opened = Validation.open(task, str(divided), None)
    opened.score(SlimBrain.from_pretrained(run))
    side = {session.key: session.split for session in Dataset(divided).sessions}
    assert {side[key] for key in read} == {"train", "val"}
    tested = {opened.cases.sessions[row].key for row in opened.splits[0][0].test}
    fitted = {opened.cases.sessions[row].key for row in opened.splits[0][0].fitted}
    assert {side[key] for key in tested} == {"val"} and {side[key] for key in fitted} == {"train"}
    assert "test" in side.values()


def test_fewer_subjects_are_drawn_with_the_seed(divided: Path, task: Path) -> None:
    few, again = (Validation.open(task, str(divided), 4) for _ in range(2))
    keys = [session.key for session in few.cases.sessions]
    assert keys == [session.key for session in again.cases.sessions]
    assert len({session.person for session in few.cases.sessions}) == 4 + 3  # of 5 and of 3


def test_a_stopped_run_is_probed_when_it_goes_on(
    command: Command, divided: Path, task: Path, tmp_path: Path, run: Path
) -> None:
    out = tmp_path / "run"
    done = pretrain(command, divided, out, "run.checkpoint_every=2", "run.log_every=1", processes=1, steps=4)
    assert done.returncode == 0 and not (out / PROBES).exists()
    probed(command, divided, out, task, "run.extend=constant")
    assert {score.step for score in read_scores(out / PROBES)} >= {4, 6}


def test_a_probe_that_fails_is_a_warning(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = load_run(run / "config.yaml")
    out = tmp_path / "run"
    (out / CHECKPOINTS / "step-00000002").mkdir(parents=True)
    settings = settings.model_copy(update={"run": settings.run.model_copy(update={"out": str(out)})})
    started = subprocess.Popen
    code = "import sys; sys.exit('error: the mount is lost')"
    monkeypatch.setattr(
        run_probe.subprocess, "Popen", lambda words, **more: started([sys.executable, "-c", code], **more)
    )
    warned: list[str] = []
    callback = RunProbe(settings, torch.device("cpu"))
    callback.on_start(Start(step=0, steps=2, warn=warned.append))
    callback.on_step(Step(number=2, keys=[], line=None))
    callback.on_save(out / CHECKPOINTS / "step-00000002")
    assert callback.needed() == {out / CHECKPOINTS / "step-00000002"}
    callback.on_end()
    callback.complete()
    assert warned == callback.failed == ["the probe of step-00000002 failed: error: the mount is lost"]
    assert not callback.needed() and not (out / CHECKPOINTS / BEST).exists()


def test_a_stopped_run_does_not_wait_for_its_probe(run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = load_run(run / "config.yaml")
    started: list[subprocess.Popen] = []
    original = subprocess.Popen

    def start(words: list[str], **more: Any) -> subprocess.Popen:
        started.append(original([sys.executable, "-c", "import time; time.sleep(600)"], **more))
        return started[-1]

    monkeypatch.setattr(run_probe.subprocess, "Popen", start)
    settings = settings.model_copy(update={"run": settings.run.model_copy(update={"out": str(tmp_path)})})
    callback = RunProbe(settings, torch.device("cpu"))
    callback.on_start(Start(step=0, steps=6, warn=print))
    callback.on_step(Step(number=2, keys=[], line=None))
    callback.on_save(tmp_path / CHECKPOINTS / "step-00000002")
    (child,) = started
    assert child.poll() is None
    callback.on_end()
    callback.complete()
    assert child.poll() is not None and not callback.failed


def test_the_task_is_named_by_an_absolute_path(
    divided: Path, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A probe may start in another folder, and a preset is no path."""
    words = (f"run.probe.task={task.name}", "run.probe.every=2", "run.checkpoint_every=2", "run.steps=2")
    settings = settings_of(divided, tmp_path / "run", *words)
    monkeypatch.chdir(task.parent)
    prepare_run(settings)
    probe = load_run(tmp_path / "run" / "config.yaml").run.probe
    assert probe is not None and probe.task == str(task.resolve())


def test_unreadable_lines_and_undefined_scores_are_left_out(tmp_path: Path) -> None:
    lines = [
        {"step": 2, "task": "s", "metric": "r", "value": 0.1},
        {"step": 4, "task": "s", "metric": "r", "value": None},
        {"step": 6, "task": "s", "metric": "r", "value": 0.3},
        {"step": 2, "task": "s", "metric": "r", "value": 0.3},
        {"step": "x"},
    ]
    text = "\n".join(json.dumps(line) for line in lines)
    (tmp_path / PROBES).write_text(text + '\n{"step": 8, "ta')
    scores = read_scores(tmp_path / PROBES)
    assert [(score.step, score.value) for score in scores] == [(2, 0.3), (4, None), (6, 0.3)]
    best = best_of(scores)
    assert best is not None and best.step == 2  # the earliest of equal scores
    assert best_of([]) is None and best_of([scores[1]]) is None
    assert ValidationScore(step=3, task="s", metric="r", value=None).line() == "step 3: r undefined"


def test_wrong_settings_are_refused_before_the_first_step(
    command: Command, dataset: Path, divided: Path, task: Path, tmp_path: Path
) -> None:
    def told(data: Path, *words: str) -> str:
        done = pretrain(command, data, tmp_path / "run", "run.checkpoint_every=2", *words, processes=1)
        assert done.returncode == 2 and not (tmp_path / "run" / "metrics.jsonl").exists()
        return done.stderr

    every = told(divided, f"run.probe.task={task}", "run.probe.every=3")
    assert "run.probe.every: got 3, expected a multiple of run.checkpoint_every, 2" in every
    assert "run.probe.task" in told(divided, "run.probe.task=nothing", "run.probe.every=2")
    few = edited(
        divided,
        tmp_path / "few",
        lambda one: [
            one | {"split": {"val": "test"}.get(one["split"], one["split"])} if one["subject"] == "05" else one
        ],
    )
    assert "val: got 2 validation subjects, expected at least 3 for run.probe with s. Convert with" in told(
        few, f"run.probe.task={task}", "run.probe.every=2"
    )
    alone = edited(dataset, tmp_path / "alone", lambda session: [session | {"split": "train"}])
    assert "val: got no session" in told(alone, f"run.probe.task={task}", "run.probe.every=2")
    tree = {"data": "x", "model": PRESETS["tiny"], "run": {"out": "x", "probe": {"task": "t", "every": 500}}}
    with pytest.raises(ConfigError, match="a fine-tuning validates after each epoch"):
        check(FinetuneSettings, tree, "test")
    assert check(PretrainSettings, tree, "test").run.probe is not None
