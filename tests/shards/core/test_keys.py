"""Keys of settings, as they are explained: all of them, with what the model itself says."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, get_args

import pytest
from pydantic import BaseModel, Field

from launchers.commands.config import MODELS, main
from shards.core.errors import ConfigError
from shards.core.keys import explain, keys
from shards.core.settings import Settings, Unit

pytestmark = pytest.mark.fast


class Inner(Settings):
    """Where it is scanned.

    More is said of it here.
    """

    tr: Annotated[float | None, Unit("s")] = Field(None, gt=0.05, le=20, description="repetition time")


class Outer(Settings):
    name: str = Field(description="of the lab")
    kind: Literal["a", "b"] = Field("b", description="which")
    sizes: tuple[Annotated[float, Unit("mm")], float] = Field((1, 2), description="edges")
    many: tuple[Inner, ...] = Field((), description="scanners")
    inner: Inner = Inner()


def test_each_key_says_type_unit_default_and_meaning() -> None:
    found = {key.name: key for key in keys(Outer)}
    assert list(found) == ["name", "kind", "sizes", "many", "many.tr", "inner", "inner.tr"]
    said = {name: (key.type, key.unit, key.default) for name, key in found.items()}
    assert said["name"] == ("text", "", None) and found["name"].required
    assert said["kind"] == ("a or b", "", "b") and not found["kind"].required
    assert said["sizes"] == ("2 numbers", "mm", [1.0, 2.0])
    assert said["many"] == ("list of {tr}", "", [])
    assert said["inner.tr"] == ("number > 0.05 and <= 20, or null", "s", None)
    assert found["inner"].type == "section" and found["inner"].description == "Where it is scanned."


def test_one_key_a_section_or_a_near_miss() -> None:
    assert [key.name for key in explain(Outer, "inner")] == ["inner", "inner.tr"]
    assert [key.name for key in explain(Outer, "kind")] == ["kind"]
    with pytest.raises(ConfigError, match=r"KEY: got iner.tr, .* Did you mean inner.tr\?"):
        explain(Outer, "iner.tr")
    with pytest.raises(ConfigError, match=r"KEY: got tr, .* Did you mean many.tr\?"):
        explain(Outer, "tr")


def model_of(kind: str) -> type[BaseModel]:
    module, _, name = MODELS[kind].partition(":")
    return getattr(__import__(module, fromlist=[name]), name)


@pytest.mark.parametrize("kind", MODELS)
def test_every_key_that_ships_is_explained_and_every_number_has_a_unit(kind: str) -> None:
    def named(annotation: Any, above: str) -> set[str]:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            inner = {f"{above}{name}": field.annotation for name, field in annotation.model_fields.items()}
            return set(inner) | {key for name, part in inner.items() for key in named(part, f"{name}.")}
        return {key for part in get_args(annotation) for key in named(part, above)}

    found = [*keys(model_of(kind))]
    assert {key.name for key in found} == named(model_of(kind), "")
    for key in found:
        assert key.description, key.name
        number = "number" in key.type or "integer" in key.type
        exempt = key.name.endswith("seed") or key.type.startswith("mapping")
        assert bool(key.unit) == (number and not exempt), (key.name, key.type, key.unit)


@pytest.mark.parametrize("kind", MODELS)
def test_a_default_is_what_the_model_takes(kind: str) -> None:
    """A section without required keys, written out with the defaults that are explained, is the section by itself."""
    model = model_of(kind)
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel) and not field.is_required():
            told = {key.name.partition(".")[2]: key.default for key in explain(model, name)[1:]}
            nested = {key: value for key, value in told.items() if "." not in key}
            assert field.annotation.model_validate(nested) == field.get_default(call_default_factory=True), name


def test_the_command_prints_the_same_as_text_and_as_json(capsys: pytest.CaptureFixture) -> None:
    assert main(["explain", "pretrain", "run.max_seconds", "--json"]) == 0
    text, _, facts = capsys.readouterr().out.rstrip("\n").rpartition("\n")
    (key,) = json.loads(facts)
    assert key["unit"] == "s" and key["default"] is None and key["type"] == "number > 0, or null"
    assert text.startswith("run.max_seconds\n") and "unit: s; default: null]" in text and key["description"] in text
