"""Jobs that were submitted, as the command that follows them sees them: their logs, what was noted of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launchers import job
from launchers.cluster import attempt, conversion_jobs, conversion_task, tracking
from launchers.cluster.noted import Began, Ended
from shards.core.errors import ConfigError, DatasetError
from shards.core.files import printable_lines
from slim.checkpoints.run_folder import SLURM

pytestmark = pytest.mark.fast

ESCAPES = b"step 1\tloss 2\r\nstep 2\r\x1b]0;title\x07\x1b[2Jname \xff \xe2\x80\xaeend\x1b[31m\n"
HARMLESS = "step 1\tloss 2\nstep 2\n\\x1b]0;title\\x07\\x1b[2Jname \\xff \\u202eend\\x1b[31m\n"


def test_a_log_keeps_its_lines_and_loses_its_escape_sequences() -> None:
    assert printable_lines(ESCAPES) == HARMLESS
    assert printable_lines("Gehirn: Übung 脳\n".encode()) == "Gehirn: Übung 脳\n"
    assert printable_lines(b"") == ""


def noted(run: Path, **changes: object) -> Path:
    """A run whose job 12 was submitted."""
    (run / SLURM).mkdir(parents=True, exist_ok=True)
    about = {"job": "12", "log": str(run / SLURM / "12.log"), "steps": 9, "command": ["x"], "then": "y", **changes}
    (run / SLURM / tracking.JOB).write_text(json.dumps(about))
    return run


def test_the_log_of_a_job_is_printed_harmlessly_while_it_grows(tmp_path: Path, monkeypatch, capsys) -> None:
    """A letter, and an escape sequence, that are cut in two come whole."""
    log = tmp_path / "12.log"
    pieces = [b"caf\xc3", b"\xa9\n\x1b", b"[31mred\n", b"the end \x1b[0m", b"", b""]
    log.write_bytes(b"")

    def facts(*_: object) -> dict[str, str]:
        with open(log, "ab") as file:
            file.write(pieces.pop(0))
        return {"JobState": "RUNNING" if len(pieces) > 2 else "COMPLETED", "Reason": "\x1b[2J"}

    monkeypatch.setattr(tracking, "job_facts", facts)
    monkeypatch.setattr(tracking, "_POLL", 0)
    assert tracking.follow("12", log) == 0
    said = capsys.readouterr().err
    assert "café\n\\x1b[31mred\n" in said and said.endswith("the end \\x1b[0m") and "\x1b" not in said


def test_the_log_of_a_conversion_is_printed_harmlessly(tmp_path: Path, monkeypatch, capsys) -> None:
    place = tmp_path / conversion_task.PLACE
    place.mkdir(parents=True)
    (place / conversion_task.JOB).write_text(json.dumps({"jobs": {"pack": "12"}, "command": ["x"]}))
    (place / "tasks.json").write_text("[]")
    (place / "pack-12.log").write_bytes(ESCAPES)
    monkeypatch.setattr(conversion_jobs, "states", lambda *_: {"12": conversion_jobs.Counter({"COMPLETED": 1})})
    monkeypatch.setattr(conversion_jobs, "_POLL", 0)
    assert conversion_jobs._follow(tmp_path, {"pack": "12"}, 0, {}, False) == 3
    out, said = capsys.readouterr()
    assert HARMLESS in said and "\x1b" not in said + out


def test_the_words_of_a_process_are_told_harmlessly() -> None:
    assert job.Told("n7: \x1b[2J\nnot here").line() == "n7: \\x1b[2J\\nnot here"


@pytest.mark.parametrize(
    "changes",
    [
        {"job": "--user=me"},
        {"job": 12},
        {"job": ""},
        {"job": "12\n"},
        {"cluster": "--me"},
        {"cluster": 3},
        {"log": None},
        {"steps": "x"},
        {"command": "rm"},
        {"command": [1]},
        {"then": []},
    ],
)
def test_what_is_noted_of_a_job_is_no_option_of_slurms(changes: dict, tmp_path: Path) -> None:
    """`scancel --user=me` cancels everything."""
    name = next(iter(changes))
    with pytest.raises(ConfigError, match=rf"job\.json: {name}.*: got .*, expected "):
        tracking.about_job(noted(tmp_path, **changes))
    (tmp_path / conversion_task.PLACE).mkdir(parents=True)
    (tmp_path / conversion_task.PLACE / conversion_task.JOB).write_text(
        json.dumps({"jobs": {"pack": changes.get("job", "-1")}, "command": []})
    )
    with pytest.raises(ConfigError, match=r"job\.json: jobs\.pack: got"):
        conversion_task.submitted(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "[" * 10**5, "9" * 5000, '{"jobs": {}, "command": []}'])
def test_what_is_no_note_of_jobs_is_one_line(text: str, tmp_path: Path) -> None:
    (noted(tmp_path) / SLURM / tracking.JOB).write_text(text)
    (tmp_path / conversion_task.PLACE).mkdir(parents=True)
    (tmp_path / conversion_task.PLACE / conversion_task.JOB).write_text(text)
    for read in (tracking.about_job, conversion_task.submitted):
        with pytest.raises(ConfigError, match=r"job\.json: .*got ") as error:
            read(tmp_path)
        assert error.value.line().isprintable()


def test_lines_that_a_lost_node_cut_in_two_are_left_out(tmp_path: Path) -> None:
    noted(tmp_path)
    began = {"job": "12", "event": "began", "checkpoint": None}
    ended = {"job": "12", "event": "ended", "checkpoint": None, "status": 3, "why": "x", "again": True, "failed": True}
    lines = [json.dumps(began), json.dumps(ended)[:30], json.dumps({**ended, "status": "3"}), "[1]", "\x00", "[" * 9000]
    (tmp_path / attempt.ATTEMPTS).write_text("\n".join([*lines, json.dumps(ended), '{"job": "1']))
    assert attempt.attempts(tmp_path, "12") == [Began(**began), Ended(**ended)]
    (tmp_path / "metrics.jsonl").write_text('{"step": 4, "loss": 0.5}\n[1]\n{"step": 5, "lo')
    assert tracking.progress(tmp_path) == {"step": 4, "steps": 9, "loss": 0.5, "checkpoint": None}


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "null", '{"status": "0"}', '{"status": 3, "failed": "no"}', "[" * 10**5]
)
def test_the_outcome_of_a_task_that_is_none_counts_as_none(text: str, tmp_path: Path) -> None:
    place = tmp_path / conversion_task.PLACE / "outcome"
    place.mkdir(parents=True)
    (place / "pack.json").write_text(text)
    assert conversion_task.outcome(tmp_path, "pack") is None


@pytest.mark.parametrize("text", ["", "{}", '["sub-1"]', "[[1]]", "[" * 10**5])
def test_tasks_that_are_none_are_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / conversion_task.PLACE).mkdir(parents=True)
    (tmp_path / conversion_task.PLACE / "tasks.json").write_text(text)
    with pytest.raises(DatasetError, match=r"tasks\.json: got a file that cannot be read .*Submit"):
        conversion_task.tasks_of(tmp_path)
