"""The network of stage 1: tokens of neighbouring parcels, with axial attention over parcels and time.

A token is a group of neighbouring parcels in one window of frames. Each block attends along one axis at a time (axial
attention, arXiv 1912.12180): first over the groups of a window, then over the windows of a group, with a bias for their
distance in time. Full attention over all tokens does not reach the same loss in the same number of steps. Groups depend
only on the centres of the parcels, so the same weights work for any number of parcels and any parcellation.

Shape suffixes: R parcels; T frames; W windows; F frames of a window; G groups of neighbouring parcels; S
slots of a group; B samples; N rows of attention; L their tokens; C channels; H heads; P position features; 3
axes.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as functional
from pydantic import Field
from torch import Tensor, nn

from shards.core.settings import Settings

CLAMP = 4.0  # z units; limits the effect of spikes on the loss
PLACE_FEATURES = 18  # sine and cosine of three frequencies along three axes


def group_parcels(centre_R3: np.ndarray, size: int) -> np.ndarray:
    """Divide parcels into the smallest number of groups of at most `size` neighbours.

    The centres are bisected recursively across their widest axis, in proportion to the number of groups on either side.

    Returns
    -------
    slot_GS : int64 array
        The parcel in each slot of each group; -1 for an empty slot.
    """
    slot_GS = np.full((-(-len(centre_R3) // size), size), -1, dtype=np.int64)

    def fill(parcels: np.ndarray, first: int, groups: int) -> None:
        if groups == 1:
            slot_GS[first, : len(parcels)] = parcels
            return
        widest = np.ptp(centre_R3[parcels], axis=0).argmax()
        parcels = parcels[np.argsort(centre_R3[parcels, widest], kind="stable")]
        left = groups // 2
        cut = round(len(parcels) * left / groups)
        fill(parcels[:cut], first, left)
        fill(parcels[cut:], first + left, groups - left)

    fill(np.arange(len(centre_R3)), 0, len(slot_GS))
    return slot_GS


class Layout:
    """Maps the parcels of one scan to the tokens of the network, and back."""

    def __init__(self, centre_R3: np.ndarray, size: int):
        centre_R3 = np.asarray(centre_R3, dtype=np.float64)
        self.slot_GS = torch.from_numpy(group_parcels(centre_R3, size))
        self.filled_GS = self.slot_GS >= 0
        filled = self.filled_GS.numpy()
        padded = np.where(filled[..., None], centre_R3[self.slot_GS.numpy()], 0.0)
        centre_G3 = padded.sum(1) / filled.sum(1, keepdims=True) - centre_R3.mean(0)
        # A brain spans about 180 mm, so its two ends differ at the lowest of the three frequencies.
        phase_G33 = centre_G3[:, :, None] / 90.0 * (math.pi / 2) * np.array([1.0, 2.0, 4.0])
        waves_GP = np.concatenate([np.sin(phase_G33), np.cos(phase_G33)], axis=-1).reshape(len(filled), -1)
        self.place_GP = torch.from_numpy(waves_GP.astype(np.float32))

    def tokens(self, z_RT: Tensor, frames: int) -> Tensor:
        """(W, G, S*F) tokens of whole windows; empty slots are 0."""
        slotted_GST = z_RT[self.slot_GS] * self.filled_GS[..., None]
        slotted_GSWF = slotted_GST.unflatten(-1, (-1, frames))
        return slotted_GSWF.permute(2, 0, 1, 3).flatten(2)

    def series(self, tokens_WGC: Tensor, frames: int) -> Tensor:
        """The inverse of `tokens`: (R, T)."""
        slotted_WGSF = tokens_WGC.unflatten(-1, (-1, frames))
        slotted_GST = slotted_WGSF.permute(1, 2, 0, 3).flatten(2)
        order = torch.argsort(self.slot_GS[self.filled_GS])
        return slotted_GST[self.filled_GS][order]


class ExtractorConfig(Settings):
    """Sizes of an extractor and settings of its training.

    `frames` is the length of a window, `group` the number of parcels in a group, and `crop` the largest number of
    consecutive windows that the network processes together.
    """

    frames: int = Field(ge=1, le=10_000)
    group: int = Field(9, ge=1, le=10_000)
    width: int = Field(64, ge=1, le=16384)
    depth: int = Field(3, ge=1, le=1024)
    heads: int = Field(4, ge=1, le=1024)
    crop: int = Field(30, ge=1, le=100_000)
    steps: int
    seed: int
    runs: int

    @property
    def fewest_parameters(self) -> int:
        """A lower bound of the number of parameters: the matrices, and the time biases of the heads."""
        values = self.group * self.frames
        return self.depth * (16 * self.width**2 + self.heads * (2 * self.crop - 1)) + 2 * values * self.width


def _attend(qkv_NLC: Tensor, heads: int, bias: Tensor | None) -> Tensor:
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv_NLC.chunk(3, dim=-1))
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)


class _AxialBlock(nn.Module):
    """Attention over the groups of each window, then over the windows of each group, then an MLP; pre-norm."""

    def __init__(self, width: int, heads: int, crop: int):
        super().__init__()
        self.heads, self.crop = heads, crop
        self.space_norm, self.time_norm, self.mlp_norm = (nn.LayerNorm(width) for _ in range(3))
        self.space_qkv, self.time_qkv = nn.Linear(width, 3 * width), nn.Linear(width, 3 * width)
        self.space_out, self.time_out = nn.Linear(width, width), nn.Linear(width, width)
        # Each head is initialised with another slope of its bias for distance (arXiv 2108.12409). Near windows matter
        # most; learning this from a flat bias would take longer than the rest of the training.
        reach_H = 2.0 ** torch.arange(heads).sub(1)
        distance = torch.arange(1 - crop, crop).abs()
        self.time_bias = nn.Parameter(-distance / reach_H[:, None])
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x_BWGC: Tensor, real_BG: Tensor | None) -> Tensor:
        samples, windows, groups, _ = x_BWGC.shape
        only_real = None
        if real_BG is not None:
            only_real = real_BG.repeat_interleave(windows, 0)[:, None, None, :]
        space_NGC = self.space_qkv(self.space_norm(x_BWGC)).flatten(0, 1)
        mixed_NGC = self.space_out(_attend(space_NGC, self.heads, only_real))
        x_BWGC = x_BWGC + mixed_NGC.unflatten(0, (samples, windows))
        lag = torch.arange(windows)
        bias_1HWW = self.time_bias[:, lag[None, :] - lag[:, None] + self.crop - 1][None]
        time_NWC = self.time_qkv(self.time_norm(x_BWGC).transpose(1, 2).flatten(0, 1))
        mixed_NWC = self.time_out(_attend(time_NWC, self.heads, bias_1HWW))
        x_BWGC = x_BWGC + mixed_NWC.unflatten(0, (samples, groups)).transpose(1, 2)
        return x_BWGC + self.mlp(self.mlp_norm(x_BWGC))


class MaskedAutoencoder(nn.Module):
    """Masked autoencoder (SimMIM, arXiv 2111.09886): hidden tokens are replaced by the mask token; linear head.

    `real_BG` is False for groups that are padding of a batch; None if there is no padding.
    """

    def __init__(self, config: ExtractorConfig):
        super().__init__()
        width, values = config.width, config.group * config.frames
        self.embed = nn.Linear(values, width)
        self.place = nn.Linear(PLACE_FEATURES, width)
        self.mask_token = nn.Parameter(0.02 * torch.randn(width))
        self.blocks = nn.ModuleList(_AxialBlock(width, config.heads, config.crop) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, values)
        nn.init.zeros_(self.head.weight)  # the first prediction is 0, the mean
        nn.init.zeros_(self.head.bias)

    def forward(self, x_BWGC: Tensor, hidden_BWG: Tensor, place_BGP: Tensor, real_BG: Tensor | None) -> Tensor:
        seen_BWGC = self.embed(x_BWGC.clamp(-CLAMP, CLAMP))
        h_BWGC = torch.where(hidden_BWG[..., None], self.mask_token, seen_BWGC)
        h_BWGC = h_BWGC + self.place(place_BGP)[:, None]
        for block in self.blocks:
            h_BWGC = block(h_BWGC, real_BG)
        return self.head(self.norm(h_BWGC))
