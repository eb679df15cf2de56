"""A pooling and a linear probe as one differentiable function of the tokens of a session.

    score = fit_score(features, task.pooling, task.components, fold, output=1)     # for tasks with labels of sessions
    of = fit_state_score(features, cases, task.pooling, fold, output=2)            # for tasks with states of windows
    score = of(features_of_a_session, starts_of_its_windows)                       # mean over the windows

    score(token_SLC)                                                               # a logit, or the predicted value

Legend: S time slots, L places, C channels of a session's tokens; W windows of a session; Q principal axes; N sessions,
or windows (n of training); P pooled features; A axes of the training side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.linear_model import Ridge
from torch import Tensor

from slim.evaluation import attentive
from slim.evaluation.linear import choose_penalty, fit, scaling, standardised_axes
from slim.evaluation.probe import window_vectors
from slim.evaluation.splits import Fold
from slim.evaluation.task import Cases
from slim.inference.vectors import Features, at_places, common_places, fit_components
from slim.model import pooling as in_torch


@dataclass
class Score:
    """A probe as a function of a session's tokens: the logit of one class, or the predicted value.

    Attributes
    ----------
    pool : callable
        Maps tokens (S, L, C) at `places` to features (P,), with gradients.
    places : int64 array (L,)
        Places that all sessions of the task have.
    weight_P : float64 tensor
        Weights of features before standardisation.
    offset : float
    sd : float
        SD of the score over the training sessions.
    """

    pool: Callable[[Tensor], Tensor]
    places: np.ndarray
    weight_P: Tensor
    offset: float
    sd: float

    def __call__(self, token_SLC: Tensor) -> Tensor:
        return self.pool(token_SLC).double() @ self.weight_P.to(token_SLC.device) + self.offset


def fit_score(
    features: Sequence[Features], pooling: str, components: int | None, fold: Fold, output: int = 0, unit: float = 1.0
) -> Score:
    """The probe that `slim.evaluation.linear.Linear` (or `slim.evaluation.attentive.Attentive`) fits on the training
    set.

    Parameters
    ----------
    features : sequence of Features
        Features of all sessions of the task; only those of training are used for the fit.
    pooling, components : as in a `Task`
    fold : Fold
    output : int
        Class with the logit that is the score: of binary logistic regression for two classes, otherwise of multinomial
        logistic regression. Not used in a regression.
    unit : float
        For a regression, the SD of the fold's labels, which converts z-scores to the unit of the label.
    """
    place_L = common_places(features)
    pool: Callable[[Tensor], Tensor]
    if pooling == "attentive":
        query_1AC, penalty, train_nP = attentive.Attentive(features).choose(fold)

        def pool(token_SLC: Tensor) -> Tensor:
            token_1TC = token_SLC.flatten(0, 1)[None]
            valid_1T = torch.ones(token_1TC.shape[:2], dtype=torch.bool, device=token_1TC.device)
            return in_torch.attentive(query_1AC.to(token_1TC), token_1TC, valid_1T).flatten()

    else:
        if pooling in in_torch.FITTED:
            train = [features[row] for row in fold.train]
            fitted = torch.from_numpy(fit_components(train, place_L, pooling, components).copy())

            def pool(token_SLC: Tensor) -> Tensor:
                return in_torch.FITTED[pooling](token_SLC, fitted)

        else:
            pool = in_torch.FIXED[pooling]
        pooled = [pool(torch.from_numpy(at_places(features[row], place_L))) for row in fold.train]
        train_nP = torch.stack(pooled).float().numpy()
        penalty = choose_penalty(fold, train_nP)
    weight_P, offset = _weights(fold, penalty, train_nP, output)
    weight_P, offset = weight_P * unit, offset * unit
    sd = float((train_nP.astype(np.float64) @ weight_P).std())
    return Score(pool, place_L, torch.from_numpy(weight_P), offset, sd)


def fit_state_score(
    features: Sequence[Features], cases: Cases, pooling: str, fold: Fold, output: int
) -> Callable[[Features, np.ndarray], Score]:
    """The probe of windows that `slim.evaluation.probe.encoder_method` fits on the training set.

    Parameters
    ----------
    features : sequence of Features
        Features of the sessions, each once.
    cases : Cases
        Cases of windows.
    pooling : "location" or "mean"
    fold : Fold
    output : int
        State with the logit that is the score.

    Returns
    -------
    callable
        Returns the score of a session from its features and the starts (s) of some of its windows: the mean of their
        logits, which equals the logit of their mean.
    """
    place_L = common_places(features)
    train_nP = window_vectors(features, cases, pooling)[fold.train]
    weight_P, offset = _weights(fold, choose_penalty(fold, train_nP), train_nP, output)
    sd = float((train_nP.astype(np.float64) @ weight_P).std())

    def of(item: Features, start_w: np.ndarray) -> Score:
        start_W, number_S = np.unique(item.slot_window_onsets, return_inverse=True)
        chosen_w = np.abs(start_W - start_w[:, None]).argmin(axis=1)
        share_W = np.bincount(chosen_w, minlength=len(start_W)) / len(chosen_w) / np.bincount(number_S)
        share_S = torch.from_numpy(share_W[number_S]).float()

        def pool(token_SLC: Tensor) -> Tensor:
            x_LC = torch.tensordot(share_S.to(token_SLC.device), token_SLC, 1)
            return x_LC.flatten() if pooling == "location" else x_LC.mean(dim=0)

        return Score(pool, place_L, torch.from_numpy(weight_P), offset, sd)

    return of


def _weights(fold: Fold, penalty: float, train_nP: np.ndarray, output: int) -> tuple[np.ndarray, float]:
    """The probe for features before standardisation: weights, float64 (P,), and offset.

    `slim.evaluation.linear` fits on A principal axes of the standardised training set Z = U S V'. Its coefficients b
    correspond to V b for the features of Z, with V = Z' (U S) S^-2.
    """
    x_nA, _ = standardised_axes(train_nP, train_nP[:0])
    model = fit(fold, penalty, x_nA, fold.answer_n)
    if isinstance(model, Ridge):
        coefficient_A, intercept = model.coef_, float(model.intercept_)
    else:
        row = int(np.searchsorted(model.classes_, output))
        if len(model.classes_) == 2:
            sign = 1 if row else -1
            coefficient_A, intercept = sign * model.coef_[0], sign * float(model.intercept_[0])
        else:
            coefficient_A, intercept = model.coef_[row], float(model.intercept_[row])
    mean_P, scale_P = scaling(train_nP)
    z_nP = (train_nP - mean_P) / scale_P
    weight_P = z_nP.T @ (x_nA @ (coefficient_A / (x_nA**2).sum(axis=0))) / scale_P
    return weight_P, float(intercept - mean_P @ weight_P)
