"""Surface distances by hand, by brute force and against MONAI."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fmsuite.core.evaluation.surface import surface_distances
from fmsuite.errors import UsageError


def blobs(shape: tuple[int, ...], seed: int) -> np.ndarray:
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), -1)
    random = np.random.default_rng(seed)
    mask = np.zeros(shape, bool)
    for _ in range(2):
        centre, radius = random.uniform(0, 1, len(shape)) * shape, random.uniform(2, min(shape) / 2)
        mask |= ((grid - centre) ** 2).sum(-1) < radius**2
    return mask


@pytest.mark.parametrize("shape", [(14, 17), (8, 9, 11)])
def test_equal_to_monai(shape):
    metrics = pytest.importorskip("monai.metrics")
    for seed in range(4):
        first, second = blobs(shape, seed), blobs(shape, seed + 100)
        spacing = (0.7, 1.3, 2.0)[: len(shape)]
        ours = surface_distances(first, second, spacing)
        pair = [torch.from_numpy(mask)[None, None].float() for mask in (first, second)]
        for percentile in (95.0, 100.0):
            theirs = metrics.compute_hausdorff_distance(
                *pair, include_background=True, percentile=percentile, spacing=spacing
            )
            assert ours.hausdorff(percentile) == pytest.approx(theirs.item(), rel=1e-6)
        for tolerance in (0.0, 1.0, 2.5):
            theirs = metrics.compute_surface_dice(*pair, [tolerance], include_background=True, spacing=spacing)
            assert ours.normalised(tolerance) == pytest.approx(theirs.item(), rel=1e-6)
        theirs = metrics.compute_average_surface_distance(
            *pair, include_background=True, symmetric=True, spacing=spacing
        )
        assert ours.mean() == pytest.approx(theirs.item(), rel=1e-6)


def test_two_bars_by_hand():
    first, second = np.zeros((6, 9), bool), np.zeros((6, 9), bool)
    first[1:4, 2] = True
    second[1:5, 4] = True
    found = surface_distances(first, second, (1.0, 3.0))
    assert sorted(found.predicted) == [6, 6, 6]
    assert sorted(found.true) == pytest.approx([6, 6, 6, math.sqrt(37)])
    assert found.normalised(6.0) == pytest.approx(6 / 7)
    assert found.hausdorff(100) == pytest.approx(math.sqrt(37))


def test_a_surface_is_where_a_neighbour_is_outside_the_edge_of_the_array_included():
    mask = np.ones((5, 5), bool)
    assert len(surface_distances(mask, mask).predicted) == 16
    assert surface_distances(mask, mask).hausdorff() == 0


def test_empty_masks():
    none, some = np.zeros((4, 4), bool), np.eye(4, dtype=bool)
    both = surface_distances(none, none)
    assert [math.isnan(value) for value in (both.hausdorff(), both.normalised(1), both.mean())] == [True] * 3
    for pair in ((none, some), (some, none)):
        one = surface_distances(*pair)
        assert (one.hausdorff(), one.normalised(9.0), one.mean()) == (math.inf, 0.0, math.inf)


def test_what_does_not_fit_is_refused():
    with pytest.raises(UsageError, match="shapes"):
        surface_distances(np.zeros((2, 2), bool), np.zeros((2, 3), bool))
    with pytest.raises(UsageError, match="spacing"):
        surface_distances(np.zeros((2, 2), bool), np.zeros((2, 2), bool), (1.0, 0.0))
