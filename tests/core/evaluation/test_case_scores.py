"""Scores of cases against brute force and scikit-learn; intervals of means and of differences."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from fmsuite.core.evaluation.case_scores import (
    COUNTS,
    class_values,
    estimates,
    label_values,
    mean_values,
    metrics_of,
    number_values,
    pooled_values,
    segmentation_scores,
    together,
)
from fmsuite.core.evaluation.cases import OVERALL
from fmsuite.core.evaluation.intervals import group_weights
from fmsuite.core.evaluation.segmentation import CaseCounts
from fmsuite.errors import FmsuiteError

SPACING = (2.0, 0.5, 1.0)
METRICS = ("dice", "nsd", "hd95")


def by_hand(predicted: np.ndarray, truth: np.ndarray, label: int, tolerance: float) -> dict[str, float]:
    """The definitions, one voxel after another."""

    def surface(mask: np.ndarray) -> list[np.ndarray]:
        inside = {tuple(place) for place in np.argwhere(mask)}
        steps = [sign * np.eye(3, dtype=int)[axis] for axis in range(3) for sign in (-1, 1)]
        return [np.array(p) * SPACING for p in inside if any(tuple(np.add(p, step)) not in inside for step in steps)]

    one, other = surface(predicted == label), surface(truth == label)
    there = [min(math.dist(a, b) for b in other) for a in one]
    back = [min(math.dist(a, b) for b in one) for a in other]
    both = ((predicted == label) & (truth == label)).sum()
    return {
        "dice": 2 * both / ((predicted == label).sum() + (truth == label).sum()),
        "nsd": sum(d <= tolerance for d in there + back) / len(there + back),
        "hd95": max(np.percentile(there, 95), np.percentile(back, 95)),
    }


def test_a_case_by_hand():
    random = np.random.default_rng(0)
    predicted, truth = (random.integers(0, 3, (4, 5, 6)).astype(np.uint8) for _ in range(2))
    found = segmentation_scores(predicted, truth.astype(np.int16), SPACING, 3, METRICS, tolerance=0.6)
    for label, metric in itertools.product((1, 2), METRICS):
        assert found[metric][label - 1] == pytest.approx(by_hand(predicted, truth, label, 0.6)[metric], abs=1e-12)


def test_what_is_absent_missed_or_ignored():
    truth, predicted = np.zeros((4, 4, 4), np.int16), np.zeros((4, 4, 4), np.uint8)
    truth[0, 0, 0] = 2
    found = segmentation_scores(predicted, truth, SPACING, 4, METRICS, tolerance=1.0)
    diagonal = math.sqrt(8**2 + 2**2 + 4**2)
    assert found["dice"] == [None, 0.0, None]
    assert found["nsd"] == [None, 0.0, None]
    assert found["hd95"] == [None, diagonal, None]
    predicted[1, 1, 1] = 1
    truth[1, 1, 1] = -1
    assert segmentation_scores(predicted, truth, SPACING, 4, METRICS, tolerance=1.0) == found
    truth[1, 1, 1] = 4
    with pytest.raises(FmsuiteError, match="the value 4, but there are 4 classes"):
        segmentation_scores(predicted, truth, SPACING, 4, METRICS, tolerance=1.0)


def test_differences_are_paired():
    random = np.random.default_rng(1)
    hard = torch.from_numpy(random.random((40, 2)))
    groups = torch.arange(40) // 2
    first, second = mean_values({"dice": hard + 0.01}, "ab"), mean_values({"dice": hard}, "ab")
    plain = estimates([first], groups, 200, 0.95, seed=0)["dice"]
    assert plain["a"].mean == pytest.approx(float(hard[:, 0].mean()) + 0.01)
    assert plain[OVERALL].mean == pytest.approx(float(hard.mean()) + 0.01)
    assert plain[OVERALL].low < plain[OVERALL].mean - 0.03
    less = estimates([first], groups, 200, 0.95, seed=0, less=[second])["dice"][OVERALL]
    assert (less.low, less.mean, less.high) == pytest.approx((0.01, 0.01, 0.01))
    assert less.std is None


def test_seeds_are_averaged_and_their_spread_is_said():
    tables = [torch.full((12, 1), value, dtype=torch.float64) for value in (0.5, 0.7)]
    found = estimates([mean_values({"dice": t}, ["a"]) for t in tables], torch.arange(12), 50, 0.95, seed=0)
    assert list(found["dice"]) == [OVERALL]
    assert found["dice"][OVERALL].mean == pytest.approx(0.6)
    assert found["dice"][OVERALL].std == pytest.approx(math.sqrt(0.02))


def test_cases_without_a_label_are_passed_over():
    table = torch.tensor([[0.5, float("nan")], [1.0, 0.25]], dtype=torch.float64)
    found = estimates([mean_values({"dice": table}, ["a", "b"])], torch.arange(2), 50, 0.95, seed=0)["dice"]
    assert [found[key].mean for key in ("a", "b", OVERALL)] == pytest.approx([0.75, 0.25, 0.5])


def test_the_other_tasks_against_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(2)
    one = torch.ones(60, 1, dtype=torch.float64)
    truth = torch.from_numpy(random.integers(0, 3, 60))
    shares = torch.from_numpy(random.random((60, 3))).softmax(1)
    found = class_values(shares, truth)(one)
    assert float(found["auroc", OVERALL]) == pytest.approx(metrics.roc_auc_score(truth, shares, multi_class="ovo"))
    assert float(found["accuracy", OVERALL]) == pytest.approx(metrics.accuracy_score(truth, shares.argmax(1)))

    known = torch.from_numpy(random.integers(-1, 2, (60, 2)))
    found = label_values(shares[:, :2], known, ["a", "b"])(one)
    for column, label in enumerate("ab"):
        rows = known[:, column] >= 0
        asked = known[rows, column], shares[rows, column]
        assert float(found["auroc", label]) == pytest.approx(metrics.roc_auc_score(*asked))
        assert float(found["average_precision", label]) == pytest.approx(metrics.average_precision_score(*asked))

    numbers = torch.from_numpy(random.normal(size=(60, 1)))
    numbers[0] = float("nan")
    found = number_values(shares[:, :1], numbers, ["age"])(one)
    asked = numbers[1:, 0], shares[1:, 0]
    assert float(found["r2", OVERALL]) == pytest.approx(metrics.r2_score(*asked))
    assert float(found["mae", OVERALL]) == pytest.approx(metrics.mean_absolute_error(*asked))


def test_a_label_that_all_cases_have_has_no_auroc():
    known = torch.ones(12, 1, dtype=torch.int64)
    found = estimates([label_values(torch.rand(12, 1), known, ["a"])], torch.arange(12), 50, 0.95, seed=0)
    assert found == {}


def test_metrics_say_their_tolerance_and_direction():
    found = metrics_of("segmentation", ("nsd", "dice"), 2.0, "mm")
    assert list(found) == ["dice", "nsd"]
    assert "2 mm" in found["nsd"].title
    assert not metrics_of("regression", (), 1.0, "mm")["mae"].higher


def test_figures_of_all_samples_together_are_scikit_learns_and_their_intervals_those_of_cases():
    """Scenes of unlike sizes, one without a label that others have; a label that nobody has; borders that do not
    count."""
    random = np.random.default_rng(1)
    asked = ("dice", "iou", "f1", "precision", "recall")
    predicted = [random.choice(4, (side, 12), p=[0.5, 0.3, 0.1, 0.1]) for side in (4, 9, 16, 5, 7, 11)]
    truth = [np.where(random.random(p.shape) < 0.6, p, random.choice(3, p.shape)) for p in predicted]
    truth[2][truth[2] == 2] = 0
    for one in truth:
        one[0] = -1
    found = [
        segmentation_scores(p.astype(np.uint8), t.astype(np.int16), (1.0, 1.0), 5, asked, tolerance=1.0)
        for p, t in zip(predicted, truth, strict=True)
    ]
    labels = ["a", "b", "c", "nobody"]
    counts = CaseCounts(*(torch.tensor([one[name] for one in found], dtype=torch.float64) for name in COUNTS))
    dice = torch.tensor([[np.nan if v is None else v for v in one["dice"]] for one in found])
    values = together(mean_values({"dice": dice}, labels), pooled_values(counts, asked[1:], labels))
    cells = estimates([values], torch.arange(6), 30, 0.9, 0)

    def by_scikit_learn(cases):
        kept = [(t[t >= 0], p[t >= 0]) for t, p in ((truth[n], predicted[n]) for n in cases)]
        t, p = (np.concatenate(part) for part in zip(*kept, strict=True))
        options = {"labels": [1, 2, 3], "average": None, "zero_division": 0}
        return {
            "iou": sk.jaccard_score(t, p, **options),
            "f1": sk.f1_score(t, p, **options),
            "precision": sk.precision_score(t, p, **options),
            "recall": sk.recall_score(t, p, **options),
        }

    for metric, rows in by_scikit_learn(range(6)).items():
        assert [cells[metric][label].mean for label in labels[:3]] == pytest.approx(rows.tolist())
        assert cells[metric][OVERALL].mean == pytest.approx(rows.mean())
        assert "nobody" not in cells[metric]
    times = group_weights(torch.arange(6), 30, 0).long().T.tolist()
    drawn = [by_scikit_learn(np.repeat(range(6), each))["iou"][0] for each in times]
    low, high = np.quantile(drawn, [0.05, 0.95])
    assert (cells["iou"]["a"].low, cells["iou"]["a"].high) == pytest.approx((low, high))
    single = by_scikit_learn([1])["iou"]
    assert found[1]["iou"][:3] == pytest.approx(single.tolist())
    assert found[1]["iou"][3] is None
    titles = metrics_of("segmentation", asked, 1.0, "m")
    assert list(titles) == ["dice", "recall", "precision", "f1", "iou"]
    assert titles["iou"].title.endswith("of all cases' samples together")
    assert not titles["iou"].by_case


def test_windows_have_macro_f1_micro_precision_and_root_of_the_squared_error():
    random = np.random.default_rng(5)
    probabilities, truth = random.random((40, 3)), random.integers(0, 3, 40)
    flat = torch.ones(40, 1, dtype=torch.float64)
    found = class_values(torch.from_numpy(probabilities), torch.from_numpy(truth))(flat)
    expected = sk.f1_score(truth, probabilities.argmax(1), average="macro")
    assert found["macro_f1", OVERALL].item() == pytest.approx(expected)
    has = random.random((40, 3)) < 0.4
    found = label_values(torch.from_numpy(probabilities), torch.from_numpy(has.astype(int)), ["a", "b", "c"])(flat)
    expected = sk.average_precision_score(has, probabilities, average="micro")
    assert found["micro_average_precision", OVERALL].item() == pytest.approx(expected)
    predicted, numbers = random.random((40, 1)), random.random((40, 1))
    found = number_values(torch.from_numpy(predicted), torch.from_numpy(numbers), ["biomass"])(flat)
    assert found["rmse", OVERALL].item() == pytest.approx(sk.root_mean_squared_error(numbers, predicted))
