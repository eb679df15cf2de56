"""Gathered equals dense with the missing tokens masked; streamed equals unstreamed; background changes nothing."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.batches import GEOMETRY, GLOBAL, SIZES, V, make_sample
from slim.config import ModelSettings, TokenMaskSettings
from slim.data.collate import collate
from slim.data.masking import draw
from slim.data.samples import Sample, cell_sizes
from slim.model import ragged_ops
from slim.model.geometry import geometry_of
from slim.model.hiera import Hiera
from slim.model.inputs import Batch, Packed, Voxels
from slim.model.ragged import children, plan, segments
from slim.model.ragged_ops import attend, segment_max


def encoder(dtype: torch.dtype = torch.float64, view: str = "both", sizes: ModelSettings = SIZES) -> Hiera:
    torch.manual_seed(0)
    model = Hiera(sizes, geometry_of(sizes, GEOMETRY.tokens), V, view)  # type: ignore[arg-type]
    with torch.no_grad():  # weights large enough that every path matters
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model.to(dtype)


def run(model: Hiera, samples: list[Sample], chunk_tokens: int | None, device: str) -> tuple[torch.Tensor, Batch]:
    """Features of all tokens of the samples, computed on the device and brought back; and the batch."""
    batch = collate(samples, model.geometry, chunk_tokens)
    there = batch.to(device)
    out = model.to(device)(as_dtype(there.voxels, model.space.dtype), there.whole)
    return out.cpu(), batch


def as_dtype(voxels: Voxels, dtype: torch.dtype) -> Voxels:
    return Voxels(*(value.to(dtype) for value in vars(voxels).values()))


def dense_reference(model: Hiera, sample: Sample, stage: int | None = None) -> dict[int, torch.Tensor]:
    """The encoder on the full grid in its plainest form: boolean masks, loops over units, no sorting.

    Returns the feature of each cell that holds a token; of an earlier stage, the mean over the cell's tokens.
    """
    geometry = model.geometry
    dtype = model.space.dtype
    frames, places = geometry.tokens[0], int(np.prod(geometry.tokens[1:]))
    length = len(sample.second)  # a short session has fewer frames than the grid
    exists = torch.zeros(frames, places, dtype=torch.bool)
    exists[:length, sample.place] = True
    value = torch.zeros(frames, places, V, dtype=dtype)
    value[:length, sample.place] = torch.from_numpy(sample.value).to(dtype)
    baseline, spread = torch.zeros(places, V, dtype=dtype), torch.ones(places, V, dtype=dtype)
    baseline[sample.place] = torch.from_numpy(sample.baseline).to(dtype)
    spread[sample.place] = torch.from_numpy(sample.spread).to(dtype)
    x = model.embed.whole(value + baseline) + model.embed.own(value / spread) + model.embed.bias
    second = torch.zeros(frames, dtype=dtype)
    second[:length] = torch.from_numpy(sample.second).to(dtype)
    x = x + model.space + model.time[:, None] + model.seconds(second)[:, None]
    shape = geometry.tokens
    x, exists = x.reshape(*shape, -1), exists.reshape(shape)
    unit = geometry.unit
    level = 0
    for index, block in enumerate(model.blocks if stage is None else model.blocks[: model.ends[stage - 1]]):
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
    if stage is not None:
        left = [size // cells for size, cells in zip(shape, geometry.cells, strict=True)]
        split = [part for cells, step in zip(geometry.cells, left, strict=True) for part in (cells, step)]
        exists = exists.reshape(split).permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(0, 3).flatten(1)
        x = x.reshape(*split, x.shape[-1]).permute(0, 2, 4, 6, 1, 3, 5, 7, 8).flatten(0, 3).flatten(1, 4)
        return {cell: x[cell][exists[cell]].mean(dim=0) for cell in range(len(x)) if exists[cell].any()}
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


@pytest.mark.parametrize("sizes", [SIZES, GLOBAL], ids=["pooled in units", "pooled in a global stage"])
@pytest.mark.parametrize("stage", [1, 2])
@torch.no_grad()
def test_a_stage_is_the_mean_over_each_cells_tokens(sizes: ModelSettings, stage: int):
    model, samples = encoder(sizes=sizes), [make_sample(1), make_sample(2, brain=0.1), make_sample(3, frames=5)]
    for chunk_tokens in (None, 100):
        batch = collate(samples, model.geometry, chunk_tokens)
        out = model.stage(as_dtype(batch.voxels, torch.float64), batch.whole, stage)
        assert out.shape == (len(batch.whole.cell_M), sizes.embed * 2 ** (stage - 1))
        for number, sample in enumerate(samples):
            expected = dense_reference(model, sample, stage)
            mine = batch.whole.sample_M == number
            cells = batch.whole.cell_M[mine].tolist()
            assert sorted(cells) == sorted(expected)
            torch.testing.assert_close(out[mine], torch.stack([expected[cell] for cell in cells]))
    whole = model.stage(as_dtype(batch.voxels, torch.float64), batch.whole, 3)
    assert torch.equal(whole, model(as_dtype(batch.voxels, torch.float64), batch.whole))


@pytest.mark.parametrize("sizes", [SIZES, GLOBAL], ids=["pooled in units", "pooled in a global stage"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("frames", [(8, 8), (8, 4), (3, 8), (1, 6)], ids=str)
def test_gathered_equals_dense_with_missing_tokens_masked(
    dtype: torch.dtype, tolerance: float, sizes: ModelSettings, frames: tuple[int, int], device: str
) -> None:
    samples = [make_sample(1, frames=frames[0]), make_sample(2, 0.6, frames=frames[1])]
    dense_model = encoder(dtype, sizes=sizes)
    dense = [dense_reference(dense_model, sample) for sample in samples]
    model = encoder(dtype, sizes=sizes)
    out, batch = run(model, samples, 60, device)
    where = zip(batch.whole.sample_M.tolist(), batch.whole.cell_M.tolist(), strict=True)
    expected = torch.stack([dense[sample][cell] for sample, cell in where])
    assert sum(map(len, dense)) == len(out)
    assert (out - expected).abs().max() < tolerance * expected.abs().max()

    weight = torch.randn(out.shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    (out * weight).sum().backward()
    (expected * weight).sum().backward()
    for (name, mine), other in zip(model.named_parameters(), dense_model.parameters(), strict=True):
        assert (mine.grad.cpu() - other.grad).abs().max() < tolerance * max(1.0, float(other.grad.abs().max())), name
        assert other.grad.abs().max() > 0, name


@pytest.mark.parametrize("chunk", [1, 37, 200, 10**6])
def test_streamed_equals_unstreamed(chunk: int, device: str) -> None:
    results = []
    for tokens in (None, chunk):
        model = encoder()
        out, _ = run(model, [make_sample(3), make_sample(4)], tokens, device)
        out.square().sum().backward()
        results.append((out.detach(), [p.grad.cpu() for p in model.parameters()]))
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


def test_order_of_patches_in_the_input_does_not_matter(device: str) -> None:
    model, sample = encoder(), make_sample(6)
    shuffled = np.random.default_rng(0).permutation(len(sample.place))
    other = dataclasses.replace(
        sample,
        value=sample.value[:, shuffled],
        **{name: getattr(sample, name)[shuffled] for name in ("place", "baseline", "spread", "brain")},
    )
    (one, batch), (two, again) = (run(model, [item], None, device) for item in (sample, other))
    assert torch.equal(batch.whole.cell_M, again.whole.cell_M)
    assert torch.allclose(one, two, atol=1e-12)


def test_permuting_windows_permutes_the_output(device: str) -> None:
    """Without positions in time: windows of four frames, each a unit and a slot of its own."""
    sizes = SIZES.model_copy(update={"strides": ((4, 2, 2, 2),), "depths": (2, 2)})
    model = encoder(sizes=sizes)
    with torch.no_grad():
        model.time.zero_()
        model.seconds.linear.weight.zero_()
    sample = make_sample(14, geometry=model.geometry)
    swapped = dataclasses.replace(sample, value=sample.value[[4, 5, 6, 7, 0, 1, 2, 3]])
    (one, batch), (two, again) = (run(model, [item], None, device) for item in (sample, swapped))
    assert torch.equal(batch.whole.cell_M, again.whole.cell_M) and model.geometry.cells[0] == 2
    first, second = one.chunk(2)
    assert torch.allclose(torch.cat([second, first]), two, atol=1e-12)
    assert not torch.allclose(one, two, atol=1e-3)


def test_company_in_the_batch_does_not_change_a_sample(device: str) -> None:
    model = encoder()
    one, _ = run(model, [make_sample(7)], 100, device)
    many, crowd = run(model, [make_sample(8, 0.9), make_sample(7), make_sample(9, 0.1)], 100, device)
    assert torch.allclose(one, many[crowd.whole.sample_M == 1], atol=1e-11)


@pytest.mark.parametrize("view", ["global", "voxel", "both"])
def test_background_voxels_change_no_bit(view: str, device: str) -> None:
    model = encoder(torch.float32, view)
    sample = make_sample(10)
    sample.brain[:, ::3] = 0
    rng = np.random.default_rng(1)
    noisy = dataclasses.replace(
        sample, **{name: getattr(sample, name).copy() for name in ("value", "baseline", "spread")}
    )
    for array in (noisy.value, noisy.baseline, noisy.spread):
        array[..., ::3] = rng.normal(0, 1e3, array[..., ::3].shape)
    (one, batch), (two, other) = (run(model, [item], None, device) for item in (sample, noisy))
    assert not torch.equal(batch.voxels.value_RV, other.voxels.value_RV)
    assert torch.equal(one, two)


def test_context_alone_equals_a_sample_that_holds_nothing_else(device: str) -> None:
    """What is not context is not there: changing it changes no bit of the context's features."""
    model = encoder()
    sample = make_sample(11, 0.7)
    sample.mask = draw(
        cell_sizes(GEOMETRY, sample.place), TokenMaskSettings(context_places=0.5, context_times=0.5), 0, 0, "k"
    )
    batch = collate([sample], GEOMETRY, None).to(device)
    assert batch.context is not None
    changed = dataclasses.replace(sample, value=sample.value.copy())
    in_context = np.zeros(int(np.prod(GEOMETRY.cells)), bool)
    in_context[sample.mask.context_K] = True
    places = int(np.prod(GEOMETRY.tokens[1:]))
    token = np.arange(GEOMETRY.tokens[0])[:, None] * places + sample.place
    changed.value[~in_context[GEOMETRY.cell_of[token]]] += 100.0
    other = collate([changed], GEOMETRY, None).to(device)
    model.to(device)
    one = model(as_dtype(batch.voxels, torch.float64), batch.context)
    two = model(as_dtype(other.voxels, torch.float64), other.context)
    assert torch.equal(one, two)
    assert set(batch.context.cell_M.tolist()) == set(sample.mask.context_K.tolist())


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 30)), min_size=1, max_size=12), st.integers(0, 99))
def test_attend_equals_attention_segment_by_segment(device: str, lengths: list[tuple[int, int]], seed: int) -> None:
    q_len, k_len = (np.array(part) for part in zip(*lengths, strict=True))
    rng = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(int(n), 2, 4, generator=rng, dtype=torch.float64) for n in (q_len.sum(), k_len.sum(), k_len.sum())
    )
    where = Packed(segments(q_len, k_len)).to(device)
    out = attend(q.to(device), k.to(device), v.to(device), where).cpu()
    parts = [
        F.scaled_dot_product_attention(*(t.transpose(0, 1) for t in part)).transpose(0, 1)
        for part in zip(q.split(q_len.tolist()), k.split(k_len.tolist()), v.split(k_len.tolist()), strict=True)
    ]
    assert torch.allclose(out, torch.cat(parts), atol=1e-12)


def plain_varlen(q, k, v, q_bound, k_bound, q_max, k_max):
    """What flash attention over segments of different lengths computes, segment by segment."""
    assert q_bound.dtype == k_bound.dtype == torch.int32
    assert q_bound.diff().max() == q_max and k_bound.diff().max() == k_max
    parts = [
        F.scaled_dot_product_attention(*(t.transpose(0, 1) for t in part)).transpose(0, 1)
        for part in zip(
            q.split(q_bound.diff().tolist()), k.split(k_bound.diff().tolist()), v.split(k_bound.diff().tolist()),
            strict=True,
        )
    ]  # fmt: skip
    return torch.cat(parts)


@pytest.mark.parametrize("sizes", [SIZES, GLOBAL], ids=["pooled in units", "pooled in a global stage"])
def test_both_paths_of_attention_give_the_same_numbers(sizes: ModelSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Varlen attention gets bounds that fit, in every stage and chunk; what stands in for its kernel is plain."""
    samples = [make_sample(15), make_sample(16, 0.8)]
    results = []
    for varlen in (False, True):
        monkeypatch.setattr(ragged_ops, "has_varlen", lambda q, answer=varlen: answer)
        monkeypatch.setattr(ragged_ops, "varlen_attn", plain_varlen)
        model = encoder(sizes=sizes)
        out, _ = run(model, samples, 100, "cpu")
        out.square().sum().backward()
        results.append((out, [p.grad for p in model.parameters()]))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-12)
    assert all(torch.allclose(*pair, atol=1e-9) for pair in zip(results[0][1], results[1][1], strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_varlen_attention_of_the_device_gives_the_numbers_of_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 700, 60)
    where = Packed(segments(np.maximum(1, lengths // 3), lengths)).to("cuda")
    rows = (int(where.q_bound[-1]), int(where.k_bound[-1]), int(where.k_bound[-1]))
    start = [torch.randn(n, 2, 64, device="cuda", dtype=torch.bfloat16) for n in rows]
    results = []
    for varlen in (True, False):
        inputs = [tensor.clone().requires_grad_() for tensor in start]
        assert ragged_ops.has_varlen(inputs[0])
        with monkeypatch.context() as patch:
            if not varlen:
                patch.setattr(ragged_ops, "has_varlen", lambda q: False)
            out = attend(*inputs, where)
        out.float().square().sum().backward()
        results.append([out.float(), *(tensor.grad.float() for tensor in inputs)])
    for one, other in zip(*results, strict=True):
        assert (one - other).norm() < 1e-2 * other.norm()


def test_a_run_holds_segments_of_equal_lengths_and_the_runs_hold_all_rows() -> None:
    rng = np.random.default_rng(0)
    k_len = rng.integers(1, 9, 50)
    q_len = (k_len + 1) // 2
    where = segments(q_len, k_len)
    assert len(where.runs) == len(np.unique(k_len))
    k_bound, at = where.k_bound.tolist(), 0
    assert where.k_order_N is not None
    for count, queries, keys in where.runs:
        for _ in range(count):
            rows = where.k_order_N[at : at + keys].tolist()
            segment = k_bound.index(rows[0])
            assert rows == list(range(*k_bound[segment : segment + 2])) and queries == q_len[segment]
            at += keys
    assert at == k_len.sum()
    in_order = np.sort(k_len)[::-1]
    assert segments(in_order, in_order).q_order_N is None  # nothing to move


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.integers(0, 99))
def test_segment_max_is_the_maximum_of_each_segment(device: str, lengths: list[int], seed: int) -> None:
    x = torch.randn(sum(lengths), 3, generator=torch.Generator().manual_seed(seed))
    expected = torch.stack([part.amax(dim=0) for part in x.split(lengths)])
    where = Packed(children(np.array(lengths))).to(device)
    assert torch.equal(segment_max(x.to(device), where).cpu(), expected)
    assert torch.equal(segment_max(x.to(device).requires_grad_(), where).detach().cpu(), expected)


def test_segment_max_gradient(device: str) -> None:
    x = torch.randn(12, 3, dtype=torch.float64, device=device, requires_grad=True)
    where = Packed(children(np.array([1, 5, 2, 4]))).to(device)
    assert torch.autograd.gradcheck(lambda t: segment_max(t, where), x)
    many = torch.randn(700, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: segment_max(t, children(np.array([300, 1, 399]))), many)
    tied = torch.ones(4, 1, requires_grad=True)
    segment_max(tied, children(np.array([4]))).sum().backward()
    assert tied.grad.sum() == 1  # one winner among equals, as a maximum along an axis has


def test_plan_lists_every_token_once() -> None:
    sample = make_sample(12)
    batch = collate([sample, sample], GEOMETRY, 50)
    n = GEOMETRY.tokens[0] * len(sample.place)
    assert sorted(batch.whole.row_N.tolist()) == list(range(2 * n))
    assert [c.first for c in batch.whole.chunks][1:] == [c.stop for c in batch.whole.chunks][:-1]
    single = np.zeros((1, np.prod(GEOMETRY.cells)), bool)
    single[0, GEOMETRY.cell_of[3]] = True
    assert plan(GEOMETRY, [np.array([3])], single).cell_M.tolist() == [GEOMETRY.cell_of[3]]


def test_a_packed_batch_is_the_same_in_few_tensors() -> None:
    """Every tensor sent by a loading process takes a file descriptor; a plan alone has hundreds."""
    sample = make_sample(13)
    sample.mask = draw(cell_sizes(GEOMETRY, sample.place), TokenMaskSettings(), 0, 0, "k")
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
    assert batch.whole.samples.levels[0].runs == back.whole.samples.levels[0].runs
