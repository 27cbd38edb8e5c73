from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestCentroid

from fmsuite.core.evaluation import prototypes
from fmsuite.core.evaluation.prototypes import (
    fit_prototypes,
    nearest_in_bags,
    nearest_vectors,
    prototype_distances,
    prototype_scores,
)
from fmsuite.errors import UsageError


def brute_force(
    support: np.ndarray, labels: np.ndarray, queries: np.ndarray, classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Prototypes and squared distances, each vector by itself in float64."""
    support, queries = support.astype(np.float64), queries.astype(np.float64)
    mean = support.mean(0)

    def unit(x: np.ndarray) -> np.ndarray:
        return (x - mean) / np.linalg.norm(x - mean)

    vectors = np.stack(
        [np.mean([unit(x) for x, y in zip(support, labels, strict=True) if y == c], 0) for c in range(classes)]
    )
    return vectors, np.array([[((unit(q) - p) ** 2).sum() for p in vectors] for q in queries])


@pytest.fixture
def data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(0)
    labels = np.concatenate([np.arange(4), rng.integers(0, 4, 36)])
    support = rng.normal(size=(4, 48))[labels] + rng.normal(size=(40, 48))
    queries = rng.normal(size=(150, 48))
    return torch.from_numpy(support).float(), torch.from_numpy(labels), torch.from_numpy(queries).float()


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_prototypes_and_distances_equal_brute_force_however_far_from_the_origin(data: tuple, offset: float) -> None:
    support, labels, queries = data[0] + offset, data[1], data[2] + offset
    vectors, distances = brute_force(support.numpy(), labels.numpy(), queries.numpy(), 4)
    fitted = fit_prototypes(support, labels, 4)
    np.testing.assert_allclose(fitted.vectors, vectors, atol=1e-6)
    np.testing.assert_allclose(prototype_distances(queries, fitted), distances, atol=1e-5)


def test_prototypes_are_not_normalised_again(data: tuple) -> None:
    support, labels, _ = data
    assert bool((fit_prototypes(support, labels, 4).vectors.norm(dim=1) < 0.95).all())


def test_the_nearest_prototype_is_that_of_scikit_learn(data: tuple) -> None:
    support, labels, queries = data
    mean = support.numpy().mean(0)
    known, asked = (
        (x - mean) / np.linalg.norm(x - mean, axis=1, keepdims=True) for x in (support.numpy(), queries.numpy())
    )
    expected = NearestCentroid().fit(known, labels.numpy()).predict(asked)
    scores = prototype_scores(prototype_distances(queries, fit_prototypes(support, labels, 4)))
    assert scores.argmax(1).tolist() == expected.tolist()
    torch.testing.assert_close(scores.sum(1), torch.ones(150, dtype=torch.float64))


def test_chunks_do_not_change_the_distances(data: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    support, labels, queries = data
    whole = prototype_distances(queries, fit_prototypes(support, labels, 4))
    monkeypatch.setattr(prototypes, "_CHUNK_VALUES", 7 * 48)
    torch.testing.assert_close(
        prototype_distances(queries, fit_prototypes(support, labels, 4)), whole, atol=1e-6, rtol=0
    )


def test_vectors_without_a_direction_stay_zero() -> None:
    same = torch.full((6, 5), 0.1)
    fitted = fit_prototypes(same, torch.tensor([0, 0, 0, 1, 1, 2]), 3)
    assert not bool(fitted.vectors.any())
    scores = prototype_scores(prototype_distances(same[:1], fitted))
    assert scores.tolist() == [[pytest.approx(1 / 3)] * 3]

    support, labels = torch.tensor([[1.0, 0.1], [3.0, 0.1], [2.0, 0.4]]), torch.tensor([0, 0, 1])
    fitted = fit_prototypes(support, labels, 2)
    at_mean = prototype_distances(fitted.mean[None].float(), fitted)
    torch.testing.assert_close(at_mean, fitted.vectors.square().sum(1)[None].float())


def test_a_single_support_gives_a_zero_prototype() -> None:
    fitted = fit_prototypes(torch.tensor([[1.0, 2.0]]), torch.tensor([0]), 1)
    assert fitted.vectors.tolist() == [[0.0, 0.0]]
    assert prototype_distances(torch.tensor([[5.0, 5.0]]), fitted).tolist() == [[1.0]]


def test_a_class_without_supports_is_refused() -> None:
    with pytest.raises(UsageError, match="Class 1"):
        fit_prototypes(torch.randn(3, 4), torch.tensor([0, 2, 2]), 3)


@pytest.mark.parametrize("k", [1, 5, 50, 1000])
def test_mean_distance_of_the_nearest_vectors_equals_sorting_every_bag(k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.tensor([1, 2, 3, 5, 8, 9, 64, 1, 255, 256, 257, 700, 4])
    distances = torch.rand(int(sizes.sum()), 3, generator=generator)
    expected = [np.sort(bag, 0)[:k].mean(0) for bag in np.split(distances.numpy(), sizes.cumsum(0)[:-1].numpy())]
    np.testing.assert_allclose(nearest_in_bags(distances, sizes, k), np.stack(expected), rtol=1e-6)


def test_bags_of_one_are_their_own_distance() -> None:
    distances = torch.rand(9, 4)
    assert torch.equal(nearest_in_bags(distances, torch.ones(9, dtype=torch.int64), 5), distances)


def test_the_nearest_vectors_of_each_class_are_named_in_order() -> None:
    distances = torch.tensor([[0.3, 0.5], [0.1, 0.5], [0.2, 0.4]])
    assert nearest_vectors(distances, 2).tolist() == [[1, 2], [2, 0]]
    assert nearest_vectors(distances, 9).tolist() == [[1, 2, 0], [2, 0, 1]]


def test_a_k_below_one_is_refused() -> None:
    with pytest.raises(UsageError, match="k = 0"):
        nearest_in_bags(torch.rand(4, 2), torch.tensor([2, 2]), 0)
