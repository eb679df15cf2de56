"""Parcels and events for the page of a dataset: found by the flags of slim-brain report, and wrong calls."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from helpers.pages import command
from launchers.given_data import given_for
from shards.core.errors import ConfigError
from shards.core.files import sha256
from shards.format import layout
from shards.format.patches import scatter
from shards.format.reader import Dataset
from slim.ranking.rankers import make_ranker

EVENTS = "sub-{subject}/ses-{session}/func/sub-{subject}_ses-{session}_task-rest_events.tsv"
STATES = f"name: states\ntype: state\npooling: mean\nevents: {{path: '{EVENTS}'}}\n"


@pytest.fixture
def states(tmp_path: Path) -> Path:
    path = tmp_path / "states.yaml"
    path.write_text(STATES)
    return path


def test_cubes_are_those_of_the_conversion(dataset: Path) -> None:
    opened = Dataset(dataset)
    parcels = given_for(dataset, None, None, None).parcels
    for session in opened.sessions[:2]:
        arrays = opened.read(session, ("brain", "patch", "roi_number"))
        label_XYZ = parcels(scatter(arrays["brain"], arrays["patch"], opened.grid.shape, opened.grid.patch) > 0)
        np.testing.assert_array_equal(np.setdiff1d(label_XYZ, 0), arrays["roi_number"])


def test_events_and_states_are_those_of_the_task(dataset: Path, cohort: Path, states: Path) -> None:
    given = given_for(dataset, None, str(states), cohort)
    session = Dataset(dataset).sessions[0]
    table = given.events(session)
    assert len(table) and {"onset", "end", "state"} <= {*table.columns}
    found = given.states_of(session, 5)
    assert len(found) == session.n_windows and {*found} - {None} <= {*table["state"]}
    assert given.events(session.model_copy(update={"subject": "99"})) is None
    assert given.states_of(session.model_copy(update={"subject": "99"}), 5) is None


def test_energies_are_those_of_the_ranker_of_the_conversion(dataset: Path, tmp_path: Path) -> None:
    opened = Dataset(dataset)
    arrays = opened.read(opened.sessions[0], ("roi", "roi_centre"))
    call = arrays["roi"], arrays["roi_centre"], opened.frames
    found = given_for(dataset, None, None, None).energies(*call)
    identity = opened.manifest.ranker
    assert identity["name"] == "ridge"
    expected = make_ranker("ridge", seed=identity["seed"], version=identity["version"]).energies(*call)
    assert list(found) == list(expected) == ["scores_space", "scores_time"]
    np.testing.assert_array_equal(found["scores_space"], expected["scores_space"])
    folder = labelled(dataset, tmp_path / "data", None)
    manifest = json.loads((folder / layout.MANIFEST).read_text())
    manifest["ranker"]["rho"] = 0.7  # as another version may have it
    (folder / layout.MANIFEST).write_text(json.dumps(manifest))
    assert given_for(folder, None, None, None).energies is None


def labelled(dataset: Path, to: Path, content: object) -> Path:
    """A copy of a dataset whose manifest says that its parcels are from a label image."""
    shutil.copytree(dataset, to, ignore=shutil.ignore_patterns("work", "report"))
    manifest = json.loads((to / layout.MANIFEST).read_text())
    manifest["configuration"]["settings"]["parcels"]["image"] = content
    (to / layout.MANIFEST).write_text(json.dumps(manifest))
    return to


def test_a_label_image_is_known_by_its_checksum(dataset: Path, tmp_path: Path) -> None:
    grid = Dataset(dataset).grid
    image = tmp_path / "atlas.nii.gz"
    label_XYZ = np.ones(grid.shape, np.int16)
    label_XYZ[8:] = 2
    made = nib.Nifti1Image(label_XYZ, grid.affine)
    made.set_sform(grid.affine, "mni")
    made.to_filename(image)
    folder = labelled(dataset, tmp_path / "data", {"name": image.name, "sha256": sha256(image)})
    assert given_for(folder, None, None, None).parcels is None
    found = given_for(folder, image, None, None).parcels(np.ones(grid.shape, bool))
    np.testing.assert_array_equal(found, label_XYZ)
    other = tmp_path / "other.nii.gz"
    nib.Nifti1Image(label_XYZ[::-1], grid.affine).to_filename(other)
    with pytest.raises(ConfigError, match=r"--parcels: got .*other\.nii\.gz, another image, expected atlas\.nii\.gz"):
        given_for(folder, other, None, None)
    with pytest.raises(ConfigError, match="--parcels: got no file"):
        given_for(folder, tmp_path / "absent.nii", None, None)
    with pytest.raises(ConfigError, match="none: the parcels of this dataset are cubes"):
        given_for(dataset, image, None, None)


def test_wrong_calls_are_one_line(
    dataset: Path, cohort: Path, states: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    plain = tmp_path / "plain.yaml"
    plain.write_text("name: sex\ntype: classification\nlabel: sex\npooling: mean\n")
    run = tmp_path / "run"
    run.mkdir()
    for words, told in (
        ((dataset, "--events", cohort), "--events"),
        ((dataset, "--states", plain, "--events", cohort), "a task with events"),
        ((dataset, "--states", states, "--events", tmp_path / "absent"), "no folder"),
        ((dataset, "--states", "absent_task"), "--states"),
        ((run, "--states", states), "the folder of a dataset"),
        ((dataset, run, "--parcels", "atlas.nii", "--out", tmp_path / "page.html"), "the folder of a dataset"),
    ):
        status, _, err = command(monkeypatch, capsys, *map(str, words))
        assert status == 2 and told in err and err.startswith("error: ") and err.count("\n") == 1, err


def test_the_page_shows_events(dataset: Path, cohort: Path, states: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """Also a page without names, whose views have numbers in their names, and events of the right subject."""
    folder = tmp_path / "data"
    shutil.copytree(dataset, folder, ignore=shutil.ignore_patterns("work", "report"))
    events = ("--states", str(states), "--events", str(cohort))
    status, _, err = command(monkeypatch, capsys, str(folder), *events, "--private")
    assert status == 0, err
    content = (folder / "report" / "index.html").read_text()
    assert "the 8 most salient, no state" in content
    views = {path.name: path.read_text() for path in (folder / "report" / "views").iterdir()}
    opened = Dataset(folder)
    assert len(views) == 4 * len(opened) and {name.split("_")[0] for name in views} == {
        f"session-{n}" for n in range(1, 7)
    }
    for number, session in enumerate(opened.sessions, 1):
        assert not [name for name, page in views.items() if session.key in name or session.key in page]
        view = views[f"session-{number}_windows.html"]
        table = given_for(folder, None, str(states), cohort).events(session)
        assert view.count('"onset": ') == len(table)
    status, _, err = command(monkeypatch, capsys, str(folder))
    assert status == 0, err
    names = {path.name for path in (folder / "report" / "views").iterdir()}
    assert not [name for name in names if name.startswith("session-")] and len(names) == 4 * len(opened)
