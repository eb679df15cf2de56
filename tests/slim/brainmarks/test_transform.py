"""Samples of Brainmarks are converted and encoded as the same scans given as NIfTI."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from unittest import mock

import nibabel as nib
import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from helpers.brainmarks import FEW, sample, scan, template, volume
from helpers.pretrained import ALIGNED, STRADDLING, write_run
from shards.cohorts.niimg import as_run
from shards.conversion.session import SessionSettings, convert_run
from shards.core.errors import DatasetError, UserError
from slim.brainmarks import constructor, transform
from slim.brainmarks.template import AFFINE, Template
from slim.brainmarks.token_model import TokenModel
from slim.brainmarks.transform import Converter, ScanTransform
from slim.inference import vectors
from slim.inference.preprocessing import Recipe
from slim.inference.slim_brain import SlimBrain
from slim.model import pooling
from slim.ranking.parcels import make_parcels
from slim.ranking.rankers import make_ranker

pytestmark = pytest.mark.fast

TR = 0.72


@pytest.fixture(scope="module")
def stub() -> Template:
    return template()


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("aligned") / "run", dataset, ALIGNED)


@pytest.fixture(scope="module", params=["aligned", "straddling"])
def any_run(request: pytest.FixtureRequest, run: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of an encoder whose time slots are its windows, and of one whose slots straddle them."""
    if request.param == "aligned":
        return run
    return write_run(tmp_path_factory.mktemp("straddling") / "run", dataset, STRADDLING)


def make(run: Path, stub: Template, **arguments: object) -> tuple[ScanTransform, TokenModel]:
    with mock.patch.object(Template, "fetch", return_value=stub):
        return constructor.make(source=str(run), **arguments)


def save(path: Path, value_XYZT: np.ndarray, mask_XYZ: np.ndarray, tr: float = TR) -> tuple[Path, Path]:
    """The scan and its mask as NIfTI."""
    image = nib.Nifti1Image(value_XYZT.astype(np.float32), AFFINE)
    image.header.set_zooms((2, 2, 2, tr))
    image.header.set_xyzt_units("mm", "sec")
    mask = path.with_name("mask.nii")
    nib.save(image, path)
    nib.save(nib.Nifti1Image(mask_XYZ.astype(np.uint8), AFFINE), mask)
    return path, mask


def unscored(item: dict) -> np.ndarray:
    return item["bold"] * item["std"] + item["mean"]


def test_a_sample_is_converted_as_its_nifti_to_the_byte_and_only_moved(stub: Template, tmp_path: Path) -> None:
    """At 2 mm and with the TR of the grid nothing is interpolated."""
    settings = SessionSettings.model_validate({"windows": {"minimum": 2}})
    recipe = Recipe(settings, make_parcels(settings.grid.grid(), settings.parcels), make_ranker("uniform", None, 0))
    item = sample(scan(0, 20, stub.mask_XYZ), TR)
    made = Converter(recipe, stub)(item)

    file, mask = save(tmp_path / "bold.nii", volume(unscored(item), stub.mask_XYZ), stub.mask_XYZ)
    with as_run(file, mask, space="MNI", dummy=0) as run:
        assert made.data == convert_run(run, settings, recipe.parcels, recipe.ranker).data

    arrays = made.read(made.meta)
    place = tuple((np.argwhere(stub.mask_XYZ) + np.array([3, -7, 9])).T)
    patch_of = {tuple(patch): number for number, patch in enumerate(arrays["patch"].tolist())}
    number = np.array([patch_of[tuple(patch)] for patch in (np.stack(place, axis=1) // 4).tolist()])
    within = np.ravel_multi_index(tuple(axis % 4 for axis in place), (4, 4, 4))
    assert arrays["brain"].sum() == FEW and arrays["brain"][number, within].all()
    value_TN = volume(unscored(item), stub.mask_XYZ)[stub.mask_XYZ].T.astype(np.float64)
    mean_N, sd = value_TN.mean(axis=0), value_TN.std()
    np.testing.assert_allclose(arrays["baseline"][number, within], (mean_N - mean_N.mean()) / sd, atol=2e-5)
    for window, start in zip(arrays["windows"], arrays["start"], strict=True):
        expected = (value_TN[start : start + 5] - mean_N) / sd
        np.testing.assert_allclose(window[:, number, within], expected, atol=1e-3)


@pytest.mark.parametrize(("frames", "tr"), [(45, TR), (16, 1.0)])
def test_tokens_are_those_of_the_scan_as_nifti(
    any_run: Path, stub: Template, frames: int, tr: float, tmp_path: Path
) -> None:
    """A long scan, and the 16 frames of the suite's task clips, which are fewer windows than those of a sample."""
    converted, model = make(any_run, stub, windows=32)
    item = sample(scan(1, frames, stub.mask_XYZ), tr)
    (tokens,) = model.tokens([converted.converter(item)])
    file, mask = save(tmp_path / "bold.nii", volume(unscored(item), stub.mask_XYZ), stub.mask_XYZ, tr)
    brain = SlimBrain.from_pretrained(any_run)
    expected = brain.encode_converted(brain.convert(file, mask=mask, space="MNI", tr=tr, dummy=0))
    np.testing.assert_array_equal(model.place_L[tokens.here_L.numpy()], expected.places)
    np.testing.assert_array_equal(tokens.x_SLC[:, tokens.here_L].numpy(), expected.tokens)


def test_all_scans_get_equally_many_tokens_with_the_mean_of_those_that_exist(
    any_run: Path, stub: Template, tmp_path: Path
) -> None:
    """A short scan, and one whose field of view ends above the lower third of the brain."""
    converted, model = make(any_run, stub, windows=4, memory=str(tmp_path))
    cut_TV = scan(2, 20, stub.mask_XYZ)
    cut_TV[:, np.argwhere(stub.mask_XYZ.T)[:, 0] < 36] = 0
    whole_TV, short_TV = scan(3, 20, stub.mask_XYZ), scan(4, 10, stub.mask_XYZ)
    items = [sample(value_TV, TR, target=1) for value_TV in (whole_TV, cut_TV, short_TV)]
    converted.fit(items)
    made = [converted.converter(item) for item in items]
    found = model.tokens(made)
    assert found[0].here_L.all() and 0 < found[1].here_L.sum() < len(model.place_L)
    cls, reg, patch = model(default_collate([converted(item) for item in items]))
    places, channels = len(model.place_L), model.encoder.dim
    slots = len(found[0].x_SLC)
    assert len(found[2].x_SLC) < slots and patch.shape == (3, slots * places, channels) and reg is None
    for tokens, patch_TC, cov_1E in zip(found, patch, cls, strict=True):
        exist_SLC = tokens.x_SLC[:, tokens.here_L]
        np.testing.assert_allclose(patch_TC.mean(0).detach(), exist_SLC.mean((0, 1)).detach(), atol=1e-5)
        expected = pooling.cov(exist_SLC, model.axes_CQ)  # of the places with brain
        pairs = np.triu_indices(3 * places, 1)
        here = np.repeat(tokens.here_L.numpy(), 3)
        both = here[pairs[0]] & here[pairs[1]]
        np.testing.assert_allclose(cov_1E[0, both].detach(), expected.detach(), atol=1e-5)
        assert not cov_1E[0, ~both].any()


def test_axes_are_fitted_on_training_scans_alone(run: Path, stub: Template, tmp_path: Path) -> None:
    converted, model = make(run, stub, components=2, fit_scans=2, memory=str(tmp_path))
    seen = []

    class Split(list):
        def __getitem__(self, row: int) -> dict:
            seen.append(row)
            return super().__getitem__(row)

    train = Split(sample(scan(seed, 20, stub.mask_XYZ), TR) for seed in (5, 6, 7))
    assert model(default_collate([converted(next(iter(train)))]))[0] is None
    converted.fit(train)
    assert seen == [0, 2]
    brain = SlimBrain.from_pretrained(run)
    features = [brain.encode_converted(converted.converter(list(train)[row])) for row in seen]
    axes_CQ = vectors.principal_axes(features, model.place_L, 2)
    np.testing.assert_allclose(model.axes_CQ, axes_CQ, atol=1e-6)
    other = sample(scan(8, 20, stub.mask_XYZ), TR)
    cls, *_ = model(default_collate([converted(other)]))
    expected = vectors.fitted(brain.encode_converted(converted.converter(other)), model.place_L, "cov", axes_CQ)
    np.testing.assert_allclose(cls[0, 0].detach(), expected, atol=1e-5)
    np.testing.assert_allclose(model.axes_CQ, axes_CQ, atol=1e-6)


def test_without_components_nothing_is_fitted(run: Path, stub: Template) -> None:
    converted, model = make(run, stub, components=0)
    converted.fit([{}])  # would be converted otherwise
    assert model.axes_CQ is None


def test_an_encoder_can_be_fine_tuned(run: Path, stub: Template) -> None:
    converted, model = make(run, stub)
    model.requires_grad_(True)
    batch = default_collate([converted(sample(scan(9, 20, stub.mask_XYZ), TR, target=0))])
    assert batch["target"].tolist() == [0]
    with torch.autocast("cpu", torch.bfloat16):  # as the suite on a GPU
        half = model(batch)[2]
    assert half.dtype == torch.float32 and not torch.equal(half, model(batch)[2])
    torch.testing.assert_close(half, model(batch)[2], atol=0.1, rtol=0.1)
    model(batch)[2].square().mean().backward()
    assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in model.encoder.parameters())


def test_a_transform_goes_to_other_processes_and_keeps_what_it_converted(
    run: Path, stub: Template, tmp_path: Path
) -> None:
    converted, _ = make(run, stub, memory=str(tmp_path / "memory"))
    item = sample(scan(10, 20, stub.mask_XYZ), TR)
    sent = pickle.loads(pickle.dumps(converted))
    expected = sent(item)
    with mock.patch.object(transform, "convert_run", side_effect=AssertionError("converted again")):
        assert converted(item) == expected
        other = replace(converted.converter, recipe=_keeping(converted.converter.recipe, 3))
        for changed in (item | {"tr": 1.0}, item | {"std": item["std"] * 2}):
            with pytest.raises(AssertionError, match="converted again"):
                converted(changed)
        with pytest.raises(AssertionError, match="converted again"):
            other(item)


def _keeping(recipe: Recipe, windows: int) -> Recipe:
    changed = recipe.settings.windows.model_copy(update={"keep": windows})
    return replace(recipe, settings=recipe.settings.model_copy(update={"windows": changed}))


def test_the_sign_of_an_sd_does_not_count(run: Path, stub: Template) -> None:
    converted, _ = make(run, stub)
    item = sample(scan(11, 20, stub.mask_XYZ), TR)
    tensors = {name: torch.from_numpy(item[name]) for name in ("bold", "mean", "std")}
    assert converted(item | tensors | {"std": -tensors["std"]}) == converted(item)


def test_a_sample_of_another_space_is_refused(run: Path, stub: Template) -> None:
    item = sample(np.random.default_rng(0).standard_normal((20, 400)), TR)
    expected = rf"sample: bold: got bold of shape \(20, 400\), expected \(frames, {FEW}\), the voxels of the template"
    with pytest.raises(DatasetError, match=expected):
        make(run, stub)[0](item)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({}, "model_kwargs: source: got nothing, expected a run, an export or OWNER/NAME on the hub. Give --overrides"),
        ({"sorce": "x"}, "model_kwargs: sorce: got an unknown key, expected one of source, .*Did you mean source?"),
        ({"source": "x", "windows": 0}, "model_kwargs: windows: got 0, expected greater than or equal to 1"),
        ({"source": "x", "weights": "best"}, "model_kwargs: weights: got 'best', expected 'encoder' or 'target'"),
        ({"source": "/nowhere"}, "/nowhere"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: dict, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(constructor.SOURCE, raising=False)
    with pytest.raises(UserError, match=told) as refused:
        constructor.make(**arguments)
    assert "\n" not in str(refused.value)


def test_components_are_limited(run: Path, stub: Template) -> None:
    with pytest.raises(
        UserError, match="model_kwargs: components: got 33, expected at most 32, the number of channels"
    ):
        make(run, stub, components=33)


def test_the_source_may_be_in_the_environment(run: Path, stub: Template, monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite's smoke test passes no arguments."""
    monkeypatch.setenv(constructor.SOURCE, str(run))
    with mock.patch.object(Template, "fetch", return_value=stub):
        assert constructor.make()[1].place_L.size
