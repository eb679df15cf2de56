"""An exported folder is all that another machine needs, and what is wrong with one is told by name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.commands import ROOT
from helpers.pretrained import ALIGNED, tool, write_run
from launchers.run_setup import prepare_run
from shards.cohorts.cohort_file import find_runs
from shards.core.errors import UserError
from shards.core.extras import EXTRAS
from shards.core.files import sha256
from shards.format.manifest import DataRecord
from shards.format.reader import Dataset
from slim.checkpoints.weights import CONFIG, MODEL, SUMS, Weights
from slim.config import load_run
from slim.inference import export
from slim.inference.slim_brain import SlimBrain
from slim.ranking.extractor_training import train_extractor
from slim.ranking.rankers import make_ranker

# A process in which no package of an extra can be imported runs the rest of its arguments.
WITHOUT = """
import runpy, sys
for name in {extras!r}:
    sys.modules[name] = None
sys.argv = sys.argv[1:]
sys.path.insert(0, {root!r})
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def without(*words: object, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT.format(root=str(ROOT), extras=sorted(EXTRAS)), *map(str, words)],
        cwd=cwd,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose data were ranked by an extractor, which lies with the dataset as `make_shards.py` leaves it."""
    folder = tmp_path_factory.mktemp("export")
    data = folder / "mylab"
    shutil.copytree(dataset, data, ignore=shutil.ignore_patterns("work", "report"))
    opened = Dataset(data)
    series = [tuple(opened.read(line, ("roi", "roi_centre")).values()) for line in opened.sessions[:2]]
    train_extractor(series, 5, steps=3).save(data / "extractor")
    manifest = opened.manifest.tree() | {"ranker": make_ranker("mutual", data / "extractor").identity()}
    (data / "manifest.json").write_text(json.dumps(manifest))
    return write_run(folder / "secret" / "lean", data, ALIGNED)


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "deep" / "lean"
    export.write(SlimBrain.from_pretrained(run), out)
    return out


@pytest.fixture(scope="module")
def bold(cohort: Path) -> Path:
    return find_runs(cohort / "cohort.yaml")[0].bold


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Path:
    return shutil.copytree(exported, tmp_path / "copied")


def test_what_was_exported_is_what_is_loaded(run: Path, exported: Path, bold: Path, tmp_path: Path):
    ours, theirs = SlimBrain.from_pretrained(run), SlimBrain.from_pretrained(exported)
    for name, value in ours.encoder.state_dict().items():
        assert torch.equal(value, theirs.encoder.state_dict()[name]), name
    assert (theirs.step, theirs.data, theirs.run_folder) == (7, ours.data, exported)
    assert theirs.settings.model == ours.settings.model and theirs.settings.run.seed == ours.settings.run.seed
    np.testing.assert_array_equal(theirs.encode(bold), ours.encode(bold))

    target = tmp_path / "target"
    export.write(SlimBrain.from_pretrained(run, "target"), target)
    assert torch.equal(SlimBrain.from_pretrained(target).encoder.space, ours.encoder.space * 0.5)
    with pytest.raises(UserError, match="weights: got target, expected encoder"):
        SlimBrain.from_pretrained(target, "encoder")
    again = tmp_path / "again"
    export.write(theirs, again)  # an export of an export says the same
    assert {path.name: sha256(path) for path in again.rglob("*.*")} == {
        path.name: sha256(path) for path in exported.rglob("*.*")
    }


def test_a_fresh_process_without_training_software_gives_the_same_bits(run: Path, exported: Path, bold: Path, tmp_path):
    """By `tools/embed.py`, elsewhere, with the dataset and the run out of reach."""
    moved = shutil.copytree(exported, tmp_path / "moved")
    away = run.parent.parent / "away"
    (run.parent.parent / "mylab").rename(away)
    try:
        done = without(ROOT / "tools" / "embed.py", "moved", bold, "--out", "z.npz", cwd=tmp_path)
    finally:
        away.rename(run.parent.parent / "mylab")
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "z.npz") as found:
        np.testing.assert_array_equal(found["vectors"], SlimBrain.from_pretrained(exported).encode(bold))
        assert json.loads(str(found["about"]))["checksum"] == SlimBrain.from_pretrained(moved).checksum


def test_the_folder_says_what_is_in_it_and_where_from(run: Path, exported: Path, dataset: Path):
    about = json.loads((exported / CONFIG).read_text())
    assert about["made"]["step"] == 7 and about["made"]["weights"] == "encoder"
    assert about["made"]["commit"] == "5e1f+"
    assert set(about["made"]["versions"]) == {"python", "torch", "deepspeed", "numpy"}
    assert about["data"]["configuration"] == Dataset(dataset).manifest.configuration
    manifest = Dataset(dataset).manifest
    (training,) = about["made"]["training"]
    assert (training["sessions"], training["subjects"]) == (manifest.sessions["train"], manifest.subjects["train"])
    text = "".join(path.read_text(errors="replace") for path in exported.rglob("*") if path.is_file())
    assert str(run.parent) not in text and "secret" not in text  # nothing of this machine travels
    card = (exported / "README.md").read_text()
    for word in ("16 x 16 x 16 voxels of 16 mm", "TR 0.72 s", "`mutual`", "Cleaning: none", "| mylab | synthetic | "):
        assert word in card, word
    assert card.count("```python") == 1
    checked = subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=exported, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    readable = {path.stat().st_mode & 0o777 for path in exported.rglob("*") if path.is_file()}
    umask = os.umask(0)
    os.umask(umask)
    assert readable == {0o666 & ~umask}  # by those whom its owner shares folders with
    files = {path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file()}
    assert files - {line.split(": ")[0] for line in checked.stdout.splitlines()} == {SUMS, "README.md"}


def test_the_card_may_be_edited_and_no_other_file(copied: Path):
    (copied / "README.md").write_text("# mine\n")
    SlimBrain.from_pretrained(copied)
    names = [path for path in copied.rglob("*") if path.is_file() and path.name not in (SUMS, "README.md")]
    assert len(names) == 4  # weights and config, of the encoder and of the extractor
    for path in names:
        whole = path.read_bytes()
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        with pytest.raises(UserError, match=f"{path.name}: SHA-256: got"):
            SlimBrain.from_pretrained(copied)
        path.unlink()
        with pytest.raises(UserError, match=f"{path.name}: got no such file"):
            SlimBrain.from_pretrained(copied)
        path.write_bytes(whole)
    (copied / SUMS).unlink()
    with pytest.raises(UserError, match=f"{SUMS}: got no such file"):
        SlimBrain.from_pretrained(copied)


def resum(folder: Path) -> None:
    """Checksums that fit, whatever the files hold."""
    names = [line.split("  ")[1] for line in (folder / SUMS).read_text().splitlines()]
    (folder / SUMS).write_text("".join(f"{sha256(folder / name)}  {name}\n" for name in names))


def test_weights_of_another_model_are_refused_by_name(copied: Path):
    whole = load_file(copied / MODEL)
    for tensors, named in (
        ({name: value for name, value in whole.items() if name != "norm.weight"}, "norm.weight: got no such tensor"),
        (whole | {"norm.weight": torch.zeros(3)}, r"norm.weight: got \(3,\), expected \(32,\)"),
        (whole | {"more": torch.zeros(3)}, r"more: got \(3,\), expected no such tensor"),
    ):
        save_file(tensors, copied / MODEL)
        resum(copied)
        with pytest.raises(UserError, match=named):
            SlimBrain.from_pretrained(copied)
    about = json.loads((copied / CONFIG).read_text())
    (copied / CONFIG).write_text(json.dumps(about | {"format": 99}))
    resum(copied)
    with pytest.raises(UserError, match="format: got 99, expected 1"):
        SlimBrain.from_pretrained(copied)


def test_an_extractor_out_of_reach_is_told_and_can_be_named(run: Path, tmp_path: Path):
    data = run.parent.parent / "mylab"
    data.rename(run.parent.parent / "away")
    try:
        refused = tool("export.py", run, "--out", tmp_path / "out")
        extractor = run.parent.parent / "away" / "extractor"
        done = tool("export.py", run, "--out", tmp_path / "out", "--extractor", extractor, "--json")
    finally:
        (run.parent.parent / "away").rename(data)
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1
    for word in ("extractor: got none", str(data / "extractor"), "checksum", "give its path as `extractor`"):
        assert word in refused.stderr
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert "extractor/extractor.safetensors" in facts["files"] and facts["step"] == 7
    taken = tool("export.py", run, "--out", tmp_path / "out")
    assert taken.returncode == 2 and "a new or empty folder" in taken.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # nothing half-written


def test_a_run_keeps_the_extractor_of_its_data(run: Path, bold: Path, tmp_path: Path):
    written = load_run(run / "config.yaml")
    changed = {"out": str(tmp_path / "run"), "wandb": "disabled"}
    prepare_run(written.model_copy(update={"run": written.run.model_copy(update=changed)}))
    shutil.copytree(run / "checkpoints", tmp_path / "run" / "checkpoints")
    data = run.parent.parent / "mylab"
    away = data.rename(data.with_name("elsewhere"))
    try:
        theirs = SlimBrain.from_pretrained(tmp_path / "run").encode(bold)
    finally:
        away.rename(data)
    np.testing.assert_array_equal(theirs, SlimBrain.from_pretrained(run).encode(bold))


def test_the_label_image_of_the_parcels_travels(run: Path, bold: Path, tmp_path: Path):
    """A dataset knows its checksum alone, so it has to be named once."""
    model = SlimBrain.from_pretrained(run)
    grid = model.recipe.settings.grid.grid()
    labels = np.indices(grid.shape).sum(axis=0) // 8 + 1
    image = tmp_path / "atlas.nii"
    nib.save(nib.Nifti1Image(labels.astype(np.int16), grid.affine), image)
    tree = json.loads(json.dumps(model.data.tree()))
    tree["configuration"]["settings"]["parcels"]["image"] = {"name": image.name, "sha256": sha256(image)}

    def made(parcels: Path | None) -> SlimBrain:
        about: Weights = replace(model._about, data=DataRecord.model_validate(tree), parcels=parcels)
        return SlimBrain(about, 7)

    with pytest.raises(UserError, match=r"parcels: got none .*label image atlas\.nii"):
        made(None).encode(bold)
    export.write(made(image), tmp_path / "out")
    image.write_bytes(image.read_bytes() + b"\0")
    with pytest.raises(UserError, match="SHA-256: got"):
        made(image).encode(bold)
    theirs = SlimBrain.from_pretrained(tmp_path / "out")
    assert theirs.recipe.settings.parcels.image == tmp_path / "out" / "parcels" / "atlas.nii"
    assert len(theirs.encode(bold)) == 12


class Hub:
    """In place of `huggingface_hub`: one model."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder, self.asked = name, folder, []

    def snapshot_download(self, name: str, revision: str | None, allow_patterns: list[str], **options: object) -> str:
        self.asked.append(revision)
        self.options = options
        if name != self.name:
            raise RuntimeError(f"404 Client Error: {name} not found")
        for path in self.folder.rglob("*"):
            if path.is_file():
                relative = path.relative_to(self.folder)
                assert any(relative.match(pattern) for pattern in allow_patterns), relative
        return str(self.folder)


def test_probing_an_export_leaves_it_as_it_was(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What is found on people does not lie where it would be shared with the weights."""
    export.write(SlimBrain.from_pretrained(run, "target"), tmp_path / "lean")
    before = sorted((tmp_path / "lean").rglob("*"))
    monkeypatch.chdir(tmp_path)
    task = tmp_path / "score.yaml"
    task.write_text(
        "{name: s, type: regression, label: score, pooling: mean, bootstrap: 100, permutations: 99, "
        "split: {kind: folds, folds: 3, repeats: 1}}"
    )
    done = tool("probe.py", "lean", "--data", run.parent.parent / "mylab", "--task", task, "--random-seeds", 1)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "lean-results" / "report" / "report.json").read_text())
    assert report["facts"]["s"]["weights"] == "target" and report["facts"]["s"]["run"] == "lean"
    assert sorted((tmp_path / "lean").rglob("*")) == before


def test_a_name_on_the_hub(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hub = Hub("someone/lean", exported)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.chdir(tmp_path)
    loaded = SlimBrain.from_pretrained("someone/lean")
    assert loaded.step == 7 and loaded.results == Path("lean-results") and hub.asked == [None]
    assert SlimBrain.from_pretrained("someone/lean@v1.0").step == 7 and hub.asked == [None, "v1.0"]
    with pytest.raises(UserError, match=r"someone/other: got no such folder, and the hub does not provide it .*404"):
        SlimBrain.from_pretrained("someone/other")
    asked = {"cache_dir": tmp_path, "token": "secret", "local_files_only": True}
    assert SlimBrain.from_pretrained("someone/lean", revision="v2", **asked).step == 7
    assert hub.asked[-1] == "v2" and hub.options == asked
    with pytest.raises(UserError, match=r"someone/lean@v1: revision: got v2, expected v1, as in the name, or none"):
        SlimBrain.from_pretrained("someone/lean@v1", revision="v2")
    with pytest.raises(UserError, match=r"revision: got v2, expected none, as this is no name on the hub"):
        SlimBrain.from_pretrained(exported, revision="v2")


def test_a_model_is_saved_and_pushed_as_it_is_exported(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = SlimBrain.from_pretrained(exported)
    assert model.save_pretrained(tmp_path / "saved") == tmp_path / "saved"
    assert SlimBrain.from_pretrained(tmp_path / "saved").checksum == model.checksum
    with pytest.raises(UserError, match="a folder with files"):
        model.save_pretrained(tmp_path / "saved")
    calls = []

    class Api:
        def __init__(self, token: str | None):
            self.token = token

        def create_repo(self, name: str, private: bool, exist_ok: bool) -> None:
            calls.append((self.token, name, private, exist_ok))

        def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> SimpleNamespace:
            if repo_id == "other/lean":
                raise PermissionError("403 Forbidden")
            assert SlimBrain.from_pretrained(folder_path).checksum == model.checksum
            calls.append((repo_id, commit_message))
            return SimpleNamespace(commit_url="https://hub/commit/1")

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(HfApi=Api))
    assert model.push_to_hub("someone/lean", token="t", commit_message="first") == "https://hub/commit/1"
    assert calls == [("t", "someone/lean", True, True), ("someone/lean", "first")]  # private, unless asked otherwise
    with pytest.raises(UserError, match=r"other/lean: got a model that the hub does not take .*403"):
        model.push_to_hub("other/lean")
    with pytest.raises(UserError, match="push_to_hub: repo_id: got lean, expected OWNER/NAME"):
        model.push_to_hub("lean")


def test_a_model_shows_what_it_is(exported: Path):
    model = SlimBrain.from_pretrained(exported, device="cpu")
    text, page = repr(model), model._repr_html_()
    for part in (f"{model.made['weights']} after 7 steps", "M parameters", "voxels of", "TR 0.72 s", "cpu"):
        assert part in text and part in page, part
    assert len(text.splitlines()) < 12 and page.count("<tr>") == len(text.splitlines()) - 1
    assert "random" in repr(SlimBrain.random(model, 0))
