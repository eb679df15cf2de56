"""Two runs are compared on the same draws of the same subjects, or not at all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from helpers.page_run import line, make_run
from helpers.pages import check_self_contained
from helpers.tasks import SCORE, cases_of, groups, sessions, task
from slim.evaluation import draws, metrics, probe
from slim.evaluation.division import make_splits
from slim.evaluation.linear import Linear
from slim.evaluation.results import Report, TaskResult
from slim.reporting import runs_page


def probed(folder: Path, seed: int, people: int = 24, **changes) -> TaskResult:
    """Probe vectors that know the label a little; the smaller the seed, the better."""
    chosen, found = groups(people)
    chosen = chosen.model_copy(update=changes)
    vectors = np.random.default_rng(seed).normal(size=(2 * people, 5))
    vectors[:, 0] += (2.0 - seed) * found.truth_S[found.subject_N]
    result = probe.run_task(chosen, found, {"ours": Linear(lambda train: vectors)}, "")
    probe.write_report(folder, [result])
    return result


def test_draws_are_read_as_they_were_scored(tmp_path: Path):
    result = probed(tmp_path, 0)
    stored = Report.read(tmp_path / "report.json").results[result.name]
    assert not stored.draws and stored.facts.tested == result.facts.tested
    found = draws.read(tmp_path, stored)
    assert found.keys() == result.draws.keys() >= {"auroc", "accuracy"}
    for metric, draw_D in found.items():
        np.testing.assert_array_equal(draw_D, result.draws[metric])
        assert draw_D[0] == pytest.approx(stored.estimates["ours"][metric].value)
        low, high = np.quantile(draw_D[1:][np.isfinite(draw_D[1:])], (0.025, 0.975))
        assert stored.estimates["ours"][metric].interval == pytest.approx((low, high))


def test_a_difference_is_that_of_the_same_subjects(tmp_path: Path):
    """Against the definition: both metrics on every draw of subjects, from predictions."""
    one, two = probed(tmp_path / "a", 0), probed(tmp_path / "b", 1)
    less = draws.difference(one.draws, two.draws)["auroc"]
    difference_D = one.draws["auroc"] - two.draws["auroc"]
    assert less.value == pytest.approx(one.estimates["ours"]["auroc"].value - two.estimates["ours"]["auroc"].value)
    assert less.interval == pytest.approx(tuple(np.nanquantile(difference_D[1:], (0.025, 0.975))))
    weights = metrics.bootstrap_weights(24, groups(24)[0].bootstrap, groups(24)[0].split.seed)
    assert len(difference_D) == len(weights)


@pytest.mark.parametrize("changes", [{"people": 26}, {"bootstrap": 50}, {"label": "other"}])
def test_another_question_is_another_hash(tmp_path: Path, changes: dict):
    one = probed(tmp_path / "a", 0)
    assert probed(tmp_path / "b", 3).facts.tested == one.facts.tested  # whatever the method
    if "label" in changes:
        chosen, found = task(SCORE), cases_of(task(SCORE), sessions(24, score=lambda s: float(s % 5)))
        other = draws.tested(chosen, found, make_splits(chosen, found, ""))
    else:
        other = probed(tmp_path / "c", 0, **changes).facts.tested
    assert other != one.facts.tested


def test_draws_of_other_scores_are_not_used(tmp_path: Path):
    """A report of before with draws of now, as after a kill between both files; a damaged file; none."""
    result = probed(tmp_path, 0)
    other = probed(tmp_path / "other", 1)
    assert draws.read(tmp_path, replace(result, estimates=other.estimates)) is None
    content = (tmp_path / draws.FILE).read_bytes()
    (tmp_path / draws.FILE).write_bytes(content[: len(content) // 2])
    assert draws.read(tmp_path, result) is None
    probed(tmp_path, 0)  # writes it again
    assert draws.read(tmp_path, result) is not None
    (tmp_path / draws.FILE).unlink()
    assert draws.read(tmp_path, result) is None


def text_of(runs: list[Path], out: Path) -> str:
    return check_self_contained(runs_page.write(runs, out).read_text()).text


def test_the_page_of_runs_shows_paired_differences(tmp_path: Path):
    runs = [make_run(tmp_path / name, [line(step) for step in range(1, 121)]) for name in "abc"]
    one, two = probed(runs[0] / "report", 0), probed(runs[1] / "report", 1)
    probed(runs[2] / "report", 1, people=26)
    text = text_of(runs, tmp_path / "page.html")
    less = draws.difference(two.draws, one.draws)["auroc"]
    assert f"{less.value:.3f} [{less.low:.3f}, {less.high:.3f}]" in text[text.index("b less a") :]
    assert "No paired difference to a: c" in text and "probe both again" in text


def test_a_task_probed_again_replaces_its_draws_and_keeps_those_of_others(tmp_path: Path):
    first = probed(tmp_path, 0)
    probe.write_report(tmp_path, [replace(first, name="other")])
    second = probed(tmp_path, 1)
    stored = Report.read(tmp_path / "report.json").results
    np.testing.assert_array_equal(draws.read(tmp_path, stored[second.name])["auroc"], second.draws["auroc"])
    np.testing.assert_array_equal(draws.read(tmp_path, stored["other"])["auroc"], first.draws["auroc"])
