from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional as F

from fmsuite.core.evaluation.linear import LinearProbe, fit_linear
from fmsuite.errors import UsageError


def draw(items: int, dim: int, classes: int, spread: float = 0.4, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    labels = np.arange(items) % classes
    features = rng.normal(size=(classes, dim))[labels] * spread + rng.normal(size=(items, dim)) + 3.0
    return torch.from_numpy(features), torch.from_numpy(labels)


def objective(weight: Tensor, bias: Tensor, features: Tensor, labels: Tensor, form: str, strength: float) -> Tensor:
    """The two forms, written out."""
    logits = features @ weight.T + bias
    if form == "norm":
        return F.cross_entropy(logits, labels) + strength / 2 * weight.norm()
    return F.cross_entropy(logits, labels, reduction="sum") + strength / 2 * weight.square().sum()


def gradient(probe: LinearProbe, features: Tensor, labels: Tensor) -> float:
    """The largest entry of the gradient of the mean loss at the probe."""
    weight, bias = probe.weight.clone().requires_grad_(), probe.bias.clone().requires_grad_()
    doubled = 2 if probe.form == "squared" and len(bias) == 2 else 1
    loss = objective(weight, bias, features.double(), labels, probe.form, probe.strength * doubled)
    loss = loss if probe.form == "norm" else loss / len(labels)
    return max(part.abs().max().item() for part in torch.autograd.grad(loss, [weight, bias]))


@pytest.mark.parametrize("strength", [None, 3.0])
@pytest.mark.parametrize(("items", "dim"), [(90, 8), (20, 60)])
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_squared_form_equals_scikit_learn(classes: int, items: int, dim: int, strength: float | None) -> None:
    features, labels = draw(items, dim, classes)
    probe = fit_linear(features, labels, classes, form="squared", strength=strength)
    assert probe.strength == (100 / (dim * classes) if strength is None else strength)
    reference = LogisticRegression(C=1 / probe.strength, solver="newton-cholesky", tol=1e-12)
    reference.fit(features.numpy(), labels.numpy())
    assert probe.converged
    queries = draw(50, dim, classes, seed=1)[0]
    assert probe.scores(queries).numpy() == pytest.approx(reference.predict_proba(queries.numpy()), abs=1e-6)
    if classes == 2:
        ours, bias = probe.weight[1:] - probe.weight[:1], probe.bias[1:] - probe.bias[:1]
        assert ours.numpy() == pytest.approx(reference.coef_, abs=1e-6)
        assert bias.numpy() == pytest.approx(reference.intercept_, abs=1e-6)
    else:
        assert probe.weight.numpy() == pytest.approx(reference.coef_, abs=1e-6)


@pytest.mark.parametrize(("items", "dim", "classes"), [(60, 5, 2), (60, 5, 4), (9, 20, 3)])
def test_norm_form_equals_a_direct_optimisation(items: int, dim: int, classes: int) -> None:
    features, labels = draw(items, dim, classes)
    probe = fit_linear(features, labels, classes, form="norm", strength=0.3)

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        point = torch.from_numpy(flat).requires_grad_()
        weight, bias = point[: classes * dim].view(classes, dim), point[classes * dim :]
        value = objective(weight, bias, features, labels, "norm", 0.3)
        return value.item(), torch.autograd.grad(value, point)[0].numpy()

    start = np.random.default_rng(0).normal(size=classes * (dim + 1)) * 0.1
    options = {"maxiter": 20_000, "maxfun": 40_000, "ftol": 1e-16, "gtol": 1e-10}
    direct = minimize(loss, start, jac=True, method="L-BFGS-B", options=options)
    ours = objective(probe.weight, probe.bias, features, labels, "norm", 0.3).item()
    assert probe.converged
    assert ours <= direct.fun + 1e-12
    assert probe.weight.numpy() == pytest.approx(direct.x[: classes * dim].reshape(classes, dim), abs=1e-5)


@pytest.mark.parametrize("form", ["norm", "squared"])
@pytest.mark.parametrize(
    ("items", "dim", "classes"), [(2, 384, 2), (12, 384, 3), (150, 12, 3), (24, 25, 2), (25, 25, 2)]
)
def test_the_gradient_vanishes_at_the_probe(form: str, items: int, dim: int, classes: int) -> None:
    features, labels = draw(items, dim, classes)
    probe = fit_linear(features, labels, classes, form=form, strength=0.05)  # type: ignore[arg-type]
    assert probe.converged
    assert not probe.blank
    assert gradient(probe, features, labels) < 1e-8


@pytest.mark.parametrize("form", ["norm", "squared"])
def test_searching_the_span_of_few_samples_equals_searching_all_of_space(form: str) -> None:
    features, labels = draw(10, 40, 2)
    few = fit_linear(features, labels, 2, form=form)  # type: ignore[arg-type]
    centred = features - features.mean(0)
    outside = few.weight - few.weight @ torch.linalg.pinv(centred) @ centred
    assert outside.abs().max() < 1e-10
    # Rows repeated five times: 50 items in 40 dimensions, solved through the axes of space.
    strength = few.strength * (1 if form == "norm" else 5)
    many = fit_linear(features.repeat(5, 1), labels.repeat(5), 2, form=form, strength=strength)  # type: ignore[arg-type]
    assert many.weight.numpy() == pytest.approx(few.weight.numpy(), abs=1e-8)
    assert many.bias.numpy() == pytest.approx(few.bias.numpy(), abs=1e-7)


def test_norm_form_has_no_weights_beyond_the_strength_where_zero_is_the_minimum() -> None:
    features, labels = draw(45, 6, 3)
    labels[:10] = 0
    shares = torch.bincount(labels) / 45.0
    # At W = 0 and the best biases the residual is share - one-hot, so the threshold is known in closed form.
    threshold = 2 * ((shares.double() - F.one_hot(labels, 3)).T @ features / 45).norm().item()
    above = fit_linear(features, labels, 3, form="norm", strength=threshold * 1.001)
    assert above.blank
    assert above.converged
    assert above.scores(features[:1])[0].tolist() == pytest.approx(shares.tolist())
    below = fit_linear(features, labels, 3, form="norm", strength=threshold * 0.999)
    assert below.converged
    assert 0 < below.weight.norm() < 0.1
    assert gradient(below, features, labels) < 1e-8


@pytest.mark.parametrize("form", ["norm", "squared"])
def test_scales_far_apart_and_constant_columns_do_not_stop_it(form: str) -> None:
    features, labels = draw(120, 12, 3)
    features = features * torch.logspace(-4, 4, 12, dtype=torch.float64)
    features[:, 5] = 1e3
    probe = fit_linear(features, labels, 3, form=form)  # type: ignore[arg-type]
    assert probe.converged
    assert probe.weight[:, 5].abs().max() < 1e-9
    weight, bias = probe.weight, probe.bias
    strength = probe.strength
    best = objective(weight, bias, features, labels, form, strength).item()
    rng = np.random.default_rng(0)
    # Convex, so a minimum along random lines in units of each column is a minimum.
    for _ in range(200):
        step = torch.from_numpy(rng.normal(size=(3, 12))) * 1e-3 / features.std(0).clamp(min=1.0)
        for sign in (1, -1):
            assert objective(weight + sign * step, bias, features, labels, form, strength).item() >= best - 1e-9


def test_features_that_never_vary_give_the_classes_shares() -> None:
    probe = fit_linear(torch.ones(4, 7), torch.tensor([0, 1, 1, 1]), 2, form="squared")
    assert probe.converged
    assert probe.scores(torch.ones(1, 7))[0].tolist() == pytest.approx([0.25, 0.75])


@pytest.mark.parametrize("form", ["norm", "squared"])
def test_a_class_without_items_has_probability_zero_and_changes_nothing_else(form: str) -> None:
    features, labels = draw(30, 6, 2)
    with_gap = fit_linear(features, labels * 2, 4, form=form, strength=0.5)  # type: ignore[arg-type]
    without = fit_linear(features, labels, 2, form=form, strength=0.5)  # type: ignore[arg-type]
    scores = with_gap.scores(features)
    assert torch.equal(scores[:, [1, 3]], torch.zeros(30, 2, dtype=torch.float64))
    assert scores[:, [0, 2]].numpy() == pytest.approx(without.scores(features).numpy(), abs=1e-12)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["norm", "squared"]), st.floats(-1e3, 1e3))
def test_order_and_place_of_the_features_do_not_matter(seed: int, form: str, shift: float) -> None:
    features, labels = draw(24, 5, 3, seed=seed)
    probe = fit_linear(features, labels, 3, form=form, strength=0.2)  # type: ignore[arg-type]
    order = torch.from_numpy(np.random.default_rng(seed).permutation(24))
    moved = fit_linear(features[order] + shift, labels[order], 3, form=form, strength=0.2)  # type: ignore[arg-type]
    assert moved.converged
    assert moved.scores(features + shift).numpy() == pytest.approx(probe.scores(features).numpy(), abs=1e-6)


def test_running_out_of_steps_is_said() -> None:
    features, labels = draw(60, 10, 3)
    short = fit_linear(features, labels, 3, form="squared", max_iter=2)
    assert not short.converged
    assert short.iterations == 2
    enough = fit_linear(features, labels, 3, form="squared")
    assert enough.converged
    assert 2 < enough.iterations < 30


def test_scores_are_probabilities_in_float64() -> None:
    features, labels = draw(40, 6, 3, spread=2.0)
    probe = fit_linear(features.float(), labels, 3, form="norm", strength=0.1)
    scores = probe.scores(features.float())
    assert scores.dtype == torch.float64
    assert scores.sum(1).tolist() == pytest.approx([1.0] * 40)
    assert (scores.argmax(1) == labels).double().mean() > 0.8


def test_wrong_use_is_refused() -> None:
    features, labels = draw(20, 5, 2)
    with pytest.raises(UsageError, match="Did you mean 'squared'"):
        fit_linear(features, labels, 2, form="square")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="at least two classes"):
        fit_linear(features, torch.ones_like(labels), 2, form="norm")
    with pytest.raises(UsageError, match="above 0"):
        fit_linear(features, labels, 2, form="norm", strength=0)
    features[7, 2] = torch.inf
    with pytest.raises(UsageError, match="Row 7"):
        fit_linear(features, labels, 2, form="norm")
