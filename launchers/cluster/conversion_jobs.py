"""A conversion on a cluster: a chain of jobs that depend on each other and are submitted together.

    extractor   one job, if an extractor must be trained: harmonises the scans it needs and trains it
    rank        an array: each task harmonises and ranks its share of the scans
    pack        one job: writes the dataset, or lists what failed

The first two are submitted twice. The second job starts only if the first one failed, and does what it left undone;
otherwise SLURM cancels it. No node therefore has to submit or requeue a job, and the command that submitted the jobs
may end. `launchers/cluster/conversion_task.py` is what runs inside the jobs.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from launchers.cluster import conversion_task, noted
from launchers.cluster.noted import TaskOutcome
from launchers.cluster.scheduler import (
    OVER,
    ClusterError,
    SlurmSettings,
    ask,
    at,
    check_array,
    check_cluster,
    last_error,
    require_slurm,
    states,
)
from launchers.cluster.script import JobFolders, Script, lines, probe
from shards.core import files
from shards.core.cli import DONE, REFUSED, RESUME, call_of, summary
from shards.core.errors import ConfigError
from shards.core.files import printable_lines
from shards.core.progress import progress
from shards.format import layout

if TYPE_CHECKING:  # these import torch
    from shards.conversion.convert import Conversion
    from slim.ranking.extractor import Extractor

_WORDS = {
    "extractor": "one job, and a second one if it fails",
    "rank": "starts after the extractor; a second array repeats tasks that fail",
    "pack": "starts when all other jobs have ended",
}
_POLL = 1.0  # seconds between queries to the controller
_SURE = 3  # consecutive queries in which all jobs must have ended: jobs of a lost node are requeued a moment later


class Chain:
    """The jobs of a conversion.

    Parameters
    ----------
    conversion : Conversion
        A conversion that has not started, with an absolute folder.
    given : Extractor, optional
        A trained extractor; by default one is trained if needed.
    settings : SlurmSettings
    tasks : int
        Largest number of tasks in the array.
    throttle : int, optional
        Largest number of tasks at the same time.
    """

    def __init__(
        self,
        conversion: Conversion,
        given: Extractor | None,
        settings: SlurmSettings,
        tasks: int,
        throttle: int | None,
    ):
        for flag, value in (("--tasks", tasks), ("--throttle", throttle)):
            if value is not None and value < 1:
                raise ConfigError("command line", flag, value, "1 or more")
        self._conversion, self._given, self._settings = conversion, given, settings
        self._tasks, self._throttle = tasks, throttle
        self._folder = conversion.folder

    def dry_run(self) -> int:
        """Find the scans, print the scripts and test them with sbatch. Nothing is submitted or written."""
        from launchers.conversion import lacks_extractor

        runs = len(self._conversion.find())
        learns = self._given is None and lacks_extractor(self._conversion)
        scripts = self._scripts(min(self._tasks, runs), learns)
        for stage, script in scripts.items():
            print(f"# {stage}: {_WORDS[stage]}\n{script.text()}")
        print(f"{runs} scans, {min(self._tasks, runs)} tasks")
        if shutil.which("sbatch") is None:
            print("sbatch is not installed here, so the scripts were not tested on a cluster", file=sys.stderr)
            return DONE
        self._check()
        for stage, script in scripts.items():
            print(f"{stage}: {script.test()}")
        return DONE

    def convert(self, command: list[str], follow: bool, as_json: bool) -> int:
        """Find the scans and submit the jobs.

        Parameters
        ----------
        command : list of str
            The command line of the caller. Giving it again continues the conversion.
        follow : bool
            Whether to show the progress until all jobs have ended.
        as_json : bool
            Whether to print the summary as JSON, too.

        Returns
        -------
        int
            Exit status; with `follow`, the status of the conversion.

        Raises
        ------
        UserError
            If an argument or a cohort is wrong, or the cluster cannot provide what is requested.
        """
        from launchers.conversion import lacks_extractor

        self._check()
        refuse_another(self._folder)
        conversion = self._conversion
        with closing(conversion):  # the jobs wait until it is closed
            conversion.open()
            conversion.find()
            for script in self._scripts(self._tasks, lacks_extractor(conversion)).values():
                script.test()
            probe(self._settings, 1, self._folder)
            conversion.begin()
            if self._given is not None and lacks_extractor(conversion):
                self._given.save(conversion.folder / layout.EXTRACTOR)
            parts = conversion_task.hand_on(conversion, self._tasks)
            jobs, cluster = _submit(self._scripts(len(parts), bool(parts) and lacks_extractor(conversion)))
            about = {
                "dataset": str(self._folder),
                "jobs": jobs,
                **({} if cluster is None else {"cluster": cluster}),
                "submitted": datetime.now().astimezone().isoformat(timespec="seconds"),
                "command": command,
            }
            files.write_atomically(
                self._folder / conversion_task.PLACE / conversion_task.JOB, json.dumps(about, indent=1) + "\n"
            )
        facts: dict[str, object] = {"dataset": str(self._folder), "runs": sum(map(len, parts)), "tasks": len(parts)}
        facts |= {"jobs": jobs, "submitted": " ".join(jobs.values())}
        if not follow:
            summary(facts, call_of("slurm status", self._folder), as_json)
            return DONE
        return _follow(self._folder, jobs, sum(map(len, parts)), facts, as_json)

    def _check(self) -> None:
        require_slurm()
        check_cluster(self._settings, 1, 0, self._folder, "--out")
        check_array(self._tasks, self._settings.clusters)

    def _scripts(self, tasks: int, learns: bool) -> dict[str, Script]:
        """The scripts by stage, in order. Without tasks there is no array."""
        limit = "" if self._throttle is None else f"%{self._throttle}"
        stages: dict[str, dict[str, object]] = {"extractor": {}} if learns else {}
        stages |= {"rank": {"array": f"0-{tasks - 1}{limit}"}} if tasks else {}
        cpus = self._settings.cpus_per_task or 1
        scripts = {}
        for stage, options in {**stages, "pack": {}}.items():
            command = lines(
                "convert.sh",
                self._settings,
                {},
                TASK_CPUS=cpus,
                STAGE=stage,
                OUTCOMES=f"{conversion_task.PLACE}/outcome",
            )
            log = f"{stage}-%A_%a.log" if options else f"{stage}-%j.log"
            scripts[stage] = Script(
                self._settings,
                JobFolders(self._folder, self._folder / conversion_task.PLACE, log),
                f"{self._folder.name}-{stage}",
                command,
                {"cpus_per_task": cpus, "ntasks_per_node": 1},
                {"nodes": 1, "kill-on-invalid-dep": "yes", **options},
            )
        return scripts


def _submit(scripts: dict[str, Script]) -> tuple[dict[str, str], str | None]:
    """Submit all jobs to the same cluster; returns the job numbers by name, and the cluster.

    If one is refused, the jobs submitted before it are cancelled.
    """
    jobs: dict[str, str] = {}
    cluster: str | None = None
    ready = ""  # dependency on the stage before: its first or its second job succeeded
    try:
        for stage, script in scripts.items():
            same = {} if cluster is None else {"clusters": cluster}
            if stage == "pack":
                others = ":".join(jobs.values())
                jobs[stage] = script.submit(**same, **({"dependency": f"afterany:{others}"} if jobs else {}))
                cluster = script.cluster
                break
            first = jobs[stage] = script.submit(**same, **({"dependency": ready} if ready else {}))
            cluster = script.cluster
            same = {} if cluster is None else {"clusters": cluster}
            second = jobs[conversion_task.again(stage)] = script.submit(**same, dependency=f"afternotok:{first}")
            ready = f"afterok:{first}?afterok:{second}"
    except ClusterError:
        if jobs:
            ask("scancel", *at(cluster), *jobs.values())
        raise
    return jobs, cluster


def refuse_another(folder: Path) -> None:
    """Raise ConfigError if jobs of an earlier command have not ended. Without SLURM this is not checked."""
    if not (folder / conversion_task.PLACE / conversion_task.JOB).exists() or shutil.which("squeue") is None:
        return
    about = conversion_task.submitted(folder)
    going = [job for job, found in states(about.jobs.values(), about.cluster).items() if not _are_over(found)]
    if going:
        raise ConfigError(
            folder,
            "--out",
            f"a dataset with unfinished jobs: {', '.join(going)}",
            "a dataset without unfinished jobs",
            f"Wait for them, or cancel them with: {call_of('slurm cancel', folder)}",
        )


def _are_over(found: Counter[str]) -> bool:
    return set(found) <= OVER


def status(folder: Path) -> tuple[dict[str, object], str]:
    """State and progress of the jobs of a dataset, as facts for a summary, and what to do next."""
    about = conversion_task.submitted(folder)
    jobs = about.jobs
    found = states(jobs.values(), about.cluster)
    facts: dict[str, object] = {
        "dataset": str(folder),
        "jobs": jobs,
        "states": {n: found[job] for n, job in jobs.items()},
    }
    facts |= {name: f"{_words(found[job])} (job {job})" for name, job in jobs.items()}
    ended = conversion_task.outcome(folder, "pack")
    going_on = f"`{noted.call(about.command)}` continues the conversion"
    log = folder / conversion_task.PLACE / f"pack-{jobs['pack']}.log"
    if ended is not None and ended.status in (DONE, REFUSED):
        return facts | ended.facts, ended.next
    facts |= conversion_task.counts(folder)
    if ended is not None and ended.error:
        return facts | {"error": ended.error, "failed": ended.failed}, f"look at {log}; {going_on}"
    if all(map(_are_over, found.values())):
        said = last_error(log.read_text(encoding="utf-8", errors="replace").splitlines()) if log.exists() else ""
        return facts | {"error": said or "the jobs ended without an error message"}, going_on
    return facts, f"`{call_of('slurm cancel', folder)}` cancels the jobs; finished work is kept"


def _words(found: Counter[str]) -> str:
    if len(found) == 1 and found.total() == 1:
        return next(iter(found)).lower()
    return ", ".join(f"{count} {state.lower()}" for state, count in sorted(found.items())) or "forgotten"


def cancel(folder: Path) -> dict[str, str]:
    """Cancel the unfinished jobs of a dataset; returns the state of each job."""
    about = conversion_task.submitted(folder)
    jobs = about.jobs
    cluster = about.cluster
    going = {job for job, found in states(jobs.values(), cluster).items() if not _are_over(found)}
    # Cancel the last job first, so that none starts because a job that it depends on has ended.
    for job in reversed(jobs.values()):
        if job in going:
            ask("scancel", *at(cluster), job)
    while not all(map(_are_over, states(jobs.values(), cluster).values())):
        time.sleep(_POLL / 4)
    return {name: "CANCELLED" if job in going else "had ended" for name, job in jobs.items()}


def _follow(folder: Path, jobs: Mapping[str, str], runs: int, facts: Mapping[str, object], as_json: bool) -> int:
    """Show the progress of the jobs until all have ended; returns the exit status of the conversion."""
    cluster = conversion_task.submitted(folder).cluster
    print(f"jobs {' '.join(jobs.values())}; Ctrl-C stops following, the jobs keep running", file=sys.stderr, flush=True)
    said, at, over = "", 0, 0
    try:
        with progress("convert", runs, "runs") as advance:
            while over < _SURE:
                found = states(jobs.values(), cluster)
                over = over + 1 if all(map(_are_over, found.values())) else 0
                now = "; ".join(f"{name}: {_words(found[job])}" for name, job in jobs.items())
                if now != said:
                    said = now
                    print(now, file=sys.stderr, flush=True)
                count = runs - conversion_task.counts(folder)["left"]
                if count > at:  # packed scans are no longer counted
                    advance(count - at, "")
                    at = count
                time.sleep(_POLL)
    except KeyboardInterrupt:
        print("the jobs keep running", file=sys.stderr)
        return DONE
    log, ended = folder / conversion_task.PLACE / f"pack-{jobs['pack']}.log", conversion_task.outcome(folder, "pack")
    if log.exists():
        sys.stderr.write(printable_lines(log.read_bytes()))
    ended = ended or TaskOutcome(status=RESUME)
    following = ended.next or f"see the logs in {folder / conversion_task.PLACE}; the same command continues"
    summary({**facts, "status": ended.status, "failed": ended.failed, **ended.facts}, following, as_json)
    return ended.status
