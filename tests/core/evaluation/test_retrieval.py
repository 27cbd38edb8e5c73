"""Retrieval worked by hand."""

from __future__ import annotations

import pytest
import torch

from fmsuite.core.evaluation.retrieval import nearest, retrieval_scores
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
