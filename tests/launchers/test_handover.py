"""What a submission hands on to its jobs: JSON, the same on both sides, and checked field by field."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.conversions import conversion
from launchers.cluster import handover
from launchers.conversion import parcels_of
from shards.core.errors import DatasetError, RunRefused


@pytest.fixture
def made(cohort: Path, tmp_path: Path):
    with conversion([cohort / "cohort.yaml"], tmp_path / "out") as found:
        found.find()
        yield found


def loaded(text: str, tmp_path: Path):
    path = tmp_path / "conversion.json"
    path.write_text(text)
    return handover.load(path, tmp_path / "out", parcels_of)


def test_jobs_get_what_was_found(made, tmp_path: Path) -> None:
    problem = RunRefused("file", "key", "got this", "expected that", "Do so")
    odd = Path("/data/sub-\udcff/$(id) `x`\n.nii.gz")
    labels = {"age": 31.5, "sex": "F", "n": 3, "nothing": None}
    made.runs[0] = replace(made.runs[0], problem=problem, bold=odd, tr=2, dummy=4, labels=labels, people="them")
    made.found[0].notes.append("a note")
    found = loaded(handover.dump(made), tmp_path)
    assert found.runs[0].problem.line() == problem.line()
    assert replace(found.runs[0], problem=None) == replace(made.runs[0], problem=None)
    assert found.runs[1:] == made.runs[1:] and found.splits == made.splits
    for name in ("cohorts", "settings", "configuration", "hash", "workers", "retry"):
        assert getattr(found, name) == getattr(made, name), name
    (before,), (after,) = made.found, found.found
    assert (after.settings, after.notes, after.passed_over) == (before.settings, ["a note"], before.passed_over)


def test_a_changed_setting_is_no_longer_what_was_submitted(made, tmp_path: Path) -> None:
    tree = json.loads(handover.dump(made))
    tree["settings"]["windows"]["keep"] += 1
    with pytest.raises(DatasetError, match=r"conversion\.json: hash: got .* as submitted. .*Submit again"):
        loaded(json.dumps(tree), tmp_path)
    tree["format"] = 2
    with pytest.raises(DatasetError, match="format: got 2, expected 1"):
        loaded(json.dumps(tree), tmp_path)


def test_a_file_of_another_kind_is_one_line(made, tmp_path: Path) -> None:
    for text in ("", "[]", "{}", "null", "[" * 10**5, "\x80\x04.", json.dumps({"format": 1})):
        with pytest.raises(DatasetError, match=r"conversion\.json: got .*Submit the conversion again") as error:
            loaded(text, tmp_path)
        assert len(error.value.line().splitlines()) == 1


wrong = st.one_of(st.none(), st.booleans(), st.integers(), st.lists(st.integers(), max_size=1), st.just({"a": 1}))


@given(st.data())
def test_a_field_of_another_type_is_refused_or_left_out_of_harm(tmp_path_factory, data) -> None:
    run = {
        **dict.fromkeys(("cohort", "subject", "session", "task", "run", "source", "variant", "people", "stated"), "a"),
        **dict.fromkeys(("space", "mask", "confounds", "orientation", "tr", "problem"), None),
        "bold": "/b.nii",
        "dummy": "auto",
        "labels": {},
    }
    assert handover._run_of(run).bold == Path("/b.nii")
    name = data.draw(st.sampled_from(sorted(run)))
    value = data.draw(wrong)
    try:
        found = getattr(handover._run_of({**run, name: value}), name)
    except TypeError:
        return
    assert type(found) is type(value) or isinstance(found, Path)
