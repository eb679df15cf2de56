"""Scripts for `sbatch`, written and submitted with submitit."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launchers import environment
from launchers.cluster.plain import refuse_folder
from launchers.cluster.scheduler import ClusterError, SlurmSettings, ask
from launchers.environment import ROOT
from launchers.job import Told
from shards.core.cli import WRONG
from shards.core.errors import ConfigError

if TYPE_CHECKING:
    from submitit import SlurmExecutor

_DIRECTIVES = ("#SBATCH", "#PBS", "#BSUB")  # sbatch reads such comments at the top of a script as options
_TEMPLATES = Path(__file__).with_name("templates")


def _writer(folder: Path) -> SlurmExecutor:
    from submitit import SlurmExecutor  # needed to submit alone

    class Writer(SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            return 2  # so that a script can be written on machines without SLURM

    return Writer(folder)


@dataclass(frozen=True)
class JobFolders:
    """Where a job works and writes.

    Attributes
    ----------
    about : Path
        The run or the dataset: FOLDER in the environment of the script.
    folder : Path
        Absolute path of the folder for the script and its logs.
    log : str
        Name of the log, with SLURM's fields such as `%j` for the job number.
    """

    about: Path
    folder: Path
    log: str


class Script:
    """A script and its submission.

    Parameters
    ----------
    settings : SlurmSettings
    place : JobFolders
    name : str
        Name of the job.
    command : str
        Lines of bash; FOLDER, PYTHON and SOFTWARE (where this software is) are set in their environment.
    share : dict
        Requested resources of a node, as parameters of submitit.
    sbatch : dict
        Other options of `sbatch`.

    Attributes
    ----------
    cluster : str or None
        The cluster that accepted the last submitted job; None for the local cluster.
    """

    def __init__(
        self,
        settings: SlurmSettings,
        place: JobFolders,
        name: str,
        command: str,
        share: Mapping[str, object],
        sbatch: Mapping[str, object],
    ):
        about, folder, log = place.about, place.folder, place.log
        for path in (folder, about, Path.cwd(), ROOT):
            refuse_folder(path)
        refuse_setup(settings)
        self.folder = folder
        root = shlex.quote(str(ROOT))
        lookup = f"export PYTHONPATH={root}${{PYTHONPATH:+:$PYTHONPATH}}\n" if environment.is_checkout() else ""
        self._command = f"""
export FOLDER={shlex.quote(str(about))} PYTHON={shlex.quote(settings.python or sys.executable)}
{lookup}export SOFTWARE={root} PYTHONUTF8=1
{command.strip()}
"""
        self._sbatch = {
            "chdir": str(Path.cwd()),
            "output": f"{str(folder).replace('%', '%%')}/{log}",  # SLURM replaces fields such as %j
            "requeue": True,
            **({} if settings.mem is None else {"mem": settings.mem}),
            **({} if settings.clusters is None else {"clusters": settings.clusters}),
            **{name: value for name, value in settings.sbatch.items() if name != "cluster"},
            **sbatch,
        }
        self._clusters, self.cluster = settings.clusters, settings.clusters
        self._executor = _writer(folder)
        self._executor.update_parameters(
            **share,
            job_name=name,
            partition=settings.partition or environment.default_of("partition"),
            account=settings.account or environment.default_of("account"),
            qos=settings.qos or environment.default_of("qos"),
            time=settings.time,
            constraint=settings.constraint,
            signal_delay_s=settings.signal,
            setup=_setup(settings),
            stderr_to_stdout=True,
            use_srun=False,
            wckey=None,
        )

    def text(self, **sbatch: Any) -> str:
        """The text of the script, with further options of `sbatch`."""
        self._executor.update_parameters(additional_parameters={**self._sbatch, **sbatch})
        return self._executor._make_submission_file_text(self._command, "")

    def test(self) -> str:
        """Test the script with `sbatch --test-only`; returns when and where the job would start.

        Raises
        ------
        ClusterError
            If the cluster refuses the script.
        """
        return ask("sbatch", "--test-only", stdin=self.text())

    def submit(self, **sbatch: Any) -> str:
        """Submit the script, with further options of `sbatch`; returns the job number.

        The script is kept as JOB_submission.sh.

        Raises
        ------
        ClusterError
            If the cluster refuses the script.
        """
        if left := environment.ignored():
            what = f"{', '.join(left)} of the environment are ignored: set these options in the file of --slurm"
            print(f"note: {what}", file=sys.stderr)
        text = self.text(**sbatch)
        path = self.folder / f".submission-{os.getpid()}.sh"
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            path.write_text(text, encoding="utf-8", errors="surrogateescape")
            said = ask("sbatch", path)
            found = re.search(r"[Ss]ubmitted .*?job (\d+)(?: on cluster (\S+))?", said)
            if found is None:
                raise ClusterError("sbatch", "", f"the answer {said!r}", "the number of a job")
            path.rename(self.folder / f"{found[1]}_submission.sh")
        finally:
            path.unlink(missing_ok=True)
        self.cluster = found[2] or (self._clusters if self._clusters and "," not in self._clusters else None)
        return found[1]


def lines(template: str, settings: SlurmSettings, exported: Mapping[str, object], **values: object) -> str:
    """A bash template, preceded by lines that set its variables.

    Parameters
    ----------
    template : str
        Name of a file in `templates/`. It is valid bash; all values are passed as variables.
    settings : SlurmSettings
        Its options of `srun` become the array SRUN.
    exported : mapping of str to object
        Variables that are exported to the processes of the job.
    values : object
        Variables of the script only. CHECK, the text of `check.sh`, is always set.
    """
    told = [
        *(f"export {name}={shlex.quote(str(value))}" for name, value in {"WRONG": WRONG, **exported}.items()),
        *(f"{name}={shlex.quote(str(value))}" for name, value in {"CHECK": _check(), **values}.items()),
        f"SRUN=({' '.join(map(shlex.quote, settings.srun))})",
    ]
    return "\n".join(told) + "\n\n" + (_TEMPLATES / template).read_text(encoding="utf-8")


def _check() -> str:
    """Lines of `sh` that check whether a node can run the job."""
    return (_TEMPLATES / "check.sh").read_text(encoding="utf-8")


def _setup(settings: SlurmSettings) -> list[str]:
    return [*(f"module load {shlex.quote(name)}" for name in settings.modules), *settings.setup]


def refuse_setup(settings: SlurmSettings) -> None:
    """Raise ConfigError if lines of `setup` are options of sbatch or incomplete bash.

    An open quote, `if` or here-document would include the rest of the script, and the job would do nothing.
    """
    text = "\n".join(settings.setup)
    if any(line.startswith(_DIRECTIVES) for line in text.split("\n")):
        hint = "Give options of sbatch in the setting sbatch: {NAME: VALUE}"
        raise ConfigError("slurm settings", "setup", "a line that is an option of sbatch", "lines of bash", hint)
    said = "a line that ends with a backslash" if text.endswith("\\") else ""
    if text and not said and shutil.which("bash") is not None:
        read = subprocess.run(
            ["bash", "-n"], input=text, capture_output=True, encoding="utf-8", errors="surrogateescape"
        )
        said = next(iter(read.stderr.splitlines()), "" if read.returncode == 0 else "text that bash cannot read")
    if said:
        raise ConfigError("slurm settings", "setup", said, "complete lines of bash", "Correct the lines of setup")


def probe(settings: SlurmSettings, nodes: int, folder: Path) -> None:
    """Check on free nodes, before the submission, that they can access a folder, and Python with this software.

    If too few nodes are free, or the cluster accepts only batch jobs, nothing is checked now; the job checks again.

    Parameters
    ----------
    settings : SlurmSettings
    nodes : int
        Number of nodes to check.
    folder : Path
        The folder need not exist yet: the nodes look for a new folder next to it.

    Raises
    ------
    Told
        With the error message of a node.
    """
    parent = next(path for path in (folder, *folder.parents) if path.is_dir())
    if settings.clusters is not None:  # srun uses the local cluster, but the job may go to another one
        return
    asked = {name: getattr(settings, name) or environment.default_of(name) for name in ("partition", "account", "qos")}
    asked["constraint"] = settings.constraint
    words = [f"--{name}={value}" for name, value in asked.items() if value is not None]
    words += ["--immediate=3", "--time=1", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"]
    with contextlib.ExitStack() as stack:
        try:
            there = stack.enter_context(tempfile.TemporaryDirectory(dir=parent, prefix=".seen-"))
            done = subprocess.run(
                ["srun", *words, *settings.srun, "bash", "-c", "\n".join([*_setup(settings), _check()])],
                env={
                    **environment.with_packages(environment.for_slurm()),
                    "FOLDER": there,
                    "PYTHON": settings.python or sys.executable,
                    "SOFTWARE": str(ROOT),
                    "WRONG": str(WRONG),
                },
                capture_output=True,
                text=True,
                timeout=60,
            )
        except (OSError, subprocess.TimeoutExpired):
            return
    if found := re.search(r"^error: (.*)", done.stdout, re.MULTILINE):
        raise Told(found[1].replace(there, str(folder)))
