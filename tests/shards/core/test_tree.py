"""YAML text: the same values as those of PyYAML, and what settings never hold is refused in one line."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import yaml

from helpers.commands import ROOT
from shards.core.errors import ConfigError
from shards.core.settings import Settings, check, load, override, read_yaml
from shards.core.tree import MOST_DEPTH, TreeError, parse

pytestmark = pytest.mark.fast


class Example(Settings):
    steps: int = 1
    lr: float = 1.0
    out: str = ""


def bomb() -> str:
    """483 bytes that stand for 10^9 values."""
    lines = ["a: &a [" + ",".join(["x"] * 10) + "]"]
    for before, name in zip("abcdefgh", "bcdefghi", strict=True):
        lines.append(f"{name}: &{name} [" + ",".join([f"*{before}"] * 10) + "]")
    return "\n".join(lines)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_configurations_are_read_as_pyyaml_reads_them(path: Path) -> None:
    assert parse(path.read_text()) == json.loads(json.dumps(yaml.safe_load(path.read_text()), default=str))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "a: 1e-3",
        "a: [.inf, -.inf, 1., 1.5e+3, 685.230_15e+03, 190:20:30.15]",
        "a: [0, -0, 0x1f, 010, -1_0, -0b11, 12:00:00]",
        "a: [yes, off, ~, null, 'yes', !!int '5', !!str 5]",
        "a: &x {b: 1, c: 2}\nd: {<<: *x, b: 3}\ne: {<<: [{b: 4}, *x], f: *x}\n'<<': 1",
        "a: |\n  two\n  lines\nb: >-\n  one\n  line\n",
    ],
)
def test_values_are_those_of_pyyaml(text: str) -> None:
    assert parse(text) == yaml.safe_load(text)


def test_keys_and_dates_are_text_as_they_are_written() -> None:
    text = "2020-01-01: 2020-01-02\n1: one\n01: zero one\nyes: true\n~: none\n"
    assert parse(text) == {"2020-01-01": "2020-01-02", "1": "one", "01": "zero one", "yes": True, "~": "none"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (bomb(), "more than 50000 values"),
        ("a: &a [*a]", "inside its own anchor"),
        ("&a {b: *a}", "inside its own anchor"),
        ("a: *b", "before its anchor"),
        ("- 1\n" * 60_000, "more than 50000 values"),
        ("a: " + "x" * 2_000_000, "2000003 characters"),
        ("[" * 100_000, f"more than {MOST_DEPTH} levels | exceeded maximum nesting depth"),
        ("{a: " * 100_000, f"more than {MOST_DEPTH} levels | exceeded maximum nesting depth"),
        ("a: " + "9" * 5000, "no whole number of at most 18 digits"),
        ("a: 0x" + "f" * 5000, "no whole number of at most 18 digits"),
        ("a: " + ":".join(["10"] * 20_000), "no whole number of at most 18 digits"),
        ("a: 0b_", "no whole number"),
        ("a: !!float one", "no number"),
        ("a: !!bool maybe", "no yes or no"),
        ("a: 1\nb: 2\na: 3", "the key 'a' a second time in line 3"),
        ("? [a, b]\n: 1", "a key in line 1 that is not text"),
        ("a: !!python/object/apply:os.system [ls]", "the tag"),
        ("a: !!binary AAAA", "binary"),
        ("a: {<<: 1}", "a value that is not a mapping"),
        ("a: 1\n---\nb: 2", "a second document"),
        ("a: \0", "control characters"),
        ("a: \udc80", "not UTF-8"),
        ("a: [1, 2", "in line"),
    ],
    ids=lambda value: value[:20],
)
def test_what_settings_never_hold_is_refused_at_once(text: str, words: str, tmp_path: Path) -> None:
    began = time.process_time()
    with pytest.raises(TreeError, match=r"^[^\n]*$") as refused:
        parse(text)
    assert any(word in str(refused.value) for word in words.split(" | ")) and len(str(refused.value)) < 300
    path = tmp_path / "settings.yaml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError):
        read_yaml(path)
    with pytest.raises(ConfigError, match=r"^[^\n]*$"):
        override({}, [f"a.b={text}"])
    assert time.process_time() - began < 5


def test_files_that_are_no_settings(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    for content, words in (
        (b"\xff\xfea", "not UTF-8"),
        (b"a: 1\nb: \xff", "in line 2"),
        (b"- 1", "a list at the top level"),
        (b"a: 1\n" * 300_000, "a file of 1500000 bytes"),
        (b"<!DOCTYPE html><html>", "an HTML page"),
    ):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=words):
            read_yaml(path)
    for missing in (tmp_path, tmp_path / "none.yaml", tmp_path / ("n" * 300), "a\0b"):
        with pytest.raises(ConfigError, match="no such file"):
            read_yaml(missing)
    link = tmp_path / "link.yaml"
    link.symlink_to("nowhere")
    with pytest.raises(ConfigError, match="which does not exist"):
        read_yaml(link)
    path.write_bytes(b"")
    assert read_yaml(path) == {}
    for encoding in ("utf-8-sig", "utf-16"):
        path.write_bytes("out: é".encode(encoding))
        assert load(Example, path).out == "é"


def test_overrides_are_numbers_only_where_people_mean_them() -> None:
    assert override({}, ["lr=1e-3", "a.b=2E4", "out=nan", "c="]) == {
        "lr": 1e-3,
        "a": {"b": 2e4},
        "out": "nan",
        "c": None,
    }
    with pytest.raises(ConfigError, match="50 parts, expected at most"):
        override({}, [".".join(["a"] * 50) + "=1"])
    with pytest.raises(ConfigError, match="a is a value"):
        override({"a": 1}, ["a.b=1"])


def test_an_error_shows_the_start_of_what_was_got() -> None:
    with pytest.raises(ConfigError) as refused:
        check(Example, {"steps": ["x" * 100_000]}, "settings.yaml")
    assert len(refused.value.line()) < 500
    with pytest.raises(ConfigError) as refused:
        check(Example, {"x\n" * 100_000: 1}, "settings.yaml")
    assert len(refused.value.line()) < 500 and r"x\nx" in refused.value.line()
