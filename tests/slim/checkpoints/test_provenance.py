"""What a run writes down about itself: the commit of this software, and who was seen in training."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from collections.abc import Callable
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from helpers.conversions import edited
from helpers.pretrained import ALIGNED, tool, write_run, write_weights
from launchers.run_setup import git_commit, prepare_run
from shards.core.errors import ConfigError, UserError
from shards.core.settings import check
from shards.format import layout
from shards.format.reader import Dataset
from slim import __version__ as version
from slim.checkpoints import checkpoint, run_folder
from slim.checkpoints.provenance import Provenance
from slim.checkpoints.run_folder import PROVENANCE, SEEN
from slim.checkpoints.seen import Seen
from slim.config import PretrainSettings, load_run
from slim.data.samples import geometry_for
from slim.evaluation.division import make_splits
from slim.evaluation.task import Task, find_cases
from slim.finetune.method import Finetuned
from slim.inference import export
from slim.inference.slim_brain import SlimBrain
from slim.pretrain.task import PretrainTask
from slim.reporting.run_page import total_steps


def git(folder: Path, *words: str) -> str:
    who = ("-c", "user.name=somebody", "-c", "user.email=somebody@example.org")
    done = subprocess.run(["git", "-C", str(folder), *who, *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def repository(folder: Path, *tracked: str) -> str:
    """A repository with one commit of these files: its name."""
    for name in tracked:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("first")
    git(folder, "init", "-q")
    git(folder, "add", *tracked)
    git(folder, "commit", "-q", "-m", "first")
    return git(folder, "rev-parse", "HEAD")


def test_the_commit_is_that_of_this_software(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of the repository of a study that it happens to be installed in, nor of one that the environment names."""
    commit = repository(tmp_path / "slim-brain", "launchers/run_setup.py", "slim/evaluation/probe.py")
    source = tmp_path / "slim-brain/launchers/run_setup.py"
    assert git_commit(source) == commit
    (tmp_path / "slim-brain/note.txt").write_text("of no commit")
    assert git_commit(source) == commit
    (tmp_path / "slim-brain/slim/evaluation/probe.py").write_text("changed")
    assert git_commit(source) == f"{commit}+"

    repository(tmp_path / "study", "paper.tex")
    installed = tmp_path / "study/.venv/lib/site-packages/launchers/run_setup.py"
    installed.parent.mkdir(parents=True)
    installed.write_text("first")
    assert git_commit(installed) == "unknown"
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "study/.git"))
    assert git_commit(source) == f"{commit}+"
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    assert git_commit(source) == "unknown"


def test_a_copy_in_another_repository_has_the_commit_that_holds_it(tmp_path: Path) -> None:
    commit = repository(tmp_path, "third_party/slim-brain/launchers/run_setup.py", "ours.py")
    (tmp_path / "ours.py").write_text("changed")  # no change of this software
    assert git_commit(tmp_path / "third_party/slim-brain/launchers/run_setup.py") == commit


def test_a_run_says_what_wrote_it_and_what_was_chosen(dataset: Path, tmp_path: Path) -> None:
    tree = load_run(write_run(tmp_path / "old", dataset, ALIGNED) / "config.yaml").model_dump(mode="json")
    tree["run"] |= {"out": str(tmp_path / "run"), "wandb": "disabled", "batch": 4}
    prepare_run(check(PretrainSettings, tree, "test"))
    found = Provenance.read(tmp_path / "run")
    assert found.commit == git_commit() and found.software == version
    assert found.versions == {name: installed(name) for name in ("torch", "deepspeed", "numpy", "zarr")}
    assert found.chosen == {"loss.sig_samples": 4, "zero.stage": 0}  # left open: samples of a batch; one process
    assert load_run(tmp_path / "run/config.yaml").loss.sig_samples == 4


def test_version_01_wrote_it_into_comments_of_the_configuration(dataset: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "old", dataset, ALIGNED)
    assert Provenance.read(run) == Provenance(commit="5e1f+", versions={"numpy": "2.4.6"})
    made = SlimBrain.from_pretrained(run).made
    assert made["commit"] == "5e1f+" and made["versions"]["numpy"] == "2.4.6" and "slim-brain" not in made["versions"]


def test_a_checkpoint_has_the_provenance_it_was_written_with(run: Path) -> None:
    saved = run / "checkpoints" / checkpoint.tag(7)
    written = replace_provenance(saved, commit="abc")
    assert SlimBrain.from_pretrained(run).made["commit"] == "abc"
    assert SlimBrain.from_pretrained(run).made["versions"]["slim-brain"] == version
    (saved / PROVENANCE).write_text(written.replace("abc", "abd"))
    with pytest.raises(UserError, match=r"provenance\.json"):
        SlimBrain.from_pretrained(run)
    replace_provenance(saved)


def replace_provenance(saved: Path, **changes: str) -> str:
    Provenance.read(saved.parents[1]).model_copy(update=changes).write(saved)
    write_weights(saved, load_file(saved / checkpoint.WEIGHTS))
    return (saved / PROVENANCE).read_text()


@pytest.mark.parametrize("text", ["", "[]", "{", '{"commit": 3}', '{"versions": ["torch"]}', "[" * 100_000])
def test_a_provenance_that_is_none_is_told_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / PROVENANCE).write_text(text)
    with pytest.raises(UserError, match=r"provenance\.json") as told:
        Provenance.read(tmp_path)
    assert "\n" not in told.value.line()


# who was seen


@pytest.fixture(scope="module")
def datasets(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The small dataset; another with three of its people and four strangers; and that one grown by all others."""
    folder = tmp_path_factory.mktemp("datasets")

    def other(session: dict[str, Any]) -> list[dict[str, Any]]:
        number = int(session["subject"])
        again = {"cohort": "later", "key": f"later_{number}", "split": "train" if number % 2 else "test"}
        shared = [session | again] if number <= 3 else []  # whose people are those of the first
        strange = {"people": "elsewhere", "key": f"strange_{number}", "subject": f"9{number}"}
        return [*shared, *([session | again | strange] if number > 2 else [])]

    def grown(session: dict[str, Any]) -> list[dict[str, Any]]:
        new = {"key": f"new_{session['subject']}", "cohort": "later", "subject": f"7{session['subject']}"}
        return [*other(session), session | new | {"people": "later", "split": "train"}]

    cohorts = {"cohorts": ["later"]}
    return {
        "first": dataset,
        "second": edited(dataset, folder / "second", other, **cohorts),
        "grown": edited(dataset, folder / "grown", grown, **cohorts),
    }


def names_of(people: set[tuple[str, str]] | None) -> set[str] | None:
    return None if people is None else {"/".join(who) for who in people}


@pytest.fixture(scope="module")
def run(datasets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the first two datasets, as it lies there when it has begun; its checkpoint."""
    folder = tmp_path_factory.mktemp("seen")
    made = write_run(folder / "made", datasets["first"], ALIGNED)
    tree = load_run(made / "config.yaml").model_dump(mode="json")
    tree["data"] = [{"path": str(datasets[name])} for name in ("first", "second")]
    tree["run"] |= {"out": str(folder / "run"), "wandb": "disabled"}
    prepare_run(check(PretrainSettings, tree, "test"))
    saved = folder / "run/checkpoints" / checkpoint.tag(7)
    shutil.copytree(made / "checkpoints" / checkpoint.tag(7), saved)
    for name in (*run_folder.ABOUT_RUN, *run_folder.ALSO_ABOUT_RUN):
        shutil.copyfile(folder / "run" / name, saved / name)
    write_weights(saved, load_file(saved / checkpoint.WEIGHTS))
    return folder / "run"


def trained_people(path: Path) -> set[str]:
    return {f"{s['people']}/{s['subject']}" for s in layout.read_lines(path / layout.SESSIONS) if s["split"] == "train"}


def test_people_are_known_over_all_datasets_and_in_one_that_has_grown(run: Path, datasets: dict[str, Path]) -> None:
    everybody = trained_people(datasets["first"]) | trained_people(datasets["second"])
    written = json.loads((run / SEEN).read_text())
    counts = [Dataset(datasets[name]).manifest.sessions["train"] for name in ("first", "second")]
    assert written == {"people": sorted(everybody), "salt": None, "sessions": counts}
    model = SlimBrain.from_pretrained(run)
    for path in datasets.values():
        there = {f"{s.people}/{s.subject}" for s in Dataset(path).sessions}
        assert names_of(model.seen_people(Dataset(path))) == everybody & there
        assert 0 < len(everybody & there) < len(there)
        model.check_data(Dataset(path))


def test_who_was_seen_travels_with_a_checkpoint_and_as_hashes_with_an_export(
    run: Path, datasets: dict[str, Path], tmp_path: Path
) -> None:
    moved = shutil.copytree(run / "checkpoints", tmp_path / "moved/checkpoints") / checkpoint.tag(7)
    ours, grown = SlimBrain.from_pretrained(run), Dataset(datasets["grown"])
    expected = ours.seen_people(grown)
    assert SlimBrain.from_pretrained(moved).seen_people(grown) == expected
    export.write(ours, tmp_path / "export")
    theirs = SlimBrain.from_pretrained(tmp_path / "export")
    assert theirs.seen_people(grown) == expected
    written = json.loads((tmp_path / "export/config.json").read_text())["seen"]
    assert len(written["people"]) == len(ours.seen.people) and written["salt"]
    content = (tmp_path / "export/config.json").read_text()
    assert not any(name in content for name in ours.seen.people)
    card = (tmp_path / "export/README.md").read_text()
    assert f"a salted hash for each of the {len(ours.seen.people)} subjects seen in pretraining" in card
    with open(moved / SEEN, "a") as file:
        file.write(" ")
    with pytest.raises(UserError, match=r"seen\.json"):
        SlimBrain.from_pretrained(moved)


def test_of_a_run_of_version_01_it_is_said_what_is_not_known(datasets: dict[str, Path], tmp_path: Path) -> None:
    old = write_run(tmp_path / "old", datasets["first"], ALIGNED)
    model = SlimBrain.from_pretrained(old)
    assert names_of(model.seen_people(Dataset(datasets["first"]))) == trained_people(datasets["first"])  # its own data
    assert model.seen_people(Dataset(datasets["grown"])) is None
    export.write(model, tmp_path / "export")
    assert "Version 0.1 did not record" in (tmp_path / "export/README.md").read_text()
    assert SlimBrain.from_pretrained(tmp_path / "export").seen_people(Dataset(datasets["second"])) is None
    tree = json.loads((old / "config.yaml").read_text().split("\n", 3)[3])
    tree["data"].append({"path": str(datasets["second"])})
    for place in (old, old / "checkpoints" / checkpoint.tag(7)):
        (place / "config.yaml").write_text(json.dumps(tree))
    saved = old / "checkpoints" / checkpoint.tag(7)
    write_weights(saved, load_file(saved / checkpoint.WEIGHTS))
    assert SlimBrain.from_pretrained(old).seen_people(Dataset(datasets["first"])) is None  # of two, one is known


def test_a_fine_tuning_keeps_who_was_seen_before_it(run: Path, datasets: dict[str, Path], tmp_path: Path) -> None:
    ours, data = SlimBrain.from_pretrained(run), Dataset(datasets["grown"])
    tree = {"name": "s", "type": "regression", "label": "score", "split": {"kind": "holdout", "repeats": 1}}
    task = check(Task, tree | {"split": {**tree["split"], "shares": [0.5, 0.2, 0.3]}}, "task.yaml")
    cases = find_cases(task, data, "task.yaml")
    splits = make_splits(task, cases, "task.yaml")
    for name, expected in (("finetuned", ours.seen), ("scratch", Seen(frozenset()))):
        words = ("run.wandb=disabled", "run.device=cpu")
        method = Finetuned(name, ours, task, data, cases, splits, tmp_path / name, words, lambda settings: None)
        settings = method.prepare(0)
        prepare_run(settings)
        assert Seen.read(Path(settings.run.out)) == expected


def test_the_report_counts_the_people_of_the_task(run: Path, datasets: dict[str, Path], tmp_path: Path) -> None:
    words = "pooling: mean, bootstrap: 100, permutations: 99, split: {kind: folds, folds: 3, repeats: 1}"
    task = tmp_path / "score.yaml"
    task.write_text(f"{{name: s, type: regression, label: score, {words}}}")
    told = {}
    for source in (run, write_run(tmp_path / "old", datasets["first"], ALIGNED)):
        out = tmp_path / f"report-{source.name}"
        given = ("--data", datasets["grown"], "--task", task, "--random-seeds", 1, "--out", out)
        done = tool("probe.py", source, *given)
        assert done.returncode == 0, done.stderr
        facts = json.loads((out / "report.json").read_text())["facts"]["s"]
        told[source.name] = facts["subjects_seen_in_pretraining"], facts["subjects"], done.stdout
    people = SlimBrain.from_pretrained(run).seen_people(Dataset(datasets["grown"]))
    seen, subjects, printed = told["run"]
    assert seen == len(people) and subjects == len({s.person for s in Dataset(datasets["grown"]).sessions})
    assert f"{seen} of {subjects} subjects were seen in pretraining, without labels" in printed
    assert told["old"][0] is None and "which subjects were seen in pretraining is unknown" in told["old"][2]


def test_one_person_of_two_cohorts_is_one_subject(datasets: dict[str, Path]) -> None:
    """Cohorts that share their people: whoever is in both is on one side of a split."""
    first, second = (Dataset(datasets[name]) for name in ("first", "second"))
    first.sessions = first.sessions + second.sessions
    task = check(Task, {"name": "s", "type": "regression", "label": "score"}, "task.yaml")
    found = find_cases(task, first, "task.yaml")
    assert len(found.subjects) == 6 + 4 and len(found.sessions) == 6 + 3 + 4


@pytest.mark.parametrize("text", ["", "[]", '{"people": 3}', '{"people": [1], "salt": null, "sessions": []}'])
def test_a_list_of_people_that_is_none_is_told_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / SEEN).write_text(text)
    with pytest.raises(UserError, match=r"seen\.json") as told:
        Seen.read(tmp_path)
    assert "\n" not in told.value.line()


# what one model can read


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("grid", {"grid": {"mm": 8}}),
        ("windows.frames", {"windows": {"frames": 4}}),
        ("tr", {"tr": 2.0}),
        ("tr_range", {"tr_range": [0.7, 3.0]}),
        ("normalisation", {"normalisation": "none"}),
    ],
)
def test_datasets_that_no_model_reads_alike_are_refused_in_training_and_probing(
    run: Path, dataset: Path, tmp_path: Path, field: str, change: dict[str, Any]
) -> None:
    manifest = layout.read_manifest(dataset)
    changed = {name: manifest[name] | value if isinstance(value, dict) else value for name, value in change.items()}
    other = edited(dataset, tmp_path / "other", lambda session: [session], **changed)
    settings = load_run(run / "config.yaml")
    with pytest.raises(ConfigError) as told:
        geometry_for(settings, [Dataset(dataset), Dataset(other)])
    line = told.value.line()
    assert line.startswith(f"{other}: {field}: got ") and str(dataset) in line and "\n" not in line
    with pytest.raises(ConfigError, match=rf"{field}: got .* as in pretraining"):
        SlimBrain.from_pretrained(run).check_data(Dataset(other))


# sessions that are too short


def test_short_sessions_are_known_before_the_first_step(run: Path, dataset: Path, tmp_path: Path, capsys) -> None:
    keys = [session.key for session in Dataset(dataset).of_split("train")]

    def shorter(least: int) -> Callable[[dict[str, Any]], list[dict[str, Any]]]:
        return lambda session: [session | {"n_kept": 7 if session["key"] in keys[:least] else session["n_kept"]}]

    tree = load_run(run / "config.yaml").model_dump(mode="json")

    def settings(data: Path) -> PretrainSettings:
        run_tree = tree["run"] | {"out": str(tmp_path / "run"), "epochs": 3, "steps": None}
        return check(PretrainSettings, tree | {"data": str(data), "run": run_tree}, "test")

    data = edited(dataset, tmp_path / "data", shorter(2))
    prepare_run(settings(data))
    told = f"warning: 2 of {len(keys)} training sessions of {data} are left out: they have fewer than 8 windows"
    assert capsys.readouterr().out.count(told) == 1
    task = PretrainTask(settings(data))
    assert {task.stream.at(n).session.key for n in range(40)} == set(keys[2:])
    assert task.stream.per_epoch == len(keys) - 2
    assert Seen.read(tmp_path / "run") == Seen.of(task.stream.sessions)
    line = {"step": 1, "samples_per_s": 2.0, "seconds": 1.0}
    assert total_steps(settings(data), tmp_path / "run", [line]) == math.ceil(3 * (len(keys) - 2) / 2)

    shutil.rmtree(tmp_path / "run")
    none_left = edited(dataset, tmp_path / "none", shorter(len(keys)))
    expected = rf"train: got {len(keys)} sessions with at most 7 windows, expected a session with 8 or more windows"
    with pytest.raises(ConfigError, match=expected):
        prepare_run(settings(none_left))
    assert not (tmp_path / "run").exists()
