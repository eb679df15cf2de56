"""Integrated gradients: exact for a linear model, complete for every pooling, of the very probe; NIfTI in its place."""

from __future__ import annotations

import json
import runpy
import sys
from copy import copy
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from helpers.commands import ROOT, run_command
from helpers.explained import ABOUT
from helpers.pretrained import ALIGNED, STRADDLING, write_run
from shards.core.errors import ConfigError
from shards.format.patches import scatter
from shards.format.reader import Dataset
from shards.reporting import viewer
from slim.evaluation.attentive import Attentive
from slim.evaluation.division import make_splits
from slim.evaluation.linear import Linear
from slim.evaluation.probe import encoder_method, make_fold
from slim.evaluation.splits import Fold
from slim.evaluation.task import find_cases, load_task
from slim.explain import explain
from slim.explain.differentiable_probe import Score, _weights, fit_score, fit_state_score
from slim.explain.explanation import Explanation, find_views
from slim.explain.integrated_gradients import _Groups, check_start, integrated_gradients
from slim.inference.slim_brain import SlimBrain
from slim.inference.vectors import at_places, common_places, pool, principal_axes
from slim.model.pooling import FIXED, cov, mean, mean_sd

POOLINGS = ["mean", "mean+sd", "location", "cov", "patterns", "attentive"]


@pytest.fixture(scope="module")
def opened(dataset: Path) -> Dataset:
    return Dataset(dataset)


@pytest.fixture(scope="module")
def model(dataset: Path, tmp_path_factory) -> SlimBrain:
    return SlimBrain.from_pretrained(write_run(tmp_path_factory.mktemp("attribution") / "run", dataset, ALIGNED))


@pytest.fixture(scope="module")
def features(model: SlimBrain, opened: Dataset) -> list:
    return [model.encode_session(opened, session) for session in opened.sessions]


def fold_of(kind: str, classes: int = 2) -> Fold:
    """The first five of six people train."""
    answer_n = np.array([0, 1, 0, 1, 1]) if kind == "classification" else np.array([-1.2, 0.3, 0.9, -0.6, 0.6])
    return Fold(kind, classes, np.arange(5), np.array([5]), answer_n, np.arange(5), 0)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_the_score_is_that_of_the_probe(features, kind: str, pooling: str):
    """Logit or value of the test session, by the method that tools/probe.py compares."""
    fold = fold_of(kind)
    method = Attentive(features) if pooling == "attentive" else Linear(partial(pool, features, pooling, 3))
    guess_K = method.predict(fold)[0]
    score = fit_score(features, pooling, 3, fold, output=1, unit=2.5)
    token_SLC = torch.from_numpy(at_places(features[5], score.places))
    expected = np.log(guess_K[1] / guess_K[0]) if kind == "classification" else guess_K[0]
    assert float(score(token_SLC)) / 2.5 == pytest.approx(expected, rel=1e-4, abs=1e-5)
    if kind == "classification":
        other = fit_score(features, pooling, 3, fold, output=0)
        assert float(other(token_SLC)) == pytest.approx(-expected, rel=1e-4, abs=1e-5)


@pytest.fixture
def states(opened: Dataset, tmp_path: Path) -> tuple[Path, Path]:
    """A task of three states, three windows each in turn, and the folder of its events."""
    width = opened.frames * opened.manifest.tr
    rows = [f"{3 * width * turn}\t{3 * width}\t{['look', 'move', 'rest'][turn % 3]}" for turn in range(4)]
    for session in opened.sessions:
        (tmp_path / f"{session.subject}.tsv").write_text("\n".join(["onset\tduration\ttrial_type", *rows]))
    path = tmp_path / "doing.yaml"
    path.write_text(
        "{name: doing, type: state, pooling: location, split: {kind: folds, folds: 3, repeats: 1}, "
        'events: {path: "{subject}.tsv", delay: 0}}'
    )
    return path, tmp_path


@pytest.mark.parametrize("pooling", ["mean", "location"])
def test_logits_of_states_are_those_of_the_probe(features, opened: Dataset, states: tuple[Path, Path], pooling: str):
    """Of single windows, and the mean of several."""
    path, folder = states
    task = load_task(path).model_copy(update={"pooling": pooling})
    cases = find_cases(task, opened, path, folder)
    assert cases.classes == ["look", "move", "rest"] and len(cases.sessions) == 72
    fold = make_fold(task, cases, make_splits(task, cases, path)[0][0])[0]
    by_key = {item.key: item for item in features}
    guess_mK = encoder_method(task, cases, by_key).predict(fold)
    of = [fit_state_score(features, cases, pooling, fold, output) for output in range(3)]
    found_mK = np.zeros_like(guess_mK)
    for number, row in enumerate(fold.test):
        item = by_key[cases.sessions[row].key]
        tokens = torch.from_numpy(at_places(item, common_places(features)))
        found_mK[number] = [float(score(item, cases.window_N[[row]])(tokens)) for score in of]
    expected_mK = np.log(guess_mK) - np.log(guess_mK).mean(axis=1, keepdims=True)
    np.testing.assert_allclose(found_mK - found_mK.mean(axis=1, keepdims=True), expected_mK, atol=2e-4)
    several = fold.test[[cases.sessions[row] is cases.sessions[fold.test[-1]] for row in fold.test]]
    together = float(of[1](item, cases.window_N[several])(tokens))
    assert together == pytest.approx(found_mK[np.isin(fold.test, several), 1].mean(), abs=1e-4)


def test_logits_of_three_classes_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    train_nP, y_n = rng.normal(size=(12, 40)), np.arange(12) % 3
    fold = Fold("classification", 3, np.arange(12), np.arange(0), y_n, np.arange(12), 0)
    z_nP = (train_nP - train_nP.mean(0)) / (train_nP.std(0) * np.sqrt(40))
    model = LogisticRegression(C=10, class_weight="balanced", tol=1e-10, max_iter=10_000).fit(z_nP, y_n)
    logit_nK = np.stack([train_nP @ w_P + b for w_P, b in (_weights(fold, 0.1, train_nP, k) for k in range(3))])
    np.testing.assert_allclose(logit_nK.T, model.decision_function(z_nP), atol=1e-3)


@pytest.mark.parametrize("pooling", ["mean", "mean+sd", "location", "cov"])
def test_poolings_are_those_of_numpy(features, pooling: str):
    place_L = common_places(features)
    x_SLC = at_places(features[5], place_L)
    if pooling == "cov":
        axes_CQ = principal_axes(features[:5], place_L, 3)
        found = cov(torch.from_numpy(x_SLC), torch.tensor(axes_CQ.copy()))
        x_SP = (x_SLC @ axes_CQ).reshape(len(x_SLC), -1)
        expected = np.corrcoef(x_SP.T)[np.triu_indices(x_SP.shape[1], 1)]
    else:
        found, x_SLC = FIXED[pooling](torch.from_numpy(x_SLC)), x_SLC.astype(np.float64)
        expected = {
            "mean": x_SLC.mean(axis=(0, 1)),
            "mean+sd": np.r_[x_SLC.mean(axis=(0, 1)), x_SLC.std(axis=0).mean(axis=0)],
            "location": x_SLC.mean(axis=0).ravel(),
        }[pooling]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_tokens_that_do_not_vary_have_no_gradient():
    token_SLC = torch.zeros(6, 2, 4).requires_grad_()
    for pooled in (mean_sd(token_SLC), cov(token_SLC, torch.eye(4)[:, :2])):
        (slope_SLC,) = torch.autograd.grad(pooled.sum(), token_SLC)
        assert torch.isfinite(pooled).all() and torch.isfinite(slope_SLC).all()


@pytest.mark.parametrize("sizes", [ALIGNED, STRADDLING])
def test_groups_are_those_of_encode_session(sizes: dict, dataset: Path, opened: Dataset, tmp_path: Path):
    model, session = SlimBrain.from_pretrained(write_run(tmp_path / "run", dataset, sizes)), opened.sessions[0]
    groups = _Groups(model, opened, session)
    with torch.no_grad():
        token_SLC = torch.cat([groups.tokens(group, 1.0, 1.0) for group in range(len(groups.batches))])
    expected = model.encode_session(opened, session)
    np.testing.assert_array_equal(groups.places, expected.places)
    np.testing.assert_allclose(token_SLC.numpy(), expected.tokens, rtol=1e-4, atol=1e-5)


class LinearEncoder(torch.nn.Module):
    """Each cell the sum of its voxels times weights; stands in for Hiera."""

    def __init__(self, geometry, voxels: int, dim: int):
        super().__init__()
        self.cell_N = torch.from_numpy(geometry.cell_of).reshape(geometry.tokens[0], -1)
        self.weight_VC = torch.randn(voxels, dim, generator=torch.Generator().manual_seed(0))
        self.anatomy_VC = torch.randn(voxels, dim, generator=torch.Generator().manual_seed(1))

    def forward(self, voxels, plan) -> torch.Tensor:
        x_NC = voxels.value_RV[plan.row_N] @ self.weight_VC + voxels.baseline_QV[plan.patch_N] @ self.anatomy_VC
        cell_N = self.cell_N[plan.frame_N.long(), plan.space_N.long()]
        sum_LC = torch.zeros(int(self.cell_N.max()) + 1, x_NC.shape[1]).index_add(0, cell_N, x_NC)
        return sum_LC[plan.cell_M.long()]


def test_exact_for_a_linear_model(model: SlimBrain, opened: Dataset):
    """Shares are weight times value, and windows that the last group repeats are given theirs once."""
    session = opened.sessions[0]
    stand_in = LinearEncoder(model.geometry, 64, 7)
    was, model.encoder = model.encoder, stand_in
    try:
        groups = _Groups(model, opened, session)
        weight_C = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        score = Score(mean, groups.places, weight_C, 3.0, 1.0)
        found = integrated_gradients(model, opened, session, score, "empty")
    finally:
        model.encoder = was
    assert found.points == 16 and abs(found.gap) < 1e-4 * abs(found.score - found.at_start)
    assert found.at_start == pytest.approx(3.0)
    arrays = opened.read(session)
    in_time = np.argsort(arrays["start"])
    cells = 12 * len(groups.places)  # one slot a window
    slope_V = (stand_in.weight_VC.double() @ weight_C).numpy() / cells
    expected_KFMV = arrays["windows"][in_time].astype(np.float64) * slope_V
    np.testing.assert_array_equal(found.start_K, arrays["start"][in_time])
    np.testing.assert_allclose(found.value_KFMV, expected_KFMV, rtol=1e-3, atol=1e-7)
    slope_V = (stand_in.anatomy_VC.double() @ weight_C).numpy() / cells * 12 * 5  # in every frame anew
    expected_MV = np.where(arrays["brain"] > 0, arrays["baseline"], 0) * slope_V
    np.testing.assert_allclose(found.anatomy_MV, expected_MV, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("pooling", "start"),
    [("mean+sd", "still"), ("cov", "empty"), ("patterns", "empty"), ("attentive", "still")],
)
def test_shares_sum_to_the_difference_of_the_scores(model, opened, features, pooling: str, start: str):
    score = fit_score(features, pooling, 3, fold_of("regression"))
    found = integrated_gradients(model, opened, opened.sessions[5], score, start, tolerance=0.01)
    token_SLC = torch.from_numpy(at_places(features[5], score.places))
    assert found.score == pytest.approx(float(score(token_SLC)), abs=1e-4)
    assert found.complete and abs(found.total - (found.score - found.at_start)) <= found.allowed
    outside = opened.read(opened.sessions[5], ("brain",))["brain"] == 0
    assert not found.value_KFMV[:, :, outside].any() and not found.anatomy_MV[outside].any()
    assert bool(found.anatomy_MV.any()) == (start == "empty")


def test_slope_at_the_end_of_the_path_is_that_of_finite_differences(model, opened, features):
    """Two passes through the encoder, group by group, are one gradient of the whole session."""
    score = fit_score(features, "cov", 3, fold_of("regression"))
    session = opened.sessions[5]
    groups = _Groups(model, opened, session)
    at_L = torch.from_numpy(np.searchsorted(groups.places, score.places))

    def value(alpha: float) -> float:
        with torch.no_grad():
            tokens = [groups.tokens(group, alpha, 1.0) for group in range(len(groups.batches))]
            return float(score(torch.cat(tokens)[:, at_L]))

    leaves: list[torch.Tensor] = []
    tokens = [groups.tokens(group, 1.0, 1.0, leaves) for group in range(len(groups.batches))]
    slopes = torch.autograd.grad(score(torch.cat(tokens)[:, at_L]), leaves[::2])
    along = sum(float((slope * leaf.detach()).sum()) for slope, leaf in zip(slopes, leaves[::2], strict=True))
    assert along == pytest.approx((value(1.01) - value(0.99)) / 0.02, rel=0.02, abs=1e-4)


def test_a_path_that_is_walked_too_coarsely_is_told(model, opened, features):
    score = fit_score(features, "cov", 3, fold_of("regression"))
    found = integrated_gradients(model, opened, opened.sessions[5], score, tolerance=1e-9, most=16)
    assert found.points == 16 and not found.complete
    lines = (explain.session_shares(opened, opened.sessions[5], found),)
    (said,) = Explanation.model_validate({**ABOUT, "sessions": lines}).remarks()
    assert said.severity == "look" and f"first {found.key}" in said.text


def test_anatomy_that_is_not_seen_cannot_be_taken_away(model, opened, features):
    blind = replace_view(model, "voxel")
    with pytest.raises(ConfigError, match="has no anatomy"):
        check_start(blind, "empty")


def replace_view(model: SlimBrain, view: str) -> SlimBrain:
    other = copy(model)
    other.settings = model.settings.model_copy(update={"view": view})
    return other


TASK = """
name: score
type: regression
label: score
split: {kind: folds, folds: 3, repeats: 1}
pooling: location
"""


STATES = """
name: states
type: state
pooling: mean
events: {path: "sub-{subject}/ses-{session}/func/sub-{subject}_ses-{session}_task-rest_events.tsv"}
"""


@pytest.fixture(scope="module")
def written(model: SlimBrain, cohort: Path, dataset: Path, tmp_path_factory) -> tuple[Path, dict, str]:
    """Maps that the command wrote, its JSON and what it printed."""
    task = tmp_path_factory.mktemp("task") / "score.yaml"
    task.write_text(TASK)
    states = task.with_name("states.yaml")
    states.write_text(STATES)
    words = ("--data", dataset, "--task", task, "--states", states, "--events", cohort, "--subjects", 2, "--json")
    done = run_command("tools/explain.py", model.run_folder, *words)
    assert done.returncode == 0, done.stderr
    return model.run_folder / "report" / "explain", json.loads(done.stdout.splitlines()[-1]), done.stdout


def test_maps_lie_where_the_brain_lies(written, opened: Dataset):
    folder, summary, printed = written
    facts = json.loads((folder / "score.json").read_text())
    assert summary["explained"] == 2 == len(facts["sessions"]) and "Complete: in 2 sessions" in printed
    mean = nib.load(folder / "score.nii.gz")
    np.testing.assert_array_equal(mean.affine, opened.grid.affine)
    assert mean.shape == opened.grid.shape and mean.header["sform_code"] == 4
    total = 0.0
    for line in facts["sessions"]:
        session = next(session for session in opened.sessions if session.key == line["key"])
        arrays = opened.read(session, ("brain", "patch"))
        brain_XYZ = scatter(arrays["brain"], arrays["patch"], opened.grid.shape, opened.grid.patch)
        own = nib.load(folder / "score" / f"{line['key']}.nii.gz").get_fdata()
        assert not own[brain_XYZ == 0].any()
        assert own.sum() == pytest.approx(line["score"] - line["at_start"], abs=abs(line["gap"]) + 1e-4)
        assert sum(window["sum"] for window in line["windows"]) == pytest.approx(own.sum(), abs=1e-4)
        assert len(line["windows"]) == session.n_kept
        total += own.sum() / 2
    assert mean.get_fdata().sum() == pytest.approx(total, abs=1e-4)
    assert (nib.load(folder / "score_absolute.nii.gz").get_fdata() >= 0).all()
    for name in ("score.png", "score_windows.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    views = find_views(folder, "score")
    kinds = ("", ", surface") if viewer.can_draw_surfaces() else ("",)
    assert [*views] == [name + kind for name in ("size of the shares", "signed shares") for kind in kinds]
    for path in views.values():
        assert path.is_relative_to(folder) and "Content-Security-Policy" in path.read_text()


def test_test_sessions_alone_are_explained(opened: Dataset, tmp_path: Path):
    path = tmp_path / "score.yaml"
    path.write_text(TASK)
    task = load_task(path)
    cases = find_cases(task, opened, path)
    for asked in explain.choose(task, cases, path, 6):
        assert asked.row in asked.fold.test and cases.subject_N[asked.row] not in cases.subject_N[asked.fold.train]
    assert len(explain.choose(task, cases, path, 99)) == 6


def test_states_are_explained_by_their_own_windows(
    model: SlimBrain, dataset: Path, opened: Dataset, states: tuple[Path, Path], tmp_path: Path
):
    path, folder = states
    words = ("--data", dataset, "--task", path, "--events", folder, "--class", "move", "--subjects", 2, "--json")
    done = run_command("tools/explain.py", model.run_folder, *words, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "out" / "doing.json").read_text())
    assert facts["score"].startswith("logit of move, mean over") and len(facts["sessions"]) == 2
    assert "Complete: in 2 sessions" in done.stdout
    for line in facts["sessions"]:
        own = nib.load(tmp_path / "out" / "doing" / f"{line['key']}.nii.gz").get_fdata()
        assert own.sum() == pytest.approx(line["score"] - line["at_start"], abs=abs(line["gap"]) + 1e-4)
        size = np.array([window["mean_absolute"] for window in line["windows"]])
        assert size[3:6].min() > size[[0, 1, 2, 6, 7, 8, 9, 10, 11]].max()  # others take part as what it is read with

    task = load_task(path)
    cases = find_cases(task, opened, path, folder)
    for asked in explain.choose(task, cases, path, 6, 1):
        assert cases.subject_N[asked.row] not in cases.subject_N[asked.fold.train] and len(asked.start_w) == 3
    done = run_command("tools/explain.py", model.run_folder, *words[:6], "--class", "sleep")
    assert done.returncode == 2 and "--class: got sleep" in done.stderr


def test_what_cannot_be_explained_is_told_in_one_line(model, dataset, tmp_path, monkeypatch, capsys):
    path = tmp_path / "task.yaml"

    def error(*more: object) -> str:
        words = ("tools/explain.py", model.run_folder, "--data", dataset, "--task", path, *more)
        monkeypatch.setattr(sys, "argv", [*map(str, words)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "tools" / "explain.py"), run_name="__main__")
        line = capsys.readouterr().err
        assert ended.value.code == 2 and line.count("\n") == 1
        return line

    path.write_text("{name: who, type: fingerprint, split: {kind: all}}")
    assert "type: got fingerprint, expected classification, regression or state" in error()
    path.write_text(TASK)
    assert "--class: got A" in error("--class", "A")
    assert "--subjects: got 0" in error("--subjects", 0)
    assert "got regression, expected state" in error("--states", path)
