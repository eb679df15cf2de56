"""Metrics with weights of subjects, so that a bootstrap over subjects is one matrix product; permutation tests.

A draw of the bootstrap is the number of times that each subject was drawn. Row 0 of the weights is all ones, which
gives the score itself. Scores are over subjects, or over windows with the weights of their subjects.

Legend: D rows of weights (the score, then the draws); S subjects; U scored units, subjects or windows; G groups of
equal values; K classes; N sessions; P features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

SMALLER_IS_BETTER = ("mse",)
# The main metric of each type of task, on the page of a run and in tables.
HEADLINE = {"classification": "auroc", "regression": "r", "fingerprint": "map", "state": "accuracy"}
# Scores of guessing that do not depend on the data.
GUESSED = {"auroc": 0.5, "r": 0.0, "r2": 0.0, "mse": 1.0}
_WORDS = {"auroc": "AUROC", "map": "mAP", "top1": "top-1", "r2": "R²", "mse": "MSE", "f1": "F1"}
_BLOCK = 2**21  # number of weights in memory at once, 16 MB


def words(metric: str) -> str:
    """The name of a metric for display; for errors, with the remark that lower is better."""
    return _WORDS.get(metric, metric.replace("_", " ")) + (" (lower is better)" if metric in SMALLER_IS_BETTER else "")


def caption(line: str, metrics: Sequence[str], levels: Mapping[str, float]) -> str:
    """Describe the line at chance level, with the panels that have it if not all do; empty if none has.

    Parameters
    ----------
    line : str
        Style of the line, such as "dotted".
    metrics : sequence of str
        Metrics of the panels.
    levels : mapping of str to float
        Metrics with a line.
    """
    having = [words(metric).split(" (")[0] for metric in metrics if metric in levels]
    where = "" if len(having) == len(metrics) else f" (of {', '.join(having)})"
    return f"{line}: chance{where}" if having else ""


def bootstrap_weights(subjects: int, draws: int, seed: int) -> np.ndarray:
    """Weights of subjects, float64 (1 + draws, S): a row of ones, then numbers of draws with replacement."""
    rng = np.random.default_rng((seed, subjects))
    weight_DS, share_S = np.ones((1 + draws, subjects)), np.full(subjects, 1 / subjects)
    for weight_S in weight_DS[1:]:
        weight_S[:] = rng.multinomial(subjects, share_S)
    return weight_DS


def shuffles(group_U: np.ndarray, count: int, seed: int) -> Iterator[np.ndarray]:
    """Iterate over `count` random permutations of the labels, int (U,), which permute only inside groups.

    Parameters
    ----------
    group_U : int array
        Groups of units with exchangeable labels: all subjects, or the windows of one subject.
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
    """p value: the share of permutations with a score at least as good as the observed one, which is included.

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
    """Each metric for each permutation of the labels, (permutations,).

    Parameters
    ----------
    score : callable
        Computes metrics from labels (U,), as arrays with the score as the first entry.
    truth_U : array
    orders : iterable of int array
        Result of `shuffles`. Without permutations, there are no metrics.
    """
    found = [{name: value_D[0] for name, value_D in score(truth_U[order_U]).items()} for order_U in orders]
    return {name: np.array([each[name] for each in found]) for name in (found[0] if found else ())}


def classification(
    truth_U: np.ndarray, probability_UK: np.ndarray, weight_DS: np.ndarray, subject_U: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Accuracy, balanced accuracy, AUROC and F1, each (D,): `Classification` for one set of labels."""
    return Classification(probability_UK, weight_DS, subject_U)(truth_U)


class Classification:
    """Accuracy, balanced accuracy, AUROC and F1 of predictions, for any labels.

    The last three are means over classes, each class against the rest. Predictions are sorted only once, so the cost of
    one set of labels is linear in the number of units.

    Parameters
    ----------
    probability_UK : float array
    weight_DS : float array
    subject_U : int array, optional
        Column of `weight_DS` for each prediction; by default, prediction u has column u.
    """

    def __init__(self, probability_UK: np.ndarray, weight_DS: np.ndarray, subject_U: np.ndarray | None = None):
        self.weight_DS = weight_DS
        self.subject_U = np.arange(len(probability_UK)) if subject_U is None else subject_U
        self.guess_U = probability_UK.argmax(axis=1)
        self._sorted: list[tuple[np.ndarray, np.ndarray]] = []  # by class: order, start of equal values
        for value_U in probability_UK.T:
            order_U = value_U.argsort(kind="stable")
            begins = np.flatnonzero(np.diff(value_U[order_U], prepend=np.nan) != 0)
            self._sorted.append((order_U, begins))

    def __call__(self, truth_U: np.ndarray) -> dict[str, np.ndarray]:
        """Compute each metric, (D,).

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
    """Weighted Mann-Whitney U, (D,): weight of the pairs in which the unit inside the class has the higher value.

    Pairs of equal values count half.

    Parameters
    ----------
    weight_DU : float array
        Sorted by ascending values.
    inside_U : bool array
    begins : int array
        Start of each group of equal values.
    """
    inside_DG = np.add.reduceat(weight_DU * inside_U, begins, axis=1)
    outside_DG = np.add.reduceat(weight_DU * ~inside_U, begins, axis=1)
    return (inside_DG * (outside_DG.cumsum(axis=1) - outside_DG / 2)).sum(axis=1)


def regression(truth_S: np.ndarray, guess_S: np.ndarray, weight_DS: np.ndarray) -> dict[str, np.ndarray]:
    """Pearson's r, R^2 and mean squared error, each (D,); NaN if they are undefined in a draw."""
    total_D = weight_DS.sum(axis=1)

    def mean(value_S: np.ndarray) -> np.ndarray:
        return weight_DS @ value_S / total_D

    # Because of rounding, the variance of equal values is about 1e-16.
    variance_D = np.where(_varies(truth_S, weight_DS), mean(truth_S**2) - mean(truth_S) ** 2, np.nan)
    of_guess_D = np.where(_varies(guess_S, weight_DS), mean(guess_S**2) - mean(guess_S) ** 2, np.nan)
    shared_D = mean(truth_S * guess_S) - mean(truth_S) * mean(guess_S)
    mse_D = mean((truth_S - guess_S) ** 2)
    with np.errstate(invalid="ignore", divide="ignore"):
        return {"r": shared_D / np.sqrt(variance_D * of_guess_D), "r2": 1 - mse_D / variance_D, "mse": mse_D}


def _varies(value_S: np.ndarray, weight_DS: np.ndarray) -> np.ndarray:
    """Whether a draw has more than one value, bool (D,)."""
    order_S = value_S.argsort()
    sorted_S, drawn_DS = value_S[order_S], weight_DS[:, order_S] > 0
    smallest_D = sorted_S[drawn_DS.argmax(axis=1)]
    largest_D = sorted_S[::-1][drawn_DS[:, ::-1].argmax(axis=1)]
    return smallest_D < largest_D


def fingerprint(vector_NP: np.ndarray, subject_N: np.ndarray) -> dict[str, np.ndarray]:
    """Identification of subjects: `top1` and `map`, each (S,).

    Sessions are ranked by the correlation of their vectors, after subtracting the mean vector of all sessions. Nothing
    is trained. `top1`: the most similar session is of the same subject. `map`: average precision of the ranking.
    """
    return found_again(ranking(vector_NP), subject_N)


def similarity(vector_NP: np.ndarray) -> np.ndarray:
    """Correlation of the vectors of sessions, after subtracting the mean vector of all sessions; (N, N).

    NaN for a vector without variance.
    """
    with np.errstate(invalid="ignore"):
        return np.corrcoef(vector_NP - vector_NP.mean(axis=0))


def ranking(vector_NP: np.ndarray) -> np.ndarray:
    """The other sessions of each session, the most similar first; int (N, N - 1)."""
    similar_NN = similarity(vector_NP)
    np.fill_diagonal(similar_NN, -np.inf)
    return np.argsort(-similar_NN, axis=1, kind="stable")[:, :-1]


def found_again(ranked_NN: np.ndarray, subject_N: np.ndarray) -> dict[str, np.ndarray]:
    """`top1` and `map` of a ranking, each (S,), as means over the sessions of a subject."""
    same_NN = subject_N[ranked_NN] == subject_N[:, None]
    precision_NN = same_NN.cumsum(axis=1) / np.arange(1, same_NN.shape[1] + 1)
    precision_N = (precision_NN * same_NN).sum(axis=1) / same_NN.sum(axis=1)
    _, number_N, sessions_S = np.unique(subject_N, return_inverse=True, return_counts=True)
    return {
        name: np.bincount(number_N, value_N) / sessions_S
        for name, value_N in (("top1", same_NN[:, 0].astype(float)), ("map", precision_N))
    }


def fingerprint_chance(subject_N: np.ndarray) -> dict[str, float]:
    """Expected `top1` and `map` of a random ranking, as means over subjects of means over sessions.

    With r correct sessions among m, the position i of a correct one is uniform, and the precision there is 1 plus the
    expected number of other correct ones before it, divided by i. This gives
    E[AP] = (H_m + (r - 1) / (m - 1) (m - H_m)) / m with H_m = sum 1/i.
    """
    m = len(subject_N) - 1
    harmonic = (1 / np.arange(1, m + 1)).sum()
    right_S = np.unique(subject_N, return_counts=True)[1] - 1
    return {
        "top1": float((right_S / m).mean()),
        "map": float(((harmonic + (right_S - 1) / max(m - 1, 1) * (m - harmonic)) / m).mean()),
    }
