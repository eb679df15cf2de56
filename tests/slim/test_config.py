"""Settings: older names of keys mean what the new ones mean."""

from __future__ import annotations

from pathlib import Path

import pytest

from shards.core.errors import ConfigError
from slim.config import PRESETS, load_config
from slim.training.compatibility import flat

pytestmark = pytest.mark.fast

BASE = "data: x\nmodel: tiny\nrun: {out: y}\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(BASE + text)
    return path


@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [
        ("stream: 100\n", [], 100),
        ("stream: null\n", [], None),
        ("stream: 100\n", ["chunk_tokens=200"], 200),
        ("chunk_tokens: 100\n", ["stream=200"], 200),
        ("", ["stream=200", "chunk_tokens=300"], 300),
        ("", ["chunk_tokens=300", "stream=null"], None),
        ("", [], 4096),
    ],
)
def test_stream_is_an_older_name_of_chunk_tokens(tmp_path: Path, text: str, words: list[str], expected: int | None):
    assert load_config(write(tmp_path, text), words).chunk_tokens == expected


def test_settings_under_either_name_are_the_same(tmp_path: Path):
    """`flat` is what a resumed run compares."""
    old, new = (flat(load_config(write(tmp_path, f"{name}: 64\n"))) for name in ("stream", "chunk_tokens"))
    assert old == new and new["chunk_tokens"] == 64 and "stream" not in new


def test_both_names_in_one_file_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="stream: got an unknown key"):
        load_config(write(tmp_path, "stream: 1\nchunk_tokens: 2\n"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", [("a", 1.0)]),
        ("[a,b]", [("a", 1.0), ("b", 1.0)]),
        ("[a,{path: b, weight: 2}]", [("a", 1.0), ("b", 2.0)]),
    ],
)
def test_data_are_one_or_several_datasets(text: str, expected: list[tuple[str, float]]) -> None:
    settings = load_config("tiny", [f"data={text}"])
    assert [(item.path, item.weight) for item in settings.data] == expected


@pytest.mark.parametrize("order", [("model=lean", "model.embed=32"), ("model.embed=32", "model=lean")])
def test_a_preset_of_the_model_is_changed(order: tuple[str, str]) -> None:
    settings = load_config("tiny", ["data=a", "run.out=2024", *order])
    assert settings.model == PRESETS["lean"].model_copy(update={"embed": 32})
    assert settings.model_name == "lean, changed" and settings.run.out == "2024"
    with pytest.raises(ConfigError, match=r"model\.embd: got an unknown key.*Did you mean embed\?"):
        load_config("tiny", ["data=a", "model.embd=32"])
