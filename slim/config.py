"""The settings of a run, with their types, units and checks."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from shards.core.errors import ConfigError
from shards.core.passwords import keep
from shards.core.presets import find, presets
from shards.core.settings import (
    Contradiction,
    PathText,
    Settings,
    Unit,
    check,
    override,
    read_yaml,
    typed,
    whole_number,
)
from slim.model_settings import MOST_CHANNELS, PRESETS, ModelSettings

View = Literal["global", "voxel", "both"]
Kind = Literal["cross_time", "cross_location", "double_cross"]
KINDS: tuple[Kind, ...] = get_args(Kind)

AUTO = "auto"
UNCHOSEN = 65_536  # tokens of a chunk where `auto` was not replaced by a choice: no step of a run


class DataItem(Settings):
    """One dataset of several."""

    path: str = Field(description="folder of a dataset, or its URL (https://..., s3://...)")
    weight: Annotated[float, Unit("times")] = Field(
        1.0, gt=0, description="mean number of times that a session appears in an epoch"
    )

    @field_validator("path")
    @classmethod
    def _without_password(cls, value: str) -> str:
        return keep(value)  # settings are written to run folders, checkpoints and pages


class DrawSettings(Settings):
    """How windows are drawn for a sample."""

    k: Annotated[int, Unit("windows")] = Field(8, ge=2, le=100_000, description="windows per sample")
    best: Annotated[int, Unit("windows")] = Field(
        32, ge=2, le=10**6, description="number of most salient windows of a session from which the k are drawn"
    )

    minimum: Annotated[int | None, Unit("windows")] = Field(
        None,
        ge=1,
        description="sessions with fewer windows are left out; those with fewer than k are used with all they have. "
        "null: k",
    )

    @model_validator(mode="after")
    def _enough(self) -> DrawSettings:
        if self.best < self.k:
            raise Contradiction("best", self.best, f"at least windows.k, {self.k}")
        if self.least > self.k:
            raise Contradiction("minimum", self.minimum, f"at most windows.k, {self.k}")
        return self

    @property
    def least(self) -> int:
        """Number of windows that a session must have."""
        return self.k if self.minimum is None else self.minimum


class TokenMaskSettings(Settings):
    """Shares of brain tokens. The context's share is the product of `context_places` and `context_times`."""

    context_places: Annotated[float, Unit("share")] = Field(
        0.6, gt=0, lt=1, description="share of the places in the brain that the encoder sees"
    )
    context_times: Annotated[float, Unit("share")] = Field(
        0.5, gt=0, lt=1, description="share of the times that the encoder sees"
    )
    targets: Annotated[float, Unit("share")] = Field(
        0.5, gt=0, le=1, description="share of each kind of target that is predicted"
    )
    rebuilt: Annotated[float, Unit("share")] = Field(
        0.25, gt=0, le=1, description="share of the targets that MAE reconstructs"
    )
    kinds: tuple[Kind, ...] = Field(KINDS, min_length=1, description="kinds of target that are predicted")


class LossSettings(Settings):
    """Coefficients of the terms of the loss; null means the value of the objective."""

    jepa: Annotated[float | None, Unit("weight")] = Field(
        None, ge=0, description="coefficient of the JEPA term; null: that of the objective"
    )
    sig: Annotated[float | None, Unit("weight")] = Field(
        None, ge=0, description="coefficient of the SIG term; null: that of the objective"
    )
    mae: Annotated[float | None, Unit("weight")] = Field(
        None, ge=0, description="coefficient of the MAE term; null: that of the objective"
    )
    sig_samples: Annotated[int | None, Unit("samples")] = Field(
        None, ge=1, description="samples per SIG group; null: run.batch at the start"
    )


OBJECTIVES: dict[str, tuple[float, float, float]] = {
    "default": (1.0, 1.0, 1.0),
    "jepa": (1.0, 0.0, 0.0),
    "mae": (0.0, 0.0, 1.0),
}


class OptimizerSettings(Settings):
    """AdamW and its schedule."""

    lr: Annotated[float, Unit("rate")] = Field(1e-3, gt=0, le=1, description="peak learning rate")
    lr_end: Annotated[float, Unit("rate")] = Field(1e-6, ge=0, description="learning rate at the last step")
    betas: Annotated[tuple[float, float], Unit("ratio")] = Field(
        (0.9, 0.95), description="decay of the first and second moments of AdamW"
    )
    wd: Annotated[tuple[float, float], Unit("rate")] = Field(
        (0.04, 0.4), description="weight decay at the first and last step, matrices only"
    )
    warmup: Annotated[float, Unit("share")] = Field(
        0.1, ge=0, lt=1, description="share of the steps in which the learning rate rises to its peak"
    )
    clip: Annotated[float, Unit("norm")] = Field(1.0, gt=0, description="largest norm of the gradient")


class EmaSettings(Settings):
    """Moving averages: the target encoder and the means of each place."""

    start: Annotated[float, Unit("ratio")] = Field(
        0.996, ge=0, le=1, description="decay of the target encoder's moving average at the first step"
    )
    end: Annotated[float, Unit("ratio")] = Field(1.0, ge=0, le=1, description="the same at the last step")
    mean: Annotated[float, Unit("ratio")] = Field(
        0.95, ge=0, lt=1, description="decay of the running mean of the target features"
    )


class ZeroSettings(Settings):
    """What DeepSpeed divides among processes or keeps in CPU memory."""

    stage: Annotated[int | Literal["auto"], Unit("stage"), BeforeValidator(whole_number("auto", 0, 3))] = Field(
        "auto",
        description="what ZeRO divides among processes: 0 nothing, 1 moments, 2 gradients too, 3 parameters too; auto: "
        "0 in one process, 2 in several, more if states are offloaded",
    )
    offload_optimizer: bool = Field(False, description="keep fp32 weights and Adam moments in CPU memory")
    offload_parameters: bool = Field(False, description="keep unused parameters in CPU memory, too; stage 3")

    @field_validator("offload_optimizer")
    @classmethod
    def _is_divided(cls, value: bool, others: ValidationInfo) -> bool:
        if value and others.data.get("stage") == 0:
            raise ValueError("false, because zero.stage 0 keeps the optimizer on the GPU")
        return value

    @field_validator("offload_parameters")
    @classmethod
    def _are_divided(cls, value: bool, others: ValidationInfo) -> bool:
        if value and others.data.get("stage", 3) not in (3, AUTO):
            raise ValueError(f"false, because only zero.stage 3 divides parameters, not {others.data['stage']}")
        return value

    def stage_for(self, processes: int) -> int:
        """The stage that a new run with this number of processes uses."""
        if isinstance(self.stage, int):
            return self.stage
        if self.offload_parameters:
            return 3
        return 2 if processes > 1 or self.offload_optimizer else 0


class RunProbeSettings(Settings):
    """A task that is probed while a run trains: fitted on training subjects, scored on validation subjects."""

    task: str = Field(description="a task, by its name or its YAML file")
    every: Annotated[int, Unit("steps")] = Field(
        ge=1, description="optimizer steps between probes, a multiple of run.checkpoint_every"
    )
    subjects: Annotated[int | None, Unit("subjects")] = Field(
        100, ge=4, description="most training and most validation subjects that are encoded; null: all"
    )


class RunSettings(Settings):
    """Folder, length, processes, checkpoints and log of the run."""

    out: PathText = Field(description="folder of the run")
    seed: int = Field(0, ge=0, description="seed of weights, masks, and the order and draw of samples")
    steps: Annotated[int | None, Unit("steps")] = Field(None, ge=1, description="optimizer steps; null: from `epochs`")
    epochs: Annotated[float, Unit("epochs")] = Field(
        40, gt=0, description="passes through the training sessions; used if steps is null"
    )
    batch: Annotated[int, Unit("samples")] = Field(4, ge=1, description="samples per process and micro-batch")
    accumulate: Annotated[int, Unit("micro-batches")] = Field(1, ge=1, description="micro-batches per optimizer step")
    processes: Annotated[int, Unit("processes")] = Field(1, ge=1, description="processes on this machine, one per GPU")
    workers: Annotated[int, Unit("processes")] = Field(2, ge=0, description="loading processes per training process")
    checkpoint_every: Annotated[int, Unit("steps")] = Field(
        500, ge=1, description="optimizer steps between checkpoints"
    )
    keep: Annotated[int, Unit("checkpoints")] = Field(3, ge=1, description="number of newest checkpoints to keep")
    keep_every: Annotated[int | None, Unit("steps")] = Field(
        None, ge=1, description="also keep the checkpoints of every so many steps; null: none"
    )
    mirror: PathText | None = Field(None, description="second folder, to which checkpoints are copied during training")
    damaged: Annotated[float, Unit("share")] = Field(
        0.01, ge=0, le=1, description="share of the training sessions that may be damaged"
    )
    not_finite: Annotated[int, Unit("steps")] = Field(
        10, ge=0, description="consecutive steps with a non-finite loss that may be skipped"
    )
    max_seconds: Annotated[float | None, Unit("s")] = Field(
        None, gt=0, description="stop and save after this time; null: never"
    )
    resume: Literal["auto", "never"] = Field(
        "auto", description="auto: resume from the newest complete checkpoint; never: refuse a folder with a run"
    )
    extend: Literal["constant", "rewarm"] | None = Field(
        None, description="how added steps are trained: with the last learning rate, or with a new warm-up"
    )
    change: tuple[str, ...] = Field((), description="settings that may change on resume, such as optimizer.lr")
    log_every: Annotated[int, Unit("steps")] = Field(1, ge=1, description="optimizer steps per line of metrics.jsonl")
    wandb: Literal["offline", "online", "disabled"] = Field(
        "offline", description="where Weights & Biases keeps the log: offline in the run folder, online, or nowhere"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU where there is one")
    probe: RunProbeSettings | None = Field(
        None, description="a task that is probed on validation subjects during pretraining; null: none"
    )

    def steps_in_all(self, per_epoch: int, processes: int) -> int:
        """Total optimizer steps of the run, given the samples per epoch and the number of processes."""
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

    @field_validator("probe")
    @classmethod
    def _has_checkpoints(cls, value: RunProbeSettings | None, others: ValidationInfo) -> RunProbeSettings | None:
        every = others.data.get("checkpoint_every", 1)
        if value is not None and value.every % every:
            raise Contradiction("every", value.every, f"a multiple of run.checkpoint_every, {every}")
        return value

    @field_validator("mirror")
    @classmethod
    def _is_apart(cls, value: str | None, others: ValidationInfo) -> str | None:
        if value is not None and "out" in others.data:
            mirror, out = Path(value).resolve(), Path(others.data["out"]).resolve()
            if mirror == out or mirror in out.parents or out in mirror.parents:
                raise ValueError(f"a folder that neither contains run.out ({out}) nor lies inside it")
        return value


# Renamed keys of version 0.1, which files and commands may still use.
RENAMED = {"stream": "chunk_tokens"}


class TrainSettings(Settings):
    """Settings of both pretraining and fine-tuning runs."""

    data: tuple[DataItem, ...] = Field(min_length=1, description="a dataset, or a list of {path, weight}")
    model: ModelSettings = Field(
        description="published, lean, large, tiny, the name of a preset, a YAML file, or the sizes themselves"
    )
    model_name: str = Field("custom", description="set by `model`")
    view: View = Field(
        "both", description="z-scores of the voxels that the encoder gets: over the whole scan, of each voxel, or both"
    )
    windows: DrawSettings = DrawSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    precision: Literal["bf16", "fp32"] = Field("bf16", description="precision of the arithmetic: bfloat16 or float32")
    chunk_tokens: Annotated[
        int | Literal["auto"] | None, Unit("tokens"), BeforeValidator(whole_number("auto, null", 1))
    ] = Field(
        "auto",
        description="tokens that the local stages compute together; null: all of them; auto: as many as the memory of "
        "the device allows",
    )
    zero: ZeroSettings = ZeroSettings()
    run: RunSettings

    @property
    def tokens_at_once(self) -> int | None:
        """`chunk_tokens` as a number; None for all tokens. Of `auto`, only a run makes a choice."""
        return UNCHOSEN if isinstance(self.chunk_tokens, str) else self.chunk_tokens

    @property
    def zero_stage(self) -> int:
        """`zero.stage` as a number."""
        return self.zero.stage_for(self.run.processes)

    @field_validator("data", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        if isinstance(value, str):
            return ({"path": value},)
        if isinstance(value, list | tuple):
            return [{"path": item} if isinstance(item, str) else item for item in value]
        return value

    @model_validator(mode="before")
    @classmethod
    def _older_names(cls, tree: Any) -> Any:
        return _renamed(tree)


class InitSettings(Settings):
    """Weights that a pretraining run begins with, instead of random ones."""

    source: PathText = Field(
        description="a run, one of its checkpoints, an export, or OWNER/NAME[@REVISION] on the Hugging Face hub"
    )
    optimizer: bool = Field(False, description="also take the moments of AdamW, which only runs have")
    positions: Literal["same", "resample", "new"] = Field(
        "same",
        description="position embeddings of another grid or number of windows. same: refuse; resample: interpolate; "
        "new: begin with sinusoids",
    )
    checksum: str | None = Field(None, description="set by the software: SHA-256 of RUN/start.safetensors")


class PretrainSettings(TrainSettings):
    """Settings of a pretraining run."""

    init: InitSettings | None = Field(
        None, description="weights to begin with: a run, an export or a name on the hub; null: random weights"
    )

    mask: TokenMaskSettings = TokenMaskSettings()
    objective: Literal["default", "jepa", "mae"] = Field("default", description="default: JEPA, SIG and MAE together")
    loss: LossSettings = LossSettings()
    ema: EmaSettings = EmaSettings()

    @field_validator("init", mode="before")
    @classmethod
    def _source(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _learns(self) -> PretrainSettings:
        if not any(self.loss_weights[::2]):
            raise Contradiction("loss", "0 for jepa and mae", "a coefficient above 0 for loss.jepa or loss.mae")
        batch, samples = self.run.batch, self.loss.sig_samples
        if self.loss_weights[1] and samples is not None and batch % samples:
            expected = f"a multiple of loss.sig_samples, {samples}, the samples over which the SIG term is computed"
            larger, smaller = samples * math.ceil(batch / samples), math.gcd(batch, samples)
            hint = f"Set run.batch={larger} or loss.sig_samples={smaller}"
            raise Contradiction("run.batch", batch, expected, hint)
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
    """The head that predicts the labels of a task from the encoder's features, and its training."""

    pooling: Literal["cov", "mean", "attentive"] = Field(
        "cov", description="how the tokens of a sample become one vector, before a linear map"
    )
    components: Annotated[int, Unit("components")] = Field(
        3, ge=1, le=MOST_CHANNELS, description="principal axes of `cov`"
    )
    queries: Annotated[int, Unit("queries")] = Field(
        4, ge=1, le=MOST_CHANNELS, description="learned queries of attentive pooling"
    )
    layer_decay: Annotated[float | None, Unit("ratio")] = Field(
        None, gt=0, le=1, description="learning rate of a block relative to the next one; null: 0.75, from scratch 1"
    )
    lr_scale: Annotated[float, Unit("ratio")] = Field(
        10.0, gt=0, description="learning rate of the head relative to the last block"
    )


Layer = Literal["qkv", "proj", "fc1", "fc2"]
LAYERS: tuple[Layer, ...] = get_args(Layer)


class LoraSettings(Settings):
    """LoRA (Hu et al., ICLR 2022): the weights of linear layers stay, and low-rank updates of them are trained."""

    rank: Annotated[int, Unit("channels")] = Field(8, ge=1, le=MOST_CHANNELS, description="rank of an update")
    alpha: Annotated[float, Unit("ratio")] = Field(16.0, gt=0, description="an update is multiplied by alpha / rank")
    targets: tuple[Layer, ...] = Field(
        LAYERS, min_length=1, description="layers with an update: qkv and proj of the attention, fc1 and fc2 of the MLP"
    )

    @field_validator("targets", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("targets")
    @classmethod
    def _once(cls, value: tuple[Layer, ...]) -> tuple[Layer, ...]:
        if len(set(value)) < len(value):
            raise ValueError("each layer once")
        return value


class AnswerSettings(Settings):
    """The labels of a task. The command sets these from the task and the training subjects of a fold."""

    task: str = Field("", description="name of the task")
    label: str = Field("", description="column of the labels")
    classes: tuple[str, ...] = Field((), description="names of the classes, in order; empty for a regression")
    mean: Annotated[float, Unit("label")] = Field(0.0, description="mean of the training values")
    sd: Annotated[float, Unit("label")] = Field(
        1.0, description="standard deviation of the training values; the model is trained on z-scores"
    )


class FinetuneSettings(TrainSettings):
    """Settings of a fine-tuning run, which trains an encoder and a head to predict the labels of a task."""

    head: HeadSettings = HeadSettings()
    freeze: Annotated[int, Unit("stages")] = Field(
        0, ge=0, description="first stages of the encoder that are not trained, with embedding and positions"
    )
    lora: LoraSettings | None = Field(
        None, description="train low-rank updates of the encoder's weights; null: train the weights"
    )
    start: str | None = Field(None, description="hash of the encoder's initial weights; null: random weights")
    answer: AnswerSettings = AnswerSettings()
    before: dict[str, Any] | None = Field(None, description="how the initial weights were made, as recorded in exports")

    @model_validator(mode="after")
    def _trains(self) -> FinetuneSettings:
        stages, lora = len(self.model.depths), self.lora
        if self.freeze > stages:
            raise Contradiction("freeze", self.freeze, f"at most {stages}, the number of stages of the encoder")
        if self.freeze == stages and self.head.layer_decay is not None:
            expected = f"null, because freeze={stages} leaves only the head to be trained"
            raise Contradiction("head.layer_decay", self.head.layer_decay, expected)
        if lora is None:
            return self
        if self.freeze == stages:
            expected = f"at most {stages - 1} with lora, because no updates of frozen stages are trained"
            raise Contradiction("freeze", self.freeze, expected, "Leave out lora, to train the head alone")
        narrowest = min(self.model.embed, int(self.model.embed * self.model.mlp_ratio))
        if lora.rank > narrowest:
            raise Contradiction("lora.rank", lora.rank, f"at most {narrowest}, the channels of the narrowest layer")
        return self

    @model_validator(mode="after")
    def _validates_itself(self) -> FinetuneSettings:
        if self.run.probe is not None:
            raise Contradiction("run.probe", self.run.probe.task, "nothing: a fine-tuning validates after each epoch")
        return self


def renamed_assignments(assignments: Sequence[str]) -> list[str]:
    """`key=value` overrides, with older names of keys replaced by the present ones."""
    parts = [assignment.partition("=") for assignment in assignments]
    return ["".join((RENAMED.get(key, key), sign, value)) for key, sign, value in parts]


def _renamed(tree: Any) -> Any:
    """Settings with older names of keys replaced. If both names are given, the old one stays and is an unknown key."""
    if not isinstance(tree, dict):
        return tree
    return {RENAMED[key] if key in RENAMED and RENAMED[key] not in tree else key: tree[key] for key in tree}


def load_config(path: str | Path, assignments: Sequence[str] = ()) -> PretrainSettings:
    """A checked configuration from a YAML file, or the name of a preset, and `key=value` overrides.

    `model` is the name of a preset, a YAML file (relative to the configuration or the working folder) or a mapping.
    Overrides such as `model.embed=32` change it, and its `model_name` then says so: "lean, changed". In the same way,
    `init` names weights, and `init.optimizer=true` says more about them.

    Raises
    ------
    ConfigError
        With file, field, got and expected.
    """
    path = find("pretrain", path, "CONFIG")
    given = renamed_assignments(assignments)
    changes = [text for text in given if text.startswith(("model.", "init."))]
    tree = override(_renamed(read_yaml(path)), [text for text in given if text not in changes])
    model = tree.get("model")
    if isinstance(model, str):
        name = Path(model).stem
        with typed(given, path):
            tree["model"] = _model(model, path).model_dump(mode="json")
        is_changed = any(text.startswith("model.") for text in changes)
        tree["model_name"] = f"{name}, changed" if is_changed else name
        if ("model",) not in tree.words:
            tree.before = {**tree.before, "model": tree["model"], "model_name": name}
    if not isinstance(tree.get("init"), dict | None):
        tree["init"] = {"source": tree.words.get(("init",), str(tree["init"]))}
        if ("init",) not in tree.words:
            tree.before = {**tree.before, "init": tree["init"]}
    return check(PretrainSettings, override(tree, changes), path)


def load_run(path: str | Path) -> PretrainSettings | FinetuneSettings:
    """Read the `config.yaml` of a pretraining or fine-tuning run."""
    return check_run(read_yaml(path), path)


def check_run(tree: dict[str, Any], where: str | Path) -> PretrainSettings | FinetuneSettings:
    """Check the settings of a pretraining or fine-tuning run, given as a mapping; errors name `where`."""
    return check(FinetuneSettings, tree, where) if "head" in tree else check(PretrainSettings, tree, where)


def _model(name: str, path: str | Path) -> ModelSettings:
    if name in PRESETS:
        return PRESETS[name]
    shipped = presets("model")
    for candidate in (Path(name), Path(path).parent / name, *([shipped[name].path] if name in shipped else [])):
        if os.path.isfile(candidate):  # False also for names that are not valid paths
            return check(ModelSettings, read_yaml(candidate), candidate)
    raise ConfigError(path, "model", name, f"{', '.join(PRESETS)}, or a YAML file")
