"""scikit-learn's own checks of an estimator, on lists of images.

The checks make tables of random numbers. `Tables` takes each row for one of six images, so that the checks fit and
transform images. `DO_NOT_APPLY` names the other checks, with the reason.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.utils import estimator_checks
from sklearn.utils.validation import check_is_fitted, validate_data

from helpers.pretrained import ALIGNED, write_run
from shards.cohorts.cohort_file import find_runs
from slim.evaluation.transformer import SlimBrainTransformer
from slim.inference.slim_brain import SlimBrain
from slim.inference.vectors import Features

IMAGES: dict[str, Features] = {}  # tokens of the images, by path


class Tables(SlimBrainTransformer):
    """The transformer, with an image for each row of a table. Every image is encoded once for all checks.

    scikit-learn itself counts and names the columns, as many checks want it. For `set_output` it wraps `transform`:
    here that of this class, so the other one is called without its wrapper.
    """

    def fit(self, X: Any, y: Any = None, groups: Any = None) -> Any:
        return super().fit(self._images(X, fits=True), y, groups)

    def fit_transform(self, X: Any, y: Any = None, groups: Any = None) -> np.ndarray:
        return SlimBrainTransformer.fit_transform.__wrapped__(self, self._images(X, fits=True), y, groups)

    def transform(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        return SlimBrainTransformer.transform.__wrapped__(self, self._images(X, fits=False))

    def _images(self, X: Any, fits: bool) -> list[str]:
        validate_data(self, X, reset=fits, skip_check_array=True)
        rows, names = np.asarray(X, dtype=np.float64), sorted(IMAGES)
        return [names[zlib.crc32(np.ascontiguousarray(row).tobytes()) % len(names)] for row in rows]

    def _encoded(self, images: list[Any]) -> list[Features | None]:
        return [IMAGES[image] for image in images]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = True
        tags.no_validation = False  # the list is shorter otherwise
        return tags


def name_of(check: Any) -> str:
    while hasattr(check, "func"):
        check = check.func
    return check.__name__


# The list of `check_estimator`, and those that scikit-learn runs on its own transformers besides.
MORE = (
    estimator_checks.check_set_output_transform,
    estimator_checks.check_set_output_transform_pandas,
    estimator_checks.check_global_output_transform_pandas,
    estimator_checks.check_transformer_get_feature_names_out,
    estimator_checks.check_transformer_get_feature_names_out_pandas,
    estimator_checks.check_get_feature_names_out_error,
)
LISTED = [check for _, check in estimator_checks.estimator_checks_generator(Tables("run", pooling="mean"))]
LISTED += [partial(check, "Tables") for check in MORE]
_NUMBERS = "X is a list of images: arrays of numbers and tables are refused by their kind (test_arguments.py)"
_SPARSE = "X is a list of images, which cannot be a sparse array"
DO_NOT_APPLY = {
    "check_complex_data": _NUMBERS,
    "check_estimators_empty_data_messages": _NUMBERS,
    "check_estimators_nan_inf": _NUMBERS,
    "check_fit1d": _NUMBERS,
    "check_fit2d_predict1d": _NUMBERS,
    "check_estimator_sparse_tag": _SPARSE,
    "check_estimator_sparse_array": _SPARSE,
    "check_estimator_sparse_matrix": _SPARSE,
    "check_transformer_data_not_an_array": "X is a list of images; what only behaves like an array of numbers is none",
}


@pytest.fixture(scope="module", autouse=True)
def images(dataset: Path, cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    model = SlimBrain.from_pretrained(write_run(tmp_path_factory.mktemp("checks") / "run", dataset, ALIGNED))
    IMAGES.update({str(run.bold): model.encode_tokens(run.bold) for run in find_runs(cohort / "cohort.yaml")})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SlimBrain, "from_pretrained", lambda name: model)
        yield


@pytest.mark.parametrize("check", LISTED, ids=name_of)
def test_a_check_of_scikit_learn(check: Callable[[Tables], None]) -> None:
    if why := DO_NOT_APPLY.get(name_of(check)):
        pytest.skip(why)
    check(Tables("run", pooling="mean"))


def test_most_checks_apply() -> None:
    """The list is that of the installed version of scikit-learn; all of it that needs no table is run."""
    names = {name_of(check) for check in LISTED}
    assert {
        "check_transformer_general",
        "check_fit_idempotent",
        "check_dict_unchanged",
        "check_estimators_pickle",
        "check_methods_subset_invariance",
        "check_estimators_unfitted",
    } <= names - DO_NOT_APPLY.keys()
    assert len(names - DO_NOT_APPLY.keys()) >= 30


def test_a_check_can_fail() -> None:
    class Forgets(Tables):
        def transform(self, X: Any) -> np.ndarray:
            self.random_state += 1
            return super().transform(X)

    with pytest.raises(AssertionError, match="changes __dict__ during transform"):
        estimator_checks.check_dict_unchanged("Forgets", Forgets("run", pooling="mean"))
