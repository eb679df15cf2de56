"""One self-contained HTML page: style inline, pictures as data URIs, nothing fetched, nothing that runs.

Every helper returns a string of HTML and escapes the text it is given. Equal content gives equal bytes.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from html import escape

import matplotlib.style
from matplotlib.figure import Figure
from PIL import Image

from shards.core.findings import Finding

# Okabe & Ito's colours, told apart by colour-blind readers too.
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
    "text.parse_math": False,  # names of people's files may hold $
}
_CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
       color: #1f2933; background: #fff; max-width: 1120px; margin: 0 auto; padding: 24px 20px 64px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 20px; margin: 40px 0 8px; padding-top: 14px; border-top: 1px solid #cbd2d9; }
h3 { font-size: 16px; margin: 24px 0 6px; overflow-wrap: anywhere; }
p { margin: 6px 0 10px; max-width: 80ch; }
.lead { font-size: 18px; color: #52606d; margin-bottom: 18px; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: 10px 24px; }
dt { color: #616e7c; font-size: 13px; } dd { margin: 0; font-weight: 600; overflow-wrap: anywhere; }
dl.small { gap: 4px 24px; margin: 6px 0; } dl.small dd { font-size: 14px; font-weight: 400; line-height: 1.35; }
ul.notes { list-style: none; padding: 0; margin: 12px 0; }
li { padding: 8px 12px; margin: 6px 0; border-left: 5px solid; border-radius: 3px; overflow-wrap: anywhere; }
li.good { background: #e9f6f1; border-color: #009e73; }
li.look { background: #fdf3e1; border-color: #e69f00; }
li.bad { background: #fbe9e0; border-color: #d55e00; }
li b { margin-right: 6px; }
.scroll { overflow-x: auto; margin: 10px 0; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 14px 5px 0; text-align: left; vertical-align: top; border-bottom: 1px solid #e4e7eb; }
th { color: #52606d; font-weight: 600; white-space: nowrap; } td.number, th.number { text-align: right; }
td { overflow-wrap: anywhere; min-width: 5em; } td.number { white-space: nowrap; }
tr:has(td.number) td:first-child { min-width: 10em; overflow-wrap: break-word; }
figure { margin: 14px 0 20px; } figure img { max-width: 100%; height: auto; display: block; }
figcaption { font-size: 14px; color: #3e4c59; max-width: 95ch; margin-top: 4px; }
.pairs { display: grid; grid-template-columns: repeat(auto-fit, minmax(440px, 1fr)); gap: 8px 32px; }
@media (max-width: 560px) { .pairs { grid-template-columns: 1fr; }
  dl { grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); } }
details { margin: 10px 0; } summary { cursor: pointer; font-weight: 600; }
pre { background: #f5f7fa; padding: 12px; overflow-x: auto; font-size: 13px; line-height: 1.4; }
@media print { body { max-width: none; padding: 0; font-size: 12px; } figure, tr, li { break-inside: avoid; }
  h2, h3 { break-after: avoid; } .scroll, pre { overflow: visible; } pre { white-space: pre-wrap; } }
"""
_WORDS = {"good": "Good:", "look": "Look:", "bad": "Trouble:"}


def drawing() -> AbstractContextManager[None]:
    """A context in which figures look alike on every machine, whatever its matplotlibrc says."""
    return matplotlib.style.context(["default", _DRAWING])


def page(title: str, lead: str, *parts: str) -> str:
    """The whole page. Its content policy forbids the browser to fetch or to run anything."""
    # neither is covered by default-src: a form that sends, and a <base> that turns links elsewhere
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; form-action 'none'; base-uri 'none'"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f'<p class="lead">{escape(lead)}</p>\n' + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> str:
    """A titled part of the page; nothing where it has no content."""
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(parts) + "\n</section>" if any(parts) else ""


def count(number: int, noun: str) -> str:
    """A number with its noun, in the plural where it is not one."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def first(names: Sequence[str], count: int) -> str:
    """The first of many names, and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def heading(title: str) -> str:
    """A heading inside a section."""
    return f"<h3>{escape(title)}</h3>"


def text(words: str) -> str:
    """A paragraph."""
    return f"<p>{escape(words)}</p>"


def notes(found: Iterable[Finding]) -> str:
    """Findings, to be read first. A word tells the severity, not colour alone."""
    items = "\n".join(
        f'<li class="{one.severity}"><b>{_WORDS[one.severity]}</b>{escape(one.text)}</li>' for one in found
    )
    return f'<ul class="notes">\n{items}\n</ul>' if items else ""


def facts(pairs: Mapping[str, object], small: bool = False) -> str:
    """Names and values, in columns as wide as the window allows; `small` beside a picture, not at the page's head."""
    items = "\n".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>" for name, value in pairs.items()
    )
    kind = ' class="small"' if small else ""
    return f"<dl{kind}>\n{items}\n</dl>"


def table(head: Sequence[str], rows: Iterable[Sequence[object]], numbers: bool = False) -> str:
    """A table that scrolls sideways where it is wider than the window.

    With `numbers`, all columns but the first are aligned on the right.
    """

    def cells(tag: str, values: Sequence[object]) -> str:
        kinds = [' class="number"' if numbers and column else "" for column in range(len(values))]
        return "".join(f"<{tag}{kind}>{escape(str(value))}</{tag}>" for kind, value in zip(kinds, values, strict=True))

    body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table>\n<thead><tr>{cells("th", head)}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table></div>"
    )


def png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG."""
    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=_DPI)
    # 256 colours look the same in a third of the bytes; this method keeps the rare ones too
    image = Image.open(drawn).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=2)
    image.save(small, "PNG", optimize=True)
    return small.getvalue()


def embedded(drawn: bytes, alt: str, caption: str = "") -> str:
    """A PNG of `png` inside the page. `alt` tells what can be seen; the caption says how to read it."""
    with Image.open(io.BytesIO(drawn)) as image:
        width = round(image.width * 96 / _DPI)
    source = f"data:image/png;base64,{base64.b64encode(drawn).decode()}"
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure><img src="{source}" width="{width}" alt="{escape(alt)}">{below}</figure>'


def picture(figure: Figure, alt: str, caption: str = "") -> str:
    """A figure inside the page; see `embedded`."""
    return embedded(png(figure), alt, caption)


def pairs(*parts: str) -> str:
    """Parts side by side where the window is wide enough."""
    return '<div class="pairs">\n' + "\n".join(parts) + "\n</div>"


def folded(title: str, content: str) -> str:
    """Preformatted text that opens on a click."""
    return f"<details><summary>{escape(title)}</summary><pre>{escape(content)}</pre></details>"
