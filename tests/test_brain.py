"""Weights load whole or not at all; every window is read once; poolings are what their names say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from shards.errors import ConfigError, DatasetError, UserError
from shards.reader import Dataset
from shards.settings import check
from slim import checkpoint
from slim.batch import collate, read_windows
from slim.brain import SlimBrain
from slim.config import PretrainSettings
from slim.objective import Objective

ALIGNED = {"embed": 16, "heads": 2, "depths": (1, 1), "unit": (5,), "strides": ((5, 1, 1, 1),), "local_stages": 1}
STRADDLING = {
    "embed": 16,
    "heads": 2,
    "depths": (1, 1, 1),
    "unit": (4,),
    "strides": ((2, 1, 1, 1), (2, 1, 1, 1)),
    "local_stages": 2,
}  # slots of 4 frames, windows of 5


def write_run(folder: Path, dataset: Path, sizes: dict, seed: int = 3) -> Path:
    """A run folder as a pretraining leaves it, with the weights it would begin with; a target of its own."""
    opened = Dataset(dataset)
    manifest, patches = opened.manifest, opened.grid.patch_shape
    sizes = sizes | {"unit": (*sizes["unit"][:1], *patches)}  # one unit a slot, whatever the grid
    settings = check(
        PretrainSettings,
        {"data": str(dataset), "model": sizes, "view": "both", "run": {"out": str(folder), "seed": seed}},
        "test",
    )
    geometry = settings.model.geometry((8 * 5, *patches))
    torch.manual_seed(seed)
    encoder = Objective(settings, geometry, 64).encoder
    tensors = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    tensors |= {f"target.{name}": value * 0.5 for name, value in encoder.state_dict().items()}
    saved = folder / "checkpoints" / checkpoint.tag(7)
    saved.mkdir(parents=True)
    for place in (folder, saved):
        (place / "config.yaml").write_text(settings.model_dump_json())
        (place / "dataset.json").write_text(json.dumps({n: v for n, v in manifest.items() if n != "shards"}))
    write_weights(saved, tensors)
    return folder


def write_weights(saved: Path, tensors: dict) -> None:
    save_file({name: value.contiguous() for name, value in tensors.items()}, saved / checkpoint.WEIGHTS)
    (saved / checkpoint.COMPLETE).unlink(missing_ok=True)
    checkpoint.seal(saved, {"step": 7})


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
    assert not torch.equal(other.encoder.space, model.encoder.space)
    assert start.step == 0


def test_every_window_is_read_once_in_time_order(run: Path, opened: Dataset):
    """12 windows in groups of 8: the last group reaches back over 4, whose slots are not used again."""
    model, session = SlimBrain.from_pretrained(run), opened.sessions[0]
    assert session["n_kept"] == 12
    found = model.encode_session(opened, session)
    start = np.sort(opened.read(session, ("start",))["start"])
    np.testing.assert_allclose(found.second_S, (start + 2) * session["tr"], rtol=1e-5)
    np.testing.assert_array_equal(found.window_S, start * session["tr"])
    assert found.token_SLC.shape == (12, len(found.place_L), 32) and found.token_SLC.dtype == np.float32

    in_time = np.argsort(opened.read(session, ("start",))["start"])
    expected = []
    for ranks, fresh in ((in_time[:8], slice(0, 8)), (in_time[4:], slice(4, 8))):
        batch = collate([read_windows(opened, session, ranks.tolist())], model.geometry, None)
        with torch.no_grad():
            x_MC = model.encoder(batch.voxels, batch.whole)
        dense = np.full((8, np.prod(opened.grid.patch_shape), 32), np.nan, np.float32)
        dense.reshape(-1, 32)[batch.whole.cell_M.numpy()] = x_MC.numpy()
        expected.append(dense[fresh][:, found.place_L])
    np.testing.assert_allclose(found.token_SLC, np.concatenate(expected), rtol=1e-4, atol=1e-5)


def test_features_do_not_depend_on_how_groups_are_batched(run: Path, opened: Dataset):
    model, session = SlimBrain.from_pretrained(run), opened.sessions[1]
    together, apart = (model.encode_session(opened, session, batch) for batch in (2, 1))
    np.testing.assert_allclose(together.token_SLC, apart.token_SLC, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(together.place_L, apart.place_L)


def test_slots_that_straddle_windows_belong_to_the_one_at_their_middle(dataset: Path, tmp_path: Path, opened: Dataset):
    model = SlimBrain.from_pretrained(write_run(tmp_path / "straddling", dataset, STRADDLING))
    found = model.encode_session(opened, opened.sessions[0])
    # 10 slots of 4 frames in 8 windows of 5; of the second group those with their middle in windows 4 to 7
    assert len(found.token_SLC) == 10 + 5
    assert (np.diff(found.second_S) > 0).all()
    # `second_S` is the mean of the frames' own times, half a frame before the middle of the slot
    inside_S = (found.second_S - found.window_S) / opened.sessions[0]["tr"] + 0.5
    assert (inside_S > -1e-3).all() and (inside_S < 5).all()


def test_other_data_are_refused(run: Path, opened: Dataset):
    model, session = SlimBrain.from_pretrained(run), opened.sessions[0]
    assert model.was_trained_on(opened)
    with pytest.raises(DatasetError, match="windows"):
        model.encode_session(opened, session | {"n_kept": 7})
    model.data = model.data | {"grid": model.data["grid"] | {"mm": 2.0}}
    assert not model.was_trained_on(opened)
    with pytest.raises(ConfigError, match="grid"):
        model.encode_session(opened, session)


def test_the_example_of_the_readme_encodes_a_session(run: Path, dataset: Path, capsys):
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    (example,) = (part.split("```")[0] for part in readme.split("```python") if "encode_session" in part)
    example = example.replace("data/mylab", str(dataset)).replace("runs/lean", str(run))
    exec(example, {})
    slots, places, channels = json.loads(capsys.readouterr().out.replace("(", "[").replace(")", "]"))
    kept = Dataset(dataset).sessions[0]["n_kept"]
    assert slots == kept and places > 0 and channels == ALIGNED["embed"] * 2
