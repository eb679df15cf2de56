"""Scores with weights on subjects, so that a bootstrap over subjects is one matrix product; p by permutation.

A draw of the bootstrap is how often each subject was drawn. Row 0 of the weights is all ones: the score
itself. What is scored is a subject, or one of its windows, which then has the weight of its subject.

Legend: D rows of weights (the score, then the draws); S subjects; U what is scored, subjects or windows; G runs of
equal values; K classes; N sessions; P features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

SMALLER_IS_BETTER = ("mse",)
# The one metric that a task is judged by, on the page of a run as in tables, by type of the task.
HEADLINE = {"classification": "auroc", "regression": "r", "fingerprint": "map", "state": "accuracy"}
# What guessing scores, whatever the data.
GUESSED = {"auroc": 0.5, "r": 0.0, "r2": 0.0, "mse": 1.0}
_WORDS = {"auroc": "AUROC", "map": "mAP", "top1": "top-1", "r2": "R²", "mse": "MSE", "f1": "F1"}
_BLOCK = 2**21  # weights that are held at a time, 16 MB


def words(metric: str) -> str:
    """How a metric is written; of errors, that lower is better."""
    return _WORDS.get(metric, metric.replace("_", " ")) + (" (lower is better)" if metric in SMALLER_IS_BETTER else "")


def caption(line: str, metrics: Sequence[str], levels: Mapping[str, float]) -> str:
    """What a line at chance is, naming the panels that have one where not all do; empty where none has.

    Parameters
    ----------
    line : str
        How it is drawn, such as "dotted".
    metrics : sequence of str
        Of the panels.
    levels : mapping of str to float
        Metrics that have the line.
    """
    having = [words(metric).split(" (")[0] for metric in metrics if metric in levels]
    where = "" if len(having) == len(metrics) else f" (of {', '.join(having)})"
    return f"{line}: chance{where}" if having else ""


def bootstrap_weights(subjects: int, draws: int, seed: int) -> np.ndarray:
    """How often each subject counts, float64 (1 + draws, S): once each, then samples with replacement."""
    rng = np.random.default_rng((seed, subjects))
    weight_DS, share_S = np.ones((1 + draws, subjects)), np.full(subjects, 1 / subjects)
    for weight_S in weight_DS[1:]:
        weight_S[:] = rng.multinomial(subjects, share_S)
    return weight_DS


def shuffles(group_U: np.ndarray, count: int, seed: int) -> Iterator[np.ndarray]:
    """So many orders in which answers are dealt out anew, int (U,), one after another: among those of one group only.

    Parameters
    ----------
    group_U : int array
        Answers are exchangeable inside a group: all subjects are one; the windows of a subject are one.
    count, seed : int
    """
    rng = np.random.default_rng((seed, len(group_U), 1))
    where_U = np.argsort(group_U, kind="stable")
    for _ in range(count):
        shuffled = rng.permutation(len(group_U))
        order_U = np.empty(len(group_U), np.int64)
        order_U[where_U] = shuffled[np.argsort(group_U[shuffled], kind="stable")]
        yield order_U


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
    score: Callable[[np.ndarray], dict[str, np.ndarray]], truth_U: np.ndarray, orders: Iterable[np.ndarray]
) -> dict[str, np.ndarray]:
    """Each metric under each shuffle of the answers, (shuffles,).

    Parameters
    ----------
    score : callable
        From answers (U,) to metrics, each an array whose first entry is the score.
    truth_U : array
    orders : iterable of int array
        From `shuffles`; without any there is no metric.
    """
    found = [{name: value_D[0] for name, value_D in score(truth_U[order_U]).items()} for order_U in orders]
    return {name: np.array([each[name] for each in found]) for name in (found[0] if found else ())}


def classification(
    truth_U: np.ndarray, probability_UK: np.ndarray, weight_DS: np.ndarray, subject_U: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Accuracy, balanced accuracy, AUROC and F1, each (D,): `Classification` for one set of answers."""
    return Classification(probability_UK, weight_DS, subject_U)(truth_U)


class Classification:
    """Accuracy, balanced accuracy, AUROC and F1 of predictions, for any answers.

    The last three are means over classes, each class against the rest. Predictions are sorted once, so the cost of one
    set of answers grows linearly with what is scored.

    Parameters
    ----------
    probability_UK : float array
    weight_DS : float array
    subject_U : int array, optional
        Whose weight, a column of `weight_DS`, each prediction has; by default each its own.
    """

    def __init__(self, probability_UK: np.ndarray, weight_DS: np.ndarray, subject_U: np.ndarray | None = None):
        self.weight_DS = weight_DS
        self.subject_U = np.arange(len(probability_UK)) if subject_U is None else subject_U
        self.guess_U = probability_UK.argmax(axis=1)
        self._sorted: list[tuple[np.ndarray, np.ndarray]] = []  # of each class: order, and where equal values begin
        for value_U in probability_UK.T:
            order_U = value_U.argsort(kind="stable")
            begins = np.flatnonzero(np.diff(value_U[order_U], prepend=np.nan) != 0)
            self._sorted.append((order_U, begins))

    def __call__(self, truth_U: np.ndarray) -> dict[str, np.ndarray]:
        """Each metric, (D,).

        Parameters
        ----------
        truth_U : int array
            Class of each subject or window.
        """
        rows = max(1, _BLOCK // len(truth_U))
        found = [
            self._block(truth_U, self.weight_DS[at : at + rows][:, self.subject_U])
            for at in range(0, len(self.weight_DS), rows)
        ]
        return {name: np.concatenate([each[name] for each in found]) for name in found[0]}

    def _block(self, truth_U: np.ndarray, weight_DU: np.ndarray) -> dict[str, np.ndarray]:
        recall, area, f1 = [], [], []
        total_D = weight_DU.sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            for k, (order_U, begins) in enumerate(self._sorted):
                is_k, said_k = truth_U == k, self.guess_U == k
                in_k_D, said_D = weight_DU @ is_k, weight_DU @ said_k
                hit_D = weight_DU @ (is_k & said_k)
                recall.append(hit_D / in_k_D)
                f1.append(2 * hit_D / (in_k_D + said_D))
                won_D = _won(weight_DU[:, order_U], is_k[order_U], begins)
                area.append(won_D / (in_k_D * (total_D - in_k_D)))
            accuracy_D = weight_DU @ (self.guess_U == truth_U) / total_D
        of_classes = {"balanced_accuracy": recall, "auroc": area, "f1": f1}
        return {"accuracy": accuracy_D, **{name: np.mean(values, axis=0) for name, values in of_classes.items()}}


def _won(weight_DU: np.ndarray, inside_U: np.ndarray, begins: np.ndarray) -> np.ndarray:
    """Weight of the pairs of one inside and one outside in which the one inside has the higher value, (D,).

    Mann-Whitney's U with weights; a pair of equal values counts half.

    Parameters
    ----------
    weight_DU : float array
        In ascending order of the values.
    inside_U : bool array
    begins : int array
        Where each run of equal values begins.
    """
    inside_DG = np.add.reduceat(weight_DU * inside_U, begins, axis=1)
    outside_DG = np.add.reduceat(weight_DU * ~inside_U, begins, axis=1)
    return (inside_DG * (outside_DG.cumsum(axis=1) - outside_DG / 2)).sum(axis=1)


def regression(truth_S: np.ndarray, guess_S: np.ndarray, weight_DS: np.ndarray) -> dict[str, np.ndarray]:
    """Pearson's r, R^2 and mean squared error, each (D,); NaN where a draw leaves them undefined."""
    total_D = weight_DS.sum(axis=1)

    def mean(value_S: np.ndarray) -> np.ndarray:
        return weight_DS @ value_S / total_D

    # Rounding leaves a variance of 1e-16 where all values of a draw are the same.
    variance_D = np.where(_varies(truth_S, weight_DS), mean(truth_S**2) - mean(truth_S) ** 2, np.nan)
    of_guess_D = np.where(_varies(guess_S, weight_DS), mean(guess_S**2) - mean(guess_S) ** 2, np.nan)
    shared_D = mean(truth_S * guess_S) - mean(truth_S) * mean(guess_S)
    mse_D = mean((truth_S - guess_S) ** 2)
    with np.errstate(invalid="ignore", divide="ignore"):
        return {"r": shared_D / np.sqrt(variance_D * of_guess_D), "r2": 1 - mse_D / variance_D, "mse": mse_D}


def _varies(value_S: np.ndarray, weight_DS: np.ndarray) -> np.ndarray:
    """Whether a draw holds more than one value, bool (D,)."""
    order_S = value_S.argsort()
    sorted_S, drawn_DS = value_S[order_S], weight_DS[:, order_S] > 0
    smallest_D = sorted_S[drawn_DS.argmax(axis=1)]
    largest_D = sorted_S[::-1][drawn_DS[:, ::-1].argmax(axis=1)]
    return smallest_D < largest_D


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
