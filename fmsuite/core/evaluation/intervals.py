"""Bootstrap intervals of any statistic, under resampling of groups (patients, scenes)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from fmsuite.core.evaluation.statistics import MIN_GROUPS
from fmsuite.core.seeding import generator
from fmsuite.errors import UsageError

Statistic = Callable[[Tensor], Mapping[str, Tensor]]
"""From (N, R) float64 weights of the items to (R,) values by name; NaN where a weighting leaves it undefined."""

_CHUNK_VALUES = 1 << 22


def group_weights(groups: Tensor, replicates: int, seed: int) -> Tensor:
    """(N, R) float64: how often each item's group was drawn, as many groups as there are, with replacement.

    Args:
        groups: (N,) int64.
    """
    names, member = groups.unique(return_inverse=True)
    drawn = generator(seed, "bootstrap").multinomial(len(names), np.full(len(names), 1 / len(names)), replicates)
    return torch.from_numpy(np.ascontiguousarray(drawn.T)).double()[member]


def group_intervals(
    statistic: Statistic,
    groups: Tensor,
    replicates: int = 1000,
    confidence: float = 0.95,
    *,
    seed: int,
) -> dict[str, tuple[float, float] | None]:
    """Percentile intervals of every value that a statistic has, under the cluster bootstrap (Field and Welsh 2007; see
    ``statistics.bootstrap``, whose draws these are).

    A statistic that returns the difference of two models on the same items gives a paired interval.

    Args:
        statistic: of weights.
        groups: (N,) int64 of the items.
        seed: of the draws.

    Returns:
        By name the bounds, or ``None`` with fewer than ``MIN_GROUPS`` groups, or where fewer than half of the
        replicates leave the value defined and finite.

    Raises:
        UsageError: without items or replicates, or for a confidence outside 0 to 1.
    """
    if not len(groups) or replicates < 1 or not 0 < confidence < 1:
        raise UsageError(
            "A bootstrap needs items, replicates, and a confidence between 0 and 1 "
            f"(it got {len(groups)}, {replicates} and {confidence:g})."
        )
    if len(groups.unique()) < MIN_GROUPS:
        return dict.fromkeys(statistic(torch.ones(len(groups), 1, dtype=torch.float64)))
    weights = group_weights(groups, replicates, seed)
    parts: dict[str, list[Tensor]] = {}
    for chunk in weights.split(max(1, _CHUNK_VALUES // len(groups)), dim=1):
        for name, values in statistic(chunk).items():
            parts.setdefault(name, []).append(values)
    bounds = [(1 - confidence) / 2, (1 + confidence) / 2]
    found: dict[str, tuple[float, float] | None] = {}
    for name, pieces in parts.items():
        drawn = torch.cat(pieces).double().numpy()
        kept = drawn[np.isfinite(drawn)]
        found[name] = None
        if len(kept) >= replicates / 2:
            low, high = np.quantile(kept, bounds)
            found[name] = (float(low), float(high))
    return found


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """The mean of the values that are there under many weightings.

    Args:
        values: (N, *) floating, NaN where an item has none.
        weights: (N, R).

    Returns:
        (*, R) float64, NaN where no item with a value has weight.
    """
    known = ~values.isnan()
    filled = torch.where(known, values, 0.0).double().flatten(1) if values.dim() > 1 else None
    if filled is None:
        total = torch.where(known, values, 0.0).double() @ weights.double()
        return total / (known.double() @ weights.double())
    total = filled.T @ weights.double()
    count = known.double().flatten(1).T @ weights.double()
    return (total / count).reshape(*values.shape[1:], -1)
