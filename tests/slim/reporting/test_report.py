"""The page of a run: what it says of healthy, collapsed, cut and empty runs."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from helpers.commands import ROOT
from helpers.explained import ABOUT
from helpers.page_run import line, make_run
from helpers.pages import NASTY, Reader, check_self_contained, command
from launchers.experiments.comparison import Question
from shards.core.errors import ConfigError
from slim.checkpoints.checkpoint import seal, tag
from slim.config import load_run
from slim.evaluation import metrics
from slim.evaluation.display import save_forest
from slim.evaluation.results import Estimate, TaskFacts, TaskResult
from slim.evaluation.task import Task
from slim.finetune.labels import Answers
from slim.finetune.task import validation_loss
from slim.reporting import curves, run_health, run_page


def make_finetuning(folder: Path, losses: list[float | None], classes: int = 3) -> Path:
    """Two steps of ten sessions an epoch; validated where `losses` has a number."""
    before = {"run": NASTY, "step": 900, "training": []}
    lines = [
        {name: line(step)[name] for name in ("step", "epoch", "samples", "loss", "lr", "grad_norm", "data_wait")}
        | {"seconds": 0.5, "samples_per_s": 20.0, "val_loss": loss, "best_step": 1, "tokens_kept": 9.0}
        for step, loss in enumerate(losses, 1)
    ]
    make_run(
        folder, lines, steps=None, head={"pooling": "attentive"}, answer={"task": "sex"}, before=before, start="abc"
    )
    train = {f"a{number}": (number, 1.0) for number in range(20)}
    val = {"b0": (20, 2.0), "b1": (20, 2.0), "b2": (21, 0.0)}
    Answers(classes, train, val).write(folder)
    return folder


def text_of(folder: Path) -> str:
    path = run_page.write(folder)
    assert path == folder / "report" / "index.html"
    return check_self_contained(path.read_text()).text


def words_of(lines: list[dict], steps: int = 120) -> str:
    """The verdict alone."""
    judged = run_page.learned(lines, run_page.is_over(lines, steps))
    return " ".join(f"{one.severity}: {one.text}" for one in run_page.verdict(lines, steps, judged))


@pytest.fixture
def healthy(tmp_path) -> Path:
    folder = make_run(tmp_path / "healthy", [line(step) for step in range(1, 121)])
    for step, complete in ((60, True), (120, False)):
        checkpoint = folder / "checkpoints" / tag(step)
        checkpoint.mkdir(parents=True)
        (checkpoint / "weights.safetensors").write_bytes(bytes(2_000_000))
        if complete:
            seal(checkpoint, {"step": step, "world_size": 2})
    return folder


def test_healthy_run(healthy):
    text = text_of(healthy)
    assert "Finished: 120 of 120 steps." in text
    assert "Step 120 of 120, epoch 12; last loss 1.38; gain +0.2" in text
    assert "Predictions beat the mean of each place" in text
    assert "Trouble" not in text and "Probes" not in text
    assert "step-00000060 60 complete 2 2.0" in text
    assert "step-00000120 incomplete" in text
    content = (healthy / "report" / "index.html").read_text()
    assert "<script" not in content and NASTY in text  # the configuration is shown, escaped
    alts = [alt for alt, _ in Reader(content).pictures()]
    assert len(alts) == 11 and len(set(alts)) == 11


def test_folders_are_shown_only_if_asked_for(tmp_path):
    folder = make_run(tmp_path / "run", [line(step) for step in range(1, 9)], data="/home/jane/hcp")
    for paths in (False, True):
        assert ("/home/jane" in run_page.write(folder, paths).read_text()) == paths


def test_a_watched_page_is_written_until_the_run_ends(tmp_path):
    lines = [line(step) for step in range(1, 120)]
    folder = make_run(tmp_path / "run", lines)
    page, metrics_file = folder / "report" / "index.html", folder / "metrics.jsonl"
    words = [sys.executable, "tools/report.py", str(folder), "--watch", "1", "--json"]
    child = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while not page.exists() and child.poll() is None:
            time.sleep(0.05)
        first = page.read_text()
        assert '<meta http-equiv="refresh" content="1">' in first and "Time left" in check_self_contained(first).text
        with open(metrics_file, "a") as file:
            file.write(json.dumps(line(120)) + "\n")
        out, error = child.communicate(timeout=300)
    finally:
        child.kill()
    assert child.returncode == 0 and json.loads(out.splitlines()[-1])["kind"] == "run", error
    last = page.read_text()
    assert 'http-equiv="refresh"' not in last and "Time left" not in last and "120 of 120 steps" in last


def test_writes_nothing_but_the_page_and_equal_bytes_again(healthy):
    before = {path: path.read_bytes() for path in healthy.rglob("*") if path.is_file()}
    page = run_page.write(healthy).read_bytes()
    assert run_page.write(healthy).read_bytes() == page
    after = {path: path.read_bytes() for path in healthy.rglob("*") if path.is_file()}
    assert after.pop(healthy / "report" / "index.html") and after == before


def test_collapse_is_told_in_words(tmp_path):
    assert "bad: Collapsed" in words_of([line(step, gain=-0.05) for step in range(1, 121)])
    assert "look: Predictions hardly beat" in words_of([line(step, gain=0.001) for step in range(1, 121)])
    lines = [line(step, gain=0.0, target_rank=3.0) for step in range(1, 121)]
    text = text_of(make_run(tmp_path / "run", lines))
    assert "Trouble: Collapsed, or did not learn" in text
    assert "no gain over predicting the mean of each place" in text.lower()
    assert "dimensional collapse: the effective rank of the targets is 3.0" in text.lower()
    early = words_of(lines[:40])
    assert "Not finished: step 40 of 120, 33%" in early and "Collapsed" not in early
    assert "if it stays so, the model has collapsed" in early


def test_gain_that_was_higher_before():
    lines = [line(step, gain=0.3 if step < 60 else 0.1) for step in range(1, 121)]
    assert "The gain was higher before: +0.3000" in words_of(lines)


def test_loss_that_is_no_number(tmp_path):
    lines = [line(step, loss=float("nan")) for step in range(1, 121)]
    assert "Trouble: The last loss is not finite" in text_of(make_run(tmp_path / "run", lines))


def test_gain_that_is_no_number():
    words = words_of([line(step, gain=float("nan")) for step in range(1, 121)])
    assert "bad: None of the last gains is finite." in words and "no JEPA term" not in words


def test_run_without_jepa(tmp_path):
    kinds = ("cross_time", "cross_location", "double_cross")
    gone = dict.fromkeys(
        (
            "gain",
            "loss_jepa",
            "target_std",
            "target_rank",
            "sample_cosine",
            *(f"{what}_{kind}" for what in ("gain", "loss") for kind in kinds),
        )
    )
    folder = make_run(tmp_path / "run", [line(step, **gone) for step in range(1, 121)], objective="mae")
    text = text_of(folder)
    assert "No gain is computed, because the objective has no JEPA term" in text
    alts = [alt for alt, _ in Reader((folder / "report" / "index.html").read_text()).pictures()]
    assert not any("Spread of the targets" in alt or "Gain" in alt for alt in alts)


def test_a_fine_tuning_is_judged_by_its_validation(tmp_path):
    folder = make_finetuning(tmp_path / "sex-finetuned" / "seed-0", [None, 1.0, None, 0.7, None, 0.9])
    text = text_of(folder)
    assert "Run sex-finetuned, seed-0" in text and "Not finished: step 6 of 20, 30%" in text  # 10 epochs of 2 steps
    assert "The lowest validation loss is 0.7000 at step 4 (guessing: 1.0986); these weights are kept." in text
    assert "Task sex" in text and f"Initial weights {NASTY}, step 900" in text and "No gain" not in text
    alts = [alt for alt, _ in Reader((folder / "report" / "index.html").read_text()).pictures()]
    assert [alt.split(",")[0] for alt in alts] == [
        "Loss of the training subjects",
        "Loss of the validation subjects",
        "Norm of the gradient",
        "Schedules",
        "Speed",
        "Memory and tokens",
    ]
    assert "Not validated yet" in text_of(make_finetuning(tmp_path / "early", [None]))
    assert "Nothing was logged yet" in text_of(make_finetuning(tmp_path / "empty", []))


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        (
            [1.2, 1.3, 1.1],
            "bad: The validation loss was never better than guessing: 1.1000 at step 3 (guessing: 1.0986)",
        ),
        ([0.9, 0.8, 0.7], "look: The validation loss was lowest at the end"),
        ([0.7, 0.8, 0.9], "look: The validation loss was lowest after the first epoch"),
        ([0.8, 0.7, 0.9], "these weights are kept."),
    ],
)
def test_what_a_finished_validation_tells(losses, said):
    lines = [{"step": step, "val_loss": loss} for step, loss in enumerate(losses, 1)]
    words = " ".join(f"{one.severity}: {one.text}" for one in run_page.answered(lines, True, math.log(3)))
    assert said in words


def test_guessing_is_what_validation_scores_without_knowing(tmp_path):
    for classes, guess in ((3, np.full((3, 3), 1 / 3)), (0, np.zeros((3, 1)))):
        answers = Answers(classes, {}, {"b0": (20, 2.0), "b1": (20, 2.0), "b2": (21, 0.0)})
        subject_N, answer_N = np.array(list(answers.val.values())).T
        assert answers.guess == pytest.approx(validation_loss(guess, subject_N, answer_N, classes))


def test_empty_and_absent_metrics(tmp_path):
    folder = make_run(tmp_path / "run", [])
    assert "Nothing was logged yet" in text_of(folder)
    (folder / "metrics.jsonl").unlink()
    text = text_of(folder)
    assert "No step was logged yet." in text and "None yet: if the run stops now, it starts again from step 0." in text


def test_truncated_last_line(tmp_path):
    folder = make_run(tmp_path / "run", [line(step) for step in range(1, 31)])
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 31, "lo')
    text = text_of(folder)
    assert "step 30 of 120" in text and "1 unreadable line of metrics.jsonl left out" in text


def test_steps_from_epochs_use_the_logged_batch(tmp_path):
    folder = make_run(tmp_path / "run", [line(5)], steps=None)
    assert "Not finished: step 5 of an unknown number" in text_of(folder)
    (folder / "dataset.json").write_text(json.dumps({"sessions": {"train": 34}}))
    settings = load_run(folder / "config.yaml")
    assert run_page.total_steps(settings, folder, [line(5)]) == 43  # ceil(10 epochs * 34 sessions / 8 samples)


def test_probe_results_are_shown(healthy):
    tasks = {
        NASTY: {
            "ours": {"auroc": cell(0.74), "n": 3},
            "random": {"auroc": cell(0.61)},
            "mean_image": {},
            "connectome": {"auroc": {"value": 0.8, "low": None, "high": None}},
        },
        "score": {"ours": {"r": cell(0.4)}, "another": {"r": cell(0.2), "mae": {"value": None}}},
    }
    (healthy / "report").mkdir()
    facts = {"score": {"differences": {"random": {"r": cell(0.13)}}}}
    (healthy / "report" / "report.json").write_text(json.dumps({"tasks": tasks, "facts": facts}))
    text = text_of(healthy)
    assert "this run 0.740 [0.690, 0.790]" in text
    assert "same encoder, random weights 0.610 [0.560, 0.660]" in text
    assert "this run minus same encoder, random weights 0.130 [0.080, 0.180]" in text
    assert "functional connectivity 0.800" in text and "another 0.200 [0.150, 0.250] –" in text
    assert "<script" not in (healthy / "report" / "index.html").read_text()
    (healthy / "report" / "report.json").write_text('{"tasks": 3')
    with pytest.raises(ConfigError, match=r"report\.json"):
        run_page.write(healthy)


def cell(value: float, half: float = 0.05, **more) -> dict:
    return {"value": value, "low": value - half, "high": value + half, **more}


def result(name: str, methods: dict, facts: dict) -> TaskResult:
    made = {method: {metric: Estimate(**one) for metric, one in cells.items()} for method, cells in methods.items()}
    return TaskResult(name=name, estimates=made, facts=TaskFacts(**facts))


def said(folder: Path, tasks: dict, facts: dict | None = None) -> str:
    """The verdict on a probe's report."""
    path = folder / "report.json"
    path.write_text(json.dumps({"tasks": tasks, "facts": facts or {}}))
    return " ".join(f"{one.severity}: {one.text}" for one in run_health.verdict(run_health.read_tasks(path)))


def test_findings_in_words(tmp_path):
    ours = {"ours": {"auroc": cell(0.8, p=0.002)}, "random": {"auroc": cell(0.6)}, "connectome": {"auroc": cell(0.95)}}
    close = {"ours": {"r": cell(0.3, p=0.2)}, "random": {"r": cell(0.28)}, "confounds": {"r": cell(0.33)}}
    words = said(tmp_path, {"sex": ours, "age": close})
    assert "look: Beats the same encoder with random weights on 1 of 2 tasks: sex." in words
    assert "look: No clear difference from random weights on age" in words
    assert "look: Functional connectivity is better on sex." in words
    assert "look: Confounds alone are equal or better on age." in words
    assert "No better than chance on age" in words and "sex (perm" not in words
    # subjects are paired: a difference is told where the intervals overlap, and the other way round
    paired = {"differences": {"random": {"r": {"value": 0.02, "low": 0.01, "high": 0.03}}}}
    assert "good: Beats the same encoder with random weights on 1 of 1 task: age." in said(
        tmp_path, {"age": close}, {"age": paired}
    )
    paired = {"differences": {"random": {"r": {"value": -0.02, "low": -0.03, "high": -0.01}}}}
    words = said(tmp_path, {"age": close}, {"age": paired})
    assert "bad: Random weights are better on age." in words and "on 0 of 1 task." in words
    tuned = {"ours": {"auroc": cell(0.7)}, "finetuned": {"auroc": cell(0.9)}, "scratch": {"auroc": cell(0.6)}}
    assert said(tmp_path, {"sex": tuned}) == "good: Fine-tuning beats training only on the task on sex."
    assert said(tmp_path, {"sex": {"ours": {"auroc": {"value": None}}}}) == ""


def test_p_and_the_table_of_all_tasks(healthy):
    tasks = {
        "state": {
            "ours": {"balanced_accuracy": cell(0.62, p=0.0004)},
            "parcel_means": {"balanced_accuracy": cell(0.6)},
        },
        "score": {"ours": {"r": cell(0.4, p=0.031), "mse": cell(0.9)}, "random": {"r": cell(0.2), "mse": cell(1.0)}},
    }
    facts = {"state": {"type": "state", "chance": {"balanced_accuracy": 0.17}, "test_subjects": 40, "seeds": [0, 1, 2]}}
    (healthy / "report").mkdir()
    (healthy / "report" / "report.json").write_text(json.dumps({"tasks": tasks, "facts": facts}))
    text = text_of(healthy)
    assert "Features score, r state, balanced accuracy" in text
    assert "this run 0.40 [0.35, 0.45], p = 0.031 0.62 [0.57, 0.67], p < 0.001" in text
    assert "same encoder, random weights 0.20 [0.15, 0.25] –" in text
    assert "State; 40 subjects tested; 3 seeds." in text and "parcel means 0.600" in text


def test_a_state_task_is_judged_as_the_tables_judge_it(tmp_path):
    """By accuracy, whatever else was measured: here AUROC says one thing and accuracy the other."""
    ours = {"accuracy": cell(0.5, p=0.4), "auroc": cell(0.9, p=0.001)}
    tasks = {"s": {"ours": ours, "random": {"accuracy": cell(0.8), "auroc": cell(0.6)}}}
    words = said(tmp_path, tasks, {"s": {"type": "state"}})
    assert "Random weights are better on s" in words and "No better than chance on s" in words
    assert "on 1 of 1 task: s" in said(tmp_path, tasks, {"s": {"type": "classification"}})
    sessions = {kind: Question(Task.model_construct(type=kind), None, "") for kind in metrics.HEADLINE}
    for kind, question in sessions.items():
        found = result("s", {"ours": {name: cell(0.5) for name in metrics.HEADLINE.values()}}, {"type": kind})
        assert found.judged_by == question.metric


@pytest.mark.parametrize(
    ("facts", "names", "told"),
    [
        ({"type": "classification", "classes": {"a": 1, "b": 1}}, ("auroc", "accuracy"), "Dashed: chance (of AUROC)."),
        (
            {"type": "classification", "classes": {"a": 1, "b": 1}},
            ("accuracy", "balanced_accuracy", "auroc", "f1"),
            "Dashed: chance (of balanced accuracy, AUROC).",
        ),
        ({"type": "regression"}, ("r", "r2", "mse"), "Dashed: chance."),
        ({"type": "state", "classes": {"a": 3}}, ("accuracy",), ""),
        ({"type": "fingerprint", "chance": {"top1": 0.1}}, ("top1", "map"), "Dashed: chance (of top-1)."),
        ({}, ("balanced_accuracy", "auroc"), "Dashed: chance (of AUROC)."),
    ],
)
def test_chance_is_named_where_it_is_drawn(monkeypatch, tmp_path, facts, names, told):
    """On the page and in the picture of the probe, by the same rule."""
    lines: list[float] = []
    real = Axes.axvline

    def spy(axes, x=0, *words, **named):
        lines.append(x)
        return real(axes, x, *words, **named)

    monkeypatch.setattr(Axes, "axvline", spy)
    scores = {"ours": {name: cell(0.5) for name in names}}
    page = run_health._drawn(result("t", scores, facts)).caption
    assert ("Dashed" in page) == bool(told) and told in page
    drawn, lines[:] = list(lines), []
    titles: list[str] = []
    monkeypatch.setattr(Figure, "suptitle", lambda figure, text, **named: titles.append(text))
    save_forest(result("t", scores, {"test_subjects": 3, "pooling": "mean", **facts}), tmp_path / "t.png")
    assert lines == drawn == [level for name in names if (level := TaskFacts(**facts).chance_of(name)) is not None]
    assert titles[0].endswith(told.lower().replace("auroc", "AUROC").replace("dashed", "; dashed").rstrip("."))


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"subjects_seen_in_pretraining": None}, "Subjects seen in pretraining are not known (version 0.1)."),
        ({"subjects_seen_in_pretraining": 7, "subjects": 12}, "7 of 12 subjects seen in pretraining, without labels."),
        ({"subjects_seen_in_pretraining": 0}, ""),
    ],
)
def test_who_was_seen_in_pretraining_is_told(facts, said):
    page = run_health._about(result("t", {}, facts))
    assert said in page and ("pretraining" in page) == bool(said)


def test_explanations_are_shown(healthy, monkeypatch, capsys):
    from matplotlib.figure import Figure

    from shards.reporting import html

    folder = healthy / "report" / "explain"
    folder.mkdir(parents=True)
    numbers = {"score": 1.2, "at_start": 0.1, "sum": 0.9, "gap": -0.2, "points": 256, "windows": []}
    session = {"key": NASTY, "subject": "01", "complete": False, **numbers}
    place = {"mm": [-24.0, 8.0, 31.0], "value": 0.0123}
    explained = {**ABOUT, "sessions": [session], "places": [place]}
    (folder / "sex.json").write_text(json.dumps(explained | {"start": "middle"}))
    with pytest.raises(ConfigError, match=r"sex\.json: start: got 'middle'"):
        run_page.write(healthy)
    (folder / "sex.json").write_text(json.dumps(explained))
    with pytest.raises(ConfigError, match="explain"):
        run_page.write(healthy)  # a picture is missing
    for name in ("sex.png", "sex_windows.png"):
        (folder / name).write_bytes(html.png(Figure(figsize=(2, 1))))
    text = text_of(healthy)
    assert "Explained: logit of B, cov pooling, in 1 session of 1 subject not used to train" in text
    assert "-24 +8 +31 0.012" in text and "In 1 of them the shares do not add up to the score" in text
    content = (healthy / "report" / "index.html").read_text()
    assert "<script" not in content and len(Reader(content).pictures()) == 13 and NASTY in text
    assert "<iframe" not in content  # an explanation of an earlier version has no views
    for name in ("sex_view.html", "sex_absolute_view.html", "sex_absolute_view_surface.html"):
        (folder / name).write_text("a view")
    content = run_page.write(healthy).read_text()
    links = [attrs["href"] for tag, attrs in check_self_contained(content).tags if tag == "a"]
    expected = ["sex_absolute_view.html", "sex_absolute_view_surface.html", "sex_view.html"]
    assert links == [f"explain/{name}" for name in expected]
    assert command(monkeypatch, capsys, str(healthy), "--private")[0] == 0
    private = Reader((healthy / "report" / "index.html").read_text())
    assert "the first is session 1." in private.text and private.text.count(NASTY) == text.count(NASTY) - 1
    assert "names sessions, and is left out" in private.text and len(private.pictures()) == 12


def test_thinning_keeps_spikes_and_means():
    step = np.arange(100_000.0)
    value = np.sin(step / 1e4)
    value[54_321] = 50
    value[7] = np.nan
    at, low, mean, high = curves.thin(step, value)
    assert len(at) == len(mean) == curves._POINTS and high.max() == 50 and low.min() >= -1
    assert np.all(np.diff(at) > 0) and np.all((low <= mean) & (mean <= high))
    assert np.average(mean, weights=np.full(len(mean), 1)) == pytest.approx(np.nanmean(value), abs=1e-4)
    few = curves.thin(step[:5], value[:5])
    assert np.array_equal(few[0], step[:5]) and np.array_equal(few[2], value[:5])


def test_smoothing_keeps_a_constant():
    for size in (1, 2, 31, 600):
        assert curves.smoothed(np.full(size, 3.0)) == pytest.approx(np.full(size, 3.0))


def test_long_metrics_file(tmp_path):
    lines = [line(step) for step in range(1, 20_001)]
    folder = make_run(tmp_path / "run", lines, steps=20_000)
    assert "Finished: 20000 of 20000 steps." in text_of(folder)
    assert (folder / "report" / "index.html").stat().st_size < 2e6


def test_command(healthy, monkeypatch, capsys):
    status, out, _ = command(monkeypatch, capsys, str(healthy), "--json")
    assert status == 0 and json.loads(out.splitlines()[-1])["kind"] == "run"
    (healthy / "config.yaml").write_text("model: [")
    status, _, err = command(monkeypatch, capsys, str(healthy))
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1
