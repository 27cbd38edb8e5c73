"""How two classifiers differ when both were asked about the same items."""

from __future__ import annotations

import numpy as np

from fmsuite.core.evaluation.statistics import MIN_GROUPS, MIN_GROUPS_A_CLASS
from fmsuite.core.seeding import generator
from fmsuite.errors import UsageError

_CHUNK_VALUES = 1 << 24


def paired_difference(
    first: np.ndarray,
    second: np.ndarray,
    labels: np.ndarray,
    groups: np.ndarray,
    replicates: int = 1000,
    confidence: float = 0.95,
    *,
    seed: int,
) -> tuple[float, float] | None:
    """Percentile interval of the difference of two mean balanced accuracies, under resampling of groups.

    Both see the same replicates (groups drawn with replacement, as in ``statistics.bootstrap``), so what is hard for
    both cancels: the interval is that of the difference, and can exclude zero where the two intervals overlap (Efron
    and Tibshirani 1993, "An Introduction to the Bootstrap", section 8.3). Episodes that lose a class in a replicate,
    and replicates that lose too many episodes, are left out as in ``statistics.bootstrap``.

    Args:
        first, second: (E, S) and (F, S) integer predicted classes of every episode, -1 where an item was not asked.
        labels, groups: (S,) integers.
        seed: of the draws.

    Returns:
        Bounds of first - second; ``None`` if fewer than ``MIN_GROUPS`` groups, or fewer than ``MIN_GROUPS_A_CLASS`` of
        a class, were asked of both, or if fewer than half of the replicates are left.

    Raises:
        UsageError: without episodes or replicates, or for a confidence outside 0 to 1.
    """
    if not len(first) or not len(second) or replicates < 1 or not 0 < confidence < 1:
        raise UsageError("A paired bootstrap needs episodes of both, replicates, and a confidence between 0 and 1.")
    asked = (first >= 0).any(0) & (second >= 0).any(0)
    names, member = np.unique(groups[asked], return_inverse=True)
    of_class = [len(np.unique(member[labels[asked] == label])) for label in np.unique(labels[asked])]
    if len(names) < MIN_GROUPS or min(of_class) < MIN_GROUPS_A_CLASS:
        return None
    drawn = generator(seed, "paired").multinomial(len(names), np.full(len(names), 1 / len(names)), replicates)
    weights = drawn[:, member].astype(np.float32)
    scores = [_balanced(side[:, asked], labels[asked], weights) for side in (first, second)]
    difference = scores[0] - scores[1]
    kept = np.isfinite(difference)
    if kept.sum() < replicates / 2:
        return None
    low, high = np.quantile(difference[kept], [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _balanced(predicted: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(R,) float64 balanced accuracy under each row of ``weights`` (R, S), averaged over the episodes in which no class
    has lost all weight; NaN where these are fewer than half."""
    total = np.zeros(len(weights))
    episodes = np.zeros(len(weights))
    step = max(1, _CHUNK_VALUES // max(predicted.shape[1], len(weights)))
    for start in range(0, len(predicted), step):
        part = predicted[start : start + step]
        recall = np.zeros((len(weights), len(part)))
        whole = np.ones((len(weights), len(part)), dtype=bool)
        classes = np.zeros(len(part))
        for label in np.unique(labels):
            mine = labels == label
            # Weights are small whole numbers, so float32 sums of them are exact.
            among = weights[:, mine] @ (part[:, mine] >= 0).astype(np.float32).T
            right = weights[:, mine] @ (part[:, mine] == label).astype(np.float32).T
            recall += np.divide(right, among, out=np.zeros_like(right), where=among > 0)
            asked = (part[:, mine] >= 0).any(1)
            classes += asked
            whole &= (among > 0) | ~asked
        whole &= classes > 0
        total += np.where(whole, recall / np.maximum(classes, 1), 0.0).sum(1)
        episodes += whole.sum(1)
    enough = episodes >= max(1, len(predicted) / 2)
    return np.divide(total, episodes, out=np.full_like(total, np.nan), where=enough)
