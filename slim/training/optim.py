"""The optimizer: AdamW that skips steps with non-finite gradients, and its parameter groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

_NO_DECAY = ("space", "time", "mask_token", "seconds.linear.weight")


@dataclass
class Group:
    """Parameters with the same weight decay and learning rate.

    Attributes
    ----------
    parameters : list of Tensor
    decays : bool
        Whether weight decay applies.
    scale : float
        Factor on the learning rate.
    """

    parameters: list[Tensor]
    decays: bool
    scale: float = 1.0


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices, but not to norms, biases, position embeddings or learned tokens."""
    return parameter.ndim >= 2 and not name.endswith(_NO_DECAY)


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups: matrices with weight decay, and all other parameters without."""
    named = list(model.named_parameters())
    return [{"params": [p for name, p in named if decays(name, p) is wanted]} for wanted in (True, False)]


class GuardedAdamW(torch.optim.AdamW):
    """Fused AdamW that skips a step if any gradient is not finite.

    DeepSpeed does the same at ZeRO stages 1 to 3, from the norm of all gradients, before it calls the optimizer. At
    stage 0 all processes have the same gradients, so they all decide alike. Gradients are clipped here, too, at that
    stage: DeepSpeed would take their norms one by one.

    Parameters
    ----------
    parameters, lr, betas
        As for `torch.optim.AdamW`.
    clip : float, optional
        Largest norm of all gradients together; None if they are clipped already.
    """

    skipped = False

    def __init__(
        self,
        parameters: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        clip: float | None = None,
    ):
        super().__init__(parameters, lr=lr, betas=betas, fused=True)  # one call for each group, without copies
        self.clip = clip

    def step(self, closure: Any = None) -> Any:
        updated = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        # Check the norm: `isfinite` would copy the gradients, at ZeRO stages 1 and 2 all of them at once.
        norm = torch.nn.utils.get_total_norm([p.grad for p in updated], foreach=True)
        self.skipped = not bool(torch.isfinite(norm))
        if self.clip is not None:
            self._global_grad_norm = norm  # where the engine looks for it
            torch.nn.utils.clip_grads_with_norm_(updated, self.clip, norm, foreach=True)
        return None if self.skipped else super().step(closure)
