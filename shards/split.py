"""Subjects into train, validation and test: never a subject in two of them."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping

SPLITS = ("train", "val", "test")


def _rank(seed: int, cohort: str, subject: str) -> str:
    return hashlib.sha256(f"{seed}/{cohort}/{subject}".encode()).hexdigest()


def split_subjects(
    strata: Mapping[tuple[str, str], str],
    shares: tuple[float, float, float] = (0.7, 0.1, 0.2),
    seed: int = 0,
) -> dict[tuple[str, str], str]:
    """Assign every subject to a split.

    Subjects are put in an order that depends on the seed and their names alone, and that order is cut at the given
    shares within each stratum, so each stratum (a cohort, or a cohort and a label) is divided alike. Of the leftover
    subjects the split that is furthest below its share gets the next; the train split wins a tie, so it is never empty.

    Parameters
    ----------
    strata : mapping of (cohort, subject) to str
        The stratum of each subject.
    shares : three floats
        Shares of train, validation and test; their sum is 1.
    seed : int

    Returns
    -------
    dict of (cohort, subject) to "train", "val" or "test"
    """
    groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for subject, stratum in strata.items():
        groups[stratum].append(subject)
    result: dict[tuple[str, str], str] = {}
    for stratum in sorted(groups):
        members = sorted(groups[stratum], key=lambda subject: _rank(seed, *subject))
        exact = [share * len(members) for share in shares]
        counts = [int(value + 1e-9) for value in exact]
        while sum(counts) < len(members):
            behind = [value - count for value, count in zip(exact, counts, strict=True)]
            counts[max(range(3), key=lambda split: (round(behind[split], 9), -split))] += 1
        names = [name for name, count in zip(SPLITS, counts, strict=True) for _ in range(count)]
        result.update(zip(members, names, strict=True))
    return result
