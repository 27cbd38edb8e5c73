"""Bootstrap intervals of any statistic over groups."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fmsuite.core.evaluation.intervals import group_intervals, group_weights, weighted_mean
from fmsuite.core.evaluation.statistics import Scored, bootstrap
from fmsuite.errors import UsageError


def test_draws_are_those_of_the_classification_bootstrap():
    random = np.random.default_rng(0)
    groups = torch.from_numpy(random.integers(0, 12, 60))
    target = torch.from_numpy(random.integers(0, 2, 60))
    predicted = torch.where(torch.from_numpy(random.random(60)) < 0.3, 1 - target, target)
    right = (predicted == target).double()
    scored = Scored(torch.arange(60), torch.rand(60, 2), predicted, target)
    theirs = bootstrap([scored], groups, 2, 200, seed=3)["accuracy"]
    ours = group_intervals(lambda w: {"accuracy": weighted_mean(right, w)}, groups, 200, seed=3)["accuracy"]
    assert ours == pytest.approx(theirs, abs=1e-6)


def test_a_mean_of_many_groups_has_its_textbook_interval():
    values = torch.randn(400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    low, high = group_intervals(lambda w: {"m": weighted_mean(values, w)}, torch.arange(400), 2000, seed=0)["m"]
    half = 1.96 * values.std().item() / 20
    assert (low, high) == pytest.approx((values.mean().item() - half, values.mean().item() + half), abs=0.012)


def test_items_of_a_group_are_drawn_together():
    weights = group_weights(torch.tensor([7, 3, 7, 9]), 50, seed=1)
    assert torch.equal(weights[0], weights[2])
    assert (weights[0] + weights[1] + weights[3] == 3).all()


def test_undefined_values_and_few_groups_have_no_interval():
    groups = torch.arange(6)

    def statistic(weights):
        return {"nan": torch.full((weights.shape[1],), torch.nan), "fine": weights.sum(0)}

    found = group_intervals(statistic, groups, 50, seed=0)
    assert found == {"nan": None, "fine": (6.0, 6.0)}
    assert group_intervals(statistic, groups[:4], 50, seed=0) == {"nan": None, "fine": None}
    with pytest.raises(UsageError, match="needs items"):
        group_intervals(statistic, groups[:0], 50, seed=0)


def test_means_pass_over_what_is_missing():
    values = torch.tensor([[1.0, torch.nan], [3.0, 4.0]])
    weights = torch.tensor([[1.0, 0.0, 1.0], [3.0, 1.0, 0.0]])
    means = weighted_mean(values, weights)
    assert means[0].tolist() == [2.5, 3.0, 1.0]
    assert means[1, :2].tolist() == [4.0, 4.0]
    assert means[1, 2].isnan()
