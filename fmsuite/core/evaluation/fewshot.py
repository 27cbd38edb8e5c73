"""Few-shot classification of bags: the classifiers by name, and the engine that judges one over many episodes."""

from __future__ import annotations

import dataclasses
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from fmsuite.core.evaluation.abmil import AbmilSettings, fit_abmil
from fmsuite.core.evaluation.bags import Bags
from fmsuite.core.evaluation.episodes import Draw
from fmsuite.core.evaluation.knn import knn_scores
from fmsuite.core.evaluation.linear import fit_linear
from fmsuite.core.evaluation.metrics import METRICS, confusion, score
from fmsuite.core.evaluation.prototypes import (
    fit_prototypes,
    nearest_in_bags,
    prototype_distances,
    prototype_scores,
)
from fmsuite.core.evaluation.results import Episode, Estimate, Evaluation
from fmsuite.core.evaluation.statistics import Scored, bootstrap, summarise
from fmsuite.errors import UsageError, nearest

_ROWS = 1 << 16


class FitWarning(UserWarning):
    """A classifier could not be fitted as it should be in an episode. ``run`` counts them in its notes."""


class Classifier(Protocol):
    """What ``run`` judges. Options are dataclass fields.

    Attributes:
        title: what it is, in one sentence with its reference.
        episodes: the most episodes that ``run`` gives it, where an episode is dear; ``None`` for all.
    """

    title: ClassVar[str]
    episodes: ClassVar[int | None]

    @property
    def settings(self) -> dict[str, Any]:
        """The options as used, for the results."""

    def __call__(self, bags: Bags, support: Tensor, queries: Tensor, seed: int) -> Tensor:
        """
        Args:
            support: (N,) int64 positions of the bags whose labels may be looked at.
            queries: (Q,) int64 positions.
            seed: of all that is random.

        Returns:
            (Q, classes) scores; rows sum to 1, and the largest (the first of equal ones) is the prediction.
        """

    def notes(self, bags: Bags, draws: Sequence[Draw], unit: str) -> list[str]:
        """Sentences on options that these bags do not allow as they stand."""


def _at_least_one(method: str, k: int) -> None:
    if k < 1:
        raise UsageError(f"Method '{method}' needs a k of at least 1 (k = {k}).")


@dataclass(frozen=True)
class _Options:
    episodes: ClassVar[int | None] = None

    @property
    def settings(self) -> dict[str, Any]:
        return asdict(self)

    def notes(self, bags: Bags, draws: Sequence[Draw], unit: str) -> list[str]:
        return []


@dataclass(frozen=True)
class SimpleShot(_Options):
    title: ClassVar[str] = (
        "SimpleShot: the nearest class prototype among centred, L2-normalised mean features "
        "(Wang et al. 2019; as in Chen et al. 2024)."
    )

    def __call__(self, bags: Bags, support: Tensor, queries: Tensor, seed: int) -> Tensor:
        prototypes = fit_prototypes(bags.means[support], bags.labels[support], bags.classes)
        return prototype_scores(prototype_distances(bags.means[queries], prototypes))


@dataclass(frozen=True)
class MISimpleShot(_Options):
    """
    Attributes:
        k: vectors of a bag that are compared with each prototype; all in smaller bags.
    """

    k: int = 5
    title: ClassVar[str] = (
        "MI-SimpleShot: prototypes from all tiles of the example slides; the class whose prototype has the smallest "
        "mean squared distance to the K nearest tiles of the slide (Chen et al. 2024)."
    )

    def __post_init__(self) -> None:
        _at_least_one("mi_simpleshot", self.k)

    def __call__(self, bags: Bags, support: Tensor, queries: Tensor, seed: int) -> Tensor:
        of_tiles = torch.repeat_interleave(bags.labels[support], bags.sizes[support])
        prototypes = fit_prototypes(bags.features[bags.rows(support)], of_tiles, bags.classes)
        rows = bags.rows(queries).split(_ROWS)
        distances = torch.cat([prototype_distances(bags.features[part], prototypes) for part in rows])
        return prototype_scores(nearest_in_bags(distances, bags.sizes[queries], self.k))

    def notes(self, bags: Bags, draws: Sequence[Draw], unit: str) -> list[str]:
        if int(bags.sizes.max()) == 1:
            return [f"Every {unit} is one feature vector, so MI-SimpleShot is SimpleShot here."]
        fewer = int((bags.sizes < self.k).sum())
        if not fewer:
            return []
        return [f"{fewer} of {len(bags)} {unit}s have fewer than {self.k} windows; K is the number that they have."]


@dataclass(frozen=True)
class Logistic(_Options):
    title: ClassVar[str] = (
        "Logistic regression of mean features, L-BFGS, squared L2 penalty of strength 100 / (features x classes) "
        "(Chen et al. 2024, scikit-learn form)."
    )

    def __call__(self, bags: Bags, support: Tensor, queries: Tensor, seed: int) -> Tensor:
        probe = fit_linear(bags.means[support], bags.labels[support], bags.classes, form="squared")
        if not probe.converged:
            message = f"the logistic regression had not converged after {probe.iterations} iterations"
            warnings.warn(message, FitWarning, stacklevel=2)
        return probe.scores(bags.means[queries])


@dataclass(frozen=True)
class NearestNeighbours(_Options):
    """
    Attributes:
        k: neighbours; all supports if there are fewer.
        temperature: of the votes' weights. Equal votes would say nothing where k takes in all supports, as they have
            the same number of every class.
    """

    k: int = 20
    temperature: float = 0.07
    title: ClassVar[str] = (
        "k nearest neighbours of mean features by cosine similarity, votes weighted by exp(similarity / 0.07) "
        "(Wu et al. 2018)."
    )

    def __post_init__(self) -> None:
        _at_least_one("knn", self.k)
        if self.temperature <= 0:
            raise UsageError(f"Method 'knn' needs a temperature above 0 ({self.temperature:g}).")

    def __call__(self, bags: Bags, support: Tensor, queries: Tensor, seed: int) -> Tensor:
        means, labels = bags.means, bags.labels[support]
        return knn_scores(
            means[support], labels, means[queries], self.k, classes=bags.classes, temperature=self.temperature
        )

    def notes(self, bags: Bags, draws: Sequence[Draw], unit: str) -> list[str]:
        fewest = min(len(draw.support) for draw in draws)
        if fewest >= self.k:
            return []
        return [f"There are {fewest} examples and not {self.k} to be neighbours; all of them vote."]


@dataclass(frozen=True)
class TrainedAbmil(_Options, AbmilSettings):
    title: ClassVar[str] = (
        "ABMIL: a gated-attention network trained on the example slides (Ilse et al. 2018, equation 9), "
        "fixed schedule without a validation side."
    )
    episodes: ClassVar[int | None] = 5

    def __call__(self, bags: Bags, support: Tensor, queries: Tensor, seed: int) -> Tensor:
        return fit_abmil(bags, support, seed, self).predict(bags, queries)[0]

    def notes(self, bags: Bags, draws: Sequence[Draw], unit: str) -> list[str]:
        larger = int((bags.sizes > self.tiles).sum())
        if not larger:
            return []
        return [
            f"{larger} of {len(bags)} {unit}s have more than {self.tiles} windows; a training step takes "
            f"{self.tiles} random ones of each, the prediction all."
        ]


CLASSIFIERS: Mapping[str, Classifier] = {
    "simpleshot": SimpleShot(),
    "mi_simpleshot": MISimpleShot(),
    "logistic": Logistic(),
    "knn": NearestNeighbours(),
    "abmil": TrainedAbmil(),
}
"""Name to classifier with its default options."""


def find_classifier(name: str, **options: Any) -> Classifier:
    """The classifier of that name, with other options than the defaults.

    Raises:
        UsageError: for an unknown name or option (naming the nearest), or an option out of its range.
    """
    if name not in CLASSIFIERS:
        raise UsageError(f"There is no few-shot method '{name}'.", nearest(name, CLASSIFIERS))
    found = CLASSIFIERS[name]
    for option in options:
        if option not in found.settings:
            raise UsageError(f"Method '{name}' has no option '{option}'.", nearest(option, found.settings))
    return dataclasses.replace(found, **options)  # type: ignore[type-var]


def run(
    bags: Bags,
    method: str,
    draws: Sequence[Draw],
    *,
    encoder: str,
    shots: int,
    seed: int,
    classifier: Classifier | None = None,
    episodes: int | None = None,
    replicates: int = 1000,
    confidence: float = 0.95,
    names: Sequence[str] | None = None,
    unit: str = "bag",
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Judge one method over the given episodes.

    Args:
        method: name in ``CLASSIFIERS``, and in the results.
        draws: as ``episodes.draws`` gives them; with shuffled labels the evaluation is a control.
        encoder: name of what made the features.
        shots: that the draws have.
        seed: of the bootstrap.
        classifier: the method with other options than the defaults.
        episodes: the first so many draws are run; by default as many as the classifier allows itself.
        names: of the classes, and ``unit``: what a bag is, in the singular; for the notes.
        progress: told how many episodes are done, after each.

    Returns:
        Metrics as mean and standard deviation over episodes with bootstrap intervals over groups, the confusion matrix
        summed over episodes, and every prediction.

    Raises:
        UsageError: for an unknown method, or without episodes.
    """
    classifier = classifier or find_classifier(method)
    limit = episodes if episodes is not None else classifier.episodes
    used = list(draws)[: None if limit is None else max(0, limit)]
    if not used:
        raise UsageError(f"Method '{method}' was given no episodes to run.", "Ask for at least one.")
    scored, kept = [], []
    matrix = torch.zeros(bags.classes, bags.classes, dtype=torch.int64)
    caught: list[str] = []
    with _fit_warnings(caught):
        for done, draw in enumerate(used, 1):
            shown = bags if draw.labels is None else _relabelled(bags, draw.labels)
            scores = classifier(shown, draw.support, draw.queries, draw.seed)
            predicted, target = scores.argmax(1), shown.labels[draw.queries]
            scored.append(Scored(draw.queries, scores, predicted, target))
            matrix += confusion(predicted, target, bags.classes)
            kept.append(_episode(draw, score(scores, predicted, target, bags.classes), predicted, len(bags)))
            if progress is not None:
                progress(done)
    bounds = bootstrap(scored, bags.groups, bags.classes, replicates, confidence, seed=seed)
    metrics = {}
    for name in METRICS:
        mean, std = summarise([episode.metrics[name] for episode in kept])
        low, high = bounds[name] or (None, None)
        metrics[name] = Estimate(mean=mean, std=std, low=low, high=high)
    return Evaluation(
        encoder=encoder,
        method=method,
        shots=shots,
        shuffled=any(draw.labels is not None for draw in used),
        settings=classifier.settings,
        metrics=metrics,
        confusion=matrix.tolist(),
        episodes=kept,
        notes=[
            *_notes(bags, used, len(draws), names, unit),
            *classifier.notes(bags, used, unit),
            *(f"In {count} of {len(used)} episodes {text}." for text, count in Counter(caught).items()),
        ],
    )


def _episode(draw: Draw, metrics: dict[str, float], predicted: Tensor, items: int) -> Episode:
    everything = torch.full((items,), -1)
    everything[draw.queries] = predicted
    return Episode(seed=draw.seed, support=draw.support.tolist(), metrics=metrics, predictions=everything.tolist())


def _relabelled(bags: Bags, labels: Tensor) -> Bags:
    """Other labels on the same bags, which keep the means that were computed once."""
    shown = bags.with_labels(labels)
    shown.__dict__["means"] = bags.means
    return shown


def _notes(bags: Bags, draws: Sequence[Draw], given: int, names: Sequence[str] | None, unit: str) -> list[str]:
    notes = []
    if len(draws) < given:
        notes.append(f"The first {len(draws)} of {given} episodes were run, so that training in each stays affordable.")
    again = sum(draw.attempt > 0 for draw in draws)
    if again:
        notes.append(
            f"{again} of {len(draws)} draws of examples were made again, because no {unit} of some class was left to "
            "be asked."
        )
    lacking = np.zeros(bags.classes, dtype=int)
    for draw in draws:
        labels = bags.labels if draw.labels is None else draw.labels
        lacking += np.bincount(labels[draw.queries].numpy(), minlength=bags.classes) == 0
    for label in np.flatnonzero(lacking).tolist():
        name = str(label) if names is None else f"'{names[label]}'"
        notes.append(
            f"In {lacking[label]} of {len(draws)} episodes no {unit} of class {name} is asked, and the metrics are "
            "those of the other classes."
        )
    return notes


@contextmanager
def _fit_warnings(texts: list[str]) -> Iterator[None]:
    """What a ``FitWarning`` says is added to ``texts``; other warnings go where they would have gone."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FitWarning)
        yield
    for warning in caught:
        if issubclass(warning.category, FitWarning):
            texts.append(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
