"""A plain dense Hiera with the weights of a gathered one: every patch of the grid is a token, and none is dropped.

Tokens lie as (units, tokens of a unit, channels) and in such an order that pooling is a maximum along an axis, as in
the reference implementation of Hiera: nothing is gathered, masked or looped over.

Legend: T frames; X, Y, Z voxels of the grid; P patches; V voxels of a patch; L tokens of the dense grid; U units; E
tokens of a unit; S tokens of a pooled one; M tokens of the last level; C channels.
"""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from slim.model.geometry import Geometry
from slim.model.hiera import Block, Hiera


def unroll(x_LC: Tensor, geometry: Geometry) -> Tensor:
    """Tokens of the dense grid in C order as (U, E, C), the children of a pooled token at equal steps.

    Inside a unit the place among the siblings of the first pooling comes first, then that of the second, ..., then the
    cell: each pooling is a maximum along an axis.
    """
    axes = range(len(geometry.tokens))
    parts = [
        (size // unit, unit // cell, *(stride[axis] for stride in reversed(geometry.strides)))
        for axis, (size, unit, cell) in enumerate(zip(geometry.tokens, geometry.unit, geometry.cell, strict=True))
    ]
    levels = len(geometry.strides)
    order = [axis * (levels + 2) + part for part in (0, *range(levels + 1, 1, -1), 1) for axis in axes]
    x = x_LC.reshape(*(size for part in parts for size in part), -1).permute(*order, -1)
    return x.reshape(-1, prod(geometry.unit), x_LC.shape[-1])


def slots(geometry: Geometry) -> Tensor:
    """Where `unroll` puts each token, int64 (L,)."""
    return torch.argsort(unroll(torch.arange(geometry.in_order.size)[:, None], geometry).flatten())


def embed(volume_T1XYZ: Tensor, weight_CV: Tensor, bias_C: Tensor) -> Tensor:
    """Embeddings of every patch, (T, P, C)."""
    edge = round(weight_CV.shape[1] ** (1 / 3))
    x = F.conv3d(volume_T1XYZ, weight_CV.view(-1, 1, edge, edge, edge), bias_C, stride=edge)
    return x.flatten(2).transpose(1, 2)


def maximum(x_USEC: Tensor) -> Tensor:
    """The maximum over S, in the way that is faster: `max` has the faster backward, `amax` the faster forward."""
    return x_USEC.max(dim=1).values if torch.is_grad_enabled() else x_USEC.amax(dim=1)


def encode(model: Hiera, volume_T1XYZ: Tensor, second_T: Tensor) -> Tensor:
    """Features of all cells of one sample, (M, C), of a model whose blocks are all local and whose view is global."""
    assert model.embed.whole is not None  # the view is global
    x_TPC = embed(volume_T1XYZ, model.embed.whole.weight, model.embed.bias)
    x_TPC = x_TPC + model.space + (model.time + model.seconds(second_T))[:, None]
    x_UEC = unroll(x_TPC, model.geometry)
    strides = iter(model.geometry.strides)
    for index, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        x_UEC = _block(block, x_UEC, prod(next(strides)) if index in model.pooled else 1)
    return model.norm(x_UEC).flatten(0, 1)


def _block(block: Block, x_UEC: Tensor, pooled: int) -> Tensor:
    """A Hiera block in full units; `pooled` tokens become one."""
    y_UEC = block.norm1(x_UEC)
    if block.proj is not None:
        x_UEC = block.proj(y_UEC)
    q_UEC, k_UEC, v_UEC = block.attn.qkv(y_UEC).chunk(3, dim=-1)
    if pooled > 1:
        x_UEC, q_UEC = (maximum(part.unflatten(1, (pooled, -1))) for part in (x_UEC, q_UEC))
    q, k, v = (part.unflatten(-1, (block.attn.heads, -1)).transpose(1, 2) for part in (q_UEC, k_UEC, v_UEC))
    x_UEC = x_UEC + block.attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    return x_UEC + block.fc2(F.gelu(block.fc1(block.norm2(x_UEC))))
