from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, roc_auc_score
from torch import Tensor

from fmsuite.core.evaluation.bags import Bags
from fmsuite.core.evaluation.classifiers import CLASSIFIERS, FitWarning, SimpleShot, find_classifier
from fmsuite.core.evaluation.episodes import allowed_shots, draws
from fmsuite.core.evaluation.fewshot import run
from fmsuite.core.evaluation.results import Evaluation
from fmsuite.errors import UsageError
from tests.core.evaluation.factory import cohort, judged


@pytest.fixture(scope="module")
def slides() -> Bags:
    return cohort()


@pytest.fixture
def few() -> Bags:
    return cohort(18, dim=6, classes=3, sizes=(3, 12))


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


def test_wrong_use_is_refused(few: Bags) -> None:
    with pytest.raises(UsageError, match="no episodes"):
        run(few, "simpleshot", draws(few, 1, 2, 0), encoder="e", shots=1, seed=0, episodes=-1)
    with pytest.raises(UsageError, match="no episodes"):
        run(few, "simpleshot", [], encoder="e", shots=1, seed=0)
