"""One attempt of a SLURM job: from the start of the run's script to its end, or until the job is requeued.

    python -m launchers.cluster.attempt begin RUN       on one node: write the configuration for these nodes
    python -m launchers.cluster.attempt task RUN        in every process of the run: train
    python -m launchers.cluster.attempt end RUN 3       on one node: print the exit status of the job, or 75 to requeue

The script of the run (`launchers/cluster/training_job.py`) calls these. RUN/slurm/attempts.jsonl gets a line at the
start and at the end of an attempt. An attempt without an end was lost with its node; SLURM then requeues the job
itself.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TypedDict

from pydantic import ValidationError

from launchers import job
from launchers.cluster.noted import Began, Ended
from shards.core.cli import DONE, RESUME, WRONG, lasting_output, show_log, status_of
from shards.core.errors import ConfigError, Stopped, UserError
from shards.core.files import read_log
from slim.checkpoints.run_folder import CHECKPOINTS, CONFIG, LATEST

AGAIN = 75  # sysexits' EX_TEMPFAIL: the job is to be requeued
ATTEMPTS = "slurm/attempts.jsonl"


class _Now(TypedDict):
    job: str
    restart: int
    time: float
    checkpoint: str | None


def begin(run: Path) -> None:
    """Write RUN/config.yaml for the number of processes of this attempt; the samples per step stay the same.

    Raises
    ------
    UserError
        If the samples per step cannot be divided among this number of processes.
    """
    from launchers.run_setup import prepare_run
    from slim.config import load_run

    config, processes = run / CONFIG, int(os.environ["WORLD_SIZE"])
    settings = load_run(config)
    total = settings.run.batch * settings.run.accumulate * settings.run.processes
    accumulate, left = divmod(total, settings.run.batch * processes)
    if left:
        raise ConfigError(
            config,
            "run.batch",
            f"{settings.run.batch} samples x {processes} processes",
            f"a divisor of the run's {total} samples per step",
            "Request other numbers of nodes, or set another run.batch",
        )
    changes = {"processes": processes, "accumulate": accumulate}
    with job.while_away(settings):  # a mount that is lost for a moment leads to another attempt
        prepare_run(settings.model_copy(update={"run": settings.run.model_copy(update=changes)}))
    shutil.rmtree(_outcomes(), ignore_errors=True)
    _outcomes().mkdir()
    _note(run, Began(**_now(run), nodes=os.environ["SLURM_JOB_NODELIST"], processes=processes))


def task(run: Path) -> int:
    """Train, as one process of the run. Returns 0 also after a stop, because srun ends all processes if one fails."""
    for name, given in (("RANK", "SLURM_PROCID"), ("LOCAL_RANK", "SLURM_LOCALID"), ("WORLD_SIZE", "SLURM_NTASKS")):
        os.environ[name] = os.environ[given]
    status = job.main(run / CONFIG)
    return DONE if status == RESUME else status


def end(run: Path, most: int) -> int:
    """Determine how an attempt ended, and what the job does next.

    Parameters
    ----------
    run : Path
    most : int
        Number of consecutive failures without a new checkpoint after which the job ends.

    Returns
    -------
    int
        0 finished; 2 wrong configuration; 3 stopped; `AGAIN` if the job must be requeued.
    """
    stopped: str | None = None
    try:
        if not _outcomes().is_dir():
            raise Stopped("no process was started; see the messages above")
        result = job.judge(_outcomes(), int(os.environ["WORLD_SIZE"]))
        status, stopped = DONE if result.finished else RESUME, result.stopped
        word = "finished" if status == DONE else f"stopped by a {stopped} at step {result.step}"
        again = status == RESUME and stopped == "signal"
    except UserError as error:
        status, word, again = WRONG, error.line(), False
        print(f"error: {word}", file=sys.stderr)
    except Stopped as stop:
        status, word = RESUME, stop.why
        failures = 1 + _failures(run)
        again = failures < most
        word += f" (failure {failures} of {most})"
        print(f"{'failed' if again else 'error'}: {word}", file=sys.stderr)
    failed = stopped is None and status == RESUME
    _note(run, Ended(**_now(run), status=status, why=word, again=again, failed=failed))
    shutil.rmtree(_outcomes(), ignore_errors=True)
    return AGAIN if again else status


def attempts(run: Path, number: str | None = None) -> list[Began | Ended]:
    """The records of the attempts of a job, or of all jobs of the run, oldest first.

    A line that is incomplete because its node was lost is left out.
    """
    found: list[Began | Ended] = []
    for line in read_log(run / ATTEMPTS)[0]:
        kind = Ended if line.get("event") == "ended" else Began
        with suppress(ValidationError):
            record = kind.model_validate(line)
            if number in (None, record.job):
                found.append(record)
    return found


def newest_checkpoint(run: Path) -> str | None:
    """Name of the newest complete checkpoint of a run."""
    try:
        return (run / CHECKPOINTS / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return None


def _failures(run: Path) -> int:
    """Number of consecutive failures of this job without a new checkpoint."""
    count, now = 0, newest_checkpoint(run)
    for line in reversed(attempts(run, os.environ["SLURM_JOB_ID"])):
        if isinstance(line, Ended):
            if not line.failed or line.checkpoint != now:
                break
            count += 1
    return count


def _note(run: Path, record: Began | Ended) -> None:
    with open(run / ATTEMPTS, "a", encoding="utf-8") as file:
        file.write(record.model_dump_json() + "\n")


def _now(run: Path) -> _Now:
    return {
        "job": os.environ["SLURM_JOB_ID"],
        "restart": int(os.environ.get("SLURM_RESTART_COUNT", 0)),
        "time": time.time(),
        "checkpoint": newest_checkpoint(run),
    }


def _outcomes() -> Path:
    return Path(os.environ["OUTCOME"])


def main() -> int:
    what, run, *rest = sys.argv[1:]
    if what == "task":
        return task(Path(run))
    if what == "end":
        print(end(Path(run), int(rest[0])))
        return DONE
    begin(Path(run))
    return DONE


if __name__ == "__main__":
    show_log()
    with lasting_output():
        job.leave(status_of(main))
