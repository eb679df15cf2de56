"""Labels as real tables have them: values in several spellings, words that look like nothing, one value for all."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.tasks import GROUP, SCORE, cases_of, sessions, task
from shards.core.errors import ConfigError
from slim.evaluation import baselines
from slim.evaluation.division import make_splits
from slim.evaluation.labels import is_missing, number, word

pytestmark = pytest.mark.fast

HOLDOUT = {"split": {"kind": "holdout", "shares": [0.5, 0.2, 0.3], "repeats": 1}}


def classes(values: list[Any], **changes: Any) -> dict[str, int]:
    """Subjects of each class, of 4 subjects for each value."""
    found = cases_of(task(GROUP | changes), sessions(4 * len(values), 1, group=lambda s: values[s % len(values)]))
    return {name: int((found.truth_S == k).sum()) for k, name in enumerate(found.classes)}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 1, "1", "1.0", 2], {"1": 16, "2": 4}),  # a column of numbers in one cohort, of text in another
        (["R ", "R", " R", "L"], {"L": 4, "R": 12}),
        (["None", "NA", "null", "nan", None, "n/a", "", math.nan], {"NA": 4, "None": 4, "nan": 4, "null": 4}),
        ([True, "True", False], {"False": 4, "True": 8}),
        (["01", "02"], {"01": 4, "02": 4}),  # names
        ([0.5, "0.50", ".5", "-1"], {"-1": 4, "0.5": 12}),
    ],
)
def test_a_class_is_a_value_however_it_is_written(values: list[Any], expected: dict[str, int]):
    assert classes(values) == expected


def test_marks_and_classes_are_values_too():
    named = {"classes": {"well": ["0"], "ill": ["1.0", "None"]}, "missing": ["-9999", "N/A"]}
    assert classes([0.0, "1 ", "None", -9999.0, "N/A"], **named) == {"ill": 8, "well": 4}
    with pytest.raises(ConfigError, match="classes: got 1 in a and in b, expected each value in one class"):
        task(GROUP | {"classes": {"a": ["1"], "b": ["1.0"]}})


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (["01", "1", "2"], "label: got both '01' and '1' in column group"),
        (["01", 1.0, "2"], "label: got both '01' and '1' in column group"),
        (["007", "07", "8"], "both '007' and '07'"),
        (["M", "F", "m"], "both 'M' and 'm'"),
        ([True, "true", "no"], "both 'True' and 'true'"),
    ],
)
def test_values_that_are_one_class_or_two_are_refused(values: list[Any], told: str):
    with pytest.raises(ConfigError, match=told) as refused:
        classes(values)
    assert "\n" not in refused.value.line() and "classes" in refused.value.line()
    named = {"a": [str(value) for value in values[:2]], "b": [str(values[2])]}
    assert len(classes(values, classes=named)) == 2  # the task says which is which


def told_by(tree: dict, subjects: int = 16, **labels: Any) -> str:
    with pytest.raises(ConfigError) as refused:
        chosen = task(tree)
        make_splits(chosen, cases_of(chosen, sessions(subjects, 2, **labels)), "task.yaml")
    line = refused.value.line()
    assert "\n" not in line and line.startswith("task.yaml: ")
    return line


def test_a_value_that_everybody_has_is_refused():
    line = told_by(SCORE, score=lambda s: 3.0)
    assert "label: got the same value 3 of score for all 16 people, expected values that differ" in line
    line = told_by(GROUP | {"confounds": ["age", "site"]}, group=lambda s: "AB"[s % 2], age=float, site=lambda s: "x")
    assert "confounds: got the same value x of site for all 16 people" in line
    # one person differs, and is not trained on in one of the folds
    assert "the same value 1 of score for all 12 training people" in told_by(SCORE, score=lambda s: 1.0 + (s == 5))


def test_a_class_of_one_person_is_refused_by_name():
    line = told_by(GROUP, group=lambda s: "A" if s > 2 else "BCC"[s])
    assert "label: got 1 person of class B (people of each class: A 13, B 1, C 2)" in line
    line = told_by(GROUP | HOLDOUT, group=lambda s: "A" if s > 1 else "B")
    assert "subjects of class B (2 in all)" in line


@pytest.mark.parametrize("value", ["high", "1_000", "1,5", True, "inf", "nan", "None", "\u0663"])
def test_what_is_no_number_is_refused_in_a_regression(value: Any):
    line = told_by(SCORE, score=lambda s: value if s == 3 else float(s))
    assert f"label: got {value!r} in column score, expected a number" in line


def test_numbers_written_as_text_are_numbers():
    found = cases_of(task(SCORE), sessions(8, 1, score=lambda s: [" 1.50", "08", "-2e1", 7][s % 4]))
    assert found.truth_S.tolist() == [1.5, 8.0, -20.0, 7.0] * 2


def test_confounds_are_read_as_labels_are():
    dataset = sessions(
        8, 1, group=lambda s: "AB"[s % 2], age=lambda s: f"{20 + s} ", site=lambda s: [1, "1.0", "x", "None"][s % 4]
    )
    dataset.sessions[0].labels["age"] = "unknown"
    chosen = task(GROUP | {"confounds": ["age", "site"], "missing": ["unknown"]})
    found = cases_of(chosen, dataset)
    vector_NF = baselines.confounds(found.sessions, chosen.confounds)
    assert vector_NF[:, 0].tolist() == list(range(21, 28))
    assert vector_NF[:, 1:].sum(axis=0).tolist() == [3, 2, 2]  # 1, None, x
    assert "confounds: got both '01' and '1' in column site" in told_by(
        GROUP | {"confounds": ["site"]}, group=lambda s: "AB"[s % 2], site=lambda s: ["1", "01", "x"][s % 3]
    )


def test_families_are_read_as_labels_are():
    tree = GROUP | {"split": {"folds": 4, "repeats": 1, "family": "family"}, "missing": ["-9999"]}
    dataset = sessions(12, 1, group=lambda s: "AB"[s % 2], family=lambda s: [-9999, 5.0, "5 ", s][s % 4])
    family_S = cases_of(task(tree), dataset).family_S
    subjects = sorted(range(12), key=str)  # as they are ordered
    assert len(set(family_S)) == 12 - 5  # the mark is nobody's family, 5.0 and "5 " are one of six
    assert len({family_S[subjects.index(s)] for s in range(12) if s % 4 in (1, 2)}) == 1
    assert "split.family: got both '05' and '5'" in told_by(
        tree, group=lambda s: "AB"[s % 2], family=lambda s: ["5", "05", s][s % 3]
    )


@given(st.one_of(st.integers(-(10**20), 10**20), st.floats(allow_nan=False, allow_infinity=False)))
def test_a_number_is_one_word_in_all_its_spellings(value: float):
    assert word(value) == word(str(value)) == word(f" {value}\t") == word(word(value))
    assert float(word(value)) == float(value)
    assert number(word(value)) == float(value) == number(value)


@given(st.text())
def test_any_text_is_a_word_or_missing(text: str):
    found = word(text)
    assert found == word(found) and is_missing(text) == (text.strip() in ("", "n/a"))
    assert number(text) is None or np.isfinite(number(text))
