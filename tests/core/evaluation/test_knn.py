from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from fmsuite.core.evaluation import knn
from fmsuite.core.evaluation.knn import knn_predict, knn_scores
from fmsuite.core.evaluation.metrics import balanced_accuracy
from fmsuite.errors import UsageError


@pytest.fixture
def data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 200)
    centres = rng.normal(size=(5, 16))
    support = centres[labels] + rng.normal(size=(200, 16)) * 1.5
    queries = centres[rng.integers(0, 5, 90)] + rng.normal(size=(90, 16)) * 1.5
    return torch.from_numpy(support).float(), torch.from_numpy(labels), torch.from_numpy(queries).float()


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("k", [1, 5, 20])
def test_plain_votes_equal_scikit_learn(data: tuple, metric: str, k: int) -> None:
    support, labels, queries = data
    reference = KNeighborsClassifier(k, metric=metric, algorithm="brute").fit(support.numpy(), labels.numpy())
    predicted = knn_predict(support, labels, queries, k, temperature=None, metric=metric)  # type: ignore[arg-type]
    assert predicted.tolist() == reference.predict(queries.numpy()).tolist()


def test_weighted_votes_equal_scikit_learn_with_that_weight(data: tuple) -> None:
    support, labels, queries = data
    reference = KNeighborsClassifier(
        20, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(support.double().numpy(), labels.numpy())
    assert knn_predict(support, labels, queries, 20).tolist() == reference.predict(queries.double().numpy()).tolist()


def test_chunks_do_not_change_the_answer(data: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = knn_predict(*data)
    monkeypatch.setattr(knn, "_CHUNK_VALUES", 7 * 200)
    assert torch.equal(knn_predict(*data), whole)


def test_a_querys_own_group_does_not_vote(data: tuple) -> None:
    support, labels, _ = data
    groups = torch.arange(200) % 9
    predicted = knn_predict(support, labels, support, 3, support_groups=groups, query_groups=groups)
    for group in range(9):
        inside = groups == group
        alone = knn_predict(support[~inside], labels[~inside], support[inside], 3)
        assert torch.equal(predicted[inside], alone)


def test_few_voters_outside_the_group_vote_alone() -> None:
    features = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.8, 0.2], [0.0, 1.0]])
    labels = torch.tensor([0, 0, 0, 1])
    groups = torch.tensor([0, 0, 0, 1])
    predicted = knn_predict(features, labels, features, 20, support_groups=groups, query_groups=groups)
    assert predicted.tolist() == [1, 1, 1, 0]


def test_equal_votes_go_to_the_smallest_label() -> None:
    support = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert knn_predict(support, torch.tensor([2, 1]), support[:1], 2, temperature=None).tolist() == [1]


def test_low_temperatures_do_not_overflow() -> None:
    support = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0]])
    predicted = knn_predict(support, torch.tensor([0, 1, 1]), support[:1], 3, temperature=1e-4)
    assert predicted.tolist() == [0]


def test_wrong_use_is_refused(data: tuple) -> None:
    support, labels, queries = data
    groups = torch.zeros(200, dtype=torch.int64)
    with pytest.raises(UsageError, match="k of at least 1"):
        knn_predict(support, labels, queries, 0)
    with pytest.raises(UsageError, match="cosine metric"):
        knn_predict(support, labels, queries, metric="euclidean")
    with pytest.raises(UsageError, match="not for both"):
        knn_predict(support, labels, queries, support_groups=groups)
    with pytest.raises(UsageError, match="of one group"):
        knn_predict(support, labels, queries, support_groups=groups, query_groups=groups[:90])
    with pytest.raises(UsageError, match="labelled 4, but there are 3 classes"):
        knn_scores(support, labels, queries, classes=3)


def test_scores_are_the_shares_of_votes(data: tuple) -> None:
    support, labels, queries = data
    reference = KNeighborsClassifier(20, metric="cosine", algorithm="brute").fit(support.numpy(), labels.numpy())
    scores = knn_scores(support, labels, queries, 20, temperature=None)
    assert scores.numpy() == pytest.approx(reference.predict_proba(queries.numpy()), abs=1e-6)
    weighted = KNeighborsClassifier(
        20, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
    ).fit(support.double().numpy(), labels.numpy())
    scores = knn_scores(support, labels, queries, 20)
    assert scores.numpy() == pytest.approx(weighted.predict_proba(queries.double().numpy()), abs=1e-4)
    assert torch.equal(scores.argmax(1), knn_predict(support, labels, queries, 20))


def test_classes_without_supports_get_no_votes(data: tuple) -> None:
    support, labels, queries = data
    scores = knn_scores(support, labels, queries, classes=7)
    assert scores.shape == (90, 7)
    assert torch.equal(scores[:, :5], knn_scores(support, labels, queries))
    assert not scores[:, 5:].any()
    assert knn_scores(support, labels, queries[:0], classes=7).shape == (0, 7)


def test_balanced_votes_put_noise_at_chance_where_own_groups_are_passed_over() -> None:
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(4).repeat_interleave(200)
    labels = groups % 2
    noise = torch.randn(800, 16, generator=generator)

    def score(balance: bool) -> float:
        found = knn_predict(
            noise, labels, noise, 20, temperature=None, support_groups=groups, query_groups=groups, balance=balance
        )
        return balanced_accuracy(found, labels)

    assert score(balance=False) < 0.25
    assert score(balance=True) == pytest.approx(0.5, abs=0.06)


def test_a_balanced_vote_counts_by_the_supports_of_its_class() -> None:
    support = torch.tensor([[1.0, 0.0], [0.99, 0.1], [0.98, 0.2], [0.9, 0.3]])
    labels = torch.tensor([0, 0, 0, 1])
    query = torch.tensor([[1.0, 0.2]])
    plain = knn_predict(support, labels, query, 3, temperature=None, metric="euclidean")
    assert plain.tolist() == [0]
    # Two of class 0 at 1/3 each against one of class 1 at 1.
    near = torch.tensor([[0.92, 0.28]])
    assert knn_predict(support, labels, near, 3, temperature=None, metric="euclidean").tolist() == [0]
    assert knn_predict(support, labels, near, 3, temperature=None, metric="euclidean", balance=True).tolist() == [1]
