"""Terms of the loss against plain definitions, the EMA target, running means, schedules and parameter groups."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import integrate

from helpers.batches import GEOMETRY, V, make_batch, make_sample, settings
from slim.config import KINDS, EmaSettings, OptimizerSettings
from slim.model.inputs import Batch
from slim.pretrain.ema import Target
from slim.pretrain.learner import PretrainLearner
from slim.pretrain.losses import jepa_loss, mae_loss, sig_loss
from slim.pretrain.objective import Objective
from slim.pretrain.running_mean import PlaceMean
from slim.training import schedule
from slim.training.metrics import effective_rank
from slim.training.optim import parameter_groups
from slim.training.task import Losses

pytestmark = pytest.mark.fast


def test_targets_point_at_their_cells() -> None:
    batch = make_batch(1, 2, 3)
    assert torch.equal(batch.whole.cell_M[batch.targets.row_K], batch.targets.cell_K)
    assert torch.equal(batch.whole.sample_M[batch.targets.row_K], batch.targets.sample_K)
    joint = torch.cat([batch.context.sample_M, batch.targets.sample_K])[batch.targets.joint_J]
    assert torch.equal(joint, joint.sort().values)
    cells = torch.cat([batch.context.cell_M, batch.targets.cell_K])
    assert torch.equal(cells[batch.targets.joint_J][batch.targets.back_K], batch.targets.cell_K)


def test_rebuilt_rows_hold_the_voxels_of_the_target_cells() -> None:
    batch = make_batch(4, 5)
    frames, places = GEOMETRY.tokens[0], math.prod(GEOMETRY.tokens[1:])
    samples = [make_sample(4), make_sample(5)]
    targets = batch.targets
    for g, k in enumerate(targets.rebuilt_G.tolist()):
        sample = samples[int(targets.sample_K[k])]
        tokens = np.flatnonzero(GEOMETRY.cell_of == int(targets.cell_K[k]))
        for e, token in enumerate(tokens):
            frame, place = divmod(int(token), places)
            at = np.flatnonzero(sample.place == place)
            row = int(targets.value_GE[g, e])
            assert (row >= 0) == bool(len(at))
            if len(at):
                assert np.array_equal(batch.voxels.value_RV[row].numpy(), sample.value[frame, at[0]])
                assert np.array_equal(batch.voxels.spread_QV[targets.patch_GE[g, e]].numpy(), sample.spread[at[0]])
    assert frames == 8


def test_jepa_loss_is_a_mean_of_sample_means_and_kinds_are_told_apart() -> None:
    batch = make_batch(1, 2)
    k = len(batch.targets.cell_K)
    predicted, target = torch.randn(k, 5), torch.randn(k, 5) * 2
    loss, logs = jepa_loss(predicted, target, batch.targets, 2)
    each = [
        F.smooth_l1_loss(predicted[batch.targets.sample_K == s], target[batch.targets.sample_K == s]) for s in (0, 1)
    ]
    assert torch.allclose(loss, torch.stack(each).mean())
    for number, kind in enumerate(KINDS):
        of = batch.targets.kind_K == number
        assert torch.allclose(logs[f"loss_{kind}"], F.smooth_l1_loss(predicted[of], target[of]))
    _, perfect = jepa_loss(target, target, batch.targets, 2)
    _, trivial = jepa_loss(torch.zeros_like(target), target, batch.targets, 2)
    assert perfect["loss_cross_time"] == 0 < perfect["trivial_cross_time"]
    for name in ("cross_time", "cross_location", "double_cross"):
        assert torch.equal(trivial[f"loss_{name}"], trivial[f"trivial_{name}"])


def test_gains_are_of_mean_losses_and_missing_where_there_is_nothing_to_gain() -> None:
    mine = PretrainLearner(settings(), Objective(settings(), GEOMETRY, V))
    line = dict.fromkeys(mine.logged, 0.5) | {"loss_cross_time": 0.2, "trivial_double_cross": 1e-10, "trivial": 2.0}
    line |= {"loss_cross_location": None, "trivial_cross_location": None}  # no such targets
    found = mine.summarise(line)
    assert found["gain"] == 0.75 and found["gain_cross_time"] == pytest.approx(0.6)
    assert found["gain_double_cross"] is None and found["gain_cross_location"] is None
    assert not any(name.startswith("trivial") for name in found)


def test_mae_loss_is_zero_when_rebuilt_and_one_for_the_mean() -> None:
    batch, rebuild = make_batch(1, 2), torch.nn.Identity()
    targets = batch.targets
    value = batch.voxels.value_RV[targets.value_GE.clamp_min(0)] / batch.voxels.spread_QV[targets.patch_GE.clamp_min(0)]
    assert mae_loss(rebuild, value.flatten(1), batch) < 1e-10
    sample = targets.sample_K[targets.rebuilt_G]
    there = (targets.value_GE >= 0)[..., None].expand_as(value)
    means = torch.stack([value[sample == s][there[sample == s]].mean() for s in (0, 1)])
    constant = means[sample][:, None, None].expand_as(value)
    assert mae_loss(rebuild, constant.flatten(1), batch) == pytest.approx(1, abs=1e-5)


def test_voxels_rebuilt_a_few_cells_at_a_time_give_the_same_loss_and_keep_less() -> None:
    batch = make_batch(1, 2, 3, 4)
    results = []
    for stream in (None, 3 * math.prod(GEOMETRY.cell)):
        torch.manual_seed(0)
        model = Objective(settings(objective="mae", chunk_tokens=stream), GEOMETRY, V)
        kept = 0

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += tensor.numel() * tensor.element_size()
            return tensor

        out_GW = torch.randn(len(batch.targets.rebuilt_G), 192, generator=torch.Generator().manual_seed(0))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = mae_loss(model.predictor.rebuild, out_GW.requires_grad_(), batch, model.rebuilt_at_once)
        loss.backward()
        results.append((loss.detach(), out_GW.grad, model.predictor.rebuild.weight.grad, kept))
    assert len(batch.targets.rebuilt_G) > 6  # several rounds
    for one, other in zip(results[0][:3], results[1][:3], strict=True):
        assert torch.allclose(one, other, atol=1e-6)
    assert results[1][3] < results[0][3] / 2


def test_sig_is_the_distance_of_characteristic_functions() -> None:
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)) * 1.7 + 0.3
    slices = torch.eye(3)

    def gap(t: float, values: np.ndarray) -> float:
        return abs(np.exp(1j * t * values).mean() - np.exp(-t * t / 2)) ** 2

    expected = np.mean([integrate.quad(gap, 0.2, 4.0, args=(x[:, i].numpy(),))[0] for i in range(3)])
    assert float(sig_loss(x, slices)) == pytest.approx(expected, rel=0.03)
    normal = torch.randn(20000, 3, generator=torch.Generator().manual_seed(1))
    assert sig_loss(normal, slices) < 0.01 * sig_loss(x, slices)
    assert sig_loss(torch.zeros(100, 3), slices) > sig_loss(x, slices)


def test_loss_does_not_depend_on_how_samples_are_spread() -> None:
    """Two micro-batches of one sample average to one of two (SIG per sample)."""
    torch.manual_seed(0)
    model = Objective(settings(loss={"sig_samples": 1}, objective="default"), GEOMETRY, V)
    mean = torch.zeros(math.prod(GEOMETRY.cells), model.encoder.dim)

    def loss(*seeds: int) -> torch.Tensor:
        batch = make_batch(*seeds)
        target = torch.sin(batch.targets.cell_K[:, None] * torch.arange(1, model.encoder.dim + 1) / 7)
        return model(batch, target, mean, 3).total

    together = loss(1, 2)
    together.backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    apart = (loss(1) + loss(2)) / 2
    apart.backward()
    assert torch.allclose(together, apart, atol=1e-6)
    for one, other in zip(grads, (p.grad for p in model.parameters() if p.grad is not None), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_every_term_reaches_every_parameter_it_should() -> None:
    torch.manual_seed(0)
    model = Objective(settings(), GEOMETRY, V)
    batch = make_batch(1)
    target = torch.randn(len(batch.targets.cell_K), model.encoder.dim)
    for _, parameter in model.named_parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model(batch, target, torch.zeros(math.prod(GEOMETRY.cells), model.encoder.dim), 0).total.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []


def test_heads_that_no_term_trains_do_not_exist() -> None:
    assert Objective(settings(objective="mae"), GEOMETRY, V).predictor.features is None
    assert Objective(settings(objective="jepa"), GEOMETRY, V).predictor.rebuild is None


def test_the_target_in_half_precision_has_the_numbers_of_autocast() -> None:
    batch = make_batch(1, 2)
    target = Target(Objective(settings(), GEOMETRY, V).encoder, True)
    found = target.encode(batch, batch.whole)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = target.encoder(batch.voxels, batch.whole).float()
    assert torch.equal(found, expected)
    assert all(weight.dtype == torch.float32 for weight in target.encoder.parameters())


def test_target_moves_as_an_exponential_average() -> None:
    torch.manual_seed(0)
    model = Objective(settings(), GEOMETRY, V)
    target = Target(model.encoder, False)
    start = {name: value.clone() for name, value in target.encoder.named_parameters()}
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.add_(1.0)
    target.update(model.encoder, 0.75)
    for name, value in target.encoder.named_parameters():
        assert torch.allclose(value, start[name] + 0.25, atol=1e-6)
        assert not value.requires_grad


@pytest.mark.parametrize(("alike", "expected"), [(1.0, 1.0), (0.0, 0.0), (0.6, 0.36)])
def test_the_cosine_between_samples_tells_whether_features_are_of_the_place_or_of_the_sample(
    alike: float, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features are a part that all samples share at a place, and a part of their own."""
    torch.manual_seed(0)
    chosen = settings(ema={"mean": 0.98})
    learner = PretrainLearner(chosen, Objective(chosen, GEOMETRY, V))
    cells, dim = math.prod(GEOMETRY.cells), learner.model.encoder.dim
    shared = torch.randn(cells, dim)

    def features(batch: Batch) -> torch.Tensor:
        own = torch.randn(len(batch.whole.cell_M), dim)
        return F.layer_norm(alike * shared[batch.whole.cell_M] + math.sqrt(1 - alike**2) * own, (dim,))

    monkeypatch.setattr(learner.target, "features", features)
    batch, cosine = make_batch(1, 2), []
    assert batch.context is not None
    for step in range(150):
        given = Losses(torch.zeros(()), {}, {"context": torch.zeros(len(batch.context.cell_M), dim)})
        losses = learner.losses(batch, step, lambda *_, given=given: given)
        learner.means["target_mean"].commit()
        cosine.append(float(losses.logs["sample_cosine"]))
    assert np.mean(cosine[-50:]) == pytest.approx(expected, abs=0.03)


def test_place_means_follow_each_cell_and_do_not_depend_on_micro_batches() -> None:
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((400, 3)).astype(np.float32)) * 2
    cell = torch.from_numpy(rng.integers(0, 5, 400))
    x += cell[:, None] * 10.0
    whole, parts = PlaceMean(6, 3, 0.9, torch.device("cpu")), PlaceMean(6, 3, 0.9, torch.device("cpu"))
    for _ in range(2):
        whole.observe(x, cell)
        whole.commit()
        for part in range(4):
            parts.observe(x[part::4], cell[part::4])
        parts.commit()
    for c in range(5):
        assert torch.allclose(whole.mean[c], x[cell == c].mean(dim=0), atol=1e-4)
    assert not whole.seen[5] and (whole.mean[5] == 0).all()
    within = (
        torch.stack([(x[cell == c] - x[cell == c].mean(dim=0)).square().sum(dim=0) for c in range(5)]).sum(dim=0) / 400
    )
    assert torch.allclose(whole.variance, within, rtol=1e-3)
    assert torch.allclose(whole.mean, parts.mean, atol=1e-5) and torch.allclose(
        whole.variance, parts.variance, rtol=1e-4
    )


def test_parameter_groups_cover_every_parameter_once() -> None:
    model = Objective(settings(), GEOMETRY, V)
    groups = parameter_groups(model)
    seen = [id(p) for group in groups for p in group["params"]]
    assert sorted(seen) == sorted(id(p) for p in model.parameters())
    names = {id(p): name for name, p in model.named_parameters()}
    decayed = {names[id(p)] for p in groups[0]["params"]}
    assert all(name.endswith("weight") and "norm" not in name and "seconds" not in name for name in decayed)
    assert "encoder.embed.own.weight" in decayed and "predictor.rebuild.weight" in decayed
    plain = {names[id(p)] for p in groups[1]["params"]}
    assert {"encoder.space", "encoder.time", "predictor.mask_token", "encoder.seconds.linear.weight"} <= plain


def test_schedules_reach_their_ends_over_optimizer_steps() -> None:
    chosen = OptimizerSettings(lr=1.0, lr_end=0.01, warmup=0.1, wd=(0.04, 0.4))
    rates = [schedule.learning_rate(step, 100, chosen) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == pytest.approx(1.0) and rates[-1] == pytest.approx(0.01)
    assert np.all(np.diff(rates[:10]) > 0) and np.all(np.diff(rates[10:]) < 0)
    assert schedule.weight_decay(0, 100, chosen) == pytest.approx(0.04)
    assert schedule.weight_decay(99, 100, chosen) == pytest.approx(0.4)
    assert schedule.ema_momentum(0, 100, EmaSettings()) == pytest.approx(0.996)
    assert schedule.ema_momentum(99, 100, EmaSettings()) == pytest.approx(1.0)
    for steps in (1, 2):
        assert all(math.isfinite(schedule.learning_rate(s, steps, chosen)) for s in range(steps))


def test_effective_rank_counts_directions() -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(5000, 16, generator=rng)
    assert 15.5 < effective_rank(x) <= 16.01
    assert effective_rank(x[:, :4] @ torch.randn(4, 16, generator=rng)) < 4.01
    assert effective_rank(torch.ones(10, 4)) == 0
