"""Splits by lists of subjects and by sites."""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from helpers.commands import ROOT
from helpers.tasks import GROUP, SCORE, WHO, cases_of, sessions, task
from shards.core.errors import ConfigError
from slim.checkpoints.run_folder import PROBE
from slim.evaluation import display, probe
from slim.evaluation.division import make_splits
from slim.evaluation.linear import Linear
from slim.evaluation.task import Cases, find_cases
from slim.reporting import run_health

pytestmark = pytest.mark.fast

SIDES = ("train", "train", "validation", "test")


def data(subjects: int = 40, **labels: Callable[[int], Any]) -> Any:
    return sessions(subjects, 2, group=lambda s: "AB"[s // 4 % 2], score=float, **labels)


def subjects_of(cases: Cases, rows: np.ndarray) -> set[str]:
    return {cases.sessions[row].subject for row in rows}


def test_a_column_says_who_is_where() -> None:
    chosen = task(GROUP | {"split": {"kind": "listed", "column": "fold"}})
    found = cases_of(chosen, data(fold=lambda s: None if s == 5 else SIDES[s % 4]))
    ((split,),) = make_splits(chosen, found, "")
    assert subjects_of(found, split.train) == {str(s) for s in range(40) if s % 4 < 2 and s != 5}
    assert subjects_of(found, split.val) == {str(s) for s in range(40) if s % 4 == 2}
    assert subjects_of(found, split.test) == {str(s) for s in range(40) if s % 4 == 3}
    assert found.left_out == {"on no side of the split": 2}


@pytest.mark.parametrize("ending", [".tsv", ".csv", ".json"])
def test_a_file_gives_the_same_split_as_a_column(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"lists{ending}"
    sides = {f"sub-{s}": SIDES[s % 4] for s in range(40)}
    if ending == ".json":
        path.write_text(json.dumps({name: [s for s, side in sides.items() if side == name] for name in set(SIDES)}))
    else:
        mark = "\t" if ending == ".tsv" else ","
        path.write_text("".join(f"{s}{mark}{side}\n" for s, side in {"subject": "split", **sides}.items()))
    by_file = task(GROUP | {"split": {"kind": "listed", "file": path.name}})
    by_column = task(GROUP | {"split": {"kind": "listed", "column": "fold"}})
    where = tmp_path / "task.yaml"
    one = find_cases(by_file, data(), where)
    fewer = data()
    fewer.sessions = [session for session in fewer.sessions if int(session.subject) >= 7]
    less = find_cases(by_file, fewer, where)
    assert (one.unscanned, less.unscanned) == (0, 7)
    facts = probe.task_facts(by_file, less, make_splits(by_file, less, where))
    assert facts.listed_without_scan == 7
    other = find_cases(by_column, data(fold=lambda s: SIDES[s % 4]), where)
    assert other.unscanned is None
    for mine, theirs in zip(make_splits(by_file, one, where)[0], make_splits(by_column, other, where)[0], strict=True):
        for side in ("train", "val", "test"):
            assert np.array_equal(getattr(mine, side), getattr(theirs, side)) and len(getattr(mine, side))


def test_each_site_is_tested_once_and_never_trained_on() -> None:
    chosen = task(SCORE | {"split": {"kind": "sites", "column": "site"}})
    found = cases_of(chosen, data(site=lambda s: None if s == 0 else ("UCLA", "NYU", "Pitt")[s % 3]))
    (splits,) = make_splits(chosen, found, "")
    tested = []
    for split in splits:
        (site,) = {found.sessions[row].labels["site"] for row in split.test}
        assert site not in {found.sessions[row].labels["site"] for row in split.fitted}
        tested += split.test.tolist()
    assert len(splits) == 3 and sorted(tested) == list(range(78))
    assert found.left_out == {"without a site": 2}


def test_differences_between_sites_alone_are_no_finding(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Sites differ in their share of patients, and models of sites in their level: p is of shuffles within a site."""
    chosen = task(GROUP | {"split": {"kind": "sites", "column": "site"}})
    found = cases_of(
        chosen,
        sessions(
            90, 1, site=lambda s: ("NYU", "Pitt", "UCLA")[s % 3], group=lambda s: "AB"[s // 3 % 10 < 2 + 3 * (s % 3)]
        ),
    )

    class OfSites:
        """Predicts the share of the tested site."""

        def __init__(self, noise: float) -> None:
            self.noise = noise

        def predict(self, fold: Any) -> np.ndarray:
            (site,) = np.unique(found.group_S[found.subject_N[fold.test]])
            rng = np.random.default_rng(len(fold.test))
            level = {"NYU": 0.2, "Pitt": 0.5, "UCLA": 0.8}[site]
            own = self.noise * (found.truth_S[found.subject_N[fold.test]] - 0.5)
            guess_m = level + 0.001 * rng.normal(size=len(fold.test)) + own
            return np.stack([1 - guess_m, guess_m], axis=1)

    result = probe.run_task(chosen, found, {"ours": OfSites(0.0), "random": OfSites(0.002)}, "")
    blind, able = (result.estimates[name]["auroc"] for name in ("ours", "random"))
    assert blind.value > 0.65 and blind.p > 0.05
    assert able.value > blind.value and able.p == 0.01
    of_sites = result.facts.sites
    assert {site: one.people for site, one in of_sites.items()} == {"NYU": 30, "Pitt": 30, "UCLA": 30}
    for one in of_sites.values():  # what the sites differ in is no help inside of one
        inside = one.estimates["ours"]["auroc"]
        assert inside.low < 0.5 < inside.high and one.estimates["random"]["auroc"].value > blind.value

    report = probe.write_report(tmp_path, [result])
    tree = json.loads((tmp_path / PROBE).read_text())["facts"]["g"]["sites"]
    assert tree["Pitt"]["people"] == 30 and tree["Pitt"]["estimates"]["ours"].keys() == result.estimates["ours"].keys()
    assert report.results["g"].facts.sites["Pitt"].estimates["ours"]["auroc"].value == pytest.approx(
        of_sites["Pitt"].estimates["ours"]["auroc"].value
    )
    display.print_table(result, "title")
    assert "ours, UCLA (30)" in capsys.readouterr().out
    (page,) = [part for part in run_health.probes(run_health.read_tasks(tmp_path / PROBE)) if "UCLA" in str(part)]
    assert "this run, UCLA (30)" in str(page)


def test_a_site_where_all_have_one_class_has_no_auroc(capsys: pytest.CaptureFixture) -> None:
    chosen = task(GROUP | {"split": {"kind": "sites", "column": "site"}})
    names = ["[b]NYU"] * 6 + ["Pitt"] * 18 + ["UCLA"] * 16
    places = sessions(40, 1, site=names.__getitem__, group=lambda s: "A" if s < 6 else "AB"[s % 2])
    found = cases_of(chosen, places)
    noise_NP = np.random.default_rng(0).normal(size=(40, 3))
    result = probe.run_task(chosen, found, {"ours": Linear(lambda train: noise_NP)}, "")
    alone = result.facts.sites["[b]NYU"].estimates["ours"]
    assert alone["auroc"].value is None and alone["accuracy"].value is not None
    display.print_table(result, "title")
    assert "ours, [b]NYU (6)" in (told := capsys.readouterr().out) and "n/a" in told


def test_a_fingerprint_of_the_listed_test_subjects() -> None:
    chosen = task(WHO | {"split": {"kind": "listed", "column": "fold"}})
    ((split,),) = make_splits(chosen, cases_of(chosen, data(fold=lambda s: SIDES[s % 4])), "")
    assert len(split.test) == 20


def lists_of_brainmarks(folder: Path) -> Mapping[str, Path]:
    """Lists in the forms of Brainmarks, of made-up subjects 0 to 39: two thirds train, the rest validation and test."""
    side_of = {s: ("train", "train", "train", "train", "validation", "test")[s % 6] for s in range(40)}
    found = {}
    for name, column in (("ABIDE_curated", "sub"), ("PPMI_curated", "Subject")):
        rows = [f"{number},{s:07d},{side},1\n" for number, (s, side) in enumerate(side_of.items())]
        found[name] = folder / f"{name}.csv"
        found[name].write_text(f",{column},split,dx\n" + "".join(rows))
    sides = {"train": "Train", "validation": "Val", "test": "Test"}
    scans = [{"PTID": f"002_S_{s:04d}", "SCANDATE": "2020-01-01", "Partition": sides[it]} for s, it in side_of.items()]
    scans += [scans[0], scans[1] | {"Partition": "Test"}]  # a second scan of two people, one of them on another side
    found["ADNI_curation"] = folder / "ADNI_curation.json"
    found["ADNI_curation"].write_text(json.dumps(scans))
    batches = {f"batch-{batch:02d}": [str(2 * batch), str(2 * batch + 1)] for batch in range(20)}
    found["hcpya_subject_batch_splits"] = folder / "hcpya_subject_batch_splits.json"
    found["hcpya_subject_batch_splits"].write_text(json.dumps(batches))
    found["aabc.mni.arrow"] = folder / "aabc.mni.arrow"
    for side in sides:
        (found["aabc.mni.arrow"] / side).mkdir(parents=True)
        (found["aabc.mni.arrow"] / side / "subjects").write_text(
            " ".join(str(s) for s in side_of if side_of[s] == side)
        )
    return found


@pytest.mark.parametrize(
    ("name", "subject", "counts", "torn"),
    [
        ("ABIDE_curated", "{:07d}", (28, 6, 6), 0),
        ("PPMI_curated", "{:07d}", (28, 6, 6), 0),
        ("ADNI_curation", "ADNI002S{:04d}", (27, 6, 6), 1),
        ("hcpya_subject_batch_splits", "{}", (16, 4, 4), 0),
        ("aabc.mni.arrow", "{}", (28, 6, 6), 0),
    ],
)
def test_the_script_of_the_documentation_turns_lists_of_brainmarks_into_a_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, name: str, subject: str, counts: tuple, torn: int
) -> None:
    page = (ROOT / "docs/how_to/published_splits.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    (tmp_path / "brainmarks_splits.py").write_text(code)
    read = SimpleNamespace(load_from_disk=lambda path: {"sub": (Path(path) / "subjects").read_text().split()})
    monkeypatch.setitem(sys.modules, "datasets", read)
    monkeypatch.setattr(sys, "argv", ["x", str(lists_of_brainmarks(tmp_path)[name]), str(tmp_path / "lists.csv")])
    runpy.run_path(str(tmp_path / "brainmarks_splits.py"), run_name="__main__")
    assert f"{torn} people on two sides left out" in capsys.readouterr().out

    scanned = sessions(40, 2, group=lambda s: "AB"[(s + s // 6) % 2])
    for number, session in enumerate(scanned.sessions):
        scanned.sessions[number] = session.model_copy(update={"subject": subject.format(int(session.subject))})
    chosen = task(GROUP | {"split": {"kind": "listed", "file": "lists.csv"}})
    found = find_cases(chosen, scanned, tmp_path / "task.yaml")
    ((split,),) = make_splits(chosen, found, tmp_path / "task.yaml")
    people = [len(subjects_of(found, rows)) for rows in (split.train, split.val, split.test)]
    assert tuple(people) == counts
    assert found.left_out == ({"on no side of the split": 2 * (40 - sum(counts))} if sum(counts) < 40 else {})
    assert found.unscanned == 0


@pytest.mark.parametrize(
    ("split", "match"),
    [
        ({"kind": "listed"}, "split.kind: got listed, expected either split.column or split.file"),
        ({"kind": "listed", "column": "a", "file": "b"}, "expected either split.column or split.file"),
        ({"kind": "sites"}, "expected split.column, the column of the site"),
        ({"kind": "folds", "column": "a"}, "split.column: got a value, expected nothing: split.kind folds draws"),
        ({"kind": "sites", "column": "a", "family": "b"}, "split.family"),
    ],
)
def test_settings_that_contradict_each_other(split: dict, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        task(GROUP | {"split": split})


def test_what_is_wrong_in_lists_is_named(tmp_path: Path) -> None:
    where, lists = tmp_path / "task.yaml", tmp_path / "lists.csv"
    chosen = task(GROUP | {"split": {"kind": "listed", "file": "lists.csv"}})

    def refusal(text: str) -> str:
        lists.write_text(text)
        with pytest.raises(ConfigError) as error:
            make_splits(chosen, find_cases(chosen, data(), where), where)
        assert "\n" not in error.value.line()
        return error.value.line()

    assert "columns subject, side, expected a column split" in refusal("subject,side\n1,train\n")
    assert "split: got trial, expected train, validation or test" in refusal("subject,split\n1,trial\n")
    assert "1: got train and test, expected one side" in refusal("subject,split\n1,train\nsub-1,test\n")
    assert "no session of data (80 on no side of the split)" in refusal("subject,split\nnobody,train\n")
    assert "training" in refusal("subject,split\n1,test\n2,test\n4,test\n5,test\n")
    lists.unlink()
    with pytest.raises(ConfigError, match=r"lists\.csv"):
        find_cases(chosen, data(), where)
    broken = tmp_path / "lists.json"
    chosen = task(GROUP | {"split": {"kind": "listed", "file": "lists.json"}})
    for text in ("[1]", '{"train": 3}', "{"):
        broken.write_text(text)
        with pytest.raises(ConfigError, match="lists such as"):
            find_cases(chosen, data(), where)


def test_a_column_without_values_and_a_single_site_are_refused() -> None:
    chosen = task(GROUP | {"split": {"kind": "sites", "column": "nothing"}})
    with pytest.raises(ConfigError, match=r"split\.column: got nothing, which no session has"):
        cases_of(chosen, data())
    chosen = task(GROUP | {"split": {"kind": "sites", "column": "site"}})
    with pytest.raises(ConfigError, match="one value, NYU, expected two or more sites"):
        make_splits(chosen, cases_of(chosen, data(site=lambda s: "NYU")), "")
    chosen = task(GROUP | {"split": {"kind": "sites", "column": "site"}})
    with pytest.raises(ConfigError, match=r"split\.column: got both 'NYU' and 'nyu' in column site"):
        cases_of(chosen, data(site=lambda s: ("NYU", "nyu", "Pitt")[s % 3]))
    alone = data(site=lambda s: "NYU" if s // 4 % 2 else "Pitt")
    with pytest.raises(
        ConfigError, match=r"got 0 training subjects of class B \(20 in all\) without the site NYU"
    ) as error:
        make_splits(chosen, cases_of(chosen, alone), "task.yaml")
    assert "\n" not in error.value.line()
    torn = data(site=lambda s: "NYU")
    torn.sessions[0] = torn.sessions[0].model_copy(update={"labels": {**torn.sessions[0].labels, "site": "Pitt"}})
    with pytest.raises(ConfigError, match="Pitt and NYU for subject 0"):
        cases_of(chosen, torn)
