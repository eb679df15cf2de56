"""Fine-tuning: layers, heads and losses against references, resume after kill -9, nothing of the test subjects."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from sklearn.metrics import log_loss
from sklearn.utils.class_weight import compute_class_weight, compute_sample_weight

from helpers.commands import ROOT, Command
from helpers.finetuning import QUICK, SCORE, finetune, lines, write_task
from helpers.hooks import at_each_step
from helpers.pretrained import tool, write_weights
from launchers import local
from launchers.run_setup import prepare_run
from shards.cohorts.cohort_file import find_runs
from shards.core import files
from shards.core.errors import ConfigError
from shards.core.settings import check
from shards.format import layout
from shards.format.reader import Dataset
from slim.checkpoints import checkpoint, start
from slim.config import FinetuneSettings, load_run
from slim.data.collate import collate
from slim.data.samples import read_windows, window_groups
from slim.evaluation import probe
from slim.evaluation.division import make_splits
from slim.evaluation.probe import make_fold
from slim.evaluation.results import Estimate, TaskFacts, TaskResult
from slim.evaluation.splits import Split
from slim.evaluation.task import Task, find_cases
from slim.finetune.labels import Answers
from slim.finetune.method import Finetuned, check_report, refuse, settings_for
from slim.finetune.task import FinetuneTask, depth_of, make_model, validation_loss
from slim.inference import export
from slim.inference.predict import predict
from slim.inference.slim_brain import SlimBrain


def answers_of(opened: Dataset, classes: int = 0) -> Answers:
    """Seven sessions to train on, one of them to validate, two that nobody is to see."""
    rows = [(n, float(n % classes if classes else n / 5 - 1)) for n in range(len(opened.sessions))]
    keys = [session.key for session in opened.sessions]
    return Answers(classes, dict(zip(keys[:6], rows, strict=False)), dict(zip(keys[6:8], rows[6:8], strict=False)))


def task_of(pretrained: Path, people: Path, out: Path, *words: str, classes: int = 0) -> FinetuneTask:
    ours, opened = SlimBrain.from_pretrained(pretrained), Dataset(people)
    settings = settings_for(ours, str(people), out, 6, [*QUICK, *words], 0)
    out.mkdir(parents=True, exist_ok=True)
    answers_of(opened, classes).write(out)
    return FinetuneTask(settings.model_copy(update={"start": start.write(out, ours.encoder.state_dict())}))


# layers and heads


def test_learning_rates_fall_towards_the_input_and_only_matrices_decay(
    pretrained: Path, people: Path, tmp_path: Path
) -> None:
    learner = task_of(pretrained, people, tmp_path, "head.layer_decay=0.5").learner(torch.device("cpu"))
    blocks = learner.model.encoder.n
    assert blocks == 2
    names = {id(p): name for name, p in learner.model.named_parameters()}
    seen = [names[id(p)] for group in learner.groups() for p in group.parameters]
    assert sorted(seen) == sorted(names.values())
    for group in learner.groups():
        for parameter in group.parameters:
            name = names[id(parameter)]
            expected = {"encoder.blocks.0": 0.25, "encoder.blocks.1": 0.5, "encoder.norm": 1.0, "head.": 10.0}
            scale = next((value for start, value in expected.items() if name.startswith(start)), 0.125)
            assert group.scale == scale, name
            is_matrix = name.endswith("weight") and "norm" not in name and "seconds" not in name
            assert group.decays == is_matrix, name
    assert {depth_of(name, blocks) for name in names.values()} == set(range(blocks + 3))


def test_the_encoder_begins_with_the_pretrained_weights_and_scratch_does_not(
    pretrained: Path, people: Path, tmp_path: Path
) -> None:
    task = task_of(pretrained, people, tmp_path)
    given = SlimBrain.from_pretrained(pretrained).encoder.state_dict()
    mine = task.learner(torch.device("cpu"))
    assert all(torch.equal(value, given[name]) for name, value in mine.model.encoder.state_dict().items())
    task.settings = task.settings.model_copy(update={"start": None})
    scratch = task.learner(torch.device("cpu"))
    assert not torch.equal(scratch.model.encoder.embed.own.weight, mine.model.encoder.embed.own.weight)
    assert {group.scale for group in scratch.groups()} == {1.0, 10.0} and len({g.scale for g in mine.groups()}) == 5
    with open(tmp_path / "start.safetensors", "ab") as file:
        file.write(b"x")
    task.settings = task.settings.model_copy(update={"start": "0" * 64})
    with pytest.raises(checkpoint.CheckpointError, match=r"start\.safetensors: SHA-256"):
        task.learner(torch.device("cpu"))


@pytest.mark.parametrize("pooling", ["cov", "mean"])
def test_features_are_standardised_once_by_the_training_samples(
    pretrained: Path, people: Path, tmp_path: Path, pooling: str
) -> None:
    task = task_of(pretrained, people, tmp_path, f"head.pooling={pooling}")
    learner = task.learner(torch.device("cpu"))
    items = [task.stream.at(n) for n in range(6)]
    batches = [task.load()(items[at : at + 2]).to("cpu") for at in (0, 2, 4)]
    learner.begin(lambda steps: batches[:steps], learner.model)
    pooled = torch.cat([learner.model(batch)[1] for batch in batches]).double()
    z = (pooled - learner.model.head.centre_P) * learner.model.head.scale_P
    torch.testing.assert_close(z.mean(dim=0), torch.zeros(z.shape[1]).double(), atol=1e-3, rtol=0)
    sd = z.std(dim=0, correction=0)
    if pooling == "cov":  # pairs of places with brain; together they have the variance of one feature
        alive = learner.model.head.scale_P > 0
        assert 0 < alive.sum() < len(alive) and not sd[~alive].any()
        sd = sd[alive] * alive.sum().sqrt()
    torch.testing.assert_close(sd, torch.ones(len(sd)).double(), atol=1e-2, rtol=0)


@pytest.mark.parametrize(("pooling", "classes"), [("mean", 0), ("attentive", 3), ("cov", 3), ("cov", 0)])
def test_it_learns_what_it_is_told(pretrained: Path, people: Path, tmp_path: Path, pooling: str, classes: int) -> None:
    task = task_of(pretrained, people, tmp_path, f"head.pooling={pooling}", classes=classes)
    learner = task.learner(torch.device("cpu"))
    batches = [task.load()([task.stream.at(n) for n in range(3)]).to("cpu")]
    learner.begin(lambda _: batches, learner.model)
    adam = torch.optim.AdamW([{"params": group.parameters, "lr": 1e-3 * group.scale} for group in learner.groups()])
    losses = []
    for step in range(20):
        found = learner.losses(batches[0], step, learner.model)
        found.total.backward()
        adam.step()
        adam.zero_grad()
        losses.append(float(found.logs["loss"]))
    assert losses[-1] < 0.5 * losses[0] and all(p.isfinite().all() for p in learner.model.parameters())


# answers, losses, predictions


def test_classes_count_alike_as_in_scikit_learn() -> None:
    truth = [0] * 7 + [1] * 2 + [2]
    answers = Answers(3, {str(n): (n, float(k)) for n, k in enumerate(truth)}, {})
    expected = compute_class_weight("balanced", classes=np.arange(3), y=np.array(truth))
    assert answers.class_weights() == pytest.approx(expected)


def test_validation_is_of_subjects_and_as_in_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    subject_N, answer_S = np.repeat(np.arange(9), 2), np.array([0, 0, 0, 0, 0, 1, 1, 2, 2])
    guess_NK = rng.dirichlet(np.ones(3), 18)
    mean_SK = guess_NK.reshape(9, 2, 3).mean(axis=1)
    expected = log_loss(answer_S, mean_SK, sample_weight=compute_sample_weight("balanced", answer_S))
    assert validation_loss(guess_NK, subject_N, answer_S[subject_N], 3) == pytest.approx(expected)
    value_N, truth_S = rng.normal(size=(18, 1)), rng.normal(size=9)
    expected = ((value_N.reshape(9, 2).mean(axis=1) - truth_S) ** 2).mean()
    assert validation_loss(value_N, subject_N, truth_S[subject_N], 0) == pytest.approx(expected)


@given(st.integers(1, 12), st.integers(0, 40))
def test_every_window_is_read_and_no_group_reaches_beyond(k: int, more: int) -> None:
    windows = list(range(k + more))
    groups = window_groups(k + more, k)
    assert all(len(windows[group.windows]) == k for group in groups) and len(groups) == -(-(k + more) // k)
    # Without those that a group repeats, each window comes once, in time order.
    assert [window for group in groups for window in windows[group.windows][group.repeated :]] == windows


def test_a_session_is_predicted_from_all_its_windows(pretrained: Path, people: Path, tmp_path: Path) -> None:
    """Of 12 windows the first and the last 8 in time order; of 8, a linear head on the mean of `encode_session`."""
    task = task_of(pretrained, people, tmp_path, "head.pooling=mean")
    ours, opened = SlimBrain.from_pretrained(pretrained), Dataset(people)
    model, device = task.learner(torch.device("cpu")).model, torch.device("cpu")
    whole = [session for session in opened.sessions if session.n_kept == 12][:3]
    short = [session.model_copy(update={"n_kept": 8}) for session in whole]
    guess_NK = predict(model, 0, opened, [*whole, *short], task.geometry, task.settings, device)
    again_NK = predict(model, 0, opened, [*whole, *short][::-1], task.geometry, task.settings, device)
    np.testing.assert_allclose(guess_NK, again_NK[::-1], atol=1e-5)
    for row, session in enumerate(short):
        token_SLC = torch.from_numpy(ours.encode_session(opened, session).tokens)
        expected = model.head(token_SLC.mean(dim=(0, 1))[None])
        np.testing.assert_allclose(guess_NK[3 + row], expected[0].detach(), atol=1e-4)
    for row, session in enumerate(whole):
        in_time = np.argsort(opened.read(session, ("start",))["start"])
        groups = [read_windows(opened, session, in_time[rows]) for rows in (slice(0, 8), slice(4, 12))]
        each = [model(collate([group], task.geometry, None))[0] for group in groups]
        np.testing.assert_allclose(guess_NK[row], torch.cat(each).mean(dim=0).detach(), atol=1e-5)


def test_nothing_of_a_test_subject_reaches_the_training(pretrained: Path, people: Path, tmp_path: Path) -> None:
    """Neither sessions nor answers of it, nor any label; what it answers changes no byte of what training is given."""
    opened, ours = Dataset(people), SlimBrain.from_pretrained(pretrained)
    task = check(Task, SCORE, "task.yaml")
    cases = find_cases(task, opened, "task.yaml")
    splits = make_splits(task, cases, "task.yaml")
    given: list[bytes] = []

    class Stop(Exception):
        pass

    def train(settings: Any) -> None:
        made = FinetuneTask(settings)
        tested = {cases.sessions[row].key for row in splits[0][0].test}
        (data,) = made.datasets
        assert len(data.sessions) == len(cases.sessions) - len(tested)
        assert not tested & {session.key for session in data.sessions}
        assert all(session.labels == {} for session in data.sessions)
        assert not any(key in (Path(settings.run.out) / "answers.json").read_text() for key in tested)
        assert {item.session.key for item in map(made.stream.at, range(60))} == set(made.answers.train)
        given.append((Path(settings.run.out) / "answers.json").read_bytes())
        raise Stop

    for number in range(2):
        method = Finetuned("finetuned", ours, task, opened, cases, splits, tmp_path / str(number), QUICK, train)
        with pytest.raises(Stop):
            method.predict(make_fold(task, cases, splits[0][0])[0])
        cases.truth_S[cases.subject_N[splits[0][0].test]] = 1e6
    assert given[0] == given[1]


def test_two_divisions_with_the_same_test_people_are_two_fine_tunings(
    pretrained: Path, people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of few people, two divisions often test the same ones and differ in who is validated on."""
    opened, ours = Dataset(people), SlimBrain.from_pretrained(pretrained)
    task = check(Task, SCORE, "task.yaml")
    cases = find_cases(task, opened, "task.yaml")
    ((first,), _) = make_splits(task, cases, "task.yaml")
    swapped = first.fitted[::-1]
    second = Split(np.sort(swapped[: len(first.train)]), np.sort(swapped[len(first.train) :]), first.test)
    trained: list[tuple[str, set[str]]] = []

    def train(settings: Any) -> None:
        out = Path(settings.run.out)
        trained.append((out.name, set(Answers.read(out).val)))

    monkeypatch.setattr(Finetuned, "_best", lambda *_: (torch.nn.Identity(), 1, 0.5))
    monkeypatch.setattr(
        "slim.finetune.method.predict", lambda model, classes, data, tested, *_: np.ones((len(tested), 1))
    )
    splits = [[first], [second]]
    method = Finetuned("finetuned", ours, task, opened, cases, splits, tmp_path, QUICK, train)
    probe.score(task, cases, splits, method)
    expected = [{cases.sessions[row].key for row in split.val} for split in (first, second)]
    assert trained == [("seed-0", expected[0]), ("seed-1", expected[1])] and expected[0] != expected[1]
    assert [run.seed for run in method.runs] == [0, 1]


# wrong calls


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"type": "fingerprint", "label": None, "split": {"kind": "all"}}, "type: got fingerprint"),
        ({"split": {"kind": "folds", "folds": 3}}, "split.kind: got folds"),
    ],
)
def test_tasks_that_cannot_be_fine_tuned_are_refused(changes: dict, what: str) -> None:
    with pytest.raises(ConfigError, match=what) as told:
        refuse(check(Task, SCORE | changes, "task.yaml"), "task.yaml")
    assert "\n" not in told.value.line()


@pytest.mark.parametrize(
    "word", ["view=both", "model.embed=8", "windows.k=4", "run.out=x", "start=x", "head.poling=mean"]
)
def test_what_the_weights_decide_cannot_be_set(pretrained: Path, tmp_path: Path, word: str) -> None:
    ours = SlimBrain.from_pretrained(pretrained)
    word = "view=voxel" if word == "view=both" and ours.settings.view == "both" else word
    with pytest.raises(ConfigError, match=word.split("=")[0].split(".")[0]):
        settings_for(ours, "data", tmp_path, 6, [word], 0)


# one report


def test_scores_stand_beside_those_of_the_same_question_alone(tmp_path: Path, people: Path) -> None:
    opened, task = Dataset(people), check(Task, SCORE, "task.yaml")
    cases = find_cases(task, opened, "task.yaml")
    splits = make_splits(task, cases, "task.yaml")
    facts = probe.task_facts(task, cases, splits)

    def result(methods: dict, facts: TaskFacts) -> TaskResult:
        made = {method: {m: Estimate(**one) for m, one in cells.items()} for method, cells in methods.items()}
        return TaskResult(name="s", estimates=made, facts=facts)

    ours, tuned, scratch = ({"r": {"value": r, "low": r, "high": r, "p": 0.1}} for r in (0.1, 0.2, 0.3))
    for name, scores in (("finetuned", tuned), ("ours", ours), ("scratch", scratch)):  # in any order
        check_report(tmp_path, task, cases, splits)
        about = facts.with_facts(**{name: {"step": 7}})
        probe.write_report(tmp_path, [result({name: scores}, about)])
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["tasks"]["s"] == {"finetuned": tuned, "ours": ours, "scratch": scratch}
    assert report["facts"]["s"].keys() >= {"finetuned", "scratch", "type"}
    other = check(Task, SCORE | {"split": SCORE["split"] | {"seed": 1}}, "task.yaml")
    with pytest.raises(ConfigError, match=r"report\.json: s\.split"):
        check_report(tmp_path, other, cases, splits)
    probe.write_report(tmp_path, [result({"ours": ours}, probe.task_facts(other, cases, splits))])
    assert json.loads((tmp_path / "report.json").read_text())["tasks"]["s"] == {"ours": ours}


# the command, in real processes


def test_the_best_epoch_is_kept_and_test_subjects_are_scored_in_the_report(whole: tuple[Path, dict]) -> None:
    out, said = whole
    report = json.loads((out / "report.json").read_text())
    assert said["tasks"]["s"] == report["tasks"]["s"]
    found = report["tasks"]["s"]["finetuned"]
    assert {"r", "r2", "mse"} <= found.keys() and found["mse"]["low"] <= found["mse"]["value"] <= found["mse"]["high"]
    runs = _runs(whole)
    assert [run["seed"] for run in runs] == [0, 1]
    for number, run in enumerate(runs):
        history = lines(out, number)
        validated = {line["step"]: line["val_loss"] for line in history if line["val_loss"] is not None}
        assert run["best_step"] == min(validated, key=validated.__getitem__) and len(validated) >= 3
        assert run["val_loss"] == validated[run["best_step"]]
    assert lines(out, 0)[0]["loss"] != lines(out, 1)[0]["loss"]


def test_killed_and_resumed_equals_uninterrupted(
    command: Command, pretrained: Path, people: Path, whole: tuple[Path, dict], tmp_path: Path
) -> None:
    """kill -9 of everything in the midst of a fine-tuning; the same command continues to the same numbers."""
    out, hook = tmp_path / "out", at_each_step(tmp_path / "hook", "if number == 3: time.sleep(600)")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **hook}
    words = finetune(pretrained, people, out, split=SCORE["split"] | {"repeats": 1})
    child = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=env, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 200
    while len(lines(out)) < 2 and child.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.02)
    for process in [child, *psutil.Process(child.pid).children(recursive=True)]:
        process.send_signal(signal.SIGKILL)
    child.wait()
    assert not (out / "report.json").exists() and len(lines(out)) == 2
    done = command(*words)
    assert done.returncode == 0, done.stderr
    assert lines(out) == lines(whole[0])
    runs = [json.loads(done.stdout.splitlines()[-1])["facts"]["s"]["finetuned"]["runs"][0], _runs(whole)[0]]
    assert [{**run, "run": None} for run in runs] == 2 * [{**runs[0], "run": None}]
    tensors = [checkpoint.newest(Path(run["run"]) / "checkpoints") / checkpoint.WEIGHTS for run in runs]
    mine, theirs = map(load_file, tensors)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_the_encoder_of_the_best_epoch_is_loaded_exported_and_encodes(
    whole: tuple[Path, dict], pretrained: Path, people: Path, tmp_path: Path
) -> None:
    opened, told = Dataset(people), _runs(whole)[0]
    run = Path(told["run"])
    tuned = SlimBrain.from_pretrained(run)
    best = load_file(checkpoint.newest(run / "checkpoints") / checkpoint.WEIGHTS)
    start = SlimBrain.from_pretrained(pretrained).encoder.state_dict()
    for name, value in tuned.encoder.state_dict().items():
        assert torch.equal(value, best[f"best.encoder.{name}"])
    assert any(not torch.equal(value, start[name]) for name, value in tuned.encoder.state_dict().items())
    assert tuned.step == told["best_step"] and tuned.made["run"] == "s-finetuned-seed-0"
    with pytest.raises(checkpoint.CheckpointError, match="weights: got a fine-tuning run, expected a pretraining run"):
        SlimBrain.from_pretrained(run, "target")

    about = export.write(tuned, tmp_path / "export")
    moved = SlimBrain.from_pretrained(tmp_path / "export")
    assert moved.checksum == tuned.checksum
    session = opened.sessions[0]
    features = [model.encode_session(opened, session).tokens for model in (tuned, moved)]
    assert np.array_equal(*features)
    (training,) = about["made"]["training"]  # that of the pretraining
    assert training["sessions"] == opened.manifest.sessions["train"]
    card = (tmp_path / "export" / "README.md").read_text()
    for words in (
        "pretrained, then fine-tuned on the labels of `s`",
        "| shards | synthetic |",
        "fine-tuned on labels of `s` from synthetic",
        "Fine-tuned with a head (cov pooling)",
        f"after {told['best_step']} optimizer steps",
    ):
        assert words in card, words
    assert str(pretrained.parent) not in (tmp_path / "export" / "config.json").read_text()


def test_what_was_fine_tuned_answers_for_a_run_as_for_a_test_subject(
    whole: tuple[Path, dict], pretrained: Path, people: Path, cohort: Path, tmp_path: Path
) -> None:
    """Straight from NIfTI, by the run, by its export and by tools/embed.py: the numbers of `predict` on the shards."""
    run = Path(_runs(whole)[0]["run"])
    tuned, opened, settings = SlimBrain.from_pretrained(run), Dataset(people), load_run(run / "config.yaml")
    assert isinstance(settings, FinetuneSettings) and settings.answer.label == "score"
    model = make_model(settings, tuned.geometry, opened.grid.voxels, 1).eval()
    model.load_state_dict(
        checkpoint.read_weights(checkpoint.newest(run / "checkpoints") / checkpoint.WEIGHTS, "best."), strict=False
    )
    source = find_runs(cohort / "cohort.yaml")[2]
    session = next(line for line in opened.sessions if line.subject == source.subject)
    guess = predict(model, 0, opened, [session], tuned.geometry, settings, torch.device("cpu"))[0]
    task = check(Task, SCORE, "task.yaml")
    cases = find_cases(task, opened, "task.yaml")
    split = make_splits(task, cases, "task.yaml")[0][0]
    truth = cases.truth_S[np.unique(cases.subject_N[np.concatenate([split.train, split.val])])]
    expected = guess * truth.std() + truth.mean()
    assert tuned.predict(source.bold) == pytest.approx(expected[0], rel=1e-6)
    with pytest.warns(DeprecationWarning, match="SlimBrain.answer is deprecated") as told:
        np.testing.assert_allclose(tuned.answer(source.bold), expected, rtol=1e-6)
    assert told[0].filename == __file__
    with pytest.raises(ConfigError, match="predict_proba: got a model that predicts a value"):
        tuned.predict_proba(source.bold)
    export.write(tuned, tmp_path / "export")
    assert SlimBrain.from_pretrained(tmp_path / "export").predict(source.bold) == tuned.predict(source.bold)
    done = tool("embed.py", tmp_path / "export", source.bold, "--out", tmp_path / "z.npz", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["label"] == "score"
    with np.load(tmp_path / "z.npz") as arrays:
        np.testing.assert_allclose(arrays["answers"], [expected], rtol=1e-6)
        assert arrays["vectors"].shape[0] == session.n_kept and not len(arrays["classes"])
    with pytest.raises(ConfigError, match="head: got none: these weights were only pretrained"):
        SlimBrain.from_pretrained(pretrained).predict(source.bold)
    (tmp_path / "export" / "head.safetensors").unlink()
    with pytest.raises(checkpoint.CheckpointError, match=r"head\.safetensors: got no such file"):
        SlimBrain.from_pretrained(tmp_path / "export")


def test_what_was_fine_tuned_is_not_judged_by_those_it_learned_from(
    whole: tuple[Path, dict], people: Path, tmp_path: Path
) -> None:
    run, task = _runs(whole)[0]["run"], write_task(tmp_path)
    line = "cohorts: got synthetic, on which these weights were fine-tuned (s), expected cohorts that were not"
    for name in ("probe.py", "finetune.py", "explain.py"):
        done = tool(name, run, "--data", people, "--task", task, "--out", tmp_path / "out")
        assert done.returncode == 2 and line in done.stderr and done.stderr.count("\n") == 1, done.stderr
    others = shutil.copytree(people, tmp_path / "others")
    manifest = layout.read_manifest(others)
    files.write_atomically(others / layout.MANIFEST, files.dump(manifest | {"cohorts": ["others"]}))
    SlimBrain.from_pretrained(run).check_unseen(Dataset(others))


def test_weights_before_the_first_validation_are_told(whole: tuple[Path, dict], tmp_path: Path) -> None:
    run = shutil.copytree(_runs(whole)[0]["run"], tmp_path / "run")
    saved = checkpoint.newest(run / "checkpoints")
    tensors = load_file(saved / checkpoint.WEIGHTS)
    tensors["best.of"] = torch.tensor([float("inf"), 0.0], dtype=torch.float64)
    write_weights(saved, tensors)
    with pytest.raises(checkpoint.CheckpointError, match="val_loss: got no finite validation loss yet"):
        SlimBrain.from_pretrained(run)


def _runs(whole: tuple[Path, dict]) -> list[dict]:
    return whole[1]["facts"]["s"]["finetuned"]["runs"]


def method_of(pretrained: Path, people: Path, folder: Path, words: tuple, scratch: bool, train: Any) -> tuple:
    """Fine-tuning as the command does it, and its first division of the subjects."""
    opened, task = Dataset(people), check(Task, SCORE, "task.yaml")
    cases = find_cases(task, opened, "task.yaml")
    splits = make_splits(task, cases, "task.yaml")
    ours = SlimBrain.from_pretrained(pretrained)
    name, words = "scratch" if scratch else "finetuned", (*QUICK, "run.epochs=3", *words)
    method = Finetuned(name, ours, task, opened, cases, splits, folder, words, train)
    return method, make_fold(task, cases, splits[0][0])[0]


def test_one_process_at_stage_3_learns_the_same(
    pretrained: Path, people: Path, whole: tuple[Path, dict], tmp_path: Path
) -> None:
    """As the two processes at stage 2 with two samples each; from random weights it is another story."""

    def train(settings: Any) -> None:
        assert local.run(prepare_run(settings), 1).finished  # in a process: DeepSpeed changes torch at stage 3

    for scratch in (False, True):
        folder = tmp_path / "finetune" / "s-finetuned"
        method, fold = method_of(pretrained, people, folder, ("run.batch=4", "zero.stage=3"), scratch, train)
        guess_mK = method.predict(fold)
        assert guess_mK.shape == (3, 1) and np.isfinite(guess_mK).all()
        mine, theirs = lines(tmp_path), lines(whole[0])
        for name in ("loss", "val_loss"):
            gap = [abs(a[name] - b[name]) for a, b in zip(mine, theirs, strict=True) if a[name] is not None]
            assert len(gap) >= 3 and (max(gap) > 1e-3 if scratch else max(gap) < 1e-4), gap
        shutil.rmtree(folder)


def test_what_changed_since_a_run_began_is_refused(pretrained: Path, people: Path, whole: tuple[Path, dict]) -> None:
    folder, words = whole[0] / "finetune" / "s-finetuned", ("run.processes=2",)
    before = (folder / "seed-0" / "config.yaml").read_bytes()
    for changed in ((*words, "head.pooling=attentive"), (*words, "zero.stage=1"), (*words, "run.seed=4")):
        method, fold = method_of(pretrained, people, folder, changed, False, prepare_run)
        with pytest.raises(checkpoint.CheckpointError, match=r"head|zero\.stage|run\.seed"):
            method.predict(fold)
        assert (folder / "seed-0" / "config.yaml").read_bytes() == before
