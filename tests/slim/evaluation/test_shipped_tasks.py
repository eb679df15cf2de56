"""The tasks that ship, on people with the columns of the real cohorts, and on folders as the real cohorts have them.

The columns are those of the trees of `tests/shards/cohorts/test_cohort_layouts.py`; people and values are made up.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import nibabel as nib
import numpy as np
import pytest

from helpers.commands import GRID, ROOT
from helpers.conversions import write_page
from helpers.scans import save
from helpers.tasks import sessions
from shards.core.errors import ConfigError
from shards.core.presets import find
from shards.reporting import dataset_page
from slim.evaluation import baselines, probe
from slim.evaluation.division import divide_shares, make_splits
from slim.evaluation.linear import Linear
from slim.evaluation.task import find_cases, load_task

COLUMNS: dict[str, dict[str, Callable[[int], Any]]] = {
    "abide": {
        "DX_GROUP": lambda s: 1 + s % 2,
        "SITE_ID": lambda s: ("NYU", "PITT", "UM_1")[s // 2 % 3],
        "AGE_AT_SCAN": lambda s: 7 + s * 0.37,
        "SEX": lambda s: 1 + s // 3 % 2,
        "FIQ": lambda s: -9999 if s == 7 else 90 + s % 31,
    },
    "adhd200": {
        "DX": lambda s: "pending" if s == 5 else str(s % 4),
        "Age": lambda s: 8 + s * 0.1,
        "Gender": lambda s: s // 2 % 2,
        "Site": lambda s: 1 + s % 5,
    },
    "adni": {
        "diagnosis_sc": lambda s: ("CN", "SMC", "AD", "AD", "MCI", "EMCI")[s % 6],
        "sex": lambda s: "FM"[s // 2 % 2],
    },
    "ppmi": {
        "COHORT_DEFINITION": lambda s: ("Parkinson's Disease", "Healthy Control", "Prodromal", "SWEDD")[s % 4],
        "ENROLL_AGE": lambda s: 50 + s * 0.3,
    },
    "aabc": {
        "sex": lambda s: "FM"[s % 2],
        "age_open": lambda s: 36 + s * 0.5,
        "pedid": lambda s: f"P{s // 4}",
    },
}
TASKS = {
    "abide_diagnosis": ("abide", ["autism", "control"], 99),
    "adhd200": ("adhd200", ["adhd", "control"], 99),
    "adni_ad": ("adni", ["alzheimer", "normal"], 68),
    "ppmi": ("ppmi", ["control", "parkinson"], 50),
    "aabc_sex": ("aabc", ["men", "women"], 100),
    "aabc_age": ("aabc", [], 100),
}


def people(cohort: str) -> SimpleNamespace:
    """100 people with two scans each, and the columns of a cohort."""
    found = sessions(100, 2, **COLUMNS[cohort])
    facts = {"mean_fd_mm": 0.1, "tsnr": 50.0, "brain_ml": 1200.0}
    for number, session in enumerate(found.sessions):
        mine = {name: value + 0.01 * (number % 17) for name, value in facts.items()}
        found.sessions[number] = session.model_copy(update=mine)
    return found


@pytest.mark.fast
@pytest.mark.parametrize("name", TASKS)
def test_a_task_of_reviewers_runs_on_people_with_the_columns_of_its_cohort(name: str) -> None:
    cohort, classes, count = TASKS[name]
    where = find("task", name, "--task")
    task = load_task(where, ["bootstrap=100", "permutations=99", "split.share=[0.5,1]"])
    assert f"configs/cohorts/{cohort}.yaml" in where.read_text() and re.search(r"^# Columns ", where.read_text(), re.M)
    cases = find_cases(task, people(cohort), where)
    assert cases.classes == classes and len(cases.subjects) == count
    shares = divide_shares(task, cases, make_splits(task, cases, where), where)
    truth_N = np.asarray(cases.truth_S, float)[cases.subject_N]
    vector_NP = np.random.default_rng(0).normal(size=(len(truth_N), 10))
    vector_NP[:, 0] += 6 * (truth_N - truth_N.mean()) / truth_N.std()
    confounds = baselines.confounds(cases.sessions, task.confounds)
    methods = {"ours": Linear(lambda train: vector_NP), "confounds": Linear(lambda train: confounds)}
    scored = {
        share: {name: [probe.score_and_permute(task, cases, splits, method)] for name, method in methods.items()}
        for share, splits in shares.items()
    }
    result = probe.summarise_shares(task, cases, shares, scored)
    assert result.estimate("ours", result.judged_by).value > 0.9
    assert result.facts.shares[0].estimates["ours"][result.judged_by].value > 0.85


@pytest.mark.fast
def test_people_are_found_among_a_hundred() -> None:
    where = find("task", "hcp_reidentification", "--task")
    task = load_task(where, ["bootstrap=100", "permutations=99"])
    cases = find_cases(task, sessions(400, 2), where)  # every fourth is a test subject of the dataset
    traits_SP = np.random.default_rng(0).normal(size=(400, 50))
    noisy_NP = traits_SP[cases.subject_N] + 0.9 * np.random.default_rng(1).normal(size=(800, 50))
    result = probe.run_task(task, cases, {"ours": Linear(lambda train: noisy_NP)}, where)
    found, chance = result.estimates["ours"]["top1"], result.facts.chance
    assert result.facts.test_subjects == 100 and result.facts.gallery == 100
    assert 0.5 < found.low < found.value < found.high and found.p == 0.01
    for name in ("top1", "map"):
        assert f"(chance {chance[name]:.3f})".replace("0.", ".") in where.read_text()
    with pytest.raises(ConfigError, match="gallery: got 100 with 99 test people"):
        make_splits(task, find_cases(task, sessions(399, 2), where), where)


TASK_RUNS = {
    "EMOTION": ("fear", "neut"),
    "LANGUAGE": ("math", "story"),
    "MOTOR": ("lf", "lh", "rf", "rh", "t"),
    "RELATIONAL": ("match", "relation"),
    "SOCIAL": ("mental", "rnd"),
    "WM": tuple(f"{back}bk_{what}" for what in ("body", "faces", "places", "tools") for back in (0, 2)),
}
SHAPE = 20, 24, 20
AFFINE = nib.affines.from_matvec(np.diag([9.0] * 3), [-85.5, -121.5, -67.5])  # 9 mm, around the MNI brain
FRAMES, TR, WINDOW, DELAY = 60, 0.72, 3.6, 5.0


def brain(seed: int) -> np.ndarray:
    """An ellipsoid in the place of the MNI brain, of three sizes, bool (x, y, z)."""
    place = nib.affines.apply_affine(AFFINE, np.moveaxis(np.indices(SHAPE), 0, -1))
    return (((place - [0, -18, 15]) / [66, 80, 55]) ** 2).sum(axis=-1) < 1 + 0.05 * (seed % 3)


def scan(path: Path, seed: int) -> None:
    """A brain with anatomy and noise that is smooth in time; 0 around it."""
    rng = np.random.default_rng(seed)
    noise = np.cumsum(rng.standard_normal((*SHAPE, FRAMES)), axis=-1)
    values = rng.uniform(800, 1200, SHAPE)[..., None] + 5 * (noise - noise.mean(axis=-1, keepdims=True))
    save(path, (values * brain(seed)[..., None]).astype(np.float32), AFFINE, TR)


def hcp(folder: Path, people: int = 10) -> None:
    """Task runs as HCP distributes them: each window from the second on has a condition, the conditions in turn."""
    for person in range(people):
        for task, conditions in TASK_RUNS.items():
            run = folder / f"{100100 + person}/MNINonLinear/Results/tfMRI_{task}_LR"
            seed = 10 * person + len(task)
            scan(run / f"tfMRI_{task}_LR.nii.gz", seed)
            save(run / "brainmask_fs.2.nii.gz", brain(seed).astype(np.uint8), AFFINE)
            (run / "EVs").mkdir()
            for number, name in enumerate(conditions):
                onsets = WINDOW * np.arange(2 + number, 12, len(conditions)) - DELAY
                (run / f"EVs/{name}.txt").write_text("".join(f"{onset:.3f}\t{WINDOW}\t1.0\n" for onset in onsets))
            (run / "EVs/Sync.txt").write_text("10.1\n")
    rows = "".join(f"{100100 + person},{'FM'[person % 2]},F{person}\n" for person in range(people))
    (folder / "unrestricted.csv").write_text("Subject,Gender,Family_ID\n" + rows)


def aabc(folder: Path, people: int = 20) -> None:
    """One or two visits of each person, and the table that the cohort file asks for."""
    rows = ["id_event,sex,age_open,pedid,subject,session"]
    for person in range(people):
        subject = f"HCA{6000000 + person}"
        for visit in range(1, 2 + person % 2):
            run = folder / f"{subject}_V{visit}_MR/MNINonLinear/Results/rfMRI_REST"
            scan(run / "rfMRI_REST_hp0_clean_rclean_tclean.nii.gz", 3 * person + visit)
            rows.append(f"{subject}_V{visit},{'FM'[person % 2]},{40 + person + visit},P{person},{subject},V{visit}")
    (folder / "participants.csv").write_text("\n".join(rows) + "\n")


@pytest.mark.parametrize(
    ("cohort", "make", "tasks", "scans"),
    [("hcp_task", hcp, ("hcp_task21",), 60), ("aabc", aabc, ("aabc_sex", "aabc_age"), 30)],
)
def test_a_task_runs_from_the_folders_of_its_cohort_to_a_report(
    command: Callable, tmp_path: Path, cohort: str, make: Callable[[Path], None], tasks: tuple[str, ...], scans: int
) -> None:
    folder, data, run = tmp_path / "cohort", tmp_path / "shards", tmp_path / "run"
    make(folder)
    text, changed = re.subn(r"(?m)^root: .*$", f"root: {folder}", find("cohort", cohort, "COHORT").read_text())
    assert changed == 1
    (tmp_path / f"{cohort}.yaml").write_text(text)
    with mock.patch.object(dataset_page, "write", write_page):
        words = ("--out", data, "--ranker", "variance", "--workers", 1, "--json", *GRID)
        done = command("tools/make_shards.py", tmp_path / f"{cohort}.yaml", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["sessions"] == scans
    usual = (f"data={data}", f"run.out={run}", "run.steps=1", "run.batch=2", "run.workers=0", "run.wandb=disabled")
    done = command("tools/pretrain.py", "configs/pretrain/tiny.yaml", *usual)
    assert done.returncode == 0, done.stderr
    words = [word for name in tasks for word in ("--task", name)]
    words += ["--events", folder] if cohort == "hcp_task" else []
    quick = ("bootstrap=100", "permutations=99", "--random-seeds", 1, "--json")
    done = command("tools/probe.py", run, "--data", data, *words, *quick)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert set(report["tasks"]) == set(tasks)
    for name in tasks:
        assert report["facts"][name]["subjects"] == (10 if cohort == "hcp_task" else 20)
        for method in ("ours", "random", "mean_image"):
            for score in report["tasks"][name][method].values():
                assert score["value"] is not None
    if cohort == "hcp_task":
        conditions = load_task(ROOT / "configs/downstream/hcp_task21.yaml").events.keep
        assert set(report["facts"]["hcp_task21"]["classes"]) == set(conditions)
        assert set(conditions) == {name for names in TASK_RUNS.values() for name in names} and len(conditions) == 21
