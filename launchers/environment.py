"""What processes inherit: the variables of another job or launcher that this shell runs in do not reach a run.

A shell inside `salloc`, `srun`, `mpirun` or `torchrun` is full of variables that describe that job. `sbatch` hands them
on to the job that it queues, and `srun` takes them for its own options: a job fails because two of them exclude each
other, or gets the CPUs of another one.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import launchers
from shards.core.errors import ConfigError

# Where the cluster is, who asks, and how times are printed: not part of a job.
_SITE = {"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT", "SLURM_DEBUG_FLAGS", "SLURM_TIME_FORMAT"}
_OF_SLURM = re.compile(r"(SLURM|SBATCH|SRUN|SALLOC|SQUEUE|SINFO|SCANCEL|SCONTROL|SLURMD|SUBMITIT)_.*")
_OF_LAUNCHERS = re.compile(
    r"(OMPI|PMI|PMIX|PRTE|HYDI|MPIR|PALS|TORCHELASTIC)_.*|(I_MPI_HYDRA|MPI_LOCAL|MV2_COMM_WORLD|FLUX_JOB|FLUX_TASK)_?.*"
    r"|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|LOCAL_SIZE|ROLE_NAME|MASTER_(ADDR|PORT)"
)
ROOT = Path(launchers.__file__).parent.parent  # of this software: a checkout, or where it is installed
SLIM_BRAIN = (sys.executable, "-m", "launchers.commands")  # in a process of its own
# Options of sbatch that a user or a site sets for every job.
_DEFAULTS = {"account": "SBATCH_ACCOUNT", "partition": "SBATCH_PARTITION", "qos": "SBATCH_QOS"}


def without_launchers(given: Iterable[tuple[str, str]] | None = None) -> dict[str, str]:
    """The environment without the ranks, addresses and options that another launcher gave to this process."""
    pairs = os.environ.items() if given is None else given
    return {name: value for name, value in pairs if not _OF_LAUNCHERS.fullmatch(name)}


def with_packages(given: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that imports the packages of this one: those of a checkout may not be installed."""
    if not (ROOT / "pyproject.toml").exists():
        return dict(given)
    return {**given, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), given.get("PYTHONPATH")]))}


def for_slurm() -> dict[str, str]:
    """The environment of SLURM's commands and of the jobs they queue: nothing of an enclosing job is left in it.

    A cluster that `SLURM_CLUSTERS` names is left out, too: `cluster_of` reads it, and commands are told it by name.
    """
    pairs = without_launchers().items()
    return {name: value for name, value in pairs if name in _SITE or not _OF_SLURM.fullmatch(name)}


def ignored() -> list[str]:
    """Options of sbatch in the environment that a submission leaves out."""
    known = {"SBATCH_CLUSTERS", *_DEFAULTS.values()}
    return sorted(name for name in os.environ if name.startswith("SBATCH_") and name not in known)


def default_of(option: str) -> str | None:
    """What the environment says for an option of sbatch, such as account, where nothing else does."""
    return _value(_DEFAULTS[option])


def clusters() -> str | None:
    """The clusters that the environment names, as sbatch reads them."""
    return _value("SBATCH_CLUSTERS") or _value("SLURM_CLUSTERS")


def _value(name: str) -> str | None:
    value = os.environ.get(name, "").strip()
    if not value.isprintable():  # it would become a line of a script
        raise ConfigError("environment", name, repr(value), "a name on one line", f"Correct it, or unset {name}")
    return value or None
