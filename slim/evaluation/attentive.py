"""Attentive pooling: learned queries attend to all tokens of a session, followed by the linear probe.

    Attentive(features).predict(fold)

A query is the same for all sessions, so query and key projection only act through their product, one vector of C
channels per head. Likewise, the value projection and the following linear model are one linear map. Training therefore
learns one vector for each of A heads. Each head computes a weighted mean of the tokens, and the A means are the
features of the session.

Queries are initialised with zeros, where all weights are equal and attentive pooling is mean pooling. They are trained
together with a linear model (cross-entropy with equal weight for all classes, or squared error), which is then
discarded: the features go to the same linear probe as those of other poolings. The number of training steps, which may
be zero, is selected together with the penalty of the probe, by cross-validation inside the training subjects. In it,
queries are always tested on sessions on which they were not trained.

The encoder is frozen, and its tokens stay in memory as `Features`: 11 MB per session at the published sizes with 32
windows (40 slots, about 136 places, 512 channels). Batches of sessions are copied to the device.

Legend: N sessions (n of training, B of a batch); T tokens of a session (slots x places); C channels; A queries;
M members (models trained side by side); H = M A; P = A C features; K classes or 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from slim.evaluation.linear import PENALTIES, fit_predict, held_out_losses
from slim.evaluation.splits import Fold
from slim.inference.slim_brain import Features
from slim.inference.vectors import at_places, common_places
from slim.model import pooling

QUERIES = 4
STEPS = (0, 5, 10, 20, 40)  # numbers of steps after which training may end
_RATE = 0.03
_BATCH = 64  # sessions per step


class Members(nn.Module):
    """The queries of M members, with the linear models they are trained with.

    All members use the same batches, so the tokens are read only once, but different sessions of them. The gradients of
    members are independent.

    Parameters
    ----------
    scale_MC : Tensor
        1 / SD of each channel, over the tokens that a member uses.
    outputs : int
        K.
    generator : torch.Generator
        CPU generator for the linear models; all members have the same initial values.
    """

    def __init__(self, scale_MC: Tensor, outputs: int, generator: torch.Generator):
        super().__init__()
        members, channels = scale_MC.shape
        features = QUERIES * channels
        head_PK = torch.randn(features, outputs, generator=generator) / features**0.5
        self.scale_MC: Tensor
        self.register_buffer("scale_MC", scale_MC)
        self.standard_MAC = nn.Parameter(torch.zeros(members, QUERIES, channels))
        self.head_MPK = nn.Parameter(head_PK.repeat(members, 1, 1))
        self.bias_MK = nn.Parameter(torch.zeros(members, outputs))

    def query(self) -> Tensor:
        """Queries (M, A, C) for tokens before standardisation: queries of standardised tokens, divided by the SD.

        The mean of a channel adds the same value to the scores of all tokens, which softmax removes.
        """
        return self.standard_MAC * self.scale_MC[:, None]

    def forward(self, token_BTC: Tensor, valid_BT: Tensor, seen_BM: Tensor) -> Tensor:
        """Logits or values (B, M, K), from features z-scored over the sessions of the batch that a member uses."""
        x_BMP = (pooling.attentive(self.query(), token_BTC, valid_BT) * self.scale_MC[:, None]).flatten(2)
        share_BM1 = (seen_BM / seen_BM.sum(dim=0).clamp(min=1))[:, :, None]
        x_BMP = x_BMP - (x_BMP * share_BM1).sum(dim=0)
        x_BMP = x_BMP * ((x_BMP**2 * share_BM1).sum(dim=0) + 1e-8).rsqrt()
        return torch.einsum("bmp,mpk->bmk", x_BMP, self.head_MPK) + self.bias_MK


class Attentive:
    """The attentive probe of one encoder; a `Method` of `slim.evaluation.probe`.

    Parameters
    ----------
    features : sequence of Features
        Features of all sessions of the task, with any number of slots. Only places that all sessions have are used.
    device : torch.device or str
        Device for the training of queries. On the CPU, the same seed gives bit-identical results, and equal results up
        to rounding with another number of threads.
    """

    def __init__(self, features: Sequence[Features], device: torch.device | str = "cpu"):
        self.features, self.device = features, device
        self.places = common_places(features)
        moments = [self._moments(item) for item in features]
        self.mean_NC, self.variance_NC = (np.stack(part) for part in zip(*moments, strict=True))
        self._last: tuple[np.ndarray, tuple[Tensor, Tensor]] | None = None  # rows of a batch, and its tokens

    def predict(self, fold: Fold) -> np.ndarray:
        """Probabilities (m, K) or values (m, 1) of the test sessions."""
        query_1AC, penalty, train_nP = self.choose(fold)
        return fit_predict(fold, penalty, train_nP, self.pool(query_1AC, fold.test)[:, 0])

    def choose(self, fold: Fold) -> tuple[Tensor, float, np.ndarray]:
        """The queries (1, A, C), the penalty, and the features of the training sessions, (n, P)."""
        inner_n = fold.inner()
        found = []
        for query_MAC in self.fit(fold, inner_n):
            *inner, whole_nP = self.pool(query_MAC, fold.train).swapaxes(0, 1)
            loss_L = held_out_losses(fold, inner, inner_n)
            found.append((loss_L.min(), PENALTIES[int(loss_L.argmin())], query_MAC[-1:], whole_nP))
        _, penalty, query_1AC, train_nP = min(found, key=lambda choice: choice[0])
        return query_1AC, penalty, train_nP

    def fit(self, fold: Fold, inner_n: np.ndarray) -> list[Tensor]:
        """Queries (M, A, C) after each of `STEPS`. Member f is trained without inner fold f, the last member with all.

        Parameters
        ----------
        fold : Fold
            Its test sessions are not used.
        inner_n : int array
            Inner fold of each training session.
        """
        seen_nM = inner_n[:, None] != np.arange(inner_n.max() + 2)
        weight_nM = torch.tensor(_weights(fold, seen_nM), dtype=torch.float32)
        is_class = fold.kind == "classification"
        answer_n = torch.tensor(fold.answer_n, dtype=torch.int64 if is_class else torch.float32)
        generator = torch.Generator().manual_seed(fold.seed)
        scale_MC = torch.tensor(self._scale(fold.train, seen_nM), dtype=torch.float32)
        model = Members(scale_MC, fold.classes if is_class else 1, generator).to(self.device)
        optimiser = torch.optim.Adam(model.parameters(), lr=_RATE)
        queries = [model.query().detach()]
        for step in range(1, STEPS[-1] + 1):
            row_B = torch.randperm(len(answer_n), generator=generator)[:_BATCH].sort().values
            seen_BM = torch.from_numpy(seen_nM)[row_B].float().to(self.device)
            weight_BM, answer_B = weight_nM[row_B].to(self.device), answer_n[row_B].to(self.device)
            out_BMK = model(*self._tokens(fold.train[row_B.numpy()]), seen_BM)
            answer_BM = answer_B[:, None].expand(-1, out_BMK.shape[1])
            if is_class:
                loss_BM = F.cross_entropy(out_BMK.transpose(1, 2), answer_BM, reduction="none")
            else:
                loss_BM = (out_BMK[:, :, 0] - answer_BM) ** 2
            optimiser.zero_grad()
            (loss_BM * weight_BM).mean(dim=0).sum().backward()
            optimiser.step()
            if step in STEPS:
                queries.append(model.query().detach())
        return queries

    @torch.no_grad()
    def pool(self, query_MAC: Tensor, rows: np.ndarray) -> np.ndarray:
        """The features of these sessions with the queries of each member, float32 (len(rows), M, P)."""
        batches = (self._tokens(rows[at : at + _BATCH]) for at in range(0, len(rows), _BATCH))
        return np.concatenate([pooling.attentive(query_MAC, *batch).flatten(2).cpu().numpy() for batch in batches])

    def _tokens(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Tokens (B, T, C) of these sessions, and which of them are not padding (B, T).

        The last batch is cached. If all training sessions fit into one batch, it is made only once.
        """
        if self._last is None or not np.array_equal(self._last[0], rows):
            sessions = [torch.from_numpy(at_places(self.features[row], self.places)).flatten(0, 1) for row in rows]
            length_B = torch.tensor([len(token_TC) for token_TC in sessions])
            token_BTC = pad_sequence(sessions, batch_first=True)
            valid_BT = torch.arange(token_BTC.shape[1]) < length_B[:, None]
            self._last = rows, (token_BTC.to(self.device), valid_BT.to(self.device))
        return self._last[1]

    def _moments(self, item: Features) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance of each channel over the tokens of a session, (C,) each."""
        token_SLC = at_places(item, self.places)
        return token_SLC.mean(axis=(0, 1), dtype=np.float64), token_SLC.var(axis=(0, 1), dtype=np.float64)

    def _scale(self, train: np.ndarray, seen_nM: np.ndarray) -> np.ndarray:
        """1 / SD of each channel over the tokens that each member uses, (M, C); 0 for constant channels."""
        scales = []
        for seen_n in seen_nM.T:
            mean_nC, variance_nC = self.mean_NC[train[seen_n]], self.variance_NC[train[seen_n]]
            sd_C = np.sqrt(variance_nC.mean(axis=0) + mean_nC.var(axis=0))
            alive_C = pooling.varies(mean_nC.mean(axis=0), sd_C)
            scales.append(alive_C / np.where(alive_C, sd_C, 1))
        return np.stack(scales)


def _weights(fold: Fold, seen_nM: np.ndarray) -> np.ndarray:
    """Weight of each session in the loss of each member, (n, M): 0 if unused, with the same total for every class."""
    if fold.kind == "regression":
        return seen_nM.astype(float)
    is_nK = fold.answer_n[:, None] == np.arange(fold.classes)
    count_KM = is_nK.T.astype(float) @ seen_nM
    return seen_nM * (is_nK @ (seen_nM.sum(axis=0) / fold.classes / np.maximum(count_KM, 1)))
