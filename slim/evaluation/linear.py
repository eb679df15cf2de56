"""The linear model of a probe: ridge or logistic regression, its penalty chosen inside the training sessions.

Legend: N sessions (n of training, m of test); P features; A axes; L penalties; K classes or 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression, Ridge

from slim.evaluation.splits import Fold
from slim.model.pooling import varies

# On features scaled as below; the lightest all but interpolates.
PENALTIES = tuple(float(value) for value in np.logspace(-3, 3, 7))
_WIDEST = 1000  # coefficients up to which second derivatives are written down


@dataclass
class Linear:
    """A linear probe of one vector a session.

    Attributes
    ----------
    vectors : callable
        Features of all rows (sessions, or windows), float (N, P), given the rows they may be fitted on, int (n,).
    """

    vectors: Callable[[np.ndarray], np.ndarray]

    def predict(self, fold: Fold) -> np.ndarray:
        """Probabilities (m, K) or values (m, 1) of the test sessions."""
        vector_NP = self.vectors(fold.train)
        train_nP = vector_NP[fold.train]
        return fit_predict(fold, choose_penalty(fold, train_nP), train_nP, vector_NP[fold.test])


def choose_penalty(fold: Fold, train_nP: np.ndarray) -> float:
    """The penalty under which held-out training rows are predicted best, of features that nothing was fitted for."""
    inner_n = fold.inner()
    loss_L = held_out_losses(fold, [train_nP] * (inner_n.max() + 1), inner_n)
    return PENALTIES[int(loss_L.argmin())]


def scaling(train_nP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and scale of each feature, (P,) each: SD times sqrt(P); infinite for one without variance in training."""
    mean_P, sd_P = train_nP.mean(axis=0, dtype=np.float64), train_nP.std(axis=0, dtype=np.float64)
    alive_P = varies(mean_P, sd_P)
    return mean_P, np.where(alive_P, sd_P, np.inf) * np.sqrt(max(alive_P.sum(), 1))


def standardised_axes(train_nP: np.ndarray, test_mP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both sides z-scored by the training side, over sqrt(P), on its principal axes: (n, A) and (m, A).

    A linear model with a squared penalty on its coefficients has them in the span of the training rows, so it
    predicts the same from these at most n coordinates as from all P features; only the rotation is left out
    of the cost. With 1/sqrt(P) one grid of penalties fits features of any number. Features without variance
    in training are dropped.

    The axes are those of the smaller of the two Gram matrices, (n, n) and (P, P): windows can be tens of thousands.
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
    """Loss of the training rows under each penalty, each predicted from the other inner folds, (L,).

    Squared error, or log loss with every class counted alike.

    Parameters
    ----------
    fold : Fold
    vectors : sequence of float array
        One (n, P) for each inner fold: the training sessions by a pooling that did not see that inner fold.
    inner_n : int array
        Inner fold of each training row; rows of -1 are trained on and never predicted.
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
    """The linear model of a probe on these axes; classes count alike."""
    if fold.kind == "regression":
        return Ridge(alpha=penalty).fit(x_nA, y_n)
    # Newton: separable classes under a light penalty take lbfgs thousands of steps. Its matrix of second derivatives
    # is as wide as there are coefficients, so where those are many it is only multiplied with.
    coefficients = x_nA.shape[1] * (1 if fold.classes == 2 else fold.classes)
    solver = "newton-cholesky" if coefficients <= _WIDEST else "newton-cg"
    model = LogisticRegression(C=1 / penalty, class_weight="balanced", solver=solver, max_iter=200)
    return model.fit(x_nA, y_n)


def _loss(kind: str, guess_mK: np.ndarray, y_m: np.ndarray) -> float:
    """What is chosen by: squared error, or log loss with every class counted alike."""
    if kind == "regression":
        return float(((guess_mK[:, 0] - y_m) ** 2).mean())
    of_true_m = np.clip(guess_mK[np.arange(len(y_m)), y_m], 1e-12, 1)
    return float(np.mean([-np.log(of_true_m[y_m == k]).mean() for k in np.unique(y_m)]))
