"""The page of a dataset in a browser: the table sorts, filters and pages; sessions open; nothing leaves its box."""

from __future__ import annotations

import json
import resource
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from helpers.browser import REASON, Browser, browser, find
from helpers.page_dataset import GRID, changed, mixed_dataset, repeated, session
from shards.core.findings import look
from shards.reporting import dataset_page, distribution, html, pictures, session_table
from shards.reporting.pictures import Drawn

pytestmark = pytest.mark.skipif(find() is None, reason=REASON)

LISTED = "#rows td:first-child"  # the names of the sessions that are shown


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three embedded pictures, two beside the page, and six sessions without one."""
    return dataset_page.write(mixed_dataset(tmp_path_factory.mktemp("browser") / "mixed"), embed=3, drawn=5)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 sessions of three cohorts, without pictures: FD falls with the number; some lack it; a few are outlying."""
    path = tmp_path_factory.mktemp("many") / "index.html"
    sessions = []
    for n, tsnr in enumerate(np.random.default_rng(0).normal(60, 3, 120).tolist()):
        facts = {"tsnr": tsnr, "mean_fd_mm": 0.2 - n / 1e3}
        sessions.append(session(f"c{n % 3}_sub-{n:03}", f"c{n % 3}", f"{n:03}", ("train", "val")[n % 2], **facts))
    for number in (10, 20, 30, 40):
        sessions[number] = changed(sessions[number], mean_fd_mm=None)
    sessions[7] = changed(sessions[7], tsnr=9.0)
    sessions[50] = changed(sessions[50], tsnr=20.0, mni_dice=0.5)
    outlying = distribution.find_outlying(sessions)
    content = html.render(
        "dataset.html",
        title="Many",
        lead="",
        findings=[look("x", "one")],
        facts=html.Facts({}),
        **{name: [] for name in ("cohorts", "refused", "to_check", "quality", "native", "chosen", "examples")},
        scripts=[session_table.SCRIPT],
        table=session_table.make(sessions, GRID, outlying, {}),
    )
    path.write_text(content)
    return path


def test_outlying_sessions_come_first_and_missing_measures_are_never_fine(many: Path) -> None:
    with browser() as opened:
        opened.open(many)
        rows = opened.texts("#rows tr")
        assert len(rows) == 50
        assert "c2_sub-050 c2 train tSNR low; MNI Dice low" in rows[0] and "0.5 ▼" in rows[0]  # 27 robust SD
        assert "c1_sub-007 c1 val tSNR low" in rows[1] and "9 ▼" in rows[1]  # about 20
        for row in rows[2:6]:
            assert "FD missing" in row and " missing " in row.split("FD missing")[1]
        assert "nothing outlying" in rows[6] and "missing" not in rows[6]
        opened.choose("#state", "outlying")
        assert opened.texts(LISTED) == ["c2_sub-050", "c1_sub-007"]
        opened.choose("#state", "missing")
        assert opened.texts(LISTED) == ["c1_sub-010", "c2_sub-020", "c0_sub-030", "c1_sub-040"]
        assert opened.text(".range") == "Sessions: 1–4 of 4 (120 in all)"


def test_a_column_sorts_both_ways_and_missing_values_stay_last(many: Path) -> None:
    with browser() as opened:
        opened.open(many)
        place = opened.texts("#columns th").index("FD, mm") + 1
        head = f"#columns th:nth-child({place})"
        for way, first, last in (("descending", "c0_sub-000", 119), ("ascending", "c2_sub-119", 0)):
            opened.click(f"{head} button")
            assert opened.run(f"document.querySelector('{head}').ariaSort") == way
            assert opened.texts(LISTED)[0] == first
            opened.click("#after")
            opened.click("#after")
            assert opened.text("#page") == "Page 3 of 3"
            shown = opened.texts(LISTED)
            assert sorted(shown[-4:]) == ["c0_sub-030", "c1_sub-010", "c1_sub-040", "c2_sub-020"]
            assert shown[-5].endswith(f"{last:03}")
        assert opened.run("[...document.querySelectorAll('#columns [aria-sort=none]')].length") == place + 3 - 1


def test_filters_work_together_and_pages_turn(many: Path) -> None:
    with browser() as opened:
        opened.open(many)
        first = opened.texts(LISTED)
        assert opened.text("#page") == "Page 1 of 3" and opened.run("document.getElementById('before').disabled")
        opened.click("#after")
        assert not set(opened.texts(LISTED)) & set(first)
        opened.choose("#cohort", "1")
        assert opened.text("#page") == "Page 1 of 1" and opened.text(".range") == "Sessions: 1–40 of 40 (120 in all)"
        opened.choose("#split", "1")
        opened.write("#find", "SUB-00")
        assert opened.texts(LISTED) == ["c1_sub-007", "c1_sub-001"]
        opened.write("#find", "x")
        assert opened.texts(LISTED) == [] and opened.text(".range") == "Sessions: none (120 in all)"


def test_a_click_opens_the_picture_embedded_or_beside_the_page(page: Path) -> None:
    rows = {row["key"]: row for row in data(page)["rows"]}
    sources = [row["picture"][0] for row in rows.values() if "picture" in row]
    assert sum(one.startswith("#") for one in sources) == 3
    assert sorted(one for one in sources if not one.startswith("#")) == sorted(
        f"sessions/{path.name}" for path in (page.parent / "sessions").iterdir()
    )
    with browser() as opened:
        opened.open(page)
        assert opened.run("performance.getEntriesByType('resource').length") == 0  # nothing is loaded before a click
        for key, row in rows.items():
            click_session(opened, key)
            assert opened.text("#session-title") == key
            if "picture" not in row:
                assert "was not drawn" in opened.text("#session-picture")
            else:
                opened.wait("document.querySelector('#session img').complete")
                assert opened.run("document.querySelector('#session img').naturalWidth") > 1000
                assert opened.run("document.querySelector('#session img').alt").endswith(key)
                if row["picture"][0].startswith("#"):
                    opened.click("#session a")
                    assert not opened.run("document.getElementById('session').open")
                    assert opened.run("location.hash") == row["picture"][0]
                    click_session(opened, key)
            if key == "one_sub-04":
                assert "Mean framewise displacement, mm missing" in opened.text("#session-facts")
                assert "Temporal signal-to-noise ratio 11" in opened.text("#session-far")
            opened.click("#session-close")
            assert not opened.run("document.getElementById('session').open")


def test_a_click_opens_every_view_of_a_session(page: Path) -> None:
    with browser() as opened:
        opened.open(page)
        opened.click("details.views summary")
        links = opened.run("[...document.querySelector('details.views').querySelectorAll('a')].map((one) => one.href)")
        assert len(links) >= 3
        for place, link in enumerate(links, 1):
            opened.click(f"details.views a:nth-of-type({place})")
            view = "document.readyState === 'complete' && document.querySelector('canvas, svg')?.clientWidth > 100"
            opened.wait(view, frame=link.rsplit("/", 1)[1])
            assert opened.outside() == []


def test_the_keyboard_is_enough(page: Path) -> None:
    with browser() as opened:
        opened.open(page)
        opened.run("document.getElementById('split').focus()")
        for _ in opened.texts("#columns th"):
            opened.press("Tab")
        assert opened.run("document.activeElement.textContent") == opened.texts("#columns th")[-1]
        opened.press("Tab")
        first, second = opened.texts(LISTED)[:2]
        assert opened.run("document.activeElement.textContent") == first
        opened.press("Enter", "\r")
        assert opened.text("#session-title") == first
        opened.press("ArrowRight")
        assert opened.text("#session-title") == second
        opened.press("ArrowLeft")
        opened.press("ArrowLeft")  # there is none before the first
        assert opened.text("#session-title") == first
        opened.press("Escape")
        assert not opened.run("document.getElementById('session').open")
        assert opened.run("document.activeElement.textContent") == first


def test_a_picture_that_was_not_copied_is_told(page: Path, tmp_path: Path) -> None:
    alone = tmp_path / "index.html"
    shutil.copy(page, alone)
    beside = next(row for row in data(page)["rows"] if row.get("picture", "#")[0][0] != "#")
    opened = Browser()
    try:
        opened.open(alone)
        click_session(opened, beside["key"])
        opened.wait("document.querySelector('#session-picture p') !== null")
        assert f"The picture {beside['picture'][0]} is not beside this page" in opened.text("#session-picture")
        assert all("ERR_FILE_NOT_FOUND" in one for one in opened.errors)
    finally:
        opened.close()


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1400])
def test_no_text_is_outside_its_box(page: Path, width: int, dark: bool) -> None:
    """Nothing scrolls sideways at 400 px; at 1400 px a wide table may."""
    with browser(width=width, dark=dark) as opened:
        opened.open(page)
        assert opened.outside(scrolls=width > 400) == [] and opened.faint() == []
        for key in ("one_sub-04", "two_sub-x"):
            click_session(opened, key)
            opened.wait("document.querySelector('#session img')?.complete ?? true")
            assert opened.outside(scrolls=width > 400) == [] and opened.faint() == []
            opened.click("#session-close")


def test_a_print_is_light_and_not_wider_than_the_paper(page: Path) -> None:
    with browser(width=680, dark=True) as opened:  # A4 with margins of 15 mm
        opened.open(page)
        opened.show_for("print")
        assert opened.outside() == [] and opened.faint() == []
        assert opened.run("matchMedia('print').matches && getComputedStyle(document.body).color") == "rgb(31, 41, 51)"
        assert not opened.run("document.getElementById('find').getClientRects().length")


def test_what_is_too_wide_or_faint_is_found(page: Path) -> None:
    with browser(width=400) as opened:
        opened.open(page)
        opened.run("document.querySelector('.lead').style.color = '#ccc', 0")
        assert len(opened.faint()) == 1 and opened.faint()[0].startswith("P.lead 1.6")
        opened.run("document.querySelector('h2').style.whiteSpace = 'nowrap', 0")
        opened.run("document.querySelector('h2').textContent = 'word '.repeat(40), 0")
        assert any("H2" in one for one in opened.outside())


def test_a_script_from_a_name_does_not_run(page: Path) -> None:
    """The policy of the page allows the one script of this package; another one is an error and does nothing."""
    opened = Browser()
    try:
        opened.open(page)
        opened.run(
            "(() => { const one = document.createElement('script'); one.textContent = 'window.ran = true';"
            " document.body.append(one); })()"
        )
        assert opened.run("window.ran") is None
        assert any("Content Security Policy" in one for one in opened.errors)
    finally:
        opened.close()


def test_a_private_page_opens_pictures_and_names_nobody(tmp_path: Path) -> None:
    folder = mixed_dataset(tmp_path / "mixed")
    dataset_page.write(folder, embed=1, drawn=3)
    page = dataset_page.write(folder, private=True, embed=1, drawn=2)
    assert len([*(page.parent / "sessions").iterdir()]) == 1  # those of the first page are gone
    assert not [path for path in page.parent.rglob("*") if "one_" in path.name or "two_" in path.name]
    with browser() as opened:
        opened.open(page)
        opened.choose("#state", "picture")
        assert all(name.startswith("session ") for name in opened.texts(LISTED)) and len(opened.texts(LISTED)) == 2
        for name in opened.texts(LISTED):
            click_session(opened, name)
            opened.wait("document.querySelector('#session img').complete")
            assert opened.run("document.querySelector('#session img').naturalWidth") > 1000
            assert "one_sub" not in opened.text("body") and "subject " in opened.text("#session-facts")
            opened.click("#session-close")


@pytest.mark.slow
def test_five_thousand_sessions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prints the figures of docs/results/cost.md; see there."""
    number = 5000
    folder = repeated(tmp_path / "many", number)
    spent = {"memory of this process before, MB": _peak_mb()}
    for name, embed, drawn in (("without pictures", 0, 0), ("as by default", None, pictures.DRAWN)):
        before = time.process_time()
        page = dataset_page.write(folder, embed=embed, drawn=drawn)
        spent[f"write the page {name}, CPU s"] = time.process_time() - before
        spent[f"memory after it {name}, MB"] = _peak_mb()
    assert len([*(page.parent / "sessions").iterdir()]) == pictures.DRAWN - 7
    size = page.stat().st_size
    assert size < 5e6
    with browser() as opened:
        opened.open(page)
        assert opened.text(".range") == f"Sessions: 1–50 of {number}"
        times = opened.run("performance.getEntriesByType('navigation')[0].toJSON()")
        painted = opened.run("performance.getEntriesByName('first-contentful-paint')[0]?.startTime")
        steps = {"sort": "document.querySelector('#columns th:last-child button').click()"}
        steps["filter"] = "document.getElementById('state').value = 'outlying',"
        steps["filter"] += "document.getElementById('state').dispatchEvent(new Event('input'))"
        for name, code in steps.items():
            measured = f"(() => {{ const begin = performance.now(); {code}; document.body.offsetHeight;"
            spent[f"{name}, ms"] = opened.run(measured + " return performance.now() - begin; })()")
        assert 0 < len(opened.texts(LISTED)) <= 50
    spent |= {"page, MB": size / 1e6, "first paint, ms": painted, "loaded, ms": times["loadEventEnd"]}
    with capsys.disabled():
        print("", *(f"{name}: {value:.4g}" for name, value in spent.items()), sep="\n")


def test_text_in_the_rows_cannot_end_the_script_element() -> None:
    sessions = [session("one_a", "</script><b>", "<!--", "train")]
    made = session_table.make(sessions, GRID, {}, {"one_a": Drawn("sessions/0001.png", "</script>", 100)})
    assert "<" not in made.rows and json.loads(made.rows)["cohorts"] == ["</script><b>"]


def _peak_mb() -> float:
    """The largest memory of this process until now."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def data(page: Path) -> dict:
    """What the script of the page reads."""
    begin = '<script type="application/json" id="session-data">'
    return json.loads(page.read_text().split(begin)[1].split("</script>")[0])


def click_session(opened: Browser, key: str) -> None:
    place = opened.texts(LISTED).index(key) + 1
    opened.click(f"#rows tr:nth-child({place}) button")
