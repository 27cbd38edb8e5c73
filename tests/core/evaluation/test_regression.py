"""Metrics of numbers against scikit-learn and scipy, alone and under weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics

from fmsuite.core.evaluation.regression import regression_scores
from fmsuite.errors import UsageError


def sample() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    target = random.integers(0, 12, 50).astype(float)
    predicted = np.round(target + random.normal(0, 4, 50))
    return predicted, target, random.integers(0, 4, (50, 3))


def reference(predicted: np.ndarray, target: np.ndarray) -> dict[str, float]:
    return {
        "r2": metrics.r2_score(target, predicted),
        "rmse": metrics.root_mean_squared_error(target, predicted),
        "mae": metrics.mean_absolute_error(target, predicted),
        "pearson": stats.pearsonr(predicted, target).statistic,
        "spearman": stats.spearmanr(predicted, target).statistic,
    }


def test_equal_to_scikit_learn_and_scipy_with_repeated_items():
    predicted, target, counts = sample()
    found = regression_scores(torch.from_numpy(predicted), torch.from_numpy(target))
    assert {name: value.item() for name, value in found.items()} == pytest.approx(reference(predicted, target))
    weighted = regression_scores(torch.from_numpy(predicted), torch.from_numpy(target), torch.from_numpy(counts))
    for column in range(3):
        rows = np.repeat(np.arange(50), counts[:, column])
        expected = reference(predicted[rows], target[rows])
        assert {name: value[column].item() for name, value in weighted.items()} == pytest.approx(expected)


def test_what_does_not_vary_has_no_correlation():
    flat, line = torch.full((5,), 0.1), torch.arange(5.0)
    found = regression_scores(line, flat)
    assert found["r2"].isnan()
    assert found["pearson"].isnan()
    assert found["spearman"].isnan()
    assert found["mae"].item() == pytest.approx((line - flat).abs().mean().item())
    assert regression_scores(flat, line)["r2"].item() < 0


def test_missing_values_are_refused():
    with pytest.raises(UsageError, match="not finite"):
        regression_scores(torch.tensor([1.0, torch.nan]), torch.zeros(2))
    with pytest.raises(UsageError, match="no equal lists"):
        regression_scores(torch.zeros(3), torch.zeros(2))


def test_one_answer_for_all_has_no_correlation_whatever_its_size():
    target = torch.from_numpy(sample()[1])
    for answer in (0.1, 41.516126855, 1e6 / 3):
        found = regression_scores(torch.full_like(target, answer), target)
        assert found["pearson"].isnan()
        assert found["r2"] <= 0
    far = 1e6 + target * 1e-3
    assert regression_scores(far, target)["pearson"].item() == pytest.approx(1, abs=1e-6)
