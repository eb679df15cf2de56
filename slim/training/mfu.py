"""The share of a GPU's arithmetic that a run uses: model FLOPs utilisation (Chowdhery et al., arXiv 2204.02311)."""

from __future__ import annotations

# Dense bf16 TFLOP/s by name of the device, from NVIDIA's data sheets; the first that fits.
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
    """FLOP/s that a GPU of this name can do; None where it is not known, as for fp32 (TF32 may be on or off)."""
    if precision != "bf16":
        return None
    words = {*device.replace("-", " ").split()}
    return next((1e12 * peak for name, peak in _PEAK if words.issuperset(name.split())), None)
