"""The Hiera encoder over gathered patches, for any number of dimensions.

Blocks follow Hiera (Ryali et al., "Hiera: A Hierarchical Vision Transformer without the Bells-and-Whistles", ICML
2023): pre-norm attention and MLP, queries max-pooled at the first block of a pooled stage, attention inside mask
units in the local stages and over all cells of a sample afterwards. In contrast to Hiera, only tokens that contain
brain are processed. Mask units therefore differ in length, and a pooled token is the maximum over the children that
exist.

Legend: B samples; N kept tokens; M tokens of the last level (cells); L places of a grid; A its axes; R rows of voxel
values; Q rows of patches; V voxels of a patch; C channels; F hidden channels, or frequencies of a position; H heads; D
channels of a head; T frames of a sample.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from slim.config import ModelSettings, View
from slim.model.embedding import PatchEmbed, Seconds, init_linear, init_positions
from slim.model.geometry import Geometry
from slim.model.inputs import Voxels
from slim.model.ragged import Children, Chunk, Plan, Segments
from slim.model.ragged_ops import attend, segment_max, segment_sum


class Attention(nn.Module):
    """Multi-head attention inside segments of different lengths; queries may be max-pooled first."""

    def __init__(self, dim: int, dim_out: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim_out)
        self.proj = nn.Linear(dim_out, dim_out)

    def forward(self, x_NC: Tensor, where: Segments, children: Children | None) -> Tensor:
        q_NC, k_NC, v_NC = self.qkv(x_NC).chunk(3, dim=1)
        if children is not None:
            q_NC = segment_max(q_NC, children)
        q, k, v = (rearrange(part, "n (h d) -> n h d", h=self.heads) for part in (q_NC, k_NC, v_NC))
        return self.proj(rearrange(attend(q, k, v, where), "n h d -> n (h d)"))


class Block(nn.Module):
    """A Hiera block. With `children`, tokens are pooled, and the residual is the pooled projection."""

    def __init__(self, dim: int, dim_out: int, heads: int, mlp_ratio: float = 4.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, dim_out, heads)
        self.norm2 = nn.LayerNorm(dim_out, eps=1e-6)
        self.fc1 = nn.Linear(dim_out, int(dim_out * mlp_ratio))
        self.fc2 = nn.Linear(int(dim_out * mlp_ratio), dim_out)
        self.proj = nn.Linear(dim, dim_out) if dim != dim_out else None

    def forward(self, x_NC: Tensor, where: Segments, children: Children | None = None) -> Tensor:
        y_NC = self.norm1(x_NC)
        if self.proj is not None:
            x_NC = self.proj(y_NC)
        if children is not None:
            x_NC = segment_max(x_NC, children)
        x_NC = x_NC + self.attn(y_NC, where, children)
        hidden_NF = self.fc1(self.norm2(x_NC))
        if not torch.is_grad_enabled():
            return x_NC + self._leave(hidden_NF)
        # To save memory, the widest tensor is kept only before the activation, which is computed again in the backward.
        return x_NC + checkpoint(self._leave, hidden_NF, use_reentrant=False, preserve_rng_state=False)

    def _leave(self, hidden_NF: Tensor) -> Tensor:
        return self.fc2(F.gelu(hidden_NF))


class Hiera(nn.Module):
    """Encoder of gathered brain patches.

    Parameters
    ----------
    settings : ModelSettings
    geometry : Geometry
        Geometry of the samples; time is the first axis.
    voxels : int
        V, number of voxels in a patch.
    view : "global", "voxel" or "both"
        Normalisation of the values that the model receives.
    """

    def __init__(self, settings: ModelSettings, geometry: Geometry, voxels: int, view: View):
        super().__init__()
        self.geometry = geometry
        self.embed = PatchEmbed(voxels, settings.embed, view)
        places = math.prod(geometry.tokens[1:])
        self.space = nn.Parameter(torch.empty(places, settings.embed))
        self.time = nn.Parameter(torch.empty(geometry.tokens[0], settings.embed))
        self.seconds = Seconds(settings.embed)
        blocks, local, dim, heads = [], [], settings.embed, settings.heads
        for stage, depth in enumerate(settings.depths):
            for index in range(depth):
                grows = stage > 0 and index == 0
                dim_out, heads = (dim * 2, heads * 2) if grows else (dim, heads)
                blocks.append(Block(dim, dim_out, heads, settings.mlp_ratio))
                # The first block of a stage pools its queries; its attention has the range of the stage before.
                local.append(stage < settings.local_stages or (grows and stage == settings.local_stages))
                dim = dim_out
        self.blocks = nn.ModuleList(blocks)
        ends = [sum(settings.depths[:stage]) for stage in range(1, len(settings.depths) + 1)]
        self.pooled = set(ends[: len(geometry.strides)])
        self.ends = ends  # number of blocks up to the end of each stage
        self.n, self.n_local = len(blocks), sum(local)
        self.n_frozen = 0  # the first blocks, which are computed without gradients; see `freeze`
        self.dim = dim
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.apply(init_linear)
        init_positions(self.space, self.time, self.seconds, geometry.tokens)

    def freeze(self, stages: int) -> None:
        """Fix the first stages, with embedding and positions; the norm, too, if these are all stages.

        No gradient is computed below the last of these stages, and no activation of them is kept.
        """
        self.n_frozen = self.ends[stages - 1] if stages else 0
        if not stages:
            return
        fixed = [self.embed, self.seconds, *self.blocks[: self.n_frozen]]
        for part in (*fixed, self.norm) if stages == len(self.ends) else fixed:
            part.requires_grad_(False)
        for table in (self.space, self.time):
            table.requires_grad_(False)

    def forward(self, voxels: Voxels, plan: Plan) -> Tensor:
        """Features of every cell with at least one kept token, (M, C), in the order of `plan.cell_M`.

        The local stages run chunk by chunk. With more than one chunk, their activations are computed again in the
        backward pass, so they need the memory of one chunk only. Of frozen stages only the result is kept.
        """
        with self._gradients(0):
            base_QC = self.embed.baseline(voxels)
        x_LC = torch.cat([self._chunk(voxels, base_QC, plan, chunk) for chunk in plan.chunks])[plan.by_sample_L]
        frozen = max(self.n_local, self.n_frozen)
        with self._gradients(self.n_local):
            x_LC = self._climb(x_LC, range(self.n_local, frozen), plan.samples)
        return self.norm(self._climb(x_LC, range(frozen, self.n), plan.samples))

    def _gradients(self, block: int) -> AbstractContextManager[object]:
        """A context without gradients if this block is frozen."""
        return torch.set_grad_enabled(torch.is_grad_enabled() and block >= self.n_frozen)

    def _chunk(self, voxels: Voxels, base_QC: Tensor | None, plan: Plan, chunk: Chunk) -> Tensor:
        """Apply the embedding and the local stages to one of the chunks."""
        stream = len(plan.chunks) > 1 and torch.is_grad_enabled()
        if not self.n_frozen:
            if stream:
                return checkpoint(self._local, voxels, base_QC, plan, chunk, self.n_local, use_reentrant=False)
            return self._local(voxels, base_QC, plan, chunk, self.n_local)
        frozen = min(self.n_local, self.n_frozen)
        with torch.no_grad():
            x_NC = self._local(voxels, base_QC, plan, chunk, frozen)
        trained = range(frozen, self.n_local)
        if stream and trained:
            return checkpoint(self._climb, x_NC, trained, chunk, use_reentrant=False)
        return self._climb(x_NC, trained, chunk)

    def stage(self, voxels: Voxels, plan: Plan, number: int) -> Tensor:
        """Features of every cell at the end of stage `number`, (M, C of that stage), in the order of `plan.cell_M`.

        The last stage gives the result of `forward`. In earlier stages a cell has several tokens, and its features are
        their mean, without the norm that follows the last stage.
        """
        if number == len(self.ends):
            return self(voxels, plan)
        stop = self.ends[number - 1]
        pooled = sum(block < stop for block in self.pooled)
        base_QC = self.embed.baseline(voxels)
        parts, above = [], plan.samples.children
        for chunk in plan.chunks:
            x_NC = self._local(voxels, base_QC, plan, chunk, min(stop, self.n_local))
            parts.append(x_NC if stop > self.n_local else _add_up(_counted(x_NC), chunk.children[pooled:]))
        x_LC = torch.cat(parts)[plan.by_sample_L]
        if stop > self.n_local:
            x_LC = _counted(self._climb(x_LC, range(self.n_local, stop), plan.samples))
            above = above[pooled - self.geometry.local_steps :]
        x_MC = _add_up(x_LC, above)
        return x_MC[:, :-1] / x_MC[:, -1:]

    def _local(self, voxels: Voxels, base_QC: Tensor | None, plan: Plan, chunk: Chunk, stop: int) -> Tensor:
        """Apply the embedding and the blocks before `stop` to one chunk of mask units."""
        here = slice(chunk.first, chunk.stop)
        patch_N = plan.patch_N[here]
        value_NV = voxels.value_RV[plan.row_N[here]].to(self.space.dtype)
        base_NC = None if base_QC is None else base_QC[patch_N]
        x_NC = self.embed(value_NV, voxels.spread_QV[patch_N], base_NC)
        frame_N = plan.frame_N[here]
        x_NC = x_NC + self.space[plan.space_N[here]] + self.time[frame_N % len(self.time)]
        x_NC = x_NC + self.seconds(voxels.second_BT.flatten()[frame_N])
        return self._climb(x_NC, range(stop), chunk)

    def _climb(self, x_NC: Tensor, indices: range, chunk: Chunk) -> Tensor:
        """Apply local or global blocks to one chunk of segments, with pooling where a stage starts."""
        first = 0 if indices.start < self.n_local else self.n_local
        level = sum(first <= block < indices.start for block in self.pooled)
        for index in indices:
            if index in self.pooled:
                x_NC = self.blocks[index](x_NC, chunk.pools[level], chunk.children[level])
                level += 1
            else:
                x_NC = self.blocks[index](x_NC, chunk.levels[level])
        return x_NC


def _counted(x_NC: Tensor) -> Tensor:
    """Append a channel of ones, which counts the tokens in a sum."""
    return torch.cat([x_NC, x_NC.new_ones(len(x_NC), 1)], dim=1)


def _add_up(x_NC: Tensor, levels: list[Children]) -> Tensor:
    """Sum tokens over several levels of children."""
    for where in levels:
        x_NC = segment_sum(x_NC, where)
    return x_NC
