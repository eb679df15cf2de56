"""Which settings may change when a run is resumed, and the configurations that a run keeps.

`RULES` holds the rule of every setting. The new settings are compared with the configuration in the checkpoint.

    RUN/configs/step-00000000.yaml   the configuration at the start
                step-00000006.yaml   the configuration from step 6 on, if a setting changed there
                step-00000006.1.yaml an earlier configuration from step 6 on; its steps were lost and are trained again
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from shards.core.errors import ConfigError
from shards.core.files import write_atomically
from slim.checkpoints.checkpoint import CheckpointError, facts, tag
from slim.checkpoints.run_folder import CONFIG, CONFIGS
from slim.config import AUTO, PretrainSettings, TrainSettings, load_run
from slim.training import reshard
from slim.training.schedule import StepPlan

S = TypeVar("S", bound=TrainSettings)


class Rule(Enum):
    """What happens when a run is resumed with another value of a setting."""

    FREE = "may change; the change is printed and recorded"
    STEPS = "may not change, unless run.extend says how the added steps are trained; see `extended`"
    NAMED = "may change if run.change names it"
    FIXED = "may not change: the weights or the order of samples depend on it"


# A setting has the rule of the longest of these keys that is a prefix of its own key.
RULES: dict[str, Rule] = {
    "data": Rule.FIXED,
    "data.path": Rule.FREE,  # the content is compared in `slim.training.origin`
    "model": Rule.FIXED,
    "model_name": Rule.FREE,
    "view": Rule.FIXED,
    "windows.k": Rule.FIXED,
    "windows.best": Rule.NAMED,
    "windows.minimum": Rule.FREE,  # the sessions that it chooses are compared in `slim.training.origin`
    "optimizer": Rule.NAMED,
    "precision": Rule.NAMED,
    "chunk_tokens": Rule.FREE,
    "zero.stage": Rule.FIXED,
    "zero.offload_optimizer": Rule.FREE,
    "zero.offload_parameters": Rule.FREE,
    "run.out": Rule.FREE,
    "run.seed": Rule.FIXED,
    "run.steps": Rule.STEPS,
    "run.epochs": Rule.STEPS,
    "run.extend": Rule.FREE,
    "run.change": Rule.FREE,
    "run.batch": Rule.FREE,  # for these three, `adopt` keeps the samples per step and the SIG groups
    "run.accumulate": Rule.FREE,
    "run.processes": Rule.FREE,
    "run.workers": Rule.FREE,
    "run.checkpoint_every": Rule.FREE,
    "run.keep": Rule.FREE,
    "run.keep_every": Rule.FREE,
    "run.mirror": Rule.FREE,
    "run.damaged": Rule.FREE,
    "run.not_finite": Rule.FREE,
    "run.max_seconds": Rule.FREE,
    "run.resume": Rule.FREE,
    "run.log_every": Rule.FREE,
    "run.wandb": Rule.FREE,
    "run.device": Rule.FREE,
    "run.probe": Rule.FREE,
    # pretraining only
    "mask": Rule.NAMED,
    "init": Rule.FIXED,
    "objective": Rule.FIXED,  # these four may differ as long as the coefficients of the loss stay the same
    "loss.jepa": Rule.FIXED,
    "loss.sig": Rule.FIXED,
    "loss.mae": Rule.FIXED,
    "loss.sig_samples": Rule.NAMED,
    "ema": Rule.NAMED,
    # fine-tuning only
    "head": Rule.FIXED,
    "head.layer_decay": Rule.NAMED,
    "head.lr_scale": Rule.NAMED,
    "freeze": Rule.FIXED,
    "lora": Rule.FIXED,
    "start": Rule.FIXED,
    "answer": Rule.FIXED,
    "before": Rule.FREE,  # describes the initial weights; `start` is their hash
}
_LOSS_WEIGHTS = ("objective", "loss.jepa", "loss.sig", "loss.mae")
_OUT = "use another run.out"
_KEPT = re.compile(r"step-([0-9]{8})\.yaml")
_NOTE = "# resumed: "  # starts the comment lines that this module adds to a configuration


def rule_of(key: str) -> Rule:
    """The rule of a setting, from its dotted key without list indices. A setting without a rule is fixed."""
    parts = [part for part in key.split(".") if not part.isdecimal()]
    names = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((RULES[name] for name in names if name in RULES), Rule.FIXED)


@dataclass(frozen=True)
class Change:
    """A setting that differs between two configurations, with both values; None where the setting is absent."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {_shown(self.old)} -> {_shown(self.new)}"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def flat(settings: TrainSettings) -> dict[str, object]:
    """All settings by their dotted keys, such as `run.steps` or `data.0.path`."""

    def leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict) and key != "before":
            for name, part in value.items():
                yield from leaves(part, f"{key}.{name}" if key else name)
        elif isinstance(value, list) and any(isinstance(part, dict) for part in value):
            for number, part in enumerate(value):
                yield from leaves(part, f"{key}.{number}")
        else:
            yield key, value

    return dict(leaves(json.loads(settings.model_dump_json()), ""))


def differences(old: TrainSettings, new: TrainSettings) -> list[Change]:
    """The settings that differ between two configurations."""
    before, now = flat(old), flat(new)
    keys = [*now, *(key for key in before if key not in now)]
    changes = [Change(key, before.get(key), now.get(key)) for key in keys]
    return [change for change in changes if change.old != change.new]


def changes(folder: Path, settings: TrainSettings) -> list[Change]:
    """The settings that differ from those in a checkpoint.

    Raises
    ------
    CheckpointError
        If a setting may not change, or may only change if `run.change` names it, and it does not.
    ConfigError
        If `run.change` names something other than a setting with the rule NAMED.
    """
    before = begin(load_run(folder / CONFIG))
    if type(before) is not type(settings):
        got, expected = (
            "a pretraining run" if isinstance(one, PretrainSettings) else "a fine-tuning run"
            for one in (settings, before)
        )
        raise CheckpointError(folder, CONFIG, got, expected, _sentence(_OUT))
    named = settings.run.change
    _check_named(named, settings)
    found = differences(before, settings)
    fixed, unnamed = [], []
    for one in found:
        rule = rule_of(one.key)
        if rule is Rule.FIXED and not _loss_is_the_same(one.key, before, settings):
            fixed.append(one)
        elif rule is Rule.NAMED and not _loss_is_the_same(one.key, before, settings) and not _is_named(one.key, named):
            unnamed.append(one)
    if fixed:
        hint = f"Use the settings in the run's config.yaml, or {_OUT}"
        raise _refusal(folder, fixed, f"{_shown(fixed[0].old)}, as in the checkpoint", hint)
    if unnamed:
        step, words = facts(folder)["step"], ",".join([*named, *(one.key for one in unnamed)])
        hint = f"To use the new value from step {step} on, set run.change=[{words}]. Otherwise {_OUT}"
        raise _refusal(folder, unnamed, f"{_shown(unnamed[0].old)}, as in the checkpoint", hint)
    return found


def _refusal(folder: Path, refused: list[Change], expected: str, hint: str) -> CheckpointError:
    """One error for all of these changes: it describes the first in full and lists the others."""
    first, *others = refused
    if others:
        hint = f"Also changed: {'; '.join(map(str, others))}. {hint}"
    return CheckpointError(folder, first.key, _shown(first.new), expected, hint)


def _loss_is_the_same(key: str, old: TrainSettings, new: TrainSettings) -> bool:
    """Whether two values of a setting give the same loss."""
    if not (isinstance(old, PretrainSettings) and isinstance(new, PretrainSettings)):
        return False
    if key == "loss.sig_samples":
        return not (old.loss_weights[1] or new.loss_weights[1])
    return key in _LOSS_WEIGHTS and old.loss_weights == new.loss_weights


def _is_named(key: str, named: tuple[str, ...]) -> bool:
    """Whether `run.change` names a setting, or a section that contains it."""
    return any(f"{key}.".startswith(f"{name}.") for name in named)


def _check_named(named: tuple[str, ...], settings: TrainSettings) -> None:
    keys = [key for key in flat(settings) if rule_of(key) is Rule.NAMED]
    for name in named:
        if not any(_is_named(key, (name,)) for key in keys):
            hint = "Remove it from run.change, or correct its spelling"
            raise ConfigError("run.change", "", name, f"one of {', '.join(keys)}", hint)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def adopt(folder: Path, settings: S) -> S:
    """Return these settings with the samples per step and per SIG group of the run that is resumed, and its ZeRO stage.

    A SIG group is a number of consecutive samples of the stream, over which the SIG term is computed. If no group is
    split, the loss of a step depends only on its samples, not on how they are divided into processes and micro-batches.

    Parameters
    ----------
    folder : Path
        The checkpoint that the run is resumed from.
    settings : TrainSettings

    Raises
    ------
    CheckpointError
        If the samples per step are not a multiple of `run.batch` x processes, or a SIG group would be split. The error
        lists the values that work.
    """
    before = load_run(folder / CONFIG)
    if isinstance(settings, PretrainSettings) and isinstance(before, PretrainSettings):
        settings = _with_init(settings, before)
    begun_with = group_of(before)
    if begun_with is not None and group_of(settings) is not None:
        settings = _with_groups(settings, begun_with)
    if settings.zero.stage == AUTO:
        settings = _with_stage(settings, facts(folder)["zero_stage"])
    group = group_of(settings) or 1
    run = settings.run
    if run.batch % group:
        raise _undivided(folder, settings, group)
    accumulate = reshard.accumulate_for(folder, run.batch, run.processes)
    return settings.model_copy(update={"run": run.model_copy(update={"accumulate": accumulate})})


def _with_init(settings: S, before: PretrainSettings) -> S:
    """Return settings with the hash of the initial weights, which the run itself has set."""
    init = settings.init if isinstance(settings, PretrainSettings) else None
    if init is None or before.init is None or init.checksum is not None:
        return settings
    return settings.model_copy(update={"init": init.model_copy(update={"checksum": before.init.checksum})})


def group_of(settings: TrainSettings) -> int | None:
    """Samples in a SIG group; None if the loss has no SIG term."""
    if not isinstance(settings, PretrainSettings) or not settings.loss_weights[1]:
        return None
    return settings.loss.sig_samples or settings.run.batch


def begin(settings: S) -> S:
    """Return the settings of a new run, with the ZeRO stage and the samples per SIG group filled in."""
    settings = _with_stage(settings, settings.zero_stage)
    group = group_of(settings)
    return settings if group is None else _with_groups(settings, group)


def _with_groups(settings: S, samples: int) -> S:
    """Return settings with this number of samples per SIG group, unless they set one."""
    if not isinstance(settings, PretrainSettings) or settings.loss.sig_samples is not None:
        return settings
    loss = settings.loss.model_copy(update={"sig_samples": samples})
    return settings.model_copy(update={"loss": loss})


def _with_stage(settings: S, stage: int) -> S:
    """Return settings with this ZeRO stage."""
    return settings.model_copy(update={"zero": settings.zero.model_copy(update={"stage": stage})})


def _undivided(folder: Path, settings: TrainSettings, group: int) -> CheckpointError:
    """The error for a batch that splits SIG groups; it lists batches that do not."""
    run, total = settings.run, facts(folder)["global_batch"]

    def fitting(processes: int) -> list[int]:
        return [batch for batch in range(group, total + 1, group) if total % (batch * processes) == 0]

    if batches := fitting(run.processes):
        hint = f"Set run.batch to one of {', '.join(map(str, batches))}"
    else:
        pairs = [(count, fitting(count)[0]) for count in range(1, total + 1) if fitting(count)]
        words = ", ".join(f"run.processes={count} run.batch={batch}" for count, batch in pairs)
        hint = (
            f"The {total} samples per step in groups of {group} cannot be divided among {run.processes} processes. "
            f"Set {words}"
        )
    return CheckpointError(
        folder,
        "run.batch",
        f"{run.batch} samples",
        f"a multiple of {group}: the SIG term of this run is computed over groups of {group} samples",
        f"{hint}, or {_OUT}",
    )


def plan_of(folder: Path, per_epoch: int) -> StepPlan:
    """The plan of the run that wrote a checkpoint; an epoch has `per_epoch` samples."""
    about = facts(folder)
    if "plan" in about:
        try:
            return StepPlan.from_facts(about["plan"])
        except ValueError as error:
            raise CheckpointError(folder / "COMPLETE", "plan", error, "a plan of the run's steps") from None
    before = load_run(folder / CONFIG).run  # written by an earlier version
    changes = {"batch": about["global_batch"], "accumulate": 1}
    return StepPlan(before.model_copy(update=changes).steps_in_all(per_epoch, 1))


def extended(folder: Path, settings: TrainSettings, per_epoch: int, processes: int) -> StepPlan:
    """The plan of a run that is resumed from a checkpoint.

    Raises
    ------
    CheckpointError
        If the settings ask for fewer steps than planned, or for more without `run.extend`.
    """
    plan, run = plan_of(folder, per_epoch), settings.run
    asked, done = run.steps_in_all(per_epoch, processes), int(facts(folder)["step"])
    field = "run.epochs" if run.steps is None else "run.steps"
    got = f"{asked} steps" if run.steps is None else asked
    if asked < done:
        why = f"{plan.end}: the run has already done {done} steps"
        raise CheckpointError(folder, field, got, why, f"Set {field} for {plan.end} steps, or {_OUT}")
    if asked < plan.end:
        why = f"{plan.end}, as planned: the schedules of learning rate, weight decay and EMA momentum depend on it"
        hint = f"Keep {plan.end} steps and end the run earlier by run.max_seconds or a signal, or {_OUT}"
        raise CheckpointError(folder, field, got, why, hint)
    last = plan.extensions[-1][1] if plan.extensions else None
    if asked == plan.end:
        if run.extend is not None and last is not None and run.extend != last:
            why = f"{last}: the run was extended to {plan.end} steps with it"
            raise CheckpointError(folder, "run.extend", run.extend, why, f"Set run.extend={last}, or {_OUT}")
        return plan
    if run.extend is None:
        added = asked - plan.end
        hint = (
            "To extend the run, set run.extend=constant (keeps the last learning rate, weight decay and EMA momentum) "
            f"or run.extend=rewarm (new warm-up and cosine over the {added} added steps). Otherwise {_OUT}"
        )
        raise CheckpointError(folder, field, got, f"{plan.end}, as planned", hint)
    return StepPlan(plan.steps, (*plan.extensions, (asked, run.extend)))


def kept(folder: Path) -> dict[int, Path]:
    """The configurations in RUN/configs, by the step from which they apply, in ascending order."""
    found = ((_KEPT.fullmatch(path.name), path) for path in (folder / CONFIGS).glob("step-*.yaml"))
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def keep(folder: Path, text: str, begun: Path | None, told: list[str]) -> None:
    """Write a configuration to RUN/configs, unless it is the one in use.

    Parameters
    ----------
    folder : Path
        Folder of the run.
    text : str
        The merged configuration, as YAML.
    begun : Path, optional
        The checkpoint that the run is resumed from; None for a new run.
    told : list of str
        Descriptions of the changed settings, written as comments.
    """
    step = 0 if begun is None else int(facts(begun)["step"])
    own = kept(folder)
    if begun is not None and not own:
        for path in kept(begun.parents[1]).values():  # `begun` may be in the mirror
            write_atomically(folder / CONFIGS / path.name, path.read_text(encoding="utf-8"))
        if not kept(folder):  # an earlier version kept only the last configuration
            note = f"{_NOTE}in use at step {step}; its first step is not known\n"
            write_atomically(folder / CONFIGS / f"{tag(0)}.yaml", note + (begun / CONFIG).read_text(encoding="utf-8"))
        own = kept(folder)
    before = [path for first, path in own.items() if first <= step]
    is_new = not before or _without_notes(before[-1].read_text(encoding="utf-8")) != text
    for first, path in own.items():
        if first > step or (first == step and is_new):  # its steps were lost and are now trained again
            numbers = [int(one.name.split(".")[1]) for one in path.parent.glob(f"{path.stem}.[0-9]*.yaml")]
            path.rename(path.with_name(f"{path.stem}.{max(numbers, default=0) + 1}.yaml"))
    if not is_new:
        return
    notes = [f"from step {step} on", *told] if begun is not None else []
    write_atomically(folder / CONFIGS / f"{tag(step)}.yaml", "".join(f"{_NOTE}{note}\n" for note in notes) + text)


def _without_notes(text: str) -> str:
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith(_NOTE))
