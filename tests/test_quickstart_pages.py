"""The pages of `make quickstart` in a browser: everything that opens is opened, at two widths, in light and dark.

`make test-pages` runs it, with the folder of the quickstart in SLIM_QUICKSTART. Without that, the tests are skipped:
pages of an earlier version may lie there.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from helpers.browser import REASON, Browser, browser, find

FOLDER = Path(os.environ.get("SLIM_QUICKSTART", "nowhere"))
DATASET, RUN = (FOLDER / name / "report/index.html" for name in ("shards", "pretrain"))
pytestmark = [
    pytest.mark.skipif(not (DATASET.is_file() and RUN.is_file()), reason="make quickstart test-pages"),
    pytest.mark.skipif(find() is None, reason=REASON),
]

LISTED = "#rows td:first-child button"
DRAWN = "document.readyState === 'complete' && document.querySelector('canvas, svg')?.clientWidth > 100"


def fits(opened: Browser, width: int) -> None:
    """All texts are inside their boxes and have enough contrast; only at 1400 px may a wide table scroll."""
    assert opened.outside(scrolls=width > 400) == [] and opened.faint() == []


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("page", [DATASET, RUN], ids=["dataset", "run"])
def test_everything_that_opens_fits(page: Path, width: int, dark: bool) -> None:
    with browser(width=width, dark=dark) as opened:
        opened.open(page)
        assert page.stat().st_size < 5e6 and opened.run("performance.getEntriesByType('resource').length") == 0
        fits(opened, width)
        for place in range(len(opened.texts("summary"))):
            opened.run(f"document.querySelectorAll('summary')[{place}].setAttribute('data-place', {place})")
            opened.click(f"summary[data-place='{place}']")
            assert opened.run(f"document.querySelectorAll('summary')[{place}].parentElement.open")
        fits(opened, width)
        assert opened.run("[...document.images].every((one) => one.complete && one.naturalWidth > 0 && one.alt)")


@pytest.mark.parametrize("width", [400, 1400])
def test_every_session_opens_and_is_found_again(width: int) -> None:
    with browser(width=width) as opened:
        opened.open(DATASET)
        names = opened.texts(LISTED)
        assert len(names) == min(50, len(set(names))) > 0
        for place, name in enumerate(names[:15], 1):
            opened.click(f"#rows tr:nth-child({place}) button")
            assert opened.text("#session-title") == name
            opened.wait("document.querySelector('#session img')?.complete ?? true")
            fits(opened, width)
            opened.click("#session-close")
        for column in range(1, len(opened.texts("#columns th")) + 1):
            opened.click(f"#columns th:nth-child({column}) button")
            assert sorted(opened.texts(LISTED)) == sorted(names) or len(names) == 50
        opened.write("#find", names[-1])
        assert names[-1] in opened.texts(LISTED)


@pytest.mark.parametrize("width", [400, 1400])
def test_every_view_of_the_first_session_is_drawn(width: int) -> None:
    with browser(width=width) as opened:
        opened.open(DATASET)
        opened.click("details.views summary")
        links = opened.run("[...document.querySelector('details.views').querySelectorAll('a')].map((one) => one.href)")
        endings = [link.rsplit("_", 1)[1] for link in links]
        assert endings == ["mean.html", "tsnr.html", "kept.html", "windows.html"]
        for place, link in enumerate(links, 1):
            opened.click(f"details.views a:nth-of-type({place})")
            opened.wait(DRAWN, frame=link.rsplit("/", 1)[1])
            fits(opened, width)


def test_the_windows_tell_displacement_and_parcels() -> None:
    path = sorted((DATASET.parent / "views").glob("*_windows.html"))[0]
    with browser() as opened:
        opened.open(path)
        layers = opened.texts("#choice label")
        assert layers == ["energy (mean z²)", "predicted from other parcels", "predicted from frames nearby", "mean z"]
        for place in range(len(layers)):
            opened.run(f"document.querySelectorAll('#choice input')[{place}].click(), 0")
            assert len(opened.texts("#parcels tr")) == 8
            fits(opened, 1400)
        assert " mm" in opened.text("#facts") and "framewise displacement" in opened.text("#key")
