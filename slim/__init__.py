"""SLIM-Brain: a voxel-level, atlas-free foundation model for fMRI.

Stage 1 (`slim.ranking`) ranks the windows of a scan. Stage 2 (`slim.model`, `slim.data`, `slim.pretrain`,
`slim.training`) pretrains the encoder on patches of the most salient windows that contain brain. `slim.inference`
encodes scans, `slim.evaluation` and `slim.finetune` test and fine-tune the encoder on labels, and `slim.explain` and
`slim.reporting` show results.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slim.config import load_config
    from slim.evaluation.transformer import SlimBrainTransformer
    from slim.inference.slim_brain import SlimBrain

__all__ = ["SlimBrain", "SlimBrainTransformer", "__version__", "load_config"]
__version__ = "0.2.0.dev0"
# Imported on first use, so that `import slim` does not load torch.
_MODULES = {
    "SlimBrain": "slim.inference.slim_brain",
    "SlimBrainTransformer": "slim.evaluation.transformer",
    "load_config": "slim.config",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'slim' has no attribute {name!r}")
