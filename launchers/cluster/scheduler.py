"""Settings of SLURM jobs, and queries to SLURM about the cluster and about jobs."""

from __future__ import annotations

import math
import re
import shutil
import socket
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationInfo, field_validator

from launchers import environment
from launchers.cluster import plain
from shards.core.errors import ConfigError, UserError, did_you_mean
from shards.core.settings import Settings, Unit

COMMANDS = ("sbatch", "srun", "scontrol", "sinfo", "squeue", "scancel")
# Final states of a job. After NODE_FAIL and PREEMPTED it may be requeued a moment later.
OVER = {
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "PREEMPTED",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
}
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::([0-5]?\d))?(?::([0-5]?\d))?", re.ASCII)


class ClusterError(UserError):
    """SLURM is not available, or refuses a request."""


class SlurmSettings(Settings):
    """Options of `sbatch` and `srun`; null or an empty text means the default of the cluster."""

    partition: str | None = Field(None, description="partition of the cluster")
    account: str | None = Field(None, description="account that is charged")
    qos: str | None = Field(None, description="quality of service")
    time: str | None = Field(None, description="time limit of one attempt, [D-]HH:MM:SS; the job is requeued")
    mem: str | None = Field(None, description="memory per node, such as 64G")
    constraint: str | None = Field(None, description="required features of the nodes")
    cpus_per_task: Annotated[int | None, Unit("CPUs")] = Field(
        None, ge=1, description="null: run.workers + 1; for conversions 1"
    )
    modules: tuple[str, ...] = Field((), description="environment modules, loaded in this order")
    setup: tuple[str, ...] = Field((), description="lines of bash, run on the first node before anything else")
    srun: tuple[str, ...] = Field((), description="arguments of srun, such as those of a container")
    sbatch: dict[str, str | bool] = Field({}, description="other options of sbatch; true for an option without a value")
    python: str | None = Field(None, description="Python on the nodes; null: the one of the submitting command")
    signal: Annotated[int, Unit("s")] = Field(
        120, ge=1, validate_default=True, description="time before the limit at which the run saves and ends"
    )
    max_failures: Annotated[int, Unit("failures")] = Field(
        3, ge=1, description="consecutive failures without a new checkpoint that end the job"
    )

    @field_validator("partition", "account", "qos", "time", "mem", "constraint", "python", mode="before")
    @classmethod
    def _is_default(cls, value: object) -> object:
        return None if isinstance(value, str) and not value.strip() else value

    @field_validator("modules", "srun")
    @classmethod
    def _are_not_empty(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(part.strip() for part in value):
            raise ValueError("a list without empty texts")
        return value

    @field_validator("*")
    @classmethod
    def _are_plain(cls, value: object, about: ValidationInfo) -> object:
        return plain.checked(value, lines=about.field_name == "setup")  # `setup` is lines of bash

    @field_validator("time", mode="before")
    @classmethod
    def _is_text(cls, value: object) -> object:
        # YAML 1.1 reads 12:00:00 as the number 43200.
        if value is not None and not isinstance(value, str):
            raise ValueError('text in quotes, such as "12:00:00"')
        return value

    @field_validator("time")
    @classmethod
    def _is_time(cls, value: str | None) -> str | None:
        if value is not None and not seconds(value):
            raise ValueError("a time such as 12:00:00 or 2-00:00:00")
        return value

    @field_validator("sbatch", mode="before")
    @classmethod
    def _are_options(cls, value: object) -> object:
        """Convert numbers to text. `exclusive:` and `exclusive: true` give an option without value, false omits it."""
        if not isinstance(value, dict):
            return value
        found = {}
        for name, given in value.items():
            if isinstance(given, int | float) and not isinstance(given, bool):
                given = str(given)
            if given is not False:
                found[name] = True if given is None or given == "" else given
        return found

    @field_validator("signal")
    @classmethod
    def _comes_before_the_end(cls, value: int, others: ValidationInfo) -> int:
        time = others.data.get("time")
        if time is not None and value >= seconds(time):
            raise ValueError(f"less than time, {seconds(time)} seconds")
        return value

    @property
    def clusters(self) -> str | None:
        """The clusters to which the job may be sent, separated by commas; None for the local cluster."""
        for option in ("clusters", "cluster"):
            if isinstance(named := self.sbatch.get(option), str):
                return named
        return environment.clusters()


def seconds(time: str) -> int:
    """Seconds of a SLURM time: MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS; 0 for other text."""
    match = _TIME.fullmatch(time)
    if match is None:
        return 0
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is None:  # the last number is seconds, but a single number is minutes
        hours, minutes, rest = {1: [0, *numbers, 0], 2: [0, *numbers], 3: numbers}[len(numbers)]
    else:
        hours, minutes, rest = [*numbers, 0, 0][:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + rest


def nodes_of(text: str) -> tuple[int, int]:
    """Smallest and largest number of nodes, from `4` or `2-4`.

    Raises
    ------
    ConfigError
        For other text.
    """
    match = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", text)
    fewest, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= fewest <= most:
        raise ConfigError("command line", "--nodes", text, "a number such as 4, or a range such as 2-4")
    return fewest, most


def ask(*words: object, stdin: str = "", timeout: float = 60) -> str:
    """Run a SLURM command without the variables of an enclosing job, and return its output.

    The lines `CLUSTER: NAME` above the output for each cluster are left out.

    Raises
    ------
    ClusterError
        If the command fails or does not answer; it holds the command's error message.
    """
    name = str(words[0])
    try:
        done = subprocess.run(
            [*map(str, words)],
            input=stdin,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout,
            env=environment.for_slurm(),
        )
    except FileNotFoundError:
        raise ClusterError(name, "", "no such command", "SLURM's commands on PATH") from None
    except subprocess.TimeoutExpired:
        raise ClusterError(name, "", f"no answer in {timeout:.0f} s", "an answer from SLURM's controller") from None
    if done.returncode:
        raise ClusterError(name, "", _first_reason(done.stderr) or f"status {done.returncode}", "an answer")
    said = "\n".join(line for line in done.stdout.splitlines() if not line.startswith("CLUSTER: "))
    return said.strip() or done.stderr.strip()


def at(cluster: str | None) -> list[str]:
    """The option with which SLURM commands select a cluster."""
    return [] if cluster is None else [f"--clusters={cluster}"]


def _first_reason(text: str) -> str:
    lines = [line.removeprefix("error: ") for line in (re.sub(r"^\w+: ", "", line) for line in text.splitlines())]
    return "; ".join(dict.fromkeys(line.strip() for line in lines if line.strip()))


def require_slurm() -> None:
    """Raise ClusterError if SLURM's commands are not on PATH."""
    for name in COMMANDS:
        if shutil.which(name) is None:
            raise ClusterError(
                name,
                "",
                "no such command on this machine",
                "SLURM's commands on PATH",
                "Use a login node of the cluster, or `slim-brain pretrain` to train on this machine",
            )


def check_cluster(settings: SlurmSettings, nodes: int, gpus: int, folder: Path, field: str = "run.out") -> None:
    """Check a job against the cluster before it is submitted.

    Parameters
    ----------
    settings : SlurmSettings
    nodes, gpus : int
        Number of nodes, and of GPUs per node.
    folder : Path
        Folder that the job works in.
    field : str
        Setting or option that names the folder.

    Raises
    ------
    ConfigError
        If the partition does not exist, has fewer nodes, fewer GPUs per node or a shorter time limit than requested,
        or if other machines cannot see the folder.
    """
    there = at(settings.clusters)
    known = dict(_partition(line) for line in ask("sinfo", *there, "-h", "-a", "-o", "%P").splitlines())
    name = (
        settings.partition
        or environment.default_of("partition")
        or next((name for name, default in known.items() if default), None)
    )
    if name is None:
        expected = f"one of {', '.join(known)}, because the cluster has no default partition"
        raise ConfigError("command line", "--partition", "nothing", expected)
    for one in name.split(","):
        if one not in known:
            hint = did_you_mean(one, known)
            raise ConfigError("command line", "--partition", one, f"one of {', '.join(known)}", hint)
    asked = ("-h", "-N", "-p", name, "-o", "%N|%G|%o|%l")
    lines = [line.split("|") for line in ask("sinfo", *there, *asked).splitlines()]
    names = {node for node, *_ in lines}
    if nodes > len(names):
        raise ConfigError("command line", "--nodes", nodes, f"at most {len(names)}, as partition {name} has")
    most = max(gpus_of(gres) for _, gres, *_ in lines)
    if gpus > most:
        raise ConfigError("command line", "--gpus-per-node", gpus, f"at most {most}, as a node of {name} has")
    limit = max(seconds(longest) or math.inf for *_, longest in lines)  # may be `infinite`
    if settings.time is not None and seconds(settings.time) > limit:
        raise ConfigError("command line", "--time", settings.time, f"at most {limit / 60:.0f} minutes, as {name} has")
    elsewhere = [node for node, _, address, _ in lines if not _is_here(node, address)]
    if elsewhere and is_local(folder):
        raise ConfigError(
            folder,
            field,
            "a folder that only this machine has",
            f"a folder that {elsewhere[0]} has, too",
            "Use a folder on a shared file system",
        )


def _partition(text: str) -> tuple[str, bool]:
    return text.rstrip("*"), text.endswith("*")


def gpus_of(gres: str) -> int:
    """Number of GPUs of a node, from generic resources `NAME[:TYPE][:NUMBER]`: `gpu:a100:4(S:0-1),shard:8` gives 4."""
    count = 0
    for resource in re.sub(r"\([^()]*\)", "", gres).split(","):
        name, *rest = resource.split(":")
        if name == "gpu":  # the type may be a number: gpu:3090:4
            count += int(rest[-1]) if rest and rest[-1].isdecimal() else 1
    return count


def _is_here(node: str, address: str) -> bool:
    return socket.gethostname() in (node, address) or address.startswith("127.")


def is_local(folder: Path) -> bool:
    """Whether a folder is certainly local to this machine: in memory, or a temporary folder."""
    folder = folder.resolve()
    places = {Path("/tmp"), Path("/var/tmp"), Path("/dev/shm"), Path(tempfile.gettempdir()).resolve()}
    return not places.isdisjoint(folder.parents)


def check_array(tasks: int, cluster: str | None = None) -> None:
    """Raise ConfigError if a cluster does not accept an array of this size."""
    there = at(None if cluster is None or "," in cluster else cluster)  # scontrol accepts one cluster only
    match = re.search(r"MaxArraySize\s*=\s*(\d+)", ask("scontrol", *there, "show", "config"))
    if match is not None and tasks > (most := int(match[1])):
        raise ConfigError("command line", "--tasks", tasks, f"at most {most}, as this cluster's MaxArraySize allows")


def states(jobs: Iterable[str], cluster: str | None = None) -> dict[str, Counter[str]]:
    """For each job, the number of tasks in each state, as far as SLURM remembers; one task if it is not an array."""
    found: dict[str, Counter[str]] = {job: Counter() for job in jobs}
    text = _about_jobs("squeue", *at(cluster), "-h", "-r", "-t", "all", "-j", ",".join(found), "-o", "%F %T")
    for job, state in map(str.split, (text or "").splitlines()):
        found[job][state] += 1
    return found


def job_facts(job: str, cluster: str | None = None) -> dict[str, str] | None:
    """Facts about a job from `scontrol` (JobState, Reason, Restarts, ExitCode, ...); None if SLURM forgot the job."""
    text = _about_jobs("scontrol", *at(cluster), "show", "job", "-o", job)
    if text is None:
        return None
    return dict(pair for word in text.split() if len(pair := word.split("=", 1)) == 2)


def _about_jobs(name: str, *words: str) -> str | None:
    """The answer of `ask` about jobs; None if SLURM does not know them.

    A command fails with the same status if a job is unknown and if the controller does not answer. The job is unknown
    if the question fails twice and the controller answers another one in between.
    """
    try:
        return ask(name, *words)
    except ClusterError:
        ask("scontrol", *(word for word in words if word.startswith("--clusters=")), "show", "config")
    try:
        return ask(name, *words)
    except ClusterError:
        return None


def is_over(facts: dict[str, str] | None) -> bool:
    """Whether a job has ended, according to SLURM."""
    return facts is None or facts["JobState"] in OVER


def last_error(lines: Sequence[str]) -> str:
    """The text of the last line that starts with `error: `, after an optional label of srun or of SLURM's daemon."""
    found = [match[1] for line in lines if (match := re.match(r"(?:\s*\d+: |slurmstepd: )?error: (.*)", line))]
    return found[-1] if found else ""
