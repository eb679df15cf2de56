"""A script for `sbatch`, written and submitted with submitit."""

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
from pathlib import Path
from typing import Any

from submitit import SlurmExecutor

from launchers import environment
from launchers.cluster.plain import refuse_folder
from launchers.cluster.scheduler import ClusterError, SlurmSettings, ask
from launchers.environment import ROOT
from launchers.job import Told
from shards.core.cli import WRONG
from shards.core.errors import ConfigError

_DIRECTIVES = ("#SBATCH", "#PBS", "#BSUB")  # sbatch reads the first comments of a script, also those of other systems
_TEMPLATES = Path(__file__).with_name("templates")


class _Writer(SlurmExecutor):
    @classmethod
    def affinity(cls) -> int:
        return 2  # a script can be written on any machine


class Script:
    """A script and its submission.

    Parameters
    ----------
    settings : SlurmSettings
    folder : Path
        Absolute; logs and the script itself are kept there.
    name : str
        Of the job.
    command : str
        Lines of bash, which find FOLDER, PYTHON and PYTHONPATH in their environment.
    about : Path
        FOLDER: that of the run, or of the dataset.
    log : str
        Name of the log, with SLURM's own fields: `%j` is the job.
    share : dict
        What of a node it asks for, as submitit's parameters.
    sbatch : dict
        Other options of `sbatch`.

    Attributes
    ----------
    cluster : str or None
        The one that took the job that was submitted last; None: that of this machine.
    """

    def __init__(
        self,
        settings: SlurmSettings,
        folder: Path,
        name: str,
        command: str,
        about: Path,
        log: str,
        share: dict[str, Any],
        sbatch: dict[str, Any],
    ):
        for place in (folder, about, Path.cwd(), ROOT):
            refuse_folder(place)
        refuse_setup(settings)
        self.folder = folder
        root = shlex.quote(str(ROOT))
        self._command = f"""
export FOLDER={shlex.quote(str(about))} PYTHON={shlex.quote(settings.python or sys.executable)}
export PYTHONPATH={root}${{PYTHONPATH:+:$PYTHONPATH}} PYTHONUTF8=1
{command.strip()}
"""
        self._sbatch = {
            "chdir": str(Path.cwd()),
            "output": f"{str(folder).replace('%', '%%')}/{log}",  # SLURM replaces %j and the like
            "requeue": True,
            **({} if settings.mem is None else {"mem": settings.mem}),
            **({} if settings.clusters is None else {"clusters": settings.clusters}),
            **{name: value for name, value in settings.sbatch.items() if name != "cluster"},
            **sbatch,
        }
        self._clusters, self.cluster = settings.clusters, settings.clusters
        self._executor = _Writer(folder)
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
        """The script, with more options of `sbatch` if need be."""
        self._executor.update_parameters(additional_parameters={**self._sbatch, **sbatch})
        return self._executor._make_submission_file_text(self._command, "")

    def test(self) -> str:
        """What the cluster says to the script, without a submission: when and where it would start.

        Raises
        ------
        ClusterError
            If it refuses.
        """
        return ask("sbatch", "--test-only", stdin=self.text())

    def submit(self, **sbatch: Any) -> str:
        """Submit it, with more options of `sbatch` if need be; the job's number. It is kept as JOB_submission.sh.

        Raises
        ------
        ClusterError
            If the cluster refuses.
        """
        if left := environment.ignored():
            print(f"note: {', '.join(left)} of the environment do not count: give options to --slurm", file=sys.stderr)
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
    """A template of bash behind lines that set the variables it reads.

    Parameters
    ----------
    template : str
        File name in `templates/`. It is valid bash as it stands: values come to it as variables.
    settings : SlurmSettings
        Its options of `srun` are the array SRUN.
    exported : mapping of str to object
        Variables that processes of the job see, too.
    values : object
        Variables of the script alone. All have CHECK, the text of `check.sh`.
    """
    told = [
        *(f"export {name}={shlex.quote(str(value))}" for name, value in {"WRONG": WRONG, **exported}.items()),
        *(f"{name}={shlex.quote(str(value))}" for name, value in {"CHECK": _check(), **values}.items()),
        f"SRUN=({' '.join(map(shlex.quote, settings.srun))})",
    ]
    return "\n".join(told) + "\n\n" + (_TEMPLATES / template).read_text(encoding="utf-8")


def _check() -> str:
    """Lines of `sh` that look, on a node, whether it can do the work."""
    return (_TEMPLATES / "check.sh").read_text(encoding="utf-8")


def _setup(settings: SlurmSettings) -> list[str]:
    return [*(f"module load {shlex.quote(name)}" for name in settings.modules), *settings.setup]


def refuse_setup(settings: SlurmSettings) -> None:
    """ConfigError if the lines of `setup` are options of sbatch, or leave open what would swallow the rest of a script.

    An open quote, `if` or here-document takes the lines behind it in: the job would do nothing.
    """
    text = "\n".join(settings.setup)
    if any(line.startswith(_DIRECTIVES) for line in text.split("\n")):
        hint = "Give options of sbatch as sbatch: {NAME: VALUE}"
        raise ConfigError("slurm settings", "setup", "a line that is an option of sbatch", "lines of bash", hint)
    said = "a line that ends with a backslash" if text.endswith("\\") else ""
    if text and not said and shutil.which("bash") is not None:
        read = subprocess.run(
            ["bash", "-n"], input=text, capture_output=True, encoding="utf-8", errors="surrogateescape"
        )
        said = next(iter(read.stderr.splitlines()), "" if read.returncode == 0 else "what bash cannot read")
    if said:
        raise ConfigError("slurm settings", "setup", said, "whole lines of bash", "Correct or close them")


def probe(settings: SlurmSettings, nodes: int, folder: Path) -> None:
    """Have nodes look, before anything is submitted, whether they see a folder, and Python with this software.

    Only nodes that are free at this moment are asked; where too few are, or a cluster runs nothing but batch jobs, the
    job itself finds out.

    Parameters
    ----------
    settings : SlurmSettings
    nodes : int
        How many are asked at once.
    folder : Path
        It need not be there yet: they look for another one beside it.

    Raises
    ------
    Told
        With the words of a node that does not.
    """
    parent = next(path for path in (folder, *folder.parents) if path.is_dir())
    if settings.clusters is not None:  # srun asks the cluster of this machine, the job may go to another one
        return
    asked = {name: getattr(settings, name) or environment.default_of(name) for name in ("partition", "account", "qos")}
    asked["constraint"] = settings.constraint
    words = [f"--{name}={value}" for name, value in asked.items() if value is not None]
    words += ["--immediate=3", "--time=1", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"]
    path = f"{ROOT}:{os.environ['PYTHONPATH']}" if "PYTHONPATH" in os.environ else str(ROOT)
    with contextlib.ExitStack() as stack:
        try:
            there = stack.enter_context(tempfile.TemporaryDirectory(dir=parent, prefix=".seen-"))
            done = subprocess.run(
                ["srun", *words, *settings.srun, "bash", "-c", "\n".join([*_setup(settings), _check()])],
                env={
                    **environment.for_slurm(),
                    "FOLDER": there,
                    "PYTHON": settings.python or sys.executable,
                    "PYTHONPATH": path,
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
