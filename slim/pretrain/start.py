"""Continue pretraining: begin a new run with the weights of another run, an export or a model on the hub.

The dataset, the objective, the view and the grid may differ from those of the weights, as long as voxels have the same
size and mean the same. A tensor is taken if the new model has one of the same name and shape. Position embeddings of
another grid or number of windows are taken only if the user says how (`init.positions`). Any other tensor with another
shape is refused, so that no part of the model is random without being named.

Legend: L places of a grid, or slots of time; X, Y, Z places along its axes; C channels; A axes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from shards.core.errors import ConfigError
from shards.format.grid import Grid
from shards.format.manifest import DataRecord
from shards.format.reader import Dataset
from slim.checkpoints import checkpoint, start, weights
from slim.checkpoints.provenance import Ancestor
from slim.checkpoints.seen import Seen
from slim.checkpoints.weights import Weights
from slim.config import FinetuneSettings, InitSettings, PretrainSettings
from slim.data.samples import unlike
from slim.model.geometry import Geometry, geometry_of
from slim.pretrain.objective import Objective
from slim.training.reshard import MOMENTS, States, states_of
from slim.training.task import Beginning

COMMAND = "slim-brain pretrain"
_SPACE, _TIME = ("encoder.space", "predictor.space"), ("encoder.time", "predictor.time")
_SHOWN = 8  # names of tensors in a line


@dataclass
class _Sorted:
    """Tensors of the new model, by what happens to them; and those of the old one that have no place in it."""

    taken: dict[str, Tensor] = field(default_factory=dict)
    resampled: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


def begin(
    settings: PretrainSettings, dataset: Dataset, geometry: Geometry, folder: Path, seen: Seen | None
) -> Beginning:
    """Write RUN/start.safetensors. `seen` are the subjects of the run itself.

    Raises
    ------
    UserError
        If the weights cannot be found or read, or do not fit.
    """
    init = settings.init
    assert init is not None
    found = weights.find(init.source)
    _check_data(found, dataset, init)
    states = _states(found, init)
    given = tensors_of(found, states)
    with torch.device("meta"):
        wanted = Objective(settings, geometry, dataset.grid.voxels).state_dict()
    sorted_ = _sort(given, wanted, init, _Tables.of(found, settings, dataset, geometry))
    tensors = dict(sorted_.taken)
    if found.made["weights"] == "encoder" and found.path.name == checkpoint.WEIGHTS:
        average = checkpoint.read_weights(found.path, "target.")
        if all(
            average[name].shape == wanted[f"encoder.{name}"].shape for name in average if f"encoder.{name}" in wanted
        ):
            tensors |= {
                f"target.{name}": value for name, value in average.items() if f"encoder.{name}" in sorted_.taken
            }
    if init.optimizer:
        assert states is not None
        if sorted_.new or sorted_.resampled:
            names = _named([*sorted_.new, *sorted_.resampled])
            hint = "Set init.optimizer=false, or train with the sizes, view and objective of the weights"
            raise ConfigError("init", "optimizer", "true", f"a model without new tensors, but new are {names}", hint)
        tensors |= {f"{key}.{name}": states.whole(name, key) for key in MOMENTS for name in wanted}
        tensors["step"] = states.step.reshape(1)
    checksum = start.write(folder, tensors)
    made = found.made
    ancestor = Ancestor(
        source=init.source,
        run=made["run"],
        step=made["step"],
        weights=made["weights"],
        commit=made["commit"],
        checksum=checksum,
        before=made.get("init"),
    )
    completed = settings.model_copy(update={"init": init.model_copy(update={"checksum": checksum})})
    lines = _lines(ancestor, sorted_, tensors)
    if found.seen is None or seen is None:
        lines.append("  the subjects seen by these weights are not known, so probes cannot say who was seen")
        return Beginning(settings=completed, init=ancestor, lines=lines)
    return Beginning(settings=completed, init=ancestor, seen=replace(seen, before=found.seen), lines=lines)


def _check_data(found: Weights, dataset: Dataset, init: InitSettings) -> None:
    """Refuse weights for which numbers in this dataset would have another meaning; the shape of the grid may differ."""
    if isinstance(found.settings, FinetuneSettings):
        hint = "Begin with the pretraining run, or use slim-brain finetune"
        raise ConfigError("init", "source", f"{init.source}, a fine-tuned model", "pretrained weights", hint)
    mine, theirs = dataset.manifest.data, found.data
    one, other = (record.grid.grid() for record in (mine, theirs))
    if (one.mm, one.patch) == (other.mm, other.patch):
        theirs = theirs.model_copy(update={"grid": mine.grid})
    if (differs := unlike(mine, theirs)) is not None:
        name, got, expected = differs
        hint = "Convert the data with the settings of the weights' dataset, or train from random weights"
        raise ConfigError(dataset.folder, name, got, f"{expected}, as in the weights {init.source}", hint)


def _states(found: Weights, init: InitSettings) -> States | None:
    """The whole states of a run's checkpoint, from which the predictor and moments come; None for an export."""
    if found.path.name == checkpoint.WEIGHTS:
        return states_of(found.path.parent)
    if init.optimizer:
        hint = "Set init.optimizer=false, or begin with the run"
        raise ConfigError("init", "optimizer", "true, but an export has no moments", "a run as init.source", hint)
    return None


def tensors_of(found: Weights, states: States | None) -> dict[str, Tensor]:
    """All tensors of weights, under the names of `Objective`; without `states`, those of the encoder."""
    given = {f"encoder.{name}": value for name, value in checkpoint.read_weights(found.path, found.prefix).items()}
    if states is None or not isinstance(found.settings, PretrainSettings):
        return given
    grid = found.data.grid.grid()
    shape = (found.settings.windows.k * found.data.windows.frames, *grid.patch_shape)
    with torch.device("meta"):
        model = Objective(found.settings, geometry_of(found.settings.model, shape), grid.voxels).state_dict()
    for name, value in model.items():
        if name.startswith("predictor."):
            given[name] = states.whole(name, "fp32").view(value.shape).clone()
    return given


@dataclass(frozen=True)
class _Table:
    """The places of a table of position embeddings: their grid, and the voxels of a place along each axis."""

    grid: Grid
    edge: tuple[int, ...]


@dataclass(frozen=True)
class _Tables:
    """Places of the spatial tables of the old and the new model, by name."""

    old: dict[str, _Table]
    new: dict[str, _Table]

    @classmethod
    def of(cls, found: Weights, settings: PretrainSettings, dataset: Dataset, geometry: Geometry) -> _Tables:
        def places(grid: Grid, cell: tuple[int, ...]) -> dict[str, _Table]:
            patch = (grid.patch,) * 3
            cells = tuple(grid.patch * size for size in cell[1:])
            return {"encoder.space": _Table(grid, patch), "predictor.space": _Table(grid, cells)}

        theirs: DataRecord = found.data
        grid = theirs.grid.grid()
        tokens = (found.settings.windows.k * theirs.windows.frames, *grid.patch_shape)
        cell = geometry_of(found.settings.model, tokens).cell
        return cls(places(grid, cell), places(dataset.grid, geometry.cell))


def _sort(given: dict[str, Tensor], wanted: dict[str, Tensor], init: InitSettings, tables: _Tables) -> _Sorted:
    found = _Sorted(left=[name for name in given if name not in wanted])
    for name, mine in wanted.items():
        if name not in given:
            found.new.append(name)
            continue
        value = given[name]
        is_position = name in (*_SPACE, *_TIME)
        moved = name in _SPACE and tables.old[name] != tables.new[name]
        if value.shape == mine.shape and not moved:
            found.taken[name] = value
        elif not is_position or value.shape[1] != mine.shape[1]:
            hint = "Use the sizes of the model that the weights have"
            raise ConfigError("init", name, tuple(mine.shape), f"{tuple(value.shape)}, as in the weights", hint)
        elif init.positions == "new":
            found.new.append(name)
        elif init.positions == "resample":
            table = (
                _resampled(value, tables.old[name], tables.new[name])
                if name in _SPACE
                else _stretched(value, len(mine))
            )
            found.taken[name] = table
            found.resampled.append(name)
        else:
            got = "positions of another grid" if moved else tuple(mine.shape)
            hint = "Set init.positions=resample to interpolate them, or init.positions=new to begin with sinusoids"
            raise ConfigError("init", name, got, f"{tuple(value.shape)}, as in the weights", hint)
    return found


def _resampled(table_LC: Tensor, old: _Table, new: _Table) -> Tensor:
    """Position embeddings at the places of another grid: linear in between, the nearest outside the old grid."""
    shape = tuple(size // edge for size, edge in zip(old.grid.shape, old.edge, strict=True))
    target = tuple(size // edge for size, edge in zip(new.grid.shape, new.edge, strict=True))
    index_AXYZ = np.indices(target, np.float64)
    edge_A, old_edge_A = (np.array(edge, np.float64).reshape(3, 1, 1, 1) for edge in (new.edge, old.edge))
    voxel_AXYZ = index_AXYZ * edge_A + (edge_A - 1) / 2  # the centre of a place, in voxels of its grid
    shift_A = (new.grid.affine[:3, 3] - old.grid.affine[:3, 3]) / old.grid.mm
    place_AXYZ = (voxel_AXYZ + shift_A.reshape(3, 1, 1, 1) - (old_edge_A - 1) / 2) / old_edge_A
    table_XYZC = table_LC.numpy().reshape(*shape, -1)
    channels = [
        ndimage.map_coordinates(table_XYZC[..., channel], place_AXYZ, order=1, mode="nearest")
        for channel in range(table_XYZC.shape[3])
    ]
    return torch.from_numpy(np.stack(channels, axis=-1).reshape(prod(target), -1).astype(np.float32))


def _stretched(table_LC: Tensor, length: int) -> Tensor:
    """Position embeddings of another number of slots, so that the first and the last keep their meaning."""
    at_L = (np.arange(length) + 0.5) * len(table_LC) / length - 0.5
    channels = [np.interp(at_L, np.arange(len(table_LC)), channel_L) for channel_L in table_LC.numpy().T]
    return torch.from_numpy(np.stack(channels, axis=1).astype(np.float32))


def _named(names: list[str]) -> str:
    """The first names, and how many there are; a whole predictor is one name."""
    predictor = [name for name in names if name.startswith("predictor.")]
    if len(predictor) > _SHOWN:
        names = [*(name for name in names if name not in predictor), f"predictor ({len(predictor)} tensors)"]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _lines(ancestor: Ancestor, found: _Sorted, tensors: dict[str, Tensor]) -> list[str]:
    numbers = sum(tensor.numel() for tensor in found.taken.values())
    lines = [
        f"begins with {ancestor.source}: {ancestor.weights} of {ancestor.run} after {ancestor.step} steps",
        f"  taken: {len(found.taken)} tensors, {numbers / 1e6:.2f} M numbers"
        + (", and the moments of AdamW" if "step" in tensors else ""),
    ]
    for what, names in (("interpolated", found.resampled), ("new", found.new), ("left", found.left)):
        if names:
            lines.append(f"  {what}: {_named(names)}")
    target = any(name.startswith("target.") for name in tensors)
    lines.append(f"  moving average: {'taken' if target else 'begins as the encoder'}; running means: measured anew")
    return lines


class InitialStates(States):
    """The states in RUN/start.safetensors; see `slim.training.reshard.States`."""

    def __init__(self, folder: Path, init: InitSettings):
        assert init.checksum is not None
        self._tensors = start.read(folder, init.checksum, COMMAND)
        self.step = self._tensors["step"].reshape(()) if init.optimizer else torch.zeros(())

    def whole(self, name: str, key: str) -> Tensor:
        return self._tensors[name if key == "fp32" else f"{key}.{name}"].flatten()

    def load_into(self, model: Objective, target: torch.nn.Module) -> None:
        """Load the tensors into a new model and its moving average; what is missing keeps its random values."""
        of_model = {name: value for name, value in self._tensors.items() if name.startswith(("encoder.", "predictor."))}
        model.load_state_dict(of_model, strict=False)
        average = {name.removeprefix("target."): v for name, v in self._tensors.items() if name.startswith("target.")}
        target.load_state_dict({**model.encoder.state_dict(), **average})
