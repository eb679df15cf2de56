"""Sparse patch gathers and ragged pooling beside dense implementations, on one CPU core, in float32.

The brain is that of the MNI152 mask, the encoder the embedding and the local stages of a preset, the voxels' values are
noise. Compared are, forward (without gradients) and forward and backward:

- *patch embedding*: the gather of the kept patches from the table of values and a linear map, beside `F.conv3d` of
  whole volumes;
- *pooling* as in the first pooled block: `segment_max` beside the maximum along an axis of whole blocks, in which
  missing tokens are -inf from the start (`amax`, whose forward is the faster, or `max`, whose backward is);
- *attention* of stage 1: `attend` beside `F.scaled_dot_product_attention` in whole units with a mask of the keys;
- *local stages*: `Hiera` without global blocks beside the dense one of `dense.py`, which has the same weights and drops
  nothing. Ours is timed with every patch, which shows the cost of ragged layouts; with the brain's patches; with these
  in chunks; and with the context of a default mask.

Outputs and gradients of both are compared before anything is timed; they must agree. Ratios are of CPU times.
Memory is the peak of forward and backward as `slim.planning.counting` counts it: what they make, not what they are
given.

Legend: T frames; X, Y, Z voxels of the grid; P patches; V voxels of a patch; R rows of the table of values; L tokens
of the dense grid; N kept tokens; M tokens after the first pooling; U units; E tokens of a unit; H heads; D channels of
a head; C channels.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from launchers.benches import dense
from launchers.benches.common import Figure, Ratio, Result, interleave
from shards.core.errors import ConfigError
from shards.core.settings import Settings
from shards.format.grid import Grid
from shards.format.patches import gather, patch_places
from slim.config import PRESETS, ModelSettings, TokenMaskSettings
from slim.data.collate import collate
from slim.data.masking import draw
from slim.data.samples import Sample, cell_sizes
from slim.model.geometry import Geometry, geometry_of
from slim.model.hiera import Block, Hiera
from slim.model.inputs import Batch
from slim.model.ragged import Plan
from slim.model.ragged_ops import attend, segment_max
from slim.planning.counting import Footprint
from slim.planning.step_cost import mni_brain

# What rounding may do: to outputs, as the largest difference over the largest value; to gradients, as norm over norm,
# because where two tokens all but tie the maximum may fall on either, and takes a whole gradient with it.
ROUNDING = {"outputs": 1e-4, "gradients": 1e-2}
TURNS = 10  # of a short operation in a round, because noise affects it more
FORWARD, BOTH = "forward", "forward and backward"


class Bench(Settings):
    """Sizes of the bench."""

    model: str = Field("published", description="preset of the encoder")
    frames: int = Field(8, ge=1, description="frames of the sample")
    mm: float = Field(2.0, gt=0, le=8, description="voxel edge of the grid, mm")
    shape: tuple[int, int, int] = Field((96, 96, 96), description="voxels of the grid")
    chunk_tokens: int = Field(4096, ge=1, description="tokens computed together")
    seed: int = Field(0, ge=0, lt=2**32, description="of values, weights and mask")

    @model_validator(mode="after")
    def _fits(self) -> Bench:
        if self.model not in PRESETS:
            raise ValueError(f"model to be one of {', '.join(PRESETS)}, not {self.model}")
        frames, *edges = PRESETS[self.model].unit
        for name, size, step in (
            ("frames", self.frames, frames),
            *(("shape", size, edge * self.grid.patch) for size, edge in zip(self.shape, edges, strict=True)),
        ):
            if size < 1 or size % step:
                raise ValueError(f"{name} in multiples of {step}, the size of a unit of {self.model}, not {size}")
        return self

    @property
    def grid(self) -> Grid:
        """The grid of the volumes."""
        return Grid(self.mm, self.shape)


SMALL = {"model": "lean", "frames": 5, "mm": 4, "shape": [48, 48, 48], "chunk_tokens": 1000}


@dataclass
class Scene:
    """A sample in all its forms, and the encoder.

    `volume_T1XYZ` is dense; `dense`, `brain` and `streamed` are batches of every patch, of the brain's, and of the
    brain's in chunks; the latter two have a context. `token_N` are the brain's tokens in the plan's order.
    """

    geometry: Geometry
    model: Hiera
    volume_T1XYZ: Tensor
    dense: Batch
    brain: Batch
    streamed: Batch
    token_N: Tensor

    @property
    def context(self) -> Plan:
        """The plan of the brain's context."""
        assert self.brain.context is not None
        return self.brain.context


@dataclass
class Way:
    """One way to compute something: a function of the tensors it is differentiated by.

    The dense way is required to take at least `at_least` times as long.
    """

    call: Callable[..., Tensor]
    inputs: Sequence[Tensor]
    at_least: float | None = None


@dataclass
class Contest:
    """An operation in the dense way and in ours, of which the first computes what the dense one does.

    `lay_out` makes an input of the dense way of one of ours; `keep` takes out of the dense output what ours has.
    """

    name: str
    dense: Way
    ours: dict[str, Way]
    turns: int = 1
    exact: bool = False
    lay_out: Callable[[Tensor], Tensor] = lambda tensor: tensor
    keep: Callable[[Tensor], Tensor] = lambda tensor: tensor


def run(bench: Bench, repeat: int, folder: Path, begun: Callable[[str], None]) -> Result:
    """Measure all of it; see the head of this file."""
    begun("make a sample")
    torch.manual_seed(bench.seed)
    notes = {"settings": bench.model_dump(mode="json"), "freed_memory_is_kept": keep_freed_memory()}
    scene = make_scene(bench)
    result, differences = Result(notes=notes | sizes(scene)), {}
    for make in (embedding, pooling, attention, local_stages):
        contest = make(scene)
        begun(f"{contest.name}: compare the numbers")
        differences[contest.name] = compare(contest)
        measure(contest, repeat, begun, result)
    result.notes["differences"] = differences
    return result


def keep_freed_memory() -> bool:
    """Ask the C library not to give freed memory back to the system; True where it can be asked.

    Else the largest tensors, which are the dense ones, are given back and paged in again at each use, and that takes
    several times as long as some of the operations. Accelerators' allocators keep memory anyhow.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    trim_threshold, mmap_max = -1, -4  # numbers of glibc's malloc.h
    return mallopt is not None and bool(mallopt(trim_threshold, -1) and mallopt(mmap_max, 0))


def make_scene(bench: Bench) -> Scene:
    """Noise in the MNI152 brain mask as volumes and as batches, and an encoder without global blocks.

    Raises
    ------
    ConfigError
        If the brain lies in a single cell.
    """
    preset, grid, rng = PRESETS[bench.model], bench.grid, np.random.default_rng(bench.seed)
    geometry, brain_XYZ = geometry_of(preset, (bench.frames, *grid.patch_shape)), mni_brain(grid)
    volume_TXYZ = rng.standard_normal((bench.frames, *grid.shape), np.float32) * brain_XYZ

    def sample(patch_P3: np.ndarray) -> Sample:
        inside_PV = gather(brain_XYZ, patch_P3, grid.patch)
        return Sample(
            key="sample",
            epoch=0,
            value=np.stack([gather(frame_XYZ, patch_P3, grid.patch) for frame_XYZ in volume_TXYZ]),
            baseline=np.zeros(inside_PV.shape, np.float32),
            spread=inside_PV.astype(np.float32),
            brain=inside_PV.astype(np.uint8),
            place=np.ravel_multi_index(tuple(patch_P3.T.astype(np.intp)), grid.patch_shape),
            second=np.arange(bench.frames, dtype=np.float32),
        )

    every = sample(patch_places(np.ones(grid.shape, bool), grid.patch))
    brain = sample(patch_places(brain_XYZ, grid.patch))
    size_SL = cell_sizes(geometry, brain.place)
    if np.count_nonzero(size_SL) < 2:
        raise ConfigError("command line", "shape", bench.shape, "a grid on which the brain has two cells or more")
    brain.mask = draw(size_SL, TokenMaskSettings(), bench.seed, 0, brain.key)
    batch = collate([brain], geometry, None)
    volume_T1XYZ = torch.from_numpy(volume_TXYZ)[:, None].contiguous(memory_format=torch.channels_last_3d)
    return Scene(
        geometry,
        Hiera(without_global_blocks(preset), geometry, grid.voxels, "global"),
        volume_T1XYZ,  # with one channel the same bytes, but the convolution is twice as fast
        collate([every], geometry, None),
        batch,
        collate([brain], geometry, bench.chunk_tokens),
        batch.whole.frame_N.long() * prod(grid.patch_shape) + batch.whole.space_N,
    )


def without_global_blocks(settings: ModelSettings) -> ModelSettings:
    """The same model up to the block that pools at the start of the first global stage, the last with local keys."""
    first = settings.depths[: settings.local_stages]
    return settings.model_copy(update={"depths": (*first, 1) if len(settings.depths) > len(first) else first})


def sizes(scene: Scene) -> dict[str, object]:
    """How much less there is to compute: tokens, and pairs of tokens that see each other in stage 1."""
    units = np.bincount(scene.geometry.unit_of)
    in_unit = np.bincount(scene.geometry.unit_of[scene.token_N.numpy()], minlength=len(units))
    n, kept = scene.geometry.in_order.size, len(scene.token_N)
    return {
        "tokens": {"dense": n, "brain": kept, "context": len(scene.context.row_N)},
        "dense_over_brain": {
            "tokens": n / kept,
            "pairs in stage 1": float(np.square(units).sum() / np.square(in_unit).sum()),
        },
        "units": {"dense": len(units), "with brain": int((in_unit > 0).sum()), "full": int((in_unit == units).sum())},
        "chunks_streamed": len(scene.streamed.whole.chunks),
    }


def embedding(scene: Scene) -> Contest:
    """Kept patches and a linear map, beside a convolution of the volumes."""
    assert scene.model.embed.whole is not None  # the view is global
    inputs = [scene.model.embed.whole.weight, scene.model.embed.bias]
    table_RV, row_N = scene.brain.voxels.value_RV, scene.brain.whole.row_N
    return Contest(
        "patch embedding",
        Way(partial(dense.embed, scene.volume_T1XYZ), inputs),
        {"gathered": Way(lambda weight_CV, bias_C: F.linear(table_RV[row_N], weight_CV, bias_C), inputs, 1)},
        TURNS,
        keep=lambda out_TPC: out_TPC.flatten(0, 1)[scene.token_N],
    )


def pooling(scene: Scene) -> Contest:
    """The first pooling step, of as many channels as there are in its block."""
    geometry, below = scene.geometry, scene.brain.whole.chunks[0].children[0]
    stride = geometry.strides[0]
    coarse = Geometry(
        tuple(size // step for size, step in zip(geometry.tokens, stride, strict=True)),
        tuple(size // step for size, step in zip(geometry.unit, stride, strict=True)),
        geometry.strides[1:],
    )
    parent_N = torch.from_numpy(geometry.ancestors[0])[scene.token_N]
    slot_N = dense.slots(geometry)[scene.token_N]
    slot_M = dense.slots(coarse)[parent_N[below.first_M]]
    x_NC = torch.randn(len(slot_N), 2 * scene.model.space.shape[1], requires_grad=True)

    def lay_out(x_NC: Tensor) -> Tensor:
        x_LC = x_NC.new_full((geometry.in_order.size, x_NC.shape[1]), -torch.inf).index_put((slot_N,), x_NC)
        return x_LC.view(-1, prod(stride), prod(coarse.unit), x_NC.shape[1])

    return Contest(
        "pooling",
        Way(dense.maximum, [lay_out(x_NC).detach().requires_grad_()]),
        {"gathered": Way(lambda x_NC: segment_max(x_NC, below), [x_NC])},
        TURNS,
        exact=True,
        lay_out=lay_out,
        keep=lambda out_UEC: out_UEC.flatten(0, 1)[slot_M],
    )


def attention(scene: Scene) -> Contest:
    """Attention of stage 1 inside units; the dense way masks the keys that do not exist."""
    block, units = scene.model.blocks[0], scene.geometry
    assert isinstance(block, Block)
    layer = block.attn
    heads, width = layer.heads, layer.proj.in_features // layer.heads
    where = scene.brain.whole.chunks[0].levels[0]
    slot_N = dense.slots(units)[scene.token_N]
    inputs = [torch.randn(len(slot_N), heads, width, requires_grad=True) for _ in "qkv"]
    there_UE = torch.zeros(units.in_order.size, dtype=torch.bool).index_fill(0, slot_N, True).view(-1, prod(units.unit))
    mask_U11E = (there_UE | ~there_UE.any(dim=1, keepdim=True))[:, None, None]  # a unit without keys would give NaN

    def lay_out(x_NHD: Tensor) -> Tensor:
        x_LHD = x_NHD.new_zeros(units.in_order.size, heads, width).index_put((slot_N,), x_NHD)
        return x_LHD.unflatten(0, there_UE.shape).transpose(1, 2).contiguous()

    dense_inputs = [lay_out(x_NHD).detach().requires_grad_() for x_NHD in inputs]
    return Contest(
        "attention",
        Way(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask_U11E), dense_inputs),
        {"gathered": Way(lambda q_NHD, k_NHD, v_NHD: attend(q_NHD, k_NHD, v_NHD, where), inputs, 2)},
        lay_out=lay_out,
        keep=lambda out_UHED: out_UHED.transpose(1, 2).flatten(0, 1)[slot_N],
    )


def local_stages(scene: Scene) -> Contest:
    """Embedding and local blocks of the encoder."""
    model, inputs, second_T = scene.model, list(scene.model.parameters()), scene.dense.voxels.second_BT[0]

    def ours(batch: Batch, plan: Plan, at_least: float | None = None) -> Way:
        return Way(lambda *_: model(batch.voxels, plan), inputs, at_least)

    return Contest(
        "local stages",
        Way(lambda *_: dense.encode(model, scene.volume_T1XYZ, second_T), inputs),
        {
            "every patch": ours(scene.dense, scene.dense.whole),
            "brain": ours(scene.brain, scene.brain.whole, 2),
            "streamed brain": ours(scene.streamed, scene.streamed.whole, 2),
            "context": ours(scene.brain, scene.context, 6),
        },
    )


def forward(way: Way) -> Tensor:
    """The output, without gradients."""
    with torch.no_grad():
        return way.call(*way.inputs)


def both(way: Way, grad: Tensor) -> tuple[Tensor, ...]:
    """The gradients of the inputs for a gradient of the output."""
    return torch.autograd.grad(way.call(*way.inputs), way.inputs, grad)


def compare(contest: Contest) -> dict[str, float]:
    """The largest differences of the two ways in outputs and gradients; see ROUNDING.

    Raises
    ------
    ArithmeticError
        If they do not compute the same: a defect.
    """
    ours = next(iter(contest.ours.values()))
    same = Way(lambda *inputs: contest.keep(contest.dense.call(*map(contest.lay_out, inputs))), ours.inputs)
    results = []
    for way in (ours, same):
        out = way.call(*way.inputs)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
        results.append((out.detach(), torch.autograd.grad(out, way.inputs, grad)))
        del out
    (out, grads), (dense_out, dense_grads) = results
    found = {
        "outputs": float((out - dense_out).abs().max() / dense_out.abs().max()),
        "gradients": max(float((a - b).norm() / b.norm()) for a, b in zip(grads, dense_grads, strict=True)),
    }
    for what, difference in found.items():
        allowed = 0.0 if contest.exact else ROUNDING[what]
        if not difference <= allowed:  # nor NaN
            raise ArithmeticError(f"{contest.name}: {what} differ by {difference:g}, {allowed:g} is allowed")
    return found


def peak(work: Callable[[], object]) -> int:
    """Bytes of all that is made on the way and alive at one time."""
    with Footprint() as found:
        result = work()
    del result
    return found.peak


def measure(contest: Contest, repeat: int, begun: Callable[[str], None], result: Result) -> None:
    """Add the contest's figures and ratios to the result."""
    work: dict[str, Callable[[], object]] = {}
    memory = {}
    for which, way in {"dense": contest.dense, **contest.ours}.items():
        name = f"{contest.name}, {which}"
        work[f"{name}, {FORWARD}"] = partial(forward, way)
        work[f"{name}, {BOTH}"] = partial(both, way, torch.randn_like(forward(way)))
        memory[f"{name}, peak"] = Figure("MiB", (peak(work[f"{name}, {BOTH}"]) / 2**20,))
    result.figures |= interleave(work, repeat, begun, dict.fromkeys(work, contest.turns), "ms") | memory
    for which, way in contest.ours.items():
        for what, at_least in ((f"{FORWARD}, CPU", way.at_least), (f"{BOTH}, CPU", way.at_least), ("peak", None)):
            name = f"{contest.name}, dense over {which}, {what}"
            of, over = (f"{contest.name}, {one}, {what}" for one in ("dense", which))
            result.ratios.append(Ratio(name, of, over, at_least))
