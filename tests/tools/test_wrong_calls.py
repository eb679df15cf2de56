"""What people type wrongly, in real processes: status 2, and one line with where, what, and what was expected."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from helpers.commands import GRID
from helpers.pretrained import tool

PRETRAIN = "configs/pretrain/tiny.yaml"

# Each call, and what its one line must name. {tmp}, {cohort} and {dataset} are folders.
CALLS: dict[str, tuple[list[str], list[str]]] = {
    "shards: missing cohort file": (
        ["tools/make_shards.py", "{tmp}/no.yaml", "--out", "{tmp}/out"],
        ["{tmp}/no.yaml", "no such file", "expected a YAML file"],
    ),
    "shards: missing root": (
        ["tools/make_shards.py", "{tmp}/rootless.yaml", "--out", "{tmp}/out"],
        ["{tmp}/rootless.yaml", "root", "{tmp}/nowhere", "expected the folder that contains the scans"],
    ),
    "shards: unknown key of a cohort file": (
        ["tools/make_shards.py", "{tmp}/typo.yaml", "--out", "{tmp}/out"],
        [
            "{tmp}/typo.yaml",
            "particpants",
            "an unknown key",
            "expected one of name, root",
            "Did you mean participants?",
        ],
    ),
    "shards: unknown setting": (
        ["tools/make_shards.py", "{cohort}/cohort.yaml", "--out", "{tmp}/out", "grid.mmm=2"],
        ["command line", "grid.mmm", "an unknown key", "expected one of mm, shape", "Did you mean mm?"],
    ),
    "shards: value out of range": (
        ["tools/make_shards.py", "{cohort}/cohort.yaml", "--out", "{tmp}/out", "grid.mm=-2"],
        ["command line", "grid.mm", "got -2", "expected greater than 0"],
    ),
    "shards: shape and patch do not fit": (
        ["tools/make_shards.py", "{cohort}/cohort.yaml", "--out", "{tmp}/out", "grid.shape=[90,96,96]"],
        ["command line", "grid.shape", "got [90, 96, 96]", "expected multiples of patch"],
    ),
    "shards: unknown step": (
        ["tools/make_shards.py", "{cohort}/cohort.yaml", "--out", "{tmp}/out", "--only", "find,harmonize"],
        ["command line", "--only", "got harmonize", "expected some of find, harmonise, rank, pack"],
    ),
    "shards: no key=value": (
        ["tools/make_shards.py", "{cohort}/cohort.yaml", "--out", "{tmp}/out", "grid.mm"],
        ["grid.mm", "no such file", "expected a YAML file"],
    ),
    "shards: unknown ranker": (
        ["tools/make_shards.py", "{cohort}/cohort.yaml", "--out", "{tmp}/out", "--ranker", "best"],
        ["got best", "expected one of mutual, ridge"],
    ),
    "shards: missing extractor": (
        ["tools/make_shards.py", "{cohort}/cohort.yaml", "--out", "{tmp}/out", "--extractor", "{tmp}/none"],
        ["{tmp}/none", "no such file", "expected a trained extractor"],
    ),
    "shards: a folder of other things": (
        ["tools/make_shards.py", "{cohort}/cohort.yaml", "--out", "{cohort}", "--ranker", "ridge"],
        ["{cohort}", "--out", "a folder with other files", "expected a new folder or a dataset"],
    ),
    "shards: another configuration": (
        ["tools/make_shards.py", "{cohort}/cohort.yaml", "--out", "{dataset}", "--ranker", "ridge", "windows.keep=3"],
        ["{dataset}", "configuration", "expected", "Use the settings it was made with"],
    ),
    "shards: no workers": (
        ["tools/make_shards.py", "{cohort}/cohort.yaml", "--out", "{tmp}/out", "--workers", "0"],
        ["command line", "--workers", "got 0", "expected 1 or more"],
    ),
    "shards: unknown option": (
        ["tools/make_shards.py", "{cohort}/cohort.yaml", "--out", "{tmp}/out", "--worker", "2"],
        ["unrecognized arguments: --worker", "--help"],
    ),
    "pretrain: missing configuration": (
        ["tools/pretrain.py", "{tmp}/no.yaml"],
        ["{tmp}/no.yaml", "no such file", "expected a YAML file"],
    ),
    "pretrain: missing dataset": (
        ["tools/pretrain.py", PRETRAIN, "data={tmp}/nowhere", "run.out={tmp}/run"],
        ["{tmp}/nowhere", "no such folder", "expected a dataset"],
    ),
    "pretrain: unknown key": (
        ["tools/pretrain.py", PRETRAIN, "data={dataset}", "run.out={tmp}/run", "run.step=3"],
        ["command line: run.step", "an unknown key", "Did you mean run.steps?|Did you mean steps?"],
    ),
    "pretrain: value out of range": (
        ["tools/pretrain.py", PRETRAIN, "data={dataset}", "run.out={tmp}/run", "zero.stage=4"],
        ["command line: zero.stage", "got 4", "expected auto or a whole number from 0 to 3"],
    ),
    "pretrain: unknown model": (
        ["tools/pretrain.py", PRETRAIN, "data={dataset}", "run.out={tmp}/run", "model=huge"],
        ["command line: model", "got huge", "expected published, lean, large, tiny"],
    ),
    "pretrain: no key=value": (
        ["tools/pretrain.py", PRETRAIN, "data={dataset}", "run.steps"],
        ["command line", "run.steps", "expected an override such as run.steps=100"],
    ),
    "plan: missing configuration": (
        ["tools/plan.py", "{tmp}/no.yaml"],
        ["{tmp}/no.yaml", "no such file", "expected a YAML file"],
    ),
    "plan: a dataset that is named and not there": (
        ["tools/plan.py", PRETRAIN, "data={tmp}/nowhere"],
        ["{tmp}/nowhere", "no such folder", "expected a dataset"],
    ),
    "plan: value out of range": (
        ["tools/plan.py", PRETRAIN, "zero.stage=4"],
        ["command line: zero.stage", "got 4", "expected auto or a whole number from 0 to 3"],
    ),
    "plan: what is not counted": (
        ["tools/plan.py", PRETRAIN, "zero.offload_optimizer=true"],
        ["offload_optimizer", "got true", "upper bound"],
    ),
    "pretrain: nothing to offload": (
        ["tools/pretrain.py", PRETRAIN, "data={dataset}", "zero.stage=0", "zero.offload_optimizer=true"],
        ["zero.offload_optimizer", "got True", "expected false, because zero.stage 0"],
    ),
    "pretrain: parameters that are whole": (
        ["tools/pretrain.py", PRETRAIN, "data={dataset}", "zero.stage=2", "zero.offload_parameters=true"],
        ["zero.offload_parameters", "got True", "expected false, because only zero.stage 3"],
    ),
    "pretrain: checkpoints that are never written": (
        ["tools/pretrain.py", PRETRAIN, "data={dataset}", "run.checkpoint_every=200", "run.keep_every=500"],
        ["command line: run.keep_every", "got 500", "expected a multiple of run.checkpoint_every, 200"],
    ),
    "pretrain: a mirror inside the run": (
        ["tools/pretrain.py", PRETRAIN, "data={dataset}", "run.out={tmp}/run", "run.mirror={tmp}/run/mirror"],
        ["run.mirror", "got '{tmp}/run/mirror'", "expected a folder that neither contains run.out"],
    ),
    "embed: a setting": (
        ["tools/embed.py", "export", "scan.nii.gz", "--out", "{tmp}/z.npz", "pooling=mean"],
        ["command line: pooling=mean", "got a setting", "expected no key=value", "--pooling", "Write --pooling VALUE"],
    ),
    "plan: no size": (
        ["tools/plan.py", PRETRAIN, "--gpu-memory", "big"],
        ["command line", "--gpu-memory", "got big", "expected a size such as 80GB"],
    ),
    "plan: no speed": (
        ["tools/plan.py", PRETRAIN, "--tflops", "0"],
        ["command line", "--tflops", "got 0", "expected a number above 0"],
    ),
    "plan: units that do not fit the grid": (
        ["tools/plan.py", PRETRAIN, "data={dataset}", "model=published"],
        ["unit", "expected"],
    ),
    "cohort: value out of range": (
        ["tools/make_cohort.py", "--out", "{tmp}/cohort", "--subjects", "0"],
        ["subjects", "got 0", "expected"],
    ),
    "cohort: no number": (["tools/make_cohort.py", "--out", "{tmp}/cohort", "--tr", "fast"], ["--tr", "'fast'"]),
    "cohort: a file in the way": (
        ["tools/make_cohort.py", "--out", "{tmp}/typo.yaml/cohort"],
        ["--out", "typo.yaml", "expected"],
    ),
    "cohort: no folder given": (["tools/make_cohort.py"], ["--out"]),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_call_is_told_in_one_line(name, cohort, dataset, tmp_path):
    (tmp_path / "rootless.yaml").write_text("name: lab\nroot: nowhere\n")
    (tmp_path / "typo.yaml").write_text(f"name: lab\nroot: {cohort}\nparticpants: participants.tsv\n")
    places = {"tmp": tmp_path, "cohort": cohort, "dataset": dataset}
    before = sorted(tmp_path.rglob("*"))
    words, wanted = CALLS[name]
    script, *rest = (word.format(**places) for word in words)
    done = tool(script.removeprefix("tools/"), *rest)
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    for part in wanted:
        choices = part.format(**places).split("|")
        assert any(choice in lines[0] for choice in choices), (choices, lines[0])
    assert sorted(tmp_path.rglob("*")) == before  # nothing was begun


def test_a_run_that_is_no_nifti_is_named_and_the_others_are_converted(command, tmp_path):
    done = command(
        "tools/make_cohort.py",
        "--out",
        tmp_path / "bids",
        "--subjects",
        2,
        "--sessions",
        1,
        "--frames",
        60,
        "--voxel-mm",
        16,
    )
    assert done.returncode == 0, done.stderr
    broken = next((tmp_path / "bids").rglob("sub-02*_bold.nii.gz"))
    broken.write_bytes(b"no image")
    done = command(
        "tools/make_shards.py",
        tmp_path / "bids/cohort.yaml",
        "--out",
        tmp_path / "out",
        "--ranker",
        "ridge",
        "--workers",
        1,
        "--json",
        *GRID,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["refused"] == 1
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("refused: ")]
    source = broken.relative_to(tmp_path / "bids").as_posix()
    told = r"got a file that is not compressed with gzip, .* ends with \.gz, expected a NIfTI image\. Rename it .*"
    assert re.fullmatch(rf"refused: {re.escape(source)}: {told}", line)
    for path in (tmp_path / "bids").rglob("*_bold.nii.gz"):
        path.write_bytes(b"no image")
    done = command(
        "tools/make_shards.py",
        tmp_path / "bids/cohort.yaml",
        "--out",
        tmp_path / "none",
        "--ranker",
        "ridge",
        "--workers",
        1,
        *GRID,
    )
    assert done.returncode == 1 and "no dataset was written" in done.stdout.splitlines()[-1]
    assert len((tmp_path / "none/failed.jsonl").read_text().splitlines()) == 2
    assert not Path(tmp_path / "none/manifest.json").exists()


@pytest.mark.parametrize("name", ["make_shards", "pretrain", "make_cohort", "plan", "export", "embed"])
def test_help_ends_with_an_example(name, command):
    done = command(f"tools/{name}.py", "--help")
    assert done.returncode == 0 and done.stdout.rstrip().splitlines()[-2] == "example:"
    assert f"python tools/{name}.py" in done.stdout.rstrip().splitlines()[-1]
