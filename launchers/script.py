"""A script for `sbatch`, written and submitted with submitit."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from submitit import SlurmExecutor
from submitit.core.utils import FailedJobError

import launchers
from launchers.cluster import ClusterError, SlurmSettings, ask
from shards.console import WRONG

# Lines of `sh` on a node, in single quotes: does it see the folder, and Python with this software?
CHECK = f"""
    refuse() {{ echo "error: $(hostname): $1"; exit {WRONG}; }}
    test -d "$FOLDER" || refuse "$FOLDER: got no such folder, expected one that every node sees. Use a shared one"
    command -v "$PYTHON" >/dev/null || refuse "$PYTHON: got no such command, expected Python. Set python or setup"
    "$PYTHON" -c "import launchers" || refuse "$PYTHON: got no package launchers, expected to see ${{PYTHONPATH%%:*}}"
"""


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
        self.folder = folder
        root = shlex.quote(str(Path(launchers.__file__).parent.parent))
        self._command = f"""
export FOLDER={shlex.quote(str(about))} PYTHON={shlex.quote(settings.python or sys.executable)}
export PYTHONPATH={root}${{PYTHONPATH:+:$PYTHONPATH}}
{command.strip()}
"""
        self._sbatch = {
            "chdir": str(Path.cwd()),
            "output": str(folder / log),
            "requeue": True,
            **({} if settings.mem is None else {"mem": settings.mem}),
            **settings.sbatch,
            **sbatch,
        }
        self._executor = _Writer(folder)
        self._executor.update_parameters(
            **share,
            job_name=name,
            partition=settings.partition,
            account=settings.account,
            qos=settings.qos,
            time=settings.time,
            constraint=settings.constraint,
            signal_delay_s=settings.signal,
            setup=[*(f"module load {shlex.quote(name)}" for name in settings.modules), *settings.setup],
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
        self.text(**sbatch)
        try:
            return self._executor._submit_command(self._command).job_id
        except FailedJobError as error:
            reason = " ".join(str(error).split())
            raise ClusterError("sbatch", "", reason, "a job that the cluster accepts") from None


def arguments(settings: SlurmSettings) -> str:
    """The arguments of `srun` as words of a shell, a blank before each."""
    return "".join(f" {shlex.quote(word)}" for word in settings.srun)
