"""The interactive views in a browser: they open from a page, follow the mouse, and load nothing from elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from helpers.browser import REASON, Browser, browser, find
from shards.format.reader import Dataset
from shards.reporting import dataset_page, viewer
from shards.reporting.session_views import mean_image
from shards.reporting.windows_view import Given, render
from slim.ranking.rankers import make_ranker

pytestmark = pytest.mark.skipif(find() is None, reason=REASON)

CANVAS = "document.querySelector('canvas')"
# a number that changes with what is drawn
PIXELS = (
    "{0}.getContext('2d').getImageData(0, 0, {0}.width, {0}.height).data"
    ".reduce((sum, value, place) => (31 * sum + value + place % 7) % 1000003, 0)"
)
MARKED = "document.getElementById('name').textContent"


@pytest.fixture(scope="module")
def opened_data(dataset: Path) -> Dataset:
    return Dataset(dataset)


@pytest.fixture(scope="module")
def windows(opened_data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("views") / "windows.html"
    events = pd.DataFrame({"onset": [0.5], "end": [5.0], "state": ["move"]})
    given = Given(events=lambda _: events, energies=make_ranker("ridge").energies)
    path.write_text(render(opened_data, opened_data.sessions[0], given))
    return path


def test_a_link_loads_a_view_into_its_frame_and_nothing_before(opened_data: Dataset, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for item in opened_data.folder.iterdir():
        if item.name not in ("work", "report"):
            (folder / item.name).symlink_to(item)
    page = dataset_page.write(folder, embed=2, drawn=2)
    links = [path.name for path in sorted((page.parent / "views").iterdir())]
    assert len(links) == 8
    with browser() as opened:
        opened.open(page)
        addresses = "[...document.querySelectorAll('details.views a')].map((one) => one.pathname)"
        assert sorted(Path(one).name for one in opened.run(addresses)) == links
        assert not loaded(opened)
        for number in range(2):
            opened.run(f"document.querySelectorAll('details.views')[{number}].setAttribute('data-test', {number})")
            group = f"details.views[data-test='{number}']"
            opened.click(f"{group} summary")
            assert len(loaded(opened)) == number
            for link in range(1, 5):
                opened.click(f"{group} a:nth-child({link})")
                name = Path(
                    opened.run(f"document.querySelector({json.dumps(group)} + ' a:nth-child({link})').pathname")
                )
                opened.wait("document.querySelector('canvas')?.width > 50", frame=name.name)
                assert len(loaded(opened)) == number + 1  # a view takes the place of the one before


def loaded(opened: Browser) -> list[str]:
    """The addresses of the frames that show something."""
    tree = opened("Page.getFrameTree")["frameTree"]
    return [url for child in tree.get("childFrames", ()) if (url := child["frame"]["url"]) not in ("", "about:blank")]


@pytest.mark.parametrize("width", [400, 1400])
def test_the_planes_follow_the_mouse(opened_data: Dataset, tmp_path: Path, width: int) -> None:
    path = tmp_path / "map.html"
    path.write_text(mean_image(opened_data, opened_data.sessions[0]).volume())
    with browser(width=width) as opened:
        opened.open(path)
        opened.wait(f"{CANVAS}.width > 100")
        assert opened.outside() == []
        before = opened.run(PIXELS.format(CANVAS))
        opened.click("canvas")
        after = opened.run(PIXELS.format(CANVAS))
        assert after != before
        opened.run("(() => { const one = document.querySelector('input'); one.value = 30; one.oninput(); })()")
        assert opened.run(PIXELS.format(CANVAS)) != after


@pytest.mark.skipif(not viewer.can_draw_surfaces(), reason="plotly is not installed (extra report)")
def test_a_surface_is_drawn_without_an_error(opened_data: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "map.html"
    path.write_text(mean_image(opened_data, opened_data.sessions[0]).surface())
    with browser(width=400, webgl=True) as opened:
        opened.open(path)
        opened.wait("document.querySelector('#surface-plot .main-svg') !== null")
        assert opened.outside() == []


def test_windows_are_chosen_by_mouse_and_keys(windows: Path, opened_data: Dataset) -> None:
    session = opened_data.sessions[0]
    with browser() as opened:
        opened.open(windows)
        best = int(opened_data.read(session, ("start",))["start"][0]) // opened_data.frames
        assert opened.run(MARKED).startswith(f"Window {best + 1} of {session.n_windows},")
        assert f"kept, number 1 of {session.n_kept}" in opened.text("#facts")
        opened.run("document.getElementById('time').focus()")
        opened.press("ArrowRight")
        following = min(best + 1, session.n_windows - 1)
        assert opened.run(MARKED).startswith(f"Window {following + 1} of")
        for _ in range(session.n_windows):
            opened.press("ArrowLeft")
        assert opened.run(MARKED).startswith("Window 1 of") and "none," in opened.text("#facts")
        assert "none above 0.5 mm" in opened.text("#facts") and "framewise displacement" in opened.text("#key")
        assert "move" in opened.text("#facts") and "event move" in opened.text("#key")
        assert opened.run("document.getElementById('time').getAttribute('aria-valuenow')") == "1"
        opened.click("#scores")  # its middle
        middle = int(session.n_windows / 2)
        assert opened.run(MARKED).startswith((f"Window {middle} of", f"Window {middle + 1} of"))


def test_the_map_shows_the_parcels_of_the_window(windows: Path) -> None:
    """Another window, another layer and another cut are another picture; a row of the table moves the cut."""
    with browser() as opened:
        opened.open(windows)
        seen = {opened.run(PIXELS.format(CANVAS))}
        for step in (
            "document.querySelectorAll('#choice input')[1].click()",
            "document.querySelectorAll('#choice input')[2].click()",
            "document.querySelectorAll('#choice input')[3].click()",
            "choose((chosen + 3) % count)",
            "document.querySelectorAll('#parcels tr')[5].click()",
        ):
            opened.run(f"{step}, 0")
            seen.add(opened.run(PIXELS.format(CANVAS)))
        assert len(seen) == 6
        data = json.loads(opened.run("document.getElementById('data').textContent"))
        label = int(opened.text("#parcels tr:nth-child(6) td"))
        x, _, _ = data["centres"][data["parcels"].index(label)]
        cut = opened.run("data.origin[0] + cut[0] * data.mm")
        assert abs(cut - x) <= data["mm"] / 2 + 0.1


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1060])
def test_no_text_of_the_windows_is_outside_its_box(windows: Path, width: int, dark: bool) -> None:
    with browser(width=width, dark=dark) as opened:
        opened.open(windows)
        assert opened.outside() == []
        colour = opened.run("getComputedStyle(document.body).backgroundColor")
        assert (colour == "rgb(255, 255, 255)") != dark
