"""What a run may be resumed with: the settings that may change, those that need a word, those that may not.

`RULES` is the whole of it. A run is compared with the configuration in the checkpoint that it is resumed from.

    RUN/configs/step-00000000.yaml   the configuration it was begun with
                step-00000006.yaml   the one it was resumed with from step 6 on, if anything in it was new
                step-00000006.1.yaml an earlier one from step 6 on, of whose steps nothing is left
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
from slim.config import PretrainSettings, TrainSettings, load_run
from slim.training import reshard
from slim.training.schedule import Plan

S = TypeVar("S", bound=TrainSettings)


class Rule(Enum):
    """What happens to a run that is resumed with another value of a setting."""

    FREE = "it may change; it is told and recorded"
    STEPS = "`extended` decides: a run ends where it was planned to, unless run.extend says how it goes on"
    NAMED = "it may change where run.change names it"
    FIXED = "it is refused: what was learned, or the order of samples, depends on it"


# The longest key that begins a setting's counts.
RULES: dict[str, Rule] = {
    "data": Rule.FIXED,
    "data.path": Rule.FREE,  # the content is compared in `slim.training.origin`
    "model": Rule.FIXED,
    "model_name": Rule.FREE,
    "view": Rule.FIXED,
    "windows.k": Rule.FIXED,
    "windows.best": Rule.NAMED,
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
    "run.batch": Rule.FREE,  # these three: `adopt` keeps samples per step, and SIG groups
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
    # of a pretraining
    "mask": Rule.NAMED,
    "objective": Rule.FIXED,  # these four: only where the weights of the terms change
    "loss.jepa": Rule.FIXED,
    "loss.sig": Rule.FIXED,
    "loss.mae": Rule.FIXED,
    "loss.sig_samples": Rule.NAMED,
    "ema": Rule.NAMED,
    # of a fine-tuning
    "head": Rule.FIXED,
    "head.layer_decay": Rule.NAMED,
    "head.lr_scale": Rule.NAMED,
    "start": Rule.FIXED,
    "answer": Rule.FIXED,
    "before": Rule.FREE,  # what is told of the weights; `start` is their hash
}
_WEIGHTS = ("objective", "loss.jepa", "loss.sig", "loss.mae")
_OUT = "use another run.out"
_KEPT = re.compile(r"step-([0-9]{8})\.yaml")
_NOTE = "# resumed: "  # before lines that only a kept configuration has


def rule_of(key: str) -> Rule:
    """The rule of a setting, by its dotted key; numbers of items are passed over. What has no rule is fixed."""
    parts = [part for part in key.split(".") if not part.isdecimal()]
    names = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((RULES[name] for name in names if name in RULES), Rule.FIXED)


@dataclass(frozen=True)
class Change:
    """A setting in which two configurations differ, and both values; None for one that is not there."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {_word(self.old)} -> {_word(self.new)}"


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def flat(settings: TrainSettings) -> dict[str, Any]:
    """All settings by dotted key: `run.steps`, `data.0.path`."""

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
    """The settings in which two configurations differ."""
    before, now = flat(old), flat(new)
    keys = [*now, *(key for key in before if key not in now)]
    changes = [Change(key, before.get(key), now.get(key)) for key in keys]
    return [change for change in changes if change.old != change.new]


def changes(folder: Path, settings: TrainSettings) -> list[Change]:
    """What is new in these settings since a checkpoint was written.

    Raises
    ------
    CheckpointError
        If a setting may not change, or needs a word that is not said.
    ConfigError
        If `run.change` names what cannot be changed by it.
    """
    before = begin(load_run(folder / CONFIG))
    if type(before) is not type(settings):
        got, expected = (
            "a pretraining" if isinstance(one, PretrainSettings) else "a fine-tuning" for one in (settings, before)
        )
        raise CheckpointError(folder, CONFIG, got, expected, _sentence(_OUT))
    named = settings.run.change
    _check_named(named, settings)
    found = differences(before, settings)
    fixed, unnamed = [], []
    for one in found:
        rule = rule_of(one.key)
        if rule is Rule.FIXED and not _means_the_same(one.key, before, settings):
            fixed.append(one)
        elif rule is Rule.NAMED and not _means_the_same(one.key, before, settings) and not _is_named(one.key, named):
            unnamed.append(one)
    if fixed:
        hint = f"Use the settings in the run's config.yaml, or {_OUT}"
        raise _refusal(folder, fixed, f"{_word(fixed[0].old)}, as the run was trained with", hint)
    if unnamed:
        step, words = facts(folder)["step"], ",".join([*named, *(one.key for one in unnamed)])
        hint = f"Set run.change=[{words}] to change it from step {step} on, or {_OUT}"
        raise _refusal(folder, unnamed, f"{_word(unnamed[0].old)}, as the run was trained with", hint)
    return found


def _refusal(folder: Path, refused: list[Change], expected: str, hint: str) -> CheckpointError:
    """One line for all of them: the first as what was got and expected, the others behind it."""
    first, *others = refused
    if others:
        hint = f"Also changed: {'; '.join(map(str, others))}. {hint}"
    return CheckpointError(folder, first.key, _word(first.new), expected, hint)


def _means_the_same(key: str, old: TrainSettings, new: TrainSettings) -> bool:
    """Whether a setting of the loss has another value and yet the loss is the same."""
    if not (isinstance(old, PretrainSettings) and isinstance(new, PretrainSettings)):
        return False
    if key == "loss.sig_samples":
        return not (old.loss_weights[1] or new.loss_weights[1])
    return key in _WEIGHTS and old.loss_weights == new.loss_weights


def _is_named(key: str, named: tuple[str, ...]) -> bool:
    """Whether `run.change` has a key, or a section that it is in."""
    return any(f"{key}.".startswith(f"{name}.") for name in named)


def _check_named(named: tuple[str, ...], settings: TrainSettings) -> None:
    keys = [key for key in flat(settings) if rule_of(key) is Rule.NAMED]
    for name in named:
        if not any(_is_named(key, (name,)) for key in keys):
            raise ConfigError("run.change", "", name, f"settings among {', '.join(keys)}", "Correct run.change")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def adopt(folder: Path, settings: S) -> S:
    """These settings with what belongs to the run: samples per step and the samples of a SIG group.

    A SIG group is so many samples in a row, in the order of the stream. As long as no group is divided, the loss of a
    step depends on its samples alone, and not on how they are spread over processes and micro-batches.

    Parameters
    ----------
    folder : Path
        The checkpoint that the run is resumed from.
    settings : TrainSettings

    Raises
    ------
    CheckpointError
        If `run.batch` and the number of processes do not allow it; with those that do.
    """
    begun_with = group_of(load_run(folder / CONFIG))
    if begun_with is not None and group_of(settings) is not None:
        settings = _with_groups(settings, begun_with)
    group = group_of(settings) or 1
    run = settings.run
    if run.batch % group:
        raise _undivided(folder, settings, group)
    accumulate = reshard.accumulate_for(folder, run.batch, run.processes)
    return settings.model_copy(update={"run": run.model_copy(update={"accumulate": accumulate})})


def group_of(settings: TrainSettings) -> int | None:
    """Samples of a SIG group; None without SIG."""
    if not isinstance(settings, PretrainSettings) or not settings.loss_weights[1]:
        return None
    return settings.loss.sig_samples or settings.run.batch


def begin(settings: S) -> S:
    """Settings of a new run, with the samples of its SIG groups."""
    group = group_of(settings)
    return settings if group is None else _with_groups(settings, group)


def _with_groups(settings: S, samples: int) -> S:
    """Settings with so many samples in a SIG group, unless they say how many."""
    if not isinstance(settings, PretrainSettings) or settings.loss.sig_samples is not None:
        return settings
    loss = settings.loss.model_copy(update={"sig_samples": samples})
    return settings.model_copy(update={"loss": loss})


def _undivided(folder: Path, settings: TrainSettings, group: int) -> CheckpointError:
    """The refusal of a batch that would divide SIG groups, with what would not."""
    run, total = settings.run, facts(folder)["global_batch"]

    def fitting(processes: int) -> list[int]:
        return [batch for batch in range(group, total + 1, group) if total % (batch * processes) == 0]

    if batches := fitting(run.processes):
        hint = f"Set run.batch to one of {', '.join(map(str, batches))}"
    else:
        pairs = [(count, fitting(count)[0]) for count in range(1, total + 1) if fitting(count)]
        words = ", ".join(f"run.processes={count} run.batch={batch}" for count, batch in pairs)
        hint = f"{run.processes} processes cannot share {total} samples per step in groups of {group}. Set {words}"
    return CheckpointError(
        folder,
        "run.batch",
        f"{run.batch} samples",
        f"a multiple of {group}: the SIG term of this run is computed over groups of {group} samples",
        f"{hint}, or {_OUT}",
    )


def plan_of(folder: Path, per_epoch: int) -> Plan:
    """The plan of the run that wrote a checkpoint; `per_epoch` samples are an epoch."""
    about = facts(folder)
    if "plan" in about:
        try:
            return Plan.from_facts(about["plan"])
        except ValueError as error:
            raise CheckpointError(folder / "COMPLETE", "plan", error, "the steps of the run") from None
    before = load_run(folder / CONFIG).run  # written by an earlier version
    changes = {"batch": about["global_batch"], "accumulate": 1}
    return Plan(before.model_copy(update=changes).steps_in_all(per_epoch, 1))


def extended(folder: Path, settings: TrainSettings, per_epoch: int, processes: int) -> Plan:
    """The plan of a run that is resumed from a checkpoint.

    Raises
    ------
    CheckpointError
        If other steps are asked for than were planned, without `run.extend`, or fewer.
    """
    plan, run = plan_of(folder, per_epoch), settings.run
    asked, done = run.steps_in_all(per_epoch, processes), int(facts(folder)["step"])
    field = "run.epochs" if run.steps is None else "run.steps"
    got = f"{asked} steps" if run.steps is None else asked
    if asked < done:
        why = f"{plan.end}: the run has {done} steps, {asked} were asked for"
        raise CheckpointError(folder, field, got, why, f"Ask for {plan.end}, or {_OUT}")
    if asked < plan.end:
        why = f"{plan.end}, as planned: learning rate, weight decay and EMA momentum follow it"
        hint = f"Ask for {plan.end} and end the run earlier by run.max_seconds or a signal, or {_OUT}"
        raise CheckpointError(folder, field, got, why, hint)
    last = plan.extensions[-1][1] if plan.extensions else None
    if asked == plan.end:
        if run.extend is not None and last is not None and run.extend != last:
            why = f"{last}, by which the run was extended to {plan.end} steps"
            raise CheckpointError(folder, "run.extend", run.extend, why, f"Leave it as it is, or {_OUT}")
        return plan
    if run.extend is None:
        added = asked - plan.end
        hint = (
            "Set run.extend=constant (the last learning rate, weight decay and EMA momentum) or run.extend=rewarm "
            f"(a new warm-up and cosine over the {added} added steps), or {_OUT}"
        )
        raise CheckpointError(folder, field, got, f"{plan.end}, as planned", hint)
    return Plan(plan.steps, (*plan.extensions, (asked, run.extend)))


def kept(folder: Path) -> dict[int, Path]:
    """The configurations that a run keeps, by the step they were used from, ascending."""
    found = ((_KEPT.fullmatch(path.name), path) for path in (folder / CONFIGS).glob("step-*.yaml"))
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def keep(folder: Path, text: str, begun: Path | None, told: list[str]) -> None:
    """Keep a configuration in RUN/configs, unless the run has been going on with it.

    Parameters
    ----------
    folder : Path
        The run.
    text : str
        Of the merged configuration.
    begun : Path, optional
        The checkpoint that the run is resumed from; None where it begins.
    told : list of str
        What has changed.
    """
    step = 0 if begun is None else int(facts(begun)["step"])
    own = kept(folder)
    if begun is not None and not own:
        for path in kept(begun.parents[1]).values():  # of the mirror
            write_atomically(folder / CONFIGS / path.name, path.read_text(encoding="utf-8"))
        if not kept(folder):  # an earlier version kept the last one only
            note = f"{_NOTE}kept at step {step}; the first step it was used in is not known\n"
            write_atomically(folder / CONFIGS / f"{tag(0)}.yaml", note + (begun / CONFIG).read_text(encoding="utf-8"))
        own = kept(folder)
    before = [path for first, path in own.items() if first <= step]
    is_new = not before or _without_notes(before[-1].read_text(encoding="utf-8")) != text
    for first, path in own.items():
        if first > step or (first == step and is_new):  # the steps it was used for are done again now
            numbers = [int(one.name.split(".")[1]) for one in path.parent.glob(f"{path.stem}.[0-9]*.yaml")]
            path.rename(path.with_name(f"{path.stem}.{max(numbers, default=0) + 1}.yaml"))
    if not is_new:
        return
    notes = [f"from step {step} on", *told] if begun is not None else []
    write_atomically(folder / CONFIGS / f"{tag(step)}.yaml", "".join(f"{_NOTE}{note}\n" for note in notes) + text)


def _without_notes(text: str) -> str:
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith(_NOTE))
