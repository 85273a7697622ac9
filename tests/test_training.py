"""What the training experiments are made of: intervals, data, networks, runs, measures."""

from __future__ import annotations

import math
from typing import Any, cast

import bench_extra  # noqa: F401  (skips where the extra is missing)
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.training import (
    covariate_shift,
    data,
    fit,
    inference,
    networks,
    tasks,
)
from benchmarks.training.data import Part
from benchmarks.training.intervals import Estimate, verdict
from benchmarks.training.networks import AFTER, FUSED, NONE, OURS, TORCH, WAYS, Normalization

pytestmark = pytest.mark.usefixtures("one_thread")

NETWORKS = {"cnn": data.digits, "mlp": data.digits, "transformer": data.digits}


# --- intervals -------------------------------------------------------------------------------


def test_interval_is_students() -> None:
    # n = 4, mean 2.5, s = 1.29099, t(0.975, 3) = 3.18245: 2.5 -+ 3.18245 * 1.29099 / 2
    estimate = Estimate.of([1.0, 2.0, 3.0, 4.0])
    assert estimate == pytest.approx((2.5, 0.44574, 4.55426), abs=1e-4)
    assert estimate.text(".1f", "epochs") == "2.5 [0.4, 4.6] epochs"


def test_interval_of_equal_and_of_lost_values() -> None:
    assert Estimate.of([3.0, 3.0]) == (3.0, 3.0, 3.0)
    lost = Estimate.of([1.0, math.inf, 2.0])
    assert all(map(math.isnan, lost)) and not lost.decided
    with pytest.raises(ValueError, match=r"at least 2 seeds, but got 1"):
        Estimate.of([1.0])


@pytest.mark.parametrize(
    ("estimate", "word"),
    [((2, 1, 3), "more"), ((-2, -3, -1), "less"), ((1, -1, 3), "same"), ((0, 0, 0), "same")],
)
def test_verdict_needs_an_interval_without_zero(
    estimate: tuple[float, float, float], word: str
) -> None:
    assert verdict(Estimate(*estimate), "more", "less", "same") == word


# --- data ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "total"), [(data.digits, 1797), (data.cancer, 569)])
def test_split_is_fixed_and_without_overlap(make: Any, total: int) -> None:
    split = make()
    parts = [split.train, split.validation, split.test]
    assert sum(len(part) for part in parts) == total
    assert len(split.test) == len(split.validation) == math.ceil(total * data.TEST_SHARE)
    shares = [torch.bincount(part.targets) / len(part) for part in parts]
    for share in shares[1:]:
        torch.testing.assert_close(share, shares[0], atol=0.01, rtol=0)
    make.cache_clear()
    assert torch.equal(make().test.inputs, split.test.inputs)


def test_standardised_by_the_training_part_alone() -> None:
    split = data.cancer(standardised=True)
    torch.testing.assert_close(split.train.inputs.mean(0), torch.zeros(30), atol=1e-4, rtol=0)
    torch.testing.assert_close(split.train.inputs.std(0), torch.ones(30))
    assert split.test.inputs.mean(0).abs().max() > 1e-3


# --- networks --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_all_ways_start_from_the_same_weights(name: str) -> None:
    models = {way: tasks.TASKS[name].seeded(3, way, "cpu") for way in WAYS}
    states = {way: model.state_dict() for way, model in models.items()}
    for way in (OURS, FUSED):
        assert list(states[way]) == list(states[TORCH])
    for state in states.values():
        for key, value in states[TORCH].items():
            if "norm" not in key:
                assert torch.equal(state[key], value), key
    x = NETWORKS[name]().train.inputs[:16]
    outputs = {way: model(x) for way, model in models.items()}
    for way in (OURS, FUSED):
        torch.testing.assert_close(outputs[way], outputs[TORCH], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(outputs[NONE], outputs[TORCH], atol=1e-2)


@pytest.mark.parametrize("way", [TORCH, OURS, FUSED])
def test_normalises_before_the_activation(way: str) -> None:
    x, residual = torch.randn(64, 3, 5) * 4 + 2, torch.randn(64, 3, 5)
    layer = Normalization(way).layer(3, 1)
    norm = nn.BatchNorm1d(3)
    torch.testing.assert_close(layer(x, residual), (norm(x) + residual).relu())
    torch.testing.assert_close(layer(x), norm(x).relu())


def test_normalises_after_the_activation() -> None:
    x, residual = torch.randn(64, 3, 5) * 4 + 2, torch.randn(64, 3, 5)
    layer = Normalization(OURS, place=AFTER).layer(3, 1)
    expected = nn.BatchNorm1d(3)((x + residual).relu())
    torch.testing.assert_close(layer(x.clone(), residual), expected)


def test_fused_has_no_place_in_between() -> None:
    for how in (Normalization(FUSED, place=AFTER), Normalization(FUSED, disturbed=True)):
        with pytest.raises(ValueError, match="nothing between itself and the activation"):
            how.layer(3, 1)


def test_without_it_every_layer_still_has_a_bias() -> None:
    layer = Normalization(NONE).layer(2, 2, "identity")
    with torch.no_grad():
        cast(networks.Shift, layer.norm).bias.copy_(torch.tensor([1.0, -2.0]))
    x = torch.randn(4, 2, 3, 3)
    torch.testing.assert_close(layer(x) - x, torch.tensor([1.0, -2.0]).view(2, 1, 1).expand_as(x))


def test_tokens_are_normalised_over_batch_and_length() -> None:
    tokens = torch.randn(16, 8, 6) * 3 + 1
    layer = networks.OverTokens(Normalization(OURS).layer(6, 1, "identity"))
    y = layer(tokens)
    torch.testing.assert_close(y.mean((0, 1)), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.var((0, 1), correction=0), torch.ones(6), atol=1e-3, rtol=0)


def test_disturbance_moves_channels_in_training_only() -> None:
    disturb, x = networks.Disturbance(), torch.randn(32, 4)
    assert not torch.allclose(disturb(x).mean(0), x.mean(0), atol=1e-3)
    assert torch.equal(disturb.eval()(x), x)


# --- training --------------------------------------------------------------------------------


def small_part(count: int = 24) -> Part:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, 6, generator=generator)
    return Part(inputs, (inputs[:, 0] > 0).long())


def small_model(seed: int = 0, way: str = OURS, momentum: float | None = 0.1) -> networks.MLP:
    make = lambda: networks.MLP(Normalization(way, momentum=momentum), 6, 8, 2, classes=2)  # noqa: E731
    return cast(networks.MLP, fit.seeded(seed, make))


def test_batches_take_each_image_once_per_pass() -> None:
    part = Part(torch.arange(10.0), torch.arange(10))
    stream = fit.batches(part, 3, seed=0)
    passes = [torch.cat([next(stream).targets for _ in range(3)]).tolist() for _ in range(3)]
    assert all(len(set(one)) == 9 for one in passes)
    assert passes[0] != passes[1]
    with pytest.raises(ValueError, match="at most 10, but got 11"):
        next(fit.batches(part, 11, seed=0))


def test_fit_learns_and_repeats_itself() -> None:
    part = small_part()
    histories = []
    for _ in range(2):
        model = small_model()
        histories.append(
            fit.fit(model, part, rate=0.1, steps=90, batch=8, seed=1, validation=part, every=30)
        )
    assert histories[0] == histories[1]
    losses = histories[0].losses
    assert len(losses) == 90 and np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    assert [step for step, _ in histories[0].accuracies] == [30, 60, 90]


def test_fit_stops_where_the_loss_is_lost() -> None:
    history = fit.fit(small_model(way=NONE), small_part(), rate=1e20, steps=30, batch=8, seed=0)
    assert history.diverged and len(history.losses) < 30
    assert not math.isfinite(history.losses[-1]) and math.isfinite(history.losses[0])


def test_watch_sees_the_gradient_of_its_step() -> None:
    model, seen = small_model(), []

    def watch(number: int, part: Part) -> None:
        gradient = model.linears[0].weight.grad
        assert gradient is not None
        seen.append((number, len(part), float(gradient.norm())))  # type: ignore[operator]

    fit.fit(model, small_part(), rate=0.1, steps=3, batch=8, seed=0, watch=watch)
    assert [(number, size) for number, size, _ in seen] == [(0, 8), (1, 8), (2, 8)]
    assert all(norm > 0 for *_, norm in seen)


def test_clipping_bounds_the_update() -> None:
    moved = []
    for clip in (None, 1e-3):
        model = small_model()
        before = [p.detach().clone() for p in model.parameters()]
        fit.step(model, fit.optimizer(model, 1.0), small_part(), clip)
        pairs = zip((p.detach() for p in model.parameters()), before, strict=True)
        moved.append(math.sqrt(sum(float((p - b).square().sum()) for p, b in pairs)))
    assert moved[1] == pytest.approx(1e-3, rel=1e-3) and moved[0] > 0.1


def test_evaluate_leaves_the_model_as_it_was() -> None:
    model, part = small_model(), small_part()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    by_running = fit.evaluate(model, part)
    by_batch = fit.evaluate(model, part, batch_statistics=8)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert by_running["loss"] != by_batch["loss"]
    model.train()
    logits = torch.cat([model(x) for x in part.inputs.split(8)])
    expected = nn.functional.cross_entropy(logits, part.targets).item()
    assert by_batch["loss"] == pytest.approx(expected, rel=1e-6)
    model.load_state_dict(before)
    expected = nn.functional.cross_entropy(model.eval()(part.inputs), part.targets).item()
    assert by_running["loss"] == pytest.approx(expected, rel=1e-6)


def test_first_step_of_an_accuracy() -> None:
    history = fit.History(accuracies=[(5, 0.4), (10, 0.9), (15, 0.84), (20, 0.95)])
    assert history.first_step(0.85) == 10
    assert history.first_step(0.99) is None
    history.accuracies += [(25, 0.1), (30, 0.1)]  # reached, but lost again
    assert history.first_step(0.85) is None
    assert fit.History(accuracies=[(5, 0.9)], diverged=True).first_step(0.85) is None


# --- covariate shift -------------------------------------------------------------------------


def test_drift_of_a_known_change() -> None:
    before = [(torch.zeros(4), torch.full((4,), 2.0))]
    after = [(torch.full((4,), 1.0), torch.full((4,), 3.0))]
    assert covariate_shift.drift(before, after) == pytest.approx((0.5, 0.5))
    assert covariate_shift.drift(before, before) == (0.0, 0.0)


def test_layer_inputs_are_what_enters_the_layers() -> None:
    model, part = small_model(), small_part()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    found = covariate_shift.layer_inputs(model, part)
    hidden = model.norms[0](model.linears[0](part.inputs))
    assert len(found) == 2  # the second linear layer and the head
    torch.testing.assert_close(found[0][0], hidden.mean(0))
    torch.testing.assert_close(found[0][1], hidden.std(0))
    model.load_state_dict(state)
    covariate_shift.layer_inputs(model, part)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


class Quadratic(nn.Module):
    """Logits whose cross entropy is known: the loss of (w, 0) for class 0 is log(1 + e^-w)."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.5]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack((self.w.expand(len(x)), torch.zeros(len(x))), 1)


def test_along_the_gradient() -> None:
    model, rate = Quadratic(), 0.3
    part = Part(torch.zeros(3), torch.zeros(3, dtype=torch.long))
    loss_range, change = covariate_shift.along_gradient(model, part, rate)
    gradient = lambda w: -1 / (1 + math.exp(w))  # noqa: E731
    loss = lambda w: math.log1p(math.exp(-w))  # noqa: E731
    far = 0.5 - covariate_shift.ALONG[-1] * rate * gradient(0.5)
    assert loss_range == pytest.approx(loss(0.5) - loss(far), rel=1e-4)
    expected = abs(gradient(far) - gradient(0.5)) / abs(gradient(0.5))
    assert change == pytest.approx(expected, rel=1e-4)
    assert model.w.item() == 0.5


# --- inference -------------------------------------------------------------------------------


def test_exact_statistics_are_those_of_all_images() -> None:
    model, part = small_model(momentum=0.5), small_part()
    fit.fit(model, part, rate=0.1, steps=5, batch=8, seed=0)
    exact = cast(networks.MLP, inference.with_exact_statistics(model, part))
    entering = model.linears[0](part.inputs)
    norm = cast(nn.BatchNorm1d, exact.norms[0].norm)
    torch.testing.assert_close(norm.running_var, entering.var(0))
    torch.testing.assert_close(norm.running_mean, entering.mean(0))
    assert inference.variance_error(exact, exact) == 0
    assert inference.variance_error(model, exact) > 0.01
