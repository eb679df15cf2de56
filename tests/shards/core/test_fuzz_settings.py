"""Damaged cohort, task, SLURM and pretraining files, and overrides: settings, or one line; see `fuzzing`."""

from __future__ import annotations

import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from helpers.commands import ROOT
from helpers.fuzzing import MARKS, SLURM, TEXTS, answer, counts, hold, written
from launchers.cluster.scheduler import SlurmSettings
from shards.cohorts.cohort_file import Cohort, find_cohort
from shards.cohorts.patterns import glob_regex, pattern_regex
from shards.conversion.settings import ConvertSettings
from shards.core.errors import ConfigError
from shards.core.settings import check, load, override
from slim.config import PretrainSettings, load_config
from slim.evaluation.task import Task, load_task

pytestmark = pytest.mark.fast

COHORTS = [
    {"name": "c", "root": "bids", "participants": "participants.tsv", "filters": {"desc": "preproc", "run": 1}},
    {"name": "c", "root": "bids", "filters": {"task": ["rest", "n*"], "res": None, "ses": "01"}, "space": "MNI"},
    {
        "name": "p",
        "root": "plain",
        "layout": "pattern",
        "pattern": "{subject}/**/run-{run}*.nii.gz",
        "mask": "{subject}/mask_{run}.nii.gz",
        "confounds": "{subject}/*_{run}.tsv",
        "space": "native",
        "tr": 0.8,
        "dummy": 3,
        "orientation": "LAS",
        "people": "others",
    },
]
TASKS = [
    {"name": "sex", "type": "classification", "label": "sex", "classes": {"F": ["F", "female"], "M": ["M"]}},
    {"name": "age", "type": "classification", "label": "age", "edges": [30, 50], "missing": ["-9999"]},
    {"name": "score", "type": "regression", "label": "score", "split": {"kind": "folds", "folds": 3, "family": "f"}},
    {"name": "who", "type": "fingerprint", "split": {"kind": "all"}, "pooling": "mean"},
    {
        "name": "state",
        "type": "state",
        "events": {"path": "{subject}/{session}.tsv", "column": "trial_type", "keep": ["a"], "delay": 5},
        "pooling": "mean",
        "split": {"kind": "holdout", "shares": [0.6, 0.2, 0.2]},
    },
]
PRETRAIN = [yaml.safe_load((ROOT / "configs" / "pretrain" / f"{name}.yaml").read_text()) for name in ("lean", "tiny")]


def read(path: Path, reader: Callable[[Path], Any], kinds: type | tuple[type, ...], content: bytes) -> None:
    path.write_bytes(content)
    told = answer(lambda: reader(path), len(content))
    assert isinstance(told, (kinds, ConfigError) if isinstance(kinds, type) else (*kinds, ConfigError))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs as BIDS and as any other names; their content is not read."""
    folder = tmp_path_factory.mktemp("trees")
    names = [f"bids/sub-0{n}/func/sub-0{n}_task-rest_run-1_space-MNI152_desc-preproc_bold.nii.gz" for n in range(1, 4)]
    names += ["bids/sub-04/ses-01/func/sub-04_ses-01_task-nback_space-MNI152_res-2_desc-preproc_bold.nii"]
    names += [f"plain/s{n}/deep/run-{run}_x.nii.gz" for n in range(3) for run in (1, 2)]
    names += [f"plain/s{n}/mask_{run}.nii.gz" for n in range(3) for run in (1, 2)]
    names += [f"plain/s{n}/confounds_{run}.tsv" for n in range(3) for run in (1, 2)]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    (folder / "participants.tsv").write_text("participant_id\tsex\nsub-01\tF\nsub-02\tM\n")
    return folder


@counts
def test_cohorts(inputs: int, folder: Path) -> None:
    hold(inputs, written(COHORTS), partial(read, folder / "cohort.yaml", find_cohort, Cohort))


@counts
def test_tasks(inputs: int, tmp_path: Path) -> None:
    hold(inputs, written(TASKS), partial(read, tmp_path / "task.yaml", load_task, Task))


@counts
def test_slurm(inputs: int, tmp_path: Path) -> None:
    reader = partial(load, SlurmSettings)
    hold(inputs, written(SLURM), partial(read, tmp_path / "slurm.yaml", reader, SlurmSettings))


@counts
def test_pretraining(inputs: int, tmp_path: Path) -> None:
    def reader(path: Path) -> PretrainSettings:
        return load_config(path, ["data=d", "run.out=o"])

    hold(inputs, written(PRETRAIN), partial(read, tmp_path / "config.yaml", reader, PretrainSettings))


@counts
def test_overrides(inputs: int) -> None:
    keys = (
        "grid.mm",
        "grid.shape",
        "mask.ml",
        "windows.keep",
        "shards.mb",
        "clean.confounds",
        "split.shares",
        "parcels",
    )
    odd = st.one_of(st.sampled_from((*TEXTS, *MARKS)), st.text(max_size=20), st.binary(max_size=8).map(repr))
    key = st.one_of(st.sampled_from(keys), odd, st.lists(odd, max_size=5).map(".".join))
    value = st.one_of(odd, st.sampled_from(("[8, 8, 8]", "1e-3", "{a: 1}", "null", "0.5")), st.lists(odd).map(str))
    assignment = st.one_of(st.tuples(key, value).map("=".join), odd)

    def target(assignments: list[str]) -> None:
        def call() -> ConvertSettings:
            return check(ConvertSettings, override({}, assignments), "command line")

        told = answer(call, sum(map(len, assignments)))
        assert isinstance(told, ConvertSettings | ConfigError)

    hold(inputs, st.lists(assignment, min_size=1, max_size=4), target)


GLOBS = st.text("ab*?", max_size=12).map(lambda text: re.sub(r"\*+", "*", text))


@given(GLOBS, st.text("ab", max_size=10))
def test_globs_match_what_those_of_python_match(glob: str, name: str) -> None:
    expected = fnmatchcase(name, glob)
    assert (glob_regex(glob).fullmatch(name) is not None) == expected
    assert (pattern_regex(glob).match(name) is not None) == expected


@pytest.mark.parametrize(
    "change",
    [
        {"filters": {"task": "*a" * 30 + "b"}},
        {"filters": {"task": "*" * 100 + "b"}},
        {"root": "deep", "layout": "pattern", "pattern": "{subject}/" + "**/" * 12 + "*.nii.gz"},
        {"root": "deep", "layout": "pattern", "pattern": "{subject}/" + "**/f*/" * 6 + "b.nii.gz"},
        {"root": "deep", "layout": "pattern", "pattern": "{subject}/**/" + "*a" * 30 + "b"},
    ],
)
def test_patterns_with_many_globs_take_no_time(change: dict[str, Any], tmp_path: Path) -> None:
    """They took longer than anybody waits: each `*`, each `**` tried all places again."""
    long = "a" * 180
    inner = tmp_path.joinpath("deep", "s", *[f"f{depth}" for depth in range(12)])
    runs = [inner / f"{long}.nii.gz", tmp_path / f"bids/sub-1/func/sub-1_task-{long}_space-MNI_desc-preproc_bold.nii"]
    for run in runs:
        run.parent.mkdir(parents=True)
        run.write_bytes(b"")
    path = tmp_path / "cohort.yaml"
    path.write_text(yaml.safe_dump({"name": "c", "root": "bids", **change}))
    told = answer(lambda: find_cohort(path), 1000)
    assert isinstance(told, Cohort | ConfigError)


@pytest.mark.parametrize("text", ["a\0b", "x" * 300, "y/" * 3000])
@pytest.mark.parametrize("field", ["root", "participants", "mask", "confounds", "pattern"])
def test_paths_that_no_system_looks_up(text: str, field: str, folder: Path) -> None:
    path = folder / "paths.yaml"
    path.write_text(yaml.safe_dump({**COHORTS[2], field: text}))
    with pytest.raises(ConfigError, match=f"{field}: got .*, expected a path of at most"):
        find_cohort(path)


@pytest.mark.parametrize("text", ["{subject:>1000000000}", "{subject!r}", "{subject.x}", "{}", "{0}", "{", "{other}"])
def test_paths_of_events_have_plain_fields(text: str, tmp_path: Path) -> None:
    """A width made a path of a gigabyte."""
    path = tmp_path / "task.yaml"
    path.write_text(yaml.safe_dump({**TASKS[4], "events": {"path": text}}))
    told = answer(lambda: load_task(path), 1000)
    assert isinstance(told, ConfigError) and "and no other fields" in told.line()


def test_a_model_whose_name_no_system_looks_up(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    for name in ("9" * 5000, "a\0b"):
        path.write_text(yaml.safe_dump({**PRETRAIN[1], "model": name}))
        with pytest.raises(ConfigError, match=r"model: got .*, expected published, lean, large, tiny, or a YAML file"):
            load_config(path, ["data=d", "run.out=o"])
    path.write_text(yaml.safe_dump(PRETRAIN[1]))
    with pytest.raises(ConfigError, match=r"run\.out: got .*, expected a path of at most"):
        load_config(path, ["data=d", "run.out=" + "x" * 300])
