"""The few-shot classifiers of bags, by name."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from fmsuite.core.evaluation.abmil import AbmilSettings, fit_abmil
from fmsuite.core.evaluation.bags import Bags
from fmsuite.core.evaluation.episodes import Draw
from fmsuite.core.evaluation.knn import knn_scores
from fmsuite.core.evaluation.linear import fit_linear
from fmsuite.core.evaluation.prototypes import (
    fit_prototypes,
    nearest_in_bags,
    prototype_distances,
    prototype_scores,
)
from fmsuite.errors import UsageError, nearest

_ROWS = 1 << 16


class FitWarning(UserWarning):
    """A classifier could not be fitted as it should be in an episode. ``fewshot.run`` counts them in its notes."""


class Classifier(Protocol):
    """What ``fewshot.run`` judges. Options are dataclass fields.

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
        "MI-SimpleShot: prototypes from all windows of the examples; the class whose prototype has the smallest "
        "mean squared distance to the K nearest windows of what is asked (Chen et al. 2024)."
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
        "Logistic regression of mean features, solved to its minimum by Newton's method: summed cross-entropy + "
        "(lambda/2)||W||^2, lambda = 100/(features x classes) (scikit-learn form of Chen et al. 2024)."
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
        "ABMIL: a gated-attention network trained on the examples (Ilse et al. 2018, equation 9), "
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
