"""Recipe 3 of the synthetic cohort: traits that are finer than parcels, and the older recipe beside it.

    pytest tests/shards/synthetic/test_fine.py

Shape suffixes: R runs, S people, T frames, V voxels, N networks, P parcels, E pairs of parcels or networks.
"""

from __future__ import annotations

import json
from dataclasses import replace

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from nilearn.connectome import ConnectivityMeasure
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import KFold, StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from shards.core.errors import ConfigError
from shards.format.grid import Grid
from shards.synthetic import truth
from shards.synthetic.anatomy import CUBE_MM, FINE_PERCENT, PARCELS, anatomy
from shards.synthetic.signals import run_frames
from shards.synthetic.truth import (
    FINE_PAIRS,
    GROUPS,
    NETWORKS,
    PARCEL_IMAGE,
    TRAIT_PAIRS,
    SyntheticCohort,
    fine_traits,
    traits,
)
from shards.synthetic.write import write_cohort
from slim.ranking.parcels import parcels_from_mask, read_labels

COHORT = SyntheticCohort(subjects=60, sessions=2, frames=240, recipe=3)
SMALL = SyntheticCohort(subjects=2, sessions=1, frames=20, voxel_mm=8, recipe=3)
MM = (8.0, 4.0)


def cubes(brain) -> np.ndarray:
    """Cubes of a dataset at the cohort's voxel size, on a grid that holds the brain; int (V,), 0 for none."""
    mm = float(brain.affine[0, 0])
    grid = Grid(mm=mm, shape=(round(192 / mm),) * 3)
    index_V3 = (brain.mm_V3 - grid.affine[:3, 3]) / mm
    assert np.allclose(index_V3, np.round(index_V3), atol=1e-4), "the cohort's voxels are voxels of the grid"
    index_V3 = np.round(index_V3).astype(int)
    assert index_V3.min() >= 0 and (index_V3 < grid.shape).all()
    inside_XYZ = np.zeros(grid.shape, bool)
    inside_XYZ[tuple(index_V3.T)] = True
    return parcels_from_mask(inside_XYZ, mm, CUBE_MM, least=0)[tuple(index_V3.T)]


@pytest.mark.parametrize("mm", MM)
def test_fine_patterns_have_mean_0_in_every_cube_and_every_parcel(mm):
    brain = anatomy(mm, 3)
    rms = np.sqrt(np.mean(np.square(brain.fine_NV)))
    for label_V in (cubes(brain), brain.parcel_V):
        count_P = np.bincount(label_V)[1:]
        for fine_V in brain.fine_NV:
            mean_P = np.bincount(label_V, fine_V)[1:][count_P > 0] / count_P[count_P > 0]
            assert np.abs(mean_P).max() < 1e-5 * rms


@pytest.mark.parametrize("mm", MM)
def test_fine_patterns_are_as_strong_as_stated_and_lie_where_their_network_is(mm):
    brain = anatomy(mm, 3)
    percent_NV = 100 * brain.fine_NV / brain.template_V
    assert np.sqrt((percent_NV**2).sum(0).mean()) == pytest.approx(FINE_PERCENT, rel=1e-4)
    for number, fine_V in enumerate(percent_NV):
        alike_N = [np.corrcoef(np.abs(fine_V), map_V)[0, 1] for map_V in brain.map_NV]
        assert int(np.argmax(alike_N)) == number


@pytest.mark.parametrize("mm", MM)
def test_parcels_are_compact_and_of_the_size_of_schaefers(mm):
    brain = anatomy(mm, 3)
    count_P = np.bincount(brain.parcel_V)[1:]
    assert len(count_P) == 2 * PARCELS and count_P.min() > 0
    assert 1000 < np.median(count_P) * mm**3 < 4500  # mm3; those of Schaefer-400 have 2700 on average
    for parcel in range(1, 2 * PARCELS + 1):
        mm_P3 = brain.mm_V3[brain.parcel_V == parcel]
        assert np.ptp(mm_P3, axis=0).max() < 48
        assert len(set(np.sign(mm_P3[:, 0]))) == 1  # one hemisphere


# ---------------------------------------------------------------- where the traits are


@pytest.fixture(scope="module")
def simulated():
    """Features of each person of a cohort: connectivity of cubes, of parcels and of the fine patterns."""
    brain = anatomy(COHORT.voxel_mm, 3)
    unmix_VN = np.linalg.pinv(brain.fine_NV)
    series = {"cubes": [], "parcels": [], "voxels": []}
    for subject, session in COHORT.runs():
        y_TV = np.stack(list(run_frames(COHORT, subject, session)))
        for name, label_V in (("cubes", cubes(brain)), ("parcels", brain.parcel_V)):
            number_V = np.unique(label_V, return_inverse=True)[1]
            sum_TP = np.stack([np.bincount(number_V, y_V) for y_V in y_TV])
            series[name].append((sum_TP / np.bincount(number_V))[:, int(label_V.min() == 0) :])
        series["voxels"].append((y_TV - y_TV.mean(0)) @ unmix_VN)
    settings = {"kind": "correlation", "vectorize": True, "discard_diagonal": True, "standardize": False}
    found = {name: ConnectivityMeasure(**settings).fit_transform(runs) for name, runs in series.items()}
    return {name: x_RE.reshape(COHORT.subjects, COHORT.sessions, -1) for name, x_RE in found.items()}


def labels(of) -> tuple[np.ndarray, np.ndarray]:
    label_S = [of(COHORT.seed, subject) for subject in range(1, COHORT.subjects + 1)]
    return np.array([group == GROUPS[0] for group, _ in label_S]), np.array([score for _, score in label_S])


def decode(x_SE: np.ndarray, of) -> tuple[float, float]:
    """AUROC of the group and correlation with the score, cross-validated by person."""
    group_S, score_S = labels(of)
    logistic = make_pipeline(StandardScaler(), LogisticRegression(C=1e-3, max_iter=500))
    ridge = make_pipeline(StandardScaler(), RidgeCV(np.logspace(1, 5, 9)))
    folds = {"n_splits": 5, "shuffle": True, "random_state": 0}
    decision_S = cross_val_predict(logistic, x_SE, group_S, method="decision_function", cv=StratifiedKFold(**folds))
    guess_S = cross_val_predict(ridge, x_SE, score_S, cv=KFold(**folds))
    return roc_auc_score(group_S, decision_S), np.corrcoef(score_S, guess_S)[0, 1]


def identify(x_SRE: np.ndarray) -> float:
    """Share of people whose session 1 is most like their own session 2."""
    first, second = (x_SRE[:, session] - x_SRE[:, session].mean(0) for session in (0, 1))
    likeness_SS = np.corrcoef(first, second)[: len(first), len(first) :]
    return float((likeness_SS.argmax(1) == np.arange(len(first))).mean())


def test_who_reads_voxels_finds_the_fine_traits(simulated):
    """An oracle that knows the fine patterns and the pairs, and fits nothing."""
    row, column = np.tril_indices(len(NETWORKS), -1)  # the order of ConnectivityMeasure
    at = {
        frozenset((list(NETWORKS)[i], list(NETWORKS)[j])): e for e, (i, j) in enumerate(zip(row, column, strict=True))
    }
    x_SE = simulated["voxels"].mean(1)
    group_S, score_S = labels(fine_traits)
    reading = [sum(sign * x_SE[:, at[frozenset((a, b))]] for a, b, sign in pairs) for pairs in FINE_PAIRS.values()]
    assert roc_auc_score(group_S, reading[0]) > 0.95
    assert np.corrcoef(score_S, reading[1])[0, 1] > 0.95
    assert identify(simulated["voxels"]) > 0.95


@pytest.mark.parametrize("parcels", ["cubes", "parcels"])
def test_connectivity_of_parcels_is_at_chance_on_the_fine_traits(simulated, parcels):
    """With 60 people, 95 % of chance results are below .65 and .25."""
    auroc, r = decode(simulated[parcels].mean(1), fine_traits)
    assert auroc < 0.65 and r < 0.25
    # beyond the coarse traits, parcels know nobody: chance is 1 in 60
    assert identify(simulated[parcels]) < 0.15


def test_coarse_traits_stay_beside_them(simulated):
    auroc, r = decode(simulated["cubes"].mean(1), traits)
    assert auroc > 0.9 and r > 0.8


def test_fine_and_coarse_traits_do_not_follow_each_other():
    both = [(*traits(0, i), *fine_traits(0, i)) for i in range(1, 401)]
    table = np.array([(a == "A", b, c == "A", d) for a, b, c, d in both], float)
    between = np.corrcoef(table.T)[np.ix_([0, 1], [2, 3])]
    assert np.abs(between).max() < 0.13 and 0.4 < table[:, 2].mean() < 0.6
    pairs = [{frozenset(pair[:2]) for pair in pairs} for pairs in (TRAIT_PAIRS | FINE_PAIRS).values()]
    assert all(len(each) == 6 and len(frozenset().union(*each)) == len(NETWORKS) for each in pairs)


# ---------------------------------------------------------------- files


def test_cohort_names_its_recipe_its_traits_and_its_parcels(tmp_path):
    write_cohort(tmp_path, SMALL)
    facts = json.loads((tmp_path / "truth.json").read_text())
    people = pd.read_csv(tmp_path / "participants.tsv", sep="\t")
    assert facts["recipe"] == 3 and set(facts["fine_trait_pairs"]) == {"fine_group", "fine_score"}
    assert list(people.columns) == ["participant_id", "group", "score", "fine_group", "fine_score"]
    assert list(json.loads((tmp_path / "participants.json").read_text())) == list(people.columns[1:])
    for row in people.itertuples():
        assert (row.fine_group, row.fine_score) == fine_traits(SMALL.seed, int(row.participant_id[-2:]))
    label_XYZ = np.asarray(nib.load(tmp_path / PARCEL_IMAGE).dataobj)
    brain = anatomy(SMALL.voxel_mm, 3)
    assert np.array_equal(label_XYZ[brain.mask_XYZ], brain.parcel_V) and not label_XYZ[~brain.mask_XYZ].any()
    on_grid_XYZ = read_labels(tmp_path / PARCEL_IMAGE, Grid(mm=8, shape=(24, 24, 24)))
    assert np.array_equal(np.bincount(on_grid_XYZ.ravel())[1:], np.bincount(brain.parcel_V)[1:])


def test_a_cohort_of_one_recipe_is_not_continued_with_another(tmp_path):
    write_cohort(tmp_path, SMALL)
    with pytest.raises(ConfigError, match="recipe 3"):
        write_cohort(tmp_path, replace(SMALL, recipe=2))


def test_unknown_recipe_is_refused():
    with pytest.raises(ConfigError, match="--recipe"):
        replace(SMALL, recipe=1)


def test_recipe_2_has_no_fine_traits():
    cohort = replace(SMALL, recipe=2)
    assert set(truth.all_traits(cohort, 1)) == {"group", "score"} and "fine_trait_pairs" not in truth.truth(cohort)
    assert anatomy(8.0).fine_NV is None and "recipe" not in truth.truth(cohort)["parameters"]
