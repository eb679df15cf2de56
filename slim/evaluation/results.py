"""Results of tasks: scores with intervals, and the report in which they are stored.

    FOLDER/report.json    {"tasks": {NAME: {METHOD: {METRIC: {"value", "low", "high", "p"}}}}, "facts": {NAME: {...}}}

Its parts are checked when they are read. Other versions may add facts; what is neither a method nor a metric is not
shown.

Legend: D the score and its bootstrap draws.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr, model_validator

from shards.core.errors import ConfigError
from shards.core.files import dump, trouble, write_atomically
from shards.core.settings import check
from slim.checkpoints.run_folder import PROBE
from slim.evaluation import metrics

OURS = "ours"
Draws = dict[str, np.ndarray]  # of each metric (or task) the score and its bootstrap draws, (D,)
# Version 0.1 wrote an R² of up to 1e17 where draws of few subjects had one value alone.
Number = Annotated[float, Field(strict=True, ge=-1e20, le=1e20)]
# A name stands in a picture, whose text has a syntax of its own.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 _.()+-]{0,79}$")]
Count = Annotated[StrictInt, Field(ge=0, le=10**12)]
_MOST = 100  # methods of a task, metrics of a method
_QUESTION = ("type", "label", "split", "gallery", "subjects", "test_subjects")  # facts that say what was asked of whom
# What a task is judged by whose report does not tell its type, or lacks the metric of it: the first that it has.
_ELSE = ("auroc", "r", "map", "balanced_accuracy", "accuracy")


class Estimate(BaseModel):
    """A score with its uncertainty.

    Attributes
    ----------
    value : float or None
        None where it is undefined.
    low, high : float or None
        Ends of the 95 % interval over subjects.
    p : float or None
        Of a permutation test.
    seeds : tuple of float, optional
        Score of each training seed whose mean `value` is.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    value: Number | None
    low: Number | None = None
    high: Number | None = None
    p: Number | None = None
    seeds: tuple[float | None, ...] | None = None

    @model_validator(mode="after")
    def _has_both_ends(self) -> Estimate:
        if (self.low is None) != (self.high is None):
            raise ValueError("both ends of an interval, or none")
        return self

    @classmethod
    def of_draws(cls, *seeds_D: np.ndarray, **more: Any) -> Estimate:
        """The mean over training seeds, draw by draw, and its 95 % percentile interval.

        The interval describes the mean score of the recipe under another choice of test subjects. Draws for which the
        score is undefined (a class without subjects) are left out.

        Parameters
        ----------
        *seeds_D : float array
            Of each seed the score, then its bootstrap draws; all on the same draws of subjects.
        **more
            Other fields.
        """
        value_D = np.mean(seeds_D, axis=0)
        known = value_D[1:][np.isfinite(value_D[1:])]
        low, high = np.quantile(known, (0.025, 0.975)) if len(known) else (np.nan, np.nan)
        seeds = tuple(_finite(seed_D[0]) for seed_D in seeds_D)
        # scores beyond `Number` are written as they are
        return cls.model_construct(value=_finite(value_D[0]), low=_finite(low), high=_finite(high), seeds=seeds, **more)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Both ends of the interval; None if there is no interval."""
        return None if self.low is None or self.high is None else (self.low, self.high)

    def better_than(self, other: Estimate) -> bool | None:
        """Whether this score is higher and the intervals do not overlap; None if one has no interval."""
        if self.interval is None or other.interval is None:
            return None
        return self.interval[0] > other.interval[1]

    def tree(self) -> dict[str, object]:
        """The given fields as JSON-serialisable data, with the seeds if there are several."""
        one_seed = self.seeds is None or len(self.seeds) < 2
        return self.model_dump(mode="json", exclude_unset=True, exclude={"seeds"} if one_seed else None)


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


Estimates = dict[Name, Annotated[dict[Name, Estimate], Field(max_length=_MOST)]]  # method to metric to estimate


class SplitFacts(BaseModel):
    """How subjects were divided."""

    model_config = ConfigDict(extra="allow", frozen=True)

    kind: StrictStr | None = None
    folds: Count | None = None
    repeats: Count | None = None

    @model_validator(mode="after")
    def _is_counted(self) -> SplitFacts:
        if self.kind == "folds" and (self.folds is None or self.repeats is None):
            raise ValueError("folds and repeats of a split by folds")
        return self


class ShareResult(BaseModel):
    """What a few-shot share of the training subjects had and scored.

    Attributes
    ----------
    share : float
    subjects : (int, int)
        Fewest and most training subjects, with those of validation, of a split.
    classes : dict of class to (int, int), optional
        The same for each class.
    estimates : dict of method to dict of metric to Estimate
        Empty for share 1, whose scores are those of the task.
    differences : dict of method to dict of metric to Estimate
        Of this encoder minus a method, on the same draws of subjects.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    share: Annotated[float, Field(gt=0, le=1)]
    subjects: tuple[Count, Count]
    classes: dict[str, tuple[Count, Count]] | None = None
    estimates: Annotated[Estimates, Field(max_length=_MOST)] = {}
    differences: Annotated[Estimates, Field(max_length=_MOST)] = {}

    @property
    def people(self) -> str:
        """The number of training subjects in words: `6`, or `5 to 6`."""
        return _span(self.subjects)

    @property
    def people_by_class(self) -> str:
        """The number of training subjects in words, with those of each class: `6 (A 3, B 3)`."""
        of_class = ", ".join(f"{name} {_span(count)}" for name, count in (self.classes or {}).items())
        return f"{self.people} ({of_class})" if of_class else self.people

    def tree(self) -> dict[str, object]:
        """For JSON: the fields that were given."""
        found = self.model_dump(mode="json", exclude_unset=True)
        of_methods = {"estimates": self.estimates, "differences": self.differences}
        return found | {name: _trees(each) for name, each in of_methods.items() if name in found}


class SiteResult(BaseModel):
    """The scores of a site, whose people were predicted by models of the other sites.

    Attributes
    ----------
    people : int
    estimates : dict of method to dict of metric to Estimate
        Of the people of the site alone.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    people: Count
    estimates: Annotated[Estimates, Field(max_length=_MOST)] = {}

    def tree(self) -> dict[str, object]:
        """For JSON."""
        return {"people": self.people, "estimates": _trees(self.estimates)}


def _span(count: tuple[int, int]) -> str:
    return str(count[0]) if count[0] == count[1] else f"{count[0]} to {count[1]}"


class TaskFacts(BaseModel):
    """Facts about a task: its labels, subjects and settings. It may hold more, such as facts about one method."""

    model_config = ConfigDict(extra="allow", frozen=True)

    type: StrictStr | None = None
    label: StrictStr | None = None
    pooling: StrictStr | None = None
    components: Count | None = None
    split: SplitFacts | None = None
    bootstrap: Count | None = None
    permutations: Count | None = None
    confounds: tuple[StrictStr, ...] = ()
    sessions: Count | None = None
    subjects: Count | None = None
    test_subjects: Count | None = None
    tested: StrictStr | None = None
    subjects_seen_in_pretraining: Count | None = None
    left_out: dict[str, Count] = {}
    short_sessions: Count | None = None
    seeds: list[StrictInt] | StrictInt | None = None
    windows: Count | None = None
    gallery: Count | None = None
    sites: dict[str, SiteResult] = {}
    listed_without_scan: Count | None = None
    classes: dict[str, Count] | list[StrictStr] | None = None
    chance: dict[str, Number | None] | None = None
    differences: Annotated[Estimates, Field(max_length=_MOST)] = {}
    shares: Annotated[tuple[ShareResult, ...], Field(max_length=_MOST)] = ()

    def tree(self) -> dict[str, object]:
        """For JSON: the fields that were given."""
        found = self.model_dump(mode="json", exclude_unset=True)
        if "differences" in found:
            found["differences"] = _trees(self.differences)
        if "sites" in found:
            found["sites"] = {name: site.tree() for name, site in self.sites.items()}
        if "shares" in found:
            found["shares"] = [share.tree() for share in self.shares]
        return found

    def with_facts(self, **more: Any) -> TaskFacts:
        """Return a copy with further facts."""
        return TaskFacts.model_validate({**self.tree(), **more})

    def says_unknown(self, fact: str) -> bool:
        """Whether a fact is recorded as unknown."""
        return fact in self.model_fields_set and getattr(self, fact) is None

    def chance_of(self, metric: str) -> float | None:
        """The score of guessing; None if it depends on the data or is unknown."""
        told = (self.chance or {}).get(metric)
        if told is not None or self.type == "fingerprint":
            return told
        if metric == "balanced_accuracy" and self.classes:
            return 1 / len(self.classes)
        return metrics.GUESSED.get(metric)


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """The result of a task: scores of all methods, and facts about the task.

    Attributes
    ----------
    name : str
    estimates : dict of method to dict of metric to Estimate
    facts : TaskFacts
        With `differences`, of this encoder minus a method, on the same draws of subjects.
    draws : Draws
        Of each metric of this encoder, the mean over training seeds; see `slim.evaluation.draws`. Empty when read from
        a report.
    """

    name: str
    estimates: Estimates
    facts: TaskFacts
    draws: Draws = field(default_factory=dict)

    @property
    def metrics(self) -> list[str]:
        """The metrics of all methods, in order of appearance."""
        return list(dict.fromkeys(metric for mine in self.estimates.values() for metric in mine))

    @property
    def judged_by(self) -> str | None:
        """The metric of the task's type, as in all tables: see `slim.evaluation.metrics.HEADLINE`."""
        usual = metrics.HEADLINE.get(str(self.facts.type))
        return next((metric for metric in (usual, *_ELSE) if metric and self.estimate(OURS, metric)), None)

    @property
    def levels(self) -> dict[str, float]:
        """The scores of guessing for metrics for which it is known."""
        return {metric: level for metric in self.metrics if (level := self.facts.chance_of(metric)) is not None}

    def estimate(self, method: str, metric: str) -> Estimate | None:
        """The estimate of a method; None if it does not exist or is undefined."""
        found = self.estimates.get(method, {}).get(metric)
        return found if found is not None and found.value is not None else None

    def compare(self, method: str, mine: str = OURS) -> int | None:
        """Compare `mine` with a method: 1 if it is better, -1 if it is worse, 0 if the difference is not clear.

        It uses the paired difference if there is one, otherwise whether intervals overlap. None if neither is known.
        """
        metric = self.judged_by
        first, second = (self.estimate(name, metric) if metric else None for name in (mine, method))
        if metric is None or first is None or second is None:
            return None
        paired = self.facts.differences.get(method, {}).get(metric) if mine == OURS else None
        if paired is not None and paired.interval is not None:
            return int(paired.interval[0] > 0) - int(paired.interval[1] < 0)
        better, worse = first.better_than(second), second.better_than(first)
        return None if better is None or worse is None else int(better) - int(worse)

    def only(self, methods: Iterable[str]) -> TaskResult:
        """Return the result with only these methods, in this order."""
        return replace(self, estimates={name: self.estimates[name] for name in methods if name in self.estimates})


def _trees(estimates: Estimates) -> dict[str, dict[str, object]]:
    return {name: {metric: one.tree() for metric, one in mine.items()} for name, mine in estimates.items()}


class _Checked(BaseModel):
    model_config = ConfigDict(extra="ignore")

    tasks: dict[str, Annotated[Estimates, Field(max_length=_MOST)]]
    facts: dict[str, TaskFacts] = {}


class Report:
    """The report in a folder. Fields of other versions are kept."""

    def __init__(self) -> None:
        self._tasks: dict[str, Any] = {}
        self._facts: dict[str, Any] = {}
        self._results: dict[str, TaskResult] = {}

    @classmethod
    def read(cls, path: Path) -> Report:
        """Read a report; an empty one if the file does not exist.

        Raises
        ------
        ConfigError
            If the file is not a report.
        """
        report = cls()
        if not path.exists():
            return report
        hint = "Move it away, or run the probe again"
        expected = "a report.json written by slim-brain probe"
        if found := trouble(path):
            raise ConfigError(path, "", found.got, expected, found.hint)
        try:
            tree = json.loads(path.read_bytes().decode("utf-8-sig"))
        except (OSError, ValueError, RecursionError) as error:
            got = f"what cannot be read ({type(error).__name__}: {error})"
            raise ConfigError(path, "", got, expected, hint) from None
        if not isinstance(tree, dict) or not isinstance(tree.get("tasks"), dict):
            raise ConfigError(path, "", "no report of probes", expected, hint)
        measured = {name: _measured(task) for name, task in tree["tasks"].items()}
        checked = check(_Checked, {**tree, "tasks": measured}, path)
        report._tasks, report._facts = dict(tree["tasks"]), dict(tree.get("facts") or {})
        for name, estimates in checked.tasks.items():
            report._results[name] = TaskResult(
                name=name, estimates=estimates, facts=checked.facts.get(name, TaskFacts())
            )
        return report

    @property
    def results(self) -> dict[str, TaskResult]:
        """The results of all tasks, by name."""
        return {name: self._results[name] for name in sorted(self._results)}

    def differs(self, name: str, facts: TaskFacts) -> tuple[str, object, object] | None:
        """The first fact about labels or subjects of a task that differs from the report.

        Returns
        -------
        tuple or None
            Name of the fact, its value in `facts`, and its value in the report; None if nothing differs, or the report
            does not have the task.
        """
        if name not in self._facts:
            return None
        before, asked = self._facts[name], facts.tree()
        pairs = ((fact, asked.get(fact), before.get(fact)) for fact in _QUESTION)
        return next((found for found in pairs if dump(found[1]) != dump(found[2])), None)

    def add(self, result: TaskResult) -> TaskResult:
        """Add a task to the report, and return its complete result.

        Earlier results of other methods on the same task and subjects are kept.
        """
        name = result.name
        tasks, facts = _trees(result.estimates), result.facts.tree()
        if name in self._results and name in self._facts and self.differs(name, result.facts) is None:
            before = self._results[name]
            facts = self._facts[name] | facts
            merged = TaskFacts.model_validate(facts)
            tasks = self._tasks[name] | tasks
            result = TaskResult(name=name, estimates={**before.estimates, **result.estimates}, facts=merged)
        self._tasks[name], self._facts[name], self._results[name] = tasks, facts, result
        return result

    def tree(self) -> dict[str, Any]:
        """For JSON."""
        return {"tasks": self._tasks, "facts": self._facts}

    def write(self, folder: Path) -> None:
        """Write FOLDER/report.json."""
        write_atomically(folder / PROBE, dump(self.tree()) + "\n")


def _measured(task: Any) -> Any:
    """The scores of a task that have a value. Only these are shown."""
    if not isinstance(task, dict):
        return task
    methods = {name: cells for name, cells in task.items() if isinstance(cells, dict)}
    return {
        name: {metric: cell for metric, cell in cells.items() if isinstance(cell, dict) and "value" in cell}
        for name, cells in methods.items()
    }


def averaged(seeds: Sequence[Draws]) -> Draws:
    """Mean of each metric, draw by draw."""
    return {name: np.mean([each[name] for each in seeds], axis=0) for name in (seeds[0] if seeds else ())}
