"""Model FLOPs utilisation: the share of a GPU's peak FLOP/s that a run uses (Chowdhery et al., arXiv 2204.02311)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from slim.config import TrainSettings
from slim.training.metrics import MetricsLine, number

# Dense bf16 TFLOP/s by name of the device, from NVIDIA's data sheets. The first name that fits is used.
_PEAK = (
    ("H100 PCIe", 756),
    ("H100 NVL", 835),
    ("H100", 989),
    ("H200", 989),
    ("GH200", 989),
    ("B200", 2250),
    ("A100", 312),
    ("A30", 165),
    ("A40", 150),
    ("A10", 125),
    ("L40S", 362),
    ("L40", 181),
    ("L4", 121),
    ("RTX A6000", 155),
    ("RTX 4090", 165),
)


def peak_flops(device: str, precision: str) -> float | None:
    """Peak FLOP/s of a GPU, from its name; None if unknown, and for fp32, because TF32 may be on or off."""
    if precision != "bf16":
        return None
    words = {*device.replace("-", " ").split()}
    return next((1e12 * peak for name, peak in _PEAK if words.issuperset(name.split())), None)


def utilisation_of(
    settings: TrainSettings, device: torch.device, flops_per_token: Callable[[], float] | None
) -> Callable[[MetricsLine], float] | None:
    """A function that computes model FLOPs utilisation from a line of metrics.jsonl; None if the peak is unknown.

    Parameters
    ----------
    flops_per_token : callable, optional
        Returns the FLOPs of a step per token of brain. It is called only if the peak of the GPU is known.
    """
    if device.type != "cuda" or flops_per_token is None:
        return None
    peak = peak_flops(torch.cuda.get_device_name(device), settings.precision)
    if peak is None:
        return None
    seconds_per_token = flops_per_token() / peak
    samples = settings.run.batch * settings.run.accumulate  # of one process
    return lambda line: seconds_per_token * number(line, "tokens_brain") * samples / number(line, "seconds")
