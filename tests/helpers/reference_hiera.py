"""The reference implementation of Hiera, `hiera-transformer`."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import nn


@pytest.fixture(scope="module")
def reference() -> types.ModuleType:
    """`hiera-transformer`. Of timm it needs two small layers; timm itself wants torchvision, so they stand in here."""

    class Mlp(nn.Module):
        def __init__(self, dim: int, hidden: int, act_layer: type[nn.Module] = nn.GELU):
            super().__init__()
            self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden), act_layer(), nn.Linear(hidden, dim)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc2(self.act(self.fc1(x)))

    names = ("timm", "timm.models", "timm.models.layers")
    before = {name: sys.modules.get(name) for name in names}
    for name in names:
        sys.modules[name] = types.ModuleType(name)
    sys.modules["timm.models.layers"].Mlp = Mlp  # type: ignore[attr-defined]
    sys.modules["timm.models.layers"].DropPath = nn.Identity  # type: ignore[attr-defined]
    module = pytest.importorskip("hiera.hiera", reason="pip install --no-deps hiera-transformer==0.1.4")
    for name, old in before.items():
        if old is None:
            del sys.modules[name]
        else:
            sys.modules[name] = old
    return module
