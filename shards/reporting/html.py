"""Self-contained HTML pages, with inline style and pictures as data URIs.

A browser runs no scripts but those of this package. Only a click loads something: a picture beside the page, where the
page allows it, or an interactive view into a frame (`Views`).

A page is a template in `templates/`, filled with typed parts; `templates/parts.html` has a macro for each class of
part. All text is escaped. Equal content gives equal bytes.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar

import matplotlib.style
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from shards.core import templates
from shards.core.findings import Finding

# Okabe & Ito's colours, which colour-blind readers can distinguish.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
INK, GREY, PALE = "#1f2933", "#7b8794", "#cbd2d9"

_DPI = 120
_DRAWING = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.8,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#e4e7eb",
    "grid.linewidth": 0.7,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "text.parse_math": False,  # file names may contain $
}


def drawing() -> AbstractContextManager[None]:
    """Context in which figures do not depend on the local matplotlibrc."""
    return matplotlib.style.context(["default", _DRAWING])


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    words: str
    macro: ClassVar = "text"


@dataclass(frozen=True)
class Heading:
    """A heading inside a section."""

    title: str
    macro: ClassVar = "heading"


@dataclass(frozen=True)
class Facts:
    """Names and values, in as many columns as fit; `small` is for use next to a picture."""

    values: Mapping[str, object]
    small: bool = False
    macro: ClassVar = "facts"


@dataclass(frozen=True)
class Table:
    """A table, which scrolls sideways if it is wider than the window.

    With `numbers`, all columns except the first are right-aligned.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[object]]
    numbers: bool = False
    macro: ClassVar = "table"


@dataclass(frozen=True)
class Picture:
    """A PNG image. `alt` describes what it shows; the caption explains how to read it; scripts find it by its name."""

    png: bytes
    alt: str
    caption: str = ""
    name: str = ""
    macro: ClassVar = "picture"

    @classmethod
    def of(cls, figure: Figure, alt: str, caption: str = "", name: str = "") -> Picture:
        """Make a picture from a figure."""
        return cls(png(figure), alt, caption, name)

    @property
    def source(self) -> str:
        """The PNG as a data URI."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"

    @property
    def width(self) -> int:
        """Width on the page, in CSS pixels."""
        with Image.open(io.BytesIO(self.png)) as image:
            return round(image.width * 96 / _DPI)


@dataclass(frozen=True)
class Views:
    """Interactive views, which are files beside the page. A click on one loads it into a frame below the links.

    Attributes
    ----------
    title : str
    links : mapping of str to str
        Address of each view, relative to the page, by its name.
    note : str
        A sentence below the title.
    """

    title: str
    links: Mapping[str, str]
    note: str = ""
    macro: ClassVar = "views"

    @property
    def frame(self) -> str:
        """Name of the frame, unique on the page."""
        return f"frame {next(iter(self.links.values()))}"


@dataclass(frozen=True)
class Pairs:
    """Groups of parts, side by side if the window is wide enough."""

    groups: Sequence[Sequence[Part]]
    macro: ClassVar = "pairs"


@dataclass(frozen=True)
class Section:
    """A section of the page with a title; not shown if it is empty."""

    title: str
    parts: Sequence[Part]
    macro: ClassVar = "section"


Part = Text | Heading | Facts | Table | Picture | Views | Pairs | Section


def render(
    template: str,
    *packages: str,
    title: str,
    lead: str,
    findings: Sequence[Finding],
    scripts: Sequence[str] = (),
    pictures_beside: bool = False,
    **values: object,
) -> str:
    """Render a page. Its content security policy lets the browser run the given scripts only, and load views
    in frames.

    Parameters
    ----------
    template : str
        Name of a template that extends `page.html`.
    packages : str
        Packages with a folder `templates` that contains it, if it is not in this package.
    title, lead : str
        Heading of the page, and the sentence below it.
    findings : sequence of Finding
        Findings at the top of the page.
    scripts : sequence of str
        Names of templates with JavaScript, which are put into the page.
    pictures_beside : bool
        Whether the page may load pictures from its folder.
    values : object
        Variables of the template, mostly lists of parts; `refresh`: seconds after which a browser loads the page again.
    """
    codes = [Markup(templates.render(name, *packages, "shards.reporting")) for name in scripts]
    hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'" for code in codes]
    policy = {
        "default-src": "'none'",
        # Browsers differ in whether 'self' includes the folder of a page that was opened as a file.
        "img-src": "data: 'self' file:" if pictures_beside else "data:",
        "style-src": "'unsafe-inline'",
        "script-src": " ".join(hashes) or "'none'",
        "frame-src": "'self'",
        "form-action": "'none'",
        "base-uri": "'none'",
    }
    given = {
        "policy": Markup("; ".join(f"{kind} {allowed}" for kind, allowed in policy.items())),
        "scripts": codes,
        "refresh": None,
        "title": title,
        "lead": lead,
        "findings": findings,
        **values,
    }
    return templates.render(template, *packages, "shards.reporting", **given)


def png(figure: Figure) -> bytes:
    """Convert a figure to the bytes of a PNG."""
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=_DPI)
    # 256 colours look the same with a third of the bytes; this method also keeps rare colours
    image = Image.open(drawn).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)
    image.save(small, "PNG", optimize=True)
    return small.getvalue()


def count(number: int, noun: str) -> str:
    """A number with its noun, in the plural if needed."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def first(names: Sequence[str], count: int) -> str:
    """The first of many names, and the number of further ones."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
