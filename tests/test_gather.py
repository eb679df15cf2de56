"""Gathered equals dense with the missing tokens masked; streamed equals unstreamed; background changes nothing."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from slim.batch import Sample, cell_sizes, collate
from slim.config import MaskSettings, ModelSettings
from slim.gather import attend, plan, segment_max, segments
from slim.geometry import Geometry
from slim.hiera import Hiera, Voxels
from slim.masking import draw

V = 8
SIZES = ModelSettings(
    embed=16, heads=2, depths=(1, 2, 2), unit=(4, 4, 4, 4), strides=((2, 2, 2, 2), (2, 1, 1, 1)), local_stages=2
)
GEOMETRY = Geometry((8, 4, 4, 8), SIZES.unit, SIZES.strides)


def make_sample(seed: int, brain: float = 0.35, geometry: Geometry = GEOMETRY) -> Sample:
    rng = np.random.default_rng(seed)
    frames, places = geometry.tokens[0], int(np.prod(geometry.tokens[1:]))
    place = np.sort(rng.choice(places, max(2, int(brain * places)), replace=False))
    n = len(place)
    return Sample(
        f"s{seed}",
        0,
        rng.standard_normal((frames, n, V)).astype(np.float32),
        rng.standard_normal((n, V)).astype(np.float32),
        rng.random((n, V)).astype(np.float32) + 0.5,
        np.ones((n, V), np.uint8),
        place,
        (np.arange(frames) * 0.72).astype(np.float32),
    )


def encoder(dtype: torch.dtype = torch.float64, view: str = "both") -> Hiera:
    torch.manual_seed(0)
    model = Hiera(SIZES, GEOMETRY, V, view)  # type: ignore[arg-type]
    with torch.no_grad():  # weights large enough that every path matters
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model.to(dtype)


def as_dtype(voxels: Voxels, dtype: torch.dtype) -> Voxels:
    return Voxels(*(value.to(dtype) for value in vars(voxels).values()))


def dense_reference(model: Hiera, sample: Sample) -> dict[int, torch.Tensor]:
    """The encoder on the full grid in its plainest form: boolean masks, loops over units, no sorting.

    Returns the feature of each cell that holds a token.
    """
    geometry = model.geometry
    dtype = model.space.dtype
    frames, places = geometry.tokens[0], int(np.prod(geometry.tokens[1:]))
    exists = torch.zeros(frames, places, dtype=torch.bool)
    exists[:, sample.place] = True
    value = torch.zeros(frames, places, V, dtype=dtype)
    value[:, sample.place] = torch.from_numpy(sample.value).to(dtype)
    baseline, spread = torch.zeros(places, V, dtype=dtype), torch.ones(places, V, dtype=dtype)
    baseline[sample.place] = torch.from_numpy(sample.baseline).to(dtype)
    spread[sample.place] = torch.from_numpy(sample.spread).to(dtype)
    x = model.embed.whole(value + baseline) + model.embed.own(value / spread) + model.embed.bias
    x = x + model.space + model.time[:, None] + model.seconds(torch.from_numpy(sample.second).to(dtype))[:, None]
    shape = geometry.tokens
    x, exists = x.reshape(*shape, -1), exists.reshape(shape)
    unit = geometry.unit
    level = 0
    for index, block in enumerate(model.blocks):
        stride = (1, 1, 1, 1)
        if index in model.pooled:
            stride = geometry.strides[level]
            level += 1
        y = block.norm1(x)
        q, k, v = block.attn.qkv(y).chunk(3, dim=-1)
        residual = block.proj(y) if block.proj is not None else x
        q, pooled_exists = pool(q, exists, stride)
        residual, _ = pool(residual, exists, stride)
        window = unit if index < model.n_local else shape
        out = torch.zeros_like(residual)
        pooled_window = tuple(w // s for w, s in zip(window, stride, strict=True))
        for corner in np.ndindex(*(n // w for n, w in zip(shape, window, strict=True))):
            keys = tuple(slice(c * w, (c + 1) * w) for c, w in zip(corner, window, strict=True))
            queries = tuple(slice(c * w, (c + 1) * w) for c, w in zip(corner, pooled_window, strict=True))
            if not exists[keys].any():
                continue
            heads = block.attn.heads
            qh = q[queries][pooled_exists[queries]].unflatten(-1, (heads, -1)).transpose(0, 1)
            kh = k[keys][exists[keys]].unflatten(-1, (heads, -1)).transpose(0, 1)
            vh = v[keys][exists[keys]].unflatten(-1, (heads, -1)).transpose(0, 1)
            weight = (qh @ kh.transpose(1, 2) / qh.shape[-1] ** 0.5).softmax(dim=-1)
            mixed = (weight @ vh).transpose(0, 1).flatten(1)
            part = torch.zeros_like(out[queries])
            part[pooled_exists[queries]] = block.attn.proj(mixed)
            out[queries] = part
        x, exists, shape = residual + out, pooled_exists, tuple(x.shape[:-1])
        x = x + block.fc2(F.gelu(block.fc1(block.norm2(x))))
        shape = tuple(x.shape[:-1])
        unit = tuple(u // s for u, s in zip(unit, stride, strict=True))
    x = model.norm(x).reshape(-1, model.dim)
    return {int(cell): x[cell] for cell in torch.nonzero(exists.reshape(-1))[:, 0]}


def pool(x: torch.Tensor, exists: torch.Tensor, stride: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Maximum over the children that exist."""
    shape = [part for size, step in zip(x.shape[:-1], stride, strict=True) for part in (size // step, step)]
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    there = exists.reshape(shape).permute(order).flatten(4)
    values = x.reshape(*shape, x.shape[-1]).permute(*order, 8).flatten(4, 7)
    values = values.masked_fill(~there[..., None], -torch.inf).amax(dim=4)
    return values.masked_fill(~there.any(-1)[..., None], 0.0), there.any(-1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_gathered_equals_dense_with_missing_tokens_masked(dtype: torch.dtype, tolerance: float) -> None:
    model = encoder(dtype)
    samples = [make_sample(1), make_sample(2, 0.6)]
    batch = collate(samples, GEOMETRY, chunk_tokens=60)
    # float64 voxels would be rounded by the encoder's cast of stored values: keep both sides on float32 values
    out = model(as_dtype(batch.voxels, dtype), batch.whole)
    dense = [dense_reference(model, sample) for sample in samples]
    expected = torch.stack(
        [dense[int(s)][int(c)] for s, c in zip(batch.whole.sample_M, batch.whole.cell_M, strict=True)]
    )
    assert sum(map(len, dense)) == len(out)
    assert (out - expected).abs().max() < tolerance * expected.abs().max()

    names = [name for name, _ in model.named_parameters()]
    weight = torch.randn(out.shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    grads = torch.autograd.grad((out * weight).sum(), list(model.parameters()))
    expected_grads = torch.autograd.grad((expected * weight).sum(), list(model.parameters()))
    for name, mine, other in zip(names, grads, expected_grads, strict=True):
        assert (mine - other).abs().max() < tolerance * max(1.0, float(other.abs().max())), name
        assert other.abs().max() > 0, name


@pytest.mark.parametrize("chunk", [1, 37, 200, 10**6])
def test_streamed_equals_unstreamed(chunk: int) -> None:
    model = encoder()
    samples = [make_sample(3), make_sample(4)]
    results = []
    for tokens in (None, chunk):
        batch = collate(samples, GEOMETRY, chunk_tokens=tokens)
        model.zero_grad()
        out = model(as_dtype(batch.voxels, torch.float64), batch.whole)
        out.square().sum().backward()
        results.append((out.detach(), [p.grad.clone() for p in model.parameters()]))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-12)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        assert torch.allclose(one, other, atol=1e-9)


def test_a_streamed_pass_keeps_less_for_the_backward() -> None:
    model = encoder(torch.float32)
    sample = make_sample(5, 1.0)
    kept = []
    for tokens in (None, 64):
        batch = collate([sample], GEOMETRY, chunk_tokens=tokens)
        saved = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal saved
            saved += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(batch.voxels, batch.whole)
        kept.append(saved)
    assert kept[1] < kept[0] / 2


def test_order_of_tokens_in_the_input_does_not_matter() -> None:
    model = encoder()
    sample = make_sample(6)
    batch = collate([sample], GEOMETRY, None)
    shuffled = np.random.default_rng(0).permutation(len(sample.place))
    other = collate(
        [
            dataclasses.replace(
                sample,
                place=sample.place[shuffled],
                value=sample.value[:, shuffled],
                baseline=sample.baseline[shuffled],
                spread=sample.spread[shuffled],
                brain=sample.brain[shuffled],
            )
        ],
        GEOMETRY,
        None,
    )
    one = model(as_dtype(batch.voxels, torch.float64), batch.whole)
    two = model(as_dtype(other.voxels, torch.float64), other.whole)
    assert torch.equal(batch.whole.cell_M, other.whole.cell_M)
    assert torch.allclose(one, two, atol=1e-12)


def test_company_in_the_batch_does_not_change_a_sample() -> None:
    model = encoder()
    alone = collate([make_sample(7)], GEOMETRY, 100)
    crowd = collate([make_sample(8, 0.9), make_sample(7), make_sample(9, 0.1)], GEOMETRY, 100)
    one = model(as_dtype(alone.voxels, torch.float64), alone.whole)
    many = model(as_dtype(crowd.voxels, torch.float64), crowd.whole)
    assert torch.allclose(one, many[crowd.whole.sample_M == 1], atol=1e-11)


def test_background_voxels_change_no_bit() -> None:
    """A voxel outside the mask has spread 0 and value 0 in the shards; the voxel view sees not even a stray value."""
    model = encoder(torch.float32, "voxel")
    sample = make_sample(10)
    sample.spread[:, ::3] = 0
    batch = collate([sample], GEOMETRY, None)
    noisy = dataclasses.replace(sample, value=sample.value.copy())
    noisy.value[:, :, ::3] = 1e3
    other = collate([noisy], GEOMETRY, None)
    assert torch.equal(model(batch.voxels, batch.whole), model(other.voxels, other.whole))


def test_context_alone_equals_a_sample_that_holds_nothing_else() -> None:
    """What is not context is not there: changing it changes no bit of the context's features."""
    model = encoder()
    sample = make_sample(11, 0.7)
    sample.mask = draw(
        cell_sizes(GEOMETRY, sample.place), MaskSettings(context_places=0.5, context_times=0.5), 0, 0, "k"
    )
    batch = collate([sample], GEOMETRY, None)
    assert batch.context is not None
    changed = dataclasses.replace(sample, value=sample.value.copy())
    in_context = np.zeros(int(np.prod(GEOMETRY.cells)), bool)
    in_context[sample.mask.context_K] = True
    places = int(np.prod(GEOMETRY.tokens[1:]))
    token = np.arange(GEOMETRY.tokens[0])[:, None] * places + sample.place
    changed.value[~in_context[GEOMETRY.cell_of[token]]] += 100.0
    other = collate([changed], GEOMETRY, None)
    one = model(as_dtype(batch.voxels, torch.float64), batch.context)
    two = model(as_dtype(other.voxels, torch.float64), other.context)
    assert torch.equal(one, two)
    assert set(batch.context.cell_M.tolist()) == set(sample.mask.context_K.tolist())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 30)), min_size=1, max_size=12), st.integers(0, 99))
def test_attend_equals_attention_segment_by_segment(lengths: list[tuple[int, int]], seed: int) -> None:
    q_len, k_len = (np.array(part) for part in zip(*lengths, strict=True))
    rng = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(int(n), 2, 4, generator=rng, dtype=torch.float64) for n in (q_len.sum(), k_len.sum(), k_len.sum())
    )
    out = attend(q, k, v, segments(q_len, k_len))
    parts = [
        F.scaled_dot_product_attention(*(t.transpose(0, 1) for t in part)).transpose(0, 1)
        for part in zip(q.split(q_len.tolist()), k.split(k_len.tolist()), v.split(k_len.tolist()), strict=True)
    ]
    assert torch.allclose(out, torch.cat(parts), atol=1e-12)


def test_buckets_never_pad_to_the_longest_unit() -> None:
    lengths = np.random.default_rng(0).integers(1, 4097, 500)
    padded = sum(len(bucket.k_length) * bucket.k_max for bucket in segments(lengths, lengths).buckets)
    assert padded < 1.15 * lengths.sum() < 500 * lengths.max() / 1.5


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.integers(0, 99))
def test_segment_max_is_the_maximum_of_each_segment(lengths: list[int], seed: int) -> None:
    x = torch.randn(sum(lengths), 3, generator=torch.Generator().manual_seed(seed))
    expected = torch.stack([part.amax(dim=0) for part in x.split(lengths)])
    assert torch.equal(segment_max(x, torch.tensor(lengths)), expected)


def test_segment_max_gradient() -> None:
    x = torch.randn(12, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: segment_max(t, torch.tensor([1, 5, 2, 4])), x)
    tied = torch.ones(4, 1, requires_grad=True)
    segment_max(tied, torch.tensor([4])).sum().backward()
    assert tied.grad.sum() == 1  # one winner among equals, as a maximum along an axis has


def test_plan_lists_every_token_once() -> None:
    sample = make_sample(12)
    batch = collate([sample, sample], GEOMETRY, 50)
    n = GEOMETRY.tokens[0] * len(sample.place)
    assert sorted(batch.whole.row_N.tolist()) == list(range(2 * n))
    assert [c.first for c in batch.whole.chunks][1:] == [c.stop for c in batch.whole.chunks][:-1]
    empty = plan(GEOMETRY, [np.array([3])], [np.array([0])], [np.array([0])])
    assert empty.cell_M.tolist() == [GEOMETRY.cell_of[3]]


def test_a_packed_batch_is_the_same_in_few_tensors() -> None:
    """Every tensor sent by a loading process takes a file descriptor; a plan alone has hundreds."""
    sample = make_sample(13)
    sample.mask = draw(cell_sizes(GEOMETRY, sample.place), MaskSettings(), 0, 0, "k")
    batch = collate([sample, sample], GEOMETRY, 40)

    def tensors(item: object) -> list[torch.Tensor]:
        if isinstance(item, torch.Tensor):
            return [item]
        if isinstance(item, list | tuple):
            return [t for part in item for t in tensors(part)]
        return [t for part in vars(item).values() for t in tensors(part)] if hasattr(item, "__dict__") else []

    packed = batch.pack()
    assert len(tensors(packed)) < 10 < 200 < len(tensors(batch))
    back = packed.to("cpu")
    pairs = list(zip(tensors(batch), tensors(back), strict=True))
    assert all(torch.equal(one, other) for one, other in pairs)
    assert [b.full for b in batch.whole.whole.buckets] == [b.full for b in back.whole.whole.buckets]
