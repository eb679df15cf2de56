"""The page of a run and of several runs in a browser: no error, and nothing outside its box."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from helpers.browser import REASON, browser, find
from helpers.explained import ABOUT
from helpers.page_run import add_probe, line, make_run
from shards.reporting import html
from slim.checkpoints.checkpoint import seal, tag
from slim.reporting import run_page, runs_page

pytestmark = pytest.mark.skipif(find() is None, reason=REASON)

LONG = "a_task_with_a_name_that_is_longer_than_a_telephone_is_wide"


def make_whole_run(folder: Path, **config: object) -> Path:
    """A run with a checkpoint, a probe and an explanation."""
    make_run(folder, [line(step) for step in range(1, 121)], **config)
    checkpoint = folder / "checkpoints" / tag(60)
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights.safetensors").write_bytes(bytes(1000))
    seal(checkpoint, {"step": 60, "world_size": 2})
    add_probe(folder, 0.7, task=LONG)
    explained = folder / "report" / "explain"
    explained.mkdir()
    places = [{"mm": [-24.0, 8.0, 31.0], "value": 0.0123}]
    (explained / "sex.json").write_text(json.dumps({**ABOUT, "sessions": [], "places": places}))
    for name in ("sex.png", "sex_windows.png"):
        (explained / name).write_bytes(html.png(Figure(figsize=(11, 2))))
    return folder


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    runs = [make_whole_run(folder / f"run-{n}-{'x' * 40}", optimizer={"lr": 1e-3 * (n + 1)}) for n in range(5)]
    return [run_page.write(runs[0]), runs_page.write(runs, folder / "runs.html")]


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1400])
def test_no_text_is_outside_its_box(pages: list[Path], width: int, dark: bool) -> None:
    """Nothing scrolls sideways at 400 px; at 1400 px a wide table may."""
    with browser(width=width, dark=dark) as opened:
        for page in pages:
            opened.open(page)
            for place, summary in enumerate(opened.texts("summary")):
                opened.click("summary" if place == 0 else f"details:nth-of-type({place + 1}) summary")
                assert opened.run(f"document.querySelectorAll('details')[{place}].open"), summary
            assert opened.outside(scrolls=width > 400) == [] and opened.faint() == []
            assert opened.run("[...document.images].every((one) => one.complete && one.naturalWidth > 0 && one.alt)")
            assert opened.run("performance.getEntriesByType('resource').length") == 0


def test_the_background_follows_the_browser(pages: list[Path]) -> None:
    colour = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
    found = []
    for dark in (False, True):
        with browser(dark=dark) as opened:
            opened.open(pages[0])
            found.append(opened.run(colour))
    assert min(found[0]) > 240 and max(found[1]) < 50


def test_a_print_is_light_and_not_wider_than_the_paper(pages: list[Path]) -> None:
    with browser(width=680, dark=True) as opened:
        for page in pages:
            opened.open(page)
            opened.show_for("print")
            assert opened.outside() == [] and opened.faint() == []
            assert opened.run("getComputedStyle(document.body).color") == "rgb(31, 41, 51)"
