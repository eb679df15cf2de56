"""Sessions into features: groups of k windows through the encoder, and their tokens in the order of time.

Legend: G groups, K kept windows, S slots, L places, M cells, C channels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from shards.conversion.session import assumptions
from shards.format.reader import Samples, ScanT
from shards.format.session_record import ScanRecord
from slim.config import TrainSettings
from slim.data.collate import collate
from slim.data.samples import Sample, read_windows, window_groups, with_background
from slim.inference.cores import spread
from slim.inference.vectors import Features
from slim.model.geometry import Geometry
from slim.model.hiera import Hiera


@dataclass(frozen=True)
class SessionEncoder:
    """Encodes the kept windows of a session.

    Attributes
    ----------
    encoder : Hiera
    geometry : Geometry
    settings : TrainSettings
        `windows.k` and `chunk_tokens` are used.
    frames : int
        Frames of a window.
    device : torch.device
        Where the encoder is.
    keep_background : bool
        Whether patches without brain are encoded, too.
    """

    encoder: Hiera
    geometry: Geometry
    settings: TrainSettings
    frames: int
    device: torch.device
    keep_background: bool = False

    def features(self, samples: Samples[ScanT], session: ScanT, stage: int | None, batch: int) -> Features:
        """Features of all kept windows of a session; see `SlimBrain.encode_session`."""
        start_K = samples.read(session, ("start",))["start"]
        in_time = np.argsort(start_K, kind="stable")
        group_G = window_groups(session.n_kept, self.settings.windows.k)
        groups = [read_windows(samples, session, in_time[group.windows].tolist()) for group in group_G]
        if self.keep_background:
            groups = [with_background(sample, self.geometry) for sample in groups]
        size = 1 if self.device.type == "cpu" else batch
        parts = [groups[at : at + size] for at in range(0, len(groups), size)]
        passed = spread(lambda part: self._pass(part, stage), parts, batch // size)
        place_L = passed[0][1]
        # All groups have equally many windows: k, or those of the only group.
        window_S = self.geometry.window_of_slot(self.frames, len(in_time[group_G[0].windows]))
        tokens, seconds, starts = [], [], []
        for sample, x_SLC, group in zip(groups, (x for x_GSLC, _ in passed for x in x_GSLC), group_G, strict=True):
            fresh_S = window_S >= group.repeated
            tokens.append(x_SLC[fresh_S])
            bounds = range(self.geometry.cell[0], len(sample.second), self.geometry.cell[0])
            seconds.append(np.array([part.mean() for part in np.split(sample.second, bounds)])[fresh_S])
            starts.append(start_K[in_time[group.windows][window_S]][fresh_S] * float(session.tr))
        return Features(
            session.key,
            np.concatenate(tokens),
            place_L,
            np.concatenate(seconds),
            np.concatenate(starts),
            float(session.tr),
            float(session.source_tr),
            tuple(assumed(session, self.settings.windows.k)),
        )

    @torch.inference_mode()
    def _pass(self, groups: list[Sample], stage: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Encode groups of windows; returns the tokens, (G, S, L, C), and the places, (L,)."""
        places = math.prod(self.geometry.cells[1:])
        together = collate(groups, self.geometry, self.settings.tokens_at_once).to(self.device)
        encoded_MC = self.encoder.stage(together.voxels, together.whole, stage or len(self.encoder.ends))
        x_MC = encoded_MC.float().cpu().numpy()
        cell_M, sample_M = together.whole.cell_M.cpu().numpy(), together.whole.sample_M.cpu().numpy()
        # Every frame of a session has the same brain patches, so every slot has the same places.
        by = np.lexsort((cell_M, sample_M))
        x_GSLC = x_MC[by].reshape(len(groups), together.whole.slots_B[0], -1, x_MC.shape[1])
        return x_GSLC, cell_M[by][: x_GSLC.shape[2]] % places


def assumed(scan: ScanRecord, k: int) -> list[str]:
    """What was assumed about a scan, and whether it has fewer windows than the k of a sample.

    Voxels without signal at the edge of the mask are not named, because most scans have them.
    """
    found = assumptions(scan.model_copy(update={"dead_share": 0}))
    if scan.n_kept < k:
        windows = "1 window" if scan.n_kept == 1 else f"{scan.n_kept} windows"
        found.append(f"{windows}, fewer than the {k} of a sample in pretraining")
    return found
