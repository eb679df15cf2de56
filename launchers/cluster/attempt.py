"""One attempt of a job on a cluster: from where SLURM starts the script of a run to where that ends or is requeued.

    python -m launchers.cluster.attempt begin RUN       on one node: the configuration, for the processes there are now
    python -m launchers.cluster.attempt task RUN        every process of the run
    python -m launchers.cluster.attempt end RUN 3       on one node: prints what the job does now (an exit status)

The script that calls them is in `launchers/cluster/training_job.py`. RUN/slurm/attempts.jsonl has a line when an
attempt begins and one when it ends; an attempt without an end was lost with its node, and SLURM has requeued the job by
itself.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from launchers import job
from shards.core.cli import DONE, RESUME, WRONG, lasting_output, status_of
from shards.core.errors import ConfigError, Stopped, UserError
from slim.checkpoints.run_folder import CHECKPOINTS, CONFIG, LATEST

AGAIN = 75  # sysexits' EX_TEMPFAIL: the job is to be requeued
ATTEMPTS = "slurm/attempts.jsonl"


def begin(run: Path) -> None:
    """Write RUN/config.yaml for the processes there are this time; samples per step stay as they were asked for.

    Raises
    ------
    UserError
        If the run cannot go on with so many processes.
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
            f"a divisor of the {total} samples that the run takes per step",
            "Ask for other numbers of nodes, or another run.batch",
        )
    changes = {"processes": processes, "accumulate": accumulate}
    with job.while_away(settings):  # a mount that is gone for a moment does not end a job for good
        prepare_run(settings.model_copy(update={"run": settings.run.model_copy(update=changes)}))
    shutil.rmtree(_outcomes(), ignore_errors=True)
    _outcomes().mkdir()
    _note(run, event="began", nodes=os.environ["SLURM_JOB_NODELIST"], processes=processes)


def task(run: Path) -> int:
    """Work as one of the run's processes. To srun a process that saved and ended did well: it must not end the rest."""
    for name, given in (("RANK", "SLURM_PROCID"), ("LOCAL_RANK", "SLURM_LOCALID"), ("WORLD_SIZE", "SLURM_NTASKS")):
        os.environ[name] = os.environ[given]
    status = job.main(run / CONFIG)
    return DONE if status == RESUME else status


def end(run: Path, most: int) -> int:
    """Judge an attempt when all its processes have ended.

    Parameters
    ----------
    run : Path
    most : int
        Failures in a row, without a new checkpoint in between, that end the job.

    Returns
    -------
    int
        0 done; 2 the configuration is wrong; 3 stopped, for good; `AGAIN` where the job is to be requeued.
    """
    stopped: str | None = None
    try:
        if not _outcomes().is_dir():
            raise Stopped("no process was started, see above")
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
    _note(run, event="ended", status=status, why=word, again=again, failed=stopped is None and status == RESUME)
    shutil.rmtree(_outcomes(), ignore_errors=True)
    return AGAIN if again else status


def attempts(run: Path, number: str | None = None) -> list[dict[str, Any]]:
    """What has been noted of the attempts of a job, oldest first; of all jobs of the run without a number.

    A line that was cut in two, as a node was lost, is left out.
    """
    path = run / ATTEMPTS
    found = []
    for text in path.read_bytes().splitlines() if path.is_file() else ():
        with suppress(ValueError, RecursionError):
            line = json.loads(text)
            if _is_noted(line) and number in (None, line["job"]):
                found.append(line)
    return found


def _is_noted(line: Any) -> bool:
    """Whether `_note` may have written a line."""
    if not (isinstance(line, dict) and isinstance(line.get("job"), str) and "checkpoint" in line):
        return False
    kinds = {"status": int, "why": str, "again": bool, "failed": bool} if line.get("event") == "ended" else {}
    return line.get("event") in ("began", "ended") and all(type(line.get(name)) is kind for name, kind in kinds.items())


def newest_checkpoint(run: Path) -> str | None:
    """Name of the newest complete checkpoint of a run."""
    try:
        return (run / CHECKPOINTS / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return None


def _failures(run: Path) -> int:
    """Failures of this job in a row, none of which came to a new checkpoint."""
    count, now = 0, newest_checkpoint(run)
    for line in reversed(attempts(run, os.environ["SLURM_JOB_ID"])):
        if line["event"] == "ended":
            if not line["failed"] or line["checkpoint"] != now:
                break
            count += 1
    return count


def _note(run: Path, **facts: Any) -> None:
    line = {
        "job": os.environ["SLURM_JOB_ID"],
        "restart": int(os.environ.get("SLURM_RESTART_COUNT", 0)),
        "time": time.time(),
        "checkpoint": newest_checkpoint(run),
        **facts,
    }
    with open(run / ATTEMPTS, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


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
    with lasting_output():
        job.leave(status_of(main))
