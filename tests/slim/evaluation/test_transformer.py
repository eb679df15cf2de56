"""The scikit-learn transformer: its conventions, what it learns and from whom, and that no image is encoded twice."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import joblib
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import estimator_checks

from helpers.pretrained import ALIGNED, write_run
from shards.cohorts.cohort_file import find_runs
from shards.core.errors import ConfigError, DatasetError, RunRefused
from slim.evaluation.attentive import Attentive
from slim.evaluation.splits import Fold
from slim.evaluation.transformer import POOLINGS, SlimBrainTransformer
from slim.inference import vectors
from slim.inference.slim_brain import SlimBrain
from slim.inference.vectors import Features

LABELS = np.array(["a", "b"] * 3)


@pytest.fixture(scope="module")
def model(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> SlimBrain:
    return SlimBrain.from_pretrained(write_run(tmp_path_factory.mktemp("transformer") / "run", dataset, ALIGNED))


@pytest.fixture(scope="module")
def images(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of a copy: a test below touches and rewrites files, which other tests compare by their times."""
    copy = shutil.copytree(cohort, tmp_path_factory.mktemp("images") / "bids")
    return [str(source.bold) for source in find_runs(copy / "cohort.yaml")]


@pytest.fixture(scope="module")
def features(model: SlimBrain, images: list[str]) -> list[Features]:
    return [model.encode_tokens(image) for image in images]


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> joblib.Memory:
    return joblib.Memory(tmp_path_factory.mktemp("cache"), verbose=0)


CHECKS = [
    estimator_checks.check_no_attributes_set_in_init,
    estimator_checks.check_parameters_default_constructible,
    estimator_checks.check_get_params_invariance,
    estimator_checks.check_set_params,
    estimator_checks.check_do_not_raise_errors_in_init_or_set_params,
    estimator_checks.check_estimator_cloneable,
    estimator_checks.check_estimator_repr,
    estimator_checks.check_estimator_tags_renamed,
    estimator_checks.check_valid_tag_types,
    estimator_checks.check_mixin_order,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_keeps_the_conventions_of_scikit_learn(check):
    """Those of its own checks that need no table of numbers; the others are below, with images."""
    estimator = SlimBrainTransformer("export/", pooling="mean")
    check(type(estimator).__name__, estimator)


class _SetsInInit(SlimBrainTransformer):
    def __init__(self, model, pooling="mean"):
        super().__init__(model, pooling)
        self.model_ = model


class _CopiesInInit(SlimBrainTransformer):
    def __init__(self, model, pooling="mean", extra=("a",)):
        super().__init__(model, pooling)
        self.extra = list(extra)


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("check_no_attributes_set_in_init", _SetsInInit("export/")),
        ("check_estimator_cloneable", _CopiesInInit("export/")),
        ("check_get_params_invariance", type("_NoParams", (SlimBrainTransformer,), {"get_params": dict})("export/")),
    ],
)
def test_the_checks_of_scikit_learn_can_fail(name: str, broken):
    (check,) = [check for check in CHECKS if check.__name__ == name]
    with pytest.raises((AssertionError, TypeError)):
        check("Broken", broken)


def test_unfitted_it_says_so(images):
    for made in (SlimBrainTransformer("export/"), clone(SlimBrainTransformer("export/"))):
        for call in (lambda made=made: made.transform(images), made.get_feature_names_out):
            with pytest.raises(NotFittedError):
                call()


def test_fitting_again_changes_neither_parameters_nor_vectors(model, images, memory):
    """What `check_dont_overwrite_parameters`, `check_fit_idempotent`, `check_dict_unchanged` and
    `check_estimators_pickle` ask, with images."""
    made = SlimBrainTransformer(model, pooling="cov", components=2, memory=memory)
    public = {name for name in vars(made) if not name.startswith("_")}
    before = made.get_params()
    assert made.fit(images[:4]) is made and made.get_params() == before
    assert {name for name in vars(made) if not name.startswith("_") and not name.endswith("_")} == public
    fitted = {name: value.copy() for name, value in vars(made).items() if isinstance(value, np.ndarray)}
    found = made.transform(images)
    np.testing.assert_array_equal(made.transform(images[::-1]), found[::-1])
    for name, value in fitted.items():
        np.testing.assert_array_equal(vars(made)[name], value)
    np.testing.assert_array_equal(made.fit(images[:4]).transform(images), found)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(made)).transform(images), found)


def test_a_clone_shares_the_encoder(model: SlimBrain):
    given = SlimBrainTransformer(model, components=2, stage=1)
    copy = clone(given)
    assert copy.model is model and copy.get_params() == given.get_params()


@pytest.mark.parametrize("name", POOLINGS)
def test_vectors_are_those_of_the_pooling_at_the_training_places(name, model, images, features, memory):
    made = SlimBrainTransformer(model, pooling=name, components=2, memory=memory)
    found = made.fit(images[:4], LABELS[:4]).transform(images)
    np.testing.assert_array_equal(made.fit_transform(images[:4], LABELS[:4]), found[:4])
    assert found.dtype == np.float32 and len(made.get_feature_names_out()) == found.shape[1]
    place_L = vectors.common_places(features[:4])
    np.testing.assert_array_equal(made.places_, place_L)
    whole = [item for item in features if np.isin(place_L, item.places).all()]
    if name in ("cov", "patterns"):
        fit = vectors.principal_axes if name == "cov" else vectors.principal_patterns
        components = fit(features[:4], place_L, 2)
        np.testing.assert_array_equal(made.components_, components)
        expected = [vectors.fitted(item, place_L, name, components) for item in whole]
    elif name == "attentive":
        everyone = np.arange(4)
        fold = Fold("classification", 2, everyone, everyone[:0], np.array([0, 1, 0, 1]), everyone, 0)
        attentive = Attentive(features[:4])
        expected = list(attentive.pool(attentive.choose(fold)[0], everyone)[:, 0])
        whole = features[:4]
    else:
        expected = [vectors.fixed(item, place_L, name) for item in whole]
    rows = [features.index(item) for item in whole]
    np.testing.assert_allclose(found[rows], expected, rtol=1e-5, atol=1e-5)


def test_cross_validation_encodes_each_image_once(model, images, tmp_path, monkeypatch: pytest.MonkeyPatch):
    calls = []
    convert = SlimBrain.convert

    def counted(self, image, **more):
        calls.append(image)
        return convert(self, image, **more)

    monkeypatch.setattr(SlimBrain, "convert", counted)
    vectors = SlimBrainTransformer(model, pooling="mean+sd", memory=str(tmp_path))
    pipeline = make_pipeline(vectors, StandardScaler(), LogisticRegression())
    guessed = cross_val_predict(pipeline, images, LABELS, cv=3, method="predict_proba")
    assert guessed.shape == (6, 2) and sorted(calls) == sorted(images)
    expected = SlimBrainTransformer(model, pooling="mean+sd").fit_transform(images)
    assert len(calls) == 12
    np.testing.assert_array_equal(vectors.fit_transform(images), expected)
    assert len(calls) == 12

    vectors.set_params(stage=1).fit(images[:2])  # another stage is another thing to keep
    vectors.set_params(model=SlimBrain.random(model, 5)).fit(images[:2])  # and so are other weights
    assert len(calls) == 16
    Path(images[0]).touch()
    vectors.fit(images[:2])  # and a file that was written anew
    assert len(calls) == 17
    vectors.fit([nib.load(images[0]), Path(images[1])])  # the same files
    assert len(calls) == 17
    beside = Path(images[0]).parent / Path(images[0]).name.replace(".nii.gz", ".json")
    text = beside.read_text()
    try:
        beside.write_text(text + " ")  # what lies beside a file counts, of a loaded image too
        vectors.fit([nib.load(images[0]), images[1]])
    finally:
        beside.write_text(text)
    assert len(calls) == 18


def test_an_image_without_a_place_gets_the_training_mean_with_a_warning(model, images, memory, monkeypatch):
    made = SlimBrainTransformer(model, pooling="location", memory=memory).fit(images[:4])
    whole = made.transform(images[:1])
    item = model.encode_tokens(images[0])
    hole = int(np.flatnonzero(item.places == made.places_[2])[0])

    def without(count: int) -> Features:
        keep = np.ones(len(item.places), bool)
        keep[hole : hole + count] = False
        return Features(item.key, item.tokens[:, keep], item.places[keep], item.slot_times, item.slot_window_onsets)

    monkeypatch.setattr(made, "_encoded", lambda X: [without(1)])
    with pytest.warns(UserWarning, match=f"no brain in 1 of {len(made.places_)} places"):
        found = made.transform(images[:1])
    expected = whole.reshape(len(made.places_), -1).copy()
    expected[2] = made.mean_tokens_[2]
    np.testing.assert_allclose(found.reshape(expected.shape), expected, rtol=1e-6)
    monkeypatch.setattr(made, "_encoded", lambda X: [without(len(item.places) - hole)])
    with pytest.raises(DatasetError, match="brain in 2 of"):
        made.transform(images[:1])


def test_images_in_memory_and_with_arguments(model, images, memory):
    made = SlimBrainTransformer(model, pooling="mean", memory=memory)
    loaded = nib.load(images[0])
    mask = images[0].replace("desc-preproc_bold", "desc-brain_mask")
    confounds = images[0].split("_space-")[0] + "_desc-confounds_timeseries.tsv"
    given = [images[0], {"image": loaded, "mask": mask, "confounds": confounds}, {"image": images[0], "dummy": 5}]
    found = made.fit_transform(given)
    np.testing.assert_array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])
    for paths in (tuple(images[:2]), iter(images[:2]), np.array(images[:2]), pd.Series(images[:2])):
        np.testing.assert_array_equal(made.fit_transform(paths)[0], found[0])


def test_a_bad_image_is_named_or_skipped(model, images, memory, tmp_path):
    cut = tmp_path / "cut.nii.gz"
    cut.write_bytes(Path(images[1]).read_bytes()[:5000])
    given = [images[0], cut, images[2], images[3]]
    with pytest.raises(RunRefused, match=rf"^X\[1\]: {cut}: data: got unreadable"):
        SlimBrainTransformer(model, pooling="cov", memory=memory).fit(given)
    with pytest.raises(RunRefused, match=r"^X\[3\]: an image in memory: dim: got"):
        SlimBrainTransformer(model, memory=memory).fit([*images[:3], nib.load(images[3]).slicer[..., :2]])
    for name, labels in (("cov", None), ("attentive", ["a", "left out", "a", "b"])):
        made = SlimBrainTransformer(model, pooling=name, components=2, memory=memory, on_error="skip")
        y, kept = (None, None) if labels is None else ([*labels, "b"], [labels[0], *labels[2:], "b"])
        with pytest.warns(UserWarning, match=rf"1 of 5 images are skipped: X\[1\]: {cut}: data: got unread") as told:
            found = made.fit_transform([*given, images[4]], y)
        assert sum("skipped" in str(item.message) for item in told) == 1
        assert np.isnan(found[1]).all() and np.isfinite(found[[0, 2, 3, 4]]).all()
        expected = clone(made).fit_transform([images[0], images[2], images[3], images[4]], kept)
        np.testing.assert_array_equal(found[[0, 2, 3, 4]], expected)
        with pytest.warns(UserWarning, match=r"2 of 3 images are skipped: X\[0\].*; X\[2\]"):
            rows = made.transform([cut, images[0], tmp_path / "none.nii.gz"])
        assert np.isnan(rows[[0, 2]]).all() and np.isfinite(rows[1]).all()
    with pytest.raises(DatasetError, match="no image that can be encoded"), pytest.warns(UserWarning, match="1 of 1"):
        SlimBrainTransformer(model, memory=memory, on_error="skip").fit([cut])


def test_an_image_with_too_little_of_the_brain_is_skipped(model, images, memory, monkeypatch):
    made = SlimBrainTransformer(model, pooling="mean", memory=memory, on_error="skip").fit(images[:4])
    item = model.encode_tokens(images[0])
    less = Features(item.key, item.tokens[:, :2], item.places[:2], item.slot_times, item.slot_window_onsets)
    monkeypatch.setattr(made, "_encoded", lambda X: [item, less])
    with pytest.warns(UserWarning, match=r"1 of 2 images are skipped: X\[1\] \(.*places: got brain in 2 of"):
        found = made.transform(images[:2])
    assert np.isfinite(found[0]).all() and np.isnan(found[1]).all()


def test_random_states_of_scikit_learn(model, images, memory):
    def queries(state):
        made = SlimBrainTransformer(model, pooling="attentive", memory=memory, random_state=state)
        folds = []
        made._seed = lambda: folds.append(SlimBrainTransformer._seed(made)) or folds[-1]
        made.fit(images, LABELS)
        return folds[0]

    assert queries(5) == queries(np.int64(5)) == 5
    assert queries(np.random.RandomState(1)) == queries(np.random.RandomState(1))
    assert queries(np.random.RandomState(1)) != queries(np.random.RandomState(2))
    assert queries(None) != queries(None)


def test_what_was_assumed_is_told_of_a_kept_image_too(model, images, tmp_path):
    image = nib.load(images[0])
    scanner = nib.Nifti1Image(np.asanyarray(image.dataobj), image.affine, image.header)
    scanner.set_sform(image.affine, 1)
    scanner.set_qform(image.affine, 1)
    mask = images[0].replace("desc-preproc_bold", "desc-brain_mask")
    made = SlimBrainTransformer(model, pooling="mean", memory=str(tmp_path))
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"^X\[1\] \(in memory\): space taken as MNI: header code 1"):
            made.fit([images[0], {"image": scanner, "mask": mask}])


@pytest.mark.parametrize(
    ("changes", "X", "y", "match"),
    [
        ({"pooling": "median"}, 4, None, "pooling: got median, expected one of mean"),
        ({"pooling": "attentive"}, 4, None, "y: got none"),
        ({"pooling": "attentive"}, 4, [0.1, 0.2, 0.3, 0.4], "y: got numbers that are no classes"),
        ({"pooling": "attentive"}, 3, [0, 0, 1], "y: got 1 people of 1, expected at least 2"),
        ({"pooling": "attentive", "target": "regression"}, 3, [0.1, 0.2, 0.3], "y: got 3 people"),
        ({"pooling": "cov", "components": 99}, 4, None, "components: got 99"),
        ({"pooling": "patterns", "components": 9999}, 4, None, "components: got 9999 patterns, expected at most"),
        ({"stage": 7}, 4, None, "stage: got 7"),
    ],
)
def test_what_cannot_be_meant_is_told(model, images, memory, changes, X, y, match):
    with pytest.raises(ConfigError, match=match):
        SlimBrainTransformer(model, memory=memory, **changes).fit(images[:X], y)
    with pytest.raises(ConfigError, match="image: got a mapping of mask"):
        SlimBrainTransformer(model).fit([{"mask": "m.nii.gz"}])


def test_attention_is_trained_for_values_and_keeps_people_together(model, images, memory):
    made = SlimBrainTransformer(model, pooling="attentive", target="regression", memory=memory)
    values = np.linspace(-1, 1, 6)
    found = made.fit_transform(images, values, groups=np.arange(6))
    assert found.shape == (6, made.queries_.size) and np.isfinite(found).all()
    with pytest.raises(ConfigError, match="y: got 3 people of all of them, expected at least 4"):
        made.fit(images, values, groups=np.arange(6) // 2)
