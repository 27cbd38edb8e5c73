"""Tile tasks against scikit-learn, scipy and brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import t as student
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, confusion_matrix
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from fmsuite.core.evaluation.results import Evaluation
from fmsuite.core.evaluation.splits import Split, shuffled_labels
from fmsuite.core.evaluation.tiles import SHUFFLED_T, SHUFFLES, TASKS, judge, knn

Data = tuple[Tensor, Tensor, Tensor]


def _data(classes: int, train: int = 150, test: int = 80, dim: int = 12, seed: int = 0) -> Data:
    """Overlapping clouds far from the origin: training features, their labels, and features to be asked."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(classes, dim))
    labels = np.arange(train) % classes
    asked = np.arange(test) % classes
    features = 5 + centres[labels] + random.normal(size=(train, dim))
    queries = 5 + centres[asked] + random.normal(size=(test, dim))
    return torch.tensor(features).float(), torch.tensor(labels), torch.tensor(queries).float()


def _as_uni_normalises(train: Tensor, test: Tensor) -> tuple[np.ndarray, np.ndarray]:
    mean = train.double().mean(0)
    centred = (train.double() - mean, test.double() - mean)
    first, second = (part / part.norm(dim=1, keepdim=True) for part in centred)
    return first.numpy(), second.numpy()


@pytest.mark.parametrize("classes", [2, 4])
def test_knn_votes_as_scikit_learn_does_on_centred_normalised_features(classes: int) -> None:
    train, labels, test = _data(classes)
    support, queries = _as_uni_normalises(train, test)
    reference = KNeighborsClassifier(20).fit(support, labels.numpy())
    answer = TASKS["knn"].answer(train, labels, test, classes)
    np.testing.assert_allclose(answer.scores.numpy(), reference.predict_proba(queries), atol=1e-6)
    assert answer.predicted.tolist() == reference.predict(queries).tolist()
    assert answer.settings["k"] == 20
    assert not answer.notes


def test_knn_differs_from_that_on_raw_features() -> None:
    # Guards the centring: at this distance from the origin plain cosines nearly all agree.
    train, labels, test = _data(4)
    raw = KNeighborsClassifier(20).fit(train.numpy(), labels.numpy()).predict_proba(test.numpy())
    assert np.abs(knn(train, labels, test, 4).scores.numpy() - raw).max() > 0.05


def test_knn_with_fewer_training_windows_than_neighbours_says_so() -> None:
    train, labels, test = _data(2, train=7)
    answer = knn(train, labels, test, 2)
    assert answer.settings["k"] == 7
    assert "7 training windows" in answer.notes[0]


@pytest.mark.parametrize("classes", [2, 4])
def test_the_scikit_learn_form_is_that_of_scikit_learn(classes: int) -> None:
    train, labels, test = _data(classes)
    cost = train.shape[1] * classes / 100
    reference = LogisticRegression(C=cost, max_iter=5000, tol=1e-9).fit(train.double().numpy(), labels.numpy())
    answer = TASKS["linear_sklearn"].answer(train, labels, test, classes)
    np.testing.assert_allclose(answer.scores.numpy(), reference.predict_proba(test.double().numpy()), atol=2e-4)
    assert answer.settings["strength"] == pytest.approx(1 / cost)


def test_the_torch_form_minimises_its_own_objective() -> None:
    classes = 3
    train, labels, test = _data(classes)
    features, asked = train.double().numpy(), test.double().numpy()
    strength, shape = 100 / (train.shape[1] * classes), (classes, train.shape[1] + 1)
    one_hot = np.eye(classes)[labels.numpy()]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        """Mean cross-entropy + (lambda / 2) ||W||, and its gradient."""
        weight, bias = flat.reshape(shape)[:, :-1], flat.reshape(shape)[:, -1]
        logits = features @ weight.T + bias
        logits = logits - logits.max(1, keepdims=True)
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        error = (np.exp(log_p) - one_hot) / len(features)
        norm = np.linalg.norm(weight)
        gradient = np.concatenate([error.T @ features + strength / 2 * weight / norm, error.sum(0)[:, None]], 1)
        return float(-(one_hot * log_p).sum() / len(features) + strength / 2 * norm), gradient.ravel()

    start = np.random.default_rng(0).normal(size=shape).ravel() * 0.1
    found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 20000, "ftol": 1e-15, "gtol": 1e-9})
    weight, bias = found.x.reshape(shape)[:, :-1], found.x.reshape(shape)[:, -1]
    reference = torch.from_numpy(asked @ weight.T + bias).softmax(1)
    answer = TASKS["linear_torch"].answer(train, labels, test, classes)
    np.testing.assert_allclose(answer.scores.numpy(), reference.numpy(), atol=1e-3)


def test_the_two_linear_forms_are_different_models() -> None:
    train, labels, test = _data(3)
    first, second = (TASKS[name].answer(train, labels, test, 3).scores for name in ("linear_torch", "linear_sklearn"))
    assert (first - second).abs().max() > 0.02


def test_prototypes_are_the_class_means_of_centred_normalised_features() -> None:
    train, labels, test = _data(3)
    support, queries = _as_uni_normalises(train, test)
    means = np.stack([support[labels.numpy() == label].mean(0) for label in range(3)])
    nearest = [int(np.argmin([np.linalg.norm(query - mean) for mean in means])) for query in queries]
    assert TASKS["prototypes"].answer(train, labels, test, 3).predicted.tolist() == nearest


@pytest.mark.parametrize("name", list(TASKS))
def test_scores_are_shares_over_all_classes_even_of_one_that_is_asked_alone(name: str) -> None:
    train, labels, test = _data(4)
    answer = TASKS[name].answer(train, labels, test[:1], 4)
    assert answer.scores.shape == (1, 4)
    assert answer.scores.sum().item() == pytest.approx(1, abs=1e-6)
    assert TASKS[name].title.endswith(".")


def _judged(
    shuffled: bool, task: str = "knn", seed: int = 0, rescale: bool = False, scale: float = 1.0, dim: int = 12
) -> tuple[Evaluation, Tensor, Split]:
    """150 training items and 80 to be asked, of 3 classes, in groups of two."""
    train, labels, test = _data(3, dim=dim)
    everything, known = torch.cat([train, test]).sub(5) * scale, torch.cat([labels, torch.arange(80) % 3])
    split = Split(torch.arange(150), torch.arange(150, 230))
    groups = torch.arange(115).repeat_interleave(2)
    found = judge(
        task, everything, known, groups, split, 3, encoder="net", seed=seed, shuffled=shuffled, rescale=rescale
    )
    return found, known, split


def test_judging_trains_on_one_side_and_scores_the_other() -> None:
    found, labels, split = _judged(shuffled=False)
    train, _, test = _data(3)
    expected = knn(train - 5, labels[split.train], test - 5, 3).predicted
    [episode] = found.episodes
    assert episode.predictions == [-1] * 150 + expected.tolist()
    target = labels[split.test].numpy()
    estimate = found.metrics["balanced_accuracy"]
    assert estimate.mean == pytest.approx(balanced_accuracy_score(target, expected.numpy()))
    assert found.confusion == confusion_matrix(target, expected.numpy()).tolist()
    assert estimate.low is not None
    assert estimate.high is not None
    assert estimate.low < estimate.mean < estimate.high
    assert (found.encoder, found.method, found.shots, found.shuffled) == ("net", "knn", None, False)


def test_shuffled_labels_give_an_interval_over_shuffles_that_holds_chance() -> None:
    found, labels, split = _judged(shuffled=True, task="linear_sklearn")
    values = []
    for episode in found.episodes:
        target = shuffled_labels(labels[split.test], torch.arange(40).repeat_interleave(2), episode.seed, 1)
        values.append(balanced_accuracy_score(target.numpy(), np.array(episode.predictions)[150:]))
        assert episode.metrics["balanced_accuracy"] == pytest.approx(values[-1])
    estimate = found.metrics["balanced_accuracy"]
    assert len(values) == SHUFFLES
    assert len({episode.seed for episode in found.episodes}) == SHUFFLES
    reach = student.ppf(0.995, SHUFFLES - 1) * np.std(values, ddof=1) / np.sqrt(SHUFFLES)
    assert (estimate.low, estimate.high) == pytest.approx((np.mean(values) - reach, np.mean(values) + reach), abs=1e-4)
    assert np.mean(values) - reach < 1 / 3 < np.mean(values) + reach
    true, _, _ = _judged(shuffled=False, task="linear_sklearn")
    assert true.metrics["balanced_accuracy"].mean > np.mean(values) + reach


@pytest.mark.parametrize("task", ["knn", "linear_sklearn"])
@pytest.mark.parametrize("scattered", [0, 1])
def test_shuffled_labels_of_unequal_classes_are_at_chance_if_one_is_scattered(task: str, scattered: int) -> None:
    """Every group of the one class lies by itself, those of the other lie together; the first is three times larger."""
    found = []
    for seed in range(2):
        random = torch.Generator().manual_seed(seed)
        labels = torch.cat([torch.zeros(360), torch.ones(120)]).long()
        groups = torch.arange(480) // 6
        features = torch.randn(480, 8, generator=random) + 6 * labels[:, None]
        features += 5 * torch.randn(80, 8, generator=random)[groups] * (labels == scattered)[:, None]
        asked = groups % 3 == 0
        split = Split((~asked).nonzero().flatten(), asked.nonzero().flatten())
        found.append(judge(task, features, labels, groups, split, 2, encoder="net", seed=seed, shuffled=True))
    means = [evaluation.metrics["balanced_accuracy"].mean for evaluation in found]
    assert abs(np.mean(means) - 0.5) < 0.02


def test_the_shuffles_follow_the_seed() -> None:
    first, again, other = (_judged(shuffled=True, seed=seed)[0] for seed in (1, 1, 2))
    assert first == again
    assert first.episodes[0].predictions != other.episodes[0].predictions


def test_the_quantile_is_that_of_student() -> None:
    assert student.ppf(0.995, SHUFFLES - 1) == pytest.approx(SHUFFLED_T, abs=5e-4)


def test_weights_that_the_penalty_holds_at_zero_are_said() -> None:
    train, labels, test = _data(3)
    answer = TASKS["linear_torch"].answer(train * 1e-3, labels, test * 1e-3, 3)
    assert "holds all weights" in answer.notes[0]
    np.testing.assert_allclose(answer.scores.numpy(), 1 / 3, atol=1e-6)


def test_rescaled_features_are_judged_alike_whatever_their_scale() -> None:
    """Scales that are powers of two change no digit."""
    small, large = (_judged(False, "linear_torch", rescale=True, scale=scale, dim=96)[0] for scale in (2.0**-10, 8.0))
    held, _, _ = _judged(False, "linear_torch", scale=2.0**-10, dim=96)
    assert small.episodes == large.episodes
    assert held.metrics["balanced_accuracy"].mean == pytest.approx(1 / 3)
    assert small.metrics["balanced_accuracy"].mean > 0.8
    assert "root mean square" in small.notes[0]
