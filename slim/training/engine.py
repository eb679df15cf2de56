"""The DeepSpeed engine: its configuration, and access to whole parameters at ZeRO stage 3."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from slim.config import TrainSettings

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def deepspeed_config(settings: TrainSettings) -> dict[str, object]:
    """The engine's configuration.

    The model uses autocast itself, so optimizer states and gradients are fp32, and bf16 works at every ZeRO stage.
    DeepSpeed's own bf16 mode is not used, because at stage 0 its first step uses gradients of zero.
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
        # at stage 0 by `slim.training.optim.GuardedAdamW`
        "gradient_clipping": settings.optimizer.clip if settings.zero_stage else 0.0,
        "zero_optimization": {
            "stage": settings.zero_stage,
            # The default reserves a gradient buffer of 2 GB, several times what a step needs.
            "reduce_bucket_size": BUCKET,
            "allgather_bucket_size": BUCKET,
            **offload,
        },
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


def make_engine(model: nn.Module, optimizer: torch.optim.Optimizer, settings: TrainSettings) -> DeepSpeedEngine:
    """The DeepSpeed engine of this process, in the process group that exists already."""
    import deepspeed

    # DeepSpeed imports its own optimizer Muon, which is decorated with torch.compile. With the default backend this
    # imports torch's compiler, which takes a second in every process and is not used.
    has_default = hasattr(torch.compiler, "set_default_backend")
    if has_default:
        torch.compiler.set_default_backend("eager")
    try:
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(settings))
    finally:
        if has_default:
            torch.compiler.set_default_backend(None)
    return engine


def whole_parameter(parameter: Tensor) -> Tensor:
    """The whole fp32 value of a parameter that ZeRO stage 3 divides among the processes."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    if not parameter.requires_grad:  # the optimizer has no copy of it
        with GatheredParameters([parameter]):
            return parameter.detach().clone()
    whole = safe_get_full_fp32_param(parameter)
    assert whole is not None
    return whole


BUCKET = 5_000_000  # numbers that processes exchange in one message: 20 MB in fp32
