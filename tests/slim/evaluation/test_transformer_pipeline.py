"""The transformer in what scikit-learn users put it: searches, pandas output, processes, pickles."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import Pipeline

from helpers.pretrained import ALIGNED, write_run
from shards.cohorts.cohort_file import find_runs
from slim.evaluation.transformer import SlimBrainTransformer

LABELS = np.array(["a", "b"] * 3)


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("pipeline") / "run", dataset, ALIGNED)


@pytest.fixture(scope="module")
def images(cohort: Path) -> list[str]:
    return [str(source.bold) for source in find_runs(cohort / "cohort.yaml")]


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def pipeline(run: Path, memory: Path) -> Pipeline:
    return Pipeline(
        [("encode", SlimBrainTransformer(run, pooling="mean", memory=memory)), ("fit", LogisticRegression())]
    )


def test_a_search_over_poolings_gives_a_table_with_names(run, images, memory) -> None:
    grid = {"encode__pooling": ["mean", "mean+sd", "cov"], "fit__C": [0.1, 1.0]}
    search = GridSearchCV(pipeline(run, memory).set_output(transform="pandas"), grid, cv=3).fit(images, LABELS)
    assert len(search.cv_results_["params"]) == 6 and np.isfinite(search.cv_results_["mean_test_score"]).all()
    best = search.best_estimator_["encode"]
    assert best.pooling == search.best_params_["encode__pooling"]
    names = search.best_estimator_[:-1].get_feature_names_out()
    table = best.transform(images)
    assert isinstance(table, pd.DataFrame) and table.shape == (6, len(names))
    assert [*table.columns] == [*names] == [f"slimbraintransformer{n}" for n in range(len(names))]
    np.testing.assert_array_equal(table, clone(best).set_output(transform="default").fit(images).transform(images))


def test_rows_of_a_series_of_paths_keep_their_names(run, images, memory) -> None:
    paths = pd.Series(images, index=[f"sub-{n}" for n in range(6)])
    made = SlimBrainTransformer(run, pooling="mean", memory=memory).set_output(transform="pandas")
    assert [*made.fit_transform(paths).index] == [*made.transform(paths).index] == [*paths.index]


def test_two_processes_give_the_scores_of_one(run, images, memory) -> None:
    one = cross_val_score(pipeline(run, memory), images, LABELS, cv=3, n_jobs=1)
    np.testing.assert_array_equal(cross_val_score(pipeline(run, memory), images, LABELS, cv=3, n_jobs=2), one)


def test_a_fitted_pipeline_is_pickled_and_cloned(run, images, memory) -> None:
    fitted = pipeline(run, memory).fit(images[:4], LABELS[:4])
    copy = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(copy.predict_proba(images), fitted.predict_proba(images))
    again = clone(fitted).fit(images[:4], LABELS[:4])
    np.testing.assert_array_equal(again.predict_proba(images), fitted.predict_proba(images))
