"""The DeepSpeed engine: its configuration, and whole parameters where processes hold parts."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from slim.config import TrainSettings


def deepspeed_config(settings: TrainSettings) -> dict[str, Any]:
    """The engine's configuration.

    Precision is autocast inside the model, so states and gradients are fp32 and bf16 is right at every stage.
    DeepSpeed's own bf16 is not used: at stage 0 it begins with a step on gradients of zero.
    """
    offload = {
        f"offload_{what}": {"device": "cpu"}
        for what, chosen in (
            ("optimizer", settings.zero.offload_optimizer),
            ("param", settings.zero.offload_parameters),
        )
        if chosen
    }
    return {
        "train_micro_batch_size_per_gpu": settings.run.batch,
        "gradient_accumulation_steps": settings.run.accumulate,
        "gradient_clipping": settings.optimizer.clip,
        "zero_optimization": {
            "stage": settings.zero.stage,
            # By default a buffer of 2 GB lies ready for gradients on their way, several times what a step needs.
            "reduce_bucket_size": BUCKET,
            "allgather_bucket_size": BUCKET,
            **offload,
        },
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


def whole_parameter(parameter: Tensor) -> Tensor:
    """The whole fp32 value of a parameter that ZeRO stage 3 has spread over the processes."""
    from deepspeed.utils import safe_get_full_fp32_param

    whole = safe_get_full_fp32_param(parameter)
    assert whole is not None
    return whole


BUCKET = 5_000_000  # numbers that processes exchange at once: 20 MB
