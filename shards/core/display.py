"""How an object shows itself: as text in a terminal, as a table in a notebook."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape


def as_text(title: str, facts: Mapping[str, object]) -> str:
    """A title and a line for each fact; facts that are None are left out."""
    shown = {name: value for name, value in facts.items() if value is not None}
    width = max(map(len, shown), default=0)
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in shown.items())])


def as_html(title: str, facts: Mapping[str, object]) -> str:
    """The same as a table, for `_repr_html_`."""
    rows = "".join(
        f"<tr><th style='text-align:left'>{escape(name)}</th><td style='text-align:left'>{escape(str(value))}</td></tr>"
        for name, value in facts.items()
        if value is not None
    )
    return f"<div><strong>{escape(title)}</strong><table>{rows}</table></div>"
