"""Tasks of probes: a task from YAML, and its sessions or windows with labels.

Legend: N rows: sessions, or windows of tasks that decode states (n of training, m of test); S subjects.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import numpy as np
from pydantic import Field, ValidationInfo, field_validator, model_validator

from shards.core.errors import ConfigError
from shards.core.settings import Contradiction, Settings, Unit, load, read_yaml
from shards.format.reader import Dataset
from shards.format.session_record import SessionRecord
from slim.evaluation import events, listed
from slim.evaluation.events import EventSettings
from slim.evaluation.labels import is_missing, number, refuse_lookalikes, word
from slim.evaluation.splits import TaskSplitSettings

__all__ = [
    "Cases",
    "Task",
    "find_cases",
    "load_task",
    "load_tasks",
    "overrides_of_tasks",
]

Pooling = Literal["mean", "mean+sd", "location", "attentive", "cov", "patterns"]


class Task(Settings):
    """A task for frozen features: labels to predict, and how they are tested."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="name of the task in reports and file names")
    type: Literal["classification", "regression", "fingerprint", "state"] = Field(
        description="fingerprint: which sessions belong to the same subject; state: the state in a window"
    )
    label: str | None = Field(default=None, description="column of the participants table")
    classes: dict[str, tuple[str, ...]] | None = Field(
        default=None, description="values of the column for each class; sessions with other values are left out"
    )
    edges: Annotated[tuple[float, ...], Unit("label")] = Field(
        default=(), description="ascending numbers that divide the column into classes"
    )
    missing: tuple[str, ...] = Field(default=(), description="codes of missing values, such as -9999")
    events: EventSettings | None = Field(default=None, description="for type: state, tables of the events")
    split: TaskSplitSettings = TaskSplitSettings()
    gallery: Annotated[int | None, Unit("subjects")] = Field(
        default=None,
        ge=2,
        description="for type: fingerprint, number of people among whom a person is found by another session; by "
        "default, each session is looked for among all sessions",
    )
    pooling: Pooling = Field("cov", description="how the tokens of a sample become one vector")
    components: Annotated[int | None, Unit("components")] = Field(
        default=None,
        ge=1,
        description="principal components: of each token for `cov` (by default 3), of all places for `patterns` (64)",
    )
    confounds: tuple[str, ...] = Field(
        default=(), description="columns, or facts of a session such as mean_fd_mm, that are scored as a baseline"
    )
    bootstrap: Annotated[int, Unit("draws")] = Field(
        default=1000, ge=100, description="bootstrap draws of subjects for each interval"
    )
    permutations: Annotated[int, Unit("shuffles")] = Field(
        default=1000, ge=99, description="permutations of the labels for each p value"
    )
    data: str = Field(default="", description="expected folder of the data, and how to make it")
    description: str = Field("", description="title of the task, for display")
    source: str = Field(default="", description="source of the data, and their licence")

    @field_validator("pooling")
    @classmethod
    def _learns_nothing(cls, pooling: Pooling, info: ValidationInfo) -> Pooling:
        if pooling == "attentive" and info.data.get("type") == "fingerprint":
            raise ValueError(
                "mean, mean+sd, location, cov or patterns: a fingerprint trains nothing, attention is trained"
            )
        return pooling

    @model_validator(mode="after")
    def _consistent(self) -> Task:
        if (self.events is not None) != (self.type == "state"):
            if self.events is None:
                raise Contradiction("events", "nothing", "the events from which states are decoded", "Add this key")
            raise Contradiction("events", "a value", f"nothing: a {self.type} has none", "Remove events")
        if (self.classes or self.edges) and self.type != "classification":
            key = "classes" if self.classes else "edges"
            raise Contradiction(key, "a value", f"nothing: a {self.type} has none", f"Remove {key}")
        if self.classes and self.edges:
            raise Contradiction("edges", list(self.edges), "either classes or edges", "Remove one of them")
        if self.classes:
            taken: dict[str, str] = {}
            for name, values in self.classes.items():
                for value in map(word, values):
                    if taken.setdefault(value, name) != name:
                        got = f"{value} in {taken[value]} and in {name}"
                        raise Contradiction("classes", got, "each value in one class")
        if self.gallery is not None and self.type != "fingerprint":
            raise Contradiction("gallery", self.gallery, f"nothing: a {self.type} has none", "Remove gallery")
        if list(self.edges) != sorted(set(self.edges)):
            raise Contradiction("edges", list(self.edges), "ascending numbers")
        if self.type == "fingerprint":
            if self.label is not None:
                raise Contradiction("label", self.label, "nothing: a fingerprint identifies subjects", "Remove label")
            if self.split.kind not in ("all", "dataset", "listed"):
                expected = "all, dataset or listed: a fingerprint trains nothing"
                raise Contradiction("split.kind", self.split.kind, expected)
            if self.confounds:
                expected = "nothing: a fingerprint identifies subjects"
                raise Contradiction("confounds", list(self.confounds), expected, "Remove confounds")
            if self.split.share != (1.0,):
                expected = "nothing: a fingerprint trains nothing"
                raise Contradiction("split.share", list(self.split.share), expected, "Remove split.share")
        elif self.type == "state":
            if self.label is not None:
                raise Contradiction("label", self.label, "nothing: states come from events", "Remove label")
            if self.pooling not in ("mean", "location"):
                expected = "mean or location of a window: the others need a whole scan"
                raise Contradiction("pooling", self.pooling, expected)
            if self.confounds:
                expected = "nothing: they are the same in all windows of a session"
                raise Contradiction("confounds", list(self.confounds), expected, "Remove confounds")
        elif self.label is None:
            raise Contradiction("label", "nothing", f"the column that this {self.type} predicts", "Add this key")
        if self.type != "fingerprint" and self.split.kind == "all":
            raise Contradiction("split.kind", "all", f"another split: a {self.type} is fitted")
        return self


def load_task(path: str | Path, assignments: Sequence[str] = ()) -> Task:
    """A checked task from a YAML file and `key=value` overrides.

    Raises
    ------
    ConfigError
        With the file (or the command line), field, got and expected.
    """
    return load(Task, path, assignments)


def overrides_of_tasks(
    paths: Sequence[Path], assignments: Sequence[str], keys: Collection[str] = frozenset(Task.model_fields)
) -> tuple[list[list[str]], list[str]]:
    """Divide the `key=value` overrides of a call into those of each task and the others.

    `NAME.key=value` is for the task NAME, unless NAME is one of `keys`.

    Parameters
    ----------
    paths : sequence of Path
        The files of the tasks.
    assignments : sequence of str
    keys : collection of str
        Keys of what `key=value` without a name is for.

    Returns
    -------
    of_tasks : list of list of str
        For each file, overrides with keys of a task.
    others : list of str
        Overrides without the name of a task.
    """
    names = [str(read_yaml(path).get("name")) for path in paths]
    of_tasks: list[list[str]] = [[] for _ in paths]
    others = []
    for assignment in assignments:
        named = [name for name in names if assignment.startswith(f"{name}.")]
        if not named or assignment.partition("=")[0].partition(".")[0] in keys:
            others.append(assignment)
            continue
        name = max(named, key=len)  # names may have dots
        for mine, found in zip(names, of_tasks, strict=True):
            if mine == name:
                found.append(assignment.removeprefix(f"{name}."))
    return of_tasks, others


def load_tasks(paths: Sequence[Path], assignments: Sequence[str]) -> list[tuple[Task, list[str]]]:
    """Tasks and the overrides that were applied to them: `key=value` to all, `NAME.key=value` to the task NAME.

    Raises
    ------
    ConfigError
    """
    of_tasks, of_all = overrides_of_tasks(paths, assignments)
    return [(load_task(path, found := [*of_all, *mine]), found) for path, mine in zip(paths, of_tasks, strict=True)]


@dataclass
class Cases:
    """The rows of a task: sessions or windows, with their subjects and labels.

    Attributes
    ----------
    sessions : list of SessionRecord
        Session of each row.
    subject_N : subject of each row, int, a row of `subjects`
    subjects : (people, subject) of each subject: equal for the same person in cohorts with the same `people`
    truth_S : class number or value of each subject (the mean over sessions if they differ); 0 for
        fingerprints, and for tasks on windows
    classes : names of the classes, in order of their numbers
    left_out : how many sessions (windows) were left out, by reason
    family_S : family of each subject, int; a subject without one is its own
    group_S : side or site of each subject, for the splits `listed` and `sites`
    unscanned : how many subjects in a file of lists have no session in the dataset; None without a file
    window_N : start (s) of each row's window; None for tasks on sessions
    state_N : class number of each row's window; None for tasks on sessions
    """

    sessions: list[SessionRecord]
    subject_N: np.ndarray
    subjects: list[tuple[str, str]]
    truth_S: np.ndarray
    classes: list[str] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)
    family_S: np.ndarray = field(default_factory=lambda: np.arange(0))
    group_S: np.ndarray = field(default_factory=lambda: np.array([], str))
    unscanned: int | None = None
    window_N: np.ndarray | None = None
    state_N: np.ndarray | None = None

    def __post_init__(self) -> None:
        if not len(self.family_S):
            self.family_S = np.arange(len(self.subjects))

    @property
    def answer_N(self) -> np.ndarray:
        """The label of each row."""
        return self.truth_S[self.subject_N] if self.state_N is None else self.state_N

    def distinct(self) -> list[SessionRecord]:
        """The sessions without duplicates."""
        return [*{id(session): session for session in self.sessions}.values()]


def find_cases(task: Task, dataset: Dataset, where: str | Path, event_root: Path | None = None) -> Cases:
    """Find the sessions of `dataset`, or their windows, that can be used for `task`.

    Parameters
    ----------
    task : Task
    dataset : Dataset
    where : str or Path
        File of the task, named in errors.
    event_root : Path, optional
        Folder of events; by default the one in the task.

    Raises
    ------
    ConfigError
        If no session has the label, a value does not fit the task, a subject has two classes or two families, values of
        a column are ambiguous (1 and 01), a confound is the same for all subjects, or there are no events.
    """
    left_out: Counter[str] = Counter()
    kept = []
    is_given = task.split.kind in ("listed", "sites")
    groups = listed.groups(task.split, dataset.sessions, task.missing, where) if is_given else listed.Groups({})
    group_of = groups.of_person
    for session in dataset.sessions:
        missing = [name for name in task.confounds if is_missing(session.fact(name), task.missing)]
        value = None if task.label is None else session.labels.get(task.label)
        if task.label is not None and is_missing(value, task.missing):
            left_out["without the label"] += 1
        elif task.type == "classification" and _class(value, task, where) is None:
            left_out["of another class"] += 1
        elif is_given and session.person not in group_of:
            left_out["on no side of the split" if task.split.kind == "listed" else "without a site"] += 1
        elif missing:
            left_out[f"without {missing[0]}"] += 1
        else:
            kept.append(session)
    if task.type == "fingerprint":
        count = Counter(session.person for session in kept)
        left_out["only session of its subject"] = sum(count[session.person] == 1 for session in kept)
        kept = [session for session in kept if count[session.person] > 1]
    windows: list[tuple[float, str]] = []
    if task.events is not None:
        root = event_root or Path(where).parent / (task.events.root or ".")
        kept, windows = _windows(task.events, dataset, kept, root, where, left_out)
    if not kept:
        _nothing(task, dataset, left_out, where)

    subjects = sorted({session.person for session in kept})
    place_of = {subject: index for index, subject in enumerate(subjects)}
    subject_N = np.array([place_of[session.person] for session in kept])
    cases = Cases(kept, subject_N, subjects, np.zeros(len(subjects)))
    cases.left_out = {reason: count for reason, count in left_out.items() if count}
    cases.family_S = _families(task, cases, where)
    if is_given:
        cases.group_S = np.array([group_of[subject] for subject in subjects])
        cases.unscanned = groups.unscanned
    if task.type == "state":
        cases.classes = sorted({state for _, state in windows})
        cases.window_N = np.array([start for start, _ in windows])
        cases.state_N = np.array([cases.classes.index(state) for _, state in windows])
    elif task.type == "classification":
        values = [_class(session.labels[str(task.label)], task, where) or "" for session in kept]
        cases.classes = sorted(set(values))
        if not task.classes and not task.edges:
            refuse_lookalikes(cases.classes, str(task.label), where, "label")
        value_N = np.array([cases.classes.index(value) for value in values])
        for index, subject in enumerate(subjects):
            found = sorted({cases.classes[value] for value in value_N[subject_N == index]})
            if len(found) > 1:
                got = f"{' and '.join(found)} for subject {subject[1]} of {subject[0]}"
                raise ConfigError(where, "label", got, "one class for each subject")
        cases.truth_S = np.array([value_N[subject_N == index][0] for index in range(len(subjects))])
    elif task.type == "regression":
        value_N = np.array([_number(session.labels[str(task.label)], task, where) for session in kept])
        cases.truth_S = np.array([value_N[subject_N == index].mean() for index in range(len(subjects))])
    _check_confounds(task, cases, where)
    return cases


def _check_confounds(task: Task, cases: Cases, where: str | Path) -> None:
    """Refuse confounds that are the same for all subjects, and ambiguous values."""
    for name in task.confounds:
        values = [session.fact(name) for session in cases.sessions]
        words = {word(value) for value in values}
        if len(words) == 1:
            got = f"the same value {words.pop()} of {name} for all {len(cases.subjects)} people"
            raise ConfigError(where, "confounds", got, "values that differ", "Take it out of the confounds")
        if any(number(value) is None for value in values):
            refuse_lookalikes(words, name, where, "confounds")


def _windows(
    settings: EventSettings,
    dataset: Dataset,
    sessions: list[SessionRecord],
    root: Path,
    where: str | Path,
    left_out: Counter[str],
) -> tuple[list[SessionRecord], list[tuple[float, str]]]:
    """The kept windows with a state: their sessions, starts (s) and states, in time order."""
    rows, found = [], []
    occurring: set[str] = set()
    for session in sessions:
        start_W = np.sort(dataset.read(session, ("start",))["start"]) * float(session.tr)
        table = events.read(settings, root, session, where)
        occurring.update(table["state"])
        names = events.states(table, start_W, dataset.frames * session.tr, settings.delay)
        for start, name in zip(start_W.tolist(), names, strict=True):
            if name is None:
                left_out["of no state, or of two (windows)"] += 1
            else:
                rows.append(session)
                found.append((start, name))
    absent = [state for state in settings.keep if state not in occurring]
    if sessions and absent:
        hint = "Correct the names, or leave these states out of `keep`"
        raise ConfigError(where, "events.keep", f"{', '.join(absent)} in no scan", "states that occur", hint)
    return rows, found


def _nothing(task: Task, dataset: Dataset, left_out: Counter[str], where: str | Path) -> NoReturn:
    """Raise the error that explains why no session can be used for the task."""
    columns = sorted({name for session in dataset.sessions for name in session.labels})
    if task.label is not None and left_out["without the label"]:
        raise ConfigError(
            where,
            "label",
            f"{task.label}, which no session of {dataset.folder} has",
            f"one of {', '.join(columns) or 'the labels (the dataset has none)'}",
        )
    reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items() if count)
    raise ConfigError(where, "", f"no session of {dataset.folder} ({reasons})", "sessions of use")


def _families(task: Task, cases: Cases, where: str | Path) -> np.ndarray:
    """Family of each subject, int (S,). A subject without a family is a family."""
    column = task.split.family
    family_S = np.arange(len(cases.subjects))
    if column is None:
        return family_S
    first: dict[str, int] = {}
    for index, subject in enumerate(cases.subjects):
        mine = [cases.sessions[row].labels for row in np.flatnonzero(cases.subject_N == index)]
        found = {word(labels[column]) for labels in mine if not is_missing(labels.get(column), task.missing)}
        if len(found) > 1:
            got = f"{' and '.join(sorted(found))} for subject {subject[1]}"
            raise ConfigError(where, "split.family", got, "one family for each subject")
        if found:
            family_S[index] = first.setdefault(found.pop(), index)
    if not first:
        got = f"{column}, which no session has"
        raise ConfigError(where, "split.family", got, "a column of the participants table")
    refuse_lookalikes(first, column, where, "split.family")
    return family_S


def _class(value: Any, task: Task, where: str | Path) -> str | None:
    """The class of a label; None if it does not belong to any class of the task."""
    if task.classes is not None:
        found = word(value)
        return next((name for name, values in task.classes.items() if found in map(word, values)), None)
    if not task.edges:
        return word(value)
    position, edges = _number(value, task, where), task.edges
    place = sum(position >= edge for edge in edges)
    if place == 0:
        return f"below {edges[0]:g}"
    return f"from {edges[place - 1]:g}" + (f" to {edges[place]:g}" if place < len(edges) else "")


def _number(value: Any, task: Task, where: str | Path) -> float:
    found = number(value)
    if found is None:
        hint = "Use type: classification, list the value under `missing`, or take another column"
        raise ConfigError(where, "label", f"{value!r} in column {task.label}", "a number", hint)
    return found
