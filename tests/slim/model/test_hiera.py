"""What each view feeds the encoder, and that a fluctuation of half a per cent outlives bf16.

Legend: Q patches; T frames; N = Q T rows of patches; V voxels of a patch; C channels.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slim.config import View
from slim.model.embedding import PatchEmbed
from slim.model.inputs import Voxels

pytestmark = pytest.mark.fast

VIEWS = ("global", "voxel", "both")
Q, T, V, C = 30, 12, 64, 48
PATCH_N = torch.arange(Q).repeat_interleave(T)


def half_a_per_cent() -> Voxels:
    """A brain whose mean lies three global SDs above zero, and in each voxel a fluctuation of 0.5 % of its signal."""
    g = torch.Generator().manual_seed(0)
    baseline_QV = torch.rand(Q, V, generator=g, dtype=torch.float64) * 5 - 2
    spread_QV = 0.005 * (baseline_QV + 3)
    value_NV = torch.randn(Q * T, V, generator=g, dtype=torch.float64) * spread_QV[PATCH_N]
    return Voxels(value_NV, baseline_QV, spread_QV, torch.arange(T, dtype=torch.float64)[None])


def cast(voxels: Voxels, dtype: torch.dtype) -> Voxels:
    return Voxels(**{name: value.to(dtype) for name, value in vars(voxels).items()})


def made(view: View) -> PatchEmbed:
    """An embedding in float64 whose bias is no zero."""
    torch.manual_seed(1)
    embed = PatchEmbed(V, C, view).double()
    torch.nn.init.normal_(embed.bias)
    return embed


def embedded(embed: PatchEmbed, voxels: Voxels) -> Tensor:
    """All rows, (N, C), as the encoder embeds them."""
    base_QC = embed.baseline(voxels)
    base_NC = None if base_QC is None else base_QC[PATCH_N]
    return embed(voxels.value_RV, voxels.spread_QV[PATCH_N], base_NC)


def over_time(x_NC: Tensor) -> Tensor:
    """Each patch's embedding minus that of its first frame: what is left of anatomy and bias is nothing."""
    x_QTC = x_NC.double().reshape(Q, T, C)
    return x_QTC - x_QTC[:, :1]


@pytest.mark.parametrize("view", VIEWS)
@torch.no_grad()
def test_a_view_is_its_formula(view: View) -> None:
    voxels, embed = half_a_per_cent(), made(view)
    voxels.spread_QV[:, :7] = 0  # background, or constant: no fluctuation, whatever the values say
    value_NV, spread_NV = voxels.value_RV.clone(), voxels.spread_QV[PATCH_N]
    value_NV[:, :7] = 0
    expected = embed.bias.repeat(Q * T, 1)
    if view in ("global", "both"):
        assert embed.whole is not None
        expected += (voxels.baseline_QV[PATCH_N] + value_NV) @ embed.whole.weight.T
    if view in ("voxel", "both"):
        assert embed.own is not None
        expected += (value_NV[:, 7:] / spread_NV[:, 7:]) @ embed.own.weight[:, 7:].T
    assert (embed.baseline(voxels) is None) == (view == "voxel")
    torch.testing.assert_close(embedded(embed, voxels), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("view", VIEWS)
@torch.no_grad()
def test_a_fluctuation_of_half_a_per_cent_outlives_bf16(view: View) -> None:
    voxels, embed = half_a_per_cent(), made(view)
    exact = over_time(embedded(embed, voxels))

    def error(found: Tensor) -> float:
        return float((over_time(found) - exact).norm() / exact.norm())

    # What a sum rounded to bf16 still carries of the fluctuation, embedded without any further error.
    baseline_NV = voxels.baseline_QV[PATCH_N]
    carried_NV = (baseline_NV + voxels.value_RV).bfloat16().double() - baseline_NV
    naive = embedded(embed, Voxels(carried_NV, voxels.baseline_QV, voxels.spread_QV, voxels.second_BT))

    embed.float()
    with torch.autocast("cpu", torch.bfloat16):
        found = embedded(embed, cast(voxels, torch.float32))
    assert error(found) < 0.02
    assert error(naive) > 0.1
