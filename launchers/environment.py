"""The environment of started processes, without the variables of an enclosing job or launcher.

A shell inside `salloc`, `srun`, `mpirun` or `torchrun` has variables that describe that job. `sbatch` passes them on to
the new job, and `srun` reads them as options. The new job may then fail because two options exclude each other, or get
the CPUs of the enclosing job.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import launchers
from shards.core.errors import ConfigError

# These describe the cluster, the user and the format of times, not a job.
_SITE = {"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT", "SLURM_DEBUG_FLAGS", "SLURM_TIME_FORMAT"}
_OF_SLURM = re.compile(r"(SLURM|SBATCH|SRUN|SALLOC|SQUEUE|SINFO|SCANCEL|SCONTROL|SLURMD|SUBMITIT)_.*")
_OF_LAUNCHERS = re.compile(
    r"(OMPI|PMI|PMIX|PRTE|HYDI|MPIR|PALS|TORCHELASTIC)_.*|(I_MPI_HYDRA|MPI_LOCAL|MV2_COMM_WORLD|FLUX_JOB|FLUX_TASK)_?.*"
    r"|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|LOCAL_SIZE|ROLE_NAME|MASTER_(ADDR|PORT)"
)
ROOT = Path(launchers.__file__).parent.parent  # of this software: a checkout, or where it is installed
SLIM_BRAIN = (sys.executable, "-m", "launchers.commands")  # in a process of its own
# Options of sbatch that a user or site sets for all jobs.
_DEFAULTS = {"account": "SBATCH_ACCOUNT", "partition": "SBATCH_PARTITION", "qos": "SBATCH_QOS"}


def without_launchers(given: Iterable[tuple[str, str]] | None = None) -> dict[str, str]:
    """The environment without the ranks, addresses and options set by another launcher."""
    pairs = os.environ.items() if given is None else given
    return {name: value for name, value in pairs if not _OF_LAUNCHERS.fullmatch(name)}


def is_checkout() -> bool:
    """Whether this software runs from its sources, which another process may not find by itself."""
    return (ROOT / "pyproject.toml").is_file()


def with_packages(given: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that imports the packages of this one.

    Installed packages are found without PYTHONPATH. In it they would come before the standard library, and before the
    packages of another Python that jobs are told to use.
    """
    if not is_checkout():
        return dict(given)
    return {**given, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), given.get("PYTHONPATH")]))}


def for_slurm() -> dict[str, str]:
    """The environment for SLURM commands and the jobs they queue, without the variables of an enclosing job.

    `SLURM_CLUSTERS` is removed, too; `clusters` reads it, and commands get the cluster as an option.
    """
    pairs = without_launchers().items()
    return {name: value for name, value in pairs if name in _SITE or not _OF_SLURM.fullmatch(name)}


def ignored() -> list[str]:
    """Options of sbatch in the environment that a submission does not use."""
    known = {"SBATCH_CLUSTERS", *_DEFAULTS.values()}
    return sorted(name for name in os.environ if name.startswith("SBATCH_") and name not in known)


def default_of(option: str) -> str | None:
    """The value in the environment for an option of sbatch, such as account. It is used if no setting gives one."""
    return _value(_DEFAULTS[option])


def clusters() -> str | None:
    """The clusters that the environment names, as sbatch reads them."""
    return _value("SBATCH_CLUSTERS") or _value("SLURM_CLUSTERS")


def _value(name: str) -> str | None:
    value = os.environ.get(name, "").strip()
    if not value.isprintable():  # a line break would add a line to the script
        raise ConfigError("environment", name, repr(value), "a name on one line", f"Correct it, or unset {name}")
    return value or None
