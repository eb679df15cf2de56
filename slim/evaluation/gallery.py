"""Re-identification: find a person among n people by another session.

A gallery holds one session (enrolled) of each of n people. Another session of each of them is a query, for which the
enrolled sessions are ranked by similarity. `top1` is the share of queries that are most similar to their own person
(rank-1 accuracy). `map` is the mean average precision: the mean of 1 / rank, because one enrolled session is right.

A score is the mean over random galleries, and its interval resamples people and galleries.

Legend: N sessions; S people; R galleries; n people of a gallery; D rows of weights (the score, then the draws).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_GALLERIES = 50  # smallest number of random galleries


@dataclass(frozen=True)
class Galleries:
    """Random galleries.

    Attributes
    ----------
    person_Rn : int array (R, n)
        The people of each gallery, from 0 in the order of their subjects.
    enrolled_Rn, query_Rn : int arrays (R, n)
        Their sessions, as rows: the enrolled one, and the query.
    """

    person_Rn: np.ndarray
    enrolled_Rn: np.ndarray
    query_Rn: np.ndarray

    @classmethod
    def draw(cls, subject_N: np.ndarray, size: int, seed: int) -> Galleries:
        """Draw galleries: the people in random order, `size` at a time, again and again.

        Parameters
        ----------
        subject_N : int array
            Subject of each session. Each has two or more sessions.
        size : int
            Number of people of a gallery, n; at most S.
        seed : int
        """
        rng = np.random.default_rng((seed, size, 2))
        rows_of = [np.flatnonzero(subject_N == subject) for subject in np.unique(subject_N)]
        each = -(-len(rows_of) // size)  # galleries until everybody was in one; the last has some people again
        people = []
        for _ in range(-(-_GALLERIES // each)):
            order_S = rng.permutation(len(rows_of))
            people += [order_S[np.arange(at, at + size) % len(order_S)] for at in range(0, each * size, size)]
        pairs = [[rng.permutation(rows_of[person])[:2] for person in people_n] for people_n in people]
        pairs_Rn2: np.ndarray = np.array(pairs)
        return cls(np.array(people), pairs_Rn2[..., 0], pairs_Rn2[..., 1])

    def values(self, similar_NN: np.ndarray, order_N: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """`top1` and `map` of each query, (R, n) each.

        Parameters
        ----------
        similar_NN : float array
            Similarity of sessions, -inf if it is unknown. Of equally similar ones, the right one counts as the last.
        order_N : int array, optional
            A permutation of the sessions, for a permutation test: the row n stands for the session `order_N[n]`.
        """
        rank_Rn = np.empty(self.query_Rn.shape, np.int64)
        for rank_n, enrolled_n, query_n in zip(rank_Rn, self.enrolled_Rn, self.query_Rn, strict=True):
            if order_N is not None:
                enrolled_n, query_n = order_N[enrolled_n], order_N[query_n]
            similar_nn = similar_NN[query_n[:, None], enrolled_n]
            rank_n[:] = (similar_nn >= np.diagonal(similar_nn)[:, None]).sum(axis=1)
        return {"top1": (rank_Rn == 1).astype(float), "map": 1 / rank_Rn}

    def means(self, value_Rn: np.ndarray, weight_DS: np.ndarray, weight_DR: np.ndarray) -> np.ndarray:
        """Weighted means over all queries, (D,): a query has the weight of its person times that of its gallery."""
        gallery_R1 = np.arange(len(value_Rn))[:, None]
        value_SR, known_SR = (np.zeros((weight_DS.shape[1], len(value_Rn))) for _ in range(2))
        value_SR[self.person_Rn, gallery_R1] = value_Rn
        known_SR[self.person_Rn, gallery_R1] = 1
        total_D, count_D = (((weight_DS @ part_SR) * weight_DR).sum(axis=1) for part_SR in (value_SR, known_SR))
        with np.errstate(invalid="ignore"):
            return total_D / count_D


def chance(size: int) -> dict[str, float]:
    """`top1` and `map` of a random ranking of n people: 1 / n, and the mean of 1 / rank."""
    return {"top1": 1 / size, "map": float((1 / np.arange(1, size + 1)).mean())}
