"""The authors' checkpoint: tensors of its names give the features of the reference Hiera, extended to four dimensions.

Their file is not needed. Legend: T frames; X, Y, Z voxels; M cells; C channels.
"""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.reference_hiera import reference
from launchers.commands import export as export_command
from shards.conversion.session import SessionSettings
from shards.core.cli import run
from shards.core.errors import UserError
from slim.checkpoints import authors_checkpoint
from slim.config import PRESETS, ModelSettings
from slim.data.collate import collate
from slim.data.samples import Sample, with_background
from slim.inference.slim_brain import SlimBrain
from slim.model.hiera import Hiera

__all__ = ["reference"]

FORMAT = authors_checkpoint.FORMAT
FRAMES, EDGE, SIDE = 40, 4, 4  # frames, voxels of an edge of a patch, patches of an edge of the grid
SIZES = ModelSettings(
    embed=16, heads=1, depths=(1, 2, 2), unit=(4, 4, 4, 4), strides=((2, 2, 2, 2), (2, 2, 2, 2)), local_stages=2
)
SCANS = SessionSettings.model_validate({"grid": {"mm": 12.0, "shape": [EDGE * SIDE] * 3}})


class FramewiseConv(nn.Module):
    """A convolution over (t, x, y, z) with one frame: a three-dimensional one for each frame."""

    def __init__(self, inputs: int, outputs: int, kernel_size: tuple, stride: tuple, padding: tuple):
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.empty(outputs, inputs, *kernel_size)),
            nn.Parameter(torch.empty(outputs)),
        )
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        frames = x.transpose(1, 2).flatten(0, 1)
        out = F.conv3d(frames, self.weight[:, :, 0], self.bias, self.stride[1:])
        return out.unflatten(0, (len(x), -1)).transpose(1, 2)


@pytest.fixture(scope="module")
def four_dimensional(reference: types.ModuleType) -> nn.Module:
    """The reference with random weights, for 40 frames of 16 x 16 x 16 voxels."""
    patch = pytest.MonkeyPatch()
    patch.setattr(reference, "conv_nd", lambda axes: FramewiseConv)
    torch.manual_seed(0)
    model = reference.Hiera(
        input_size=(FRAMES, *[EDGE * SIDE] * 3),
        in_chans=1,
        embed_dim=16,
        num_heads=1,
        num_classes=2,
        stages=(1, 2, 2),
        q_pool=2,
        q_stride=(2, 2, 2, 2),
        mask_unit_size=(4, 4, 4, 4),
        mask_unit_attn=(True, True, False),
        patch_kernel=(1, EDGE, EDGE, EDGE),
        patch_stride=(1, EDGE, EDGE, EDGE),
        patch_padding=(0, 0, 0, 0),
        sep_pos_embed=True,
    )
    patch.undo()
    # The reference multiplies two axes of space; the third joins them.
    model.pos_embed_spatial = nn.Parameter(torch.empty(1, SIDE**3, 16))
    model.tokens_spatial_shape = [FRAMES, SIDE * SIDE, SIDE]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model.eval()


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of an encoder by the authors' names, and some of a decoder."""
    encoder = {
        name.replace("norm.", "encoder_norm.", 1) if name.startswith("norm.") else name: value.clone()
        for name, value in model.state_dict().items()
        if not name.startswith("head.")
    }
    more = {
        "mask_token": torch.zeros(1, 1, 8),
        "decoder_blocks.0.weight": torch.zeros(2),
        "multi_scale_fusion.0": torch.zeros(1),
    }
    return {**encoder, **more}


def saved(folder: Path, state: Any, **more: Any) -> Path:
    path = folder / "best_model.pth"
    torch.save({authors_checkpoint.TENSORS: state, **more}, path)
    return path


def small(path: Path, axes: str = "LAS", background: str = "keep") -> SlimBrain:
    """The checkpoint of the small reference as a model."""
    about = authors_checkpoint.find(path, axes, background, model=SIZES, settings=SCANS)  # type: ignore[arg-type]
    model = SlimBrain(about, 0)
    about.load_into(model.encoder)
    return model


def patches(volume_TXYZ: np.ndarray) -> np.ndarray:
    """Volumes as (frames, patches, voxels of a patch)."""
    cut = volume_TXYZ.reshape(len(volume_TXYZ), SIDE, EDGE, SIDE, EDGE, SIDE, EDGE)
    return cut.transpose(0, 1, 3, 5, 2, 4, 6).reshape(len(volume_TXYZ), SIDE**3, EDGE**3)


def scan(brain: float) -> tuple[np.ndarray, Sample]:
    """A z-scored scan on our grid (RAS), 0 outside the brain; and its sample, which holds the patches with brain."""
    rng = np.random.default_rng(3)
    whole = rng.standard_normal((FRAMES, *[EDGE * SIDE] * 3)).astype(np.float32)
    inside = patches((rng.random((1, *whole.shape[1:])) < 0.8).astype(np.float32))[0]
    inside[rng.random(len(inside)) >= brain] = 0
    value_TPV = patches(whole) * inside
    place = np.flatnonzero(inside.any(axis=1))
    baseline = value_TPV.mean(axis=0)
    volume = value_TPV.reshape(FRAMES, SIDE, SIDE, SIDE, EDGE, EDGE, EDGE).transpose(0, 1, 4, 2, 5, 3, 6)
    fluctuation = (value_TPV - baseline)[:, place]
    sample = Sample(
        "a",
        0,
        fluctuation,
        baseline[place],
        fluctuation.std(axis=0),
        inside[place].astype(np.uint8),
        place,
        np.arange(FRAMES, dtype=np.float32),
    )
    return np.ascontiguousarray(volume.reshape(whole.shape)), sample


@pytest.mark.parametrize("axes", ["LAS", "RAS"])
@torch.no_grad()
def test_the_features_are_those_of_the_reference(axes: str, four_dimensional: nn.Module, tmp_path: Path) -> None:
    """With all patches, as the authors' fine-tuning has them; LAS volumes are ours with x reversed."""
    model = small(saved(tmp_path, state_of(four_dimensional)), axes)
    volume_TXYZ, sample = scan(brain=0.6)
    theirs = volume_TXYZ[:, ::-1].copy() if axes == "LAS" else volume_TXYZ
    _, stages = four_dimensional(torch.from_numpy(theirs)[None, None], return_intermediates=True)
    expected = four_dimensional.norm(stages[-1][0])  # (slots, x, y, z, channels)
    expected_MC = (expected.flip(1) if axes == "LAS" else expected).flatten(0, 3)

    batch = collate([with_background(sample, model.geometry)], model.geometry, 500)
    found_MC = model.encoder(batch.voxels, batch.whole)
    assert len(found_MC) == len(expected_MC) == 10
    difference = (found_MC - expected_MC[batch.whole.cell_M]).abs().max()
    assert difference < 1e-5 * expected_MC.abs().max()


@torch.no_grad()
def test_a_deleted_background_is_another_input(four_dimensional: nn.Module, tmp_path: Path) -> None:
    """What `background` chooses between is not the same; without background it is."""
    model = small(saved(tmp_path, state_of(four_dimensional)))
    for brain, same in ((0.5, False), (1.0, True)):
        _, sample = scan(brain)
        assert (len(sample.place) == SIDE**3) == same
        dropped, kept = (
            collate([one], model.geometry, None) for one in (sample, with_background(sample, model.geometry))
        )
        one, other = (model.encoder(batch.voxels, batch.whole) for batch in (dropped, kept))
        assert torch.allclose(one, other[: len(one)], atol=1e-5) == same


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with random tensors of the published sizes."""
    from slim.model.geometry import geometry_of

    torch.manual_seed(1)
    geometry = geometry_of(PRESETS["published"], (40, 24, 24, 24))
    ours = Hiera(PRESETS["published"], geometry, 64, "global").state_dict()
    state = {}
    for name, value in ours.items():
        if name == "space":
            state["pos_embed_spatial"] = value[None]
        elif name == "time":
            state["pos_embed_temporal"] = value[None]
        elif name.startswith("embed."):
            state[f"patch_embed.proj.{name.split('.')[-1]}"] = (
                value.reshape(64, 1, 1, 4, 4, 4) if name.endswith("weight") else value
            )
        elif name.startswith("norm."):
            state[f"encoder_{name}"] = value
        elif name.startswith("blocks."):
            state[name.replace(".fc", ".mlp.fc")] = value
    assert len(state) == len(ours) - 1  # without positions in seconds
    return saved(tmp_path_factory.mktemp("published"), state | {"decoder_norm.weight": torch.zeros(3)}, epoch=7)


def test_published_sizes_are_read_and_exported(published: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = SlimBrain.from_pretrained(published, format=FORMAT)
    positions = model.encoder.space.numel() + model.encoder.time.numel()
    assert positions == 887_296 and model.background == "keep" and model.made["left_out"] == ["decoder_norm.weight"]
    state = torch.load(published, weights_only=True)[authors_checkpoint.TENSORS]
    flipped = state["pos_embed_spatial"][0].reshape(24, 24, 24, 64).flip(0).flatten(0, 2)
    assert torch.equal(model.encoder.space, flipped)
    assert torch.equal(model.encoder.blocks[5].fc1.weight, state["blocks.5.mlp.fc1.weight"])
    assert "authors' checkpoint" in repr(model) and "LAS" in repr(model)

    words = [str(published), "--out", str(tmp_path / "out"), "--format", FORMAT, "--background", "drop", "--json"]
    with pytest.raises(SystemExit) as ended:
        run(lambda: export_command.main(words))
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["parameters"] > 22e6
    again = SlimBrain.from_pretrained(tmp_path / "out")
    assert again.background == "drop" and again.made["format"] == FORMAT
    for name, value in model.encoder.state_dict().items():
        assert torch.equal(value, again.encoder.state_dict()[name])
    assert again.checksum != model.checksum
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.splitlines()[5].startswith("# best_model") and "weights of the authors" in card and "step 0" not in card
    with pytest.raises(UserError, match="background: got keep, expected drop, because a fine-tuning reads brain only"):
        model.require_dropped("a fine-tuning")


def without(name: str, state: dict) -> dict:
    return {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda state: state | {"head.weight": torch.zeros(2)}, "unknown tensors: head.weight"),
        (lambda state: without("blocks.1.attn.qkv.bias", state), r"blocks\.1\.attn\.qkv\.bias: got no such tensor"),
        (lambda state: without("pos_embed_temporal", state), "time: got no such tensor"),
        (lambda state: without("patch_embed.proj.bias", state), r"embed\.bias: got no such tensor"),
        (lambda state: state | {"pos_embed_spatial": torch.zeros(1, 9, 16)}, r"pos_embed_spatial: got \(1, 9, 16\)"),
        (lambda state: state | {"patch_embed.proj.weight": torch.zeros(16, 64)}, r"proj\.weight: got \(16, 64\)"),
        (
            lambda state: state | {"encoder_norm.bias": torch.full((64,), torch.nan)},
            "norm.bias: got numbers that are not",
        ),
        (
            lambda state: state | {"encoder_norm.bias": torch.zeros(64, dtype=torch.int64)},
            "no tensor of floating-point",
        ),
        (lambda state: [1], "model_state_dict: got a list"),
    ],
)
def test_what_does_not_fit_is_named(change: Any, match: str, four_dimensional: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=match) as told:
        small(saved(tmp_path, change(state_of(four_dimensional))))
    assert "best_model.pth" in told.value.line() and "\n" not in told.value.line()


class Payload:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, ("raise SystemExit('executed')",)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ({"format": "other"}, "format: got other, expected slim-brain-2026"),
        ({"axes": "LAS"}, 'axes: got LAS, expected none, without format="slim-brain-2026"'),
        ({"background": "drop"}, "background: got drop, expected none"),
        ({"format": FORMAT, "axes": "RPI"}, "axes: got 'RPI', expected LAS or RAS"),
        ({"format": FORMAT, "background": "mean"}, "background: got 'mean', expected keep or drop"),
        ({"format": FORMAT, "weights": "target"}, "weights: got target, expected encoder"),
        ({"format": FORMAT}, "a pickle that contains"),
    ],
)
def test_wrong_calls_and_payloads_are_refused(words: dict, match: str, tmp_path: Path) -> None:
    path = saved(tmp_path, {"mask_token": torch.zeros(1)}, more=Payload())
    with pytest.raises(UserError, match=match):
        SlimBrain.from_pretrained(path, **words)


def test_a_path_that_is_no_file_is_told(tmp_path: Path) -> None:
    for path, match in ((tmp_path, "got a folder"), (tmp_path / "none.pth", "got no such file")):
        with pytest.raises(UserError, match=match):
            SlimBrain.from_pretrained(path, format=FORMAT)
