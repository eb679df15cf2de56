"""Fine-tuning of a part of the encoder: frozen stages, and low-rank updates beside what `peft` itself makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from helpers.finetuning import QUICK, SCORE, finetune
from helpers.pretrained import STRADDLING, tool, write_run
from launchers import local
from launchers.run_setup import prepare_run
from shards.core.errors import ConfigError
from shards.core.settings import check
from shards.format.reader import Dataset
from slim.checkpoints import checkpoint, start
from slim.checkpoints.weights import ADAPTER, MODEL
from slim.config import FinetuneSettings
from slim.evaluation.division import make_splits
from slim.evaluation.probe import make_fold
from slim.evaluation.task import Task, find_cases
from slim.finetune.labels import Answers
from slim.finetune.method import Finetuned, settings_for
from slim.finetune.task import FinetuneLearner, FinetuneTask, count_trained
from slim.inference import export
from slim.inference.slim_brain import SlimBrain
from slim.model import lora
from slim.training.task import Losses

needs_peft = pytest.mark.skipif(
    find_spec("peft") is None, reason="peft is not installed: pip install 'slim-brain[lora]'"
)


@pytest.fixture(scope="module")
def deep(people: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three stages, two of them local."""
    return write_run(tmp_path_factory.mktemp("deep") / "run", people, STRADDLING)


def learner_of(deep: Path, people: Path, out: Path, *words: str) -> tuple[FinetuneTask, FinetuneLearner]:
    ours, opened = SlimBrain.from_pretrained(deep), Dataset(people)
    settings = settings_for(ours, str(people), out, 6, [*QUICK, "head.pooling=attentive", *words], 0)
    rows = [(n, n / 5 - 1) for n in range(len(opened.sessions))]
    keys = [session.key for session in opened.sessions]
    out.mkdir(parents=True, exist_ok=True)
    sides = (dict(zip(part, rows, strict=False)) for part in (keys[:6], keys[6:8]))
    Answers(0, *sides).write(out)
    task = FinetuneTask(settings.model_copy(update={"start": start.write(out, ours.encoder.state_dict())}))
    return task, task.learner(torch.device("cpu"))


def steps(task: FinetuneTask, learner: FinetuneLearner, rate: Callable[[Any], float]) -> list[Losses]:
    """Losses of three steps with a learning rate for each group."""
    batch = task.load()([task.stream.at(n) for n in range(3)]).to("cpu")
    learner.begin(lambda _: [batch], learner.model)
    groups = [{"params": group.parameters, "lr": rate(group)} for group in learner.groups()]
    adam = torch.optim.AdamW(groups, weight_decay=0.05)
    found = []
    for step in range(3):
        found.append(learner.losses(batch, step, learner.model))
        found[-1].total.backward()
        adam.step()
        adam.zero_grad()
    return found


# frozen stages


@pytest.mark.parametrize("chunk", ["null", "64"])
@pytest.mark.parametrize("frozen", [1, 2, 3])
def test_frozen_stages_are_as_with_a_learning_rate_of_0(
    deep: Path, people: Path, tmp_path: Path, frozen: int, chunk: str
) -> None:
    """Losses and weights to the last bit; with one chunk and with many, with the local stages frozen and not."""
    words = (f"chunk_tokens={chunk}", "head.layer_decay=null")
    task, whole = learner_of(deep, people, tmp_path / "whole", *words)
    before = {name: value.clone() for name, value in whole.model.named_parameters()}
    part_task, part = learner_of(deep, people, tmp_path / "part", *words, f"freeze={frozen}")
    fixed = {name for name, value in part.model.named_parameters() if not value.requires_grad}
    assert {name.split(".")[2] for name in fixed if ".blocks." in name} == set(map(str, range(frozen)))
    assert {"encoder.space", "encoder.time", "encoder.seconds.linear.weight", "encoder.embed.bias"} <= fixed
    assert ("encoder.norm.weight" in fixed) == (frozen == 3)
    is_fixed = {id(value) for name, value in whole.model.named_parameters() if name in fixed}
    theirs = steps(task, whole, lambda group: 0.0 if id(group.parameters[0]) in is_fixed else 1e-2)
    mine = steps(part_task, part, lambda group: 1e-2)
    losses = [[float(one.logs["loss"]) for one in found] for found in (mine, theirs)]
    assert losses[0] == losses[1] and len(set(losses[0])) == 3
    after = dict(part.model.named_parameters())
    for name, value in whole.model.named_parameters():
        assert torch.equal(value, after[name]), name
        assert torch.equal(value, before[name]) or name not in fixed, name
    assert all(value.grad is None for name, value in part.model.named_parameters() if name in fixed)


def test_the_more_is_frozen_the_less_is_kept_for_the_backward(deep: Path, people: Path, tmp_path: Path) -> None:
    kept = []
    for frozen in range(4):
        task, learner = learner_of(deep, people, tmp_path / str(frozen), "chunk_tokens=null", f"freeze={frozen}")
        batch = task.load()([task.stream.at(n) for n in range(3)]).to("cpu")
        saved: dict[int, int] = {}

        def note(tensor: torch.Tensor, saved: dict[int, int] = saved) -> torch.Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            total = learner.losses(batch, 0, learner.model).total
        kept.append(sum(saved.values()))
        total.backward()
    assert kept[0] > kept[1] > kept[2] > kept[3]


@pytest.mark.parametrize("frozen", range(4))
def test_frozen_stages_of_chunks_are_computed_once(deep: Path, people: Path, tmp_path: Path, frozen: int) -> None:
    """Stages 1 and 2 are local: if they are trained, each chunk is computed again in the backward pass."""
    task, learner = learner_of(deep, people, tmp_path, "chunk_tokens=64", f"freeze={frozen}")
    batch = task.load()([task.stream.at(n) for n in range(3)]).to("cpu")
    calls = [0, 0, 0]
    for number, block in enumerate(learner.model.encoder.blocks):
        block.norm1.register_forward_hook(lambda *_, number=number: calls.__setitem__(number, calls[number] + 1))
    learner.losses(batch, 0, learner.model).total.backward()
    chunks = len(batch.whole.chunks)
    assert chunks > 2 and learner.model.encoder.n_local == 3  # the first block of stage 3 pools, inside the chunks
    assert calls == [chunks if number < frozen else 2 * chunks for number in range(3)]


# low-rank updates


@needs_peft
@pytest.mark.parametrize(
    "words", [("lora.rank=3",), ("lora.rank=2", "lora.targets=[qkv,fc2]", "lora.alpha=1", "freeze=1")]
)
def test_updates_begin_as_nothing_and_alone_are_trained(
    deep: Path, people: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    task, plain = learner_of(deep, people, tmp_path / "plain")
    _, mine = learner_of(deep, people, tmp_path / "mine", *words)
    batch = task.load()([task.stream.at(n) for n in range(3)]).to("cpu")
    assert torch.equal(mine.model(batch, tokens=True), plain.model(batch, tokens=True))
    before = {name: value.clone() for name, value in mine.model.named_parameters()}
    found = steps(task, mine, lambda group: 1e-4 * group.scale)
    assert float(found[-1].logs["loss"]) < float(found[0].logs["loss"])
    grouped = {id(value) for group in mine.groups() for value in group.parameters}
    targets = ("qkv", "fc2") if "freeze=1" in words else ("qkv", "proj", "fc1", "fc2")
    for name, value in mine.model.named_parameters():
        is_update = ".lora_" in name
        is_trained = is_update or name.startswith("head.")
        assert (id(value) in grouped) == is_trained == value.requires_grad, name
        assert torch.equal(value, before[name]) != is_trained, name
        assert not is_update or (name.split(".lora_")[0].split(".")[-1] in targets), name
        assert not is_update or "freeze=1" not in words or ".blocks.0." not in name, name
    depths = {group.scale for group in mine.groups()}
    assert depths == ({0.75**2, 0.75, 10.0} if "freeze=1" in words else {0.75**3, 0.75**2, 0.75, 10.0})


@needs_peft
@pytest.mark.parametrize("more", ["", "freeze=1"])
def test_chunks_do_not_change_the_gradients_of_updates(deep: Path, people: Path, tmp_path: Path, more: str) -> None:
    """The layers of a chunk are computed again in the backward pass, with their updates."""
    gradients = []
    for chunk in ("null", "64"):
        words = ("lora.rank=2", f"chunk_tokens={chunk}", *more.split())
        task, learner = learner_of(deep, people, tmp_path / chunk, *words)
        steps(task, learner, lambda group: 1e-3)  # before it, the gradients of A are 0
        batch = task.load()([task.stream.at(n) for n in range(3)]).to("cpu")
        learner.losses(batch, 3, learner.model).total.backward()
        gradients.append({name: value.grad for name, value in learner.model.named_parameters() if value.requires_grad})
    assert any(bool(value.any()) for name, value in gradients[0].items() if "lora_A" in name)
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, atol=1e-4, rtol=1e-2, msg=name)


@needs_peft
def test_updates_are_trained_in_bf16_too(deep: Path, people: Path, tmp_path: Path) -> None:
    task, learner = learner_of(deep, people, tmp_path, "lora.rank=2", "precision=bf16")
    found = steps(task, learner, lambda group: 1e-4 * group.scale)
    assert float(found[-1].logs["loss"]) < float(found[0].logs["loss"])
    assert {value.dtype for value in learner.state(None).values()} <= {torch.float32, torch.float64}
    assert {value.dtype for value in learner.model.parameters()} == {torch.float32}


@needs_peft
def test_merged_weights_are_those_of_peft(deep: Path, people: Path, tmp_path: Path) -> None:
    from peft import LoraModel, PeftModel

    task, learner = learner_of(deep, people, tmp_path, "lora.rank=3", "lora.alpha=5")
    steps(task, learner, lambda group: 1e-2)
    state = learner.state(None)
    batch = task.load()([task.stream.at(n) for n in range(3)]).to("cpu")
    x_MC = learner.model(batch, tokens=True).detach()
    plain = SlimBrain.from_pretrained(deep).encoder
    plain.load_state_dict({name[8:]: value for name, value in state.items() if name.startswith("encoder.")})
    torch.testing.assert_close(plain(batch.voxels, batch.whole), x_MC, atol=1e-5, rtol=1e-4)
    updates = {name[5:] for name in state if name.startswith("lora.")}
    assert updates == lora.shapes(plain, learner.settings.lora, 0).keys()
    assert LoraModel is not None and PeftModel is not None
    for module in [one for one in learner.model.encoder.modules() if hasattr(one, "base_layer")]:
        module.merge()
    for name, value in learner.model.encoder.named_parameters():
        if ".lora_" not in name:
            assert torch.equal(value, state[f"encoder.{name.replace('.base_layer.', '.')}"]), name


@needs_peft
@pytest.mark.parametrize(
    "words", [(), ("freeze=1",), ("freeze=3",), ("lora.rank=3",), ("lora.rank=2", "freeze=2", "lora.targets=proj")]
)
def test_what_is_trained_is_counted(deep: Path, people: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    task, learner = learner_of(deep, people, tmp_path, *words)
    counted = count_trained(task.settings, task.geometry, 64, 1)
    assert counted == sum(value.numel() for group in learner.groups() for value in group.parameters)


# wrong calls


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("freeze=4",), "freeze: got 4, expected at most 3, the number of stages of the encoder"),
        (("freeze=-1",), "freeze: got -1"),
        (("freeze=3", "head.layer_decay=.5"), "head.layer_decay: got 0.5, expected null, because freeze=3"),
        (("freeze=3", "lora.rank=2"), "freeze: got 3, expected at most 2 with lora"),
        (("lora.rank=17",), "lora.rank: got 17, expected at most 16, the channels of the narrowest layer"),
        (("lora.rank=0",), "lora.rank: got 0"),
        (("lora.alpha=0",), "lora.alpha: got 0"),
        (("lora.dropout=.1",), "lora.dropout"),
        (("lora.targets=[qkv,head]",), "lora.targets"),
        (("lora.targets=[qkv,qkv]",), "lora.targets"),
        (("lora.targets=[]",), "lora.targets"),
    ],
)
def test_contradictions_are_refused_by_their_key(deep: Path, tmp_path: Path, words: tuple[str, ...], told: str) -> None:
    with pytest.raises(ConfigError) as error:
        settings_for(SlimBrain.from_pretrained(deep), "data", tmp_path, 6, words, 0)
    assert told in error.value.line() and "\n" not in error.value.line()


@pytest.mark.parametrize("word", ["freeze=1", "lora.rank=2"])
def test_random_weights_are_not_kept(deep: Path, people: Path, tmp_path: Path, word: str) -> None:
    method, _ = method_of(deep, people, tmp_path, (word,), lambda settings: None, name="scratch")
    with pytest.raises(
        ConfigError, match=f"{word.split('=')[0].split('.')[0]}: got a value, expected none with --from"
    ):
        method.settings(0)


# runs


def method_of(deep: Path, people: Path, folder: Path, words: tuple, train: Any, name: str = "finetuned") -> tuple:
    opened, task = Dataset(people), check(Task, SCORE, "task.yaml")
    cases = find_cases(task, opened, "task.yaml")
    splits = make_splits(task, cases, "task.yaml")
    ours = SlimBrain.from_pretrained(deep)
    words = (*QUICK, "run.epochs=3", *words)
    method = Finetuned(name, ours, task, opened, cases, splits, folder, words, train)
    return method, make_fold(task, cases, splits[0][0])[0]


def train_in(deep: Path, people: Path, folder: Path, *words: str) -> tuple[FinetuneSettings, bool]:
    """The first fine-tuning in processes of its own; its settings, and whether it has finished."""
    method, fold = method_of(deep, people, folder, words, lambda settings: None)
    settings = method._prepare(0, fold)
    return settings, local.run(prepare_run(settings), settings.run.processes).finished


def final(settings: FinetuneSettings) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """Tensors of the last checkpoint, and the lines of metrics.jsonl."""
    out = Path(settings.run.out)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return load_file(checkpoint.newest(out / "checkpoints") / checkpoint.WEIGHTS), lines


LORA = ("lora.rank=2", "freeze=1", "run.batch=4")


@pytest.fixture(scope="module")
def once(deep: Path, people: Path, tmp_path_factory: pytest.TempPathFactory) -> FinetuneSettings:
    """A run that nothing has stopped, in one process at stage 0."""
    settings, finished = train_in(deep, people, tmp_path_factory.mktemp("once") / "s-finetuned", *LORA)
    assert finished and settings.zero_stage == 0
    return settings


@needs_peft
@pytest.mark.parametrize(
    ("stage", "processes", "then"),
    [
        (0, 1, 1),
        pytest.param(2, 2, 1, marks=pytest.mark.processes),
        pytest.param(3, 2, 1, marks=pytest.mark.processes),
        pytest.param(0, 2, 1, marks=pytest.mark.slow),
        pytest.param(1, 1, 1, marks=pytest.mark.slow),
        pytest.param(1, 1, 2, marks=pytest.mark.slow),
        pytest.param(2, 2, 2, marks=pytest.mark.slow),
        pytest.param(3, 1, 1, marks=pytest.mark.slow),
        pytest.param(3, 1, 2, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_goes_on_at_every_stage(
    deep: Path, people: Path, once: FinetuneSettings, tmp_path: Path, stage: int, processes: int, then: int
) -> None:
    """Also with another number of processes; only what is trained has moments."""
    folder, shared = tmp_path / "s-finetuned", (*LORA[:2], f"zero.stage={stage}")
    first = (f"run.processes={processes}", f"run.batch={4 // processes}", "run.max_seconds=1e-6")
    settings, finished = train_in(deep, people, folder, *shared, *first)
    assert not finished and len(final(settings)[1]) == 1
    settings, finished = train_in(deep, people, folder, *shared, f"run.processes={then}", f"run.batch={4 // then}")
    assert finished
    (mine, told), (theirs, expected) = final(settings), final(once)
    assert mine.keys() == theirs.keys() and any(name.startswith("best.lora.blocks.1.") for name in mine)
    for name in ("loss", "val_loss"):
        np.testing.assert_allclose(
            [line[name] for line in told if line.get(name) is not None],
            [line[name] for line in expected if line.get(name) is not None],
            atol=1e-5 if processes == 1 and stage < 3 else 1e-4,
        )
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], atol=2e-4, rtol=1e-3, msg=name)
    start_of = load_file(Path(settings.run.out) / "start.safetensors")
    for name, value in start_of.items():
        assert name.startswith("blocks.") or torch.equal(value, mine[f"encoder.{name}"]), name
        assert not name.startswith("blocks.0.") or torch.equal(value, mine[f"encoder.{name}"]), name
    if stage == 0:
        saved = checkpoint.newest(Path(settings.run.out) / "checkpoints") / "mp_rank_00_model_states.pt"
        from slim.checkpoints import zero_states

        moments = zero_states.read(saved)["optimizer"]["state"]
        assert sum(one["exp_avg"].numel() for one in moments.values()) == count_trained(
            settings, SlimBrain.from_pretrained(deep).geometry, 64, 1
        )


@needs_peft
def test_a_run_is_not_resumed_with_other_updates(
    deep: Path, people: Path, once: FinetuneSettings, tmp_path: Path
) -> None:
    folder = Path(once.run.out).parent
    for word, key in (("lora.rank=3", "lora.rank"), ("freeze=0", "freeze"), ("lora.alpha=2", "lora.alpha")):
        with pytest.raises(checkpoint.CheckpointError, match=key):
            train_in(deep, people, folder, *LORA, word)


# exports


@needs_peft
def test_the_updates_travel_alone_or_with_the_weights(
    deep: Path, people: Path, once: FinetuneSettings, tmp_path: Path
) -> None:
    """The run, its whole export, its adapter with the run or with an export of it: the same encoder and predictions."""
    from peft import PeftModel

    run, opened = Path(once.run.out), Dataset(people)
    tuned = SlimBrain.from_pretrained(run)
    export.write(SlimBrain.from_pretrained(deep), tmp_path / "base")
    for words in ((tmp_path / "whole",), (tmp_path / "adapter", "--adapter")):
        done = tool("export.py", run, "--out", *words)
        assert done.returncode == 0, done.stderr
    assert "--base" in done.stdout and "run (encoder after 7 steps, SHA-256" in done.stdout
    sizes = [
        sum(path.stat().st_size for path in (tmp_path / name).glob("*.safetensors")) for name in ("whole", "adapter")
    ]
    assert (tmp_path / "whole" / MODEL).exists() and not (tmp_path / "whole" / ADAPTER).exists()
    assert (tmp_path / "adapter" / ADAPTER).exists() and not (tmp_path / "adapter" / MODEL).exists()
    assert sizes[1] < sizes[0] / 2
    done = tool("export.py", tmp_path / "adapter", "--base", deep, "--out", tmp_path / "again")
    assert done.returncode == 0, done.stderr
    found = [SlimBrain.from_pretrained(tmp_path / name) for name in ("whole", "again")]
    found += [SlimBrain.from_pretrained(tmp_path / "adapter", base=base) for base in (deep, tmp_path / "base")]
    z = tuned.encode_session(opened, opened.sessions[0]).tokens
    assert not np.array_equal(z, SlimBrain.from_pretrained(deep).encode_session(opened, opened.sessions[0]).tokens)
    for model in found:
        assert model.checksum == tuned.checksum and model.made["finetuned"] == tuned.made["finetuned"]
        assert np.array_equal(model.encode_session(opened, opened.sessions[0]).tokens, z)
        assert all(torch.equal(a, b) for a, b in zip(model.head.parameters(), tuned.head.parameters(), strict=True))
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert 'from_pretrained("THIS FOLDER", base="THE WEIGHTS")' in card and "LoRA, rank 2" in card
    assert "\n\nThis folder holds low-rank updates (LoRA)" in card and "\n\n    pip install slim-brain\n\n" in card
    assert (
        "subjects.\n- Trained of the encoder: low-rank updates" in card and "above stage 1.\n- `model.predict" in card
    )
    read = PeftModel.from_pretrained(SlimBrain.from_pretrained(deep).encoder, tmp_path / "adapter").merge_and_unload()
    for name, value in read.state_dict().items():
        assert torch.equal(value, tuned.encoder.state_dict()[name]), name


@needs_peft
def test_updates_fit_no_other_weights(deep: Path, people: Path, once: FinetuneSettings, tmp_path: Path) -> None:
    export.write(SlimBrain.from_pretrained(once.run.out), tmp_path / "adapter", adapter=True)
    export.write(SlimBrain.from_pretrained(once.run.out), tmp_path / "whole")
    other = write_run(tmp_path / "other", people, STRADDLING, seed=4)
    wrong = [
        ((tmp_path / "adapter", "--base", other), "base: got weights with SHA-256"),
        ((tmp_path / "adapter",), "base: got none, expected the weights that were fine-tuned, run (encoder after 7"),
        ((tmp_path / "whole", "--base", deep), "base: got"),
        ((tmp_path / "whole", "--adapter"), "low-rank updates: got none of its own"),
        ((deep, "--adapter"), "low-rank updates: got none, expected those of a fine-tuning by LoRA"),
    ]
    for words, told in wrong:
        done = tool("export.py", *words, "--out", tmp_path / "out")
        assert done.returncode == 2 and told in done.stderr and done.stderr.count("\n") == 1, done.stderr
        assert not (tmp_path / "out").exists()
    done = tool("embed.py", tmp_path / "adapter", "scan.nii.gz", "--out", tmp_path / "z.npz")
    assert done.returncode == 2 and "base: got none" in done.stderr


def test_updates_need_peft(deep: Path, people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    words = finetune(deep, people, tmp_path / "out")
    done = tool("finetune.py", *words[1:], "lora.rank=2")
    assert done.returncode == 2 and "pip install 'slim-brain[lora]'" in done.stderr and done.stderr.count("\n") == 1
