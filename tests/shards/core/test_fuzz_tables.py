"""Damaged tables of participants, confounds and events: read, or refused in one line; see `fuzzing`."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from helpers.fuzzing import answer, counts, hold, texts
from helpers.records import session_record
from shards.cohorts.cohort_file import CohortSettings
from shards.cohorts.participants import Participants
from shards.core import tables
from shards.core.errors import RunRefused, UserError
from shards.core.settings import check
from shards.preprocessing import confounds
from slim.evaluation import events
from slim.evaluation.events import EventSettings

pytestmark = pytest.mark.fast

PARTICIPANTS = (
    "participant_id\tage\tsex\tscore\nsub-01\t20\tF\t1.5\nsub-02\t30\tM\tn/a\nsub-003\t41\tF\t-2e-3\n",
    "participant_id,age\n01,20\n02,30\n3,n/a\n",
    'subject;group;"note"\n"01";A;"a ""b"""\n"02";B;\n',
    "\ufeffSUB_ID age\r\n0050002 20\r\n50003 30\r\n",
)
SESSIONS = (
    "participant_id\tsession_id\tage\nsub-01\tses-1\t20\nsub-01\tses-2\t21\nsub-02\tses-01\t30\n",
    "participant_id\tses\tscore\n01\t1\t.5\n01\t2\tn/a\n02\t\t3\n",
)
CONFOUNDS = (
    "global_signal\tframewise_displacement\ttrans_x\tnon_steady_state_outlier00\n"
    + "1.5\tn/a\t0\t1\n"
    + "1.25\t0.1\t-1e-3\t0\n" * 4,
    "a,framewise_displacement\nn/a,nan\n" + "1,0.5\n" * 4,
    "csf white_matter\n" + "1 2\n" * 5,
)
EVENTS = (
    "onset\tduration\ttrial_type\n0\t5\trest\n5.5\tn/a\ttask\n12\t3\trest\n",
    "onset,duration,trial_type,value\n0,1,a,\n1,0,b,3\n",
)
SCANNED = {("01", ""), ("02", "1"), ("1", "2"), ("0050002", ""), ("²", "x")}
SESSION = session_record(subject="01", dropped_frames=2)


def read_all(path: Path, content: bytes) -> None:
    """Every column of a table, each way that columns are read."""
    path.write_bytes(content)

    def call() -> None:
        table = tables.read(path, "a table")
        assert all(len(row) == len(table.columns) for row in table.rows) and len(table.lines) == len(table)
        for column in table.columns:
            table.texts(column)
            table.values(column)
            try:
                numbers = table.numbers(column)
            except UserError as told:
                assert "\n" not in told.line()
            else:
                assert numbers.shape == (len(table),)

    answer(call, len(content))


def read_participants(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    cohort = check(CohortSettings, {"name": "c", "root": ".", "participants": path.name}, "test")

    def call() -> None:
        people = Participants(path.parent / "cohort.yaml", cohort, path.parent, SCANNED)
        for subject, session in SCANNED:
            assert isinstance(people.labels(subject, session), dict)
        assert all(note.splitlines() == [note] for note in people.notes())

    answer(call, len(content))


def read_confounds(path: Path, content: bytes) -> None:
    path.write_bytes(content)

    def call() -> None:
        table = confounds.read(path, 5)
        moved_T = confounds.framewise_displacement(table)
        assert moved_T is None or (len(moved_T) == 5 and np.isfinite(np.nanmean(moved_T)))
        assert 0 <= confounds.non_steady_state(table) <= 5
        values_TC = confounds.columns(path, table, ("*",))
        assert np.isfinite(values_TC).all() and values_TC.shape[0] == 5

    told = answer(call, len(content))
    assert told is None or isinstance(told, RunRefused)


def read_events(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    settings = EventSettings(path=path.name)

    def call() -> None:
        found = events.read(settings, path.parent, SESSION, "task.yaml")
        states = events.states(found, np.array([0.0, 3.6, 7.2]), 3.6, settings.delay)
        assert len(states) == 3

    answer(call, len(content))


@counts
def test_tables(inputs: int, tmp_path: Path) -> None:
    seeds = texts((*PARTICIPANTS, *SESSIONS, *CONFOUNDS, *EVENTS))
    hold(inputs, seeds, partial(read_all, tmp_path / "table.tsv"))


@counts
def test_participants(inputs: int, tmp_path: Path) -> None:
    hold(inputs, texts((*PARTICIPANTS, *SESSIONS)), partial(read_participants, tmp_path / "participants.tsv"))


@counts
def test_confounds(inputs: int, tmp_path: Path) -> None:
    hold(inputs, texts(CONFOUNDS), partial(read_confounds, tmp_path / "confounds.tsv"))


@counts
def test_events(inputs: int, tmp_path: Path) -> None:
    hold(inputs, texts(EVENTS), partial(read_events, tmp_path / "events.tsv"))


def test_many_columns_and_many_names_take_no_time(tmp_path: Path) -> None:
    """Each was compared with all others."""
    path = tmp_path / "wide.tsv"
    names = [f"c{number}" for number in range(30_000)]
    path.write_text("\t".join(["participant_id", *names]) + "\n" + "\t".join(["sub-1", *["1"] * len(names)]) + "\n")
    cohort = check(CohortSettings, {"name": "c", "root": ".", "participants": path.name}, "test")
    scanned = {("1", "")}
    began = time.process_time()
    assert len(Participants(tmp_path / "cohort.yaml", cohort, tmp_path, scanned).labels("1", "")) == 30_000
    path.write_text("participant_id\tage\n" + "".join(f"{number:06d}\t1\n" for number in range(20_000)))
    scanned = {(str(number), session) for number in range(20_000) for session in "12"}
    people = Participants(tmp_path / "cohort.yaml", cohort, tmp_path, scanned)
    assert people.labels("7", "1") == {"age": 1} and len(people.notes()) == 1
    assert time.process_time() - began < 15
