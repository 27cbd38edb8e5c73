from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, roc_auc_score
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from fmsuite.core.evaluation import fewshot
from fmsuite.core.evaluation.abmil import fit_abmil
from fmsuite.core.evaluation.bags import Bags
from fmsuite.core.evaluation.episodes import allowed_shots, draws
from fmsuite.core.evaluation.fewshot import CLASSIFIERS, FitWarning, SimpleShot, find_classifier, run
from fmsuite.core.evaluation.results import Evaluation
from fmsuite.errors import UsageError


def cohort(slides: int = 60, dim: int = 64, strength: float = 4.0, classes: int = 2, sizes: tuple = (50, 200)) -> Bags:
    """Slides of noise, a tenth of whose tiles are moved along the axis of the slide's class; a patient each."""
    random = np.random.default_rng(0)
    labels = np.arange(slides) % classes
    counts = random.integers(sizes[0], sizes[1] + 1, slides)
    features = random.normal(size=(counts.sum(), dim))
    offsets = np.r_[0, counts.cumsum()]
    for start, count, label in zip(offsets, counts, labels, strict=False):
        features[start : start + max(1, count // 10), label] += strength
    labels_, groups = torch.from_numpy(labels), torch.arange(slides)
    return Bags(torch.from_numpy(features).float(), torch.from_numpy(offsets), labels_, groups, classes)


@pytest.fixture(scope="module")
def slides() -> Bags:
    return cohort()


@pytest.fixture
def few() -> Bags:
    return cohort(18, dim=6, classes=3, sizes=(3, 12))


def judged(bags: Bags, method: str, shots: int, episodes: int, shuffled: bool = False, **options: object) -> Evaluation:
    drawn = draws(bags, shots, episodes, 0, shuffled=shuffled)
    return run(bags, method, drawn, encoder="generated", shots=shots, seed=0, **{"replicates": 20, **options})


def unit(x: np.ndarray, mean: np.ndarray) -> np.ndarray:
    return (x - mean) / np.linalg.norm(x - mean)


def test_the_curve_of_a_planted_difference_rises_with_the_shots(slides: Bags) -> None:
    curve = [judged(slides, "mi_simpleshot", shots, 40).metrics["balanced_accuracy"].mean for shots in (1, 4, 16)]
    assert curve[0] > 0.55
    assert curve[1] > curve[0] + 0.1
    assert curve[2] > curve[1] + 0.1
    assert curve[2] > 0.93


@pytest.mark.parametrize("method", ["mi_simpleshot", "simpleshot"])
def test_shuffled_labels_are_at_chance(slides: Bags, method: str) -> None:
    for shots in (1, 8):
        result = judged(slides, method, shots, 60, shuffled=True)
        accuracy = result.metrics["balanced_accuracy"]
        assert accuracy.std is not None
        # Every episode has a shuffle of its own, so its mean has a standard error of std / sqrt(episodes).
        assert abs(accuracy.mean - 0.5) < 4 * accuracy.std / np.sqrt(60)
        assert abs(accuracy.mean - 0.5) < 0.05
        assert result.shuffled


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


def test_metrics_predictions_and_confusion_are_those_of_every_episode(few: Bags) -> None:
    drawn = draws(few, 2, 12, 0)
    told: list[int] = []
    result = run(few, "simpleshot", drawn, encoder="generated", shots=2, seed=0, replicates=50, progress=told.append)
    assert told == list(range(1, 13))
    total, values = np.zeros((3, 3), dtype=int), []
    for draw, episode in zip(drawn, result.episodes, strict=True):
        assert (episode.seed, episode.support) == (draw.seed, draw.support.tolist())
        predicted = np.array(episode.predictions)
        assert np.flatnonzero(predicted >= 0).tolist() == draw.queries.tolist()
        asked, target = predicted[draw.queries], few.labels[draw.queries].numpy()
        total += confusion_matrix(target, asked, labels=range(3))
        values.append(balanced_accuracy_score(target, asked))
        assert episode.metrics["balanced_accuracy"] == pytest.approx(values[-1])
        scores = CLASSIFIERS["simpleshot"](few, draw.support, draw.queries, draw.seed)
        assert episode.metrics["auroc"] == pytest.approx(roc_auc_score(target, scores, multi_class="ovo"))
    assert result.confusion == total.tolist()
    estimate = result.metrics["balanced_accuracy"]
    assert (estimate.mean, estimate.std) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    assert estimate.low is not None
    assert estimate.high is not None
    assert estimate.low < estimate.mean < estimate.high
    assert Evaluation.model_validate(json.loads(json.dumps(result.model_dump(mode="json")))) == result


def test_the_same_seeds_give_the_same_result(few: Bags) -> None:
    assert judged(few, "simpleshot", 2, 5) == judged(few, "simpleshot", 2, 5)


def test_shuffled_labels_are_those_that_are_shown_and_asked(few: Bags) -> None:
    drawn = draws(few, 2, 4, 0, shuffled=True)
    result = run(few, "simpleshot", drawn, encoder="generated", shots=2, seed=0, replicates=20)
    for draw, episode in zip(drawn, result.episodes, strict=True):
        assert draw.labels is not None
        relabelled = few.with_labels(draw.labels)
        scores = CLASSIFIERS["simpleshot"](relabelled, draw.support, draw.queries, 0)
        predicted = np.array(episode.predictions)[draw.queries]
        assert predicted.tolist() == scores.argmax(1).tolist()
        target = draw.labels[draw.queries].numpy()
        assert episode.metrics["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(target, predicted))


def test_dear_methods_run_fewer_episodes_and_say_so(few: Bags) -> None:
    drawn = draws(few, 1, 9, 0)
    quick = find_classifier("abmil", steps=2, embedding=8, attention=4)
    result = run(few, "abmil", drawn, encoder="e", shots=1, seed=0, classifier=quick, replicates=20)
    assert len(result.episodes) == 5
    assert any("first 5 of 9 episodes" in note for note in result.notes)
    assert result.settings["steps"] == 2
    result = run(few, "abmil", drawn, encoder="e", shots=1, seed=0, classifier=quick, replicates=20, episodes=2)
    assert len(result.episodes) == 2


def test_a_k_beyond_the_tiles_of_a_slide_is_clamped_and_said() -> None:
    bags = cohort(18, dim=6, classes=3, sizes=(3, 12))
    fewer = int((bags.sizes < 5).sum())
    assert fewer > 0
    result = judged(bags, "mi_simpleshot", 1, 3, unit="slide")
    assert result.notes == [f"{fewer} of 18 slides have fewer than 5 windows; K is the number that they have."]
    assert result.settings == {"k": 5}
    all_of_them = find_classifier("mi_simpleshot", k=1000)
    assert judged(bags, "mi_simpleshot", 1, 3, classifier=all_of_them, unit="slide").notes[0].startswith("18 of 18")


def test_one_tile_a_slide_is_simpleshot_and_said(few: Bags) -> None:
    single = Bags.of_single(few.means, few.labels, few.groups, 3)
    result, plain = judged(single, "mi_simpleshot", 1, 3, unit="slide"), judged(single, "simpleshot", 1, 3)
    assert result.notes == ["Every slide is one feature vector, so MI-SimpleShot is SimpleShot here."]
    assert result.metrics == plain.metrics


def test_a_class_with_a_single_slide_is_an_example_but_never_asked_and_said() -> None:
    bags = cohort(19, dim=6, classes=2, sizes=(6, 12))
    labels = bags.labels.clone()
    labels[-1] = 2
    rare = Bags(bags.features, bags.offsets, labels, bags.groups, 3)
    assert allowed_shots(rare, [1, 2])[0] == [1]
    result = judged(rare, "simpleshot", 1, 6, names=["a", "b", "rare"], unit="slide")
    assert result.notes == [
        "In 6 of 6 episodes no slide of class 'rare' is asked, and the metrics are those of the other classes."
    ]
    assert all(18 in (episode.support or []) for episode in result.episodes)
    assert result.confusion[2] == [0, 0, 0]


def test_draws_made_again_and_clamped_neighbours_are_said() -> None:
    bags = cohort(20, dim=6, classes=2, sizes=(6, 12))
    paired = Bags(bags.features, bags.offsets, torch.arange(20) // 10, torch.arange(20) // 2, 2)
    result = judged(paired, "knn", 8, 5, unit="slide")
    assert "5 of 5 draws of examples were made again" in result.notes[0]
    assert result.notes[1] == "There are 16 examples and not 20 to be neighbours; all of them vote."


def test_neighbours_tell_classes_apart_even_where_all_examples_vote(slides: Bags) -> None:
    single = Bags.of_single(slides.means, slides.labels, slides.groups, 2)
    assert judged(single, "knn", 8, 10).metrics["balanced_accuracy"].mean > 0.8


def test_fits_that_fail_to_converge_are_counted_and_other_warnings_pass(few: Bags) -> None:
    @dataclass(frozen=True)
    class Stubborn(SimpleShot):
        title: ClassVar[str] = "warns"

        def __call__(self, bags: Bags, support: Tensor, queries: Tensor, seed: int) -> Tensor:
            warnings.warn("it had not converged", FitWarning, stacklevel=1)
            warnings.warn("something else", RuntimeWarning, stacklevel=1)
            return super().__call__(bags, support, queries, seed)

    with pytest.warns(RuntimeWarning, match="something else"):
        result = judged(few, "simpleshot", 1, 3, classifier=Stubborn())
    assert result.notes == ["In 3 of 3 episodes it had not converged."]


def test_a_logistic_regression_cut_short_says_so(few: Bags, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fewshot.fit_linear
    monkeypatch.setattr(fewshot, "fit_linear", lambda *given, form: whole(*given, form=form, max_iter=1))
    result = judged(few, "logistic", 2, 3)
    assert result.notes == ["In 3 of 3 episodes the logistic regression had not converged after 1 iterations."]


def test_large_bags_are_said_to_be_sampled_in_training(slides: Bags) -> None:
    quick = find_classifier("abmil", steps=1, embedding=8, attention=4, tiles=100)
    larger = int((slides.sizes > 100).sum())
    notes = quick.notes(slides, draws(slides, 1, 1, 0), "slide")
    assert notes[0].startswith(f"{larger} of 60 slides have more than 100 windows")


def test_wrong_use_is_refused(few: Bags) -> None:
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
    with pytest.raises(UsageError, match="no episodes"):
        run(few, "simpleshot", draws(few, 1, 2, 0), encoder="e", shots=1, seed=0, episodes=-1)
    with pytest.raises(UsageError, match="no episodes"):
        run(few, "simpleshot", [], encoder="e", shots=1, seed=0)
