"""Few-shot shares of the training subjects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.tasks import GROUP, SCORE, WHO, cases_of, sessions, task
from shards.core.errors import ConfigError
from slim.checkpoints.run_folder import PROBE
from slim.evaluation import display, probe
from slim.evaluation.division import divide_shares, make_splits
from slim.evaluation.linear import Linear
from slim.evaluation.results import Report, TaskResult
from slim.evaluation.task import Cases, Task
from slim.reporting import run_health

pytestmark = pytest.mark.fast

SHARES = [0.1, 0.5, 1]
KINDS: list[dict[str, Any]] = [
    {"kind": "folds", "folds": 4, "repeats": 2, "family": "family"},
    {"kind": "holdout", "repeats": 2},
    {"kind": "dataset"},
    {"kind": "listed", "column": "fold"},
    {"kind": "sites", "column": "site"},
]


def data(subjects: int = 200) -> Any:
    return sessions(
        subjects,
        2,
        group=lambda s: "AAAB"[(s // 4 + s) % 4],
        score=float,
        family=lambda s: f"f{s // 3}",
        fold=lambda s: ("train", "train", "train", "validation", "test")[s // 16 % 5],
        site=lambda s: f"site {s % 3}",
    )


def opened(tree: dict, split: dict, subjects: int = 200) -> tuple[Task, Cases, dict]:
    chosen = task(tree | {"split": split | {"share": SHARES}})
    found = cases_of(chosen, data(subjects))
    return chosen, found, divide_shares(chosen, found, make_splits(chosen, found, ""), "task.yaml")


@pytest.mark.parametrize("tree", [GROUP, SCORE], ids=["classes", "values"])
@pytest.mark.parametrize("split", KINDS, ids=lambda split: split["kind"])
def test_shares_are_nested_stratified_and_tested_on_the_same_subjects(tree: dict, split: dict):
    _, found, shares = opened(tree, split)
    assert list(shares) == [0.1, 0.5, 1.0]
    again = opened(tree, split)[2]
    for share, repeats in shares.items():
        for repeat, splits in enumerate(repeats):
            for number, less in enumerate(splits):
                whole = shares[1.0][repeat][number]
                assert np.array_equal(less.test, whole.test)
                more = shares[0.5 if share == 0.1 else 1.0][repeat][number]
                for side in ("train", "val"):
                    mine, its, all_rows = (getattr(one, side) for one in (less, more, whole))
                    assert np.array_equal(mine, getattr(again[share][repeat][number], side))
                    assert set(mine) <= set(its)
                    who, everybody = (np.unique(found.subject_N[rows]) for rows in (mine, all_rows))
                    assert set(np.flatnonzero(np.isin(found.subject_N, who))) == set(mine)  # all sessions of a person
                    if not len(all_rows):
                        continue
                    of_family = np.isin(found.family_S[everybody], found.family_S[who])
                    assert np.array_equal(everybody[of_family], who)  # whole families
                    slack = 1 if split["kind"] != "folds" else 3  # people of the families on the edge
                    assert abs(len(who) - share * len(everybody)) <= slack
                    if tree is GROUP:
                        for k in range(2):
                            count = (found.truth_S[who] == k).sum()
                            assert abs(count - share * (found.truth_S[everybody] == k).sum()) <= 2 * slack
    repeats = shares[0.1]
    drawn = {tuple(part.train) for splits in repeats for part in splits}
    assert len(drawn) == sum(map(len, repeats))  # each split draws its own


def planted(tree: dict, split: dict) -> tuple[Task, TaskResult]:
    chosen, found, shares = opened(tree, split)
    rng = np.random.default_rng(0)
    noise_NP = rng.normal(size=(len(found.sessions), 40))
    signal_N = np.asarray(found.truth_S, float)[found.subject_N]
    vector_NP = noise_NP + 0.2 * ((signal_N - signal_N.mean()) / signal_N.std())[:, None] * (np.arange(40) < 10)
    methods = {"ours": Linear(lambda train: vector_NP), "random": Linear(lambda train: noise_NP)}
    scored = {
        share: {name: [probe.score_and_permute(chosen, found, splits, method)] for name, method in methods.items()}
        for share, splits in shares.items()
    }
    return chosen, probe.summarise_shares(chosen, found, shares, scored)


@pytest.mark.parametrize("tree", [GROUP, SCORE], ids=["classes", "values"])
def test_more_training_subjects_answer_better_and_each_share_tells_what_it_had(
    tree: dict, tmp_path: Path, capsys: pytest.CaptureFixture
):
    chosen, result = planted(tree, {"kind": "holdout", "repeats": 2})
    few, half, whole = result.facts.shares
    assert [one.share for one in result.facts.shares] == SHARES
    metric = result.judged_by
    values = [one.estimates["ours"][metric].value for one in (few, half)] + [result.estimates["ours"][metric].value]
    assert values[0] + 0.03 < values[2]
    assert few.estimates.keys() == result.estimates.keys() and few.differences.keys() == {"random"}
    assert not whole.estimates and whole.subjects == (160, 160) and few.subjects == (16, 16)
    expected = {"A": (11, 11), "B": (5, 5)} if tree is GROUP else None
    assert few.classes == expected
    assert few.people_by_class == ("16 (A 11, B 5)" if tree is GROUP else "16")

    report = probe.write_report(tmp_path, [result])
    assert report.differs(chosen.name, probe.task_facts(chosen, *_cases(chosen))) is None
    tree_of = json.loads((tmp_path / PROBE).read_text())
    shares = tree_of["facts"][chosen.name]["shares"]
    assert [one["share"] for one in shares] == SHARES and shares[0]["subjects"] == [16, 16]
    assert shares[0]["estimates"]["ours"][metric]["value"] == values[0]
    assert tree_of["facts"][chosen.name]["split"]["share"] == SHARES
    read = Report.read(tmp_path / PROBE).results[chosen.name]
    assert read.facts.shares[0].estimates["random"][metric].tree() == few.estimates["random"][metric].tree()

    display.print_table(read, "title")
    told = capsys.readouterr().out
    assert "ours, 10 %" in told and "random, 50 %" in told
    picture = tmp_path / f"{chosen.name}_shares.png"
    assert picture.stat().st_size > 5000
    page = run_health.probes(run_health.read_tasks(tmp_path / PROBE))
    assert any("this run, 50 %" in str(part) for part in page) and any("People: 10 %: 16" in str(part) for part in page)

    probe.write_report(tmp_path, [TaskResult(name=chosen.name, estimates=result.estimates, facts=read.facts)])
    without = read.facts.model_copy(update={"shares": (), "label": "other"})
    probe.write_report(tmp_path, [TaskResult(name=chosen.name, estimates=result.estimates, facts=without)])
    assert not picture.exists()


def _cases(chosen: Task) -> tuple[Cases, list]:
    found = cases_of(chosen, data())
    return found, make_splits(chosen, found, "")


def test_without_shares_a_result_has_none():
    chosen = task(GROUP)
    found, splits = _cases(chosen)
    noise_NP = np.random.default_rng(0).normal(size=(400, 4))
    shares = divide_shares(chosen, found, splits, "")
    assert list(shares) == [1.0] and shares[1.0] is splits
    scored = {1.0: {"ours": [probe.score_and_permute(chosen, found, splits, Linear(lambda train: noise_NP))]}}
    facts = probe.summarise_shares(chosen, found, shares, scored).facts.tree()
    assert "shares" not in facts and "share" not in facts["split"]


@pytest.mark.parametrize(
    ("tree", "split", "told"),
    [
        (GROUP, {"folds": 4, "share": [0.1, 1]}, "got 0.1, which leaves 1 training subjects of class B"),
        (SCORE, {"folds": 4, "share": [0.1, 1]}, "got 0.1, which leaves 3 training subjects, expected at least 4"),
        (
            GROUP,
            {"kind": "holdout", "share": [0.3, 1]},
            "got 0.3, which leaves 0 validation subjects of class B (10 in all)",
        ),
    ],
)
def test_a_share_that_is_too_small_is_refused_in_one_line(tree: dict, split: dict, told: str):
    chosen = task(tree | {"split": split})
    found = cases_of(chosen, data(40))
    splits = make_splits(chosen, found, "task.yaml")
    with pytest.raises(ConfigError) as error:
        divide_shares(chosen, found, splits, "task.yaml")
    assert error.value.line().startswith(f"task.yaml: split.share: {told}") and "\n" not in error.value.line()
    assert "Use a larger share, or more subjects" in error.value.line()


@pytest.mark.parametrize(
    ("tree", "split", "told"),
    [
        (GROUP, {"share": [0.1, 0.5]}, "split.share: got .*shares above 0, ascending to 1"),
        (GROUP, {"share": [0.5, 0.1, 1]}, "split.share"),
        (GROUP, {"share": [0, 1]}, "split.share"),
        (GROUP, {"share": []}, "split.share"),
        (WHO, {"kind": "dataset", "share": [0.5, 1]}, "split.share: got .*a fingerprint trains nothing"),
        (WHO, {"kind": "all", "share": [0.5, 1]}, "split.share: got .*split.kind all trains nobody"),
    ],
)
def test_shares_that_are_no_shares_are_refused(tree: dict, split: dict, told: str):
    with pytest.raises(ConfigError, match=told):
        task(tree | {"split": split})


def test_a_class_of_one_family_cannot_be_trained_on_and_is_refused():
    """The penalty is selected by folds of families, and each needs every class."""
    kinship = sessions(24, 1, group=lambda s: "B" if s in (0, 1, 2) else "A", family=lambda s: f"f{s // 2}")
    chosen = task(GROUP | {"split": {"folds": 2, "repeats": 1, "family": "family"}})
    found = cases_of(chosen, kinship)
    with pytest.raises(ConfigError, match=r"split: got \d training families of class B .*expected at least 2") as error:
        make_splits(chosen, found, "task.yaml")
    assert "\n" not in error.value.line()
