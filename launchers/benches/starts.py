"""CPU time until a command shows its help, and until it refuses a wrong call.

Each call is a process of its own, `slim-brain COMMAND ...`: its CPU time, of the user and of the system, is mostly that
of imports. The goals are half a second for a help text and a second for a refusal. No test holds these times, which
depend on the machine; `tests/launchers/test_starts.py` holds what may be imported.

`WRONG_CALLS` has an unknown flag, an unknown key, a missing file and an unknown name for each command that takes them.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from launchers import environment
from launchers.benches.common import Figure, Ratio, Result
from shards.core.cli import DONE, WRONG
from shards.core.errors import UserError
from shards.core.settings import Settings

HELP, REFUSAL = 0.5, 1.0  # goals, CPU seconds
HELPS = tuple(
    (*name.split(), "--help")
    for name in (
        *("make-cohort", "make-shards", "train-extractor", "pretrain", "probe", "finetune", "embed", "explain"),
        *("reconstruct", "plan", "report", "export", "bench", "experiments", "slurm", "slurm shards"),
        *("slurm pretrain", "slurm finetune", "slurm status", "slurm cancel", "config", "config show"),
        "config explain",
    )
)

_NODES = ("--nodes", "1", "--gpus-per-node", "1")
# {folder}: a folder without anything in it; {missing}: a path that does not exist
WRONG_CALLS: tuple[tuple[str, ...], ...] = (
    ("make-cohort", "--out", "{missing}", "--subject", "3"),
    ("make-shards", "example_bids", "--out", "{missing}", "--worker", "2"),
    ("make-shards", "example_bids", "--out", "{missing}", "grid.mmm=2"),
    ("make-shards", "{missing}.yaml", "--out", "{missing}"),
    ("make-shards", "example_bid", "--out", "{missing}"),
    ("train-extractor", "{missing}", "--out", "{missing}-out"),
    ("train-extractor", "{missing}", "--out", "{missing}-out", "--step", "3"),
    ("pretrain", "tiny", "--no-such-flag"),
    ("pretrain", "tiny", "data={missing}", "run.step=3"),
    ("pretrain", "{missing}.yaml"),
    ("pretrain", "tinny"),
    ("pretrain", "tiny", "data={missing}", "run.out={missing}-out"),
    ("probe", "{folder}", "--data", "{missing}", "--task", "synthetic_group", "--no-such-flag"),
    ("probe", "{folder}", "--data", "{missing}", "--task", "synthetic_group", "poling=cov"),
    ("probe", "{folder}", "--data", "{missing}", "--task", "synthetic_group"),
    ("probe", "{missing}", "--data", "{folder}", "--task", "synthetic_group"),
    ("probe", "{folder}", "--data", "{missing}", "--task", "synthetic_grop"),
    ("finetune", "{folder}", "--data", "{missing}", "--task", "synthetic_group", "--no-such-flag"),
    ("finetune", "{folder}", "--data", "{missing}", "--task", "synthetic_group", "run.step=3"),
    ("finetune", "{folder}", "--data", "{missing}", "--task", "synthetic_group"),
    ("finetune", "{folder}", "--data", "{missing}", "--task", "synthetic_grop"),
    ("embed", "{missing}", "scan.nii.gz", "--out", "{folder}/z.npz"),
    ("embed", "{folder}", "scan.nii.gz", "--out", "{folder}/z.npz", "--pool", "mean"),
    ("explain", "{folder}", "--data", "{missing}", "--task", "synthetic_group", "--no-such-flag"),
    ("explain", "{folder}", "--data", "{missing}", "--task", "synthetic_group", "poling=cov"),
    ("explain", "{folder}", "--data", "{missing}", "--task", "synthetic_group"),
    ("explain", "{missing}", "--data", "{folder}", "--task", "synthetic_group"),
    ("explain", "{folder}", "--data", "{missing}", "--task", "synthetic_grop"),
    ("reconstruct", "{missing}", "scan.nii.gz", "--out", "{folder}"),
    ("reconstruct", "{folder}", "scan.nii.gz", "--out", "{folder}", "--pass", "3"),
    ("plan", "tiny", "--gpu", "3"),
    ("plan", "tiny", "run.step=3"),
    ("plan", "tiny", "data={missing}"),
    ("plan", "{missing}.yaml"),
    ("plan", "tinny"),
    ("report", "{missing}"),
    ("report", "{folder}", "--path"),
    ("export", "{missing}", "--out", "{missing}-out"),
    ("export", "{folder}", "--out", "{missing}-out", "--weight", "target"),
    ("bench", "shard"),
    ("bench", "shards", "--no-such-flag"),
    ("experiments", "--out", "{missing}", "--no-such-flag"),
    ("experiments", "--out", "{missing}", "run.step=3"),
    ("experiments", "--out", "{missing}", "--only", "mane"),
    ("slurm", "pretrian"),
    ("slurm", "pretrain", "tiny", "data={missing}", "run.step=3", *_NODES),
    ("slurm", "pretrain", "tinny", *_NODES),
    ("slurm", "pretrain", "tiny", "data={missing}", "run.out={missing}-out", *_NODES, "--slurm", "exampel"),
    ("slurm", "shards", "example_bid", "--out", "{missing}", "--tasks", "3"),
    ("slurm", "finetune", "{folder}", "--data", "{missing}", "--task", "synthetic_grop", *_NODES),
    ("slurm", "status", "{missing}"),
    ("slurm", "cancel", "{missing}"),
    ("config", "show", "cohort", "example_bid"),
    ("config", "explain", "pretrain", "run.step"),
    ("pretrian",),
)


class Bench(Settings):
    """Sizes of the bench."""

    all: bool = True


SMALL: dict[str, object] = {"all": False}


def filled(words: Sequence[str], folder: Path) -> list[str]:
    """The words of a call, with its folders."""
    return [word.format(folder=folder, missing=folder / "missing") for word in words]


def run(bench: Bench, repeat: int, folder: Path, begun: Callable[[str], None]) -> Result:
    """Measure all calls; see the head of this file."""
    result = Result(figures={"1 s": Figure("s", (1.0,))}, notes={"settings": bench.model_dump(mode="json")})
    for calls, status, goal in ((HELPS, DONE, HELP), (WRONG_CALLS, WRONG, REFUSAL)):
        for words in calls if bench.all else calls[:2]:
            name = " ".join(words)
            begun(name)
            seconds = tuple(cpu_seconds(filled(words, folder), status) for _ in range(repeat))
            result.figures[name] = Figure("s", seconds)
            result.ratios.append(Ratio(name, name, "1 s", at_most=goal))
    return result


def cpu_seconds(words: list[str], status: int) -> float:
    """CPU seconds of a call of `slim-brain` in a process of its own.

    Raises
    ------
    UserError
        If the call ends with another exit status.
    """
    child = subprocess.Popen(
        [*environment.SLIM_BRAIN, *words],
        env=environment.with_packages(os.environ),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, ended, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(ended)
    if child.returncode != status:
        raise UserError(" ".join(words), "exit status", child.returncode, status)
    return used.ru_utime + used.ru_stime
