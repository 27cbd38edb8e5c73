from __future__ import annotations

import itertools
import json
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from fmsuite.core.evaluation.metrics import (
    BY_CLASS,
    METRICS,
    Tally,
    accuracy,
    auroc_ovo,
    balanced_accuracy,
    class_scores,
    confusion,
    quadratic_kappa,
    score,
    weighted_auroc,
    weighted_f1,
)
from fmsuite.errors import FmsuiteError, UsageError


def draw(
    classes: int, items: int = 300, seed: int = 0, levels: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores (rows sum to 1) that lean to the target, the target, and weights; few levels make ties."""
    rng = np.random.default_rng(seed)
    target = rng.choice(classes, items, p=np.arange(1, classes + 1) / (classes * (classes + 1) / 2))
    raw = rng.random((items, classes)) + 0.3 * np.eye(classes)[target]
    if levels is not None:
        raw = np.ceil(raw * levels)
    weights = torch.from_numpy(rng.integers(0, 4, items)).double()
    return torch.from_numpy(raw / raw.sum(1, keepdims=True)), torch.from_numpy(target), weights


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("classes", [2, 3, 6])
def test_metrics_of_predicted_classes_equal_scikit_learn(classes: int, weighted: bool) -> None:
    scores, target, weights = draw(classes)
    predicted = scores.argmax(1)
    used = weights if weighted else None
    reference = {"sample_weight": weights.numpy() if weighted else None}
    t, p = target.numpy(), predicted.numpy()
    assert accuracy(predicted, target, used) == pytest.approx(sk.accuracy_score(t, p, **reference), abs=1e-12)
    ours = balanced_accuracy(predicted, target, used)
    assert ours == pytest.approx(sk.balanced_accuracy_score(t, p, **reference), abs=1e-12)
    ours = weighted_f1(predicted, target, used)
    assert ours == pytest.approx(sk.f1_score(t, p, average="weighted", **reference), abs=1e-12)
    ours = quadratic_kappa(predicted, target, used)
    assert ours == pytest.approx(sk.cohen_kappa_score(t, p, weights="quadratic", **reference), abs=1e-12)
    assert confusion(predicted, target, classes, used).tolist() == sk.confusion_matrix(t, p, **reference).tolist()


def test_balanced_accuracy_leaves_out_classes_that_are_only_predicted() -> None:
    rng = np.random.default_rng(0)
    target, predicted = rng.choice(4, 300, p=[0.7, 0.2, 0.08, 0.02]), rng.integers(0, 5, 300)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = sk.balanced_accuracy_score(target, predicted)
    assert balanced_accuracy(torch.from_numpy(predicted), torch.from_numpy(target)) == pytest.approx(expected)


@pytest.mark.parametrize("levels", [None, 3])
@pytest.mark.parametrize("classes", [2, 3, 6])
def test_auroc_equals_scikit_learn_with_and_without_ties(classes: int, levels: int | None) -> None:
    scores, target, _ = draw(classes, levels=levels)
    if classes == 2:
        expected = sk.roc_auc_score(target.numpy(), scores[:, 1].numpy())
    else:
        expected = sk.roc_auc_score(target.numpy(), scores.numpy(), multi_class="ovo", average="macro")
    assert auroc_ovo(scores, target) == pytest.approx(expected, abs=1e-12)


def pairs_by_scikit_learn(scores: torch.Tensor, target: torch.Tensor, weights: torch.Tensor) -> float:
    """Hand and Till's mean over ordered pairs of classes, each area by scikit-learn."""
    areas = []
    for a, b in itertools.permutations(target[weights > 0].unique().tolist(), 2):
        among = (target == a) | (target == b)
        positive = (target[among] == a).numpy()
        areas.append(sk.roc_auc_score(positive, scores[among, a].numpy(), sample_weight=weights[among].numpy()))
    return float(np.mean(areas))


@pytest.mark.parametrize("levels", [None, 3])
@pytest.mark.parametrize("classes", [2, 4])
def test_weighted_auroc_equals_weighted_pairs_by_scikit_learn(classes: int, levels: int | None) -> None:
    scores, target, weights = draw(classes, levels=levels)
    assert auroc_ovo(scores, target, weights) == pytest.approx(pairs_by_scikit_learn(scores, target, weights))


def test_a_class_missing_from_the_target_is_in_no_pair() -> None:
    scores, target, _ = draw(4)
    kept = target != 2
    scores, target = scores[kept], target[kept]
    expected = pairs_by_scikit_learn(scores, target, torch.ones(len(target)))
    assert auroc_ovo(scores, target) == pytest.approx(expected)


def test_many_weightings_at_once_equal_each_alone() -> None:
    scores, target, _ = draw(3, items=60, levels=4)
    weights = torch.from_numpy(np.random.default_rng(1).integers(0, 3, (60, 300))).float()
    weights[target == 1, 7] = 0
    weights[target != 1, 8] = 0
    together = weighted_auroc(scores, target, weights)
    assert torch.isnan(together[8])
    for column in range(300):
        if column != 8:
            expected = auroc_ovo(scores, target, weights[:, column])
            assert together[column].item() == pytest.approx(expected, abs=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 4), st.integers(2, 30))
def test_whole_weights_repeat_items_and_order_does_not_matter(seed: int, classes: int, items: int) -> None:
    scores, target, weights = draw(classes, items=items, seed=seed, levels=3)
    weights[:2], target[:2] = 1, torch.tensor([0, 1])
    predicted = scores.argmax(1)
    rows = torch.repeat_interleave(torch.arange(items), weights.long())
    rows = rows[torch.from_numpy(np.random.default_rng(seed).permutation(len(rows)))]
    repeated = score(scores[rows], predicted[rows], target[rows], classes)
    weighed = {
        "balanced_accuracy": balanced_accuracy(predicted, target, weights),
        "auroc": auroc_ovo(scores, target, weights),
        "weighted_f1": weighted_f1(predicted, target, weights),
        "quadratic_kappa": quadratic_kappa(predicted, target, weights),
        "accuracy": accuracy(predicted, target, weights),
    }
    of_classes = Tally.of(predicted, target, classes, weights).values()
    weighed |= {name: of_classes[name].item() for name in ("macro_f1", "macro_precision", "mean_iou")}
    assert weighed == pytest.approx(repeated, abs=1e-12)


def test_kappa_of_a_constant_prediction_and_of_a_single_class_is_zero() -> None:
    target = torch.tensor([0, 1, 2, 2])
    assert quadratic_kappa(torch.full((4,), 1), target) == 0
    assert quadratic_kappa(torch.tensor([0, 1, 0, 2]), torch.zeros(4, dtype=torch.int64)) == 0
    assert quadratic_kappa(torch.full((4,), 2), torch.full((4,), 2)) == 0
    thirds = torch.full((3,), 1 / 3)
    assert quadratic_kappa(torch.full((3,), 31), torch.full((3,), 31), thirds) == 0


def test_kappa_keeps_the_place_of_a_class_that_does_not_occur() -> None:
    target, predicted = torch.tensor([0, 3, 3, 1, 0]), torch.tensor([0, 3, 1, 1, 3])
    expected = sk.cohen_kappa_score(target.numpy(), predicted.numpy(), weights="quadratic", labels=[0, 1, 2, 3])
    squeezed = sk.cohen_kappa_score(target.numpy(), predicted.numpy(), weights="quadratic")
    assert quadratic_kappa(predicted, target) == pytest.approx(expected)
    assert abs(expected - squeezed) > 0.01


def test_score_has_every_metric_and_is_valid_json() -> None:
    scores, target, _ = draw(3)
    constant = torch.zeros_like(scores)
    found = score(constant, torch.zeros_like(target), target, 3)
    assert list(found) == list(METRICS)
    assert found["auroc"] == pytest.approx(0.5)
    assert found["balanced_accuracy"] == pytest.approx(1 / 3)
    perfect = torch.nn.functional.one_hot(target, 3).double()
    assert score(perfect, target, target, 3) == pytest.approx(dict.fromkeys(METRICS, 1.0))
    assert auroc_ovo(perfect, target) <= 1
    json.dumps(found, allow_nan=False)


def test_one_class_and_scores_that_are_not_finite_are_refused() -> None:
    scores, target, _ = draw(3)
    with pytest.raises(UsageError, match="Only one class"):
        score(scores, scores.argmax(1), torch.ones_like(target), 3)
    scores[5, 1] = torch.nan
    with pytest.raises(FmsuiteError, match="not finite"):
        auroc_ovo(scores, target)


@pytest.mark.parametrize("weighted", [False, True])
def test_metrics_of_each_class_equal_scikit_learn_absent_classes_included(weighted: bool) -> None:
    """Class 4 is only predicted, class 3 is never predicted, class 5 is neither there nor predicted."""
    rng = np.random.default_rng(8)
    target, predicted = rng.choice(4, 200, p=[0.5, 0.3, 0.15, 0.05]), rng.choice([0, 1, 2, 4], 200)
    times = rng.integers(0, 3, 200) if weighted else np.ones(200)
    tally = Tally.of(torch.from_numpy(predicted), torch.from_numpy(target), 6, torch.from_numpy(times).double())
    found = {name: values.numpy() for name, values in tally.by_class().items()}
    of = {"labels": range(5), "average": None, "zero_division": 0, "sample_weight": times}
    expected = {
        "recall": sk.recall_score(target, predicted, **of),
        "precision": sk.precision_score(target, predicted, **of),
        "f1": sk.f1_score(target, predicted, **of),
        "iou": sk.jaccard_score(target, predicted, **of),
    }
    assert set(found) == set(BY_CLASS)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name][:5], values, err_msg=name)
        assert np.isnan(found[name][5])
    # Swapped, the two would be told apart.
    assert abs(expected["recall"] - expected["precision"]).max() > 0.1
    macro = {"average": "macro", "zero_division": 0, "sample_weight": times}
    values = tally.values()
    assert values["macro_f1"].item() == pytest.approx(sk.f1_score(target, predicted, **macro))
    assert values["macro_precision"].item() == pytest.approx(sk.precision_score(target, predicted, **macro))
    assert values["mean_iou"].item() == pytest.approx(sk.jaccard_score(target, predicted, **macro))
    assert values["accuracy"].item() == pytest.approx(sk.accuracy_score(target, predicted, sample_weight=times))


def test_classes_are_named_and_those_that_nobody_speaks_of_are_left_out() -> None:
    found = class_scores(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 1]), ["a", "b", "c"])
    assert found["recall/b"] == pytest.approx(2 / 3)
    assert found["precision/b"] == 1
    assert found["iou/a"] == pytest.approx(1 / 2)
    assert not any(name.endswith("/c") for name in found)
