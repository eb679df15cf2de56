"""SLIM-Brain: a voxel-level, atlas-free foundation model for fMRI.

Stage 1 (`temporal`, `saliency`) ranks the windows of a run; stage 2 (`geometry`, `gather`, `hiera`,
`masking`, `objective`, `trainer`) learns from the best of them, on brain patches alone; `features` and `probe` use what
it learned.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slim.inference.slim_brain import SlimBrain

__all__ = ["SlimBrain", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # looked up on first use: `import slim` alone does not load torch
    if name == "SlimBrain":
        from slim.inference.slim_brain import SlimBrain

        return SlimBrain
    raise AttributeError(f"module 'slim' has no attribute {name!r}")
