"""Values of settings as they are typed, and as YAML reads them."""

from __future__ import annotations

from pathlib import Path

import pytest

from shards.conversion.settings import ConvertSettings
from shards.core.errors import ConfigError, UserError
from shards.core.presets import find
from shards.core.settings import check, typed
from slim.checkpoints.checkpoint import CheckpointError
from slim.config import load_config
from slim.evaluation.task import load_task

pytestmark = pytest.mark.fast

TREE = "data: data/mylab\nmodel: tiny\nrun: {out: %s}\n"


def written(folder: Path, out: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(TREE % out)
    return path


@pytest.mark.parametrize("out", ["001", "2024", "1e3", "1_000", "2024-01-01", "no", "on", "null", "0x10", "1.50"])
def test_a_folder_is_called_what_was_typed(out: str, tmp_path: Path) -> None:
    assert load_config(written(tmp_path, "x"), [f"run.out={out}"]).run.out == out


@pytest.mark.parametrize("out", ["001", "2024", "1_000", "no", "0x10", "1.50"])
def test_a_file_is_told_to_quote_what_yaml_reads_as_something_else(out: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.out: got .*, expected text\. .*quotes"):
        load_config(written(tmp_path, out))
    assert load_config(written(tmp_path, f"'{out}'")).run.out == out


def test_numbers_stay_numbers(tmp_path: Path) -> None:
    settings = load_config(written(tmp_path, "x"), ["run.steps=100", "optimizer.lr=1e-3", "run.max_seconds=2024"])
    assert (settings.run.steps, settings.optimizer.lr, settings.run.max_seconds) == (100, 1e-3, 2024)


@pytest.mark.parametrize(
    ("word", "in_file", "where"),
    [
        ("run.step=3", "", "command line: run.step: "),
        ("zero.stage=4", "", "command line: zero.stage: "),
        ("data=[{path: a, weigth: 2}]", "", "command line: data.0.weigth: "),
        ("model=huge", "", "command line: model: "),
        ("model.embed=-1", "", "command line: model"),
        ("run.steps=3", "zero: {stage: 4}", "{path}: zero.stage: "),
        ("zero.stage=2", "zero: {stages: 4}", "{path}: zero.stages: "),
        # checks of a section: what was typed is the cause, or the file was wrong without it
        ("zero.offload_parameters=true", "zero: {stage: 1}", "command line: zero"),
        ("zero.bucket=1000", "zero: {stage: 1, offload_parameters: true}", "{path}: zero"),
        ("windows.best=3", "windows: {k: 9}", "command line: windows.best: "),
        ("optimizer.lr=1", "windows: {k: 9, best: 3}", "{path}: windows.best: "),
        ("run.batch=1", "loss: {sig_samples: 2}", "command line: run.batch: "),
    ],
)
def test_an_error_names_where_the_value_was_given(word: str, in_file: str, where: str, tmp_path: Path) -> None:
    path = written(tmp_path, "x")
    path.write_text(f"{path.read_text()}{in_file}\n")
    with pytest.raises(ConfigError) as error:
        load_config(path, [word])
    assert error.value.line().startswith(where.format(path=path)), error.value.line()


def test_a_required_value_that_is_typed_is_no_excuse_for_the_file(tmp_path: Path) -> None:
    """Presets have no data: without them, the file would not be checked as a whole."""
    path = tmp_path / "config.yaml"
    path.write_text("model: tiny\nrun: {out: x, batch: 1}\nloss: {sig_samples: 2}\n")
    with pytest.raises(ConfigError, match=rf"^{path}: run.batch: got 1"):
        load_config(path, ["data=d"])
    with pytest.raises(ConfigError, match=r"^command line: split.family: got 'Family_ID'"):
        load_task(find("task", "hcp_sex", ""), ["split.kind=all"])


def test_a_later_check_names_where_the_value_was_given() -> None:
    def fails(field: str) -> None:
        raise ConfigError("task.yaml", field, "1", "2")

    for field, where in (("split.folds", "command line"), ("split", "command line"), ("label", "task.yaml")):
        with (
            pytest.raises(ConfigError, match=rf"^{where}: {field}: got 1, expected 2"),
            typed(["split.folds=3"], "task.yaml"),
        ):
            fails(field)


def test_mistakes_are_value_errors_too() -> None:
    """`except ValueError` in a user's code catches what the software refuses."""
    for kind in (ConfigError, CheckpointError):
        assert issubclass(kind, UserError) and issubclass(kind, ValueError)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"grid": {"shape": [90, 96, 96]}}, "grid.shape: got [90, 96, 96], expected multiples of patch, 4"),
        ({"grid": {"tr": 3}}, "grid.tr: got 3.0, expected between 0.7 and 0.8, the tr_range. Set tr_range, too"),
        ({"mask": {"ml": [9, 3]}}, "mask.ml: got [9.0, 3.0], expected a volume of 0 or more, then a larger one"),
        (
            {"clean": {"high_pass": 0.1, "low_pass": 0.01}},
            "clean.high_pass: got 0.1, expected less than low_pass, 0.01",
        ),
        (
            {"split": {"shares": [0.5, 0.5, 0.5]}},
            "split.shares: got [0.5, 0.5, 0.5], in all 1.5, expected shares of 0 or more that add up to 1",
        ),
        (
            {"split": {"column": "part", "family": "home"}},
            "split.family: got home, expected null: the split is read from the column part. Remove column or family",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused_by_key(tree: dict, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check(ConvertSettings, tree, "command line")
    assert error.value.line() == f"command line: {message}"
