"""The paired interval against a loop that repeats items, a closed case, and its reason to exist."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import balanced_accuracy_score

from fmsuite.core.evaluation.paired import paired_difference
from fmsuite.core.evaluation.statistics import Scored, bootstrap
from fmsuite.core.seeding import generator
from fmsuite.errors import UsageError


def cohort(seed: int, items: int = 60, groups: int = 20, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.integers(0, classes, items), np.sort(random.integers(0, groups, items))


def guesses(labels: np.ndarray, right: float, seed: int, episodes: int = 1) -> np.ndarray:
    random = np.random.default_rng(seed)
    wrong = (labels + random.integers(1, labels.max() + 1, (episodes, len(labels)))) % (labels.max() + 1)
    return np.where(random.random((episodes, len(labels))) < right, labels, wrong)


def test_it_equals_a_loop_that_repeats_every_item_as_often_as_its_group_was_drawn() -> None:
    labels, groups = cohort(0)
    first, second = guesses(labels, 0.8, 1, episodes=4), guesses(labels, 0.6, 2, episodes=2)
    first[0, ::3] = -1
    second[1, 5:20] = -1
    # Few of class 2 are left in this episode, so that replicates lose it.
    first[1, np.flatnonzero(labels == 2)[2:]] = -1
    names = np.unique(groups)
    drawn = generator(7, "paired").multinomial(len(names), np.full(len(names), 1 / len(names)), 50)
    differences = []
    for counts in drawn:
        often = dict(zip(names, counts, strict=True))
        rows = np.concatenate([[item] * often[groups[item]] for item in range(len(labels))]).astype(int)
        means = []
        for side in (first, second):
            scores = []
            for episode in side:
                kept = rows[episode[rows] >= 0]
                if set(labels[kept]) == set(labels[episode >= 0]):
                    scores.append(balanced_accuracy_score(labels[kept], episode[kept]))
            means.append(np.mean(scores) if len(scores) >= len(side) / 2 else None)
        if None not in means:
            differences.append(means[0] - means[1])
    assert len(differences) > 25
    expected = np.quantile(differences, [0.025, 0.975])
    assert paired_difference(first, second, labels, groups, 50, seed=7) == pytest.approx(tuple(expected), abs=1e-6)


def test_a_constant_gain_has_the_quantiles_of_a_binomial() -> None:
    """Two balanced classes of items in groups of their own; the second is wrong on a third of one class only."""
    labels = np.repeat([0, 1], 300)
    second = labels.copy()
    second[:100] = 1
    low, high = paired_difference(labels[None], second[None], labels, np.arange(600), 4000, seed=0) or (0, 0)
    # The drawn share of class 0 that is wrong is nearly binomial(300, 1/3) / 300; halved by the mean over classes.
    expected = stats.binom.ppf([0.025, 0.975], 300, 1 / 3) / 300 / 2
    assert (low, high) == pytest.approx(tuple(expected), abs=0.006)


def test_it_tells_apart_what_overlapping_intervals_leave_open() -> None:
    labels, groups = cohort(3, items=120, groups=40, classes=2)
    second = guesses(labels, 0.7, 4)
    first = second.copy()
    mended = np.flatnonzero(second[0] != labels)[::3]
    first[0, mended] = labels[mended]
    bounds = []
    for side in (first, second):
        scores = torch.nn.functional.one_hot(torch.from_numpy(side[0]), 2).double()
        scored = Scored(torch.arange(120), scores, torch.from_numpy(side[0]), torch.from_numpy(labels))
        bounds.append(bootstrap([scored], torch.from_numpy(groups), 2, seed=0)["balanced_accuracy"])
    assert bounds[0] is not None
    assert bounds[1] is not None
    assert bounds[0][0] < bounds[1][1]
    interval = paired_difference(first, second, labels, groups, seed=0)
    assert interval is not None
    assert 0 < interval[0] < (first == labels).mean() - (second == labels).mean() + 0.05


def test_equal_classifiers_do_not_differ_and_the_sign_turns_with_the_order() -> None:
    labels, groups = cohort(5)
    first, second = guesses(labels, 0.9, 6), guesses(labels, 0.5, 8)
    assert paired_difference(first, first, labels, groups, seed=1) == (0.0, 0.0)
    low, high = paired_difference(first, second, labels, groups, seed=1) or (0, 0)
    assert paired_difference(second, first, labels, groups, seed=1) == pytest.approx((-high, -low))


def test_too_few_groups_give_no_interval_and_nothing_to_compare_is_refused() -> None:
    labels = np.array([0, 1, 0, 1, 0, 1])
    assert paired_difference(labels[None], labels[None], labels, np.array([0, 0, 1, 1, 2, 2]), seed=0) is None
    one_class_in_one_group = np.array([0, 9, 1, 9, 2, 9])
    labels = np.array([0, 1, 0, 1, 0, 1])
    assert paired_difference(labels[None], labels[None], labels, one_class_in_one_group, seed=0) is None
    with pytest.raises(UsageError):
        paired_difference(np.empty((0, 6)), labels[None], labels, np.arange(6), seed=0)
