"""The page of several runs: what differs is told, what they share is drawn on one axis."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from matplotlib.axes import Axes

from helpers.page_run import add_probe
from helpers.pages import NASTY, check_self_contained, command
from shards.core.errors import ConfigError
from slim.config import PRESETS, check_run
from slim.evaluation.validation import ValidationScore
from slim.reporting import runs_page

STEPS = 60


def make_run(folder: Path, slope: float = 0.3, steps: int = STEPS, more: dict | None = None, **config: object) -> Path:
    """A run with a gain that rises to `slope`, logged up to `steps`."""
    folder.mkdir(parents=True)
    tree = {"data": f"/home/{NASTY[8:13]}/data", "run": {"out": str(folder), "steps": STEPS}, **config}
    tree |= {"model": PRESETS["tiny"].model_dump(), "model_name": "tiny"}
    (folder / "config.yaml").write_text(check_run(tree, folder).model_dump_json())
    lines = [
        {
            "step": step,
            "samples": 8 * step,
            "loss": 2 - slope * step / STEPS,
            "gain": slope * (1 - math.exp(-step / 20)),
            "target_rank": 20.0,
            "samples_per_s": 16.0,
            "seconds": 0.5,
            "peak_memory_bytes": 2**30,
            **(more or {}),
        }
        for step in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    return [make_run(tmp_path / "a"), make_run(tmp_path / "b", 0.5, view="voxel", optimizer={"lr": 0.002})]


def text_of(runs: list[Path], out: Path) -> str:
    assert runs_page.write(runs, out) == out
    return check_self_contained(out.read_text()).text


def test_settings_that_differ_are_a_table(two: list[Path], tmp_path: Path) -> None:
    text = text_of(two, tmp_path / "page.html")
    assert "view both voxel" in text and "optimizer.lr" in text and "0.002" in text
    assert "run.out" not in text and "run.seed" not in text  # a folder; equal
    assert "a: Finished: 60 of 60 steps." in text and "60 of 60 480 1.7" in text


def test_curves_of_all_runs_are_on_one_axis(two: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[str, float]] = []
    plot = Axes.plot

    def remember(self: Axes, step, value, *rest, **more):
        drawn.append((more.get("label", ""), float(value[-1])))
        return plot(self, step, value, *rest, **more)

    monkeypatch.setattr(Axes, "plot", remember)
    content = runs_page.write(two, tmp_path / "page.html").read_text()
    alts = [alt for alt, _ in check_self_contained(content).pictures()]
    assert len(alts) == len(set(alts)) == 4  # gain, loss, rank, speed: the fields that both logged
    assert [name for name, _ in drawn] == ["a", "b"] * 4
    gains = dict(drawn[:2])
    assert gains["b"] / gains["a"] == pytest.approx(5 / 3, rel=1e-6)


def test_a_field_of_one_run_is_not_drawn(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", more={"loss_mae": 1.0}), make_run(tmp_path / "b")]
    assert "MAE term" not in text_of(runs, tmp_path / "page.html")


def test_probes_stand_side_by_side(two: list[Path], tmp_path: Path) -> None:
    add_probe(two[0], 0.7)
    assert "AUROC" not in text_of(two, tmp_path / "page.html")  # of one run alone
    add_probe(two[1], 0.8)
    text = text_of(two, tmp_path / "page.html")
    assert "a 0.700 [0.600, 0.800]" in text and "b 0.800 [0.700, 0.900]" in text
    assert "same encoder, random weights (a) 0.600" in text and "do not compare" not in text
    add_probe(two[1], 0.8, subjects=12)
    assert "different numbers of subjects: do not compare these scores" in text_of(two, tmp_path / "page.html")


def test_probes_during_training_are_a_figure_for_each_task(two: list[Path], tmp_path: Path) -> None:
    for run in two:
        scores = [ValidationScore(step=step, task="sex", metric="auroc", value=0.5 + step / 200) for step in (20, 40)]
        (run / "probe.jsonl").write_text("".join(f"{score.model_dump_json()}\n" for score in scores))
    content = runs_page.write(two, tmp_path / "page.html").read_text()
    alts = [alt for alt, _ in check_self_contained(content).pictures()]
    assert alts[0] == "Probe of sex during training, by optimizer step, of each run"


def test_names_are_as_long_as_needed_and_states_differ(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "one" / "x"),
        make_run(tmp_path / "two" / "x", steps=30),
        make_run(tmp_path / "y", -0.1),
    ]
    text = text_of(runs, tmp_path / "page.html")
    assert "one/x, two/x" in text and "two/x: Not finished: step 30 of 60" in text
    assert "/y: Collapsed, or did not learn" in text


def test_equal_runs_differ_in_nothing(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b")]
    assert "None: the runs differ only in their folders." in text_of(runs, tmp_path / "page.html")
    before = (tmp_path / "page.html").read_bytes()
    assert runs_page.write(runs, tmp_path / "page.html").read_bytes() == before


def test_the_command(two: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    out = tmp_path / "page.html"
    status, said, _ = command(monkeypatch, capsys, *map(str, two), "--out", str(out), "--json")
    assert status == 0 and json.loads(said.splitlines()[-1])["kind"] == "runs" and out.is_file()
    for words, match in (
        ([*map(str, two)], "--out: got nothing, expected the page of several runs"),
        (
            [str(two[0]), str(tmp_path / "none"), "--out", str(out)],
            "none: got no such folder, expected the folder",
        ),
        ([str(two[0]), str(tmp_path), "--out", str(out)], "no config.yaml in it"),
        ([str(two[0]), str(two[0]), "--out", str(out)], "the same run twice"),
        ([str(two[0]), "--out", str(out)], "expected no --out"),
    ):
        status, _, error = command(monkeypatch, capsys, *words)
        assert status == 2 and match in error
    with pytest.raises(ConfigError, match="got 19, expected 2 to 18 runs"):
        runs_page.write([two[0]] * 19, out)
