"""The temporal extractor of stage 1: a masked autoencoder over parcels x time.

The scan is reduced to a matrix of parcels x time, and a small transformer learns to reconstruct hidden parts of it
(SLIM-Brain, arXiv 2512.21881, stage 1; masking and loss of SimMIM, arXiv 2111.09886: mask tokens enter the encoder, L1
on the masked part, linear head). From the reconstruction of a hidden window, `slim.ranking.saliency` computes how
predictable that window is in time. The network is in `slim.ranking.autoencoder`.

    extractor = train_extractor([(roi_RT, centre_R3), ...])
    extractor.save("extractor/")
    rebuilt_RT = Extractor.load("extractor/").rebuild(z_RT, centre_R3)

Shape suffixes: R parcels; T frames; V views (plain, global signal regressed out);
W windows; G groups of neighbouring parcels; S slots of a group; B samples; C channels; P position features;
3 axes.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from shards.core.errors import ConfigError, RunRefused
from shards.core.files import write_atomically
from shards.core.settings import check, digest
from slim.ranking.autoencoder import ExtractorConfig, Layout, MaskedAutoencoder

PASSES = 4  # each pass hides every 4th window
MARGIN = PASSES - 1  # further windows at each end of a chunk, up to the next hidden one
WEIGHTS_FILE, CONFIG_FILE = "extractor.safetensors", "config.json"


def standardise(roi_RT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two standardised views of the parcel means of a scan.

    View 0 is z-scored per parcel over the scan. In view 1, the mean parcel signal of view 0 is regressed out of each
    parcel, and the result is z-scored again; a parcel without remaining variance is 0.

    Parameters
    ----------
    roi_RT : float array
        Raw parcel means in any unit.

    Returns
    -------
    z_VRT : float32 array (2, kept parcels, T)
    kept_R : bool array
        False for constant parcels, which are left out.

    Raises
    ------
    RunRefused
        If the matrix does not have two dimensions, holds NaN or infinity, or has fewer than two parcels that vary.
    """
    roi_RT = np.asarray(roi_RT, dtype=np.float64)
    if roi_RT.ndim != 2:
        raise RunRefused("parcel time series", "shape", roi_RT.shape, "parcels x frames")
    broken_R = ~np.isfinite(roi_RT).all(axis=1)
    if broken_R.any():
        got = f"NaN or infinity in {broken_R.sum()} of {len(roi_RT)} parcels (first: {broken_R.argmax()})"
        raise RunRefused("parcel time series", "values", got, "finite numbers", "Check the scan and its mask")
    # The threshold is relative to the size of the parcel's values: float32 means of a constant differ in the last bit,
    # and the unit must not matter.
    floor_R = 1e-6 * np.abs(roi_RT).max(axis=1, initial=0.0)
    centred_RT = roi_RT - roi_RT.mean(axis=1, keepdims=True)
    kept_R = np.abs(centred_RT).max(axis=1, initial=0.0) > floor_R
    if kept_R.sum() < 2:
        got = f"{kept_R.sum()} of {len(roi_RT)} parcels vary"
        raise RunRefused("parcel time series", "parcels", got, "at least 2 that vary", "Check the brain mask")
    plain_RT = centred_RT[kept_R]
    # Divide by the peak first: squares of very small or very large values exceed the range of floats.
    plain_RT /= np.abs(plain_RT).max(axis=1, keepdims=True)
    plain_RT /= plain_RT.std(axis=1, keepdims=True)
    global_T = plain_RT.mean(axis=0)
    power = float(global_T @ global_T)
    slope_R = plain_RT @ global_T / power if power > 1e-12 * global_T.size else np.zeros(len(plain_RT))
    local_RT = plain_RT - slope_R[:, None] * global_T
    spread_R1 = local_RT.std(axis=1, keepdims=True)
    local_RT = np.where(spread_R1 > 1e-6, local_RT / np.maximum(spread_R1, 1e-6), 0.0)
    return np.stack([plain_RT, local_RT]).astype(np.float32), kept_R


class Extractor:
    """The masked autoencoder with its configuration. A new instance is untrained; see `train_extractor` and `load`."""

    def __init__(self, config: ExtractorConfig):
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = MaskedAutoencoder(config)
        self.model.eval()

    @property
    def parameters(self) -> int:
        """Number of trainable parameters."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def checksum(self) -> str:
        """SHA-256 (hex) of the configuration and every weight."""
        sha = hashlib.sha256(digest(self.config.model_dump()).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            sha.update(tensor.contiguous().numpy().tobytes())
        return sha.hexdigest()

    @torch.no_grad()
    def rebuild(self, z_RT: np.ndarray, centre_R3: np.ndarray) -> np.ndarray:
        """Reconstruct every window from the others, in 4 passes that each hide every 4th window.

        Parameters
        ----------
        z_RT : float array
            Standardised parcel series; T must be a multiple of the window length.
        centre_R3 : float array
            Parcel centres in mm.

        Returns
        -------
        rebuilt_RT : float32 array
            In the units of `z_RT`. Long scans are processed in overlapping chunks, so the cost is linear in T.

        Raises
        ------
        ConfigError
            If T is not a multiple of the extractor's window length, or the number of centres and parcels differ.
        """
        frames, crop = self.config.frames, self.config.crop
        if z_RT.shape[1] % frames or z_RT.shape[1] == 0:
            raise ConfigError("extractor", "frames", z_RT.shape[1], f"a multiple of {frames}")
        if np.shape(centre_R3) != (len(z_RT), 3):
            raise ConfigError("extractor", "centres", np.shape(centre_R3), (len(z_RT), 3))
        # The network is not an odd function. A scan and its negative are therefore given the same sign here, so that
        # scores do not depend on the sign.
        sign = -1.0 if np.sum(np.asarray(z_RT, dtype=np.float64) ** 3) < 0 else 1.0
        layout = Layout(centre_R3, self.config.group)
        x_WGC = layout.tokens(torch.as_tensor(sign * z_RT, dtype=torch.float32), frames)
        windows, groups = x_WGC.shape[:2]
        length = min(crop, windows)
        starts = [*range(0, windows - length, crop - 2 * MARGIN), windows - length]
        jobs = [(start, turn) for start in starts for turn in range(PASSES)]
        rebuilt_WGC = torch.zeros_like(x_WGC)
        at_once = max(1, 2048 // (length * groups))  # limits tokens to the size of the processor's cache
        for first in range(0, len(jobs), at_once):
            batch = jobs[first : first + at_once]
            x_BWGC = torch.stack([x_WGC[start : start + length] for start, _ in batch])
            index_BW = torch.tensor([start for start, _ in batch])[:, None] + torch.arange(length)
            hidden_BW = index_BW % PASSES == torch.tensor([turn for _, turn in batch])[:, None]
            hidden_BWG = hidden_BW[..., None].expand(-1, -1, groups)
            place_BGP = layout.place_GP.expand(len(batch), -1, -1)
            y_BWGC = self.model(x_BWGC, hidden_BWG, place_BGP, None)
            for (start, _), y_WGC, hidden_W, index_W in zip(batch, y_BWGC, hidden_BW, index_BW, strict=True):
                # Chunks are in time order, and each overwrites the margin of the chunk before.
                kept_W = hidden_W & (index_W >= (start + MARGIN if start else 0))
                rebuilt_WGC[index_W[kept_W]] = y_WGC[kept_W]
        return sign * layout.series(rebuilt_WGC, frames).numpy()

    def save(self, folder: str | Path) -> None:
        """Write `extractor.safetensors` and `config.json`, each atomically (temporary name, fsync, rename).

        `config.json` is written last and holds the checksum, so `load` recognises an incomplete pair.
        """
        folder = Path(folder)
        weights = {name: tensor.contiguous() for name, tensor in self.model.state_dict().items()}
        config = {**self.config.model_dump(), "checksum": self.checksum}
        write_atomically(folder / WEIGHTS_FILE, save_tensors(weights))
        write_atomically(folder / CONFIG_FILE, json.dumps(config, indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Extractor:
        """Load an extractor written by `save`.

        Raises
        ------
        ConfigError
            If a file is missing or unreadable, or the two files do not belong together.
        """
        folder = Path(folder)
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / name).is_file():
                hint = "Give a folder written by Extractor.save, or no extractor to train a new one"
                raise ConfigError(folder / name, "", "no such file", "a trained extractor", hint)
        try:
            stored = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
            checksum = stored.pop("checksum")
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            got = f"unreadable ({error!r})"
            raise ConfigError(folder / CONFIG_FILE, "", got, "the config of an extractor") from None
        config = check(ExtractorConfig, stored, folder / CONFIG_FILE)
        size, needed = (folder / WEIGHTS_FILE).stat().st_size, 4 * config.fewest_parameters
        if size < needed:  # check before memory for these sizes is allocated
            expected = f"the weights that {CONFIG_FILE} describes, at least {needed} bytes"
            raise ConfigError(folder / WEIGHTS_FILE, "", f"{size} bytes", expected)
        if config.width % config.heads:
            raise ConfigError(folder / CONFIG_FILE, "heads", config.heads, f"a divisor of width, {config.width}")
        try:
            extractor = cls(config)
            extractor.model.load_state_dict(load_tensors((folder / WEIGHTS_FILE).read_bytes()))
        except (SafetensorError, RuntimeError, ValueError) as error:
            got = str(error).splitlines()[0]
            expected = f"the weights that {CONFIG_FILE} describes"
            raise ConfigError(folder / WEIGHTS_FILE, "", got, expected) from None
        if extractor.checksum != checksum:
            got, hint = extractor.checksum[:12], "Train or copy the extractor again"
            raise ConfigError(folder, "checksum", got, str(checksum)[:12], hint)
        return extractor
