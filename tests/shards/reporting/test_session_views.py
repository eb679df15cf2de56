"""The maps of a session: the numbers of the sample, in the right place, and what old or native sessions lack."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from shards.cohorts.cohort_file import find_runs
from shards.format.patches import scatter
from shards.format.reader import Dataset
from shards.format.session_record import SessionRecord
from shards.reporting import session_views
from shards.reporting.session_views import kept_mean, mean_image, tsnr
from shards.reporting.windows_view import Given


@pytest.fixture
def session(opened: Dataset) -> SessionRecord:
    return opened.sessions[2]


def brain_of(opened: Dataset, session: SessionRecord) -> np.ndarray:
    arrays = opened.read(session, ("brain", "patch"))
    return scatter(arrays["brain"], arrays["patch"], opened.grid.shape, opened.grid.patch) > 0


def test_the_mean_image_is_that_of_the_scan(opened: Dataset, session: SessionRecord, cohort: Path) -> None:
    """In the units of the scan: the cohort is on another grid, so that the brain as a whole is compared."""
    shown = mean_image(opened, session)
    brain_XYZ, values_XYZ = brain_of(opened, session), shown.image.get_fdata()
    np.testing.assert_array_equal(shown.image.affine, opened.grid.affine)
    assert not values_XYZ[~brain_XYZ].any() and shown.under is None
    (scan,) = [run for run in find_runs(cohort / "cohort.yaml") if run.key == session.key]
    image = nib.load(scan.bold).get_fdata()
    whole = image.mean(axis=3)[nib.load(scan.mask).get_fdata() > 0]
    assert values_XYZ[brain_XYZ].mean() == pytest.approx(session.global_mean, rel=1e-5)
    assert values_XYZ[brain_XYZ].mean() == pytest.approx(whole[whole > 0].mean(), rel=0.05)


def test_the_median_tsnr_is_that_in_the_record(opened: Dataset) -> None:
    for session in opened.sessions:
        shown = tsnr(opened, session)
        assert shown is not None
        values_XYZ = shown.image.get_fdata()
        assert np.median(values_XYZ[brain_of(opened, session)]) == pytest.approx(session.tsnr, rel=1e-3)


def test_kept_windows_weigh_by_their_saliency(opened: Dataset, session: SessionRecord) -> None:
    """Compared with the mean of whole arrays; a window with the lowest score of all would have no weight."""
    arrays = opened.read(session)
    weight_K = arrays["saliency"].astype(float) - arrays["scores"].min()
    mean_PV = np.average(arrays["windows"].astype(float).mean(axis=1), axis=0, weights=weight_K)
    inside_PV = arrays["brain"] > 0
    z_PV = np.where(inside_PV, mean_PV / np.where(inside_PV, arrays["spread"], 1), 0)
    expected_XYZ = scatter(z_PV, arrays["patch"], opened.grid.shape, opened.grid.patch)
    shown = kept_mean(opened, session)
    np.testing.assert_allclose(shown.image.get_fdata(), expected_XYZ, atol=1e-3)
    assert shown.signed and np.abs(expected_XYZ).max() > 0.1


def test_an_old_session_has_no_map_of_the_tsnr(opened: Dataset, session: SessionRecord, tmp_path: Path) -> None:
    old = session.model_copy(update={"global_mean": None, "global_sd": None})
    assert tsnr(opened, old) is None
    assert (mean_image(opened, old).image.get_fdata()[brain_of(opened, session)] > 0).all()
    made = session_views.write(session_views.start(tmp_path), opened, old, Given())
    assert [*made.links] == ["mean image", "mean of the kept windows", "windows, one at a time"]
    assert "did not record" in made.note
    assert {address.rpartition("/")[2] for address in made.links.values()} == {
        path.name for path in (tmp_path / "views").iterdir()
    }


def test_native_sessions_have_their_mean_image_behind_the_maps(opened: Dataset, session: SessionRecord) -> None:
    native = session.model_copy(update={"space": "native"})
    mean_XYZ = mean_image(opened, native).image.get_fdata()
    for make in (mean_image, tsnr, kept_mean):
        shown = make(opened, native)
        np.testing.assert_array_equal(shown.under.get_fdata(), mean_XYZ)
        assert make(opened, session).under is None


def test_views_of_an_earlier_page_are_removed(tmp_path: Path) -> None:
    folder = session_views.start(tmp_path)
    folder.mkdir()
    (folder / "somebody_mean.html").write_text("a view")
    assert not session_views.start(tmp_path).exists()
