"""Weights load whole or not at all; every window is read once; poolings are what their names say."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from helpers.commands import ROOT
from helpers.pretrained import ALIGNED, STRADDLING, write_run, write_weights
from shards.cohorts.cohort_file import find_runs
from shards.conversion import writer
from shards.conversion.session import convert
from shards.core.errors import ConfigError, RunRefused, UserError
from shards.format import layout
from shards.format.reader import Dataset
from shards.format.session_record import ScanRecord
from slim.checkpoints import checkpoint
from slim.data.collate import collate
from slim.data.samples import read_windows
from slim.inference.slim_brain import SlimBrain
from slim.inference.vectors import Features
from slim.ranking.extractor_training import train_extractor
from slim.ranking.rankers import make_ranker


@pytest.fixture
def run(dataset: Path, tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", dataset, ALIGNED)


@pytest.fixture
def opened(dataset: Path) -> Dataset:
    return Dataset(dataset)


def test_loads_the_weights_asked_for(run: Path):
    saved = run / "checkpoints" / checkpoint.tag(7)
    for weights in ("encoder", "target"):
        for folder in (run, saved):
            model = SlimBrain.from_pretrained(folder, weights)
            assert model.step == 7 and model.run_folder == run and not model.encoder.training
            given = checkpoint.read_weights(saved / checkpoint.WEIGHTS, f"{weights}.")
            for name, value in model.encoder.state_dict().items():
                torch.testing.assert_close(value, given[name], rtol=0, atol=0)


def drop(tensors: dict) -> dict:
    return {name: value for name, value in tensors.items() if name != "encoder.norm.weight"}


def reshape(tensors: dict) -> dict:
    return tensors | {"encoder.norm.weight": torch.zeros(3)}


def add(tensors: dict) -> dict:
    return tensors | {"encoder.more": torch.zeros(3)}


def empty(tensors: dict) -> dict:
    return {name: value for name, value in tensors.items() if not name.startswith("encoder.")}


@pytest.mark.parametrize("spoil", [drop, reshape, add, empty])
def test_weights_that_do_not_fit_are_refused(run: Path, spoil):
    saved = run / "checkpoints" / checkpoint.tag(7)
    write_weights(saved, spoil(load_file(saved / checkpoint.WEIGHTS)))
    with pytest.raises(checkpoint.CheckpointError, match=r"encoder\."):
        SlimBrain.from_pretrained(run)
    SlimBrain.from_pretrained(run, "target")


def test_what_is_no_run_is_refused(run: Path, tmp_path: Path):
    saved = run / "checkpoints" / checkpoint.tag(7)
    for folder, weights in ((tmp_path / "nowhere", "encoder"), (tmp_path, "encoder"), (run, "both")):
        with pytest.raises(UserError):
            SlimBrain.from_pretrained(folder, weights)
    whole = (saved / checkpoint.WEIGHTS).read_bytes()
    (saved / checkpoint.WEIGHTS).write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    for folder in (run, saved):
        with pytest.raises(checkpoint.CheckpointError, match=r"weights\.safetensors: SHA-256"):
            SlimBrain.from_pretrained(folder)
    (saved / checkpoint.WEIGHTS).write_bytes(b"cut")  # COMPLETE tells another size
    with pytest.raises(checkpoint.CheckpointError, match="no complete checkpoint"):
        SlimBrain.from_pretrained(run)
    with pytest.raises(checkpoint.CheckpointError, match=r"weights\.safetensors: got 3 bytes"):
        SlimBrain.from_pretrained(saved)


def test_random_weights_are_those_training_began_with(run: Path):
    model = SlimBrain.from_pretrained(run)
    state = torch.random.get_rng_state()
    start, other = SlimBrain.random(model, 3), SlimBrain.random(model, 4)
    assert torch.equal(state, torch.random.get_rng_state())
    for name, value in start.encoder.state_dict().items():
        assert torch.equal(value, model.encoder.state_dict()[name])
    assert not torch.equal(other.encoder.embed.own.weight, model.encoder.embed.own.weight)
    assert start.step == 0


def test_every_window_is_read_once_in_time_order(run: Path, opened: Dataset):
    """12 windows in groups of 8: the last group reaches back over 4, whose slots are not used again."""
    model, session = SlimBrain.from_pretrained(run), opened.sessions[0]
    assert session.n_kept == 12
    found = model.encode_session(opened, session)
    start = np.sort(opened.read(session, ("start",))["start"])
    np.testing.assert_allclose(found.slot_times, (start + 2) * session.tr, rtol=1e-5)
    np.testing.assert_array_equal(found.slot_window_onsets, start * session.tr)
    assert found.tokens.shape == (12, len(found.places), 32) and found.tokens.dtype == np.float32

    in_time = np.argsort(opened.read(session, ("start",))["start"])
    expected = []
    for ranks, fresh in ((in_time[:8], slice(0, 8)), (in_time[4:], slice(4, 8))):
        batch = collate([read_windows(opened, session, ranks.tolist())], model.geometry, None)
        with torch.no_grad():
            x_MC = model.encoder(batch.voxels, batch.whole)
        dense = np.full((8, np.prod(opened.grid.patch_shape), 32), np.nan, np.float32)
        dense.reshape(-1, 32)[batch.whole.cell_M.numpy()] = x_MC.numpy()
        expected.append(dense[fresh][:, found.places])
    np.testing.assert_allclose(found.tokens, np.concatenate(expected), rtol=1e-4, atol=1e-5)


def test_features_do_not_depend_on_how_groups_are_batched(run: Path, opened: Dataset):
    model, session = SlimBrain.from_pretrained(run), opened.sessions[1]
    together, apart = (model.encode_session(opened, session, batch) for batch in (2, 1))
    np.testing.assert_allclose(together.tokens, apart.tokens, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(together.places, apart.places)


def test_slots_that_straddle_windows_belong_to_the_one_at_their_middle(dataset: Path, tmp_path: Path, opened: Dataset):
    model = SlimBrain.from_pretrained(write_run(tmp_path / "straddling", dataset, STRADDLING))
    found = model.encode_session(opened, opened.sessions[0])
    # 10 slots of 4 frames in 8 windows of 5; of the second group those with their middle in windows 4 to 7
    assert len(found.tokens) == 10 + 5
    assert (np.diff(found.slot_times) > 0).all()
    # `second_S` is the mean of the frames' own times, half a frame before the middle of the slot
    inside_S = (found.slot_times - found.slot_window_onsets) / opened.sessions[0].tr + 0.5
    assert (inside_S > -1e-3).all() and (inside_S < 5).all()


def test_other_data_are_refused(run: Path, opened: Dataset):
    model, session = SlimBrain.from_pretrained(run), opened.sessions[0]
    assert model.was_trained_on(opened)
    model.data = model.data.model_copy(update={"grid": model.data.grid.model_copy(update={"mm": 2.0})})
    assert not model.was_trained_on(opened)
    with pytest.raises(ConfigError, match="grid"):
        model.encode_session(opened, session)


def same(one: Features, two: Features) -> None:
    """Bit for bit, but for the key."""
    for name, value in vars(one).items():
        if name != "key":
            np.testing.assert_array_equal(value, getattr(two, name), err_msg=name)


def test_straight_from_nifti_gives_the_very_numbers_of_the_shards(run: Path, opened: Dataset, cohort: Path):
    """The dataset was converted by the command, in a process of its own; mask and confounds lie beside the run."""
    model, source = SlimBrain.from_pretrained(run), find_runs(cohort / "cohort.yaml")[0]
    session = next(line for line in opened.sessions if line.key == source.key)
    assert session.mask_source != "computed" and source.confounds is not None
    found = model.encode_tokens(source.bold)
    same(found, model.encode_session(opened, session))
    assert found.key == source.bold.name.split(".nii")[0]
    assert (found.tr, found.source_tr) == (session.tr, session.source_tr) == (0.72, 0.72)

    z_WC = model.encode(str(source.bold))
    assert z_WC.dtype == np.float32 and z_WC.shape == (session.n_kept, ALIGNED["embed"] * 2)
    start = np.sort(opened.read(session, ("start",))["start"])
    np.testing.assert_array_equal(found.window_onsets, start * session.tr)
    np.testing.assert_allclose(z_WC, found.tokens.mean(axis=1), rtol=1e-5, atol=1e-6)  # a slot a window


def test_a_learned_ranking_and_cleaning_are_those_of_the_data(run: Path, opened: Dataset, cohort: Path, tmp_path: Path):
    """Against `convert`, packed and read as a dataset; without the extractor the run is not encoded."""
    model, source = SlimBrain.from_pretrained(run), find_runs(cohort / "cohort.yaml")[0]
    series = [tuple(opened.read(line, ("roi", "roi_centre")).values()) for line in opened.sessions[1:3]]
    train_extractor(series, 5, steps=3).save(tmp_path / "extractor")
    ranker = make_ranker("mutual", tmp_path / "extractor")
    settings = json.loads(json.dumps(opened.manifest.configuration["settings"]))
    settings["windows"]["keep"] = 9  # of 12: what is left out tells the rankings apart
    settings["clean"] |= {"confounds": ["trans_*", "rot_*"], "high_pass": 0.01}
    data = opened.manifest.data.model_copy(
        update={"ranker": ranker.identity(), "configuration": {"settings": settings}}
    )
    given = SlimBrain(replace(model._about, data=data, extractor=tmp_path / "extractor"), 7)
    given.encoder = model.encoder

    recipe = given.recipe
    assert recipe.ranker.extractor.checksum == data.ranker["extractor"]
    out = tmp_path / "converted"
    scan = convert(source, recipe.settings, out, recipe.parcels, ranker)
    assert isinstance(scan, ScanRecord)
    meta_path, data_path = writer.member_paths(out, source.key)
    assert layout.read_lines(meta_path) == [scan.tree()]
    members = meta_path.read_bytes(), data_path.read_bytes()
    writer.pack(out, [scan.model_copy(update={"split": "train"})], [], data, 10**9, lambda _: members, lambda *_: None)
    packed = Dataset(out)
    expected = given.encode_session(packed, packed.sessions[0])
    assert len(expected.tokens) == 9 and "high-pass" in packed.sessions[0].cleaned
    same(given.encode_tokens(source.bold), expected)
    assert not np.array_equal(expected.tokens[:1], model.encode_tokens(source.bold).tokens[:1])

    shutil.rmtree(tmp_path / "extractor")
    with pytest.raises(ConfigError, match=r"extractor: got none .*checksum"):
        SlimBrain(given._about, 7).encode(source.bold)
    train_extractor(series, 5, steps=4).save(tmp_path / "extractor")
    with pytest.raises(ConfigError, match=r"checksum: got .* as in"):
        SlimBrain(given._about, 7).encode(source.bold)


def test_vectors_of_windows_and_runs_of_every_stage(run: Path, cohort: Path):
    model, bold = SlimBrain.from_pretrained(run), find_runs(cohort / "cohort.yaml")[1].bold
    early, last = model.encode_tokens(bold, stage=1), model.encode_tokens(bold, stage=2)
    same(last, model.encode_tokens(bold))
    assert early.tokens.shape == (*last.tokens.shape[:2], ALIGNED["embed"])
    for name in ("places", "slot_times", "slot_window_onsets"):
        np.testing.assert_array_equal(getattr(early, name), getattr(last, name))
    np.testing.assert_allclose(model.encode(bold, per="run", stage=1), early.tokens.mean((0, 1)), rtol=1e-4, atol=1e-6)
    x_SLC = last.tokens
    expected = np.concatenate([x_SLC.mean(axis=1), x_SLC.std(axis=1)], axis=1)
    np.testing.assert_allclose(model.encode(bold, pooling="mean+sd"), expected, rtol=1e-5, atol=1e-6)
    assert model.encode(bold, pooling="location").shape == (12, x_SLC.shape[1] * x_SLC.shape[2])
    for stage in (0, 3):
        with pytest.raises(ConfigError, match="stage: got"):
            model.encode(bold, stage=stage)
    for pooling in ("cov", "attentive"):
        with pytest.raises(ConfigError, match="SlimBrainTransformer"):
            model.encode(bold, pooling=pooling)


def test_what_cannot_be_encoded_is_told(run: Path, cohort: Path, tmp_path: Path):
    model, bold = SlimBrain.from_pretrained(run), find_runs(cohort / "cohort.yaml")[0].bold
    for error, match, arguments in (
        (RunRefused, "no such file", {"image": tmp_path / "none.nii.gz"}),
        (RunRefused, "mask: got .*no such file", {"image": bold, "mask": tmp_path / "none.nii.gz"}),
        (ConfigError, "tr: got", {"image": bold, "tr": -1}),
        (ConfigError, "orientation: got 'XYZ'", {"image": bold, "orientation": "XYZ"}),
        (TypeError, "unexpected keyword argument .smooth.", {"image": bold, "smooth": 6}),
        (ConfigError, "image: got ndarray", {"image": np.zeros((4, 4, 4, 9))}),
        (RunRefused, "TR: got 1 without a unit", {"image": nib.Nifti1Image(np.zeros((8, 8, 8, 60)), np.eye(4))}),
    ):
        with pytest.raises(error, match=match):
            model.encode(**arguments)
    cut = nib.load(bold).slicer[..., :42]  # 8 windows, of which the last is never whole
    assert model.encode(cut, mask=None, dummy=0, space="MNI").shape[0] == 8
    with pytest.raises(UserError, match="windows"):
        model.encode(cut.slicer[..., :4], dummy=0)


def test_no_sort_of_weights_is_mistaken_for_another(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as if it were not installed
    monkeypatch.chdir(run.parent)
    with pytest.raises(UserError, match=r"no such folder.*pip install 'slim-brain\[hub\]'"):
        SlimBrain.from_pretrained("someone/model")
    with pytest.raises(UserError, match="run/nowhere: got no such folder, expected a run") as told:
        SlimBrain.from_pretrained("run/nowhere")  # a path, mistyped: nobody is asked
    assert "pip" not in str(told.value)


def test_the_examples_of_the_documentation_work(run: Path, cohort: Path, tmp_path: Path, monkeypatch, capsys):
    page = (ROOT / "docs" / "how_to" / "encode.md").read_text()
    monkeypatch.chdir(tmp_path)
    images = [str(source.bold) for source in find_runs(cohort / "cohort.yaml")]
    known = {"images": images * 2, "labels": ["a", "b"] * 6}
    first, second = (part.split("```")[0].replace("runs/lean", str(run)) for part in page.split("```python")[1:])
    exec(first.replace("sub-01_bold.nii.gz", images[0]), {})
    shape, (slots, _, channels) = eval(f"[{capsys.readouterr().out.replace(') (', '), (')}]")
    assert shape == (12, ALIGNED["embed"] * 2) and (slots, channels) == shape
    readme = (ROOT / "README.md").read_text().split("```python")[1].split("```")[0].replace("runs/lean", str(run))
    for code in (second, readme.replace("sub-01_bold.nii.gz", images[0])):
        exec(code, dict(known))
        assert len(capsys.readouterr().out.strip("[] \n").split()) == 5
