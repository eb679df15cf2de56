"""Scans with fewer windows than k: converted, trained on and encoded from the windows they have."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from helpers.commands import GRID, Command
from helpers.conversions import copy_cohort
from helpers.in_process import call_command
from helpers.pretrained import ALIGNED, STRADDLING, write_run
from helpers.training import losses, pretrain
from shards.cohorts.cohort_file import find_runs
from shards.core.errors import RunRefused
from shards.format.reader import Dataset
from slim.data.collate import collate
from slim.data.samples import read_windows
from slim.inference.slim_brain import SlimBrain

WINDOWS = {"01": 4, "02": 1, "03": 7}  # windows of 5 frames of the subjects with short scans; a sample has 8


@pytest.fixture(scope="module")
def short_cohort(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small cohort, in which the scans of three subjects are cut."""
    made = copy_cohort(cohort, tmp_path_factory.mktemp("short") / "cohort")
    for run in find_runs(made):
        if run.subject in WINDOWS:
            frames = 5 * WINDOWS[run.subject] + 2  # the last two fill no window
            image, table = nib.load(run.bold), Path(str(run.confounds))
            cut = nib.Nifti1Image(np.asarray(image.dataobj)[..., :frames], image.affine, image.header)
            run.bold.unlink()
            nib.save(cut, run.bold)
            lines = table.read_text().splitlines(keepends=True)
            table.write_text("".join(lines[: frames + 1]))
    return made


@pytest.fixture(scope="module")
def short(short_cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its dataset."""
    out = tmp_path_factory.mktemp("shards") / "short"
    words = ("--ranker", "ridge", "--workers", 1, "windows.minimum=1", "split.shares=[1,0,0]", *GRID)
    done = call_command("tools/make_shards.py", short_cohort, "--out", out, *words)
    assert done.returncode == 0, done.stderr
    return out


def test_conversion_keeps_all_windows_of_a_short_scan(short: Path) -> None:
    kept = {session.subject: session.n_kept for session in Dataset(short).sessions}
    assert len(kept) == 6 and {subject: kept[subject] for subject in WINDOWS} == WINDOWS
    assert {count for subject, count in kept.items() if subject not in WINDOWS} == {12}


@pytest.mark.parametrize("sizes", [ALIGNED, STRADDLING], ids=["slots are windows", "slots straddle windows"])
@pytest.mark.filterwarnings("ignore:.*, fewer than")
def test_a_short_scan_is_encoded_from_its_windows_alone(
    sizes: dict, dataset: Path, short: Path, short_cohort: Path, tmp_path: Path
) -> None:
    """From NIfTI as from the shards; as the encoder sees it without company, and with time to spare."""
    model, data = SlimBrain.from_pretrained(write_run(tmp_path / "run", dataset, sizes)), Dataset(short)
    source = {run.subject: run for run in find_runs(short_cohort)}
    for session in data.sessions:
        if session.subject not in WINDOWS:
            continue
        count, run = WINDOWS[session.subject], source[session.subject]
        found = model.encode_session(data, session)
        slots = model.geometry.slots(5 * count)
        assert found.tokens.shape == (slots, len(found.places), model.encoder.dim)
        window_S = model.geometry.window_of_slot(5, count)
        np.testing.assert_array_equal(found.slot_window_onsets, 5 * window_S * session.tr)
        assert np.isfinite(found.tokens).all() and (np.diff(found.slot_times) > 0).all()
        assert found.slot_times[-1] < 5 * count * session.tr
        in_time = np.argsort(data.read(session, ("start",))["start"])
        batch = collate([read_windows(data, session, in_time)], model.geometry, None)
        with torch.no_grad():
            x_MC = model.encoder(batch.voxels, batch.whole)
        expected = x_MC[batch.whole.cell_M.argsort()].unflatten(0, (slots, -1))
        np.testing.assert_allclose(found.tokens, expected.numpy(), rtol=1e-5, atol=1e-6)
        straight = model.encode_tokens(run.bold, mask=run.mask, confounds=run.confounds, space="MNI")
        np.testing.assert_array_equal(straight.tokens, found.tokens)
        windows = "1 window" if count == 1 else f"{count} windows"
        assert f"{windows}, fewer than the 8 of a sample in pretraining" in straight.assumed


def test_fewer_windows_than_a_sample_are_said_and_none_is_refused(
    dataset: Path, short_cohort: Path, tmp_path: Path
) -> None:
    model = SlimBrain.from_pretrained(write_run(tmp_path / "run", dataset, ALIGNED))
    run = next(run for run in find_runs(short_cohort) if run.subject == "02")
    with pytest.warns(UserWarning, match="1 window, fewer than the 8 of a sample in pretraining"):
        vectors = model.encode(run.bold, mask=run.mask, confounds=run.confounds, space="MNI")
    assert vectors.shape == (1, model.encoder.dim)
    image = nib.load(run.bold).slicer[..., :4]
    with pytest.raises(RunRefused, match=r"frames: got 0 windows of 5 frames at TR 0\.72 s, expected at least 1"):
        model.encode(image, mask=run.mask, space="MNI")


def test_short_sessions_are_trained_on_if_asked_for(command: Command, short: Path, tmp_path: Path) -> None:
    """With all their windows; without `windows.minimum` they are left out and counted."""
    words = ("run.seed=5", "run.log_every=1")
    done = pretrain(command, short, tmp_path / "few", "windows.minimum=1", *words, processes=1, steps=6)
    assert done.returncode == 0, done.stderr
    assert "left out" not in done.stdout and np.isfinite(losses(tmp_path / "few")).all()
    again = pretrain(command, short, tmp_path / "again", "windows.minimum=1", *words, processes=1, steps=6)
    assert again.returncode == 0 and losses(tmp_path / "again") == losses(tmp_path / "few")
    done = pretrain(command, short, tmp_path / "four", "windows.minimum=4", *words, processes=1, steps=1)
    assert "1 of 6 training sessions" in done.stdout and "fewer than 4 windows" in done.stdout
    done = pretrain(command, short, tmp_path / "k", *words, processes=1, steps=1)
    assert "3 of 6 training sessions" in done.stdout and "fewer than 8 windows" in done.stdout


def test_targets_at_other_times_alone_need_two_slots(command: Command, short: Path, tmp_path: Path) -> None:
    words = ("windows.minimum=1", "mask.kinds=[cross_time]")
    done = pretrain(command, short, tmp_path / "run", *words, processes=1, steps=1)
    assert done.returncode == 2 and "mask: kinds: got cross_time for samples of one slot" in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
