"""Runs that are resumed with other settings: what may change, what needs a word, what is refused."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.commands import Command
from helpers.conversions import edited
from helpers.training import losses, metrics, pretrain, settings_of
from launchers.run_setup import prepare_run
from shards.core.errors import UserError
from shards.core.settings import check
from shards.format import layout
from shards.format.reader import Dataset
from slim.checkpoints import checkpoint, run_folder
from slim.checkpoints.checkpoint import COMPLETE, CheckpointError
from slim.config import EmaSettings, FinetuneSettings, OptimizerSettings, PretrainSettings, load_config, load_run
from slim.pretrain.task import PretrainTask
from slim.training import compatibility, schedule
from slim.training.compatibility import Rule, rule_of
from slim.training.schedule import StepPlan

QUICK = ("run.batch=2", "run.workers=1", "run.wandb=disabled")


def save(settings: PretrainSettings, step: int) -> Path:
    """A checkpoint of a run that was prepared, as far as `prepare_run` looks at it."""
    run = Path(settings.run.out)
    folder = run / "checkpoints" / checkpoint.tag(step)
    folder.mkdir(parents=True)
    for name in run_folder.ABOUT_RUN:
        shutil.copyfile(run / name, folder / name)
    written = load_run(run / "config.yaml")
    task = PretrainTask(written)
    before = checkpoint.newest(run / "checkpoints")
    plan = StepPlan(written.run.steps_in_all(task.stream.per_epoch, written.run.processes))
    if before is not None:
        plan = compatibility.extended(before, written, task.stream.per_epoch, written.run.processes)
    origin = task.origin(written.run.processes)
    checkpoint.seal(folder, {"step": step, **origin.facts(), "plan": plan.facts()})
    (folder.parent / "latest").write_text(f"{folder.name}\n")
    return folder


@pytest.fixture
def begun(dataset: Path, tmp_path: Path) -> Path:
    """A run of six steps that was saved at its end, as far as `prepare_run` looks at it."""
    settings = settings_of(dataset, tmp_path / "run")
    prepare_run(settings)
    save(settings, 6)
    return tmp_path / "run"


def earlier(folder: Path, **facts: Any) -> None:
    """Make a checkpoint one of an earlier version, which did not write down its plan and its data."""
    about = checkpoint.facts(folder)
    for name in ("plan", "data", "seal", "world_size", "versions", "files", "sha256"):
        about.pop(name)
    (folder / COMPLETE).unlink()
    checkpoint.seal(folder, about | facts)


# the table


@pytest.mark.parametrize("kind", [PretrainSettings, FinetuneSettings])
def test_every_setting_has_a_rule(kind: type) -> None:
    tree: dict[str, Any] = {"data": "DATASET", "model": load_config("configs/pretrain/tiny.yaml").model.model_dump()}
    keys = compatibility.flat(check(kind, tree | {"run": {"out": "run"}}, "test"))
    missing = [
        key for key in keys if not any(f"{key}.".startswith(f"{name}.") for name in {*compatibility.RULES, "data"})
    ]
    assert missing == []
    assert "run" not in compatibility.RULES and "zero" not in compatibility.RULES  # a new setting has to be decided on


def test_the_longest_name_decides() -> None:
    assert rule_of("data.3.path") is Rule.FREE and rule_of("data.3.weight") is Rule.FIXED
    assert rule_of("optimizer.lr") is Rule.NAMED and rule_of("head.layer_decay") is Rule.NAMED
    assert rule_of("head.pooling") is Rule.FIXED and rule_of("run.new") is Rule.FIXED


@pytest.mark.parametrize(
    "word",
    [
        "run.workers=2",
        "run.max_seconds=100",
        "run.checkpoint_every=2",
        "run.keep=1",
        "run.wandb=offline",
        "run.device=cpu",
        "chunk_tokens=64",
        "run.log_every=2",
        "loss.jepa=1.0",  # what the objective has anyway
    ],
)
def test_what_may_change_is_told_and_kept(begun: Path, dataset: Path, word: str, capsys) -> None:
    first = (begun / "configs/step-00000000.yaml").read_text()
    assert (begun / "config.yaml").read_text() == first
    prepare_run(settings_of(dataset, begun, word))
    key, _, value = word.partition("=")
    old = compatibility.flat(load_run(begun / "configs/step-00000000.yaml"))[key]
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("changed: ")]
    assert line.startswith(f"changed: {key}: {compatibility._shown(old)} -> {value}")
    kept = (begun / "configs/step-00000006.yaml").read_text()
    assert f"# resumed: {line.removeprefix('changed: ')}\n" in kept and "# resumed: from step 6 on\n" in kept
    assert kept.endswith((begun / "config.yaml").read_text())
    assert (begun / "configs/step-00000000.yaml").read_text() == first

    prepare_run(settings_of(dataset, begun, word))  # nothing is new but to what the checkpoint holds
    assert sorted(path.name for path in (begun / "configs").iterdir()) == ["step-00000000.yaml", "step-00000006.yaml"]


@pytest.mark.parametrize(
    "word",
    [
        "optimizer.lr=0.03",
        "optimizer.betas=[0.9,0.999]",
        "optimizer.wd=[0.1,0.1]",
        "optimizer.warmup=0.5",
        "precision=bf16",
        "mask.targets=0.5",
        "mask.kinds=[cross_time]",
        "windows.best=16",
        "ema.start=0.9",
        "loss.sig_samples=1",
    ],
)
def test_what_may_change_by_its_name_is_refused_without(begun: Path, dataset: Path, word: str, capsys) -> None:
    before = (begun / "config.yaml").read_text()
    key, _, new = word.partition("=")
    old = compatibility._shown(compatibility.flat(load_run(begun / "config.yaml"))[key])
    with pytest.raises(CheckpointError) as told:
        prepare_run(settings_of(dataset, begun, word))
    line = told.value.line()
    shown = json.dumps(["cross_time"]) if key == "mask.kinds" else new.replace(",", ", ")
    assert f"{key}: got {shown}, expected {old}" in line
    assert f"run.change=[{key}]" in line and "another run.out" in line and "\n" not in line
    assert (begun / "config.yaml").read_text() == before and len(list((begun / "configs").iterdir())) == 1

    prepare_run(settings_of(dataset, begun, word, f"run.change=[{key}]"))
    assert f"changed: {key}: {old} -> " in capsys.readouterr().out
    prepare_run(settings_of(dataset, begun, word, f"run.change=[{key.split('.')[0]}]"))  # its section


def test_all_that_is_refused_is_in_one_line(begun: Path, dataset: Path) -> None:
    words = ("optimizer.lr=0.03", "mask.targets=0.5", "run.change=[mask.rebuilt]")
    with pytest.raises(CheckpointError, match=r"Also changed: optimizer\.lr: 0\.003 -> 0\.03|mask\.targets") as told:
        prepare_run(settings_of(dataset, begun, *words))
    assert "run.change=[mask.rebuilt," in told.value.line()
    for words in ("run.change=[run.seed]", "run.change=run.seed"):
        with pytest.raises(UserError, match=r"run\.change: got run\.seed, expected one of windows\.best, optim"):
            prepare_run(settings_of(dataset, begun, words))


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("run.seed=1", "run.seed: got 1, expected 0"),
        ("view=both", "view: got both, expected voxel"),
        ("objective=jepa", "objective: got jepa, expected default"),
        ("loss.sig=0.5", "loss.sig: got 0.5, expected null"),
        ("zero.stage=1", "zero.stage: got 1, expected 0"),
        ("windows.k=4", "windows.k: got 4, expected 8"),
        ("run.batch=3", "run.batch: got 3 samples, expected a multiple of 2"),
        ("run.batch=4", "run.batch"),
    ],
)
def test_what_the_run_depends_on_is_refused_by_its_name(begun: Path, dataset: Path, word: str, told: str) -> None:
    before = (begun / "config.yaml").read_text()
    with pytest.raises(CheckpointError) as refused:
        prepare_run(settings_of(dataset, begun, word))
    line = refused.value.line()
    assert told in line and "another run.out" in line and "\n" not in line
    assert (begun / "config.yaml").read_text() == before


def test_a_configuration_of_which_nothing_was_saved_is_kept_too(begun: Path, dataset: Path) -> None:
    for workers in (2, 3, 4):
        prepare_run(settings_of(dataset, begun, f"run.workers={workers}"))
    names = [f"step-00000006{part}.yaml" for part in (".1", ".2", "")]
    found = [load_run(begun / "configs" / name).run.workers for name in names]
    assert found == [2, 3, 4] and load_run(begun / "configs/step-00000000.yaml").run.workers == 1


def test_going_on_from_an_earlier_checkpoint_or_from_the_mirror(begun: Path, dataset: Path, tmp_path: Path) -> None:
    save(settings_of(dataset, begun), 4)
    prepare_run(settings_of(dataset, begun, "run.workers=2"))
    later = (begun / "configs/step-00000006.yaml").read_text()
    shutil.copytree(begun, tmp_path / "mirror")
    shutil.rmtree(begun / "checkpoints/step-00000006")
    prepare_run(settings_of(dataset, begun, "run.workers=3"))
    assert [load_run(path).run.workers for path in compatibility.kept(begun).values()] == [1, 3]
    assert (begun / "configs/step-00000006.1.yaml").read_text() == later

    shutil.rmtree(begun)
    prepare_run(settings_of(dataset, begun, "run.workers=4", f"run.mirror={tmp_path / 'mirror'}"))
    assert [load_run(path).run.workers for path in compatibility.kept(begun).values()] == [1, 4]
    assert (begun / "configs/step-00000006.1.yaml").read_text() == later


# steps beyond the planned ones, and fewer


def test_an_extension_goes_on_at_the_last_values_or_warms_up_again() -> None:
    lr, ema = OptimizerSettings(), EmaSettings()

    def values(plan: StepPlan) -> list[tuple[float, ...]]:
        places = [plan.place(step) for step in range(plan.end)]
        return [
            (schedule.learning_rate(*p, lr), schedule.weight_decay(*p, lr), schedule.ema_momentum(*p, ema))
            for p in places
        ]

    planned = values(StepPlan(20))
    assert planned == [
        (schedule.learning_rate(s, 20, lr), schedule.weight_decay(s, 20, lr), schedule.ema_momentum(s, 20, ema))
        for s in range(20)
    ]
    assert values(StepPlan(20, ((30, "constant"),))) == planned + 10 * [planned[-1]]
    ten = values(StepPlan(10))
    assert values(StepPlan(20, ((30, "rewarm"), (35, "constant")))) == planned + ten + 5 * [ten[-1]]
    assert values(StepPlan(20, ((30, "constant"), (40, "rewarm")))) == planned + 10 * [planned[-1]] + ten


@given(st.integers(1, 9), st.lists(st.tuples(st.integers(1, 9), st.sampled_from(["constant", "rewarm"])), max_size=4))
def test_a_plan_has_a_place_for_every_step_and_is_read_back(steps: int, added: list[tuple[int, str]]) -> None:
    ends, extensions = steps, []
    for more, how in added:
        ends += more
        extensions.append((ends, how))
    plan = StepPlan(steps, tuple(extensions))
    assert plan.end == ends and StepPlan.from_facts(json.loads(json.dumps(plan.facts()))) == plan
    for step in range(ends):
        at, of = plan.place(step)
        assert 0 <= at < of


@pytest.mark.parametrize(
    "tree",
    [
        None,
        {},
        {"steps": 6},
        {"steps": 6, "extensions": [[3, "constant"]]},
        6,
        {"steps": 6, "extensions": [[9, "x"]]},
        {"steps": "a", "extensions": []},
    ],
)
def test_what_is_no_plan_is_told(tree: Any) -> None:
    with pytest.raises(ValueError, match=r"an invalid plan|invalid literal"):
        StepPlan.from_facts(tree)


def test_more_steps_than_planned_need_a_word(begun: Path, dataset: Path, capsys) -> None:
    with pytest.raises(CheckpointError) as told:
        prepare_run(settings_of(dataset, begun, "run.steps=12"))
    line = told.value.line()
    assert "run.steps: got 12, expected 6" in line and "run.extend=constant" in line and "run.extend=rewarm" in line
    assert load_run(begun / "config.yaml").run.steps == 6
    with pytest.raises(CheckpointError, match=r"run\.epochs: got 14 steps, expected 6"):
        prepare_run(settings_of(dataset, begun, "run.steps=null", "run.epochs=7"))

    extended = settings_of(dataset, begun, "run.steps=12", "run.extend=constant")
    prepare_run(extended)
    assert "changed: run.steps: 6 -> 12" in capsys.readouterr().out
    save(extended, 9)
    for words in (("run.steps=12",), ("run.steps=12", "run.extend=constant")):  # it is planned now
        prepare_run(settings_of(dataset, begun, *words))
    with pytest.raises(CheckpointError, match=r"run\.extend: got rewarm, expected constant"):
        prepare_run(settings_of(dataset, begun, "run.steps=12", "run.extend=rewarm"))
    again = settings_of(dataset, begun, "run.steps=20", "run.extend=rewarm")
    prepare_run(again)
    plan = compatibility.plan_of(save(again, 15), 4)
    assert plan == StepPlan(6, ((12, "constant"), (20, "rewarm")))


@pytest.mark.parametrize(("asked", "told"), [(3, "the run has already done 6 steps"), (8, "as planned")])
def test_fewer_steps_are_refused(dataset: Path, tmp_path: Path, asked: int, told: str) -> None:
    settings = settings_of(dataset, tmp_path / "run", "run.steps=10")
    prepare_run(settings)
    save(settings, 6)
    with pytest.raises(CheckpointError, match=told):
        prepare_run(settings_of(dataset, tmp_path / "run", f"run.steps={asked}"))


def test_a_checkpoint_of_an_earlier_version_has_the_plan_of_its_configuration(
    begun: Path, dataset: Path, capsys
) -> None:
    folder = begun / "checkpoints/step-00000006"
    shutil.rmtree(begun / "configs")
    text = (folder / "config.yaml").read_text()
    lines = [line for line in text.splitlines() if "extend:" not in line and "change:" not in line]
    text = "\n".join(lines).replace("sig_samples: 2", "sig_samples: null") + "\n"
    for path in (folder, begun):
        (path / "config.yaml").write_text(text)
    earlier(folder)
    prepare_run(settings_of(dataset, begun))
    out = capsys.readouterr().out
    assert f"so changes of {dataset} since then cannot be detected" in out and "changed: " not in out
    kept = (begun / "configs/step-00000000.yaml").read_text()
    assert kept.endswith(text) and "not known" in kept
    with pytest.raises(CheckpointError, match=r"run\.extend=constant"):
        prepare_run(settings_of(dataset, begun, "run.steps=7"))


def test_a_finished_run_is_extended_without_a_jump(command: Command, dataset: Path, tmp_path: Path) -> None:
    out, words = tmp_path / "run", ("optimizer.lr_end=1e-4",)
    assert pretrain(command, dataset, out, *words, processes=1, steps=3).returncode == 0
    first = metrics(out)
    done = pretrain(command, dataset, out, *words, processes=1, steps=5)
    assert done.returncode == 2 and "run.extend=rewarm" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and metrics(out) == first
    done = pretrain(command, dataset, out, *words, processes=1, steps=2)
    assert done.returncode == 2 and "the run has already done 3 steps" in done.stderr
    done = pretrain(command, dataset, out, *words, "run.extend=constant", "--json", processes=1, steps=5)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["finished"] and facts["step"] == facts["steps"] == 5
    lines = metrics(out)
    assert lines[:3] == first
    for name in ("lr", "wd", "ema"):
        assert [line[name] for line in lines[3:]] == 2 * [first[-1][name]]
    folder = checkpoint.newest(out / "checkpoints")
    assert checkpoint.facts(folder)["plan"] == {"steps": 3, "extensions": [[5, "constant"]]}
    assert sorted(path.name for path in (out / "configs").iterdir()) == ["step-00000000.yaml", "step-00000003.yaml"]


# what is resumed from


def converted(dataset: Path, to: Path, **manifest: Any) -> Path:
    return edited(dataset, to, lambda session: [session], **manifest)


def other_shards(dataset: Path, split: str) -> list[dict[str, Any]]:
    return [
        shard | ({"sha256": shard["sha256"][::-1]} if shard["name"].startswith(split) else {})
        for shard in layout.read_manifest(dataset)["shards"]
    ]


def test_a_dataset_may_move_but_not_change(begun: Path, dataset: Path, tmp_path: Path, capsys) -> None:
    moved = converted(dataset, tmp_path / "moved")
    prepare_run(settings_of(moved, begun))
    assert f"changed: data.0.path: {dataset} -> {moved}" in capsys.readouterr().out
    before = (begun / "config.yaml").read_text()

    again = converted(dataset, tmp_path / "again", shards=other_shards(dataset, "train"))
    with pytest.raises(CheckpointError, match=r"shards: got hash .* The dataset was converted again") as told:
        prepare_run(settings_of(again, begun))
    assert told.value.where == str(again)
    other = converted(dataset, tmp_path / "other", configuration_hash="f" * 64)
    with pytest.raises(CheckpointError, match=r"configuration: got hash ffffffffffff, .* with other settings"):
        prepare_run(settings_of(other, begun))

    def more(session: dict[str, Any]) -> list[dict[str, Any]]:
        return [session, session | {"key": f"new_{session['key']}"}]

    grown, count = edited(dataset, tmp_path / "grown", more), len(Dataset(dataset).of_split("train"))
    with pytest.raises(CheckpointError, match=f"sessions: got {2 * count} training sessions, expected {count}") as told:
        prepare_run(settings_of(grown, begun))
    assert f"{count} sessions were added, which changes the order of samples" in told.value.line()
    assert (begun / "config.yaml").read_text() == before

    tested = converted(dataset, tmp_path / "tested", shards=other_shards(dataset, "test"))
    prepare_run(settings_of(tested, begun))  # nothing that is trained on


# SIG groups


@pytest.mark.parametrize("seed", range(3))
def test_sig_groups_are_those_of_the_start_however_a_step_is_divided(dataset: Path, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    group, total = rng.choice([1, 2, 4]), 8
    first = settings_of(dataset, tmp_path / "run", f"run.batch={group}", f"run.accumulate={total // group}")
    prepare_run(first)
    folder = save(first, 2)
    for processes in (1, 2, 4, 8):
        for batch in (1, 2, 4, 8):
            words = (f"run.batch={batch}", f"run.processes={processes}")
            if total % (batch * processes):
                continue
            if batch % group:
                with pytest.raises(
                    CheckpointError, match=f"run.batch: got {batch} samples, expected a multiple of"
                ) as e:
                    prepare_run(settings_of(dataset, tmp_path / "run", *words))
                assert ("Set run.batch to one of" in e.value.line()) == (total % (processes * group) == 0)
            else:
                prepare_run(settings_of(dataset, tmp_path / "run", *words))
                assert load_run(tmp_path / "run/config.yaml").loss.sig_samples == group
    assert compatibility.adopt(folder, first).loss.sig_samples == group


def test_another_division_of_a_step_has_the_same_losses(command: Command, dataset: Path, tmp_path: Path) -> None:
    """Two processes of one sample, then one of two: SIG groups stay those of one sample."""
    null = "loss.sig_samples=null"
    words = {"two": ("run.batch=1", null), "one": ("run.batch=2", null)}
    whole, out = tmp_path / "whole", tmp_path / "run"
    done = pretrain(command, dataset, whole, *words["two"], steps=4)
    assert done.returncode == 0, done.stderr
    done = pretrain(command, dataset, out, *words["two"], "run.max_seconds=0.01", steps=4)
    assert done.returncode == 3, done.stderr
    done = pretrain(command, dataset, out, *words["one"], processes=1, steps=4)
    assert done.returncode == 0, done.stderr
    assert losses(out) == pytest.approx(losses(whole), rel=1e-5)
