"""Retrieval worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from sklearn.neighbors import NearestNeighbors

from fmsuite.core.evaluation.folds import folds_by_group
from fmsuite.core.evaluation.retrieval import judge_retrieval, nearest, retrieval_scores
from fmsuite.core.evaluation.splits import Split
from fmsuite.errors import UsageError

LABELS = torch.tensor([0, 0, 1, 1, 2])


def test_by_hand():
    found = torch.tensor([[2, 0, 1, 4, 3], [0, 1, 2, 3, 4], [3, 4, 2, 0, 1], [4, -1, -1, -1, -1]])
    scores = retrieval_scores(found, torch.tensor([0, 2, 1, 2]), LABELS, (1, 3, 5))
    # Labels in order: 1 0 0 2 1; 0 0 1 1 2; 1 2 1 0 0; 2.
    assert scores["acc@1"].tolist() == [0, 0, 1, 1]
    assert scores["acc@3"].tolist() == [1, 0, 1, 1]
    assert scores["acc@5"].tolist() == [1, 1, 1, 1]
    assert scores["mv@1"].tolist() == [0, 0, 1, 1]
    assert scores["mv@3"].tolist() == [1, 0, 1, 1]
    # Of two labels with two votes each the one that comes first: 1, then 0, then 1.
    assert scores["mv@5"].tolist() == [0, 0, 1, 1]
    assert scores["map@1"].tolist() == [0, 0, 1, 1]
    assert scores["map@3"].tolist() == pytest.approx([(1 / 2 + 2 / 3) / 2, 0, (1 + 2 / 3) / 2, 1])
    assert scores["map@5"].tolist() == pytest.approx([(1 / 2 + 2 / 3) / 2, 1 / 5, (1 + 2 / 3) / 2, 1])
    with pytest.raises(UsageError, match="more neighbours"):
        retrieval_scores(found, LABELS[:4], LABELS, (6,))


def test_neighbours_are_those_of_a_brute_force_and_not_of_the_own_group():
    torch.manual_seed(0)
    queries, gallery = torch.randn(7, 5), torch.randn(20, 5)
    mine, theirs = torch.arange(7) % 3, torch.arange(20) % 3
    distances = torch.cdist(queries, gallery).masked_fill(mine[:, None] == theirs, torch.inf)
    expected = distances.argsort(1)[:, :4]
    assert torch.equal(nearest(queries, gallery, 4, "euclidean", mine, theirs), expected)
    angles = torch.nn.functional.cosine_similarity(queries[:, None], gallery[None], dim=2)
    assert torch.equal(nearest(queries, gallery, 4), angles.argsort(1, descending=True)[:, :4])


def test_fewer_neighbours_than_asked():
    points = torch.eye(3)
    found = nearest(points, points, 4, query_groups=torch.tensor([0, 0, 1]), gallery_groups=torch.tensor([0, 0, 1]))
    assert found[:2].tolist() == [[2, -1, -1, -1]] * 2
    assert (found[2] >= 0).sum() == 2
    with pytest.raises(UsageError, match="not for both"):
        nearest(points, points, 1, query_groups=torch.zeros(3))


def cohort():
    random = torch.Generator().manual_seed(0)
    groups = torch.arange(20).repeat_interleave(4)
    labels = groups % 3
    features = torch.randn(80, 6, generator=random) + torch.randn(20, 6, generator=random)[groups]
    features[:, 0] += 2 * labels
    return features, labels, groups


def test_a_gallery_of_other_groups_is_searched_as_scikit_learn_does():
    features, labels, groups = cohort()
    split = Split(torch.arange(56), torch.arange(56, 80))
    found = judge_retrieval(features, labels, groups, split, 3, encoder="net", seed=0)
    values = (features - features[:56].mean(0)).numpy()
    rows = NearestNeighbors(n_neighbors=20, metric="cosine").fit(values[:56]).kneighbors(values[56:])[1]
    right = labels.numpy()[rows] == labels.numpy()[56:, None]
    assert found.metrics["acc@1"].mean == pytest.approx(right[:, 0].mean())
    assert found.metrics["acc@5"].mean == pytest.approx(right[:, :5].any(1).mean())
    precision = [average_precision_score(row, -np.arange(20)) if row.any() else 0 for row in right]
    assert found.metrics["map@20"].mean == pytest.approx(np.mean(precision))
    assert found.episodes[0].predictions == [-1] * 56 + labels.numpy()[rows[:, 0]].tolist()
    assert sum(map(sum, found.confusion)) == 24
    estimate = found.metrics["acc@1"]
    assert estimate.low is not None
    assert estimate.low <= estimate.mean <= estimate.high


def test_folds_search_each_others_items():
    features, labels, groups = cohort()
    folds = folds_by_group(torch.nn.functional.one_hot(labels), groups, "groups", 0)
    found = judge_retrieval(features, labels, groups, folds, 3, encoder="net", seed=0)
    nearest_labels = []
    for item in range(80):
        others = groups != groups[item]
        mean = features[others].mean(0)
        likeness = torch.nn.functional.cosine_similarity((features[item] - mean)[None], features[others] - mean)
        nearest_labels.append(int(labels[others][likeness.argmax()]))
    assert found.episodes[0].predictions == nearest_labels
    assert found.settings["folds"] == 20
