"""Reconstruction: the numbers of the MAE term of the loss, the variance explained, and the scan's own space."""

from __future__ import annotations

import json
import math
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from nilearn.image import resample_to_img
from sklearn.metrics import r2_score

from helpers.commands import Command
from helpers.pretrained import tool
from shards.cohorts.cohort_file import find_runs
from shards.cohorts.niimg import as_run
from shards.core.errors import ConfigError, RunRefused
from shards.format.reader import Dataset
from shards.reporting import viewer
from slim.checkpoints import checkpoint
from slim.config import KINDS
from slim.data.collate import collate
from slim.data.samples import Sample, cell_sizes, read_windows
from slim.explain.reconstruct import (
    Reconstruction,
    Reconstructor,
    deal,
    explained_variance,
    hide,
    reconstruct,
    summarise,
)
from slim.explain.scan_space import _in_space, _in_time
from slim.inference import export
from slim.inference.slim_brain import SlimBrain


@pytest.fixture(scope="module")
def trained(command: Command, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretraining run of a few steps, with the MAE term."""
    run = tmp_path_factory.mktemp("trained") / "run"
    words = ("run.steps=3", "run.batch=2", "run.workers=0", "run.wandb=disabled", "precision=fp32", "run.device=cpu")
    done = command("tools/pretrain.py", "configs/pretrain/tiny.yaml", f"data={dataset}", f"run.out={run}", *words)
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture(scope="module")
def ours(trained: Path) -> Reconstructor:
    return Reconstructor.from_pretrained(trained)


@pytest.fixture(scope="module")
def scan(cohort: Path) -> Path:
    return find_runs(cohort / "cohort.yaml")[0].bold


@pytest.fixture(scope="module")
def found(ours: Reconstructor, scan: Path) -> Reconstruction:
    with as_run(scan) as run:
        return reconstruct(ours, run)


# what is predicted


def test_hidden_places_get_the_numbers_of_the_loss(ours: Reconstructor, dataset: Path) -> None:
    """Same masks: the MAE head in the forward pass of training, and the MAE term computed from what is returned."""
    opened = Dataset(dataset)
    sample = read_windows(opened, opened.sessions[0], range(8))
    size_SL = cell_sizes(ours.geometry, sample.place)
    sample.mask = hide(size_SL, deal(size_SL, 4, 0), 1)
    batch = collate([sample], ours.geometry, None).to("cpu")
    seen: list[torch.Tensor] = []
    handle = ours.model.predictor.rebuild.register_forward_hook(lambda _module, _given, out: seen.append(out))
    features = math.prod(ours.geometry.cells), ours.model.encoder.dim
    targets = torch.zeros(len(batch.targets.cell_K), features[1])
    losses = ours.model(batch, targets, torch.zeros(features), 0)
    handle.remove()
    row_M, z_MV = ours.hidden(batch)
    known_GE = batch.targets.value_GE >= 0
    theirs_MV = torch.cat(seen).view(*known_GE.shape, -1)[known_GE]
    assert np.array_equal(z_MV, theirs_MV.numpy()) and len(row_M) == len(np.unique(row_M)) == known_GE.sum()
    patch_M = batch.targets.patch_GE[known_GE].numpy()
    spread_MV, brain_MV = (table[patch_M].numpy() for table in (batch.voxels.spread_QV, batch.brain_QV))
    alive_MV = (brain_MV > 0) & (spread_MV > 1e-6)
    z_true = (batch.voxels.value_RV[row_M].float().numpy() / np.where(alive_MV, spread_MV, 1))[alive_MV]
    expected = np.mean((z_MV[alive_MV] - z_true) ** 2, dtype=np.float64) / z_true.var(dtype=np.float64)
    assert float(losses.logs["loss_mae"]) == pytest.approx(expected, rel=1e-5)


def test_every_place_is_hidden_once(ours: Reconstructor, dataset: Path) -> None:
    opened = Dataset(dataset)
    size_SL = cell_sizes(ours.geometry, read_windows(opened, opened.sessions[0], range(8)).place)
    brain = np.flatnonzero(size_SL.any(axis=0))
    for passes in (2, 3, len(brain)):
        pass_L = deal(size_SL, passes, 5)
        assert np.array_equal(pass_L >= 0, size_SL.any(axis=0)) and np.array_equal(pass_L, deal(size_SL, passes, 5))
        counts = np.bincount(pass_L[brain], minlength=passes)
        assert counts.sum() == len(brain) and counts.max() - counts.min() <= 1
        masks = [hide(size_SL, pass_L, number) for number in range(passes)]
        hidden = np.concatenate([mask.target_K for mask in masks])
        assert np.array_equal(np.sort(hidden), np.flatnonzero(size_SL))
        for mask in masks:
            assert np.array_equal(np.union1d(mask.context_K, mask.target_K), np.flatnonzero(size_SL))
            assert not np.intersect1d(mask.context_K, mask.target_K).size and mask.rebuilt_K.all()
            assert {KINDS[kind] for kind in mask.kind_K} == {"cross_location"}
    assert not np.array_equal(deal(size_SL, 2, 5), deal(size_SL, 2, 6))
    with pytest.raises(ConfigError, match=f"--passes: got {len(brain) + 1}, expected 2 to {len(brain)}"):
        deal(size_SL, len(brain) + 1, 0)


def test_a_hidden_place_does_not_reach_its_own_prediction(ours: Reconstructor, dataset: Path) -> None:
    opened = Dataset(dataset)
    sample = read_windows(opened, opened.sessions[0], range(8))
    size_SL = cell_sizes(ours.geometry, sample.place)
    sample.mask = hide(size_SL, deal(size_SL, 4, 0), 2)
    batch = collate([sample], ours.geometry, None).to("cpu")
    row_M, z_MV = ours.hidden(batch)
    batch.voxels.value_RV[row_M] = 9
    assert np.array_equal(ours.hidden(batch)[1], z_MV)
    seen_R = np.setdiff1d(np.arange(len(batch.voxels.value_RV)), row_M)
    batch.voxels.value_RV[seen_R] = 9
    assert not np.array_equal(ours.hidden(batch)[1], z_MV)


def test_units_are_those_of_the_scan(found: Reconstruction, ours: Reconstructor) -> None:
    """The prediction of z-scores, with the mean and the SD of each voxel; the last frames fill no window."""
    scan = found.scan
    mean_N, sd_N = scan.raw_TN.mean(axis=0, dtype=np.float64), scan.raw_TN.std(axis=0, dtype=np.float64)
    assert found.exists_T.sum() == len(scan.raw_TN) // 5 * 5
    z_TN = (found.predicted_TN[found.exists_T] - mean_N) / sd_N
    assert 1e-3 < z_TN.std() < 3
    np.testing.assert_allclose(
        found.predicted_TN[~found.exists_T], np.tile(mean_N, (sum(~found.exists_T), 1)), rtol=1e-5
    )
    explained_N = r2_score(scan.raw_TN[found.exists_T], found.predicted_TN[found.exists_T], multioutput="raw_values")
    np.testing.assert_allclose(found.explained_N, explained_N, atol=1e-4)


def test_explained_variance_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    value_TN = (rng.standard_normal((50, 20)) + 1000).astype(np.float32)
    guess_TN = (value_TN + rng.standard_normal((50, 20)) * np.linspace(0, 3, 20)).astype(np.float32)
    value_TN[:, 7] = 5
    expected_N = r2_score(value_TN.astype(np.float64), guess_TN.astype(np.float64), multioutput="raw_values")
    expected_N[7] = 0
    np.testing.assert_allclose(explained_variance(value_TN, guess_TN), expected_N, atol=1e-5)


def knows_all(sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    """In place of `Reconstructor.rebuilt`: the true z-scores of the hidden places."""
    frames, places = sample.value.shape[:2]
    spread_PV = np.where(sample.spread > 1e-6, sample.spread, 1)
    z_TPV = sample.value / spread_PV
    return np.arange(frames * places), z_TPV.reshape(frames * places, -1)


@pytest.mark.parametrize(("tr", "shape"), [(0.72, "as the grid"), (0.72, "turned"), (1.6, "as the grid")])
def test_a_model_that_knows_all_gives_the_scan_back(
    ours: Reconstructor, found: Reconstruction, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tr: float, shape: str
) -> None:
    """Units, places and times: on an aligned grid with other axes to a rounding error; at another TR if it is slow."""
    monkeypatch.setattr(Reconstructor, "rebuilt", lambda _self, sample: knows_all(sample))
    rng, grid, brain_XYZ = np.random.default_rng(3), ours.data.grid.grid(), found.scan.brain_XYZ
    second_T = np.arange(63 if tr == 0.72 else 40) * tr
    phase_XYZ1 = rng.uniform(0, 6, brain_XYZ.shape)[..., None]
    data = 1000 + 100 * rng.standard_normal(brain_XYZ.shape)[..., None] + 20 * np.sin(second_T / 6 + phase_XYZ1)
    bold, mask = (nib.Nifti1Image(a, grid.affine) for a in (data.astype(np.float32), brain_XYZ.astype(np.uint8)))
    if shape == "turned":
        turn = nib.orientations.axcodes2ornt(("P", "S", "L"))
        turn = nib.orientations.ornt_transform(nib.io_orientation(grid.affine), turn)
        bold, mask = bold.as_reoriented(turn), mask.as_reoriented(turn)
    bold.header.set_xyzt_units("mm", "sec")
    bold.header.set_zooms((*bold.header.get_zooms()[:3], tr))
    with as_run(bold, mask, space="MNI", dummy=1) as run:
        made = reconstruct(ours, run)
        volumes = made.space.volumes(made.predicted_TN, made.scan.moments[0])
        made.space.save(tmp_path / "p.nii.gz", volumes, "")
    assert summarise(made, ours).interpolation_in_space == "none: the grids are aligned"
    assert made.explained_N.min() > 0.999
    again, inside = nib.load(tmp_path / "p.nii.gz"), np.asarray(mask.dataobj) > 0
    assert np.array_equal(again.affine, bold.affine)
    there = made.space.exists_J
    assert not there[0] and there.sum() == (60 if tr == 0.72 else 38)  # the last at 1.6 s lies after the last frame
    values, truth = again.get_fdata()[inside], bold.get_fdata()[inside]
    np.testing.assert_allclose(values[:, there], truth[:, there], atol=0.01 if tr == 0.72 else 0.5)
    mean = np.repeat(truth[:, 1:].mean(axis=1, keepdims=True), sum(~there), axis=1)
    np.testing.assert_allclose(values[:, ~there], mean, atol=0.01 if tr == 0.72 else 2)
    assert not again.get_fdata()[~inside].any()


# back to the scan


def test_between_grids_values_are_interpolated_linearly_as_by_nilearn() -> None:
    rng = np.random.default_rng(1)
    affine = np.diag([3.0, 3, 3, 1])
    brain_XYZ = np.zeros((9, 10, 8), bool)
    brain_XYZ[1:-1, 1:-1, 1:-1] = True
    volume_XYZ = rng.standard_normal(brain_XYZ.shape) * brain_XYZ
    turn = np.deg2rad(20)
    target = np.eye(4)
    target[:3, :3] = 2.2 * np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, -1]])
    target[:3, 3] = (4, -3, 20)
    shape = (11, 12, 9)
    voxel_S, weight_SN = _in_space(np.linalg.inv(affine) @ target, shape, brain_XYZ)
    template = nib.Nifti1Image(np.zeros(shape), target)
    kwargs = {"interpolation": "linear", "force_resample": True, "copy_header": True}
    theirs, share = (
        resample_to_img(nib.Nifti1Image(data.astype(np.float64), affine), template, **kwargs).get_fdata().ravel()
        for data in (volume_XYZ, brain_XYZ.astype(float))
    )
    clear = np.abs(share - 0.5) > 1e-6
    assert np.array_equal(np.isin(np.arange(len(share)), voxel_S)[clear], (share >= 0.5)[clear]) and len(voxel_S) > 100
    np.testing.assert_allclose(weight_SN @ volume_XYZ[brain_XYZ], theirs[voxel_S] / share[voxel_S], atol=1e-9)


def test_on_an_aligned_grid_nothing_is_interpolated() -> None:
    brain_XYZ = np.zeros((5, 6, 7), bool)
    brain_XYZ[1:4, 1:5, 2:6] = True
    matrix = np.array([[-1.0, 0, 0, 4.0001], [0, 0, 1, 1], [0, 1, 0, -1], [0, 0, 0, 1]])  # flipped, axes swapped, moved
    voxel_S, weight_SN = _in_space(matrix, (5, 9, 6), brain_XYZ)
    assert np.array_equal(weight_SN.data, np.ones(np.count_nonzero(brain_XYZ)))
    place_S3 = np.stack(np.unravel_index(voxel_S, (5, 9, 6)), axis=1) @ matrix[:3, :3].T + matrix[:3, 3]
    value_XYZ = np.arange(brain_XYZ.size).reshape(brain_XYZ.shape)
    assert np.array_equal(weight_SN @ value_XYZ[brain_XYZ], value_XYZ[tuple(np.rint(place_S3).astype(int).T)])


def test_volumes_are_those_between_predicted_frames() -> None:
    exists_T = np.ones(20, bool)
    exists_T[[5, 6, 19]] = False
    weight_JT, exists_J = _in_time(23, 2, 0.8, 0.8, exists_T)  # two volumes were dropped
    assert np.flatnonzero(~exists_J).tolist() == [0, 1, 7, 8, 21, 22]
    assert np.array_equal(weight_JT.toarray()[2:22], np.eye(20))
    second_T, at_J = np.arange(20) * 0.72, np.arange(7) * 2.0
    weight_JT, exists_J = _in_time(7, 0, 2.0, 0.72, exists_T)  # 2 s lie between frames 2 and 3, 4 s between 5 and 6
    assert np.flatnonzero(~exists_J).tolist() == [2]
    wave_T = np.sin(2 * np.pi * second_T / 30)
    np.testing.assert_allclose((weight_JT @ wave_T), np.sin(2 * np.pi * at_J / 30), atol=1e-3)


ODD = {
    "flipped": np.diag([-1.0, 1, 1, 1]),
    "permuted": np.array([[0.0, 0, 1, 0], [1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]]),
    "oblique": None,
}


@pytest.mark.parametrize("kind", ODD)
def test_results_have_the_header_of_the_scan(
    trained: Path, scan: Path, found: Reconstruction, tmp_path: Path, kind: str
) -> None:
    """Turned axes: the same numbers at the same places. An oblique scan: its own affine and codes."""
    image, mask_path = nib.load(scan), next(scan.parent.glob("*_mask.nii.gz"))
    mask = nib.load(mask_path)
    if kind == "oblique":
        turn = np.deg2rad(10)
        turned = np.eye(4)
        turned[:2, :2] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
        images = [resampled(one, turned) for one in (image, mask)]
    else:
        images = [one.as_reoriented(nib.io_orientation(np.linalg.inv(ODD[kind]) @ one.affine)) for one in (image, mask)]
    for one, name in zip(images, ("bold", "mask"), strict=True):
        one.set_sform(one.affine, "mni")
        one.set_qform(one.affine, "scanner")
        if name == "bold":
            one.header.set_zooms((*one.header.get_zooms()[:3], 0.72))
            one.header.set_xyzt_units("mm", "sec")
        one.to_filename(tmp_path / f"{name}.nii")
    out = tmp_path / "out"
    words = ("--mask", tmp_path / "mask.nii", "--space", "MNI", "--out", out, "--json")
    done = tool("reconstruct.py", trained, tmp_path / "bold.nii", *words)
    assert done.returncode == 0, done.stderr
    given, predicted, explained = (
        nib.load(path) for path in (tmp_path / "bold.nii", out / "predicted.nii.gz", out / "explained_variance.nii.gz")
    )
    assert predicted.shape == given.shape and explained.shape == given.shape[:3]
    for made in (predicted, explained):
        assert np.array_equal(made.affine, given.affine) and made.get_data_dtype() == np.float32
        for one, other in (
            (made.get_sform(True), given.get_sform(True)),
            (made.get_qform(True), given.get_qform(True)),
        ):
            assert one[1] == other[1] and np.allclose(one[0], other[0])
        assert np.isfinite(made.get_fdata()).all()
    assert predicted.header.get_zooms() == given.header.get_zooms()
    assert predicted.header.get_xyzt_units() == given.header.get_xyzt_units()
    facts = json.loads((out / "reconstruction.json").read_text())
    assert json.loads(done.stdout.splitlines()[-1])["facts"] == facts and math.isfinite(facts["median"])
    assert facts["volumes_predicted"] == 60 and (out / "reconstruction.png").read_bytes()[:4] == b"\x89PNG"
    assert "Explained variance" in (out / "explained_variance.html").read_text()
    assert (out / "explained_variance_surface.html").exists() == viewer.can_draw_surfaces()
    inside = explained.get_fdata() != 0
    assert 0.5 < inside.sum() / (images[1].get_fdata() > 0).sum() < 1.5
    mean = given.get_fdata().mean(axis=3)[inside]
    np.testing.assert_allclose(predicted.get_fdata().mean(axis=3)[inside].mean(), mean.mean(), rtol=0.1)
    if kind != "oblique":
        expected = found.space.map(found.explained_N)
        turned = nib.Nifti1Image(expected, image.affine).as_reoriented(
            nib.io_orientation(np.linalg.inv(ODD[kind]) @ image.affine)
        )
        np.testing.assert_allclose(explained.get_fdata(), turned.get_fdata(), atol=1e-3)


def resampled(image: nib.Nifti1Image, turned: np.ndarray) -> nib.Nifti1Image:
    """An image on a grid that is turned around z."""
    template = nib.Nifti1Image(np.zeros(image.shape[:3]), turned @ image.affine)
    interpolation = "nearest" if image.ndim == 3 else "linear"
    return resample_to_img(image, template, interpolation=interpolation, force_resample=True, copy_header=True)


def test_the_same_call_gives_the_same_bytes(trained: Path, scan: Path, tmp_path: Path) -> None:
    for name, more in (("a", ()), ("b", ()), ("c", ("--seed", 1, "--passes", 3))):
        done = tool("reconstruct.py", trained, scan, "--out", tmp_path / name, *more)
        assert done.returncode == 0, done.stderr
    names = ("predicted.nii.gz", "explained_variance.nii.gz", "reconstruction.json")
    first, second, other = ([(tmp_path / run / name).read_bytes() for name in names] for run in "abc")
    assert first == second and all(one != two for one, two in zip(first, other, strict=True))


def test_a_tr_that_was_stated_is_in_the_result(trained: Path, scan: Path, tmp_path: Path) -> None:
    """The header says 2.5 s in ms, which is wrong."""
    image = nib.load(scan)
    image.header.set_xyzt_units("mm", "msec")
    image.header.set_zooms((*image.header.get_zooms()[:3], 2500))
    image.to_filename(tmp_path / "bold.nii")
    mask = next(scan.parent.glob("*_mask.nii.gz"))
    words = (tmp_path / "bold.nii", "--mask", mask, "--space", "MNI", "--tr", 0.72, "--out", tmp_path / "out")
    done = tool("reconstruct.py", trained, *words)
    assert done.returncode == 0, done.stderr
    made = nib.load(tmp_path / "out" / "predicted.nii.gz")
    assert made.header.get_xyzt_units() == ("mm", "sec") and made.header.get_zooms()[3] == pytest.approx(0.72)


@pytest.mark.parametrize(("frames", "expected"), [(13, 10), (5, 5)])
def test_a_scan_shorter_than_a_sample_is_predicted(ours: Reconstructor, scan: Path, frames: int, expected: int) -> None:
    """Of one window or two, where training reads eight together."""
    image, mask = nib.load(scan), nib.load(next(scan.parent.glob("*_mask.nii.gz")))
    with as_run(image.slicer[..., :frames], mask, space="MNI", tr=0.72, dummy=0) as run:
        made = reconstruct(ours, run)
    assert made.exists_T.sum() == made.space.exists_J.sum() == expected and len(made.exists_T) == frames
    assert np.abs(made.predicted_TN[:expected] - made.scan.raw_TN.mean(axis=0)).max() > 0
    with (
        pytest.raises(RunRefused, match="frames: got no window of 5 frames"),
        as_run(image.slicer[..., :4], mask, space="MNI", tr=0.72, dummy=0) as run,
    ):
        reconstruct(ours, run)


# weights without an MAE head


def test_weights_without_an_mae_head_are_refused(
    command: Command, trained: Path, dataset: Path, scan: Path, tmp_path: Path
) -> None:
    export.write(SlimBrain.from_pretrained(trained), tmp_path / "export")
    words = ("run.steps=1", "run.batch=1", "run.workers=0", "run.wandb=disabled", "objective=jepa", "run.device=cpu")
    run = tmp_path / "jepa"
    done = command("tools/pretrain.py", "configs/pretrain/tiny.yaml", f"data={dataset}", f"run.out={run}", *words)
    assert done.returncode == 0, done.stderr
    for source, told in (
        (tmp_path / "export", "predictor.safetensors: got an export without the predictor, expected a pretraining run"),
        (
            run,
            "objective: got jepa without the MAE term, so there is no MAE head, expected a run that was trained with",
        ),
        (tmp_path, "got a folder that is no run, checkpoint or export"),
    ):
        done = tool("reconstruct.py", source, scan, "--out", tmp_path / "out")
        assert done.returncode == 2 and told in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert not (tmp_path / "out").exists()


def test_an_export_with_the_predictor_is_as_its_run(
    trained: Path, ours: Reconstructor, scan: Path, tmp_path: Path
) -> None:
    for name, more in (("with", ("--predictor",)), ("again", ())):
        done = tool("export.py", trained, "--out", tmp_path / name, *more)
        assert done.returncode == 0, done.stderr
    files = [sorted(path.name for path in (tmp_path / name).glob("*.safetensors")) for name in ("with", "again")]
    assert files == [["model.safetensors", "predictor.safetensors"], ["model.safetensors"]]
    moved = Reconstructor.from_pretrained(tmp_path / "with")
    theirs = ours.model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in moved.model.state_dict().items())
    assert SlimBrain.from_pretrained(tmp_path / "with").checksum == SlimBrain.from_pretrained(trained).checksum
    written = tmp_path / "with" / "predictor.safetensors"
    written.write_bytes(written.read_bytes()[:-1] + b"x")
    done = tool("reconstruct.py", tmp_path / "with", scan, "--out", tmp_path / "out")
    assert done.returncode == 2 and "predictor.safetensors: SHA-256" in done.stderr
    done = tool("export.py", trained, "--out", tmp_path / "none", "--predictor", "--weights", "target")
    assert done.returncode == 2 and "--weights: got target with --predictor, expected encoder" in done.stderr


def test_a_checkpoint_is_as_its_run(trained: Path, ours: Reconstructor) -> None:
    saved = checkpoint.newest(trained / "checkpoints")
    again = Reconstructor.from_pretrained(saved)
    assert all(torch.equal(value, again.model.state_dict()[name]) for name, value in ours.model.state_dict().items())
    encoder = SlimBrain.from_pretrained(trained).encoder.state_dict()
    assert all(torch.equal(value, encoder[name]) for name, value in ours.model.encoder.state_dict().items())
