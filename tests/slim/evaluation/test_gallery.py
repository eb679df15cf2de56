"""Re-identification in galleries of n people."""

from __future__ import annotations

import numpy as np
import pytest

from helpers.tasks import GROUP, WHO, cases_of, sessions, task
from shards.core.errors import ConfigError
from slim.evaluation import gallery, metrics, probe
from slim.evaluation.division import make_splits
from slim.evaluation.gallery import Galleries
from slim.evaluation.linear import Linear

pytestmark = pytest.mark.fast

WHO_N = np.repeat(np.arange(23) * 7, [2, 3, 2, 4] * 5 + [2, 3, 2])


@pytest.mark.parametrize("size", [2, 5, 22, 23])
def test_a_gallery_has_two_sessions_of_each_of_n_people_and_everybody_is_drawn(size: int):
    drawn = Galleries.draw(WHO_N, size, 0)
    assert len(drawn.person_Rn) >= 50 and drawn.person_Rn.shape[1] == size
    for people, enrolled, query in zip(drawn.person_Rn, drawn.enrolled_Rn, drawn.query_Rn, strict=True):
        assert len(set(people)) == size and not set(enrolled) & set(query)
        assert (WHO_N[enrolled] == people * 7).all() and (WHO_N[query] == people * 7).all()
    times = np.bincount(drawn.person_Rn.ravel(), minlength=23)
    assert times.min() > 0 and times.max() <= 2 * times.min()
    again, other = Galleries.draw(WHO_N, size, 0), Galleries.draw(WHO_N, size, 1)
    assert np.array_equal(again.query_Rn, drawn.query_Rn) and not np.array_equal(other.query_Rn, drawn.query_Rn)


def test_values_and_weighted_means_are_those_of_loops():
    rng = np.random.default_rng(0)
    similar = rng.normal(size=(len(WHO_N), len(WHO_N)))
    drawn = Galleries.draw(WHO_N, 6, 0)
    values = drawn.values(similar)
    weight_DS, weight_DR = metrics.bootstrap_weights(23, 5, 0), metrics.bootstrap_weights(len(drawn.query_Rn), 5, 1)
    totals, counts = {"top1": np.zeros(6), "map": np.zeros(6)}, np.zeros(6)
    for number in range(len(drawn.query_Rn)):
        enrolled = drawn.enrolled_Rn[number]
        for place, (person, query) in enumerate(zip(drawn.person_Rn[number], drawn.query_Rn[number], strict=True)):
            order = sorted(enrolled, key=lambda row, query=query: -similar[query, row])
            rank = 1 + order.index(enrolled[place])
            assert values["top1"][number, place] == (rank == 1) and values["map"][number, place] == 1 / rank
            weight_D = weight_DS[:, person] * weight_DR[:, number]
            totals["top1"] += weight_D * (rank == 1)
            totals["map"] += weight_D / rank
            counts += weight_D
    for name, value_Rn in values.items():
        found_D = drawn.means(value_Rn, weight_DS, weight_DR)
        np.testing.assert_allclose(found_D, totals[name] / counts)
        assert found_D[0] == pytest.approx(value_Rn.mean())


def test_chance_is_the_mean_of_random_rankings_and_equal_vectors_find_nobody():
    rng = np.random.default_rng(0)
    drawn = Galleries.draw(WHO_N, 8, 0)
    found = [drawn.values(rng.normal(size=(len(WHO_N), len(WHO_N)))) for _ in range(40)]
    for name, expected in gallery.chance(8).items():
        assert np.mean([values[name].mean() for values in found]) == pytest.approx(expected, abs=0.01)
    alike = drawn.values(np.ones((len(WHO_N), len(WHO_N))))
    assert alike["top1"].max() == 0 and (alike["map"] == 1 / 8).all()


def named(size: int | None, subjects: int = 40) -> tuple:
    chosen = task(WHO | {"gallery": size})
    return chosen, cases_of(chosen, sessions(subjects, 3))


def vectors(subject_N: np.ndarray, noise: float) -> np.ndarray:
    rng = np.random.default_rng(0)
    traits_SP = rng.normal(size=(subject_N.max() + 1, 60))
    return traits_SP[subject_N] + noise * rng.normal(size=(len(subject_N), 60))


def test_people_are_found_among_few_more_often_than_among_many():
    found = {}
    for size in (2, 10, 40):
        chosen, cases = named(size)
        vector_NP = vectors(cases.subject_N, 1.7)
        result = probe.run_task(chosen, cases, {"ours": Linear(lambda train, x=vector_NP: x)}, "task.yaml")
        found[size] = result.estimates["ours"]["top1"]
        assert result.facts.gallery == size and result.facts.chance == gallery.chance(size)
        assert result.judged_by == "map" and result.levels["top1"] == 1 / size
        assert found[size].low < found[size].value < found[size].high and found[size].p == 0.01
    assert 1 > found[2].value > found[10].value > found[40].value > 0.3


def test_noise_is_at_chance():
    chosen, cases = named(10)
    noise_NP = np.random.default_rng(1).normal(size=(len(cases.subject_N), 200))
    result = probe.run_task(chosen, cases, {"ours": Linear(lambda train: noise_NP)}, "task.yaml")
    top1 = result.estimates["ours"]["top1"]
    assert top1.low < 0.1 < top1.high and top1.p > 0.05
    constant = probe.run_task(chosen, cases, {"ours": Linear(lambda train: np.ones((120, 4)))}, "task.yaml")
    assert constant.estimates["ours"]["top1"].value == 0


def test_a_gallery_that_the_data_or_the_task_cannot_have_is_refused_in_one_line():
    chosen, cases = named(41)
    for split in ({"kind": "all"}, {"kind": "dataset"}):
        chosen = task(WHO | {"gallery": 41, "split": split})
        with pytest.raises(ConfigError, match=r"gallery: got 41 with (40|10) test people of two or more") as error:
            make_splits(chosen, cases, "task.yaml")
        assert "\n" not in error.value.line()
    with pytest.raises(ConfigError, match=r"gallery: got 5, expected nothing: a classification has none"):
        task(GROUP | {"gallery": 5})
    with pytest.raises(ConfigError, match=r"gallery"):
        task(WHO | {"gallery": 1})


def test_scores_of_another_gallery_do_not_share_a_report():
    chosen, cases = named(10)
    vector_NP = vectors(cases.subject_N, 1.0)
    facts = probe.run_task(chosen, cases, {"ours": Linear(lambda train: vector_NP)}, "task.yaml").facts
    other, _ = named(20)
    assert facts.tree()["gallery"] == 10
    assert "gallery" not in probe.task_facts(*named(None), make_splits(*named(None), "")).tree()
    assert probe.task_facts(other, cases, make_splits(other, cases, "")).gallery == 20
