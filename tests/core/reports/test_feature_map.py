"""Maps of features in two dimensions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.manifold import trustworthiness

from fmsuite.core.reports.feature_map import balanced_sample, feature_map
from fmsuite.errors import FmsuiteError, UsageError


def clusters(count: int, dim: int = 16, classes: int = 3, spread: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    """(count, dim) features far from the origin, each class on a plane of its own, and their labels."""
    rng = np.random.default_rng(0)
    labels = np.arange(count) % classes
    offsets = rng.normal(size=(count, 2)) @ rng.normal(size=(2, dim))
    features = 50 + rng.normal(size=(classes, dim))[labels] + spread * offsets
    return torch.from_numpy(features).float(), torch.from_numpy(labels)


def test_the_map_keeps_neighbourhoods() -> None:
    features, labels = clusters(150)
    drawn = feature_map(features, labels, labels == 0, "vit", seed=1)
    points = np.stack([drawn.x, drawn.y], axis=1)
    directions = (features - features.mean(0)).double().numpy()
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    assert trustworthiness(directions, points, n_neighbors=5) > 0.98
    assert drawn.labels == labels.tolist()
    assert drawn.held_out == (labels == 0).tolist()
    assert (drawn.encoder, drawn.sampled_from) == ("vit", 150)
    assert np.abs(points).max() == pytest.approx(1, abs=1e-4)
    assert points.max(axis=0) == pytest.approx(-points.min(axis=0), abs=2e-4)
    assert "perplexity 30" in drawn.method


def test_the_same_seed_gives_the_same_map() -> None:
    features, labels = clusters(60)
    first, again = (feature_map(features, labels, labels > 0, "vit", limit=40, seed=3) for _ in range(2))
    other = feature_map(features, labels, labels > 0, "vit", limit=40, seed=4)
    assert first == again
    assert first.x != other.x
    assert (len(first.x), first.sampled_from) == (40, 60)
    assert "40 of 60" in first.method


@pytest.mark.parametrize("count", [1, 2, 4])
def test_few_points_are_drawn_by_principal_components(count: int) -> None:
    features, labels = clusters(count, dim=3)
    drawn = feature_map(features, labels, labels > 0, "vit")
    assert len(drawn.x) == count
    assert np.isfinite([drawn.x, drawn.y]).all()
    assert ("too few" if count > 1 else "single point") in drawn.method


def test_two_points_lie_at_both_ends() -> None:
    drawn = feature_map(torch.tensor([[1.0, 0], [0, 1]]), torch.tensor([0, 1]), torch.tensor([False, True]), "vit")
    assert sorted(drawn.x) == [-1, 1]
    assert drawn.y == pytest.approx([0, 0], abs=1e-4)


@pytest.mark.parametrize("count", [3, 40])
def test_equal_features_are_one_point(count: int) -> None:
    features = torch.full((count, 8), 0.1) + 1000
    drawn = feature_map(features, torch.zeros(count), torch.ones(count), "vit")
    assert drawn.x == drawn.y == [0.0] * count
    assert "single point" in drawn.method


def test_repeated_features_and_one_dimension_are_drawn() -> None:
    features = torch.tensor([[0.0], [1.0]]).repeat(20, 1)
    drawn = feature_map(features, torch.arange(40) % 2, torch.zeros(40), "vit")
    points = np.stack([drawn.x, drawn.y], axis=1)
    assert np.isfinite(points).all()
    assert points[::2].mean(axis=0) != pytest.approx(points[1::2].mean(axis=0), abs=0.5)


@pytest.mark.parametrize("count", [5, 6, 20])
def test_the_perplexity_suits_small_samples(count: int) -> None:
    features, labels = clusters(count)
    drawn = feature_map(features, labels, labels > 0, "vit")
    assert f"perplexity {(count - 1) / 3:.3g}," in drawn.method
    assert np.isfinite([drawn.x, drawn.y]).all()


@pytest.mark.parametrize(
    ("sizes", "limit", "expected"),
    [
        ((100, 100, 100), 30, (10, 10, 10)),
        ((5, 100, 100), 45, (5, 20, 20)),
        ((5, 7, 100), 45, (5, 7, 33)),
        ((100, 100, 100), 31, (11, 10, 10)),
        ((3, 3, 3), 2, (1, 1, 0)),
        ((2, 2, 2), 6, (2, 2, 2)),
    ],
)
def test_a_sample_is_as_balanced_as_the_classes_allow(
    sizes: tuple[int, ...], limit: int, expected: tuple[int, ...]
) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat([-1, 4, 7], sizes))
    chosen = balanced_sample(labels, limit, seed=0)
    assert tuple((labels[chosen] == name).sum() for name in (-1, 4, 7)) == expected
    assert (np.diff(chosen) > 0).all()


def test_a_feature_that_is_not_finite_is_named() -> None:
    features, labels = clusters(10)
    features[7, 2] = torch.nan
    with pytest.raises(FmsuiteError, match="Feature 7 of 'vit' is not finite"):
        feature_map(features, labels, labels > 0, "vit")


def test_no_features_are_refused() -> None:
    with pytest.raises(UsageError, match="no features of 'vit'"):
        feature_map(torch.empty(0, 4), torch.empty(0), torch.empty(0), "vit")
