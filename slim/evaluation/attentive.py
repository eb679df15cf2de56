"""Attentive pooling: learned queries attend over all tokens of a session, then the linear probe.

    Attentive(features).predict(fold)

A query is the same for all sessions, so it and a key projection act only through their product, one vector of C
channels for each head; likewise a value projection and a linear model behind it are one linear map. What is
learned is that vector for each of A heads. It gathers a weighted mean of the tokens, and the A means are the
features of the session.

Queries start at zero, where every weight is equal and attentive pooling is mean pooling. They are trained together
with a linear model (cross-entropy with every class counted alike, or squared error), which is then dropped:
the features go to the same linear probe as those of every other pooling. How many steps the queries are trained,
with zero among the choices, is decided with the penalty of the probe, by the same cross-validation inside the
training subjects, in which queries never saw the sessions that they are judged by.

The encoder is frozen, and its tokens stay in memory as `Features` holds them: 11 MB a session at the published
sizes with 32 windows (40 slots, about 136 places, 512 channels). A batch of sessions is copied to the device.

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
STEPS = (0, 5, 10, 20, 40)  # after which training may end
_RATE = 0.03
_BATCH = 64  # sessions of a step


class Members(nn.Module):
    """Queries, and the linear model they are trained with, of M members.

    Members share every batch, so that the tokens are read once for all of them; they differ in the sessions
    that count. No parameter of one has a gradient from another.

    Parameters
    ----------
    scale_MC : Tensor
        One over the SD of each channel over the tokens that a member sees.
    outputs : int
        K.
    generator : torch.Generator
        Of the linear models, on the CPU; all members start alike.
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
        """Queries (M, A, C) for tokens as they are: for standardised ones, over the SD of each channel.

        The mean of a channel adds the same to the scores of all tokens, which softmax takes off.
        """
        return self.standard_MAC * self.scale_MC[:, None]

    def forward(self, token_BTC: Tensor, valid_BT: Tensor, seen_BM: Tensor) -> Tensor:
        """Logits or values (B, M, K), from features z-scored over the sessions of the batch that a member sees."""
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
        Of all sessions of the task; they may differ in the number of slots. Places that all of them have are used.
    device : torch.device or str
        Where queries are trained. On the CPU the same seed gives the same bits, and another number of threads
        the same up to rounding.
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
        """The queries (1, A, C), the penalty, and what the queries gather from the training sessions, (n, P)."""
        inner_n = fold.inner()
        found = []
        for query_MAC in self.fit(fold, inner_n):
            *inner, whole_nP = self.pool(query_MAC, fold.train).swapaxes(0, 1)
            loss_L = held_out_losses(fold, inner, inner_n)
            found.append((loss_L.min(), PENALTIES[int(loss_L.argmin())], query_MAC[-1:], whole_nP))
        _, penalty, query_1AC, train_nP = min(found, key=lambda choice: choice[0])
        return query_1AC, penalty, train_nP

    def fit(self, fold: Fold, inner_n: np.ndarray) -> list[Tensor]:
        """Queries (M, A, C) after each of `STEPS`: member f never saw inner fold f, the last saw all of training.

        Parameters
        ----------
        fold : Fold
            Its test sessions are not looked at.
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
        """What each member's queries gather from these sessions, float32 (len(rows), M, P)."""
        batches = (self._tokens(rows[at : at + _BATCH]) for at in range(0, len(rows), _BATCH))
        return np.concatenate([pooling.attentive(query_MAC, *batch).flatten(2).cpu().numpy() for batch in batches])

    def _tokens(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Tokens (B, T, C) of these sessions, and which of them are not padding (B, T).

        The last batch is kept: where all training sessions are one, it is made once.
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
        """One over the SD of each channel over the tokens that each member sees, (M, C); 0 where nothing varies."""
        scales = []
        for seen_n in seen_nM.T:
            mean_nC, variance_nC = self.mean_NC[train[seen_n]], self.variance_NC[train[seen_n]]
            sd_C = np.sqrt(variance_nC.mean(axis=0) + mean_nC.var(axis=0))
            alive_C = pooling.varies(mean_nC.mean(axis=0), sd_C)
            scales.append(alive_C / np.where(alive_C, sd_C, 1))
        return np.stack(scales)


def _weights(fold: Fold, seen_nM: np.ndarray) -> np.ndarray:
    """Weight of each session in the loss of each member, (n, M): 0 unless seen, and alike in total for every class."""
    if fold.kind == "regression":
        return seen_nM.astype(float)
    is_nK = fold.answer_n[:, None] == np.arange(fold.classes)
    count_KM = is_nK.T.astype(float) @ seen_nM
    return seen_nM * (is_nK @ (seen_nM.sum(axis=0) / fold.classes / np.maximum(count_KM, 1)))
