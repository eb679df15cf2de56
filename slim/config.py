"""Every setting of a run, typed, with its unit and its check."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, ValidationInfo, field_validator, model_validator

from shards.core.errors import ConfigError
from shards.core.passwords import keep
from shards.core.settings import PathText, Settings, check, override, read_yaml

View = Literal["global", "voxel", "both"]
Kind = Literal["cross_time", "cross_location", "double_cross"]
KINDS: tuple[Kind, ...] = get_args(Kind)
MOST_CHANNELS, MOST_BLOCKS = 16384, 1024  # far beyond any model: sizes in a file that somebody was given


class PredictorSettings(Settings):
    width: int = Field(192, ge=8, le=MOST_CHANNELS, description="channels")
    depth: int = Field(4, ge=1, le=MOST_BLOCKS, description="blocks")
    heads: int = Field(6, ge=1, le=MOST_CHANNELS)

    @model_validator(mode="after")
    def _divides(self) -> PredictorSettings:
        if self.width % self.heads:
            raise ValueError(f"heads that divide width: {self.heads} does not divide {self.width}")
        return self


class ModelSettings(Settings):
    """Sizes of the encoder and the predictor; axes are (time, x, y, z) in tokens of one frame and one patch."""

    embed: int = Field(ge=8, le=MOST_CHANNELS, description="channels of the first stage; doubled at each stage")
    heads: int = Field(ge=1, le=MOST_CHANNELS, description="heads of the first stage; doubled at each stage")
    depths: tuple[int, ...] = Field(min_length=1, max_length=8, description="blocks of each stage")
    unit: tuple[int, int, int, int] = Field(description="tokens of a mask unit")
    strides: tuple[tuple[int, int, int, int], ...] = Field(description="pooling at the start of stages 2, 3, ...")
    local_stages: int = Field(2, ge=1, description="stages whose attention stays inside mask units")
    mlp_ratio: float = Field(4.0, gt=0, le=64)
    predictor: PredictorSettings = PredictorSettings()

    @model_validator(mode="after")
    def _consistent(self) -> ModelSettings:
        if min(self.depths) < 1:
            raise ValueError(f"depths of 1 or more, not {min(self.depths)}")
        if sum(self.depths) > MOST_BLOCKS:
            raise ValueError(f"depths of at most {MOST_BLOCKS} blocks in all, not {sum(self.depths)}")
        if self.embed % self.heads:
            raise ValueError(f"heads that divide embed: {self.heads} does not divide {self.embed}")
        if self.local_stages > len(self.depths):
            raise ValueError(f"at most {len(self.depths)} local_stages, as there are stages, not {self.local_stages}")
        if len(self.strides) > len(self.depths) - 1:
            raise ValueError(
                f"at most {len(self.depths) - 1} strides, not {len(self.strides)}: tokens are pooled at the start of "
                "every stage but the first"
            )
        return self


PRESETS: dict[str, ModelSettings] = {
    # the sizes of arXiv 2512.21881
    "published": ModelSettings(
        embed=64, heads=1, depths=(2, 3, 16, 3), unit=(8, 8, 8, 8), strides=((2, 2, 2, 2), (2, 2, 2, 2))
    ),
    # mask units aligned with 5-frame windows: half the FLOPs of a step
    "lean": ModelSettings(
        embed=64, heads=1, depths=(2, 3, 16, 3), unit=(5, 4, 4, 4), strides=((5, 2, 2, 2), (1, 2, 2, 2))
    ),
    "large": ModelSettings(
        embed=192,
        heads=3,
        depths=(2, 3, 16, 3),
        unit=(8, 8, 8, 8),
        strides=((2, 2, 2, 2), (2, 2, 2, 2)),
        predictor=PredictorSettings(width=384, depth=6, heads=12),
    ),
    # for coarse grids (8 mm, 6 x 6 x 6 patches), tests and a first try
    "tiny": ModelSettings(
        embed=32,
        heads=2,
        depths=(1, 2, 1),
        unit=(5, 2, 2, 2),
        strides=((5, 1, 1, 1),),
        local_stages=1,
        predictor=PredictorSettings(width=64, depth=2, heads=4),
    ),
}


class DataItem(Settings):
    path: str = Field(description="folder of a dataset, or its URL (https://..., s3://...)")
    weight: float = Field(1.0, gt=0, description="times a session appears in an epoch, on average")

    @field_validator("path")
    @classmethod
    def _without_password(cls, value: str) -> str:
        return keep(value)  # settings are written into runs, checkpoints and pages


class DrawSettings(Settings):
    k: int = Field(8, ge=2, le=100_000, description="windows of a sample")
    best: int = Field(32, ge=2, le=10**6, description="they are drawn from this many most salient ones")

    @model_validator(mode="after")
    def _enough(self) -> DrawSettings:
        if self.best < self.k:
            raise ValueError(f"best >= k: {self.best} >= {self.k} does not hold")
        return self


class TokenMaskSettings(Settings):
    """Shares of brain tokens; context is the product of its two."""

    context_places: float = Field(0.6, gt=0, lt=1)
    context_times: float = Field(0.5, gt=0, lt=1)
    targets: float = Field(0.5, gt=0, le=1, description="share of each kind of target that is predicted")
    rebuilt: float = Field(0.25, gt=0, le=1, description="share of the targets whose voxels MAE rebuilds")
    kinds: tuple[Kind, ...] = Field(KINDS, min_length=1, description="kinds of target that are predicted")


class LossSettings(Settings):
    """Weights of the terms; null takes those of the objective."""

    jepa: float | None = Field(None, ge=0)
    sig: float | None = Field(None, ge=0)
    mae: float | None = Field(None, ge=0)
    sig_samples: int | None = Field(None, ge=1, description="samples that share one SIG test; null: a first run.batch")


OBJECTIVES: dict[str, tuple[float, float, float]] = {
    "default": (1.0, 1.0, 1.0),
    "jepa": (1.0, 0.0, 0.0),
    "mae": (0.0, 0.0, 1.0),
}


class OptimizerSettings(Settings):
    lr: float = Field(1e-3, gt=0, le=1, description="peak learning rate")
    lr_end: float = Field(1e-6, ge=0, description="learning rate at the last step")
    betas: tuple[float, float] = (0.9, 0.95)
    wd: tuple[float, float] = Field((0.04, 0.4), description="weight decay at the first and last step, matrices only")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps")
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")


class EmaSettings(Settings):
    start: float = Field(0.996, ge=0, le=1)
    end: float = Field(1.0, ge=0, le=1)
    mean: float = Field(0.95, ge=0, lt=1, description="decay of the running mean target of each place and slot")


class ZeroSettings(Settings):
    stage: int = Field(2, ge=0, le=3)
    offload_optimizer: bool = Field(False, description="master copy and moments of Adam in the memory of the host")
    offload_parameters: bool = Field(False, description="parameters, too, where they are not in use; stage 3")

    @field_validator("offload_optimizer")
    @classmethod
    def _is_divided(cls, value: bool, others: ValidationInfo) -> bool:
        if value and others.data.get("stage") == 0:
            raise ValueError("false at zero.stage 0, which keeps the optimizer on the GPU")
        return value

    @field_validator("offload_parameters")
    @classmethod
    def _are_divided(cls, value: bool, others: ValidationInfo) -> bool:
        if value and others.data.get("stage", 3) != 3:
            raise ValueError(f"false at zero.stage {others.data['stage']}: only stage 3 does without whole parameters")
        return value


class RunSettings(Settings):
    out: PathText
    seed: int = Field(0, ge=0)
    steps: int | None = Field(None, ge=1, description="optimizer steps; null: `epochs`")
    epochs: float = Field(40, gt=0)
    batch: int = Field(4, ge=1, description="samples per process and micro-batch")
    accumulate: int = Field(1, ge=1, description="micro-batches per optimizer step")
    processes: int = Field(1, ge=1, description="processes on this machine")
    workers: int = Field(2, ge=0, description="loading processes per process")
    checkpoint_every: int = Field(500, ge=1, description="optimizer steps")
    keep: int = Field(3, ge=1, description="newest checkpoints that are kept")
    keep_every: int | None = Field(None, ge=1, description="steps: checkpoints of every so many are kept, too")
    mirror: PathText | None = Field(None, description="second folder, to which checkpoints are copied meanwhile")
    damaged: float = Field(0.01, ge=0, le=1, description="share of the training sessions that may be damaged")
    not_finite: int = Field(10, ge=0, description="steps in a row that may be skipped for a loss that is not finite")
    max_seconds: float | None = Field(None, gt=0, description="stop and save after this many seconds")
    resume: Literal["auto", "never"] = "auto"
    extend: Literal["constant", "rewarm"] | None = Field(
        None, description="how steps beyond the planned ones are trained: at the last learning rate, or warmed up again"
    )
    change: tuple[str, ...] = Field((), description="settings that may change on resume, such as optimizer.lr")
    log_every: int = Field(1, ge=1, description="optimizer steps per line of metrics.jsonl")
    wandb: Literal["offline", "online", "disabled"] = "offline"
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def steps_in_all(self, per_epoch: int, processes: int) -> int:
        """Optimizer steps of the run, where an epoch has so many samples and so many processes share them."""
        samples = self.batch * self.accumulate * processes
        return self.steps or max(1, math.ceil(self.epochs * per_epoch / samples))

    @field_validator("change", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("keep_every")
    @classmethod
    def _is_saved(cls, value: int | None, others: ValidationInfo) -> int | None:
        every = others.data.get("checkpoint_every", 1)
        if value is not None and value % every:
            raise ValueError(f"a multiple of run.checkpoint_every, {every}")
        return value

    @field_validator("mirror")
    @classmethod
    def _is_apart(cls, value: str | None, others: ValidationInfo) -> str | None:
        if value is not None and "out" in others.data:
            mirror, out = Path(value).resolve(), Path(others.data["out"]).resolve()
            if mirror == out or mirror in out.parents or out in mirror.parents:
                raise ValueError(f"a folder that does not hold run.out ({out}) and does not lie in it")
        return value


# Keys of version 0.1 that have another name now; files and commands may still use them.
RENAMED = {"stream": "chunk_tokens"}


class TrainSettings(Settings):
    """What every run that trains is told, whatever it learns."""

    data: tuple[DataItem, ...]
    model: ModelSettings
    model_name: str = Field("custom", description="set by `model`")
    view: View = "both"
    windows: DrawSettings = DrawSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    precision: Literal["bf16", "fp32"] = "bf16"
    chunk_tokens: int | None = Field(
        4096, ge=1, description="tokens that the local stages compute together; null: all of them"
    )
    zero: ZeroSettings = ZeroSettings()
    run: RunSettings

    @field_validator("data", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        if isinstance(value, str):
            return ({"path": value},)
        return value

    @model_validator(mode="before")
    @classmethod
    def _older_names(cls, tree: Any) -> Any:
        return _renamed(tree)


class PretrainSettings(TrainSettings):
    """A pretraining configuration."""

    mask: TokenMaskSettings = TokenMaskSettings()
    objective: Literal["default", "jepa", "mae"] = "default"
    loss: LossSettings = LossSettings()
    ema: EmaSettings = EmaSettings()

    @model_validator(mode="after")
    def _learns(self) -> PretrainSettings:
        if not any(self.loss_weights[::2]):
            raise ValueError("a weight above 0 for jepa or mae")
        samples = self.loss.sig_samples
        if samples is not None and self.run.batch % samples:
            raise ValueError(f"a run.batch divisible by loss.sig_samples: {self.run.batch} by {samples}")
        return self

    @property
    def loss_weights(self) -> tuple[float, float, float]:
        """Coefficients of the JEPA, SIG and MAE terms of the loss."""
        given = (self.loss.jepa, self.loss.sig, self.loss.mae)
        jepa, sig, mae = (
            default if own is None else own for own, default in zip(given, OBJECTIVES[self.objective], strict=True)
        )
        return jepa, sig, mae


class HeadSettings(Settings):
    """What is put on the encoder to answer a task, and how the two are trained together."""

    pooling: Literal["cov", "mean", "attentive"] = Field(
        "cov", description="of the tokens of a sample, before a linear map"
    )
    components: int = Field(3, ge=1, le=MOST_CHANNELS, description="principal axes of `cov`")
    queries: int = Field(4, ge=1, le=MOST_CHANNELS, description="learned queries of attentive pooling")
    layer_decay: float | None = Field(
        None, gt=0, le=1, description="learning rate of a block over that of the next; null: 0.75, from scratch 1"
    )
    lr_scale: float = Field(10.0, gt=0, description="times the learning rate of the last block")


class AnswerSettings(Settings):
    """What is answered: set by the command, from its task and the subjects a fold is fitted on."""

    task: str = Field("", description="name of the task")
    label: str = Field("", description="column of the labels")
    classes: tuple[str, ...] = Field((), description="names of the classes, in order; none where values are predicted")
    mean: float = Field(0.0, description="of the values")
    sd: float = Field(1.0, description="of the values, which are learned z-scored")


class FinetuneSettings(TrainSettings):
    """Training an encoder on, towards the answers of a task (see `slim.finetune.labels`)."""

    head: HeadSettings = HeadSettings()
    start: str | None = Field(None, description="hash of the weights the encoder begins with; null: random ones")
    answer: AnswerSettings = AnswerSettings()
    before: dict[str, Any] | None = Field(None, description="how those weights came about, as an export tells it")


def renamed_assignments(assignments: Sequence[str]) -> list[str]:
    """`key=value` overrides with older names of keys replaced, so that the last one wins under either name."""
    parts = [assignment.partition("=") for assignment in assignments]
    return ["".join((RENAMED.get(key, key), sign, value)) for key, sign, value in parts]


def _renamed(tree: Any) -> Any:
    """Settings with older names of keys replaced. Beside its new name an old one stays, and is an unknown key."""
    if not isinstance(tree, dict):
        return tree
    return {RENAMED[key] if key in RENAMED and RENAMED[key] not in tree else key: tree[key] for key in tree}


def load_config(path: str | Path, assignments: Sequence[str] = ()) -> PretrainSettings:
    """A checked configuration from a YAML file and `key=value` overrides.

    `model` is the name of a preset, a YAML file (relative to the configuration or the working folder) or a mapping.

    Raises
    ------
    ConfigError
        With file, field, got and expected.
    """
    tree = override(_renamed(read_yaml(path)), renamed_assignments(assignments))
    model = tree.get("model")
    if isinstance(model, str):
        tree["model"], tree["model_name"] = _model(model, path).model_dump(), Path(model).stem
    return check(PretrainSettings, tree, path)


def load_run(path: str | Path) -> PretrainSettings | FinetuneSettings:
    """The settings in the `config.yaml` of a run, whichever kind it is of."""
    return check_run(read_yaml(path), path)


def check_run(tree: dict[str, Any], where: str | Path) -> PretrainSettings | FinetuneSettings:
    """Settings of a run, of either kind, from a mapping; ConfigError names `where`."""
    return check(FinetuneSettings, tree, where) if "head" in tree else check(PretrainSettings, tree, where)


def _model(name: str, path: str | Path) -> ModelSettings:
    if name in PRESETS:
        return PRESETS[name]
    for candidate in (Path(name), Path(path).parent / name):
        if os.path.isfile(candidate):  # also of names that no system looks up
            return check(ModelSettings, read_yaml(candidate), candidate)
    raise ConfigError(path, "model", name, f"{', '.join(PRESETS)}, or a YAML file")
