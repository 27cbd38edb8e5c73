"""Findings predicted from features against scikit-learn; what is unknown counts nowhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn import metrics
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from fmsuite.core.evaluation.findings import judge_findings
from fmsuite.core.evaluation.intervals import group_weights
from fmsuite.core.evaluation.splits import Split
from fmsuite.core.seeding import derive

NAMES = ["Effusion", "Nodule", "Mass"]
TRAIN, ASKED = torch.arange(80), torch.arange(80, 140)


def cohort() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three findings that two features tell, a tenth of them unknown, differently for each."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(140, 8, generator=generator)
    noise = torch.randn(140, 3, generator=generator)
    target = (features[:, [0, 1, 0]] + noise > torch.tensor([0.5, 0.0, 1.0])).double()
    target[torch.rand(140, 3, generator=generator) < 0.1] = torch.nan
    return features, target, torch.arange(140) // 2


def judge(task: str, target: torch.Tensor | None = None, **changes):
    features, made, groups = cohort()
    options = {"draws": [[Split(TRAIN, ASKED)]], "encoder": "mine", "seed": 0, **changes}
    return judge_findings(task, features, made if target is None else target, NAMES, groups, **options)


def scores_of(evaluation) -> np.ndarray:
    assert evaluation.episodes[0].answers[:80] == [[]] * 80
    return np.array(evaluation.episodes[0].answers[80:])


def test_probes_are_scikit_learns_on_what_is_known() -> None:
    features, target, _ = (part.numpy() for part in cohort())
    found = scores_of(judge("linear"))
    for number in range(3):
        known = ~np.isnan(target[:80, number])
        probe = LogisticRegression(C=8 * 2 / 100, tol=1e-10, max_iter=1000)
        probe.fit(features[:80][known].astype(np.float64), target[:80, number][known] == 1)
        expected = probe.predict_proba(features[80:].astype(np.float64))[:, 1]
        np.testing.assert_allclose(found[:, number], expected, atol=1e-6)


def test_neighbours_are_scikit_learns_among_those_that_are_known() -> None:
    features, target, _ = (part.numpy() for part in cohort())
    mean = features[:80].mean(0)
    unit = (features - mean) / np.linalg.norm(features - mean, axis=1, keepdims=True)
    found = scores_of(judge("knn"))
    for number in range(3):
        known = ~np.isnan(target[:80, number])
        voters = KNeighborsClassifier(20).fit(unit[:80][known], target[:80, number][known])
        np.testing.assert_allclose(found[:, number], voters.predict_proba(unit[80:])[:, 1], atol=1e-6)


def test_areas_and_precisions_are_scikit_learns_on_what_is_known() -> None:
    _, target, groups = cohort()
    evaluation = judge("linear")
    scores, truth = scores_of(evaluation), target[80:].numpy()
    areas, precisions = [], []
    for number, name in enumerate(NAMES):
        known = ~np.isnan(truth[:, number])
        areas.append(metrics.roc_auc_score(truth[known, number], scores[known, number]))
        precisions.append(metrics.average_precision_score(truth[known, number], scores[known, number]))
        assert evaluation.metrics[f"auroc/{name}"].mean == pytest.approx(areas[-1])
        assert evaluation.metrics[f"map/{name}"].mean == pytest.approx(precisions[-1])
    assert evaluation.metrics["macro_auroc"].mean == pytest.approx(np.mean(areas))
    assert evaluation.metrics["map"].mean == pytest.approx(np.mean(precisions))

    drawn = []
    for column in group_weights(groups[80:], 1000, derive(0, "bootstrap")).long().numpy().T:
        rows = np.repeat(np.arange(60), column)
        here, gone = (scores[rows[truth[rows, 0] == there], 0] for there in (1, 0))
        pairs = here[:, None] - gone[None]
        drawn.append((pairs > 0).mean() + (pairs == 0).mean() / 2)
    estimate = evaluation.metrics["auroc/Effusion"]
    assert (estimate.low, estimate.high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=1e-9)


def test_a_finding_that_is_never_shown_is_answered_by_its_share_and_said() -> None:
    _, target, _ = cohort()
    target[:80, 2] = 0.0
    evaluation = judge("linear", target)
    assert (scores_of(evaluation)[:, 2] == 0).all()
    assert evaluation.metrics["auroc/Mass"].mean == pytest.approx(0.5)
    assert any("'Mass'" in note for note in evaluation.notes)
    target[:80, 2] = torch.nan
    evaluation = judge("knn", target)
    assert (scores_of(evaluation)[:, 2] == 0.5).all()
    assert any("'Mass' nothing is known" in note for note in evaluation.notes)


def test_a_finding_that_is_never_asked_has_no_area_and_is_left_out_of_the_mean() -> None:
    _, target, _ = cohort()
    target[80:, 2] = 0.0
    evaluation = judge("linear", target)
    assert "auroc/Mass" not in evaluation.metrics
    areas = [evaluation.metrics[f"auroc/{name}"].mean for name in NAMES[:2]]
    assert evaluation.metrics["macro_auroc"].mean == pytest.approx(np.mean(areas))


def test_draws_of_a_share_are_averaged() -> None:
    found = judge("linear", draws=[[Split(TRAIN[:30], ASKED)], [Split(TRAIN[30:60], ASKED)]], fraction=0.4)
    for name in ("macro_auroc", "auroc/Nodule"):
        values = [episode.metrics[name] for episode in found.episodes]
        assert found.metrics[name].mean == pytest.approx(np.mean(values))
        assert found.metrics[name].low < found.metrics[name].mean < found.metrics[name].high
