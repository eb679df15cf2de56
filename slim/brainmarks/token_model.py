"""The encoder as a model of Brainmarks: batches of converted scans in, tokens and connectomes out.

Legend: B scans of a batch; S time slots; L places of cells that hold brain of the template; C channels; G groups of
windows that are encoded together; M tokens of these groups; Q principal axes; E pairs of series.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from shards.conversion.session import Converted
from shards.core.errors import ConfigError
from shards.format.session_record import ScanRecord
from slim.data.collate import collate
from slim.data.samples import Sample, read_windows, window_groups
from slim.inference import vectors
from slim.inference.slim_brain import SlimBrain
from slim.model import pooling

_AT_ONCE = 4  # groups of windows that a GPU encodes together; a CPU encodes one
_MOST_PAIRS = 2_000_000  # features of `cov`


@dataclass(frozen=True)
class Tokens:
    """The tokens of a scan.

    Attributes
    ----------
    x_SLC : float32 Tensor
        In time order; 0 in places without brain.
    here_L : bool Tensor
        Places that hold brain of this scan.
    """

    x_SLC: Tensor
    here_L: Tensor


@dataclass(frozen=True)
class _Group:
    """Windows of a scan that are encoded together; `fresh_S` are the slots that no group before has."""

    scan: int
    sample: Sample
    fresh_S: np.ndarray


class TokenModel(nn.Module):
    """Encodes converted scans to equally many tokens each.

    The suite stacks the tokens of a batch, so every scan gets the places of the template and the slots of `windows`
    windows. What a scan lacks is no input of the encoder: it encodes the windows and the brain that are there.
    Afterwards, tokens that do not exist are replaced by means of those that do: in places without brain, by the mean
    over the places of the slot; in slots that a short scan lacks, by the mean over the slots of the place. The mean
    over all tokens, which `main_logistic` takes, is then that of the tokens that exist.

    Parameters
    ----------
    model : SlimBrain
    place_L : int array
        The places of the template, flat in the grid of cells, in ascending order.
    windows : int
        Largest number of windows of a scan.
    components : int
        Principal axes of `cov`; 0 for no `cov`.

    Attributes
    ----------
    axes_CQ : float32 Tensor or None
        Set by `fit`.

    Raises
    ------
    ConfigError
        If `cov` has more axes than there are channels, or too many pairs of places.
    """

    __space__: ClassVar[str] = "mni"
    axes_CQ: Tensor | None

    def __init__(self, model: SlimBrain, place_L: np.ndarray, windows: int, components: int):
        super().__init__()
        _check_components(components, model.encoder.dim, len(place_L))
        self.encoder, self.geometry = model.encoder, model.geometry
        self.settings, self.frames, self.grid = model.settings, model.frames, model.data.grid.grid()
        self.place_L, self.windows, self.components = place_L, windows, components
        self.register_buffer("axes_CQ", None)

    def forward(self, batch: Mapping[str, Any]) -> tuple[Tensor | None, None, Tensor]:
        """Embeddings of a batch of samples from `slim.brainmarks.transform.ScanTransform`.

        Returns
        -------
        cls_embeds : float32 Tensor (B, 1, E), or None before `fit`
            `cov`: the correlations over slots between all pairs of (place, axis), a learned connectome. The
            correlations of places without brain are 0.
        reg_embeds : None
        patch_embeds : float32 Tensor (B, S L, C)
            The tokens, slot by slot.
        """
        records = [ScanRecord.model_validate_json(text) for text in batch["record"]]
        scans = [Converted(meta, data, self.grid) for meta, data in zip(records, batch["scan"], strict=True)]
        found = self.tokens(scans)
        patch_embeds = torch.stack([self._completed(tokens).flatten(0, 1) for tokens in found])
        if self.axes_CQ is None:
            return None, None, patch_embeds
        with torch.autocast(patch_embeds.device.type, enabled=False):
            cov_BE = torch.stack([pooling.cov(tokens.x_SLC, self.axes_CQ) for tokens in found])
        return cov_BE.float()[:, None], None, patch_embeds

    @torch.no_grad()
    def fit(self, scans: Iterable[Converted]) -> None:
        """Fit the axes of `cov` on scans, as `slim.inference.vectors.principal_axes`."""
        scatter_CC = np.zeros((self.encoder.dim, self.encoder.dim))
        for scan in scans:
            (tokens,) = self.tokens([scan])
            scatter_CC += vectors.scatter(tokens.x_SLC[:, tokens.here_L].cpu().numpy())
        axes_CQ = vectors.leading_axes(scatter_CC, self.components)
        self.axes_CQ = torch.from_numpy(axes_CQ.astype(np.float32)).to(next(self.parameters()).device)

    def tokens(self, scans: Sequence[Converted]) -> list[Tokens]:
        """The tokens of scans, those of `SlimBrain.encode_converted`, on the places of the template."""
        groups = [group for number, scan in enumerate(scans) for group in self._groups(number, scan)]
        size = 1 if next(self.parameters()).device.type == "cpu" else _AT_ONCE
        of_scan: list[list[Tensor]] = [[] for _ in scans]
        here_BL = np.zeros((len(scans), len(self.place_L)), bool)
        for at in range(0, len(groups), size):
            part = groups[at : at + size]
            for group, x_SLC in zip(part, self._encoded(part), strict=True):
                fresh_S = torch.from_numpy(group.fresh_S).to(x_SLC.device)
                of_scan[group.scan].append(x_SLC[: len(fresh_S)][fresh_S])
                here_BL[group.scan] = np.isin(self.place_L, self.geometry.cell_of[group.sample.place])
        device = of_scan[0][0].device
        there_BL = torch.from_numpy(here_BL).to(device)
        return [Tokens(torch.cat(parts), here_L) for parts, here_L in zip(of_scan, there_BL, strict=True)]

    def _groups(self, number: int, scan: Converted) -> list[_Group]:
        k = self.settings.windows.k
        start_K = scan.read(scan.meta, ("start",))["start"]
        in_time = np.argsort(start_K, kind="stable")
        fresh = _fresh_slots(self, len(start_K))
        found = []
        for group, fresh_S in zip(window_groups(len(start_K), k), fresh, strict=True):
            sample = read_windows(scan, scan.meta, in_time[group.windows].tolist())
            found.append(_Group(number, sample, fresh_S))
        return found

    def _encoded(self, groups: Sequence[_Group]) -> Tensor:
        """Tokens of groups, (G, S, L, C) with the slots of k windows; 0 where there are none."""
        device = next(self.parameters()).device
        batch = collate([group.sample for group in groups], self.geometry, self.settings.tokens_at_once).to(device)
        x_MC = self.encoder(batch.voxels, batch.whole).float()
        slots, places = self.geometry.cells[0], math.prod(self.geometry.cells[1:])
        column = np.full(places, len(self.place_L))  # outside the table: an error, should a scan exceed the template
        column[self.place_L] = np.arange(len(self.place_L))
        slot_M, place_M = batch.whole.cell_M.long() // places, batch.whole.cell_M.long() % places
        index = batch.whole.sample_M.long(), slot_M, torch.from_numpy(column).to(device)[place_M]
        return x_MC.new_zeros(len(groups), slots, len(self.place_L), x_MC.shape[1]).index_put(index, x_MC)

    def _completed(self, tokens: Tokens) -> Tensor:
        """Tokens in all slots and places, (S, L, C)."""
        x_SLC, here_L = tokens.x_SLC, tokens.here_L
        x_SLC = torch.where(here_L[:, None], x_SLC, x_SLC[:, here_L].mean(dim=1, keepdim=True))
        slots = sum(int(fresh_S.sum()) for fresh_S in _fresh_slots(self, self.windows))
        return torch.cat([x_SLC, x_SLC.mean(dim=0).expand(slots - len(x_SLC), -1, -1)])


def _fresh_slots(model: TokenModel, windows: int) -> list[np.ndarray]:
    """For each group of a scan with this many windows, the slots that no group before it has; bool."""
    k = model.settings.windows.k
    window_S = model.geometry.window_of_slot(model.frames, min(windows, k))
    return [window_S >= group.repeated for group in window_groups(windows, k)]


def _check_components(components: int, channels: int, places: int) -> None:
    where, field = "model_kwargs", "components"
    if components > channels:
        raise ConfigError(where, field, components, f"at most {channels}, the number of channels of the encoder")
    series = places * components
    if (pairs := series * (series - 1) // 2) > _MOST_PAIRS:
        got, hint = f"{components}, with {pairs} pairs of {places} places", "Lower it; 0 is for no cls"
        raise ConfigError(where, field, got, f"at most {_MOST_PAIRS} pairs", hint)
