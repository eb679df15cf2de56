"""The job of a run, once it was submitted: followed, looked at, cancelled."""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from launchers.cluster import attempt, noted
from launchers.cluster.scheduler import ask, at, is_over, job_facts, last_error
from shards.core.cli import DONE, RESUME, WRONG, call_of
from shards.core.errors import ConfigError
from shards.core.files import printable, printable_lines
from slim.checkpoints.run_folder import METRICS, SLURM

JOB = "job.json"  # in RUN/slurm: the job that was submitted last
_POLL = 1.0  # seconds between questions to the controller
_SURE = 3  # times in a row that a job must look ended: a lost node is requeued a moment later


def refuse_another(out: Path) -> None:
    """A run is trained by one job at a time."""
    about = about_job(out)
    if about is not None and not is_over(job_facts(about["job"], about.get("cluster"))):
        raise ConfigError(
            out,
            "run.out",
            f"a run whose job {about['job']} has not ended",
            "a run that no job works on",
            f"Wait for it, or call: {call_of('slurm cancel', out)}",
        )


def follow(number: str, log: Path, cluster: str | None = None) -> int:
    """Print a job's log as it grows, until the job has ended; its exit status (0, 2 or 3)."""
    print(f"job {number}: its log follows; Ctrl-C leaves it running", flush=True)
    at, said, ended = 0, "", 0
    facts: dict[str, str] | None = None
    try:
        while ended < _SURE:
            facts = job_facts(number, cluster)
            ended = ended + 1 if is_over(facts) else 0
            at = _print_from(log, at)
            state = "forgotten" if facts is None else facts["JobState"]
            reason = "" if facts is None or facts.get("Reason", "None") == "None" else f" ({facts['Reason']})"
            if state + reason != said:
                said = state + reason
                print(f"job {number}: {printable(said.lower() if not ended else said)}", file=sys.stderr, flush=True)
            time.sleep(_POLL)
    except KeyboardInterrupt:
        print(f"job {number} goes on", file=sys.stderr)
        return DONE
    _print_from(log, at, to_the_end=True)
    return _status(number, log, facts)


def _print_from(log: Path, at: int, to_the_end: bool = False) -> int:
    """Print the whole lines that a file has grown by, at the end also one without a line break; where it goes on."""
    if not log.exists():
        return at
    with open(log, "rb") as file:
        file.seek(at)
        new = file.read()
    if not to_the_end:
        new = new[: new.rfind(b"\n") + 1]
    sys.stderr.write(printable_lines(new))
    sys.stderr.flush()
    return at + len(new)


def _status(number: str, log: Path, facts: dict[str, str] | None) -> int:
    """Exit status of a job that has ended: its own account, else SLURM's."""
    own = [line for line in attempt.attempts(log.parent.parent, number) if line["event"] == "ended"]
    if facts is not None and facts["JobState"] == "COMPLETED":
        return DONE
    if own and not own[-1]["again"]:
        return int(own[-1]["status"])
    return WRONG if facts is not None and facts.get("ExitCode", "").startswith(f"{WRONG}:") else RESUME


def about_job(out: Path) -> dict[str, Any] | None:
    """What is noted of the job that was submitted last, checked; None where none was."""
    try:
        return noted.read(out / SLURM / JOB, noted.RunJob)
    except FileNotFoundError:
        return None


def progress(out: Path) -> dict[str, Any]:
    """How far a run is."""
    about = about_job(out)
    line = _last_line(out / METRICS)
    found = {"step": line.get("step", 0), "steps": None if about is None else about["steps"], "loss": line.get("loss")}
    return {**found, "checkpoint": attempt.newest_checkpoint(out)}


def _last_line(path: Path) -> dict[str, Any]:
    """The last line of a file of JSON that can be read: a kill may cut one in two."""
    if path.is_file():
        for text in reversed(path.read_bytes().splitlines()):
            with suppress(ValueError, RecursionError):
                if isinstance(line := json.loads(text), dict):
                    return line
    return {}


def status(out: Path, about: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """What the job of a run is doing and how far it is; what to do next."""
    number, log, cluster = about["job"], Path(about["log"]), about.get("cluster")
    facts = job_facts(number, cluster)
    own = attempt.attempts(out, number)
    ended = [line for line in own if line["event"] == "ended"]
    found: dict[str, Any] = {
        "run": str(out),
        "job": number,
        "cluster": cluster,
        "state": "forgotten" if facts is None else facts["JobState"],
    }
    if facts is not None:
        found |= {
            name.lower(): facts[name] for name in ("Reason", "NodeList", "StartTime", "Restarts") if name in facts
        }
    found |= progress(out)
    found |= {
        "attempts": sum(line["event"] == "began" for line in own),
        "failures": sum(line["failed"] for line in ended),
        "last_end": ended[-1]["why"] if ended else None,
        "log": str(log),
    }
    following = f"tail -f {log}"
    if is_over(facts):
        code = _status(number, log, facts)
        if code == DONE:
            following = about["then"]
        else:
            wrong = last_error(log.read_text(encoding="utf-8", errors="replace").splitlines()) if log.exists() else ""
            found["error"] = wrong or found["last_end"] or "the job ended without a word"
            following = f"look at {log}; `{noted.call(about['command'])}` goes on"
    return {name: value for name, value in found.items() if value is not None}, following


def cancel(out: Path, about: dict[str, Any]) -> dict[str, Any]:
    number, cluster = about["job"], about.get("cluster")
    was = job_facts(number, cluster)
    if not is_over(was):
        ask("scancel", *at(cluster), number)
        while not is_over(job_facts(number, cluster)):
            time.sleep(_POLL / 4)
    state = "CANCELLED" if not is_over(was) else "had ended"
    facts = {"run": str(out), "job": number, "state": state, **progress(out)}
    return {name: value for name, value in facts.items() if value is not None}
