"""Wrong arguments of the Python API are ValueErrors and TypeErrors of one line, which names what is accepted."""

from __future__ import annotations

import pickle
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from helpers.pretrained import ALIGNED, write_run
from shards.cohorts.cohort_file import find_runs
from shards.core.errors import UserError
from shards.format.reader import Dataset
from slim.evaluation.transformer import SlimBrainTransformer
from slim.inference.slim_brain import SlimBrain
from slim.inference.vectors import Features


@pytest.fixture(scope="module")
def model(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> SlimBrain:
    return SlimBrain.from_pretrained(write_run(tmp_path_factory.mktemp("arguments") / "run", dataset, ALIGNED))


@pytest.fixture(scope="module")
def bold(cohort: Path) -> Path:
    return find_runs(cohort / "cohort.yaml")[0].bold


ARRAY = np.zeros((4, 4, 4, 9))


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"image": None}, TypeError, "image: got None, expected a path or a nibabel image, or a list of 3-D images"),
        ({"image": ARRAY}, TypeError, r"image: got ndarray of float64.*nib.Nifti1Image\(array, affine\)"),
        ({"image": ""}, ValueError, "image: got an empty text, expected a path"),
        ({"image": nib.MGHImage(ARRAY.astype("f4"), np.eye(4))}, TypeError, "image: got MGHImage.*nib.Nifti1Image"),
        ({"image": b"a.nii"}, TypeError, "image: got bytes, expected a path"),
        ({"image": {"image": "a.nii"}}, TypeError, "image: got dict"),
        ({"mask": ARRAY[..., 0]}, TypeError, r"mask: got ndarray of float64 and shape .*nib.Nifti1Image"),
        ({"mask": ["a.nii"]}, TypeError, "mask: got list, expected a path or a nibabel image"),
        ({"confounds": np.zeros((60, 2))}, TypeError, "confounds: got ndarray .*expected the path of a table"),
        ({"tr": "2"}, TypeError, r"tr: got '2' \(str\), expected a number of seconds, such as 2.0"),
        ({"tr": True}, TypeError, "tr: got True"),
        ({"tr": -1}, ValueError, "tr: got -1.*Give it in seconds"),
        ({"tr": 2000}, ValueError, "tr: got 2000.*expected less than or equal to 20. Give it in seconds"),
        ({"tr": np.nan}, ValueError, "tr: got nan"),
        ({"dummy": 1.5}, TypeError, r"dummy: got 1.5 \(float\), expected 'auto' or a whole number from 0 to 100"),
        ({"dummy": "3"}, TypeError, "dummy: got '3'"),
        ({"dummy": -3}, ValueError, "dummy: got -3, expected auto or a number from 0 to 100"),
        ({"space": "mni"}, ValueError, "space: got 'mni', expected 'MNI' or 'native'. Did you mean MNI"),
        ({"space": "MNI152NLin6Asym"}, ValueError, "Did you mean MNI"),
        ({"space": 1}, TypeError, r"space: got 1 \(int\), expected 'MNI' or 'native'"),
        ({"orientation": "XYZ"}, ValueError, "orientation: got 'XYZ', expected one letter each"),
        ({"orientation": ("L", "A", "S")}, TypeError, "orientation: got tuple, expected axis codes such as 'LAS'"),
        ({"stage": "last"}, TypeError, "stage: got 'last', expected 1 to 2"),
        ({"stage": 3}, ValueError, "stage: got 3, expected 1 to 2"),
        ({"pooling": ["mean"]}, ValueError, r"pooling: got \['mean'\], expected mean"),
        ({"per": "volume"}, ValueError, "per: got volume, expected window or scan"),
    ],
)
def test_encode(model: SlimBrain, bold: Path, arguments, error, match: str):
    with pytest.raises(error, match=match) as told:
        model.encode(**{"image": bold, **arguments})
    assert isinstance(told.value, UserError) and "\n" not in str(told.value)


@pytest.mark.parametrize("method", ["encode", "encode_windows", "encode_scan", "encode_tokens", "convert", "predict"])
def test_an_unknown_argument_is_a_type_error(model: SlimBrain, bold: Path, method: str):
    with pytest.raises(TypeError, match="unexpected keyword argument 'TR'"):
        getattr(model, method)(bold, TR=2)


def test_each_method_returns_one_kind_of_result(model: SlimBrain, bold: Path):
    z_WP, z_P, features = model.encode_windows(bold), model.encode_scan(bold, "location"), model.encode_tokens(bold)
    np.testing.assert_array_equal(z_WP, model.encode(bold))
    assert z_WP.shape == (len(features.window_onsets), features.tokens.shape[2])
    for word in ("scan", "run"):
        np.testing.assert_array_equal(z_P, model.encode(bold, per=word, pooling="location"))
    np.testing.assert_allclose(z_P, features.tokens.mean(axis=0).ravel(), rtol=1e-5, atol=1e-6)  # numpy adds otherwise


def test_older_names_warn_and_give_the_same(model: SlimBrain, bold: Path):
    with pytest.warns(DeprecationWarning, match="SlimBrain.encode_run is deprecated; use encode_tokens") as told:
        features = model.encode_run(bold, tr=0.72)
    assert told[0].filename == __file__
    for old, new in (
        ("token_SLC", "tokens"),
        ("place_L", "places"),
        ("second_S", "slot_times"),
        ("window_S", "slot_window_onsets"),
        ("start_W", "window_onsets"),
    ):
        with pytest.warns(DeprecationWarning, match=f"Features.{old} is deprecated; use {new}") as told:
            np.testing.assert_array_equal(getattr(features, old), getattr(features, new))
        assert told[0].filename == __file__
        with pytest.raises(AttributeError, match=f"{old} is read-only"):
            setattr(features, old, None)


def test_features_that_version_01_cached_are_read():
    old = Features.__new__(Features)
    arrays = [np.arange(6.0).reshape(1, 2, 3), np.arange(2), np.arange(1.0), np.arange(1.0)]
    names = ("token_SLC", "place_L", "second_S", "window_S")
    old.__setstate__({"key": "sub-01", **dict(zip(names, arrays, strict=True)), "tr": 0.8})
    assert old.tokens is arrays[0] and old.places is arrays[1] and old.tr == 0.8
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(old)).slot_times, arrays[2])


def test_numbers_of_numpy_are_numbers(model: SlimBrain, bold: Path):
    expected = model.encode(bold, tr=0.72, dummy=2)
    np.testing.assert_array_equal(model.encode(bold, tr=np.float64(0.72), dummy=np.int64(2)), expected)


def test_hints_speak_of_arguments(model: SlimBrain):
    """No cohort file is at hand where a scan is encoded."""
    rng = np.random.default_rng(0)
    unknown = nib.Nifti1Image(rng.random((8, 8, 8, 60), np.float32), None)
    with pytest.raises(UserError, match=r"space.* as an argument") as told:
        model.encode(unknown, tr=2)
    assert "cohort" not in str(told.value)
    image = nib.Nifti1Image(rng.random((8, 8, 8, 60), np.float32), np.eye(4))
    with pytest.raises(UserError, match="Give `tr` as an argument"):
        model.encode(image)


def test_what_was_assumed_is_told(model: SlimBrain, bold: Path):
    """A header of scanner space, over a brain that lies where MNI has it."""
    image = nib.load(bold)
    given = {"mask": nib.load(find_beside(bold))}
    made = nib.Nifti1Image(np.asanyarray(image.dataobj), image.affine, image.header)
    made.set_sform(image.affine, 1)
    made.set_qform(image.affine, 1)
    with pytest.warns(UserWarning, match=r"an image in memory: space taken as MNI: header code 1 \(scanner\)") as told:
        found = model.encode_tokens(made, **given)
    assert told[0].filename == __file__ and "\n" not in str(told[0].message)
    assert any(line.startswith("space taken as MNI") for line in found.assumed)


def find_beside(bold: Path) -> Path:
    return bold.with_name(bold.name.replace("desc-preproc_bold", "desc-brain_mask"))


def test_other_methods(model: SlimBrain, dataset: Path, bold: Path):
    opened = Dataset(dataset)
    for call, error, match in (
        (lambda: SlimBrain.from_pretrained(None), TypeError, "source: got a NoneType, expected a path, or OWNER/NAME"),
        (lambda: SlimBrain.from_pretrained(model), TypeError, "source: got a SlimBrain"),
        (lambda: SlimBrain.from_pretrained("x", parcels=3), TypeError, "parcels: got a int"),
        (lambda: model.encode_session(str(dataset), opened.sessions[0]), TypeError, "dataset: got a str"),
        (
            lambda: model.encode_session(opened, "sub-01"),
            TypeError,
            "session: got 'sub-01', expected one of dataset.sessions",
        ),
        (lambda: model.encode_session(opened, opened.sessions[0], batch=0), ValueError, "batch: got 0"),
    ):
        with pytest.raises(error, match=match):
            call()


@pytest.mark.parametrize(
    ("X", "error", "match"),
    [
        ("one_path.nii.gz", TypeError, r"X: got one path \(one_path.nii.gz\), expected a list of images.*\[image\]"),
        (Path("one_path.nii.gz"), TypeError, "X: got one path"),
        (nib.Nifti1Image(ARRAY, np.eye(4)), TypeError, "X: got one Nifti1Image"),
        ({"image": "a.nii"}, TypeError, "X: got one dict"),
        ([], ValueError, "X: got an empty list, expected a list of images"),
        (None, TypeError, "X: got None, expected a list of images"),
        (7, TypeError, "X: got a int"),
        (np.zeros((3, 4)), TypeError, r"X: got an array of float64 and shape \(3, 4\), expected a list of images"),
        (pd.DataFrame({"path": ["a.nii"]}), TypeError, "X: got a DataFrame.*column of paths"),
        ([ARRAY], TypeError, r"X\[0\] \(ndarray\): arguments: image: got ndarray"),
        ([{"mask": "a.nii"}], ValueError, r"X\[0\].*image: got a mapping of mask, expected one with an image"),
        ([{"image": "a.nii", "TR": 2}], TypeError, r"X\[0\] \(a.nii\): arguments: TR: got an unknown argument"),
    ],
)
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_images_of_the_transformer(model: SlimBrain, X, error, match: str, on_error: str):
    with pytest.raises(error, match=match) as told:
        SlimBrainTransformer(model, pooling="mean", on_error=on_error).fit(X)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("changes", "arguments", "error", "match"),
    [
        ({"pooling": ["mean"]}, {}, ValueError, r"pooling: got \['mean'\], expected one of mean"),
        ({"target": {}}, {}, ValueError, "target: got {}"),
        ({"on_error": "ignore"}, {}, ValueError, "on_error: got ignore, expected one of raise, skip"),
        ({"components": "3"}, {}, TypeError, "components: got '3', expected a whole number of 1 or more"),
        ({"components": 0}, {}, ValueError, "components: got 0"),
        ({"random_state": "seed"}, {}, ValueError, "random_state: got 'seed', expected None, a whole number"),
        ({"random_state": -1}, {}, ValueError, "random_state: got -1"),
        ({"model": None}, {}, TypeError, "source: got a NoneType"),
        ({}, {"y": [0, 1, 0]}, ValueError, "y: got 3 values, expected 2, one for each image"),
        ({}, {"y": "ab"}, ValueError, "y: got a str, expected 2"),
        ({}, {"groups": [1]}, ValueError, "groups: got 1 values, expected 2"),
    ],
)
def test_parameters_of_the_transformer_are_checked_before_anything_is_encoded(
    model: SlimBrain, changes, arguments, error, match: str
):
    made = SlimBrainTransformer(**{"model": model, **changes})
    with pytest.raises(error, match=match) as told:
        made.fit(["no_such_file.nii", "no_such_file.nii"], **arguments)
    assert isinstance(told.value, UserError)
