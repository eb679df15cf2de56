"""What pages are checked for."""

from __future__ import annotations

import base64
import re
import runpy
import sys
from collections.abc import Sequence
from hashlib import sha256
from html.parser import HTMLParser
from io import BytesIO

import pytest
from PIL import Image

from helpers.commands import ROOT
from shards.reporting import html

NASTY = '<script>alert("1")</script> & co'


class Reader(HTMLParser):
    """Collects what a page holds, and checks that its tags are balanced."""

    VOID = frozenset({"meta", "img", "br", "input"})

    def __init__(self, content: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.scripts: list[str] = []  # those that a browser runs
        self.feed(content)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "script" in self.open:
            if "type" not in self.tags[-1][1]:
                self.scripts.append(data)
        elif "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def pictures(self) -> list[tuple[str, Image.Image]]:
        found: list[tuple[str, Image.Image]] = []
        for tag, attrs in self.tags:
            if tag == "img":
                kind, data = attrs["src"].split(",", 1)
                assert kind == "data:image/png;base64"
                image = Image.open(BytesIO(base64.b64decode(data, validate=True)))
                image.load()
                assert image.format == "PNG"
                found.append((attrs["alt"], image))
        return found


def page_of(parts: Sequence[html.Part]) -> str:
    """A page with these parts alone."""
    return html.render("page.html", title="title", lead="lead", findings=[], content=parts)


def check_self_contained(content: str, scripts: int = 0) -> Reader:
    """Nothing on the page is fetched until a link is followed, and only `scripts` that its policy names are run.

    Every picture has words, every frame a title. A frame has no address; a link names a file beside the page and a
    frame of the page.
    """
    reader = Reader(content)
    assert not {tag for tag, _ in reader.tags} & {"link", "object", "embed", "base"}
    assert "url(" not in content and "@import" not in content
    frames = [attrs for tag, attrs in reader.tags if tag == "iframe"]
    assert all(attrs["sandbox"] == "allow-scripts" and attrs["title"] and "src" not in attrs for attrs in frames)
    names = {attrs["name"] for attrs in frames}
    assert len(names) == len(frames)
    for tag, attrs in reader.tags:
        assert not any(name.startswith("on") for name in attrs)
        if tag == "a":
            assert attrs["target"] in names and not re.match(r"[a-z]+:|/", attrs["href"])
        else:
            assert all(attrs[name].startswith("data:") for name in ("src", "href", "srcset") if name in attrs)
    assert all(alt for alt, _ in reader.pictures())
    (policy,) = (attrs["content"] for _, attrs in reader.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "'unsafe-inline'" not in policy.split("script-src")[1]
    hashes = [base64.b64encode(sha256(code.encode()).digest()).decode() for code in reader.scripts]
    assert re.findall("'sha256-(.*?)'", policy) == hashes and len(hashes) == scripts
    return reader


def command(monkeypatch, capsys, *words: str) -> tuple[int, str, str]:
    """Status, stdout and stderr of `tools/report.py`, run in this process."""
    monkeypatch.setattr(sys, "argv", ["tools/report.py", *words])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "tools" / "report.py"), run_name="__main__")
    out, err = capsys.readouterr()
    assert isinstance(end.value.code, int)
    return end.value.code, out, err
