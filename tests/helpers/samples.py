"""Arrays of a sample."""

from __future__ import annotations

import numpy as np

from shards.format.sample import encode_windows


def sample_arrays(seed: int = 0, k: int = 6, f: int = 5, p: int = 7, v: int = 64) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    windows = rng.standard_normal((k, f, p, v)).astype(np.float32) * 0.02
    spread = windows.std(axis=(0, 1))
    return {
        "baseline": rng.standard_normal((p, v)),
        "spread": spread,
        "patch": np.arange(3 * p).reshape(p, 3),
        "brain": np.ones((p, v)),
        "start": np.arange(k) * f,
        "saliency": -np.sort(-rng.random(k)),
        "scores": rng.random(2 * k),
        "scores_space": rng.random(2 * k),
        "scores_time": rng.random(2 * k),
        "roi": rng.standard_normal((3, 60)),
        "roi_number": np.arange(1, 4),
        "roi_centre": rng.standard_normal((3, 3)),
        "carpet": rng.integers(-127, 128, (8, 60)),
        **encode_windows(windows, spread),
    }
