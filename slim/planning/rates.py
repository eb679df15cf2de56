"""Estimate the samples per second of a run: by arithmetic, by launches and by loading. The smallest of them binds.

- Arithmetic: FLOPs of a step, at the peak of the GPUs. Real kernels reach a part of it.
- Launches: calls of a step, of which the process tells the GPU one by one.
- Loading: CPU time for a sample, divided among the loading processes.
"""

from __future__ import annotations

from dataclasses import dataclass

from slim.config import RunSettings
from slim.planning.step_cost import Cost

CALL_US = 7.5  # microseconds of a call: eager PyTorch takes 5 to 10
LOAD_MS = 45.0  # CPU milliseconds to read, decompress and lay out a sample of `published` on one core


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Samples per second of all processes together.

    Attributes
    ----------
    arithmetic, launches, loading : float
        Samples per second, if nothing else took time.
    peak_tflops, call_us, load_ms : float
        TFLOP/s of a GPU, microseconds of a call, CPU milliseconds of loading a sample.
    binds : str
        The name of the smallest rate.
    """

    arithmetic: float
    launches: float
    loading: float
    peak_tflops: float
    call_us: float
    load_ms: float
    binds: str

    @property
    def samples_per_s(self) -> float:
        """The smallest rate, which is an upper bound of what a run reaches."""
        return min(self.arithmetic, self.launches, self.loading)


def rates_of(
    run: RunSettings, step: Cost, peak_tflops: float, call_us: float = CALL_US, load_ms: float = LOAD_MS
) -> Rates:
    """The rates of a run with steps of this cost.

    Parameters
    ----------
    run : RunSettings
        Its samples per step, processes and loading processes; without loading processes, each process loads itself.
    step : Cost
        Of one process.
    peak_tflops, call_us, load_ms : float
        As in `Rates`.
    """
    samples = run.batch * run.accumulate * run.processes
    rates = {
        "arithmetic": samples * peak_tflops * 1e12 / step.step_flops,
        "launches": samples * 1e6 / (step.step_calls * call_us),
        "loading": max(1, run.workers) * run.processes * 1000 / load_ms,
    }
    return Rates(
        **rates, peak_tflops=peak_tflops, call_us=call_us, load_ms=load_ms, binds=min(rates, key=rates.__getitem__)
    )
