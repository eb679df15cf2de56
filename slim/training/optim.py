"""The optimizer: AdamW that skips a step without a finite gradient, and the groups of parameters it treats alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_NO_DECAY = ("space", "time", "mask_token", "seconds.linear.weight")


@dataclass
class Group:
    """Parameters that the optimizer treats alike.

    Attributes
    ----------
    parameters : list of Tensor
    decays : whether weight decay draws them to 0
    scale : times the learning rate of the step
    """

    parameters: list[Tensor]
    decays: bool
    scale: float = 1.0


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay is for it: matrices, but no norms, biases, positions or tokens."""
    return parameter.ndim >= 2 and not name.endswith(_NO_DECAY)


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices (with weight decay) and everything else (without)."""
    named = list(model.named_parameters())
    return [{"params": [p for name, p in named if decays(name, p) is wanted]} for wanted in (True, False)]


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that does not step on gradients that are not finite.

    ZeRO stages 1 to 3 do the same before they call the optimizer, by the norm of all gradients. At stage 0 every
    process has the same gradients, and so the same answer.
    """

    skipped = False

    def step(self, closure: Any = None) -> Any:
        # By their norm: looking at every number would make copies of them, at ZeRO stages 1 and 2 of all at once.
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.skipped = not bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients)))
        return None if self.skipped else super().step(closure)
