"""The count of memory and FLOPs, against what allocators, other trackers and steps that are carried out say."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from helpers.commands import run_command
from helpers.counted import MIDDLE, RealStep, prepared, settings
from slim.config import PRESETS, PretrainSettings
from slim.model.ragged_ops import varlen_attn
from slim.planning import counting
from slim.planning.counting import CPU_ATTENTION, Footprint, is_call
from slim.planning.step_cost import count
from slim.planning.zero_memory import Zero

MIB = 2**20


def test_bytes_are_those_of_live_storages() -> None:
    with Footprint() as found:
        a = torch.zeros(1000)  # 4000 bytes in 8 blocks
        view = a[10:]
        with found.called("integers"):
            rows = torch.arange(100)  # 800 bytes, real
        assert found.live == {"states": 4096, "integers": 1024} and found.peak == 5120
        assert a[rows[rows > 49]].shape == (50,)  # real integers choose,
        assert a[a > 0].shape == (1000,) and bool(a[0] > 0)  # fakes choose everything
        del a
        assert found.live["states"] == 4096
        found.rename(view, "kept")
        del view
        assert +found.live == {"integers": 1024} and found.peak > 5120
        found.restart()
        assert found.peak == 1024 and +found.at_peak == {"integers": 1024}


@given(
    st.lists(st.tuples(st.integers(1, 5000), st.booleans(), st.sampled_from([torch.float32, torch.int64])), max_size=20)
)
def test_any_order_of_making_and_dropping_tensors(steps: list[tuple[int, bool, torch.dtype]]) -> None:
    with Footprint() as found:
        kept, sizes, peak = [], [], 0
        for size, drop, dtype in steps:
            if drop and kept:
                del kept[size % len(kept)], sizes[size % len(sizes)]
            kept.append(torch.empty(size, dtype=dtype))
            sizes.append(-(-size * dtype.itemsize // 512) * 512)
            peak = max(peak, sum(sizes))
            assert found.live["states"] == sum(sizes) and found.peak == peak
        kept.clear()
        assert found.live["states"] == 0


@pytest.fixture
def unrounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count bytes as they are asked for, as the allocator of a CPU gives them."""
    monkeypatch.setattr(counting, "BLOCK", 1)


def asked_for(work: Callable[[], object]) -> int:
    """Bytes at the peak of what was asked of torch's CPU allocator, what kernels ask for themselves included."""
    gc.collect()  # or what earlier tests left is freed meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@pytest.mark.parametrize("bf16", [False, True])
def test_memory_is_that_of_a_plain_model_and_of_torchs_own_tracker(unrounded: None, bf16: bool) -> None:
    """The tracker serves where no shape depends on values: not for ragged segments."""

    def build() -> tuple[nn.Module, torch.optim.Optimizer, torch.Tensor]:
        layers = (nn.TransformerEncoderLayer(256, 4, dropout=0.0, batch_first=True, norm_first=True) for _ in range(3))
        model = nn.Sequential(*layers)
        return model, torch.optim.AdamW(model.parameters(), foreach=False), torch.zeros(8, 128, 256)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(x).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    with Footprint() as found:
        made = build()
        step(*made)
        found.restart()
        step(*made)
    with FakeTensorMode():
        made = build()
        tracker = MemTracker()
        tracker.track_external(*made)
        with tracker:
            step(*made)
            tracker.reset_mod_stats()
            step(*made)
    (tracked,) = tracker.get_tracker_snapshot("peak").values()
    assert found.peak == tracked["Total"] > 50 * MIB

    def carry_out() -> None:
        made = build()
        step(*made)
        step(*made)

    assert found.peak == pytest.approx(asked_for(carry_out), abs=64)  # a few scalars


@pytest.mark.parametrize(
    ("stream", "objective", "precision", "within"),
    [
        (None, "jepa", "fp32", 0.005),
        (None, "jepa", "bf16", 0.005),
        # Gradients of a value that is used twice are added in place as long as no mode looks on.
        (4000, "jepa", "fp32", 0.02),
        # Kernels of a CPU copy operands of unlike types; those of a GPU do not.
        (None, "default", "fp32", 0.03),
    ],
)
def test_memory_is_what_a_step_that_is_carried_out_asks_for(
    unrounded: None, stream: int | None, objective: str, precision: str, within: float
) -> None:
    chosen = settings(model=MIDDLE, objective=objective, precision=precision, chunk_tokens=stream)
    geometry, batch = prepared(chosen, 16)
    assert (len(batch.context.chunks) > 1) == (stream is not None)
    found, _ = count(chosen, geometry, batch)

    def carry_out() -> None:
        step = RealStep(chosen, geometry, batch)
        step()
        step()

    assert found.peak > 25 * MIB
    assert found.peak == pytest.approx(asked_for(carry_out), rel=within)


@pytest.mark.parametrize("objective", ["default", "jepa", "mae"])
def test_states_are_parameters_moments_target_and_running_means(objective: str) -> None:
    chosen = settings(objective=objective)
    found, learner = count(chosen, *prepared(chosen))
    own, target = ([p.numel() for p in m.parameters()] for m in (learner.model, learner.target.encoder))
    buffers = [b for m in (learner.model, learner.target.encoder) for b in m.buffers()]
    assert set(learner.means) == {
        "default": {"target_mean", "context_mean"}, "jepa": {"target_mean"}, "mae": set()
    }[objective]  # fmt: skip
    means = [v for mean in learner.means.values() for v in vars(mean).values() if isinstance(v, torch.Tensor)]
    sizes = [*own * 3, *target, *(tensor.numel() for tensor in (*means, *buffers)), *[1] * len(own)]  # Adam's steps
    assert found.at_peak["states"] == sum(-(-4 * size // counting.BLOCK) * counting.BLOCK for size in sizes)
    assert found.live["gradients"] == 0 and found.peak >= found.at_peak["states"] + 4 * sum(own)
    assert sum(found.at_peak.values()) == found.peak > sum(found.live.values())


@pytest.mark.parametrize("stream", [None, 200])
def test_flops_are_those_of_a_step_that_is_carried_out(stream: int | None) -> None:
    chosen = settings(chunk_tokens=stream)
    geometry, batch = prepared(chosen)
    found, _ = count(chosen, geometry, batch)
    step = RealStep(chosen, geometry, batch)
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as flops:
        step()
    assert found.flops.total() == flops.get_total_flops() > 0
    assert {"targets", "encoder", "predictor", "backward"} == set(+found.flops)


class Operations(TorchDispatchMode):
    """Counts the operations of a step that is carried out."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += is_call(func)
        return func(*args, **(kwargs or {}))


def test_calls_are_kernels_and_no_views_or_reads() -> None:
    with Footprint() as found:
        x = torch.empty(4, 6)  # no kernel
        y = x.t()[1:].reshape(4, 5)  # views, and a copy
        y.mul_(2).add_(1)
        with found.called("choice"):
            chosen = y[y > 0]  # a comparison and a gather, which waits for the number of rows
            chosen.sum().item()
    assert found.calls == {"states": 3, "choice": 3} and found.waits == {"states": 0, "choice": 2}


@pytest.mark.parametrize("stream", [None, 200])
def test_calls_are_those_of_a_step_that_is_carried_out(stream: int | None) -> None:
    chosen = settings(chunk_tokens=stream)
    geometry, batch = prepared(chosen)
    found, _ = count(chosen, geometry, batch)
    step = RealStep(chosen, geometry, batch)
    step()  # moments exist, and the variance is known
    with Operations() as operations:
        step(check=False)
    assert found.calls.total() == pytest.approx(operations.calls, rel=0.01)
    assert {"targets", "encoder", "predictor", "backward", "optimizer", "means"} == set(+found.calls)


def test_attention_of_a_gpu_is_one_call_without_padding() -> None:
    chosen = settings(precision="bf16")
    geometry, batch = prepared(chosen)
    padded, on_gpu = (count(chosen, geometry, batch, on_gpu=gpu)[0] for gpu in (False, True))
    assert on_gpu.calls["encoder"] < padded.calls["encoder"] and on_gpu.calls["optimizer"] == padded.calls["optimizer"]
    assert on_gpu.flops == padded.flops  # in this box of a brain, nothing has to be padded

    heads, width, pairs = 2, 8, 3 * 3 + 4 * 4
    bounds = torch.tensor([0, 3, 7], dtype=torch.int32)
    with Footprint() as found:
        q = torch.zeros(7, heads, width, requires_grad=True)
        found.restart()
        out = varlen_attn(q, q, q, bounds, bounds, 4, 4)
        assert found.calls.total() == 1 and found.flops.total() == 4 * pairs * heads * width
        with found.called("backward"):
            out.sum().backward()
    assert found.flops["backward"] == 10 * pairs * heads * width


@pytest.mark.parametrize(("chunk_tokens", "objective", "batch"), [(1500, "default", 1), (700, "jepa", 2)])
def test_merged_chunks_count_as_all_of_them(chunk_tokens: int, objective: str, batch: int) -> None:
    run = {"out": "x", "batch": batch}
    chosen = settings(model=MIDDLE, precision="bf16", objective=objective, chunk_tokens=chunk_tokens, run=run)
    geometry, prepared_batch = prepared(chosen, 12)
    assert len(prepared_batch.whole.chunks) > 6
    every, merged = (count(chosen, geometry, prepared_batch, Zero, on_gpu=True, merged=m)[0] for m in (False, True))
    assert merged.peak == every.peak and merged.at_peak == every.at_peak
    assert (merged.flops, merged.calls, merged.waits) == (every.flops, every.calls, every.waits)


def test_attention_of_a_gpu_in_fp32_is_padded() -> None:
    chosen = settings(precision="fp32")
    geometry, batch = prepared(chosen)
    padded, on_gpu = (count(chosen, geometry, batch, on_gpu=gpu)[0] for gpu in (False, True))
    assert on_gpu.calls == padded.calls and on_gpu.peak == padded.peak


def test_streaming_saves_memory_and_costs_flops() -> None:
    whole, streamed = (count(chosen, *prepared(chosen))[0] for chosen in (settings(), settings(chunk_tokens=200)))
    assert streamed.peak < whole.peak and streamed.flops.total() > whole.flops.total()


def resident(field: str) -> int:
    """Bytes of this process, from /proc/self/status."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def resident_peak(settings: PretrainSettings, patches: int) -> tuple[int, int]:
    """How much more this process holds at the peak of a second step than before it made model and batch; the count."""
    geometry, batch = prepared(settings, patches)
    gc.collect()
    before = resident("VmRSS")
    step = RealStep(settings, geometry, batch)
    step()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the highest resident size counts from here
    step()
    return resident("VmHWM") - before, count(settings, geometry, batch)[0].peak


def measure_resident() -> None:
    """Print both numbers for a step of some 400 MB."""
    resident_peak(settings(model=MIDDLE, objective="jepa"), 8)  # loads what is loaded on first use
    chosen = settings(model=MIDDLE, objective="jepa", windows={"k": 8}, run={"out": "x", "batch": 2})
    print(*resident_peak(chosen, 16))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_what_a_process_holds() -> None:
    """Where every larger block goes back to the system at once, so that no holes are left between them."""
    keep_nothing = {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "0",
        "PYTHONPATH": ".:tests:tests/slim/planning",
    }
    done = run_command("-c", "import test_footprint; test_footprint.measure_resident()", **keep_nothing)
    assert done.returncode == 0, done.stderr
    held, counted = map(int, done.stdout.split())
    assert counted > 300 * MIB
    assert counted == pytest.approx(held, rel=0.1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("stream", [None, 16384])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_memory_is_what_a_gpu_holds(precision: str, stream: int | None) -> None:
    chosen = settings(
        model=PRESETS["lean"], precision=precision, chunk_tokens=stream, windows={"k": 8}, run={"out": "x", "batch": 2}
    )
    geometry, batch = prepared(chosen, 16)
    found, _ = count(chosen, geometry, batch)
    # Workspaces of cuBLAS, of this thread and of the one that walks backward, are made once and stay.
    with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
        nn.Linear(64, 64, device="cuda")(torch.ones(64, 64, device="cuda")).sum().backward()
    gc.collect()
    before = torch.cuda.memory_allocated()
    step = RealStep(chosen, geometry, batch, "cuda")
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    assert found.peak > 500 * MIB
    assert found.peak == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.1)
