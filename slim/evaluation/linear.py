"""The linear model of a probe: ridge or logistic regression, with a penalty selected inside the training sessions.

Legend: N sessions (n of training, m of test); P features; A axes; L penalties; K classes or 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression, Ridge

from slim.evaluation.splits import Fold
from slim.model.pooling import varies

# Penalties for features scaled as below. The smallest almost interpolates.
PENALTIES = tuple(float(value) for value in np.logspace(-3, 3, 7))
_WIDEST = 1000  # largest number of coefficients with an explicit matrix of second derivatives


@dataclass
class Linear:
    """A linear probe of one vector per session.

    Attributes
    ----------
    vectors : callable
        Returns the features of all rows (sessions or windows), float (N, P), given the training rows, int (n,).
    """

    vectors: Callable[[np.ndarray], np.ndarray]

    def predict(self, fold: Fold) -> np.ndarray:
        """Probabilities (m, K) or values (m, 1) of the test sessions."""
        vector_NP = self.vectors(fold.train)
        train_nP = vector_NP[fold.train]
        return fit_predict(fold, choose_penalty(fold, train_nP), train_nP, vector_NP[fold.test])


def choose_penalty(fold: Fold, train_nP: np.ndarray) -> float:
    """The penalty with the best predictions of held-out training rows, for features without a fit."""
    inner_n = fold.inner()
    loss_L = held_out_losses(fold, [train_nP] * (inner_n.max() + 1), inner_n)
    return PENALTIES[int(loss_L.argmin())]


def scaling(train_nP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and scale (SD times sqrt(P)) of each feature, (P,) each; the scale of constant features is infinite."""
    mean_P, sd_P = train_nP.mean(axis=0, dtype=np.float64), train_nP.std(axis=0, dtype=np.float64)
    alive_P = varies(mean_P, sd_P)
    return mean_P, np.where(alive_P, sd_P, np.inf) * np.sqrt(max(alive_P.sum(), 1))


def standardised_axes(train_nP: np.ndarray, test_mP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Training and test rows, z-scored by the training rows and divided by sqrt(P), on principal axes: (n, A), (m, A).

    The coefficients of a linear model with a squared penalty are in the span of the training rows, so the model gives
    the same predictions from these at most n coordinates as from all P features, at a lower cost. With the factor
    1/sqrt(P), the same penalties can be used for any number of features. Features without variance in training are
    dropped.

    The axes are computed from the smaller of the two Gram matrices, (n, n) and (P, P), because there can be tens of
    thousands of windows.
    """
    mean_P, scale_P = scaling(train_nP)
    alive_P = np.isfinite(scale_P)
    z_nP = (train_nP[:, alive_P] - mean_P[alive_P]) / scale_P[alive_P]
    y_mP = (test_mP[:, alive_P] - mean_P[alive_P]) / scale_P[alive_P]
    if len(z_nP) > z_nP.shape[1] > 0:
        value_A, vector_PA = np.linalg.eigh(z_nP.T @ z_nP)
        vector_PA = vector_PA[:, value_A > 1e-9 * max(value_A.max(), 1e-30)]
        return z_nP @ vector_PA, y_mP @ vector_PA
    value_A, vector_nA = np.linalg.eigh(z_nP @ z_nP.T)
    kept = value_A > 1e-9 * max(value_A.max(), 1e-30)
    size_A, vector_nA = np.sqrt(value_A[kept]), vector_nA[:, kept]
    return vector_nA * size_A, (y_mP @ z_nP.T) @ vector_nA / size_A


def held_out_losses(fold: Fold, vectors: Sequence[np.ndarray], inner_n: np.ndarray) -> np.ndarray:
    """Loss of the training rows with each penalty, predicted from the other inner folds, (L,).

    It is the squared error, or the log loss with equal weight for all classes.

    Parameters
    ----------
    fold : Fold
    vectors : sequence of float array
        One (n, P) for each inner fold: features of the training sessions, with a pooling fitted without that fold.
    inner_n : int array
        Inner fold of each training row. Rows with -1 are used for training, but never predicted.
    """
    held_n = inner_n >= 0
    guess_LnK = np.zeros((len(PENALTIES), len(inner_n), fold.classes if fold.kind == "classification" else 1))
    for number, vector_nP in enumerate(vectors):
        inside, outside = inner_n != number, inner_n == number
        x_nA, x_mA = standardised_axes(vector_nP[inside], vector_nP[outside])
        for row, penalty in enumerate(PENALTIES):
            guess_LnK[row, outside] = _predict(fold, penalty, x_nA, fold.answer_n[inside], x_mA)
    return np.array([_loss(fold.kind, guess_nK[held_n], fold.answer_n[held_n]) for guess_nK in guess_LnK])


def fit_predict(fold: Fold, penalty: float, train_nP: np.ndarray, test_mP: np.ndarray) -> np.ndarray:
    """Probabilities (m, K) or values (m, 1) of the test sessions, from one fit on all training sessions."""
    x_nA, x_mA = standardised_axes(train_nP, test_mP)
    return _predict(fold, penalty, x_nA, fold.answer_n, x_mA)


def _predict(fold: Fold, penalty: float, x_nA: np.ndarray, y_n: np.ndarray, x_mA: np.ndarray) -> np.ndarray:
    """Probabilities (m, K) or values (m, 1) from one fitted linear model."""
    model = fit(fold, penalty, x_nA, y_n)
    if isinstance(model, Ridge):
        return model.predict(x_mA)[:, None]
    out_mK = np.zeros((len(x_mA), fold.classes))
    out_mK[:, model.classes_] = model.predict_proba(x_mA)
    return out_mK


def fit(fold: Fold, penalty: float, x_nA: np.ndarray, y_n: np.ndarray) -> Ridge | LogisticRegression:
    """Fit the linear model of a probe on these axes, with equal weight for all classes."""
    if fold.kind == "regression":
        return Ridge(alpha=penalty).fit(x_nA, y_n)
    # Newton's method, because lbfgs needs thousands of steps for separable classes with a small penalty. With many
    # coefficients, the matrix of second derivatives is not stored, but only multiplied with vectors.
    coefficients = x_nA.shape[1] * (1 if fold.classes == 2 else fold.classes)
    solver = "newton-cholesky" if coefficients <= _WIDEST else "newton-cg"
    model = LogisticRegression(C=1 / penalty, class_weight="balanced", solver=solver, max_iter=200)
    return model.fit(x_nA, y_n)


def _loss(kind: str, guess_mK: np.ndarray, y_m: np.ndarray) -> float:
    """The loss for selection: squared error, or log loss with equal weight for all classes."""
    if kind == "regression":
        return float(((guess_mK[:, 0] - y_m) ** 2).mean())
    of_true_m = np.clip(guess_mK[np.arange(len(y_m)), y_m], 1e-12, 1)
    return float(np.mean([-np.log(of_true_m[y_m == k]).mean() for k in np.unique(y_m)]))
