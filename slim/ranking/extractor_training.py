"""Training of the temporal extractor on crops of parcel series.

Legend: R parcels; T frames.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from shards.core.errors import ConfigError, RunRefused
from slim.ranking.autoencoder import CLAMP, PLACE_FEATURES, ExtractorConfig, Layout
from slim.ranking.extractor import Extractor, standardise

LEARNING_RATE, WEIGHT_DECAY, WARM_UP, BATCH = 4e-3, 0.05, 30, 6
MOST_RUNS = 256  # limits memory for large cohorts; rankings from 12 and from 48 training scans already agree


class _Crops:
    """Draws padded batches of random crops of the training scans, with random masks."""

    def __init__(self, runs: Sequence[tuple[np.ndarray, np.ndarray]], config: ExtractorConfig):
        self.config = config
        self.rng = np.random.default_rng(config.seed)
        chosen = np.arange(len(runs))
        if len(runs) > MOST_RUNS:
            chosen = np.sort(self.rng.choice(len(runs), MOST_RUNS, replace=False))
        self.runs = []
        for index in chosen.tolist():
            roi_RT, centre_R3 = runs[index]
            usable = np.shape(roi_RT)[1] // config.frames * config.frames
            try:
                z_VRT, kept_R = standardise(np.asarray(roi_RT)[:, :usable])
            except RunRefused:  # reported when this scan is ranked; training uses the others
                continue
            if usable >= 2 * config.frames:
                layout = Layout(np.asarray(centre_R3)[kept_R], config.group)
                self.runs.append((torch.from_numpy(z_VRT), layout))
        if not self.runs:
            expected = f"scans of at least {2 * config.frames} frames with 2 parcels that vary"
            raise ConfigError("extractor", "training scans", f"{len(chosen)} that cannot be used", expected)

    def draw(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Draw a batch: x_BWGC, hidden_BWG, place_BGP, real_BG, and counted_BWGC, the hidden values in the loss."""
        rng, frames = self.rng, self.config.frames
        picked = [self.runs[i] for i in rng.integers(len(self.runs), size=BATCH)]
        windows = min(self.config.crop, *(z_VRT.shape[2] // frames for z_VRT, _ in picked))
        groups = max(len(layout.slot_GS) for _, layout in picked)
        x_BWGC = torch.zeros(BATCH, windows, groups, self.config.group * frames)
        place_BGP = torch.zeros(BATCH, groups, PLACE_FEATURES)
        real_BG = torch.zeros(BATCH, groups, dtype=torch.bool)
        filled_BGC = torch.zeros(BATCH, groups, self.config.group * frames, dtype=torch.bool)
        for b, (z_VRT, layout) in enumerate(picked):
            start = int(rng.integers(z_VRT.shape[2] - windows * frames + 1))
            crop_RT = z_VRT[int(rng.integers(2)), :, start : start + windows * frames]
            if rng.integers(2):
                crop_RT = crop_RT.flip(1)
            sign = 1.0 - 2.0 * float(rng.integers(2))
            own = len(layout.slot_GS)
            x_BWGC[b, :, :own] = sign * layout.tokens(crop_RT, frames)
            place_BGP[b, :own] = layout.place_GP
            real_BG[b, :own] = True
            filled_BGC[b, :own] = layout.filled_GS.repeat_interleave(frames, dim=1)
        whole_BW1 = rng.random((BATCH, windows, 1)) < rng.uniform(0.0, 0.6, (BATCH, 1, 1))
        token_BWG = rng.random((BATCH, windows, groups)) < rng.uniform(0.2, 0.8, (BATCH, windows, 1))
        hidden_BWG = torch.from_numpy(whole_BW1 | token_BWG)
        return x_BWGC, hidden_BWG, place_BGP, real_BG, hidden_BWG[..., None] & filled_BGC[:, None]


def train_extractor(
    runs: Sequence[tuple[np.ndarray, np.ndarray]],
    frames: int = 5,
    steps: int = 1200,
    seed: int = 0,
    advance: Callable[[int, str], object] | None = None,
) -> Extractor:
    """Train the masked autoencoder on random crops of scans.

    Parameters
    ----------
    runs : sequence of (roi_RT, centre_R3)
        Raw parcel means (in any unit) and parcel centres in mm of each scan. Lengths and numbers of parcels may differ.
        Of more than 256 scans, 256 are drawn with the seed, and only these are read. Scans that cannot be ranked (fewer
        than two windows, NaN, fewer than two parcels that vary) are left out.
    frames : int
        Number of frames of a window.
    steps : int
        Number of optimizer steps.
    seed : int
        Seed of weights, crops and masks. The same scans in the same order give the same extractor.
    advance : callable, optional
        Called as ``advance(1, note)`` after each step.

    Raises
    ------
    ConfigError
        If no scan can be used, or `frames` or `steps` is below 1.
    """
    if len(runs) == 0 or frames < 1 or steps < 1:
        got = f"{len(runs)} scans, {frames} frames, {steps} steps"
        raise ConfigError("extractor", "training", got, "at least one of each")
    config = ExtractorConfig(frames=frames, steps=steps, seed=seed, runs=len(runs))
    crops = _Crops(runs, config)
    extractor = Extractor(config)
    model = extractor.model.train()
    matrices = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    decayed = {id(weight) for weight in matrices}
    others = [p for p in model.parameters() if id(p) not in decayed]
    parameters = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)
    for step in range(steps):
        progress = (step + 1 - WARM_UP) / max(1, steps - WARM_UP)
        factor = (step + 1) / WARM_UP if progress < 0 else 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * factor
        x_BWGC, hidden_BWG, place_BGP, real_BG, counted_BWGC = crops.draw()
        y_BWGC = model(x_BWGC, hidden_BWG, place_BGP, None if real_BG.all() else real_BG)
        error_BWGC = (y_BWGC - x_BWGC.clamp(-CLAMP, CLAMP)).abs()
        loss = (error_BWGC * counted_BWGC).sum() / counted_BWGC.sum().clamp(min=1)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if advance is not None:
            advance(1, f"masked L1 {loss.item():.3f}")
    model.eval()
    return extractor
