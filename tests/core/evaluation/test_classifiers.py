from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from fmsuite.core.evaluation import classifiers
from fmsuite.core.evaluation.abmil import fit_abmil
from fmsuite.core.evaluation.bags import Bags
from fmsuite.core.evaluation.classifiers import CLASSIFIERS, find_classifier
from fmsuite.core.evaluation.episodes import draws
from fmsuite.errors import UsageError
from tests.core.evaluation.factory import cohort, judged


@pytest.fixture(scope="module")
def slides() -> Bags:
    return cohort()


@pytest.fixture
def few() -> Bags:
    return cohort(18, dim=6, classes=3, sizes=(3, 12))


def unit(x: np.ndarray, mean: np.ndarray) -> np.ndarray:
    return (x - mean) / np.linalg.norm(x - mean)


def test_mi_simpleshot_equals_every_distance_by_itself(few: Bags) -> None:
    draw = draws(few, 2, 1, 0)[0]
    scores = find_classifier("mi_simpleshot", k=4)(few, draw.support, draw.queries, draw.seed)
    tiles = [bag.numpy().astype(np.float64) for bag in few.features.split(few.sizes.tolist())]
    known = [(x, int(few.labels[bag])) for bag in draw.support.tolist() for x in tiles[bag]]
    mean = np.mean([x for x, _ in known], 0)
    prototypes = [np.mean([unit(x, mean) for x, label in known if label == c], 0) for c in range(3)]
    for bag, row in zip(draw.queries.tolist(), scores.numpy(), strict=True):
        nearest = [sorted(((unit(x, mean) - p) ** 2).sum() for x in tiles[bag])[:4] for p in prototypes]
        powers = np.exp([-np.mean(distances) for distances in nearest])
        np.testing.assert_allclose(row, powers / powers.sum(), atol=1e-5)


def test_simpleshot_classifies_mean_features(few: Bags) -> None:
    draw = draws(few, 2, 1, 0)[0]
    means = Bags.of_single(few.means, few.labels, few.groups, 3)
    of_bags = CLASSIFIERS["simpleshot"](few, draw.support, draw.queries, 0)
    assert torch.equal(of_bags, CLASSIFIERS["simpleshot"](means, draw.support, draw.queries, 0))
    assert torch.equal(of_bags, CLASSIFIERS["mi_simpleshot"](means, draw.support, draw.queries, 0))


def test_logistic_and_neighbours_are_those_of_scikit_learn(few: Bags) -> None:
    draw = draws(few, 3, 1, 0)[0]
    means, labels = few.means.double().numpy(), few.labels.numpy()
    support, queries = draw.support.numpy(), draw.queries.numpy()
    logistic = LogisticRegression(C=6 * 3 / 100, tol=1e-10, max_iter=1000).fit(means[support], labels[support])
    found = CLASSIFIERS["logistic"](few, draw.support, draw.queries, 0)
    np.testing.assert_allclose(found, logistic.predict_proba(means[queries]), atol=1e-4)

    for k in (4, 9):
        reference = KNeighborsClassifier(
            k, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07), algorithm="brute"
        )
        expected = reference.fit(means[support], labels[support]).predict_proba(means[queries])
        found = find_classifier("knn", k=k)(few, draw.support, draw.queries, 0)
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_abmil_is_trained_from_the_episodes_seed(few: Bags) -> None:
    draw = draws(few, 2, 1, 0)[0]
    quick = find_classifier("abmil", steps=3, embedding=8, attention=4)
    expected = fit_abmil(few, draw.support, draw.seed, quick).predict(few, draw.queries)[0]  # type: ignore[arg-type]
    assert torch.equal(quick(few, draw.support, draw.queries, draw.seed), expected)


@pytest.mark.parametrize("method", list(CLASSIFIERS))
def test_scores_are_shares_and_single_tiles_are_bags_too(few: Bags, method: str) -> None:
    single = Bags.of_single(few.means, few.labels, few.groups, 3)
    classifier = (
        find_classifier("abmil", steps=2, embedding=8, attention=4) if method == "abmil" else CLASSIFIERS[method]
    )
    for bags in (few, single):
        draw = draws(bags, 1, 1, 0)[0]
        scores = classifier(bags, draw.support, draw.queries, 0)
        assert scores.shape == (len(draw.queries), 3)
        np.testing.assert_allclose(scores.sum(1), 1, atol=1e-6)


def test_neighbours_tell_classes_apart_even_where_all_examples_vote(slides: Bags) -> None:
    single = Bags.of_single(slides.means, slides.labels, slides.groups, 2)
    assert judged(single, "knn", 8, 10).metrics["balanced_accuracy"].mean > 0.8


def test_large_bags_are_said_to_be_sampled_in_training(slides: Bags) -> None:
    quick = find_classifier("abmil", steps=1, embedding=8, attention=4, tiles=100)
    larger = int((slides.sizes > 100).sum())
    notes = quick.notes(slides, draws(slides, 1, 1, 0), "slide")
    assert notes[0].startswith(f"{larger} of 60 slides have more than 100 windows")


def test_a_logistic_regression_cut_short_says_so(few: Bags, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = classifiers.fit_linear
    monkeypatch.setattr(classifiers, "fit_linear", lambda *given, form: whole(*given, form=form, max_iter=1))
    result = judged(few, "logistic", 2, 3)
    assert result.notes == ["In 3 of 3 episodes the logistic regression had not converged after 1 iterations."]


def test_unknown_names_and_options_are_refused() -> None:
    with pytest.raises(UsageError, match="Did you mean 'simpleshot'"):
        find_classifier("simpelshot")
    with pytest.raises(UsageError, match="no option 'n'"):
        find_classifier("knn", n=3)
    with pytest.raises(UsageError, match="k = 0"):
        find_classifier("mi_simpleshot", k=0)
    with pytest.raises(UsageError, match="temperature above 0"):
        find_classifier("knn", temperature=0.0)
    with pytest.raises(UsageError, match="'tiles' must be at least 1"):
        find_classifier("abmil", tiles=0)
