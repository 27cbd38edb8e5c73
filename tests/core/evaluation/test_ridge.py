"""Ridge regression against scikit-learn's, its chosen penalty against a search over the same folds, and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, PredefinedSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from fmsuite.core.evaluation.ridge import STRENGTHS, fit_ridge, fit_ridge_cv, folds_of
from fmsuite.errors import UsageError


def sample(items: int, width: int, noise: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features of uneven scale, one of which does not vary; numbers that two of them tell; groups of three."""
    random = np.random.default_rng(items)
    features = random.normal(size=(items, width)) * np.logspace(-2, 2, width) + 5
    features[:, 2] = 7.0
    target = 50 + 20 * (features[:, 0] - 5) + 0.1 * features[:, -1] + random.normal(0, noise, items)
    return features.astype(np.float32), target, np.arange(items) // 3


@pytest.mark.parametrize(("items", "width"), [(40, 6), (12, 30)])
@pytest.mark.parametrize("strength", [0.1, 30.0])
def test_weights_and_predictions_are_scikit_learns(items: int, width: int, strength: float) -> None:
    features, target, _ = sample(items, width)
    found = fit_ridge(torch.from_numpy(features), torch.from_numpy(target), strength)
    pipeline = make_pipeline(StandardScaler(), Ridge(alpha=strength, solver="svd"))
    expected = pipeline.fit(features.astype(np.float64), target)
    asked = np.random.default_rng(1).normal(5, 1, size=(8, width))
    asked[:, 2] = 7.0
    np.testing.assert_allclose(found.predict(torch.from_numpy(asked)), expected.predict(asked), rtol=1e-7)
    weight = expected[-1].coef_ / expected[0].scale_
    np.testing.assert_allclose(found.weight, weight, rtol=1e-6, atol=1e-9)


def test_one_feature_by_hand() -> None:
    x, y = torch.tensor([[1.0], [2.0], [3.0], [6.0]]), torch.tensor([1.0, 3.0, 2.0, 8.0])
    found = fit_ridge(x, y, 2.0)
    scale = (((x - 3) ** 2).mean() ** 0.5).item()
    z = (x[:, 0] - 3) / scale
    slope = (z * (y - 3.5)).sum().item() / (4 + 2.0)
    assert found.weight.item() == pytest.approx(slope / scale)
    assert found.predict(torch.tensor([[3.0]])).item() == pytest.approx(3.5)


@pytest.mark.parametrize("noise", [0.1, 200.0])
def test_the_penalty_is_that_of_a_search_over_the_same_folds(noise: float) -> None:
    features, target, groups = sample(60, 8, noise)
    found = fit_ridge_cv(torch.from_numpy(features), torch.from_numpy(target), torch.from_numpy(groups), seed=3)
    folds = folds_of(torch.from_numpy(groups), 3).numpy()
    search = GridSearchCV(
        make_pipeline(StandardScaler(), Ridge(solver="svd")),
        {"ridge__alpha": STRENGTHS},
        scoring="neg_mean_squared_error",
        cv=PredefinedSplit(folds),
    ).fit(features.astype(np.float64), target)
    # All folds are of one size, so the mean over folds is that over items.
    assert set(np.bincount(folds)) == {12}
    assert found.strength == search.best_params_["ridge__alpha"]
    np.testing.assert_allclose(found.errors, -search.cv_results_["mean_test_score"], rtol=1e-6)
    np.testing.assert_allclose(
        found.predict(torch.from_numpy(features)), search.predict(features.astype(np.float64)), rtol=1e-6
    )


def test_folds_divide_no_group_and_are_even() -> None:
    groups = torch.from_numpy(np.random.default_rng(0).integers(0, 40, 300))
    folds = folds_of(groups, seed=1)
    for group in groups.unique():
        assert len(folds[groups == group].unique()) == 1
    sizes = torch.bincount(folds)
    assert len(sizes) == 5
    assert sizes.max() - sizes.min() <= torch.bincount(groups).max()
    assert not torch.equal(folds, folds_of(groups, seed=2))
    assert folds_of(torch.tensor([0, 0, 1]), seed=0).tolist() in ([0, 0, 1], [1, 1, 0])


def test_what_cannot_be_fitted_is_refused() -> None:
    x, y = torch.randn(4, 2), torch.arange(4.0)
    with pytest.raises(UsageError, match="above 0, not 0"):
        fit_ridge(x, y, 0.0)
    with pytest.raises(UsageError, match="Row 1"):
        fit_ridge(torch.where(torch.arange(4)[:, None] == 1, torch.nan, x), y, 1.0)
    with pytest.raises(UsageError, match="not finite"):
        fit_ridge(x, torch.tensor([1.0, torch.inf, 0, 0]), 1.0)
    with pytest.raises(UsageError, match="all training items are of one"):
        fit_ridge_cv(x, y, torch.zeros(4, dtype=torch.int64), seed=0)
