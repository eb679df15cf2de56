"""Going on with another number of processes than a checkpoint was written by, at the same ZeRO stage.

A run keeps its global batch: position in the stream, schedules and step numbers then mean what they meant. At stage 0
and at the same number of processes DeepSpeed's own load serves. Otherwise the shards of all former processes are mapped
into memory (nothing is converted or written), and each parameter is put together and dealt out, one after the other.

At stages 1 and 2 a process holds a stretch of each group's parameters laid end to end; where a parameter lies in it is
written in the shard. At stage 3 it holds the r-th of equal parts of every parameter, the last ones padded.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from slim.checkpoints import checkpoint, zero_states
from slim.checkpoints.checkpoint import CheckpointError

_MOMENTS = ("exp_avg", "exp_avg_sq")


def accumulate_for(folder: Path, batch: int, processes: int) -> int:
    """Micro-batches per step that keep the global batch a run was saved with.

    Parameters
    ----------
    folder : Path
        A complete checkpoint.
    batch : int
        Samples per process and micro-batch.
    processes : int

    Raises
    ------
    CheckpointError
        If there is no such number.
    """
    total = checkpoint.facts(folder)["global_batch"]
    accumulate, left = divmod(total, batch * processes)
    if left:
        divisors = [number for number in range(1, total + 1) if total % number == 0]
        name, fitting = "batch", [number for number in divisors if total % (number * processes) == 0]
        if not fitting:
            name, fitting = "processes", [number for number in divisors if total % (number * batch) == 0] or divisors
        raise CheckpointError(
            folder,
            f"run.{name}",
            f"{batch} samples x {processes} processes",
            f"a divisor of the {total} samples that the run takes per step",
            f"Set run.{name} to one of {', '.join(map(str, fitting))}, or start anew in another run.out",
        )
    return accumulate


def load(engine: Any, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Restore the engine from a checkpoint of any number of processes; every process calls it.

    Returns
    -------
    tuple
        As from `checkpoint.load`.
    """
    stage, former = engine.zero_optimization_stage(), checkpoint.facts(folder)["world_size"]
    if stage == 0 or former == dist.get_world_size():
        return checkpoint.load(engine, folder)
    try:
        shards = Shards(folder, stage, former)
    except CheckpointError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        got = f"ZeRO shards that do not fit together ({type(error).__name__}: {error})"
        raise CheckpointError(folder, "", got, "those of a run of this version", "Copy the checkpoint again") from error
    (_deal_parts if stage == 3 else _deal_stretches)(engine, shards)
    engine.global_steps = shards.model["global_steps"]
    dist.barrier()
    return checkpoint.checked_state(folder, shards.model), checkpoint.read_weights(folder / checkpoint.WEIGHTS)


class Shards:
    """Parameters and moments of Adam as the processes of a run saved them, each to be had whole.

    Parameters
    ----------
    folder : Path
        A complete checkpoint of stage 1, 2 or 3.
    stage : int
    world : int
        Processes it was written by.

    Attributes
    ----------
    model : dict
        What DeepSpeed wrote beside the shards, and the state given to `checkpoint.save`.
    step : Tensor
        Steps that Adam has counted, ().
    """

    def __init__(self, folder: Path, stage: int, world: int):
        prefix = "zero_pp_rank_0_" if stage == 3 else ""
        self.model = zero_states.read(folder / f"{prefix}mp_rank_00_model_states.pt", mmap=True)
        # name: (tensors by key, start, numbers) of each piece, in order
        self._pieces: dict[str, list[tuple[dict[str, Tensor], int, int]]] = defaultdict(list)
        for rank in range(world):
            path = folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
            shard = zero_states.read(path, mmap=True)["optimizer_state_dict"]
            adam = shard["optimizer_state_dict" if stage == 3 else "base_optimizer_state"]["state"]
            fp32 = shard["fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"]
            for number, values in enumerate(fp32):
                flat = {"fp32": values, **{key: adam[number][key] for key in _MOMENTS}}
                if stage == 3:
                    start = 0
                    for name, shape in self.model["param_shapes"][number].items():
                        part = _part(shape.numel(), world)
                        held = min(part, max(0, shape.numel() - rank * part))
                        self._pieces[name].append((flat, start, held))
                        start += part
                else:
                    for name, piece in shard["param_slice_mappings"][number].items():
                        self._pieces[name].append((flat, piece.start, piece.numel))
            self.step: Tensor = adam[0]["step"]

    def whole(self, name: str, key: str) -> Tensor:
        """All numbers of a parameter (`fp32`) or of a moment of it (`exp_avg`, `exp_avg_sq`), flat."""
        return torch.cat([flat[key].narrow(0, start, count) for flat, start, count in self._pieces[name]])


def _part(numbers: int, world: int) -> int:
    """Numbers of a parameter per process at stage 3, with padding."""
    return -(-numbers // world)


def _begin_adam(optimizer: torch.optim.Optimizer, flats: list[Tensor], step: Tensor) -> None:
    """Moments of these tensors, zero for now: what pads them stays so. Each counts its own steps."""
    for flat in flats:
        optimizer.state[flat] = {"step": step.clone(), **{key: torch.zeros_like(flat) for key in _MOMENTS}}


@torch.no_grad()
def _deal_stretches(engine: Any, shards: Shards) -> None:
    """Stages 1 and 2: every process holds all parameters, and fp32 copies and moments of its stretch."""
    from deepspeed.utils import lazy_init_hp_params_optimizer_state, safe_set_full_optimizer_state

    zero = engine.optimizer
    _begin_adam(zero.optimizer, zero.single_partition_of_fp32_groups, shards.step)
    for group, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
        lazy_init_hp_params_optimizer_state(group, flat, zero.optimizer.state)
    for name, parameter in engine.module.named_parameters():
        parameter.copy_(shards.whole(name, "fp32").view_as(parameter))
        if parameter._hp_mapping is not None:
            parameter._hp_mapping.update_hp()
            for key in _MOMENTS:
                safe_set_full_optimizer_state(parameter, shards.whole(name, key), key)


@torch.no_grad()
def _deal_parts(engine: Any, shards: Shards) -> None:
    """Stage 3: every process holds its part of each parameter, of its fp32 copy and of its moments."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    zero, rank, world = engine.optimizer, dist.get_rank(), dist.get_world_size()
    _begin_adam(zero.optimizer, zero.fp32_partitioned_groups_flat, shards.step)

    def mine(whole: Tensor) -> Tensor:
        part = _part(whole.numel(), world)
        return torch.nn.functional.pad(whole, (0, part * world - whole.numel())).narrow(0, rank * part, part)

    for name, parameter in engine.module.named_parameters():
        whole = shards.whole(name, "fp32")
        with GatheredParameters([parameter], modifier_rank=0):
            if rank == 0:
                parameter.copy_(whole.view_as(parameter))
        safe_set_local_fp32_param(parameter, mine(whole))
        for key in _MOMENTS:
            safe_set_local_optimizer_state(parameter, mine(shards.whole(name, key)), key)
