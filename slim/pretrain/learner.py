"""One pretraining step on a micro-batch. The caller is a DeepSpeed engine, plain torch, or a count of FLOPs.

Legend: M cells of all brain tokens; K targets; C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from slim.config import KINDS, PretrainSettings
from slim.model.inputs import Batch
from slim.pretrain.ema import Target
from slim.pretrain.objective import Objective
from slim.pretrain.running_mean import PlaceMean
from slim.training import schedule
from slim.training.metrics import MetricsLine
from slim.training.optim import Group, parameter_groups
from slim.training.schedule import StepPlan
from slim.training.task import Losses

# Names of the loss, of the loss of predicting the mean of each place, and of the gain over it.
_GAINS = (
    ("loss_jepa", "trivial", "gain"),
    *((f"loss_{kind}", f"trivial_{kind}", f"gain_{kind}") for kind in KINDS),
)

# If predicting the mean of each place has a smaller loss than this, the targets equal the means up to rounding and no
# gain can be computed. This happens in the first step with one sample per step: its means come from the sample itself.
_NOTHING_TO_GAIN = 1e-9


def _gain(loss: float | None, trivial: float | None) -> float | None:
    """1 - loss / trivial."""
    return None if loss is None or trivial is None or trivial <= _NOTHING_TO_GAIN else 1 - loss / trivial


class PretrainLearner:
    """The model in pretraining, its EMA target, and the running means that the loss needs.

    Parameters
    ----------
    settings : PretrainSettings
    model : Objective
        The model before training, on its device, with whole parameters.

    Attributes
    ----------
    means : dict of str to PlaceMean
        `target_mean` with the JEPA term, `context_mean` with the SIG term. Checkpoints use the same names.
    """

    logged = (
        "loss",
        "loss_jepa",
        "loss_sig",
        "loss_mae",
        "trivial",
        "loss_cross_time",
        "loss_cross_location",
        "loss_double_cross",
        "trivial_cross_time",
        "trivial_cross_location",
        "trivial_double_cross",
        "sample_cosine",
    )

    def __init__(self, settings: PretrainSettings, model: Objective):
        self.model, self.ema = model, settings.ema
        self.target = Target(model.encoder, model.bf16)
        jepa, sig, _ = settings.loss_weights
        cells, dim = math.prod(model.encoder.geometry.cells), model.encoder.dim
        device = next(model.parameters()).device
        self.means = {
            name: PlaceMean(cells, dim, settings.ema.mean, device)
            for name, needed in (("target_mean", jepa), ("context_mean", sig))
            if needed
        }

    def summarise(self, mean: dict[str, float | None]) -> dict[str, float | None]:
        """Replace `trivial`, the loss of predicting the mean of each place, by `gain` = 1 - loss / trivial.

        So for all targets, and for each kind. A gain is None where `trivial` is 0 up to rounding.
        """
        for loss, trivial, gain in _GAINS:
            mean[gain] = _gain(mean[loss], mean.pop(trivial))
        return mean

    def groups(self) -> list[Group]:
        """See `parameter_groups`."""
        decayed, plain = parameter_groups(self.model)
        return [Group(decayed["params"], True), Group(plain["params"], False)]

    def losses(self, batch: Batch, step: int, forward: Callable[..., Losses] | None = None) -> Losses:
        """Losses of one micro-batch; the running means collect its features.

        The loss of an empty batch is 0; its features are not collected and nothing is logged.

        Parameters
        ----------
        batch : Batch
            With context and targets.
        step : int
            Optimizer step.
        forward : callable, optional
            Called in place of the model: the engine around it.

        Returns
        -------
        Losses
            With the features `target`, (K, C), centred, None without the JEPA term; and `context`, (M, C).
        """
        assert batch.context is not None
        centred_KC, target_KC, cosine = self._targets(batch)
        context_mean = self.means.get("context_mean")
        losses = (forward or self.model)(batch, target_KC, None if context_mean is None else context_mean.mean, step)
        if batch.empty:
            return Losses(losses.total * 0, {}, {"target": None, **losses.features})
        if context_mean is not None:
            context_MC = losses.features["context"]
            assert context_MC is not None
            context_mean.observe(context_MC, batch.context.cell_M)
        if cosine is not None:
            losses.logs["sample_cosine"] = cosine
        losses.features = {"target": centred_KC, **losses.features}
        return losses

    def _targets(self, batch: Batch) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Features at the target cells: centred by place and slot, (K, C); also standardised per channel; a cosine.

        The cosine is the mean similarity of features to those of other samples at the same place and slot. Features
        have the norm sqrt(C), so it is computed as a product with their running mean.
        """
        mean = self.means.get("target_mean")
        if mean is None:
            return None, None, None
        assert batch.targets is not None
        feature_MC = self.target.features(batch)
        centred_KC = feature_MC[batch.targets.row_K] - mean.mean[batch.targets.cell_K]
        target_KC = centred_KC / mean.variance.sqrt().clamp_min(0.1)
        other_MC = mean.mean[batch.whole.cell_M]
        known_M = mean.seen[batch.whole.cell_M]
        cosine = ((feature_MC * other_MC).mean(dim=1) * known_M).sum() / known_M.sum().clamp_min(1)
        if not batch.empty:
            mean.observe(feature_MC, batch.whole.cell_M)
        return centred_KC, target_KC, cosine

    def begin(self, steps: Callable[[int], Iterable[Batch]], forward: Any = None) -> None:
        """Measure the running means on the samples of the first step, then the variance around them."""
        if self.means:
            for _ in range(2):
                self.calibrate(steps(1))

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Batch]) -> None:
        """Measure running means on these batches, before training; a second call also measures the variance."""
        target_mean, context_mean = self.means.get("target_mean"), self.means.get("context_mean")
        for batch in batches:
            assert batch.context is not None
            if batch.empty:
                continue
            if target_mean is not None:
                target_mean.observe(self.target.features(batch), batch.whole.cell_M)
            if context_mean is not None:
                context_mean.observe(self.target.encode(batch, batch.context), batch.context.cell_M)
        self._commit_means()

    def discard(self) -> None:
        """Finish a skipped step: discard the collected features and leave the target unchanged."""
        for mean in self.means.values():
            mean.discard()

    def commit(
        self, step: int, steps: int | StepPlan, forward: Any = None, full: Callable[[Tensor], Tensor] | None = None
    ) -> MetricsLine:
        """Finish step `step` of `steps`: update the running means and the target (see `Target.update`).

        Returns the momentum of the target as `ema`.
        """
        momentum = schedule.ema_momentum(*schedule.place(step, steps), self.ema)
        self._commit_means()
        self.target.update(self.model.encoder, momentum, full)
        return {"ema": momentum}

    def _commit_means(self) -> None:
        for mean in self.means.values():
            mean.commit()

    def state(self, full: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
        """Whole tensors of the online encoder, target encoder and running means; `full` as in `Target.update`."""
        tensors = {f"target.{name}": value for name, value in self.target.encoder.state_dict().items()}
        for name, value in self.model.encoder.named_parameters():
            tensors[f"encoder.{name}"] = value if full is None else full(value)
        for name, mean in self.means.items():
            tensors |= mean.state(name)
        return tensors

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restore the target encoder and running means from `state`. The caller restores the online encoder."""
        self.target.encoder.load_state_dict(
            {name.removeprefix("target."): value for name, value in tensors.items() if name.startswith("target.")}
        )
        for name, mean in self.means.items():
            mean.load(tensors, name)
