"""Conversions as jobs of a real SLURM: the bytes of a local one, whatever is killed on the way."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from helpers.commands import GRID, ROOT, Command
from helpers.conversions import bold_files, copy_cohort, same
from launchers.cluster import conversion_task
from shards.format import layout
from slurm.cluster import Cluster
from slurm.jobs import slurm

QUICK = (*GRID, "extractor.steps=3", "extractor.sessions=2")
# What a job of a dataset does before anything else: `name` is the job's, `task` that of the array, and `second` whether
# it is the second try.
_BEFORE = """
import os, sys
if "launchers.cluster.conversion_task" in sys.orig_argv:
    name, task = os.environ["SLURM_JOB_NAME"][4:], os.environ.get("SLURM_ARRAY_TASK_ID")
    log = f"{os.environ['FOLDER']}/work/log"
    second = os.path.exists(log) and f"{name} {task}" in open(log).read().splitlines()
    with open(log, "a") as file:
        file.write(f"{name} {task}\\n")
"""


def words(cohort: Path, out: Path, *more: object, tasks: int = 3) -> list[object]:
    return ["shards", cohort, "--out", out, "--tasks", tasks, *more, *QUICK]


def before(folder: Path, body: str) -> dict[str, str]:
    """Environment of a conversion whose jobs run `body` first."""
    folder.mkdir(exist_ok=True)
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    (folder / "sitecustomize.py").write_text(_BEFORE + lines + "\n")
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}


def facts_of(done: subprocess.CompletedProcess) -> dict:
    return json.loads(done.stdout.splitlines()[-1])


def log_of(out: Path, name: str) -> str:
    return (out / conversion_task.PLACE / f"{name}.log").read_text()


def tries(out: Path) -> list[str]:
    return sorted((out / layout.WORK / "log").read_text().splitlines())


@pytest.fixture(scope="module")
def local(daemons: Cluster, command: Command, cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small cohort, converted on this machine."""
    out = tmp_path_factory.mktemp("local") / "shards"
    done = command("tools/make_shards.py", cohort / "cohort.yaml", "--out", out, "--workers", 1, *QUICK)
    assert done.returncode == 0, done.stderr
    return out


def test_it_is_the_local_conversion_whatever_is_killed(
    cluster: Cluster, cohort: Path, local: Path, tmp_path: Path
) -> None:
    """The extractor's job and a task kill themselves (-9) at their first try, another task after its first run."""
    out = tmp_path / "far"
    body = """if not second and f"{name} {task}" in ("extractor None", "rank 1"):
    os.kill(os.getpid(), 9)
if not second and f"{name} {task}" == "rank 0":
    import threading, time
    members = f"{os.environ['FOLDER']}/work/members"
    def watch():
        while not (os.path.isdir(members) and any(n.startswith("synthetic_sub-01") for n in os.listdir(members))):
            time.sleep(0.01)
        os.kill(os.getpid(), 9)
    threading.Thread(target=watch, daemon=True).start()"""
    asked = words(cohort / "cohort.yaml", out, "--throttle", 2, "--follow", "--json")
    done = slurm(cluster, *asked, timeout=900, **before(tmp_path / "site", body))
    assert done.returncode == 0, done.stderr
    same(out, local)
    for name in ("extractor.safetensors", "config.json"):
        assert (out / "extractor" / name).read_bytes() == (local / "extractor" / name).read_bytes()
    # Only what had failed was done again.
    expected = ["extractor None"] * 2 + ["pack None"] + ["rank 0"] * 2 + ["rank 1"] * 2 + ["rank 2"]
    assert tries(out) == expected
    assert facts_of(done)["status"] == 0 and facts_of(done)["sessions"] == 6
    jobs = conversion_task.submitted(out).jobs
    assert ": ended with status 137 (SIGKILL" in log_of(out, f"extractor-{jobs['extractor']}")
    facts = facts_of(slurm(cluster, "status", out, "--json"))
    assert facts["states"]["rank"] == {"COMPLETED": 1, "FAILED": 2} and facts["sessions"] == 6

    # Nothing is left to do, and nothing is done.
    before_again = {path: path.stat().st_mtime_ns for path in out.glob("shards/*")}
    again = slurm(cluster, *asked)
    assert again.returncode == 0, again.stderr
    assert list(facts_of(again)["jobs"]) == ["pack"]
    assert {path: path.stat().st_mtime_ns for path in out.glob("shards/*")} == before_again


def test_what_fails_twice_is_listed_and_the_same_command_goes_on(
    cluster: Cluster, command: Command, cohort: Path, local: Path, tmp_path: Path
) -> None:
    """A task is killed whenever it begins; a refused run is no failure; make_shards.py --slurm does the rest."""
    source, out, site = copy_cohort(cohort, tmp_path / "cohort"), tmp_path / "far", tmp_path / "site.yaml"
    bold_files(tmp_path / "cohort")[-1].write_bytes(b"no image")
    site.write_text("cpus_per_task: 1\n")
    environment = before(tmp_path / "site", 'if task == "1":\n    os.kill(os.getpid(), 9)')
    asked = words(source, out, "--ranker", "ridge", "--follow", "--json", tasks=2)
    done = slurm(cluster, *asked, timeout=900, **environment)
    assert done.returncode == 3, done.stderr
    assert tries(out) == ["pack None", "rank 0", "rank 1", "rank 1"]
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("failed: ")]
    assert line.startswith("failed: task 1, 3 of its 3 scans remain: node") and "SIGKILL" in line
    assert "error: 3 of 6 scans remain; the same command continues with them" in done.stderr
    assert facts_of(done)["status"] == 3 and len(facts_of(done)["failed"]) == 1
    facts = facts_of(slurm(cluster, "status", out, "--json"))
    assert (facts["ranked"], facts["refused"], facts["left"]) == (3, 0, 3) and facts["failed"] and facts["error"]
    assert facts["states"]["pack"] == {"FAILED": 1} and not (out / layout.MANIFEST).exists()

    tool = ("tools/make_shards.py", source, "--out", out, "--ranker", "ridge", *QUICK, "--json")
    done = command(*tool, "--slurm", site, "--workers", 2, timeout=600, **cluster.environment)
    assert done.returncode == 1, done.stderr  # one input was refused
    assert "refused: sub-06" in done.stderr
    facts = facts_of(done)
    assert (facts["sessions"], facts["refused"], facts["tasks"]) == (5, 1, 2)
    kept = layout.read_lines(out / layout.SESSIONS)
    theirs = {line["key"]: line for line in layout.read_lines(local / layout.SESSIONS)}
    assert len(kept) == 5 and {line["key"] for line in kept} < set(theirs)


def test_status_and_cancel(cluster: Cluster, command: Command, cohort: Path, tmp_path: Path) -> None:
    """While its jobs are there nobody else converts into the dataset; cancelled, a local conversion goes on."""
    out = tmp_path / "far"
    environment = before(tmp_path / "site", 'if name == "rank" and task != "0":\n    import time; time.sleep(1000)')
    asked = words(cohort / "cohort.yaml", out, "--ranker", "ridge", "--json")
    done = slurm(cluster, *asked, **environment)
    assert done.returncode == 0, done.stderr
    jobs = facts_of(done)["jobs"]
    assert list(jobs) == ["rank", "rank again", "pack"]

    def facts() -> dict:
        return facts_of(slurm(cluster, "status", out, "--json"))

    cluster.wait(lambda: facts()["ranked"] == 2, 240, "two ranked runs")
    found = facts()
    assert (found["runs"], found["refused"], found["left"]) == (6, 0, 4)
    assert found["states"]["rank"]["RUNNING"] >= 2 and found["states"]["pack"] == {"PENDING": 1}
    here = ["tools/make_shards.py", *asked[1:4], "--ranker", "ridge", "--workers", 1, *QUICK]
    for refused in (slurm(cluster, *asked), command(*here, **cluster.environment)):
        assert refused.returncode == 2 and f"unfinished jobs: {jobs['rank']}, " in refused.stderr
        assert "got a dataset with" in refused.stderr and len(refused.stderr.splitlines()) == 1
    done = slurm(cluster, "cancel", out, "--json")
    assert done.returncode == 0, done.stderr
    assert {facts_of(done)[name] for name in jobs} == {"CANCELLED"}
    assert cluster.call("squeue", "-h", "-t", "pending,running") == ""
    assert "error" in facts()
    done = command(*here, **cluster.environment)
    assert done.returncode == 0, done.stderr
    assert len(layout.read_lines(out / layout.SESSIONS)) == 6


@pytest.mark.slow
def test_a_time_limit_is_a_failure_like_any_other(cluster: Cluster, cohort: Path, tmp_path: Path) -> None:
    """A task that sleeps through its minute, SLURM's shortest; the second one is quick."""
    out, site = tmp_path / "far", tmp_path / "site.yaml"
    site.write_text("time: '00:01:00'\nsignal: 20\n")
    body = """if not second and f"{name} {task}" == "rank 0":
    import signal, time
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    time.sleep(300)"""
    environment = before(tmp_path / "site", body)
    asked = words(cohort / "cohort.yaml", out, "--ranker", "ridge", "--slurm", site, "--follow")
    done = slurm(cluster, *asked, timeout=600, **environment)
    assert done.returncode == 0, done.stderr
    assert tries(out).count("rank 0") == 2
    assert "TIME LIMIT" in log_of(out, f"rank-{conversion_task.submitted(out).jobs['rank']}_0")


def test_a_dry_run_prints_the_scripts_and_leaves_nothing(cluster: Cluster, cohort: Path, tmp_path: Path) -> None:
    out = tmp_path / "far"
    done = slurm(cluster, *words(cohort / "cohort.yaml", out, "--throttle", 2, "--mem", "2G", "--dry-run", tasks=50))
    assert done.returncode == 0, done.stderr
    for line in ("#SBATCH --array=0-5%2", "#SBATCH --mem=2G", f"{out}/work/slurm/rank-%A_%a.log", "6 scans, 6 tasks"):
        assert line in done.stdout
    assert sum("to start at" in line for line in done.stdout.splitlines()) == 3
    assert cluster.call("squeue", "-h") == "" and not out.exists()


@pytest.mark.parametrize(
    ("more", "needles"),
    [
        (("--tasks", 0), ("--tasks: got 0",)),
        (("--tasks", 5000), ("--tasks: got 5000", "MaxArraySize")),
        (("--throttle", 0), ("--throttle: got 0",)),
        (("--partition", "debgu"), ("debgu", "debug?")),
        (("--cpus-per-task", 99), ("sbatch: got",)),
        (("grid.mmm=2",), ("grid.mmm",)),
        (("--max-failures", 2), ("--max-failures",)),
    ],
)
def test_a_wrong_call_is_one_line_and_submits_nothing(
    cluster: Cluster, cohort: Path, tmp_path: Path, more: tuple, needles: tuple[str, ...]
) -> None:
    out = tmp_path / "far"
    done = slurm(cluster, *words(cohort / "cohort.yaml", out, *more))
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert all(needle in line for needle in needles), line
    assert cluster.call("squeue", "-h") == "" and not out.exists()


def test_a_wrong_cohort_is_told_before_anything_is_submitted(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "cohort.yaml").write_text("name: c\nroot: nowhere\n")
    done = slurm(cluster, *words(tmp_path / "cohort.yaml", tmp_path / "far"))
    assert done.returncode == 2 and "root: got" in done.stderr and len(done.stderr.splitlines()) == 1
    assert cluster.call("squeue", "-h") == "" and not (tmp_path / "far").exists()


def test_a_node_without_python_is_told_at_submission(cluster: Cluster, cohort: Path, tmp_path: Path) -> None:
    out = tmp_path / "far"
    done = slurm(cluster, *words(cohort / "cohort.yaml", out, "--ranker", "ridge", "--python", "/nowhere/python"))
    assert done.returncode == 2, done.stderr
    assert "/nowhere/python: got no such command, expected Python" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (out / conversion_task.PLACE).exists()
