"""Tasks on single windows with a training side: nearest neighbours, linear probes and prototypes, as published."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fmsuite.core.evaluation.folds import Folds
from fmsuite.core.evaluation.knn import knn_scores
from fmsuite.core.evaluation.linear import Form, fit_linear
from fmsuite.core.evaluation.metrics import class_scores, confusion, score
from fmsuite.core.evaluation.prototypes import fit_prototypes, prototype_distances, prototype_scores
from fmsuite.core.evaluation.results import Episode, Estimate, Evaluation
from fmsuite.core.evaluation.splits import Split, shuffled_labels, trained_on
from fmsuite.core.evaluation.statistics import Scored, bootstrap, summarise
from fmsuite.core.seeding import derive

NEIGHBOURS = 20
MAX_ITER = 1000
SHUFFLES = 20
"""Shuffles of the training labels that the control averages over."""
SHUFFLED_T = 2.861
"""99.5% quantile of Student's t distribution with ``SHUFFLES`` - 1 degrees of freedom."""
RESCALED = "Features were divided by their root mean square, to have the scale that the penalty presumes."
SHUFFLED_INTERVAL = f"With shuffled labels: 99% t interval of the mean over {SHUFFLES} shuffles."


@dataclass(frozen=True)
class Answer:
    """What a task says about the windows it was asked.

    Attributes:
        scores: (Q, C) floating, rows summing to 1; the prediction is the largest, the first of equal ones.
        settings: the options as used.
        notes: what was clamped or went wrong, in sentences.
    """

    scores: Tensor
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def predicted(self) -> Tensor:
        """(Q,) int64."""
        return self.scores.argmax(1)


@dataclass(frozen=True)
class TileTask:
    """A task.

    Attributes:
        title: one sentence on what it is, with its reference.
        answer: ``answer(train, labels, test, classes)`` of (N, D) training features with (N,) int64 labels below
            ``classes``, and (Q, D) features to be asked.
    """

    title: str
    answer: Callable[[Tensor, Tensor, Tensor, int], Answer]


def knn(train: Tensor, labels: Tensor, test: Tensor, classes: int) -> Answer:
    """20 nearest neighbours with one vote each, by the Euclidean distance of features from which the training mean is
    taken and which are then L2-normalised (Chen et al. 2024, "UNI", Methods: k-NN on tiles)."""
    mean = train.mean(0, keepdim=True)
    support, queries = F.normalize(train - mean, dim=1), F.normalize(test - mean, dim=1)
    scores = knn_scores(support, labels, queries, NEIGHBOURS, classes=classes, temperature=None, metric="euclidean")
    k = min(NEIGHBOURS, len(train))
    notes = [f"k was lowered to the {k} training windows."] if k < NEIGHBOURS else []
    settings = {"k": k, "distance": "euclidean", "centred": True, "normalised": True, "votes": "equal"}
    return Answer(scores, settings, notes)


def linear_torch(train: Tensor, labels: Tensor, test: Tensor, classes: int) -> Answer:
    """UNI's linear probe as its PyTorch version has it; see ``linear.fit_linear``, form ``norm``."""
    return _linear(train, labels, test, classes, "norm")


def linear_sklearn(train: Tensor, labels: Tensor, test: Tensor, classes: int) -> Answer:
    """UNI's linear probe as its scikit-learn version has it; see ``linear.fit_linear``, form ``squared``."""
    return _linear(train, labels, test, classes, "squared")


def prototypes(train: Tensor, labels: Tensor, test: Tensor, classes: int) -> Answer:
    """SimpleShot with the whole training side as its support; see ``prototypes.fit_prototypes``."""
    found = fit_prototypes(train, labels, classes)
    settings = {"distance": "euclidean", "centred": True, "normalised": True}
    return Answer(prototype_scores(prototype_distances(test, found)), settings)


def judge(
    task: str,
    features: Tensor,
    labels: Tensor,
    groups: Tensor,
    split: Split | Folds,
    classes: int,
    *,
    encoder: str,
    seed: int,
    shuffled: bool = False,
    rescale: bool = False,
    share: float | None = None,
    shown: Sequence[Sequence[Split]] = (),
    names: Sequence[str] = (),
) -> Evaluation:
    """Ask the test side after training on the whole training side, or on several draws of a share of its groups. Of
    folds, answers to all items are put together before anything is scored: one answer for each.

    Args:
        task: name in ``TASKS``.
        features: (S, D) float32 of every item. labels: (S,) int64 below ``classes``. groups: (S,) int64.
        encoder: name of what made the features.
        seed: of the bootstrap over groups and of the shuffles, the same for every encoder.
        shuffled: the control: labels are shuffled by group within each side, ``SHUFFLES`` times, each an episode, as
            few-shot draws do. (Were those that are asked left as they are, classes of unequal size and spread would be
            off chance without any leak: the larger is answered where groups lie mixed, and one group's label where they
            do not.) Of folds, what is learned and what is asked are two shuffles of all items. (With one of both,
            leaving a group out would leave its label out, and chance would be missed downwards.) The interval is that
            of the mean over shuffles, which are independent draws: one shuffle gives all windows that look alike the
            same wrong label, which a bootstrap over the groups that were asked knows nothing of. It has 99% confidence,
            as it raises an alarm where it misses chance.
        rescale: divide the features by their root mean square on the training side. The penalty of the linear probes
            presumes the scale of features after a layer norm; much smaller ones (shares of a histogram) it holds down.
        share: of the training groups, ``None`` for all of them; then ``shown`` holds the sides of each draw, for each
            fold, and metrics are averaged over the draws.
        names: of the classes, for metrics of each (``metrics.class_scores``); none by default.
    """
    scored, episodes, notes = [], [], dict[str, None]()
    matrix = torch.zeros(classes, classes, dtype=torch.int64)
    settings: dict[str, Any] = {}
    asked = split.test
    place = torch.full((len(labels),), -1)
    place[asked] = torch.arange(len(asked))
    rounds = [split.parts] * (SHUFFLES if shuffled else 1) if share is None else shown
    for number, parts in enumerate(rounds):
        own = derive(seed, "shuffle", number) >> 31 if shuffled else seed
        known, target = _shuffled(labels, groups, split, own) if shuffled else (labels, labels)
        scores: list[Tensor] = []
        rows: list[Tensor] = []
        for part in parts:
            train, test = features[part.train], features[part.test]
            if rescale and (size := train.double().square().mean().sqrt().item()) > 0:
                train, test = train / size, test / size
                notes[RESCALED] = None
            answer = TASKS[task].answer(train, known[part.train], test, classes)
            scores.append(answer.scores)
            rows.append(part.test)
            notes.update(dict.fromkeys(answer.notes))
            settings = answer.settings
        of_all = torch.cat(scores)[place[torch.cat(rows)].argsort()]
        predicted = of_all.argmax(1)
        predictions = torch.full((len(labels),), -1)
        predictions[asked] = predicted
        metrics = score(of_all, predicted, target[asked], classes)
        if names:
            metrics |= class_scores(predicted, target[asked], names)
        support = parts[0].train.tolist() if share is not None and len(parts) == 1 else None
        episodes.append(Episode(seed=own, support=support, metrics=metrics, predictions=predictions.tolist()))
        scored.append(Scored(asked, of_all, predicted, target[asked]))
        matrix += confusion(predicted, target[asked], classes)
    if len(split.parts) > 1:
        settings = {**settings, **trained_on(rounds[0], groups)}
    bounds = None if shuffled else bootstrap(scored, groups, classes, seed=derive(seed, "bootstrap"), names=names)
    estimates = {}
    for name in dict.fromkeys(name for episode in episodes for name in episode.metrics):
        mean, std = summarise([episode.metrics[name] for episode in episodes if name in episode.metrics])
        low, high = (None, None) if bounds is None else bounds[name] or (None, None)
        if shuffled and std is not None:
            reach = SHUFFLED_T * std / len(episodes) ** 0.5
            low, high = mean - reach, mean + reach
        estimates[name] = Estimate(mean=mean, std=std, low=low, high=high)
    return Evaluation(
        encoder=encoder,
        method=task,
        fraction=share,
        shuffled=shuffled,
        settings=settings,
        metrics=estimates,
        confusion=matrix.tolist(),
        episodes=episodes,
        notes=list(notes),
    )


def _shuffled(labels: Tensor, groups: Tensor, split: Split | Folds, seed: int) -> tuple[Tensor, Tensor]:
    """Labels to learn from and labels to be held against."""
    known, target = labels.clone(), labels.clone()
    for role, (side, into) in enumerate(((split.train, known), (split.test, target))):
        into[side] = shuffled_labels(labels[side], groups[side], seed, role)
    return known, target


def _linear(train: Tensor, labels: Tensor, test: Tensor, classes: int, form: Form) -> Answer:
    probe = fit_linear(train, labels, classes, form=form, max_iter=MAX_ITER)
    notes = []
    if not probe.weight.any():
        notes.append("The penalty holds all weights of the linear probe at zero: it answers with the largest class.")
    if not probe.converged:
        notes.append(f"The linear probe had not converged after {probe.iterations} iterations.")
    settings = {"form": form, "strength": probe.strength, "max_iter": MAX_ITER, "iterations": probe.iterations}
    return Answer(probe.scores(test), settings, notes)


TASKS: dict[str, TileTask] = {
    "knn": TileTask(
        "20 nearest neighbours, one vote each, by Euclidean distance after the training mean is taken off and vectors "
        "are L2-normalised (the protocol of UNI, Chen et al. 2024).",
        knn,
    ),
    "linear_torch": TileTask(
        "Logistic regression on the features as they are, mean cross-entropy + (lambda/2)||W|| with the norm not "
        "squared, lambda = 100/(features x classes) (UNI's PyTorch form, Chen et al. 2024).",
        linear_torch,
    ),
    "linear_sklearn": TileTask(
        "Logistic regression on the features as they are, summed cross-entropy + (lambda/2)||W||^2, "
        "lambda = 100/(features x classes) (UNI's scikit-learn form, Chen et al. 2024).",
        linear_sklearn,
    ),
    "prototypes": TileTask(
        "Nearest class mean of the centred, L2-normalised training features (SimpleShot, Wang et al. 2019) with the "
        "whole training side as its support.",
        prototypes,
    ),
}
"""By name, in the order in which they are shown."""
