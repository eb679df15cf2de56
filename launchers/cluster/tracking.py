"""The submitted job of a run: follow its log, show its status, cancel it."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from launchers.cluster import attempt, noted
from launchers.cluster.scheduler import ask, at, is_over, job_facts, last_error
from shards.core.cli import DONE, RESUME, WRONG, call_of
from shards.core.errors import ConfigError
from shards.core.files import printable, printable_lines, read_log
from slim.checkpoints.run_folder import METRICS, SLURM

JOB = "job.json"  # in RUN/slurm: the record of the last submitted job
_POLL = 1.0  # seconds between queries to the controller
_SURE = 3  # consecutive queries in which a job must have ended: after the loss of a node it is requeued a moment later


def refuse_another(out: Path) -> None:
    """Raise ConfigError if an earlier job of the run has not ended."""
    about = about_job(out)
    if about is not None and not is_over(job_facts(about.job, about.cluster)):
        raise ConfigError(
            out,
            "run.out",
            f"a run with an unfinished job: {about.job}",
            "a run without an unfinished job",
            f"Wait for it, or cancel it with: {call_of('slurm cancel', out)}",
        )


def follow(number: str, log: Path, cluster: str | None = None) -> int:
    """Print the log of a job as it grows, until the job has ended; returns its exit status (0, 2 or 3)."""
    print(f"job {number}: log follows; Ctrl-C stops following, the job keeps running", flush=True)
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
        print(f"job {number} keeps running", file=sys.stderr)
        return DONE
    _print_from(log, at, to_the_end=True)
    return _status(number, log, facts)


def _print_from(log: Path, at: int, to_the_end: bool = False) -> int:
    """Print the new complete lines of a file from position `at`; returns the position after them.

    With `to_the_end`, a last line without a line break is printed, too.
    """
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
    """Exit status of a job that has ended, from its records or else from SLURM."""
    own = [line for line in attempt.attempts(log.parent.parent, number) if isinstance(line, noted.Ended)]
    if facts is not None and facts["JobState"] == "COMPLETED":
        return DONE
    if own and not own[-1].again:
        return own[-1].status
    return WRONG if facts is not None and facts.get("ExitCode", "").startswith(f"{WRONG}:") else RESUME


def about_job(out: Path) -> noted.RunJob | None:
    """The checked record of the last submitted job; None if no job was submitted."""
    try:
        return noted.read(out / SLURM / JOB, noted.RunJob)
    except FileNotFoundError:
        return None


def progress(out: Path) -> dict[str, object]:
    """Progress of a run."""
    about = about_job(out)
    lines, _ = read_log(out / METRICS)
    line = lines[-1] if lines else {}
    found = {"step": line.get("step", 0), "steps": None if about is None else about.steps, "loss": line.get("loss")}
    return {**found, "checkpoint": attempt.newest_checkpoint(out)}


def status(out: Path, about: noted.RunJob) -> tuple[dict[str, object], str]:
    """State and progress of the job of a run, and what to do next."""
    number, log, cluster = about.job, Path(about.log), about.cluster
    facts = job_facts(number, cluster)
    own = attempt.attempts(out, number)
    ended = [line for line in own if isinstance(line, noted.Ended)]
    found: dict[str, object] = {
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
        "attempts": sum(isinstance(line, noted.Began) for line in own),
        "failures": sum(line.failed for line in ended),
        "last_end": ended[-1].why if ended else None,
        "log": str(log),
    }
    following = f"tail -f {log}"
    if is_over(facts):
        code = _status(number, log, facts)
        if code == DONE:
            following = about.then
        else:
            wrong = last_error(log.read_text(encoding="utf-8", errors="replace").splitlines()) if log.exists() else ""
            found["error"] = wrong or found["last_end"] or "the job ended without an error message"
            following = f"see {log}; `{noted.call(about.command)}` continues the run"
    return {name: value for name, value in found.items() if value is not None}, following


def cancel(out: Path, about: noted.RunJob) -> dict[str, object]:
    number, cluster = about.job, about.cluster
    was = job_facts(number, cluster)
    if not is_over(was):
        ask("scancel", *at(cluster), number)
        while not is_over(job_facts(number, cluster)):
            time.sleep(_POLL / 4)
    state = "CANCELLED" if not is_over(was) else "had ended"
    facts = {"run": str(out), "job": number, "state": state, **progress(out)}
    return {name: value for name, value in facts.items() if value is not None}
