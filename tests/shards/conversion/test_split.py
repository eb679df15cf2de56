"""Who is in which split: shares kept, families together, nobody moved, the given column followed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.cohorts.scan import RunSource
from shards.conversion.splits import SPLITS, DatasetSplitSettings, assign, read_table, split_people, write_table
from shards.core.errors import ConfigError, DatasetError

pytestmark = pytest.mark.fast

NAMES = st.lists(st.text("abc0123", min_size=1, max_size=6), min_size=1, max_size=80, unique=True)
SHARES = st.tuples(st.integers(1, 9), st.integers(0, 9), st.integers(0, 9)).map(
    lambda parts: tuple(part / sum(parts) for part in parts)
)


@settings(max_examples=100, deadline=None)
@given(subjects=NAMES, shares=SHARES, seed=st.integers(0, 99), labels=st.integers(1, 80), order=st.randoms())
def test_splits_are_by_subject_and_keep_their_shares(subjects, shares, seed, labels, order):
    strata = {("c", subject): str(number % labels) for number, subject in enumerate(subjects)}
    result = split_people(strata, shares, seed)
    assert result.keys() == strata.keys()
    for stratum in {None, *strata.values()}:  # None: all of them
        members = [person for person in strata if stratum in (None, strata[person])]
        counts = Counter(result[person] for person in members)
        for split, share in zip(SPLITS, shares, strict=True):
            assert abs(counts[split] - share * len(members)) < (1 if stratum is None else 2) + 1e-6
    shuffled = list(strata.items())
    order.shuffle(shuffled)
    assert split_people(dict(shuffled), shares, seed) == result  # in any order
    if shares[0] >= max(shares[1:]):
        assert "train" in result.values()


def test_the_default_split_is_70_10_20_and_depends_on_the_seed():
    strata = {("c", str(number)): "" for number in range(100)}
    first, second = split_people(strata, seed=0), split_people(strata, seed=1)
    assert Counter(first.values()) == {"train": 70, "val": 10, "test": 20} and first != second
    for people in range(1, 12):
        assert "train" in split_people(dict(list(strata.items())[:people])).values()


def test_cohorts_are_divided_each_by_itself():
    one = {("a", str(number)): "" for number in range(10)}
    two = {("b", str(number)): "" for number in range(7)}
    assert split_people(one | two) == split_people(one) | split_people(two)


@settings(max_examples=100, deadline=None)
@given(subjects=NAMES, later=st.integers(0, 80), seed=st.integers(0, 99))
def test_people_who_are_added_move_nobody(subjects, later, seed):
    strata = {("c", subject): "" for subject in subjects}
    early = dict(list(strata.items())[: len(strata) - later])
    settled = split_people(early, seed=seed)
    result = split_people(strata, seed=seed, settled=settled)
    assert settled.items() <= result.items() and result.keys() == strata.keys()
    counts = Counter(result.values())
    for split, share in zip(SPLITS, (0.7, 0.1, 0.2), strict=True):
        assert abs(counts[split] - share * len(strata)) < 2  # a split that is too full takes nobody new


@settings(max_examples=100, deadline=None)
@given(subjects=NAMES, family=st.integers(1, 6), seed=st.integers(0, 99))
def test_families_stay_together_and_shares_hold_to_a_family(subjects, family, seed):
    strata = {("c", subject): "" for subject in subjects}
    families = {person: (number // family if number % 3 else None) for number, person in enumerate(strata)}
    result = split_people(strata, seed=seed, families=families)
    for name in {f for f in families.values() if f is not None}:
        assert len({result[person] for person in strata if families[person] == name}) == 1
    counts = Counter(result.values())
    for split, share in zip(SPLITS, (0.7, 0.1, 0.2), strict=True):
        assert abs(counts[split] - share * len(strata)) <= family + 1


def test_a_family_that_was_settled_in_two_splits_is_refused():
    people = [("c", "a"), ("c", "b")]
    settled = {people[0]: "train", people[1]: "test"}
    with pytest.raises(DatasetError, match="test and train for family 7"):
        split_people(dict.fromkeys(people, ""), families=dict.fromkeys(people, 7), settled=settled)


def runs(*labels: dict) -> list[RunSource]:
    """A run per row; rows with the same `who` are sessions of one person."""
    return [
        RunSource(
            "c", str(row.get("who", number)), str(number), "", "", Path("b.nii"), f"{number}.nii", None, labels=row
        )
        for number, row in enumerate(labels)
    ]


def test_a_column_of_numbers_is_stratified_by_fifths():
    sample = runs(*({"age": 20 + number * 0.5} for number in range(100)))
    splits, torn = assign(sample, DatasetSplitSettings(stratify="age"), {})
    assert not torn and Counter(splits.values()) == {"train": 70, "val": 10, "test": 20}
    for fifth in range(5):
        part = Counter(splits["c", str(number)] for number in range(20 * fifth, 20 * fifth + 20))
        assert part == {"train": 14, "val": 2, "test": 4}


def test_the_split_is_taken_from_a_column_on_request():
    sample = runs({"part": "train"}, {"part": "Validation"}, {"part": "test"}, {"part": "both"}, {"part": None})
    splits, torn = assign(sample, DatasetSplitSettings(column="part"), {})
    assert splits == {("c", "0"): "train", ("c", "1"): "val", ("c", "2"): "test"}
    assert {person[1]: problem.got for person, problem in torn.items()} == {
        "3": "both for subject 3",
        "4": "None for subject 4",
    }
    with pytest.raises(DatasetError, match=r"splits\.tsv: part: got train for subject 0, expected test"):
        assign(sample[:1], DatasetSplitSettings(column="part"), {("c", "0"): "test"})
    with pytest.raises(ConfigError, match=r"split\.column: got no label fold"):
        assign(sample, DatasetSplitSettings(column="fold"), {})


@pytest.mark.parametrize("field", ["column", "family", "stratify"])
def test_a_subject_whose_sessions_disagree_would_be_in_two_splits(field):
    sample = runs({"who": "x", "part": "train"}, {"who": "x", "part": "test"}, {"who": "y", "part": "train"})
    splits, torn = assign(sample, DatasetSplitSettings(**{field: "part"}), {})
    assert set(splits) == {("c", "y")} and list(torn) == [("c", "x")]
    assert "part: got test and train for subject x, expected one value" in torn["c", "x"].line()


def test_what_was_written_down_is_read_back(tmp_path):
    splits = {("a b", "01"): "train", ("c", "NA"): "test", ("c", "007"): "val"}
    assert read_table(tmp_path) == {}
    write_table(tmp_path, splits)
    assert read_table(tmp_path) == splits
