"""Surrogates of a scan: its spectra and correlations, none of its time course.

    pytest tests/shards/synthetic/test_surrogates.py

Shape suffixes: T frames, V voxels, XYZ the grid of the scan.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from scipy.signal import periodogram

from helpers.commands import Command
from shards.core.errors import ConfigError
from shards.synthetic.anatomy import NETWORK_PERCENT, anatomy
from shards.synthetic.signals import baseline, run_frames
from shards.synthetic.surrogates import Surrogates, surrogates
from shards.synthetic.truth import SyntheticCohort
from shards.synthetic.write import write_cohort


def series(frames: int, voxels: int = 30, seed: int = 0) -> np.ndarray:
    """Correlated slow series without mean, (T, V)."""
    rng = np.random.default_rng(seed)
    x_TV = rng.standard_normal((frames, 4)) @ rng.standard_normal((4, voxels)) + rng.standard_normal((frames, voxels))
    x_TV = np.apply_along_axis(np.convolve, 0, x_TV, np.ones(3), "same")
    return x_TV - x_TV.mean(axis=0)


@pytest.mark.parametrize("frames", [60, 61])
def test_spectra_and_correlations_stay_and_the_course_does_not(frames):
    x_TV = series(frames)
    real = Surrogates(x_TV, 2.0)
    y_TV = np.stack(list(real.course(np.random.default_rng(1), frames, 2.0)))
    x_TV = x_TV / np.sqrt(np.mean(x_TV**2))
    if frames % 2 == 0:  # of the highest frequency only the real part is seen, at any phase
        x_TV, y_TV = (_without_highest(series_TV) for series_TV in (x_TV, y_TV))
    np.testing.assert_allclose(periodogram(y_TV, axis=0)[1], periodogram(x_TV, axis=0)[1], atol=1e-4)
    np.testing.assert_allclose(np.corrcoef(y_TV.T), np.corrcoef(x_TV.T), atol=1e-4)
    lagged = [(series_TV[:-1].T @ series_TV[1:] + np.outer(series_TV[-1], series_TV[0])) for series_TV in (x_TV, y_TV)]
    np.testing.assert_allclose(*lagged, atol=1e-2)  # correlations between voxels at a lag, around the circle
    alike_V = [abs(np.corrcoef(a, b)[0, 1]) for a, b in zip(x_TV.T, y_TV.T, strict=True)]
    assert np.mean(alike_V) < 0.5 and np.abs(x_TV - y_TV).max() > 0.5


def _without_highest(x_TV: np.ndarray) -> np.ndarray:
    spectrum = np.fft.rfft(x_TV, axis=0)
    spectrum[-1] = 0
    return np.fft.irfft(spectrum, len(x_TV), axis=0)


def test_another_tr_is_the_same_band_and_goes_on_after_the_end():
    real = Surrogates(series(80), 2.0)
    slow = np.stack(list(real.course(np.random.default_rng(1), 160, 2.0)))
    fast = np.stack(list(real.course(np.random.default_rng(1), 320, 1.0)))
    np.testing.assert_allclose(fast[::2], slow, atol=1e-4)
    np.testing.assert_allclose(slow[80:], slow[:80], atol=1e-3)
    assert np.sqrt(np.mean(fast**2)) == pytest.approx(1, rel=0.03)
    other = np.stack(list(real.course(np.random.default_rng(2), 160, 2.0)))
    assert abs(np.corrcoef(slow.ravel(), other.ravel())[0, 1]) < 0.5


@pytest.fixture(scope="module")
def scan(tmp_path_factory) -> Path:
    """A head in scanner space, far from MNI, with noise of its own in the front and the back of its brain."""
    rng = np.random.default_rng(0)
    x, y, z = (np.arange(n) - n / 2 for n in (24, 26, 20))
    radius_XYZ = np.sqrt((x[:, None, None] / 9) ** 2 + (y[:, None] / 11) ** 2 + (z / 8) ** 2)
    mean_XYZ = np.where(radius_XYZ < 1, 1000.0, 5.0)
    halves = rng.standard_normal((40, 2)).cumsum(axis=0) * 4
    data = np.empty((*mean_XYZ.shape, 40), np.float32)
    for t in range(40):
        wave_XYZ = np.where(y[:, None] > 0, halves[t, 0], halves[t, 1])
        noise_XYZ = gaussian_filter(rng.standard_normal(mean_XYZ.shape), 1) * 20
        data[..., t] = mean_XYZ + (radius_XYZ < 1) * (wave_XYZ + noise_XYZ)
    affine = np.diag([8.0, 8.0, 8.0, 1.0])
    affine[:3, 3] = (200, -50, 300)
    image = nib.Nifti1Image(data, affine)
    image.header.set_zooms((8, 8, 8, 1.5))
    image.set_sform(affine, 1)
    path = tmp_path_factory.mktemp("scan") / "bold.nii.gz"
    nib.save(image, path)
    return path


COHORT = SyntheticCohort(subjects=1, sessions=2, frames=60, voxel_mm=8, snr=0.5)


def test_noise_of_a_cohort_has_the_correlations_of_the_scan(scan):
    """Beside the same signals without noise: front and back, each with itself, and the size that was asked for."""
    cohort, quiet = replace(COHORT, noise=scan), replace(COHORT, snr=1e9)
    baseline_V = baseline(cohort, 1, 1)
    noisy_TV, signal_TV = (np.stack(list(run_frames(one, 1, 1))) for one in (cohort, quiet))
    noise_TV = 100 * (noisy_TV - signal_TV) / baseline_V
    assert np.sqrt(np.mean(noise_TV**2)) == pytest.approx(NETWORK_PERCENT / cohort.snr, rel=0.15)
    mm_V3 = anatomy(8.0).mm_V3
    middle = mm_V3[:, 1].mean()
    front_V, back_V = mm_V3[:, 1] > middle + 12, mm_V3[:, 1] < middle - 12
    front_T, back_T = noise_TV[:, front_V].mean(axis=1), noise_TV[:, back_V].mean(axis=1)
    inside = np.corrcoef(np.c_[front_T, noise_TV[:, front_V]].T)[0, 1:]
    across = np.corrcoef(np.c_[back_T, noise_TV[:, front_V]].T)[0, 1:]
    assert inside.mean() > across.mean() + 0.2
    again_TV = np.stack(list(run_frames(cohort, 1, 2)))
    assert abs(np.corrcoef(again_TV[:, 0], noisy_TV[:, 0])[0, 1]) < 0.7  # fresh phases


def test_cohort_names_the_scan_and_its_bytes_follow_from_it(scan, tmp_path):
    cohort = replace(COHORT, sessions=1, frames=20, noise=scan)
    write_cohort(tmp_path / "one", cohort)
    write_cohort(tmp_path / "two", cohort)
    bold = [next((tmp_path / name).rglob("*_bold.nii.gz")).read_bytes() for name in ("one", "two")]
    assert bold[0] == bold[1]
    stated = json.loads((tmp_path / "one" / "truth.json").read_text())["parameters"]["noise"]
    assert stated["name"] == "bold.nii.gz" and len(stated["sha256"]) == 64
    assert "surrogates of the scan" in (tmp_path / "one" / "README").read_text()
    with pytest.raises(ConfigError, match="noise"):
        write_cohort(tmp_path / "one", replace(cohort, noise=None))


def test_a_scan_that_cannot_be_noise_is_refused_before_anything_is_written(command: Command, scan, tmp_path):
    image = nib.load(scan)
    flat = tmp_path / "flat.nii.gz"
    nib.save(image.slicer[..., 0], flat)
    half = tmp_path / "half.nii.gz"
    half.write_bytes(scan.read_bytes()[:20_000])
    for path, told in ((flat, "at least 20 frames"), (half, "half.nii.gz"), (tmp_path / "none.nii", "--noise")):
        done = command("tools/make_cohort.py", "--out", tmp_path / "out", "--subjects", 1, "--noise", path)
        assert done.returncode == 2 and told in done.stderr, done.stderr
        assert len(done.stderr.strip().splitlines()) == 1 and not (tmp_path / "out").exists()


@pytest.mark.real
def test_a_real_scan_becomes_noise():
    folder = Path(os.environ["SLIM_REAL_DATA"])
    real = surrogates(folder / "rapidtide" / "sub-RAPIDTIDETEST.nii.gz", 8.0, 2)
    assert real.frames == 260 and real.tr == 1.5 and np.isfinite(real.spectrum_KV).all()
    y_TV = np.stack(list(real.course(np.random.default_rng(0), 240, 0.72)))
    assert np.sqrt(np.mean(y_TV**2)) == pytest.approx(1, rel=0.2)
    sd_V = y_TV.std(axis=0)
    assert np.percentile(sd_V, 99) < 10 * np.median(sd_V)
