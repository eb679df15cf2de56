"""Scores with weights on subjects, so that a bootstrap over subjects is one matrix product; p by permutation.

A draw of the bootstrap is how often each subject was drawn. Row 0 of the weights is all ones: the score
itself. What is scored is a subject, or one of its windows, which then has the weight of its subject.

Legend: D rows of weights (the score, then the draws); S subjects, or what else is scored; K classes; N sessions; P
features.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

SMALLER_IS_BETTER = ("mse",)


def bootstrap_weights(subjects: int, draws: int, seed: int) -> np.ndarray:
    """How often each subject counts, float64 (1 + draws, S): once each, then samples with replacement."""
    rng = np.random.default_rng((seed, subjects))
    weight_DS = rng.multinomial(subjects, np.full(subjects, 1 / subjects), size=draws)
    return np.concatenate([np.ones((1, subjects)), weight_DS])


def shuffles(group_S: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Orders in which answers are dealt out anew, int (count, S): among those of one group only.

    Parameters
    ----------
    group_S : int array
        Answers are exchangeable inside a group: all subjects are one; the windows of a subject are one.
    count, seed : int
    """
    rng = np.random.default_rng((seed, len(group_S), 1))
    where_S = np.argsort(group_S, kind="stable")
    order = np.empty((count, len(group_S)), np.int64)
    for row in order:
        shuffled = rng.permutation(len(group_S))
        row[where_S] = shuffled[np.argsort(group_S[shuffled], kind="stable")]
    return order


def p_value(name: str, observed: float, shuffled: np.ndarray) -> float | None:
    """Share of shuffles that score as well as what was observed, which counts as one of them.

    (1 + number) / (1 + shuffles), after Phipson & Smyth, "Permutation p-values should never be zero" (2010).
    """
    if not np.isfinite(observed):
        return None
    known = shuffled[np.isfinite(shuffled)]
    as_good = known <= observed + 1e-12 if name in SMALLER_IS_BETTER else known >= observed - 1e-12
    return float((1 + as_good.sum()) / (1 + len(known)))


def permuted(
    score: Callable[[np.ndarray], dict[str, np.ndarray]], truth_S: np.ndarray, orders: np.ndarray
) -> dict[str, np.ndarray]:
    """Each metric under each shuffle of the answers, (shuffles,).

    Parameters
    ----------
    score : callable
        From answers (S,) to metrics, each an array whose first entry is the score.
    truth_S : array
    orders : int array
        From `shuffles`.
    """
    found = [score(truth_S[order]) for order in orders]
    return {name: np.array([each[name][0] for each in found]) for name in found[0]}


def interval(value_D: np.ndarray) -> dict[str, float | None]:
    """Score and its 95 % percentile interval; draws that leave it undefined (no such class) do not count."""
    known = value_D[1:][np.isfinite(value_D[1:])]
    low, high = np.quantile(known, (0.025, 0.975)) if len(known) else (np.nan, np.nan)
    return {
        name: float(value) if np.isfinite(value) else None
        for name, value in (("value", value_D[0]), ("low", low), ("high", high))
    }


def classification(truth_S: np.ndarray, probability_SK: np.ndarray, weight_DS: np.ndarray) -> dict[str, np.ndarray]:
    """Accuracy, balanced accuracy, AUROC and F1, each (D,).

    The last three are means over classes, each class against the rest.

    Parameters
    ----------
    truth_S : int array
        Class of each subject.
    probability_SK : float array
    weight_DS : float array
    """
    guess_S = probability_SK.argmax(axis=1)
    recall, area, f1 = [], [], []
    with np.errstate(invalid="ignore", divide="ignore"):
        for k in range(probability_SK.shape[1]):
            is_k, said_k = truth_S == k, guess_S == k
            in_k_D, said_D = weight_DS @ is_k, weight_DS @ said_k
            hit_D = weight_DS @ (is_k & said_k)
            recall.append(hit_D / in_k_D)
            f1.append(2 * hit_D / (in_k_D + said_D))
            inside, outside = probability_SK[is_k, k], probability_SK[~is_k, k]
            wins = (inside[:, None] > outside) + 0.5 * (inside[:, None] == outside)
            won_D = ((weight_DS[:, is_k] @ wins) * weight_DS[:, ~is_k]).sum(axis=1)
            area.append(won_D / (in_k_D * (weight_DS.sum(axis=1) - in_k_D)))
        accuracy_D = weight_DS @ (guess_S == truth_S) / weight_DS.sum(axis=1)
    of_classes = {"balanced_accuracy": recall, "auroc": area, "f1": f1}
    return {"accuracy": accuracy_D, **{name: np.mean(values, axis=0) for name, values in of_classes.items()}}


def regression(truth_S: np.ndarray, guess_S: np.ndarray, weight_DS: np.ndarray) -> dict[str, np.ndarray]:
    """Pearson's r, R^2 and mean squared error, each (D,)."""
    total_D = weight_DS.sum(axis=1)

    def mean(value_S: np.ndarray) -> np.ndarray:
        return weight_DS @ value_S / total_D

    variance_D = mean(truth_S**2) - mean(truth_S) ** 2
    of_guess_D = mean(guess_S**2) - mean(guess_S) ** 2
    shared_D = mean(truth_S * guess_S) - mean(truth_S) * mean(guess_S)
    mse_D = mean((truth_S - guess_S) ** 2)
    with np.errstate(invalid="ignore", divide="ignore"):
        return {"r": shared_D / np.sqrt(variance_D * of_guess_D), "r2": 1 - mse_D / variance_D, "mse": mse_D}


def fingerprint(vector_NP: np.ndarray, subject_N: np.ndarray) -> dict[str, np.ndarray]:
    """How well a session finds the others of its subject among all sessions: `top1` and `map`, each (S,).

    Similarity is the correlation of two sessions' vectors after the mean vector of all sessions was taken
    off; nothing is trained. `top1`: the most similar session is of the same subject. `map`: average precision
    of the ranking.
    """
    return found_again(ranking(vector_NP), subject_N)


def ranking(vector_NP: np.ndarray) -> np.ndarray:
    """The other sessions of each session, the most similar first; int (N, N - 1)."""
    similar_NN = np.corrcoef(vector_NP - vector_NP.mean(axis=0))
    np.fill_diagonal(similar_NN, -np.inf)
    return np.argsort(-similar_NN, axis=1, kind="stable")[:, :-1]


def found_again(ranked_NN: np.ndarray, subject_N: np.ndarray) -> dict[str, np.ndarray]:
    """`top1` and `map` of a ranking, each (S,), the mean over the sessions of a subject."""
    same_NN = subject_N[ranked_NN] == subject_N[:, None]
    precision_NN = same_NN.cumsum(axis=1) / np.arange(1, same_NN.shape[1] + 1)
    precision_N = (precision_NN * same_NN).sum(axis=1) / same_NN.sum(axis=1)
    _, number_N, sessions_S = np.unique(subject_N, return_inverse=True, return_counts=True)
    return {
        name: np.bincount(number_N, value_N) / sessions_S
        for name, value_N in (("top1", same_NN[:, 0].astype(float)), ("map", precision_N))
    }


def fingerprint_chance(subject_N: np.ndarray) -> dict[str, float]:
    """Expected `top1` and `map` of a random ranking, the mean over subjects of the mean over sessions.

    With r right ones among m, the place of a right one is uniform and the precision there is 1 plus the share
    of the other r - 1 that lie before it, over its place: E[AP] = (H_m + (r - 1) / (m - 1) (m - H_m)) / m,
    H_m = sum 1/i.
    """
    m = len(subject_N) - 1
    harmonic = (1 / np.arange(1, m + 1)).sum()
    right_S = np.unique(subject_N, return_counts=True)[1] - 1
    return {
        "top1": float((right_S / m).mean()),
        "map": float(((harmonic + (right_S - 1) / max(m - 1, 1) * (m - harmonic)) / m).mean()),
    }
