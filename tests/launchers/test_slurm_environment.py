"""What a submission takes from the shell it is made in, and which cluster it is asked for at, with stand-ins for SLURM.

The stand-ins note how they were called, and answer as commands of a cluster of four nodes do.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from launchers import environment
from launchers.cluster import conversion_jobs, conversion_task, scheduler, tracking
from launchers.cluster.scheduler import SlurmSettings, check_cluster, gpus_of
from launchers.cluster.training_job import TrainingScript
from shards.core.errors import ConfigError
from shards.core.settings import load
from slim.checkpoints.run_folder import SLURM

# Knows job 12 of cluster far, and no other; every answer stands below the name of the cluster that was asked.
_ANSWERS = """#!/bin/bash
name=$(basename "$0")
{ echo "$name $*"; env | sed 's/^/    /'; } >>"$NOTES"
case " $* " in *" --clusters=far "*) far=yes ;; esac
[ -z "$far" ] || case $name in squeue|sinfo) echo "CLUSTER: far" ;; esac
case "$name $*" in
sbatch*--test-only*) echo "sbatch: Job 13 to start at 2030-01-01T00:00:00" >&2 ;;
sbatch*) cat "${@: -1}" >"$NOTES.script"; echo "Submitted batch job 12${FAR_ANSWERS:+ on cluster far}" ;;
sinfo*%P*) echo "work*"; echo "gpu" ;;
sinfo*) for n in 1 2 3 4; do echo "n$n|gpu:3090:4(S:0-1)|127.0.0.1|1-00:00:00"; done ;;
squeue*) [ -n "$far" ] || { echo "error: words of another version" >&2; exit 1; }; echo "12 RUNNING" ;;
scontrol*show\\ config*) echo "MaxArraySize = 1001" ;;
scontrol*) [ -n "$far" ] || { echo "error: words of another version" >&2; exit 1; }
    echo "JobId=12 JobState=$(cat "$NOTES.state") Reason=None" ;;
scancel*) [ -n "$far" ] && echo CANCELLED >"$NOTES.state" ;;
esac
"""
# As `salloc`, `srun`, `mpirun` and `torchrun` leave them in a shell.
_ENCLOSING = {
    "SLURM_JOB_ID": "7",
    "SLURM_CPU_BIND": "quiet,mask_cpu:0x1",
    "SLURM_CPUS_PER_TASK": "1",
    "SLURM_MEM_PER_CPU": "100",
    "SLURM_MEM_PER_NODE": "4000",
    "SLURM_NTASKS": "1",
    "SLURM_TRES_PER_TASK": "cpu:1",
    "SBATCH_PARTITION": "gpu",
    "SBATCH_TIMELIMIT": "1",
    "SBATCH_EXPORT": "NONE",
    "SRUN_CPUS_PER_TASK": "1",
    "SQUEUE_USERS": "nobody",
    "SCANCEL_INTERACTIVE": "1",
    "OMPI_COMM_WORLD_RANK": "3",
    "PMI_RANK": "3",
    "PMIX_RANK": "3",
    "RANK": "3",
    "WORLD_SIZE": "4",
    "MASTER_ADDR": "n9",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}


class Notes:
    """What the stand-ins have noted."""

    def __init__(self, path: Path):
        self.path = path

    def calls(self, name: str) -> list[str]:
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return [line for line in lines if line.startswith(f"{name} ")]

    def names(self) -> set[str]:
        """Of all variables that a command was given."""
        lines = self.path.read_text().splitlines()
        return {line.split("=")[0].strip() for line in lines if line.startswith("    ")}

    def script(self) -> str:
        return self.path.with_name(f"{self.path.name}.script").read_text()


@pytest.fixture
def notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Notes:
    commands = tmp_path / "commands"
    commands.mkdir()
    for name in scheduler.COMMANDS:
        (commands / name).write_text(_ANSWERS)
        (commands / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    (tmp_path / "notes.state").write_text("RUNNING\n")
    for name in ("SLURM_CLUSTERS", "SBATCH_CLUSTERS", *_ENCLOSING):
        monkeypatch.delenv(name, raising=False)
    return Notes(tmp_path / "notes")


def script(settings: SlurmSettings, run: Path) -> TrainingScript:
    return TrainingScript(settings, run, "1", 1, 0, 2)


def options(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]


def submit(settings: SlurmSettings, run: Path) -> TrainingScript:
    """Submit the job of a run, as `slurm.py pretrain` does and notes."""
    batch = script(settings, run)
    about = {"job": batch.submit(), "log": str(run / "log"), "steps": 9, "command": ["x"], "then": "y"}
    about |= {} if batch.cluster is None else {"cluster": batch.cluster}
    (run / SLURM / tracking.JOB).write_text(json.dumps(about))
    return batch


def test_variables_of_an_enclosing_job_reach_no_command(notes: Notes, tmp_path, monkeypatch, capsys) -> None:
    kept = {"SLURM_CONF": "/etc/here.conf", "OMP_NUM_THREADS": "3", "SLURM_JWT": "t", "MY_RANK": "1"}
    for name, value in (_ENCLOSING | kept).items():
        monkeypatch.setenv(name, value)
    batch = script(SlurmSettings(), tmp_path / "run")
    assert batch.submit() == "12"
    assert batch.test().startswith("sbatch: Job 13")
    scheduler.job_facts("12")
    scheduler.states(["12"])
    given = notes.names()
    assert not given.intersection(_ENCLOSING) and given.issuperset(kept)
    assert (tmp_path / "run" / SLURM / "12_submission.sh").read_text() == notes.script()
    assert not list((tmp_path / "run" / SLURM).glob(".*"))
    assert "--partition=gpu" in options(notes.script())  # a default of the user's, said openly in the script
    said = capsys.readouterr().err
    assert "SBATCH_EXPORT, SBATCH_TIMELIMIT of the environment are ignored" in said and "PARTITION" not in said


def test_defaults_of_the_environment_give_way_to_settings(notes: Notes, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SBATCH_ACCOUNT", "everyday")
    assert "--account=everyday" in options(script(SlurmSettings(), tmp_path).text())
    assert "--account=special" in options(script(SlurmSettings(account="special"), tmp_path).text())


@pytest.mark.parametrize("name", ["SBATCH_QOS", "SLURM_CLUSTERS"])
def test_values_of_the_environment_add_no_line_to_a_script(name: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv(name, "a\ntouch b")
    with pytest.raises(ConfigError, match=f"environment: {name}: got .*, expected a name on one line"):
        script(SlurmSettings(), tmp_path).text()


@pytest.mark.parametrize("how", ["sbatch", "cluster", "SLURM_CLUSTERS", "SBATCH_CLUSTERS", "answer"])
def test_a_named_cluster_is_kept_for_what_follows(how: str, notes: Notes, tmp_path, monkeypatch) -> None:
    settings, run = SlurmSettings(), tmp_path / "run"
    if how == "sbatch":
        settings = SlurmSettings(sbatch={"clusters": "far"})
    elif how == "cluster":
        settings = SlurmSettings(sbatch={"cluster": "far"})
    elif how == "answer":  # sbatch has chosen one of two
        settings = SlurmSettings(sbatch={"clusters": "near,far"})
        monkeypatch.setenv("FAR_ANSWERS", "yes")
    else:
        monkeypatch.setenv(how, "far")
    check_cluster(settings, 4, 4, run)
    assert submit(settings, run).cluster == "far"
    assert f"--clusters={'near,far' if how == 'answer' else 'far'}" in options(notes.script())
    monkeypatch.delenv("SLURM_CLUSTERS", raising=False)  # another shell, later
    with pytest.raises(ConfigError, match="a run with an unfinished job: 12"):
        tracking.refuse_another(run)
    about = tracking.about_job(run)
    assert about is not None
    facts, _ = tracking.status(run, about)
    assert (facts["state"], facts["cluster"]) == ("RUNNING", "far")
    assert tracking.cancel(run, about)["state"] == "CANCELLED"
    assert notes.calls("scancel") == ["scancel --clusters=far 12"]
    tracking.refuse_another(run)


def test_without_a_named_cluster_nothing_is_asked_for_one(notes: Notes, tmp_path) -> None:
    check_cluster(SlurmSettings(), 4, 4, tmp_path)
    assert submit(SlurmSettings(), tmp_path / "run").cluster is None
    assert "clusters" not in notes.script() and "--clusters" not in notes.path.read_text()


def test_jobs_of_a_conversion_go_to_one_cluster_which_is_kept(notes: Notes, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("FAR_ANSWERS", "yes")
    settings = SlurmSettings(sbatch={"clusters": "near,far"})
    jobs, name = conversion_jobs._submit({stage: script(settings, tmp_path / "data") for stage in ("rank", "pack")})
    assert name == "far" and set(jobs) == {"rank", "rank again", "pack"}
    assert "--clusters=far" in options(notes.script())  # those after the first one
    folder = tmp_path / "data"
    (folder / conversion_task.PLACE).mkdir(parents=True)
    (folder / conversion_task.PLACE / conversion_task.JOB).write_text(
        json.dumps({"jobs": {"pack": "12"}, "cluster": name, "command": []})
    )
    with pytest.raises(ConfigError, match="a dataset with unfinished jobs: 12"):
        conversion_jobs.refuse_another(folder)


def test_options_without_a_value(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text("sbatch: {exclusive: , contiguous: true, spread-job: false, nice: 100, gres: 'gpu:3090:4'}\n")
    found = options(script(load(SlurmSettings, path), tmp_path).text())
    assert {"--exclusive", "--contiguous", "--nice=100", "--gres=gpu:3090:4"} <= set(found)
    assert not [option for option in found if "spread" in option]


@pytest.mark.parametrize(
    ("gres", "number"),
    [("gpu:3090:4", 4), ("gpu:3090:4(S:0-1),gpu:4090:2(S:0,1)", 6), ("gpu:2080ti:8", 8), ("nic:3090:2,gpu:1", 1)],
)
def test_types_of_gpus_may_be_numbers(gres: str, number: int) -> None:
    assert gpus_of(gres) == number


def test_what_another_launcher_left_is_no_part_of_a_run(monkeypatch) -> None:
    for name, value in _ENCLOSING.items():
        monkeypatch.setenv(name, value)
    found = environment.without_launchers()
    assert not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "OMPI_COMM_WORLD_RANK", "TORCHELASTIC_USE_AGENT_STORE"} & set(
        found
    )
    assert found["SLURM_JOB_ID"] == "7"


def test_a_job_is_unknown_only_if_the_controller_answers(notes: Notes, monkeypatch) -> None:
    assert scheduler.job_facts("12") is None and scheduler.states(["12"]) == {"12": {}}
    assert scheduler.states(["12"], "far") == {"12": {"RUNNING": 1}}
    (Path(os.environ["PATH"].partition(":")[0]) / "scontrol").write_text("#!/bin/sh\nexit 1\n")
    for question in (scheduler.job_facts, lambda job: scheduler.states([job])):
        with pytest.raises(scheduler.ClusterError, match="scontrol: got status 1"):
            question("12")
