"""Numbers predicted from features against scikit-learn, a bootstrap by repetition, and the mean of draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn import metrics
from sklearn.neighbors import KNeighborsRegressor

from fmsuite.core.evaluation.intervals import group_weights
from fmsuite.core.evaluation.numbers import NUMBER_TASKS, judge_numbers
from fmsuite.core.evaluation.ridge import fit_ridge_cv
from fmsuite.core.evaluation.splits import Split
from fmsuite.core.seeding import derive

TRAIN, ASKED = torch.arange(60), torch.arange(60, 90)


def cohort() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(90, 10, generator=generator)
    target = 40 + 5 * features[:, 0] - 3 * features[:, 1] + torch.randn(90, generator=generator)
    return features, target.double(), torch.arange(90) // 2


def judge(task: str, **changes):
    features, target, groups = cohort()
    options = {"draws": [[Split(TRAIN, ASKED)]], "encoder": "mine", "seed": 0, **changes}
    return judge_numbers(task, features, target, groups, **options)


def test_knn_is_the_mean_of_scikit_learns_neighbours() -> None:
    features, target, _ = (part.numpy() for part in cohort())
    mean = features[:60].mean(0)
    unit = (features - mean) / np.linalg.norm(features - mean, axis=1, keepdims=True)
    expected = KNeighborsRegressor(20).fit(unit[:60], target[:60]).predict(unit[60:])
    found = [answer[0] for answer in judge("knn").episodes[0].answers[60:]]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_metrics_are_those_of_the_answers_and_the_unasked_have_none() -> None:
    found = judge("ridge")
    features, target, groups = cohort()
    probe = fit_ridge_cv(features[:60], target[:60], groups[:60], 0)
    predicted = probe.predict(features[60:]).numpy()
    assert found.settings["strength"] == probe.strength
    assert found.episodes[0].answers[:60] == [[]] * 60
    np.testing.assert_allclose([answer[0] for answer in found.episodes[0].answers[60:]], predicted)
    truth = target[60:].numpy()
    assert found.metrics["r2"].mean == pytest.approx(metrics.r2_score(truth, predicted))
    assert found.metrics["mae"].mean == pytest.approx(metrics.mean_absolute_error(truth, predicted))
    assert found.metrics["rmse"].mean == pytest.approx(metrics.root_mean_squared_error(truth, predicted))
    assert found.metrics["pearson"].mean == pytest.approx(np.corrcoef(truth, predicted)[0, 1])
    assert found.metrics["r2"].mean > 0.9


def test_the_interval_is_that_of_drawn_groups_repeated() -> None:
    _, target, groups = cohort()
    draws = [TRAIN[:20], TRAIN[20:60]]
    found = judge("ridge", draws=[[Split(rows, ASKED)] for rows in draws], fraction=0.5)
    predicted = [np.array([answer[0] for answer in e.answers[60:]]) for e in found.episodes]
    weights = group_weights(groups[60:], 1000, derive(0, "bootstrap")).long().numpy()
    drawn = []
    for column in weights.T:
        rows = np.repeat(np.arange(30), column)
        truth = target[60:].numpy()[rows]
        drawn.append(np.mean([np.abs(truth - each[rows]).mean() for each in predicted]))
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert (found.metrics["mae"].low, found.metrics["mae"].high) == pytest.approx((low, high))
    assert found.metrics["mae"].mean == pytest.approx(np.mean([e.metrics["mae"] for e in found.episodes]))
    assert (found.fraction, [e.support for e in found.episodes]) == (0.5, [rows.tolist() for rows in draws])


def test_the_mean_of_the_training_side_explains_nothing_and_has_no_correlation() -> None:
    found = judge("mean")
    _, target, _ = cohort()
    answers = [answer[0] for answer in found.episodes[0].answers[60:]]
    assert answers == pytest.approx([target[:60].mean().item()] * 30)
    assert found.metrics["r2"].mean <= 0
    assert "pearson" not in found.metrics
    assert set(NUMBER_TASKS) == {"ridge", "knn", "mean"}
