"""The synthetic cohort is a BIDS dataset, says the validator of the BIDS community."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shards.cohorts.bids import parse
from shards.cohorts.cohort_file import find_cohort


def errors(folder: Path, tmp_path: Path) -> list[tuple[str, str]]:
    """Code and file of each error in a dataset; validator, schema and deno come from PyPI and need no network."""
    validator, deno = (Path(sys.executable).with_name(name) for name in ("bids-validator-deno", "deno"))
    if not validator.is_file():
        pytest.skip("bids-validator-deno is not installed: pip install -c constraints.txt -e '.[test]'")
    environment = {**os.environ, "DENO_DIR": str(tmp_path / "deno"), "DENO_NO_UPDATE_CHECK": "1"}
    try:
        subprocess.run([deno, "--version"], env=environment, capture_output=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"deno, which runs the validator, does not start on this platform: {error}")
    command = [validator, folder, "--format", "json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("{"), done.stderr
    report = json.loads(done.stdout)
    assert report["summary"]["totalFiles"] > 0
    return sorted(
        (issue["code"], issue["location"]) for issue in report["issues"]["issues"] if issue["severity"] == "error"
    )


def test_the_synthetic_cohort_is_valid(cohort: Path, tmp_path: Path) -> None:
    assert errors(cohort, tmp_path) == []


def test_what_is_not_bids_is_an_error(cohort: Path, tmp_path: Path) -> None:
    """The validator looks at the files, so that no error means something."""
    copy = shutil.copytree(cohort, tmp_path / "bids")
    bold = next(copy.rglob("*_bold.nii.gz"))
    bold.rename(bold.with_name(bold.name.replace("_bold", "_signal")))
    (copy / "dataset_description.json").write_text("{}")
    found = errors(copy, tmp_path)
    assert {"JSON_KEY_REQUIRED", "NOT_INCLUDED"} <= {code for code, _ in found}


def test_what_the_validator_is_told_to_ignore_is_found_by_the_cohort(cohort: Path) -> None:
    """`.bidsignore` names the confounds, as that of fMRIPrep does; they are used all the same."""
    found = find_cohort(cohort / "cohort.yaml")
    assert len(found.runs) == 6 and not any("bidsignore" in note for note in found.notes)
    assert all(run.confounds and parse(run.confounds).suffix == "timeseries" for run in found.runs)
