"""Retrieval: what the nearest items of a query say of its label."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fmsuite.core.evaluation.folds import Folds
from fmsuite.core.evaluation.intervals import group_intervals, weighted_mean
from fmsuite.core.evaluation.metrics import confusion
from fmsuite.core.evaluation.results import Episode, Estimate, Evaluation
from fmsuite.core.evaluation.splits import Split, trained_on
from fmsuite.core.seeding import derive
from fmsuite.errors import UsageError

RETRIEVAL = "retrieval"
TITLE = (
    "Every item that is asked looks for its like among the training items, none of which is of its group: cosine of "
    "features from which the mean of these is taken off; nothing is trained."
)
KS = (1, 5, 20)
PRIMARY = "acc@1"

METRICS: dict[str, str] = {
    "acc@k": "share of the queries that have an item of their own label among the k nearest",
    "mv@k": "share of the queries whose label most of the k nearest have",
    "map@k": "mean over the queries of the average precision among the k nearest",
}
"""Name to what it is."""

_CHUNK_VALUES = 1 << 25


def nearest(
    queries: Tensor,
    gallery: Tensor,
    k: int,
    metric: Literal["cosine", "euclidean"] = "cosine",
    query_groups: Tensor | None = None,
    gallery_groups: Tensor | None = None,
) -> Tensor:
    """The nearest items of each query, the nearest first; of equally near ones any.

    Args:
        queries: (Q, D). gallery: (G, D).
        k: at most G.
        query_groups, gallery_groups: (Q,), (G,) int64; items of a query's own group (patient, scene) are passed over.

    Returns:
        (Q, k) int64 numbers of gallery items, -1 where a query has fewer than k to ask.

    Raises:
        UsageError: for k below 1, an empty gallery, or groups of one side only.
    """
    if k < 1 or not len(gallery):
        raise UsageError(f"Retrieval needs a k of at least 1 and a gallery (k = {k}, {len(gallery)} items).")
    if (query_groups is None) != (gallery_groups is None):
        raise UsageError("Groups are given for the queries or for the gallery, but not for both.")
    queries, gallery = queries.float(), gallery.float()
    if metric == "cosine":
        queries, gallery = F.normalize(queries, dim=1), F.normalize(gallery, dim=1)
    rows = max(1, _CHUNK_VALUES // len(gallery))
    found = []
    for start in range(0, len(queries), rows):
        closeness = queries[start : start + rows] @ gallery.T
        if metric == "euclidean":
            closeness = 2 * closeness - gallery.square().sum(1)
        if query_groups is not None and gallery_groups is not None:
            own = query_groups[start : start + rows, None] == gallery_groups[None]
            closeness = closeness.masked_fill(own, -torch.inf)
        top = closeness.topk(min(k, len(gallery)), dim=1)
        found.append(
            F.pad(torch.where(top.values.isfinite(), top.indices, -1), (0, k - top.indices.shape[1]), value=-1)
        )
    return torch.cat(found) if found else torch.empty(0, k, dtype=torch.int64)


def retrieval_scores(
    found: Tensor, query_labels: Tensor, gallery_labels: Tensor, ks: tuple[int, ...] = (1, 3, 5)
) -> dict[str, Tensor]:
    """Each query's score by name (``acc@5``); their mean, weighted or not, is the metric.

    ``acc@k``: 1 if any of the first k has the query's label. ``mv@k``: 1 if that label has most votes of the first k;
    of equal numbers of votes the label whose first vote is nearer wins. ``map@k``: the sum over places i of a right
    item of (right ones up to i) / i, divided by the number of right ones among the first k; 0 without any. (Others
    divide by the number of right ones in the gallery, or the smaller of it and k, which mixes recall in.)

    Args:
        found: (Q, K) as ``nearest`` gives it, K at least the largest of ``ks``; -1 is neither right nor a vote.
        query_labels: (Q,) int64. gallery_labels: (G,) int64, not negative.

    Returns:
        (Q,) float64 each.

    Raises:
        UsageError: if fewer neighbours were found than a k asks for.
    """
    if min(ks) < 1 or max(ks) > found.shape[1]:
        raise UsageError(f"k of {ks} cannot be asked of {found.shape[1]} neighbours.", "Search for more neighbours.")
    labels = torch.where(found >= 0, gallery_labels[found.clamp(min=0)], -1)
    right = (labels == query_labels[:, None]) & (labels >= 0)
    scores: dict[str, Tensor] = {}
    for k in ks:
        first, hit = labels[:, :k], right[:, :k].double()
        precision = hit.cumsum(1) / torch.arange(1, k + 1)
        scores[f"acc@{k}"] = hit.amax(1)
        scores[f"mv@{k}"] = (_majority(first) == query_labels).double()
        scores[f"map@{k}"] = (precision * hit).sum(1) / hit.sum(1).clamp(min=1)
    return scores


def _majority(labels: Tensor) -> Tensor:
    """(Q,) the label with most votes in each row of (Q, k), -1 being none; of several the one that comes first."""
    votes = (labels[:, :, None] == labels[:, None, :]).sum(2)
    places = labels.shape[1]
    rank = torch.where(labels >= 0, votes * places - torch.arange(places), -places)
    return labels.gather(1, rank.argmax(1, keepdim=True))[:, 0]


def judge_retrieval(
    features: Tensor,
    labels: Tensor,
    groups: Tensor,
    split: Split | Folds,
    classes: int,
    *,
    encoder: str,
    seed: int,
    ks: tuple[int, ...] = KS,
) -> Evaluation:
    """Ask the test side what of the training side is most alike; of folds, each fold what of the others is.

    The predictions are the labels of the nearest items.

    Args:
        features: (S, D) float32 of every item. labels: (S,) int64 below ``classes``. groups: (S,) int64.
        encoder: name of what made the features.
        seed: of the bootstrap over groups.
    """
    asked = torch.cat([part.test for part in split.parts])
    per_item: list[dict[str, Tensor]] = []
    first: list[Tensor] = []
    for part in split.parts:
        mean = features[part.train].mean(0)
        gallery, queries = features[part.train] - mean, features[part.test] - mean
        found = nearest(queries, gallery, max(ks), "cosine", groups[part.test], groups[part.train])
        per_item.append(retrieval_scores(found, labels[part.test], labels[part.train], ks))
        first.append(labels[part.train][found[:, 0]])
    names = list(per_item[0])
    table = torch.stack([torch.cat([each[name] for each in per_item]) for name in names], dim=1)
    predicted = torch.cat(first)
    predictions = torch.full((len(labels),), -1)
    predictions[asked] = predicted

    def values(weights: Tensor) -> dict[str, Tensor]:
        return dict(zip(names, weighted_mean(table, weights), strict=True))

    bounds = group_intervals(values, groups[asked], seed=derive(seed, "bootstrap"))
    means = dict(zip(names, table.mean(0).tolist(), strict=True))
    settings = {"distance": "cosine", "centred": True, "k": list(ks)}
    if len(split.parts) > 1:
        settings |= trained_on(split.parts, groups)
    estimates = {}
    for name, mean_value in means.items():
        low, high = bounds[name] or (None, None)
        estimates[name] = Estimate(mean=mean_value, low=low, high=high)
    return Evaluation(
        encoder=encoder,
        method=RETRIEVAL,
        settings=settings,
        metrics=estimates,
        confusion=confusion(predicted, labels[asked], classes).tolist(),
        episodes=[Episode(seed=seed, metrics=means, predictions=predictions.tolist())],
    )
