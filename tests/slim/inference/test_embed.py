"""`tools/embed.py`: from files to vectors; a refused run is named and the rest goes on."""

from __future__ import annotations

import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from helpers.pretrained import ALIGNED, tool, write_run
from shards.cohorts.cohort_file import find_runs
from slim.inference.slim_brain import SlimBrain


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("embed") / "run", dataset, ALIGNED)


def test_runs_become_vectors_and_a_refused_one_is_named(run: Path, cohort: Path, tmp_path: Path):
    first, second = (source.bold for source in find_runs(cohort / "cohort.yaml")[:2])
    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes(first.read_bytes()[:5000])
    out = tmp_path / "z.npz"
    done = tool("embed.py", run, first, broken, second, "--out", out, "--json")
    assert done.returncode == 1, done.stderr
    assert f"refused: {broken}: data: got unreadable" in done.stdout
    facts = json.loads(done.stdout.splitlines()[-1])
    assert (facts["runs"], facts["refused"], facts["vectors"]) == (2, 1, 24)
    model = SlimBrain.from_pretrained(run)
    with np.load(out) as found:
        assert found["sources"].tolist() == [first.name, second.name]  # no folders: the file is sent to others
        assert found["keys"].tolist() == [path.name.removesuffix(".nii.gz") for path in (first, second)]
        for number, path in enumerate((first, second)):
            mine = found["run"] == number
            np.testing.assert_array_equal(found["vectors"][mine], model.encode(path))
            np.testing.assert_array_equal(found["start"][mine], model.encode_tokens(path).window_onsets)
        about = json.loads(str(found["about"]))
        assert found["tr"].tolist() == found["source_tr"].tolist() == [0.72, 0.72]
    assert (about["checksum"], about["step"], about["pooling"]) == (model.checksum, 7, "mean")
    assert facts["tr"] == facts["source_tr"] == [0.72, 0.72] and facts["TR"] == "0.72 s"


def test_the_tr_that_was_used_and_what_was_assumed_are_told(run: Path, cohort: Path, tmp_path: Path):
    """Two scans of scanner space, of which one has another TR."""
    sources, given = find_runs(cohort / "cohort.yaml")[:2], []
    for number, (source, tr) in enumerate(zip(sources, (0.72, 0.9), strict=True)):
        image = nib.load(source.bold)
        image.set_sform(image.affine, 1)
        image.set_qform(image.affine, 1)
        image.header.set_zooms((*image.header.get_zooms()[:3], tr))
        nib.save(image, tmp_path / f"sub-{number}.nii.gz")
        given.append(tmp_path / f"sub-{number}.nii.gz")
    masks = [word for source in sources for word in ("--mask", source.mask)]
    out = tmp_path / "z.npz"
    done = tool("embed.py", run, *given, *masks, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["TR"] == "0.72 s, 0.9 s brought to 0.72 s" and "0.9 s brought to" in done.stdout
    for path in given:
        (line,) = [text for text in done.stdout.splitlines() if text.startswith(f"assumed: {path}: space")]
        assert (
            "taken as MNI: header code 1 (scanner)" in line
            and line.split(f"{path}: ")[1] in facts["assumed"][str(path)]
        )
    with np.load(out) as found:
        assert found["tr"].tolist() == [0.72, 0.72] and found["source_tr"].tolist() == [0.72, 0.9]
        # in the file without folders, which name people and machines
        names = {Path(path).name: words for path, words in facts["assumed"].items()}
        assert json.loads(str(found["about"]))["assumed"] == names


def test_per_run_at_the_places_all_of_them_have(run: Path, cohort: Path, tmp_path: Path):
    sources = find_runs(cohort / "cohort.yaml")[:2]
    words = [item for source in sources for item in ("--mask", source.mask)]
    out = tmp_path / "z.npz"
    runs = [source.bold for source in sources]
    shape = ("--per", "run", "--pooling", "location", "--stage", 1)
    done = tool("embed.py", run, *runs, *words, "--out", out, *shape)
    assert done.returncode == 0, done.stderr
    model = SlimBrain.from_pretrained(run)
    features = [model.encode_tokens(source.bold, stage=1) for source in sources]
    places = np.intersect1d(*(item.places for item in features))
    with np.load(out) as found:
        np.testing.assert_array_equal(found["places"], places)
        for item, row in zip(features, found["vectors"], strict=True):
            expected = item.tokens[:, np.isin(item.places, places)].mean(axis=0).ravel()
            np.testing.assert_allclose(row, expected, rtol=1e-5, atol=1e-6)
        assert "start" not in found


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--pooling", "cov"], "pooling: got cov, expected mean, mean+sd, location"),
        (["--stage", "9"], "stage: got 9, expected 1 to 2"),
        (["--mask", "a", "--mask", "b", "--mask", "c"], "--mask: got 3 files, expected one, or 1"),
        (["--tr", "-1"], "tr: got -1"),
        (["--out", "z.npy"], "expected a name that ends with .npz"),
    ],
)
def test_a_wrong_call_is_one_line(run: Path, cohort: Path, tmp_path: Path, words, line: str):
    bold = find_runs(cohort / "cohort.yaml")[0].bold
    done = tool("embed.py", run, bold, "--out", tmp_path / "z.npz", *words)
    assert done.returncode == 2 and line in done.stderr, done.stderr
    assert len([text for text in done.stderr.splitlines() if text.startswith("error")]) == 1
    assert not list(tmp_path.iterdir())


def test_where_every_run_is_refused_nothing_is_written(run: Path, tmp_path: Path):
    done = tool("embed.py", run, tmp_path / "none.nii.gz", "--out", tmp_path / "z.npz")
    assert done.returncode == 1 and "none.nii.gz: got no such file" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.real
def test_real_runs_in_native_space(run: Path, tmp_path: Path):
    """Both whole brains, one with a mask and one without, on the coarse grid of the small model."""
    folder = os.environ.get("SLIM_REAL_DATA")
    if not folder:
        pytest.skip("SLIM_REAL_DATA is not set: no folder of real runs to encode")
    rapidtide, ds000205 = Path(folder) / "rapidtide", Path(folder) / "ds000205"
    files = [
        (
            rapidtide / "sub-RAPIDTIDETEST.nii.gz",
            ("--mask", rapidtide / "sub-RAPIDTIDETEST_brainmask.nii.gz"),
            260 * 1.5,
        ),
        (ds000205 / "sub-ds205s03_task-functionallocalizer_run-01_bold_volreg.nii.gz", (), 82 * 2.2),
    ]
    for bold, mask, seconds in files:
        out = tmp_path / f"{bold.name}.npz"
        done = tool("embed.py", run, bold, *mask, "--space", "native", "--out", out)
        assert done.returncode == 0, done.stdout + done.stderr
        with np.load(out) as found:
            assert found["vectors"].shape == (32, ALIGNED["embed"] * 2) and np.isfinite(found["vectors"]).all()
            assert (np.diff(found["start"]) > 0).all() and found["start"][-1] + 5 * 0.72 <= seconds
            assert found["vectors"].std(axis=0).min() > 0  # windows differ
