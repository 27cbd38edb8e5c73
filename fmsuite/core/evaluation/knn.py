"""k-nearest-neighbour classification of frozen features."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fmsuite.errors import UsageError

_CHUNK_VALUES = 1 << 25


def knn_scores(
    support: Tensor,
    support_labels: Tensor,
    queries: Tensor,
    k: int = 20,
    *,
    classes: int | None = None,
    temperature: float | None = 0.07,
    metric: Literal["cosine", "euclidean"] = "cosine",
    support_groups: Tensor | None = None,
    query_groups: Tensor | None = None,
    balance: bool = False,
) -> Tensor:
    """The share of the votes of the k nearest supports of each query that each class gets.

    With a temperature T, a neighbour of cosine similarity s votes with weight exp(s / T) (Wu et al. 2018, section 3.4;
    DINO's protocol has T = 0.07). Without one, each votes once (the 20-NN of the pathology benchmarks). Distances are
    matrix products over chunks of queries.

    Args:
        support: (S, D). support_labels: (S,) int64, not negative.
        queries: (Q, D).
        k: neighbours; all supports if there are fewer.
        classes: columns of the answer; one more than the largest label by default.
        temperature: needs the cosine metric.
        support_groups, query_groups: (S,), (Q,) int64; neighbours of a query's own group are passed over.
        balance: a vote counts in inverse proportion to the supports of its class that the query may ask. Passing over
            a query's own group takes members of its own class away, so that without this, features of pure noise
            would score below chance where groups are few.

    Returns:
        (Q, classes) float32, rows summing to 1.

    Raises:
        UsageError: without supports, with k < 1, with a label beyond ``classes``, or if all supports of a query are of
            its own group.
    """
    if len(support) == 0 or k < 1:
        raise UsageError(f"kNN needs k of at least 1 and labelled features to vote (k = {k}, {len(support)} features).")
    if temperature is not None and metric != "cosine":
        raise UsageError("Votes weighted by a temperature need the cosine metric.", "Set the temperature to None.")
    if (support_groups is None) != (query_groups is None):
        raise UsageError("Groups are given for the supports or for the queries, but not for both.")
    support, queries = support.to(torch.float32), queries.to(torch.float32)
    if metric == "cosine":
        support, queries = F.normalize(support, dim=1), F.normalize(queries, dim=1)
    k = min(k, len(support))
    largest = int(support_labels.max())
    if classes is None:
        classes = largest + 1
    elif largest >= classes:
        raise UsageError(f"A support is labelled {largest}, but there are {classes} classes, counted from 0.")
    rows = max(1, _CHUNK_VALUES // len(support))
    shares = []
    for start in range(0, len(queries), rows):
        chunk = queries[start : start + rows]
        closeness = chunk @ support.T
        available = torch.ones_like(closeness, dtype=torch.bool)
        if metric == "euclidean":
            closeness = 2 * closeness - support.square().sum(1)
        if support_groups is not None and query_groups is not None:
            own = query_groups[start : start + rows, None] == support_groups[None, :]
            if bool(own.all(1).any()):
                raise UsageError("All labelled features are of one group, so none is left to vote on its members.")
            closeness = closeness.masked_fill(own, -torch.inf)
            available = ~own
        nearest = closeness.topk(k, dim=1)
        usable = nearest.values.isfinite()
        weight = usable.to(torch.float32)
        if temperature is not None:
            # Relative to the nearest neighbour: the same winner, and no overflow at low temperatures.
            weight = torch.where(usable, ((nearest.values - nearest.values[:, :1]) / temperature).exp(), 0.0)
        votes = torch.zeros(len(chunk), classes, device=chunk.device)
        votes.scatter_add_(1, support_labels[nearest.indices], weight)
        if balance:
            members = available.to(torch.float32) @ F.one_hot(support_labels, classes).to(torch.float32)
            votes = votes / members.clamp(min=1)
        shares.append(votes / votes.sum(1, keepdim=True))
    return torch.cat(shares) if shares else torch.empty(0, classes, device=queries.device)


def knn_predict(
    support: Tensor,
    support_labels: Tensor,
    queries: Tensor,
    k: int = 20,
    *,
    temperature: float | None = 0.07,
    metric: Literal["cosine", "euclidean"] = "cosine",
    support_groups: Tensor | None = None,
    query_groups: Tensor | None = None,
    balance: bool = False,
) -> Tensor:
    """The class with the most votes among the k nearest supports of each query: the largest of ``knn_scores``, whose
    arguments and errors these are. Equal votes go to the smallest label.

    Returns:
        (Q,) int64.
    """
    scores = knn_scores(
        support,
        support_labels,
        queries,
        k,
        temperature=temperature,
        metric=metric,
        support_groups=support_groups,
        query_groups=query_groups,
        balance=balance,
    )
    return scores.argmax(1)


def nearest_rows(support: Tensor, queries: Tensor, k: int) -> Tensor:
    """(Q, k) int64 rows of the k supports nearest to each query by Euclidean distance, all if there are fewer.

    Args:
        support: (S, D). queries: (Q, D).

    Raises:
        UsageError: without supports, or with k < 1.
    """
    if len(support) == 0 or k < 1:
        raise UsageError(f"kNN needs k of at least 1 and known features (k = {k}, {len(support)} features).")
    support, queries = support.to(torch.float32), queries.to(torch.float32)
    sizes = support.square().sum(1)
    found = [
        (2 * chunk @ support.T - sizes).topk(min(k, len(support)), dim=1).indices
        for chunk in queries.split(max(1, _CHUNK_VALUES // len(support)))
    ]
    return torch.cat(found)
