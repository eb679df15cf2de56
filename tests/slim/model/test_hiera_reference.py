"""With nothing dropped, the gathered encoder equals the reference implementation of Hiera with the same weights."""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch
from torch import nn

from helpers.reference_hiera import reference
from slim.config import ModelSettings
from slim.model.geometry import geometry_of
from slim.model.hiera import Hiera
from slim.model.inputs import Packed, Voxels
from slim.model.ragged import plan

pytestmark = pytest.mark.fast

__all__ = ["reference"]


def cut(x: np.ndarray, patch: tuple[int, ...]) -> np.ndarray:
    """An image (channels first) as (tokens, values of a patch), in the order of a convolution's weights."""
    axes = x.ndim - 1
    shape = [x.shape[0]] + [
        part for size, step in zip(x.shape[1:], patch, strict=True) for part in (size // step, step)
    ]
    order = [1 + 2 * a for a in range(axes)] + [0] + [2 + 2 * a for a in range(axes)]
    return (
        x.reshape(shape).transpose(order).reshape(int(np.prod([x.shape[1 + a] // patch[a] for a in range(axes)])), -1)
    )


@pytest.mark.parametrize(
    ("size", "patch", "unit", "stride", "pools"),
    [
        ((64, 64), (4, 4), (8, 8), (2, 2), 2),
        ((64, 64), (4, 4), (8, 8), (2, 2), 3),
        ((8, 32, 32), (2, 4, 4), (1, 4, 4), (1, 2, 2), 2),
        ((4, 64, 64), (2, 4, 4), (1, 8, 8), (1, 2, 2), 3),
        ((8, 32, 32), (1, 4, 4), (4, 4, 4), (2, 2, 2), 2),
    ],
    ids=["image", "image, pooled in a global stage", "video", "video, pooled in a global stage", "pooled in time"],
)
def test_equals_the_reference(
    reference: types.ModuleType,
    size: tuple[int, ...],
    patch: tuple[int, ...],
    unit: tuple[int, ...],
    stride: tuple[int, ...],
    pools: int,
    device: str,
) -> None:
    torch.manual_seed(0)
    video = len(size) == 3
    other = reference.Hiera(
        input_size=size,
        in_chans=2,
        embed_dim=24,
        num_heads=1,
        num_classes=3,
        stages=(1, 2, 2, 1),
        q_pool=pools,
        q_stride=stride,
        mask_unit_size=unit,
        mask_unit_attn=(True, True, False, False),
        patch_kernel=patch,
        patch_stride=patch,
        patch_padding=(0,) * len(size),
        sep_pos_embed=video,
    )
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_(0, 0.15)
    tokens = tuple(s // p for s, p in zip(size, patch, strict=True))
    sizes = ModelSettings.model_construct(
        embed=24, heads=1, depths=(1, 2, 2, 1), unit=unit, strides=(stride,) * pools, local_stages=2, mlp_ratio=4.0
    )
    geometry = geometry_of(sizes, tokens)
    assert geometry.global_steps == pools - 2
    mine = Hiera(sizes, geometry, 2 * int(np.prod(patch)), "global")
    copy_weights(mine, other, video, tokens)

    image = np.random.default_rng(0).standard_normal((2, *size)).astype(np.float32)
    n = int(np.prod(tokens))
    value = torch.from_numpy(np.ascontiguousarray(cut(image, patch)))
    voxels = Voxels(value, torch.zeros(n, value.shape[1]), torch.ones(n, value.shape[1]), torch.zeros(1, tokens[0]))
    where = plan(geometry, [np.arange(n // tokens[0])], chunk_tokens=5 * int(np.prod(unit)))
    out = mine.to(device)(voxels.to(device), Packed(where).to(device)).cpu()
    _, stages = other.eval()(torch.from_numpy(image)[None], return_intermediates=True)
    expected = other.norm(stages[-1].reshape(-1, 24 * 8))[where.cell_M]
    assert out.shape == expected.shape
    assert (out - expected).abs().max() < 1e-5 * expected.abs().max()


def copy_weights(mine: Hiera, other: nn.Module, video: bool, tokens: tuple[int, ...]) -> None:
    state = {
        name.replace(".mlp.", "."): value
        for name, value in other.state_dict().items()
        if name.startswith(("blocks.", "norm."))
    }
    own = mine.state_dict()
    state["embed.whole.weight"] = other.patch_embed.proj.weight.flatten(1)
    state["embed.bias"] = other.patch_embed.proj.bias
    state["seconds.linear.weight"] = own["seconds.linear.weight"]
    if video:
        state["space"], state["time"] = other.pos_embed_spatial[0], other.pos_embed_temporal[0]
    else:  # a joint table that happens to be a sum over axes
        state["time"] = torch.randn(tokens[0], own["time"].shape[1])
        state["space"] = torch.randn(tokens[1], own["space"].shape[1])
        other.pos_embed.data = (state["time"][:, None] + state["space"]).reshape(1, -1, own["time"].shape[1])
    mine.load_state_dict(state, strict=True)
