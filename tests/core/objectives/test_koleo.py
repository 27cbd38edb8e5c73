"""KoLeo against the public implementation and brute force."""

from __future__ import annotations

import math

import pytest
import torch

from fmsuite.core.objectives.koleo import koleo
from fmsuite.errors import UsageError


def test_value_and_gradient_equal_the_reference(load):
    reference = load("dinov2_losses")["koleo"]
    features = reference["x"].clone().requires_grad_()
    loss = koleo(features)
    loss.backward()
    torch.testing.assert_close(loss, reference["loss"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(features.grad, reference["grad"], atol=1e-5, rtol=1e-5)


def test_it_is_the_mean_log_distance_to_the_nearest_usable_neighbour():
    features = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    # A row that does not count lies nearest to one that does.
    features[2] = features[0] + 0.01
    usable = torch.tensor([1, 1, 0, 1, 1, 1, 0, 1, 1], dtype=torch.bool)
    unit = torch.nn.functional.normalize(features[usable], dim=-1).double()
    nearest = [min(math.dist(a, b) for j, b in enumerate(unit.tolist()) if j != i) for i, a in enumerate(unit.tolist())]
    expected = -sum(map(math.log, nearest)) / len(nearest)
    assert koleo(features, usable).item() == pytest.approx(expected, abs=1e-5)


def test_copies_of_an_image_give_a_finite_loss_and_do_not_push_each_other():
    # Two copies, and a pair that is nearer to each other than to the copies.
    features = torch.tensor([[1.0, 2, 0], [1, 2, 0], [0, 0, 1], [0, 0.2, 1]], requires_grad=True)
    loss = koleo(features)
    loss.backward()
    assert loss.isfinite()
    assert not features.grad[:2].any()
    assert features.grad[2:].any(1).all()
    assert features.grad.abs().max() < 10


def test_it_falls_as_points_spread_out():
    close = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, -0.1]])
    spread = torch.tensor([[1.0, 0.0], [-0.5, 0.866], [-0.5, -0.866]])
    assert koleo(spread) < koleo(close)
    assert koleo(spread).item() == pytest.approx(-math.log(math.sqrt(3)), abs=1e-3)


def test_a_single_sample_is_refused_and_a_single_usable_one_counts_nothing():
    with pytest.raises(UsageError, match="single sample"):
        koleo(torch.randn(1, 4))
    features = torch.randn(3, 4, requires_grad=True)
    loss = koleo(features, torch.tensor([True, False, False]))
    loss.backward()
    assert loss.item() == 0
    assert features.grad.isfinite().all()
