"""The share of a GPU's arithmetic: its peak by name, FLOPs by token."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.utils.flop_counter import FlopCounterMode

from helpers.counted import RealStep
from shards.core.settings import check
from shards.format.reader import Dataset
from shards.format.stream import Item
from slim.config import PRESETS, PretrainSettings
from slim.data.collate import load_batch
from slim.data.samples import geometry_for
from slim.planning.counting import CPU_ATTENTION
from slim.planning.forecast import flops_per_token
from slim.training.mfu import peak_flops


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA RTX A4000", None),  # not an A40
        ("Tesla V100-SXM2-32GB", None),
    ],
)
def test_the_peak_of_a_gpu_by_its_name(device: str, peak: float | None) -> None:
    assert peak_flops(device, "bf16") == peak
    assert peak_flops(device, "fp32") is None


def test_flops_are_those_of_a_step_on_the_data(dataset: Path) -> None:
    """Counted once for a sample, they tell those of a step that is carried out on two other sessions."""
    run = {"out": "x", "batch": 2}
    settings = check(
        PretrainSettings, {"data": "x", "model": PRESETS["tiny"].model_dump(), "view": "voxel", "run": run}, "test"
    )
    data = Dataset(dataset)
    geometry = geometry_for(settings, [data])
    items = [Item(0, session, 0) for session in data.of_split("train")[1:3]]
    batch = load_batch(items, [data], geometry, settings).to("cpu")
    step = RealStep(settings, geometry, batch)
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as flops:
        step()
    expected = flops.get_total_flops() / int(batch.whole.tokens_B.sum())
    assert flops_per_token(settings, data) == pytest.approx(expected, rel=0.15)
