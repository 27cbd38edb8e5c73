"""Metrics of several labels against scikit-learn, alone and under weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn import metrics

from fmsuite.core.evaluation.multilabel import multilabel_scores
from fmsuite.errors import FmsuiteError, UsageError


def reference(scores: np.ndarray, target: np.ndarray) -> dict[str, float]:
    said = scores >= 0.5
    return {
        "map": metrics.average_precision_score(target, scores, average="macro"),
        "macro_f1": metrics.f1_score(target, said, average="macro"),
        "micro_f1": metrics.f1_score(target, said, average="micro"),
        "macro_auroc": metrics.roc_auc_score(target, scores, average="macro"),
    }


def test_equal_to_scikit_learn_with_repeated_items():
    random = np.random.default_rng(1)
    target = random.random((40, 4)) < (0.2, 0.4, 0.5, 0.7)
    scores = np.round(np.clip(0.3 * target + random.random((40, 4)) * 0.7, 0, 1), 1)
    counts = random.integers(0, 3, (40, 2))
    found = multilabel_scores(torch.from_numpy(scores), torch.from_numpy(target))
    expected = reference(scores, target)
    assert {name: found[name].item() for name in expected} == pytest.approx(expected)
    assert found["map/2"].item() == pytest.approx(metrics.average_precision_score(target[:, 2], scores[:, 2]))
    weighted = multilabel_scores(torch.from_numpy(scores), torch.from_numpy(target), weights=torch.from_numpy(counts))
    for column in range(2):
        rows = np.repeat(np.arange(40), counts[:, column])
        expected = reference(scores[rows], target[rows])
        assert {name: weighted[name][column].item() for name in expected} == pytest.approx(expected)


def test_labels_that_never_occur_are_passed_over():
    target = torch.tensor([[1, 0, 1], [0, 0, 1], [1, 0, 1]], dtype=torch.bool)
    scores = torch.tensor([[0.9, 0.1, 0.9], [0.2, 0.2, 0.8], [0.1, 0.3, 0.9]])
    found = multilabel_scores(scores, target)
    assert found["map/1"].isnan()
    assert found["map"].item() == pytest.approx(((1 + 2 / 3) / 2 + 1) / 2)
    assert found["macro_auroc"].item() == pytest.approx(0.5)
    assert found["macro_f1"].item() == pytest.approx((2 / 3 + 1) / 2)


def test_bad_scores_are_refused():
    with pytest.raises(FmsuiteError, match="not finite"):
        multilabel_scores(torch.tensor([[torch.inf]]), torch.ones(1, 1, dtype=torch.bool))
    with pytest.raises(UsageError, match="equal tables"):
        multilabel_scores(torch.zeros(2, 3), torch.zeros(2, 2))


def test_the_micro_average_ranks_all_decisions_together():
    random = np.random.default_rng(4)
    target = random.random((60, 5)) < [0.1, 0.3, 0.5, 0.7, 0.0]
    scores = random.random((60, 5)).round(1)
    found = multilabel_scores(torch.from_numpy(scores), torch.from_numpy(target))
    assert found["micro_map"].item() == pytest.approx(metrics.average_precision_score(target, scores, average="micro"))
    macro = metrics.average_precision_score(target[:, :4], scores[:, :4], average="macro")
    assert found["map"].item() == pytest.approx(macro)
    known = random.random((60, 5)) < 0.7
    weights = torch.from_numpy(random.integers(0, 4, (60, 3))).double()
    found = multilabel_scores(
        torch.from_numpy(scores), torch.from_numpy(target), weights=weights, known=torch.from_numpy(known)
    )
    for column in range(3):
        times = (weights[:, column, None].numpy() * known).ravel()
        expected = metrics.average_precision_score(target.ravel(), scores.ravel(), sample_weight=times)
        assert found["micro_map"][column].item() == pytest.approx(expected)
