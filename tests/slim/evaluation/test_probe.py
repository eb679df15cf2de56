"""Nothing leaks from test to training, scores are those of scikit-learn, the command does the whole."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
from nilearn.connectome import ConnectivityMeasure
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from helpers.commands import ROOT
from helpers.conversions import write_page
from helpers.tasks import GROUP, SCORE, WHO, cases_of, groups, sessions, task
from shards.core.errors import ConfigError
from shards.format.reader import Dataset
from shards.reporting import dataset_page
from slim.evaluation import baselines, draws, linear, probe
from slim.evaluation.division import make_splits
from slim.evaluation.linear import Linear
from slim.evaluation.results import Report
from slim.evaluation.splits import Fold, deal
from slim.evaluation.task import Task, load_task

# tasks and splits


def test_shipped_tasks_load():
    found = sorted((ROOT / "configs/downstream").glob("*.yaml"))
    assert len([path for path in found if path.name.startswith("synthetic_")]) == 6 and len(found) == 6 + 7 + 6 + 2
    for path in found:
        shipped = load_task(path)
        assert shipped.name == path.stem and shipped.source and shipped.description
        assert shipped.data or path.name.startswith("synthetic_")  # which folder is expected, and how it is made


@pytest.mark.parametrize(
    ("tree", "field"),
    [
        (GROUP | {"poling": "cov"}, "poling"),
        (GROUP | {"type": "guess"}, "type"),
        (GROUP | {"label": None}, "label"),
        (GROUP | {"split": {"kind": "all"}}, "split.kind"),
        (WHO | {"label": "group"}, "label"),
        (WHO | {"split": {"kind": "folds"}}, "split.kind"),
        (WHO | {"pooling": "attentive"}, "pooling: got 'attentive'"),
        (GROUP | {"name": "../x"}, "name"),
        (GROUP | {"split": {"folds": 1}}, "folds"),
    ],
)
def test_a_wrong_task_is_told(tree: dict, field: str):
    with pytest.raises(ConfigError, match=field):
        task(tree)


def test_sessions_without_the_label_are_left_out_and_counted():
    lost = {0: None, 1: "n/a", 2: float("nan"), 3: ""}
    dataset = sessions(16, group=lambda subject: lost.get(subject, "AB"[subject % 2]))
    del dataset.sessions[8].labels["group"]
    dataset.sessions[10] = dataset.sessions[10].model_copy(update={"n_kept": 7})
    found = cases_of(task(GROUP), dataset)
    assert found.left_out == {"without the label": 9}
    assert len(found.sessions) == 23 and len(found.subjects) == 12 and found.classes == ["A", "B"]
    assert [found.subjects[s][1] for s in found.subject_N] == [line.subject for line in found.sessions]


def test_equal_names_in_two_cohorts_are_two_people():
    dataset = sessions(4, 1, group=lambda subject: "AB"[subject % 2])
    dataset.sessions += [line.model_copy(update={"cohort": "d"}) for line in dataset.sessions]
    assert len(cases_of(task(GROUP), dataset).subjects) == 8


@pytest.mark.parametrize(
    ("chosen", "dataset", "what"),
    [
        (task(GROUP), sessions(16, age=lambda s: s), "label"),
        (task(SCORE), sessions(16, score=lambda s: "high"), "high"),
        (task(GROUP), sessions(16, group=lambda s: "A"), "only A"),
        (task(GROUP), sessions(16, group=lambda s: "A" if s else "B"), "class B"),
        (task(SCORE), sessions(3, score=float), "subjects"),
        (task(WHO), sessions(8, 1), "only session"),
        (task(WHO), sessions(1, 2), "subjects"),
    ],
)
def test_tasks_that_the_data_cannot_answer(chosen: Task, dataset: Any, what: str):
    with pytest.raises(ConfigError, match=what) as told:
        make_splits(chosen, cases_of(chosen, dataset), "task.yaml")
    assert "\n" not in told.value.line()


def test_a_subject_of_two_classes_is_told():
    dataset = sessions(8, group=lambda subject: "AB"[subject % 2])
    dataset.sessions[0].labels["group"] = "B"
    with pytest.raises(ConfigError, match="A and B for subject 0"):
        cases_of(task(GROUP), dataset)


@pytest.mark.parametrize("tree", [GROUP, SCORE, GROUP | {"split": {"kind": "dataset"}}])
def test_no_subject_on_both_sides_and_every_one_tested(tree: dict):
    chosen = task(tree)
    found = cases_of(chosen, sessions(24, 3, group=lambda s: "AAB"[s % 3], score=lambda s: float(s)))
    repeats = make_splits(chosen, found, "task.yaml")
    for folds in repeats:
        for split in folds:
            assert not set(found.subject_N[split.train]) & set(found.subject_N[split.test])
            assert len(split.train) + len(split.test) == len(found.sessions) and not len(split.val)
        tested = np.concatenate([split.test for split in folds])
        assert len(np.unique(tested)) == len(tested)
    if chosen.split.kind == "folds":
        assert len(tested) == len(found.sessions)
        assert not np.array_equal(repeats[0][0].test, repeats[1][0].test)
        again = make_splits(chosen, found, "task.yaml")
        assert all(
            np.array_equal(p.test, q.test)
            for x, y in zip(repeats, again, strict=True)
            for p, q in zip(x, y, strict=True)
        )
    else:
        assert {found.sessions[row].split for row in tested} == {"test"}


def test_strata_are_dealt_evenly():
    stratum_S = np.repeat([0, 1, 2], [7, 12, 5])
    fold_S = deal(stratum_S, 5, np.random.default_rng(0))
    for part in (np.bincount(fold_S), *(np.bincount(fold_S[stratum_S == k], minlength=5) for k in range(3))):
        assert np.ptp(part) <= 1


# probes


@pytest.mark.parametrize("rows", [20, 500])
def test_axes_give_the_predictions_of_all_features(rows: int):
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(rows, 300)) * 7 + 3, rng.normal(size=(5, 300)) * 7 + 3
    y = rng.normal(size=rows)
    train[:, 0] = test[:, 0] = 5  # no variance: dropped
    scaler = StandardScaler().fit(train[:, 1:])
    whole = Ridge(alpha=0.3 * 299).fit(scaler.transform(train[:, 1:]), y)
    expected = whole.predict(scaler.transform(test[:, 1:]))
    x, z = linear.standardised_axes(train, test)
    np.testing.assert_allclose(Ridge(alpha=0.3).fit(x, y).predict(z), expected, rtol=1e-6, atol=1e-9)
    assert x.shape[1] <= min(rows, 299)


def test_axes_of_many_windows_need_no_matrix_of_all_pairs():
    """20 000 windows of 6 features: their Gram matrix alone would take 3.2 GB."""
    train = np.random.default_rng(0).normal(size=(20_000, 6))
    tracemalloc.start()
    x, _ = linear.standardised_axes(train, train[:5])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert x.shape == train.shape and peak < 50e6


@pytest.mark.parametrize("tree", [GROUP, SCORE])
def test_whatever_is_fitted_sees_training_subjects_alone(tree: dict, monkeypatch: pytest.MonkeyPatch):
    """A spy on every fit: feature 0 of a session is its row, so the rows that were fitted on are known."""
    chosen = task(tree)
    found = cases_of(chosen, sessions(16, group=lambda s: "AB"[s % 2], score=float))
    vectors = np.random.default_rng(0).normal(size=(len(found.sessions), 6))
    vectors[:, 0] = np.arange(len(found.sessions))
    real, calls, asked = linear.standardised_axes, [], []

    def spy(train: np.ndarray, test: np.ndarray):
        calls.append((train[:, 0].astype(int), test[:, 0].astype(int)))
        return real(train, test)

    def method(train: np.ndarray) -> np.ndarray:
        asked.append(train)
        return vectors

    monkeypatch.setattr(linear, "standardised_axes", spy)
    probe.run_task(chosen, found, {"ours": Linear(method)}, "task.yaml")
    splits = [split for folds in make_splits(chosen, found, "task.yaml") for split in folds]
    assert [rows.tolist() for rows in asked] == [split.train.tolist() for split in splits]
    per_split = len(calls) // len(splits)
    assert per_split > 2
    for number, split in enumerate(splits):
        train, test = split.train, split.test
        *inner, last = calls[number * per_split : (number + 1) * per_split]
        for fitted, held in inner:
            assert not set(fitted) & set(test) and not set(held) & set(test)
            assert not set(found.subject_N[fitted]) & set(found.subject_N[held])
        assert last[0].tolist() == train.tolist() and last[1].tolist() == test.tolist()


def test_answers_of_test_subjects_change_no_prediction():
    chosen = task(SCORE)
    found = cases_of(chosen, sessions(16, score=lambda s: float(s % 5)))
    vectors = np.random.default_rng(0).normal(size=(32, 10))
    (fold, *_), *_ = make_splits(chosen, found, "task.yaml")
    tested, _, before = probe.predict(chosen, found, [fold], Linear(lambda train: vectors))
    found.truth_S = found.truth_S.copy()
    found.truth_S[tested] = 1e6
    _, truth, after = probe.predict(chosen, found, [fold], Linear(lambda train: vectors))
    np.testing.assert_array_equal(before, after)
    of_train = np.delete(found.truth_S, tested)
    np.testing.assert_allclose(truth, (1e6 - of_train.mean()) / of_train.std())


def test_a_subject_is_predicted_by_the_mean_of_its_sessions():
    class Known:
        def predict(self, fold: Fold) -> np.ndarray:
            return vectors[fold.test]

    chosen, found = groups(8, 2)
    vectors = np.random.default_rng(0).random((16, 2))
    folds = make_splits(chosen, found, "")[0]
    tested, truth, guess = probe.predict(chosen, found, folds, Known())
    np.testing.assert_array_equal(tested, np.arange(8))
    np.testing.assert_array_equal(truth, found.truth_S)
    np.testing.assert_allclose(guess, vectors.reshape(8, 2, 2).mean(axis=1))


def test_shuffled_labels_give_chance_and_planted_ones_are_found():
    rng = np.random.default_rng(0)
    chosen, found = groups(40)
    person = rng.normal(size=(40, 400))[found.subject_N]  # sessions of a person are alike: a leak would show
    noise = person + 0.2 * rng.normal(size=person.shape)
    scores = []
    for _ in range(8):
        found.truth_S = rng.permutation(found.truth_S)
        splits = make_splits(chosen, found, "")
        scores.append(probe.score(chosen, found, splits, Linear(lambda train: noise))["auroc"][0])
    assert 0.38 < np.mean(scores) < 0.62
    planted = noise.copy()
    planted[:, :20] += 1.5 * found.truth_S[found.subject_N][:, None]
    result = probe.run_task(chosen, found, {"ours": Linear(lambda train: planted)}, "")
    assert result.estimates["ours"]["auroc"].value > 0.9 and result.estimates["ours"]["auroc"].low > 0.8


def test_a_planted_score_is_found():
    rng = np.random.default_rng(1)
    chosen = task(SCORE)
    found = cases_of(chosen, sessions(40, score=lambda s: float((s * 7) % 40)))
    vectors = rng.normal(size=(80, 100))
    vectors[:, :30] += found.truth_S[found.subject_N][:, None] / 12
    methods = dict.fromkeys(("ours", "random"), Linear(lambda train: vectors))
    result = probe.run_task(chosen, found, methods, "")
    assert result.estimates["ours"]["r"].value > 0.8 and result.estimates["ours"]["mse"].value < 0.5
    assert all(one.value == one.low == one.high == 0 for one in result.facts.differences["random"].values())


def test_more_than_two_classes():
    rng = np.random.default_rng(0)
    chosen = task(GROUP)
    found = cases_of(chosen, sessions(30, group=lambda s: s % 3))
    vectors = rng.normal(size=(60, 20))
    vectors[np.arange(60), found.truth_S[found.subject_N]] += 5
    result = probe.run_task(chosen, found, {"ours": Linear(lambda train: vectors)}, "")
    assert result.estimates["ours"]["accuracy"].value > 0.9 and result.facts.classes == {"0": 10, "1": 10, "2": 10}


def test_a_report_keeps_other_tasks(tmp_path: Path):
    chosen, found = groups(12)
    vectors = np.random.default_rng(0).normal(size=(24, 5))
    result = probe.run_task(chosen, found, {"ours": Linear(lambda train: vectors)}, "")
    probe.write_report(tmp_path, [replace(result, name="a")])
    probe.write_report(tmp_path, [replace(result, name="b")])
    report = json.loads((tmp_path / "report.json").read_text())
    assert sorted(report["tasks"]) == sorted(report["facts"]) == ["a", "b"]
    assert (tmp_path / "a.png").stat().st_size > 5000 and (tmp_path / "b.png").exists()
    (tmp_path / "report.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"report\.json"):
        probe.write_report(tmp_path, [replace(result, name="a")])


# baselines


def test_baselines_are_what_their_names_say(dataset: Path):
    opened = Dataset(dataset)
    found = baselines.connectomes(opened, opened.sessions)[0]
    arrays = [opened.read(session, ("roi", "roi_number")) for session in opened.sessions]
    common = set.intersection(*[set(item["roi_number"].tolist()) for item in arrays])
    assert found.shape == (len(opened.sessions), len(common) * (len(common) - 1) // 2)
    rows = [list(arrays[0]["roi_number"]).index(number) for number in sorted(common)]
    plain = np.corrcoef(arrays[0]["roi"][rows])[np.tril_indices(len(rows), -1)]
    assert np.corrcoef(plain, found[0])[0, 1] > 0.999  # shrunk towards 0, otherwise the same

    def five(session: dict, names: tuple) -> dict:
        return {name: value[:5] if name == "start" else value for name, value in opened.read(session, names).items()}

    first = five(opened.sessions[0], ("start",))["start"]
    frames = sorted({int(start) + frame for start in first for frame in range(opened.frames)})
    assert len(frames) == 25 < arrays[0]["roi"].shape[1]
    series_TR = StandardScaler().fit_transform(arrays[0]["roi"][rows][:, frames].T.astype(np.float64))
    measure = ConnectivityMeasure(kind="correlation", vectorize=True, discard_diagonal=True, standardize=False)
    fewer: Any = SimpleNamespace(read=five, frames=opened.frames, folder=opened.folder)
    whole, kept = baselines.connectomes(fewer, opened.sessions[:2])
    np.testing.assert_allclose(kept[0], measure.fit_transform([series_TR])[0], atol=1e-5)
    assert not np.allclose(kept, whole, atol=1e-2)

    image = baselines.mean_image(opened, opened.sessions)
    patches, insides = [], []
    for session in opened.sessions:
        item = opened.read(session, ("baseline", "brain", "patch"))
        shape = (*opened.grid.patch_shape, opened.grid.voxels)
        volume, inside = np.zeros(shape), np.zeros(shape, bool)
        volume[tuple(item["patch"].T)] = item["baseline"]
        inside[tuple(item["patch"].T)] = item["brain"] > 0
        patches.append(volume)
        insides.append(inside)
    everywhere = np.all(insides, axis=0)
    np.testing.assert_array_equal(image, np.stack([volume[everywhere] for volume in patches]))


# the command


@pytest.fixture(scope="module")
def trained(command: Callable, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Ten people with two sessions as shards, and two steps of pretraining on them."""
    folder = tmp_path_factory.mktemp("probe")
    steps = (
        (
            "tools/make_cohort.py",
            "--out",
            folder / "bids",
            "--subjects",
            10,
            "--sessions",
            2,
            "--frames",
            60,
            "--voxel-mm",
            16,
        ),
        (
            "tools/make_shards.py",
            folder / "bids/cohort.yaml",
            "--out",
            folder / "shards",
            "--ranker",
            "ridge",
            "--workers",
            1,
            "grid.mm=16",
            "grid.shape=[16,16,16]",
        ),
        (
            "tools/pretrain.py",
            "configs/pretrain/tiny.yaml",
            f"data={folder / 'shards'}",
            f"run.out={folder / 'run'}",
            "run.steps=2",
            "run.batch=2",
            "run.workers=0",
            "run.wandb=disabled",
        ),
    )
    for words in steps:
        with mock.patch.object(dataset_page, "write", write_page):
            done = command(*words)
        assert done.returncode == 0, done.stderr
    return folder / "run", folder / "shards"


def quick(folder: Path, tree: dict, **changes: Any) -> Path:
    path = folder / f"{tree['name']}.yaml"
    path.write_text(json.dumps(tree | {"components": 2} | changes))
    return path


def test_the_command_from_run_to_report(command: Callable, trained: tuple[Path, Path], tmp_path: Path):
    run, data = trained
    group, who = quick(tmp_path, GROUP), quick(tmp_path, WHO, pooling="location")
    done = command("tools/probe.py", run, "--data", data, "--task", group, "--task", who, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    methods = {"ours", "random", "connectome", "mean_image"}  # all windows were kept
    assert report["tasks"].keys() == {"g", "f"} and report["step"] == 2
    assert report["tasks"]["g"].keys() == methods and report["tasks"]["f"].keys() == methods
    for method in methods:
        assert report["tasks"]["g"][method].keys() == {"accuracy", "balanced_accuracy", "auroc", "f1"}
        assert report["tasks"]["f"][method].keys() == {"top1", "map"}
        for score in (value for name in "gf" for value in report["tasks"][name][method].values()):
            assert 0 <= score["low"] <= score["value"] <= score["high"] <= 1
    assert report["tasks"]["f"]["mean_image"]["top1"]["value"] > 0.9  # anatomy was planted
    facts = report["facts"]["g"]
    assert facts["sessions"] == 20 and facts["subjects"] == facts["test_subjects"] == 10
    assert facts["subjects_seen_in_pretraining"] == 7
    assert facts["differences"].keys() == {"random", "connectome"} and facts["random_seeds"] == [
        0,
        1,
        2,
    ]
    found = report["tasks"]["f"]["random"]["map"]
    assert len(found["seeds"]) == 3 and found["value"] == pytest.approx(np.mean(found["seeds"]))
    assert "seeds" not in report["tasks"]["f"]["ours"]["map"]

    score = quick(tmp_path, SCORE)
    checkpoint = run / "checkpoints/step-00000002"
    words = ("--data", data, "--task", score, "pooling=attentive", "--weights", "target", "--random-seeds", 1)
    done = command("tools/probe.py", checkpoint, *words)
    assert done.returncode == 0, done.stderr
    saved = json.loads((run / "report/report.json").read_text())
    assert saved["tasks"].keys() == {"g", "f", "s"} and saved["tasks"]["g"] == report["tasks"]["g"]
    assert [saved["facts"][name]["changed"] for name in "gs"] == [[], ["pooling=attentive"]]
    assert saved["facts"]["s"]["weights"] == "target" and saved["facts"]["s"]["pooling"] == "attentive"
    assert saved["facts"]["g"]["components"] == 2 and saved["facts"]["s"].get("components") is None  # the task says 2
    assert saved["tasks"]["s"].keys() == report["tasks"]["g"].keys()
    assert "ours - random" in done.stdout and (run / "report/s.png").exists()
    stored = Report.read(run / "report/report.json").results
    assert all(draws.read(run / "report", result) for result in stored.values())


def test_the_command_scores_shares_of_the_people_and_galleries(
    command: Callable, trained: tuple[Path, Path], tmp_path: Path
):
    run, data = trained
    group, who = quick(tmp_path, GROUP, pooling="mean"), quick(tmp_path, WHO, pooling="location")
    words = ("--data", data, "--task", group, "--task", who, "--random-seeds", 1, "--out", tmp_path / "out")
    done = command("tools/probe.py", run, *words, "g.split.share=[0.6,1]", "f.gallery=5", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    few, whole = report["facts"]["g"]["shares"]
    assert (few["share"], whole["share"]) == (0.6, 1.0) and few["subjects"][1] < whole["subjects"][0]
    assert few["estimates"].keys() == report["tasks"]["g"].keys() and few["classes"].keys() == {"A", "B"}
    assert report["facts"]["g"]["split"]["share"] == [0.6, 1.0]
    assert "ours, 60 %" in done.stdout and "60 % of the training people: " in done.stdout
    assert (tmp_path / "out" / "g_shares.png").exists() and not (tmp_path / "out" / "f_shares.png").exists()
    assert report["facts"]["f"]["gallery"] == 5 and report["facts"]["f"]["chance"]["top1"] == 0.2
    assert report["tasks"]["f"]["mean_image"]["top1"]["value"] > 0.9  # anatomy was planted

    plain = command("tools/probe.py", run, "--data", data, "--task", group, "--random-seeds", 1, "--json", *words[-2:])
    again = json.loads(plain.stdout.splitlines()[-1])
    assert again["tasks"]["g"] == report["tasks"]["g"] and "shares" not in again["facts"]["g"]
    for told, changes in (
        ("split.share: got 0.1, which leaves", ["g.split.share=[0.1,1]"]),
        ("gallery: got 11 with 10 test people", ["f.gallery=11"]),
    ):
        done = command("tools/probe.py", run, *words[:-2], *changes, "--out", tmp_path / "no")
        errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
        assert done.returncode == 2 and len(errors) == 1 and told in errors[0] and not (tmp_path / "no").exists()


def test_runs_with_several_seeds_are_averaged_and_nothing_else_is(
    command: Callable, trained: tuple[Path, Path], tmp_path: Path
):
    run, data = trained
    config = "configs/pretrain/tiny.yaml"
    usual = (f"data={data}", "run.steps=2", "run.batch=2", "run.workers=0", "run.wandb=disabled")
    for name, word in (("seed", "run.seed=5"), ("view", "view=global")):
        done = command("tools/pretrain.py", config, *usual, f"run.out={tmp_path / name}", word)
        assert done.returncode == 0, done.stderr
    words = ("--data", data, "--task", quick(tmp_path, GROUP, pooling="mean"), "--random-seeds", 1, "--json")

    def score(*runs: Path) -> dict:
        done = command("tools/probe.py", *runs, "--out", tmp_path / "-".join(path.name for path in runs), *words)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    one, other, both = score(run), score(tmp_path / "seed"), score(run, tmp_path / "seed")
    values = [found["tasks"]["g"]["ours"]["auroc"]["value"] for found in (one, other)]
    assert both["tasks"]["g"]["ours"]["auroc"]["seeds"] == values
    assert both["tasks"]["g"]["ours"]["auroc"]["value"] == pytest.approx(np.mean(values))
    assert both["facts"]["g"]["random_seeds"] == [0] and len(both["facts"]["g"]["runs"]) == 2
    assert both["tasks"]["g"]["random"] == one["tasks"]["g"]["random"]

    for second, told in ((tmp_path / "view", "view: got global"), (run, "weights: got those of")):
        done = command("tools/probe.py", run, second, "--out", tmp_path / "no", *words)
        errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
        assert done.returncode == 2 and len(errors) == 1 and told in errors[0]


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        ({"label": "age"}, "label: got age"),
        ({"polling": "cov"}, "polling"),
        ({"split": {"folds": 11}}, "split.folds"),
        ({"components": 1000}, "components"),
        ({"type": "fingerprint", "pooling": "attentive"}, "pooling: got 'attentive'"),
        ({"run": "nowhere"}, "no such folder"),
        ({"words": ["g.label=age"]}, "command line: label: got age"),
        ({"words": ["split.folds=11"]}, "command line: split.folds: got 11"),
    ],
)
def test_the_command_tells_mistakes_in_one_line(
    command: Callable, trained: tuple[Path, Path], tmp_path: Path, spoil: dict, told: str
):
    run, data = trained
    changes = dict(spoil)
    words = [changes.pop("run", run), *changes.pop("words", [])]
    path = quick(tmp_path, GROUP, **changes)
    done = command("tools/probe.py", *words, "--data", data, "--task", path, "--out", tmp_path / "r")
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and told in errors[0] and "Traceback" not in done.stderr
    assert not (tmp_path / "r").exists()
