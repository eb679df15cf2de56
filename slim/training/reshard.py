"""Parameters and Adam moments of a checkpoint, divided anew among the processes of an engine.

A run may be resumed with another number of processes than the checkpoint was written with, at the same ZeRO stage.

The global batch stays the same, so the position in the stream, the schedules and the step numbers stay valid. At stage
0, or with the same number of processes, DeepSpeed loads the checkpoint itself. Otherwise the shards of all former
processes are memory-mapped, without converting or writing files, and the parameters are joined and divided again one
by one.

At stages 1 and 2, the parameters of a group are concatenated, and each process holds one contiguous range; the shard
records where each parameter lies in it. At stage 3, each process holds an equal part of every parameter, padded at the
end.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from slim.checkpoints import checkpoint, zero_states
from slim.checkpoints.checkpoint import CheckpointError
from slim.training.optim import decays

MOMENTS = ("exp_avg", "exp_avg_sq")


def accumulate_for(folder: Path, batch: int, processes: int) -> int:
    """Micro-batches per step that keep the global batch of a checkpoint.

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
        If no number of micro-batches gives the same global batch.
    """
    total = checkpoint.fact(folder, "global_batch")
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
            f"a divisor of the run's {total} samples per step",
            f"Set run.{name} to one of {', '.join(map(str, fitting))}, or start a new run in another run.out",
        )
    return accumulate


def load(engine: Any, folder: Path) -> tuple[checkpoint.TrainingState, dict[str, Tensor]]:
    """Restore the engine from a checkpoint written by any number of processes. All processes must call it.

    Returns
    -------
    tuple
        As returned by `checkpoint.load`.
    """
    stage, former = engine.zero_optimization_stage(), checkpoint.fact(folder, "world_size")
    if stage == 0 or former == dist.get_world_size():
        return checkpoint.load(engine, folder)
    try:
        shards = Shards(folder, stage, former)
    except CheckpointError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        got = f"inconsistent ZeRO shards ({type(error).__name__}: {error})"
        expected = "the shards of one checkpoint, written by this version"
        raise CheckpointError(folder, "", got, expected, "Copy the checkpoint again") from error
    (_load_parts if stage == 3 else _load_ranges)(engine, shards)
    engine.global_steps = shards.model["global_steps"]
    dist.barrier()
    return checkpoint.checked_state(folder, shards.model), checkpoint.read_weights(folder / checkpoint.WEIGHTS)


class States(Protocol):
    """Whole parameters and their Adam moments.

    Attributes
    ----------
    step : Tensor
        Adam's step count, ().
    """

    step: Tensor

    def whole(self, name: str, key: str) -> Tensor:
        """A whole parameter (`fp32`) or one of its moments (`exp_avg`, `exp_avg_sq`), flattened."""
        ...


def states_of(folder: Path) -> States:
    """The states in a checkpoint of any ZeRO stage."""
    stage = checkpoint.fact(folder, "zero_stage")
    return Shards(folder, stage, checkpoint.fact(folder, "world_size")) if stage else Undivided(folder)


def place(engine: Any, states: States) -> None:
    """Give a new engine these parameters and moments, at any ZeRO stage. All processes must call it."""
    stage = engine.zero_optimization_stage()
    if stage:
        (_load_parts if stage == 3 else _load_ranges)(engine, states)
        return
    for name, parameter in engine.module.named_parameters():
        moments = {key: states.whole(name, key).view_as(parameter).to(parameter) for key in MOMENTS}
        engine.optimizer.state[parameter] = {"step": states.step.clone().to(parameter.device), **moments}


class Undivided:
    """The states of ZeRO stage 0 in a checkpoint; see `States`."""

    def __init__(self, folder: Path):
        found = zero_states.read(folder / "mp_rank_00_model_states.pt", mmap=True)
        self._module, adam = found["module"], found["optimizer"]
        numbers = [number for group in adam["param_groups"] for number in group["params"]]
        # the order of `slim.training.optim.parameter_groups`
        names = [
            name for wanted in (True, False) for name, value in self._module.items() if decays(name, value) is wanted
        ]
        self._adam = {name: adam["state"][number] for name, number in zip(names, numbers, strict=True)}
        self.step: Tensor = self._adam[names[0]]["step"]

    def whole(self, name: str, key: str) -> Tensor:
        return (self._module[name] if key == "fp32" else self._adam[name][key]).detach().flatten()


class Shards:
    """The ZeRO shards of a checkpoint, from which whole parameters and Adam moments can be read.

    Parameters
    ----------
    folder : Path
        A complete checkpoint of stage 1, 2 or 3.
    stage : int
    world : int
        Number of processes that wrote it.

    Attributes
    ----------
    model : dict
        DeepSpeed's model states, with the state given to `checkpoint.save`.
    step : Tensor
        Adam's step count, ().
    """

    def __init__(self, folder: Path, stage: int, world: int):
        prefix = "zero_pp_rank_0_" if stage == 3 else ""
        self.model = zero_states.read(folder / f"{prefix}mp_rank_00_model_states.pt", mmap=True)
        # name: (tensors by key, start, length) of each piece, in order
        self._pieces: dict[str, list[tuple[dict[str, Tensor], int, int]]] = defaultdict(list)
        for rank in range(world):
            path = folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
            shard = zero_states.read(path, mmap=True)["optimizer_state_dict"]
            adam = shard["optimizer_state_dict" if stage == 3 else "base_optimizer_state"]["state"]
            fp32 = shard["fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"]
            for number, values in enumerate(fp32):
                flat = {"fp32": values, **{key: adam[number][key] for key in MOMENTS}}
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
        return torch.cat([flat[key].detach().narrow(0, start, count) for flat, start, count in self._pieces[name]])


def _part(numbers: int, world: int) -> int:
    """Numbers of a parameter that each process holds at stage 3, including padding."""
    return -(-numbers // world)


def _trained(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The parameters that the optimizer has. The others stay as the run has begun with them."""
    return ((name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad)


def _begin_adam(optimizer: torch.optim.Optimizer, flats: list[Tensor], step: Tensor) -> None:
    """Create zero moments for these tensors; the padding stays zero. Each tensor has its own step count."""
    for flat in flats:
        optimizer.state[flat] = {"step": step.clone(), **{key: torch.zeros_like(flat) for key in MOMENTS}}


@torch.no_grad()
def _load_ranges(engine: Any, shards: States) -> None:
    """Stages 1 and 2: every process holds all parameters, and the fp32 copies and moments of its range."""
    from deepspeed.utils import lazy_init_hp_params_optimizer_state, safe_set_full_optimizer_state

    zero = engine.optimizer
    _begin_adam(zero.optimizer, zero.single_partition_of_fp32_groups, shards.step)
    for group, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
        lazy_init_hp_params_optimizer_state(group, flat, zero.optimizer.state)
    for name, parameter in _trained(engine.module):
        parameter.copy_(shards.whole(name, "fp32").view_as(parameter))
        if parameter._hp_mapping is not None:
            parameter._hp_mapping.update_hp()
            for key in MOMENTS:
                safe_set_full_optimizer_state(parameter, shards.whole(name, key), key)


@torch.no_grad()
def _load_parts(engine: Any, shards: States) -> None:
    """Stage 3: every process holds its part of each parameter, with the fp32 copy and the moments of that part."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    zero, rank, world = engine.optimizer, dist.get_rank(), dist.get_world_size()
    _begin_adam(zero.optimizer, zero.fp32_partitioned_groups_flat, shards.step)

    def mine(whole: Tensor) -> Tensor:
        part = _part(whole.numel(), world)
        return torch.nn.functional.pad(whole, (0, part * world - whole.numel())).narrow(0, rank * part, part)

    for name, parameter in _trained(engine.module):
        whole = shards.whole(name, "fp32")
        with GatheredParameters([parameter], modifier_rank=0):
            if rank == 0:
                parameter.copy_(whole.view_as(parameter))
        safe_set_local_fp32_param(parameter, mine(whole))
        for key in MOMENTS:
            safe_set_local_optimizer_state(parameter, mine(shards.whole(name, key)), key)
