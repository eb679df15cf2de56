"""Exports, checkpoints and runs that somebody sent: what is in them is checked before it is used."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.pretrained import ALIGNED, sum_again, tool, write_run
from helpers.web import serve
from shards.core.errors import UserError
from slim.checkpoints import checkpoint, mirror
from slim.checkpoints.checkpoint import COMPLETE, CheckpointError
from slim.checkpoints.seen import Seen
from slim.checkpoints.weights import CONFIG, MODEL, SUMS, fewest_parameters, find
from slim.inference import export
from slim.inference.slim_brain import SlimBrain
from slim.reporting import run_page
from slim.training.metrics import read_metrics


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("foreign") / "run", dataset, ALIGNED)


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    export.write(SlimBrain.from_pretrained(run), run.parent / "export")
    return run.parent / "export"


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    return shutil.copytree(exported, tmp_path / "export")


def changed(folder: Path, path: tuple, value: object) -> Path:
    """An export whose config.json has another value, summed again."""
    tree = json.loads((folder / CONFIG).read_text())
    node = tree
    for part in path[:-1]:
        node = node[part]
    if value is None:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    (folder / CONFIG).write_text(json.dumps(tree))
    sum_again(folder)
    return folder


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("settings", "model", "depths"), [1, 2, 1000000]),
        (("settings", "model", "depths"), [1] * 40),
        (("settings", "model", "depths"), [1, 1000]),
        (("settings", "model", "embed"), 10**9),
        (("settings", "model", "embed"), 16384),
        (("settings", "model", "mlp_ratio"), 1e300),
        (("settings", "model", "predictor", "width"), 10**9),
        (("settings", "windows", "k"), 10**9),
        (("settings", "windows"), {"k": 10**5, "best": 10**5}),
        (("settings",), "text"),
        (("settings",), None),
        (("format",), [1]),
        (("made",), []),
        (("made", "step"), "7"),
        (("made", "weights"), "other"),
        (("made", "finetuned"), {"task": 3}),
        (("data",), []),
        (("data", "grid", "shape"), [10**9, 10**9, 10**9]),
        (("data", "grid", "patch"), 0),
        (("data", "windows", "frames"), 10**9),
        (("data", "configuration"), None),
        (("data", "ranker"), None),
        (("data", "ranker", "name"), ["a"]),
        (("seen",), {"people": "abc", "salt": None, "sessions": []}),
    ],
)
def test_a_config_that_asks_for_too_much_or_is_none_is_refused_in_one_line(
    copy: Path, path, value, monkeypatch
) -> None:
    monkeypatch.setattr("slim.inference.pretrained.Hiera", lambda *_: pytest.fail("a model was made"))
    with pytest.raises(UserError) as error:
        SlimBrain.from_pretrained(changed(copy, path, value))
    line = error.value.line()
    assert len(line.splitlines()) == 1 and str(copy) in line and len(line) < 2000, line


@pytest.mark.parametrize("settings", [{}, {"grid": 1}])
def test_a_recipe_that_is_none_is_refused_when_a_run_is_encoded(copy: Path, settings: dict) -> None:
    model = SlimBrain.from_pretrained(changed(copy, ("data", "configuration", "settings"), settings))
    with pytest.raises(UserError, match="expected the settings of a conversion"):
        model.recipe  # noqa: B018


def test_a_config_that_is_no_json_object_is_refused(copy: Path) -> None:
    for text in ("", "[1]", "[" * 10**5, "\udcff", "9" * 10**5):
        (copy / CONFIG).write_text(text, errors="surrogateescape")
        sum_again(copy)
        with pytest.raises(CheckpointError, match=r"config\.json: got unreadable"):
            find(copy)


def test_the_fewest_parameters_are_fewer_than_there_are(run: Path) -> None:
    model = SlimBrain.from_pretrained(run)
    count, fewest = sum(p.numel() for p in model.encoder.parameters()), fewest_parameters(model.settings, model.data)
    assert count / 2 < fewest <= count


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_finite_numbers_are_refused_with_the_tensors_name(copy: Path, value: float) -> None:
    tensors = load_file(copy / MODEL)
    name = sorted(tensors)[3]
    tensors[name].view(-1)[0] = value
    save_file(tensors, copy / MODEL, {"format": "pt"})
    sum_again(copy)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*got numbers that are not finite") as error:
        SlimBrain.from_pretrained(copy)
    assert error.value.field == name


@pytest.mark.parametrize("name", ["../a", "/etc/hostname", "parcels/../../a"])
def test_names_that_lead_out_of_an_export_are_refused(copy: Path, name: str) -> None:
    with open(copy / SUMS, "a") as file:
        file.write(f"{'0' * 64}  {name}\n")
    with pytest.raises(CheckpointError, match="expected names inside the folder"):
        find(copy)


def sealed_again(folder: Path, **changes: object) -> None:
    about = {**checkpoint.facts(folder), **changes}
    about.pop("seal")
    (folder / COMPLETE).write_text(checkpoint.dump({**about, "seal": checkpoint._seal(about)}))


@pytest.mark.parametrize(
    "changes",
    [
        {"step": -1},
        {"step": "7"},
        {"world_size": 10**9},
        {"global_batch": 10**12},
        {"global_batch": 0},
        {"files": []},
        {"versions": {"torch": 2}},
        {"files": {"../../victim": 3}, "sha256": {"../../victim": "0"}},
        {"files": {"a": -1}, "sha256": {"a": "0"}},
        {"files": {"a": 1}, "sha256": {"b": "0"}},
    ],
)
def test_facts_that_no_run_writes_are_refused_and_lead_no_copy_elsewhere(run: Path, tmp_path: Path, changes) -> None:
    sent = shutil.copytree(run, tmp_path / "sent" / "run")
    (tmp_path / "sent" / "run" / "victim").write_text("bad")
    folder = sent / "checkpoints" / checkpoint.tag(7)
    sealed_again(folder)
    assert checkpoint.fault(folder) is None
    sealed_again(folder, **changes)
    found = checkpoint.fault(folder)
    assert found is not None and COMPLETE in found.line()
    with pytest.raises(CheckpointError):
        mirror.recover(tmp_path / "mine" / "run", sent)
    assert not list(tmp_path.glob("mine/**/victim"))


def test_a_checkpoint_whose_file_is_a_pipe_is_refused_without_waiting(run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run, tmp_path / "run") / "checkpoints" / checkpoint.tag(7)
    (folder / "config.yaml").unlink()
    os.mkfifo(folder / "config.yaml")
    found = checkpoint.fault(folder)
    assert found is not None and "not a regular file" in found.line()


def test_lines_of_metrics_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    good = '{"step": 1, "loss": 0.5, "gain": null}\n'
    bad = ['{"step": 2, "loss": "x"}', '{"step": 3, "loss": [1]}', "[1]", '{"step": NaN}', "9" * 5000, "[" * 10**5]
    bad += ['{"step": 1e999}', '{"step": 4, "loss": ' + "9" * 400 + "}"]
    path.write_text(good + "\n".join(bad) + "\n" + good)
    lines, unreadable = read_metrics(path)
    assert [line["step"] for line in lines] == [1, 1] and unreadable >= len(bad)


def test_who_was_seen_is_checked(tmp_path: Path) -> None:
    for text in ('{"people": "abc", "salt": null, "sessions": []}', "[" * 10**5, "[]", '{"people": [1]}'):
        (tmp_path / "seen.json").write_text(text)
        with pytest.raises(UserError, match="the subjects seen in training"):
            Seen.read(tmp_path)


def test_urls_of_a_run_are_opened_only_when_asked(run: Path, dataset: Path, tmp_path: Path) -> None:
    """By the page of a run, its export and its encoder, whichever of its datasets have a URL."""
    local, line = str(dataset), {"step": 1, "epoch": 0, "samples": 2, "loss": 1.0, "samples_per_s": 2.0, "seconds": 1.0}
    with serve(dataset) as web:
        for number, paths in enumerate([[web.url], [local, f"{web.url}/"], [web.url, local, web.url]]):
            sent = shutil.copytree(run, tmp_path / f"run-{number}")
            text = (sent / "config.yaml").read_text()
            tree = json.loads(text[text.index("{") :])
            tree["data"] = [{"path": path, "weight": 1.0} for path in paths]
            tree["run"] |= {"steps": None, "epochs": 2}
            saved = sent / "checkpoints" / checkpoint.tag(7)
            for place in (sent, saved):
                (place / "config.yaml").write_text(json.dumps(tree))
            (saved / COMPLETE).unlink()
            checkpoint.seal(saved, {"step": 7})
            (sent / "metrics.jsonl").write_text(json.dumps(line) + "\n")
            opened = [path for path in paths if path != local]

            assert run_page.write(sent).is_file() and not web.asked
            done = tool("report.py", sent)
            assert done.returncode == 0 and not web.asked, done.stderr
            done = tool("export.py", sent, "--out", tmp_path / f"export-{number}")
            assert done.returncode == 0 and not web.asked, done.stderr
            told = json.loads((tmp_path / f"export-{number}" / CONFIG).read_text())["made"]["training"]
            assert [("unknown" in about) for about in told] == [bool(n) and p != local for n, p in enumerate(paths)]

            assert run_page.write(sent, remote=True).is_file() and len(web.of("manifest.json")) >= len(opened)
            web.forget()
            done = tool("report.py", sent, "--data")
            assert done.returncode == 0 and len(web.of("manifest.json")) >= len(opened), done.stderr
            web.forget()
            (sent / "dataset.json").write_text("[]")
            assert run_page.write(sent).is_file() and not web.asked


def test_tensors_of_another_shape_are_refused(copy: Path) -> None:
    tensors = load_file(copy / MODEL)
    name = sorted(tensors)[0]
    tensors[name] = torch.zeros(*tensors[name].shape, 2)
    save_file(tensors, copy / MODEL, {"format": "pt"})
    sum_again(copy)
    with pytest.raises(CheckpointError, match="belong to another configuration"):
        SlimBrain.from_pretrained(copy)


@pytest.mark.parametrize("field", ["step", "versions"])
def test_complete_may_lack_fields_that_training_writes(run: Path, tmp_path: Path, field: str) -> None:
    """Its hash uses no key, so it may be sealed without them."""
    run = shutil.copytree(run, tmp_path / "copy")
    saved = run / "checkpoints" / checkpoint.tag(7)
    about = {key: value for key, value in checkpoint.facts(saved).items() if key not in ("seal", field)}
    (saved / checkpoint.COMPLETE).write_text(json.dumps({**about, "seal": checkpoint._seal(about)}))
    if field == "versions":
        assert SlimBrain.from_pretrained(run).step == 7
        return
    with pytest.raises(checkpoint.CheckpointError, match="COMPLETE: step: got no such number"):
        SlimBrain.from_pretrained(run)
