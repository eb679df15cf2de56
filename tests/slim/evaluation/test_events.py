"""States of windows from BIDS tables of events, and what a probe makes of them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.records import session_record
from shards.core.errors import ConfigError
from shards.core.settings import check
from slim.evaluation import events, metrics, probe
from slim.evaluation.division import make_splits
from slim.evaluation.events import EventSettings
from slim.evaluation.linear import Linear
from slim.evaluation.task import Task, find_cases

pytestmark = pytest.mark.fast

SETTINGS = EventSettings(path="sub-{subject}_ses-{session}_events.tsv", delay=5)
STATE = {
    "name": "w",
    "type": "state",
    "events": {"path": "sub-{subject}_ses-{session}_events.tsv"},
    "pooling": "location",
    "bootstrap": 100,
    "permutations": 99,
    "split": {"kind": "holdout", "shares": [0.5, 0.2, 0.3], "repeats": 2},
}
WINDOW = 3.6


def table(*rows: tuple[float, float, str]) -> pd.DataFrame:
    return pd.DataFrame(
        [(onset, onset + length, state) for onset, length, state in rows], columns=["onset", "end", "state"]
    )


def test_windows_take_the_state_that_overlaps_them_most():
    found = events.states(table((0, 4, "a"), (10, 1, "b"), (20, 30, "c")), np.arange(0, 60, WINDOW), WINDOW, 5.0)
    shifted = {"a": (5, 9), "b": (15, 16), "c": (25, 55)}
    for start, state in zip(np.arange(0, 60, WINDOW), found, strict=True):
        share = {name: min(end, start + WINDOW) - max(onset, start) for name, (onset, end) in shifted.items()}
        for name, (onset, end) in shifted.items():
            half = 0.5 * min(WINDOW, end - onset)
            assert (state == name) == (share[name] >= half - 1e-9), (start, name)
    assert {"a", "b", "c", None} == set(found)


def test_a_window_that_two_states_claim_alike_has_none():
    assert events.states(table((0, 4, "a"), (0, 4, "b")), np.array([5.0]), WINDOW, 5.0) == [None]
    assert events.states(table((0, 4, "a"), (0, 3, "b")), np.array([5.0]), WINDOW, 5.0) == ["a"]
    assert events.states(table(), np.array([5.0]), WINDOW, 5.0) == [None]


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 20), st.sampled_from("abc")), max_size=8), st.floats(0, 50))
def test_moving_events_and_windows_together_changes_nothing(rows: list, by: float):
    start_W = np.arange(0, 100, WINDOW)
    moved = [(onset + by, length, state) for onset, length, state in rows]
    before = events.states(table(*rows), start_W, WINDOW, 5.0)
    after = events.states(table(*moved), start_W + by, WINDOW, 5.0)
    assert sum(a != b for a, b in zip(before, after, strict=True)) <= len(rows)  # only ties within rounding


SESSION = session_record(subject="1", session="2", task="rest", dropped_frames=3, source_tr=2.0)


def test_a_table_is_read_from_the_first_frame_that_was_kept(tmp_path: Path):
    (tmp_path / "sub-1_ses-2_events.tsv").write_text(
        "onset\tduration\ttrial_type\n10\t2\tgo\n20\tn/a\tstop\n30\t1\tn/a\n"
    )
    found = events.read(SETTINGS, tmp_path, SESSION, "task.yaml")
    assert found.values.tolist() == [[4.0, 6.0, "go"], [14.0, 14.0, "stop"]]
    some = SETTINGS.model_copy(update={"keep": ("stop",)})
    assert events.read(some, tmp_path, SESSION, "task.yaml")["state"].tolist() == ["stop"]


def test_events_that_cannot_be_read_are_told(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"events\.path: got no file .*--events"):
        events.read(SETTINGS, tmp_path, SESSION, "task.yaml")
    (tmp_path / "sub-1_ses-2_events.tsv").write_text("onset\tduration\n10\t2\n")
    with pytest.raises(ConfigError, match="trial_type: got columns onset, duration"):
        events.read(SETTINGS, tmp_path, SESSION, "task.yaml")
    with pytest.raises(ConfigError, match="and no other fields"):
        check(EventSettings, {"path": "{subjet}.tsv"}, "task.yaml")


FILES = EventSettings(path="{task}/EVs/{state}.txt", keep=("lh", "0bk_body", "t"), delay=5)


def test_a_file_for_each_state_gives_the_events_of_a_table(tmp_path: Path):
    """FSL's files: no header, blanks or tabs, weight 0 for no event, empty or absent without events."""
    folder = tmp_path / "rest" / "EVs"
    folder.mkdir(parents=True)
    (folder / "lh.txt").write_text("10.5\t2\t1.0\n40\t12\t1\n\n60 3 0\n")
    (folder / "0bk_body.txt").write_text("  26.0  27.5  1\n")
    (folder / "rh.txt").write_text("1\t2\t1\n")  # not asked for
    rows = [(10.5, 12.5, "lh"), (40, 52, "lh"), (26, 53.5, "0bk_body")]
    expected = [[onset - 6, end - 6, state] for onset, end, state in rows]
    assert events.read(FILES, tmp_path, SESSION, "task.yaml").values.tolist() == expected
    (folder / "t.txt").write_text("")
    found = events.read(FILES, tmp_path, SESSION, "task.yaml")
    assert found.values.tolist() == expected
    (tmp_path / "sub-1_ses-2_events.tsv").write_text(
        "onset\tduration\ttrial_type\n10.5\t2\tlh\n40\t12\tlh\n26\t27.5\t0bk_body\n"
    )
    table_W, files_W = (
        events.states(events.read(each, tmp_path, SESSION, "task.yaml"), np.arange(0, 60, WINDOW), WINDOW, 5.0)
        for each in (SETTINGS, FILES)
    )
    assert table_W == files_W and {"lh", "0bk_body", None} == set(files_W)
    for name in ("lh", "0bk_body", "t"):
        (folder / f"{name}.txt").unlink()
    assert not len(events.read(FILES, tmp_path, SESSION, "task.yaml"))
    assert events.states(events.read(FILES, tmp_path, SESSION, ""), np.array([5.0]), WINDOW, 5.0) == [None]


def test_files_of_states_that_cannot_be_read_are_told(tmp_path: Path):
    def refusal() -> str:
        with pytest.raises(ConfigError) as error:
            events.read(FILES, tmp_path, SESSION, "task.yaml")
        assert "\n" not in error.value.line()
        return error.value.line()

    assert f"events.path: got no folder {tmp_path}/rest/EVs, expected the events of k" in refusal()
    folder = tmp_path / "rest" / "EVs"
    folder.mkdir(parents=True)
    for text in ("1\t2\n", "1\t2\t3\t4\n", "onset\tduration\tweight\n"):
        (folder / "lh.txt").write_text("3\t1\t1\n" + text)
        assert "lh.txt: line 2: got" in (told := refusal()) and "three numbers in each line" in told
    with pytest.raises(ConfigError, match="keep: got nothing, expected the states, one for each file"):
        check(EventSettings, {"path": "{state}.txt"}, "task.yaml")
    with pytest.raises(ConfigError, match="in the name of the file alone"):
        check(EventSettings, {"path": "{state}/events.txt", "keep": ["a"]}, "task.yaml")


def test_a_state_that_occurs_in_no_scan_is_refused(tmp_path: Path):
    kept = STATE["events"] | {"keep": ["go", "stop", "wait"]}
    with pytest.raises(ConfigError, match=r"events.keep: got wait in no scan, expected states that occur"):
        find_cases(check(Task, STATE | {"events": kept}, "task.yaml"), written(tmp_path), "task.yaml", tmp_path)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"pooling": "cov"}, "pooling: got cov, expected mean or location of a window: the others need a whole scan"),
        ({"label": "x"}, "label: got x, expected nothing: states come from events. Remove label"),
        ({"events": None}, "events: got nothing, expected the events from which states are decoded. Add this key"),
        (
            {"confounds": ["age"]},
            "confounds: got ['age'], expected nothing: they are the same in all windows of a session. Remove confounds",
        ),
        ({"split": {"kind": "all"}}, "split.kind: got all, expected another split: a state is fitted"),
        (
            {"type": "regression", "label": "age"},
            "events: got a value, expected nothing: a regression has none. Remove events",
        ),
    ],
)
def test_a_wrong_task_is_told(changes: dict, told: str):
    with pytest.raises(ConfigError) as error:
        check(Task, STATE | changes, "task.yaml")
    assert error.value.line() == f"task.yaml: {told}"


def written(folder: Path, subjects: int = 20) -> SimpleNamespace:
    """A dataset of sessions with 12 windows each, and their events."""
    rng = np.random.default_rng(0)
    lines = []
    for subject in range(subjects):
        states = rng.choice(["go", "stop"], 12)
        rows = [f"{WINDOW * number - 5}\t{WINDOW}\t{state}" for number, state in enumerate(states)]
        (folder / f"sub-{subject}_ses-1_events.tsv").write_text(
            "onset\tduration\ttrial_type\n" + "\n".join(rows) + "\n"
        )
        lines.append(session_record(key=f"s{subject}", subject=str(subject), session="1", n_kept=12, split="test"))

    def read(session: dict, names: tuple) -> dict:
        return {"start": np.random.default_rng(1).permutation(12) * 5}  # in rank order

    return SimpleNamespace(sessions=lines, folder="data", frames=5, read=read)


def test_states_are_decoded_for_subjects_nobody_was_trained_on(tmp_path: Path):
    task = check(Task, STATE, "task.yaml")
    cases = find_cases(task, written(tmp_path), "task.yaml", tmp_path)
    assert len(cases.sessions) == 240 and cases.classes == ["go", "stop"] and len(cases.distinct()) == 20
    first = cases.window_N[:12]
    np.testing.assert_allclose(first, np.arange(12) * WINDOW)
    for (split,) in make_splits(task, cases, "task.yaml"):
        sides = [set(cases.subject_N[rows]) for rows in (split.train, split.val, split.test)]
        assert not sides[0] & sides[1] and not sides[0] & sides[2] and not sides[1] & sides[2]
        assert len(split.train) + len(split.val) + len(split.test) == 240

    rng = np.random.default_rng(2)
    noise = rng.normal(size=(240, 30)) + rng.normal(size=(20, 30))[cases.subject_N]
    planted = noise + 4 * cases.state_N[:, None] * (np.arange(30) < 3)
    methods = {name: Linear(lambda train, x=x: x) for name, x in (("ours", planted), ("random", noise))}
    result = probe.run_task(task, cases, methods, "task.yaml")
    assert result.estimates["ours"]["accuracy"].value > 0.85 and result.estimates["ours"]["accuracy"].p == 0.01
    assert result.estimates["random"]["accuracy"].value < 0.65 and result.estimates["random"]["auroc"].p > 0.01
    assert (
        result.facts.tree()["windows"] == 240 and sum(result.facts.classes.values()) == 12 * result.facts.test_subjects
    )


def test_windows_are_drawn_with_their_subject(tmp_path: Path):
    """With all windows of a subject right, or all wrong, the interval is that of so many subjects."""
    task = check(Task, STATE | {"split": {"kind": "folds", "folds": 2, "repeats": 1}}, "task.yaml")
    cases = find_cases(task, written(tmp_path), "task.yaml", tmp_path)

    class Known:
        def predict(self, fold):
            right = cases.subject_N[fold.test] % 2
            guess = np.where(right, cases.state_N[fold.test], 1 - cases.state_N[fold.test])
            return np.eye(2)[guess]

    accuracy_D = probe.score(task, cases, make_splits(task, cases, ""), Known())["accuracy"]
    assert accuracy_D[0] == 0.5
    weight_DS = metrics.bootstrap_weights(20, 100, 0)
    np.testing.assert_allclose(accuracy_D, weight_DS @ (np.arange(20) % 2) / 20)
