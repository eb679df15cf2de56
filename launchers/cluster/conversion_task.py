"""The work inside the jobs of a conversion, which `launchers/cluster/conversion_jobs.py` submits:

    python -m launchers.cluster.conversion_task extractor DATASET      train the temporal extractor
    python -m launchers.cluster.conversion_task rank DATASET 3         harmonise and rank the scans of task 3
    python -m launchers.cluster.conversion_task pack DATASET           write the shards, or list what is missing

The command that submitted the jobs found the scans and wrote them to DATASET/work/slurm:

    conversion.json           the scans to convert, and the settings
    job.json                  the jobs that were submitted
    tasks.json                keys of the scans of each task
    outcome/3.json            how a task ended; missing if it was killed or has not ended
    outcome/pack.json         how the conversion ended
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import TypeAdapter, ValidationError

from launchers.cluster import noted
from launchers.cluster.is_done import is_done
from launchers.cluster.noted import TaskOutcome
from launchers.cluster.scheduler import last_error
from shards.core import files
from shards.core.cli import CRASHED, DONE, RESUME, WRONG, answer_as, crashed, show_log, summary
from shards.core.errors import DatasetError, Stopped, UserError
from shards.format import layout

if TYPE_CHECKING:  # this imports torch
    from shards.conversion.convert import Conversion

PLACE = Path(layout.WORK) / "slurm"  # in the dataset
JOB = "job.json"
_PLAN, _TASKS, _OUTCOME = "conversion.json", "tasks.json", "outcome"
_PATIENCE = 120.0  # seconds to wait for the lock of the command that submitted the job, or of an earlier conversion


def hand_on(conversion: Conversion, tasks: int) -> list[list[str]]:
    """Write a conversion to files for its jobs; returns the keys of the scans of each of at most `tasks` tasks."""
    from launchers.cluster import handover

    keys = [run.key for run in conversion.unsettled()]
    parts = [part for task in range(tasks) if (part := keys[task::tasks])]
    place = conversion.folder / PLACE
    shutil.rmtree(place / _OUTCOME, ignore_errors=True)
    files.write_atomically(place / _PLAN, handover.dump(conversion) + "\n")
    files.write_atomically(place / _TASKS, json.dumps(parts) + "\n")
    return parts


def tasks_of(dataset: Path) -> list[list[str]]:
    """Keys of the scans of each task."""
    path = dataset / PLACE / _TASKS
    try:
        return TypeAdapter(list[list[str]]).validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        got = f"a file that cannot be read ({type(error).__name__})"
        raise DatasetError(path, "", got, "the keys of the scans of each task", "Submit the conversion again") from None


def outcome(dataset: Path, name: str) -> TaskOutcome | None:
    """How a job (`extractor`, `pack` or the number of a task) ended; None if it is running or was killed."""
    try:
        return TaskOutcome.model_validate_json(_outcome_file(dataset, name).read_bytes())
    except (OSError, ValidationError):
        return None


def _outcome_file(dataset: Path, name: str) -> Path:
    return dataset / PLACE / _OUTCOME / f"{name}.json"


def _is_done(dataset: Path, name: str) -> bool:
    return is_done(_outcome_file(dataset, name))


def counts(dataset: Path) -> dict[str, int]:
    """Progress of all tasks, as numbers of scans."""
    work = dataset / layout.WORK
    names = {folder: {path.name for path in (work / folder).glob("[!.]*")} for folder in ("members", "failed")}
    waiting = {path.stem for path in (work / "harmonised").glob("[!.]*")}
    keys = [key for part in tasks_of(dataset) for key in part]
    ranked = {key for key in keys if f"{key}.{layout.JSON_MEMBER}" in names["members"]}
    refused = {key for key in keys if f"{key}.json" in names["failed"]} - ranked
    rest = set(keys) - ranked - refused
    found = {"runs": len(keys), "ranked": len(ranked), "refused": len(refused)}
    return {**found, "harmonised": len(rest & waiting), "left": len(rest)}


def work(name: str, dataset: Path, task: int) -> TaskOutcome:
    """Do the work of a job, and return its outcome."""
    from launchers import conversion as steps
    from launchers.cluster import handover

    steps.one_thread()
    conversion = handover.load(dataset / PLACE / _PLAN, dataset, steps.parcels_of)
    job = os.environ.get("SLURM_ARRAY_JOB_ID", os.environ["SLURM_JOB_ID"])
    with closing(conversion):
        conversion.lock.acquire(f"job {job} of a cluster", shared=name != "pack", patience=_PATIENCE)
        conversion.resume(alone=name == "pack")
        if name == "extractor":
            steps.prepare_extractor(conversion, None, may_train=True)
            return TaskOutcome(status=DONE)
        unsettled = conversion.unsettled()
        if name == "rank":
            keys = set(tasks_of(dataset)[task])
            if runs := [run for run in unsettled if run.key in keys]:
                conversion.rank(steps.ranker_of(conversion), runs)
            return TaskOutcome(status=DONE)
        if lines := failures(dataset, [run.key for run in unsettled]):
            for line in lines:
                print(f"failed: {line}")
            error = f"{len(unsettled)} of {len(conversion.runs)} scans remain; the same command continues with them"
            return TaskOutcome(status=RESUME, error=error, failed=lines)
        answer_as(submitted(dataset).command)
        refused_all = steps.lacks_extractor(conversion)  # no scan was left to train it on
        status, facts, following = steps.all_refused(conversion) if refused_all else steps.finish(conversion)
        summary(facts, following, as_json=False)
        return TaskOutcome(status=status, facts=facts, next=following)


def failures(dataset: Path, left: Sequence[str]) -> list[str]:
    """A line for each job that failed: its name, the remaining scans, the reason and the log."""
    missing, lines = set(left), []
    jobs, parts = submitted(dataset).jobs, tasks_of(dataset)
    if missing and "extractor" in jobs and not _is_done(dataset, "extractor"):
        return [f"extractor: {_why(dataset, 'extractor', 'extractor', '')}"]  # without it no task can rank
    for number, part in enumerate(parts):
        if (rest := missing.intersection(part)) and not _is_done(dataset, str(number)):
            why = _why(dataset, str(number), "rank", f"_{number}")
            lines.append(f"task {number}, {len(rest)} of its {len(part)} scans remain: {why}")
            missing -= rest
    return lines + [f"{key} changed during the conversion" for key in sorted(missing)]


def _why(dataset: Path, name: str, stage: str, suffix: str) -> str:
    """Why the second try failed, from its outcome or else from the last error in its log."""
    jobs = submitted(dataset).jobs
    logs = [dataset / PLACE / f"{stage}-{jobs[job]}{suffix}.log" for job in (stage, again(stage))]
    logs = [log for log in logs if log.exists()]
    said = last_error(logs[-1].read_text(encoding="utf-8", errors="replace").splitlines()) if logs else ""
    found = outcome(dataset, name)
    why = (found.error if found else "") or said or "it ended without an error message"
    return f"{why} (see {logs[-1]})" if logs else why


def again(stage: str) -> str:
    """Name of the second job of a stage, which runs if the first one fails."""
    return f"{stage} again"


def submitted(dataset: Path) -> noted.DatasetJobs:
    """Read the record of the submitted jobs.

    Raises
    ------
    FileNotFoundError
        If no job was submitted.
    ConfigError
        If the file has other content.
    """
    return noted.read(dataset / PLACE / JOB, noted.DatasetJobs)


def main() -> int:
    name, dataset, task = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0
    # SLURM sends this signal shortly before the time limit. Finished scans are kept in any case, so it is ignored.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    own = _outcome_file(dataset, str(task) if name == "rank" else name)
    own.unlink(missing_ok=True)
    try:
        found = work(name, dataset, task)
    except UserError as error:
        found = TaskOutcome(status=WRONG, error=error.line())
    except Stopped as stop:
        found = TaskOutcome(status=RESUME, error=str(stop))
    except Exception as error:
        found = TaskOutcome(status=CRASHED, error=crashed(error, dataset / PLACE))
    if found.error:
        print(f"error: {found.error}", file=sys.stderr)
    files.write_atomically(own, found.model_dump_json(exclude_defaults=True) + "\n")
    return found.status


if __name__ == "__main__":
    show_log()
    sys.exit(main())
