"""How sure a metric is: spread over episodes, and bootstrap intervals over groups (patients)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fmsuite.core.evaluation.metrics import BY_CLASS, METRICS, Tally, weighted_auroc
from fmsuite.core.seeding import generator
from fmsuite.errors import UsageError

MIN_GROUPS = 5
"""Fewer groups than that give no interval: their 126 distinct draws are no picture of a population."""
MIN_GROUPS_A_CLASS = 2
"""Nor does a class with fewer: its share of the spread would be zero."""
ENOUGH_GROUPS = 10
"""From so many of each class on, 95% intervals of independent answers of which 0.8 are right hold that in over 90% of
simulations; with 5 in 88%, with 3 in 73%."""

_CHUNK_VALUES = 1 << 25


@dataclass(frozen=True)
class Scored:
    """What a classifier said in one episode.

    Attributes:
        items: (Q,) int64 the items that were asked, each once.
        scores: (Q, C) floating.
        predicted, target: (Q,) int64 below C.
    """

    items: Tensor
    scores: Tensor
    predicted: Tensor
    target: Tensor


def summarise(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation (n - 1) of at least one value; no deviation of a single one."""
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else None


def describe(replicates: int = 1000, confidence: float = 0.95) -> str:
    """What the intervals of ``bootstrap`` are, in a sentence or two for the reader of results."""
    return (
        f"{confidence:.0%} percentile bootstrap: groups that were asked, which no split divides, drawn with "
        f"replacement {replicates:,} times, the metric averaged over the episodes in each draw. It says what other "
        f"groups to ask would change, not what other examples to train on would. Too narrow with fewer than "
        f"{ENOUGH_GROUPS} groups of a class, and of no width where nothing was wrong, which is no certainty. None "
        f"where fewer than {MIN_GROUPS} groups, or fewer than {MIN_GROUPS_A_CLASS} of a class, were asked."
    )


def bootstrap(
    scored: Sequence[Scored],
    groups: Tensor,
    classes: int,
    replicates: int = 1000,
    confidence: float = 0.95,
    *,
    seed: int,
    names: Sequence[str] = (),
) -> dict[str, tuple[float, float] | None]:
    """Percentile intervals of the mean over episodes of every metric, under resampling of groups.

    A replicate draws as many groups as were asked, with replacement, and weights every item by how often its group was
    drawn (Field and Welsh 2007, "Bootstrapping clustered data": the cluster bootstrap). Every metric of every episode
    is computed under these weights and averaged over the episodes; an interval runs between the quantiles of
    these averages (Efron 1979). So it says how the result would vary with other patients to ask, the supports being
    those that were drawn.

    An episode some of whose classes have no weight in a replicate is left out of it, as an episode whose queries lack
    a class would be; a replicate that so loses more than half of its episodes is left out; and if fewer than half of
    the replicates remain, there is no interval.

    Args:
        scored: at least one episode.
        groups: (S,) int64 group of every item that ``Scored.items`` may name.
        classes: C.
        replicates: at least 1. confidence: between 0 and 1.
        seed: of the draws.
        names: of the classes, for the metrics of each (``class_scores``) to have intervals too.

    Returns:
        For every metric of ``METRICS``, and of every class, its bounds, or ``None`` for all if fewer than
        ``MIN_GROUPS`` groups, or fewer than ``MIN_GROUPS_A_CLASS`` groups of a class, were asked.

    Raises:
        UsageError: without episodes or replicates, or for a confidence outside 0 to 1.
        FmsuiteError: if scores are not finite.
    """
    if not scored or replicates < 1 or not 0 < confidence < 1:
        raise UsageError(
            "A bootstrap needs at least one episode and one replicate, and a confidence between 0 and 1 "
            f"(it got {len(scored)}, {replicates} and {confidence:g})."
        )
    asked = torch.cat([episode.items for episode in scored])
    of_class = torch.cat([episode.target for episode in scored])
    drawn_from, position = groups[asked].unique(return_inverse=True)
    of_groups = torch.bincount((of_class * len(drawn_from) + position).unique() // len(drawn_from), minlength=classes)
    keys = [*METRICS, *(f"{metric}/{name}" for metric in BY_CLASS for name in names)]
    nothing: dict[str, tuple[float, float] | None] = dict.fromkeys(keys)
    if len(drawn_from) < MIN_GROUPS or bool(((of_groups > 0) & (of_groups < MIN_GROUPS_A_CLASS)).any()):
        return nothing
    even = np.full(len(drawn_from), 1 / len(drawn_from))
    drawn = generator(seed, "bootstrap").multinomial(len(drawn_from), even, replicates)
    counts = torch.from_numpy(np.ascontiguousarray(drawn.T)).float()
    members = position.split([len(episode.items) for episode in scored])

    sums = torch.zeros(len(keys), replicates, dtype=torch.float64)
    usable = torch.zeros(replicates, dtype=torch.float64)
    width = max(1, _CHUNK_VALUES // max(len(episode.items) for episode in scored))
    for start in range(0, replicates, width):
        part = slice(start, start + width)
        for episode, member in zip(scored, members):
            values, whole = _weighted(episode, classes, counts[:, part].index_select(0, member), bool(names))
            sums[:, part] += torch.where(whole, values, 0.0)
            usable[part] += whole
    kept = usable >= len(scored) / 2
    if int(kept.sum()) < replicates / 2:
        return nothing
    means = (sums[:, kept] / usable[kept]).numpy()
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2], axis=1)
    found = {name: (float(low[i]), float(high[i])) for i, name in enumerate(keys)}
    return {name: bounds if np.isfinite(bounds).all() else None for name, bounds in found.items()}


def _weighted(episode: Scored, classes: int, weights: Tensor, by_class: bool) -> tuple[Tensor, Tensor]:
    """(metrics, R) float64 values in the order of ``METRICS``, then of ``BY_CLASS`` class by class where asked for, and
    (R,) bool whether no class has lost all weight."""
    tally = Tally.of(episode.predicted, episode.target, classes, weights)
    values = {**tally.values(), "auroc": weighted_auroc(episode.scores, episode.target, weights)}
    present = torch.bincount(episode.target, minlength=classes) > 0
    whole = ((tally.true > 0) | ~present[:, None]).all(0) & values["auroc"].isfinite()
    rows = [torch.stack([values[name].double() for name in METRICS])]
    if by_class:
        found = tally.by_class()
        rows += [found[metric] for metric in BY_CLASS]
    return torch.cat(rows), whole
