"""Settings: older names of keys mean what the new ones mean."""

from __future__ import annotations

from pathlib import Path

import pytest

from shards.core.errors import ConfigError
from slim.config import PRESETS, load_config
from slim.training.compatibility import begin, flat

pytestmark = pytest.mark.fast

BASE = "data: x\nmodel: tiny\nrun: {out: y}\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(BASE + text)
    return path


@pytest.mark.parametrize(
    ("word", "field", "got"),
    [
        ("chunk_tokens=0", "chunk_tokens", "got 0, expected auto, null or a whole number of 1 or more"),
        ("chunk_tokens=many", "chunk_tokens", "got 'many', expected auto, null or"),
        ("chunk_tokens=true", "chunk_tokens", "got True"),
        ("zero.stage=4", "zero.stage", "got 4, expected auto or a whole number from 0 to 3"),
        ("zero.stage=null", "zero.stage", "got None, expected auto or"),
    ],
)
def test_numbers_that_may_be_auto(tmp_path: Path, word: str, field: str, got: str) -> None:
    with pytest.raises(ConfigError, match=f"{field}: {got}"):
        load_config(write(tmp_path, ""), [word])
    assert load_config(write(tmp_path, ""), ["chunk_tokens=1e4"]).chunk_tokens == 10_000
    assert load_config(write(tmp_path, "")).chunk_tokens == load_config(write(tmp_path, "")).zero.stage == "auto"


@pytest.mark.parametrize(
    ("words", "stage"),
    [
        ([], 0),
        (["run.processes=2"], 2),
        (["zero.offload_optimizer=true"], 2),
        (["zero.offload_parameters=true"], 3),
        (["run.processes=2", "zero.stage=1"], 1),
    ],
)
def test_the_stage_depends_on_the_number_of_processes(tmp_path: Path, words: list[str], stage: int) -> None:
    chosen = load_config(write(tmp_path, ""), words)
    assert chosen.zero_stage == begin(chosen).zero.stage == stage


@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [
        ("stream: 100\n", [], 100),
        ("stream: null\n", [], None),
        ("stream: 100\n", ["chunk_tokens=200"], 200),
        ("chunk_tokens: 100\n", ["stream=200"], 200),
        ("", ["stream=200", "chunk_tokens=300"], 300),
        ("", ["chunk_tokens=300", "stream=null"], None),
        ("", [], "auto"),
    ],
)
def test_stream_is_an_older_name_of_chunk_tokens(
    tmp_path: Path, text: str, words: list[str], expected: int | str | None
):
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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["run.batch=1", "loss.sig_samples=2"],
            "run.batch: got 1, expected a multiple of loss.sig_samples, 2, the samples over which the SIG term is "
            "computed. Set run.batch=2 or loss.sig_samples=1",
        ),
        (
            ["run.batch=6", "loss.sig_samples=4"],
            "run.batch: got 6, expected a multiple of loss.sig_samples, 4, the samples over which the SIG term is "
            "computed. Set run.batch=8 or loss.sig_samples=2",
        ),
        (
            ["loss.jepa=0", "loss.mae=0"],
            "loss: got 0 for jepa and mae, expected a coefficient above 0 for loss.jepa or loss.mae",
        ),
        (["windows.k=9", "windows.best=3"], "windows.best: got 3, expected at least windows.k, 9"),
        (["model.heads=3"], "model.heads: got 3, expected a divisor of embed, 32"),
        (["model.predictor.heads=3"], "model.predictor.heads: got 3, expected a divisor of width, 64"),
        (["model.depths=[1,0]"], "model.depths: got [1, 0], expected 1 or more blocks in each stage"),
        (["model.local_stages=4"], "model.local_stages: got 4, expected at most 3, the number of stages in depths"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_by_key(tmp_path: Path, words: list[str], message: str) -> None:
    path = write(tmp_path, "")
    with pytest.raises(ConfigError) as error:
        load_config(path, words)
    assert error.value.line() == f"command line: {message}"


def test_a_group_larger_than_the_batch_is_accepted_without_a_sig_term() -> None:
    assert load_config("tiny", ["data=a", "run.batch=1", "loss.sig_samples=2", "objective=mae"]).run.batch == 1
