"""Numbers (age, a score) predicted from frozen features: a training side, and a side that is asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fmsuite.core.evaluation.intervals import group_intervals
from fmsuite.core.evaluation.knn import nearest_rows
from fmsuite.core.evaluation.regression import METRICS, regression_scores
from fmsuite.core.evaluation.results import Episode, Estimate, Evaluation
from fmsuite.core.evaluation.ridge import FOLDS, STRENGTHS, fit_ridge_cv
from fmsuite.core.evaluation.splits import Split, trained_on
from fmsuite.core.evaluation.statistics import summarise
from fmsuite.core.seeding import derive

NEIGHBOURS = 20
CONSTANT = "mean"
PRIMARY = "r2"


@dataclass(frozen=True)
class Said:
    """What a task says about the items it was asked.

    Attributes:
        numbers: (Q,) float64.
        settings: the options as used.
        notes: what was clamped or went wrong, in sentences.
    """

    numbers: Tensor
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class NumberTask:
    """A task.

    Attributes:
        title: one sentence on what it is, with its reference.
        answer: ``answer(train, target, groups, test, seed)`` of (N, D) training features with (N,) numbers and
            (N,) int64 groups, and (Q, D) features to be asked.
    """

    title: str
    answer: Callable[[Tensor, Tensor, Tensor, Tensor, int], Said]


def ridge(train: Tensor, target: Tensor, groups: Tensor, test: Tensor, seed: int) -> Said:
    """See ``ridge.fit_ridge_cv``."""
    found = fit_ridge_cv(train, target, groups, seed)
    notes = []
    if found.strength == max(STRENGTHS):
        notes.append("The strongest penalty that was tried was chosen: the features tell next to nothing of it.")
    elif found.strength == min(STRENGTHS):
        notes.append("The weakest penalty that was tried was chosen.")
    return Said(found.predict(test), {"strength": found.strength, "folds": FOLDS}, notes)


def knn(train: Tensor, target: Tensor, groups: Tensor, test: Tensor, seed: int) -> Said:
    """The mean number of the 20 nearest neighbours, features centred on the training mean and L2-normalised."""
    mean = train.mean(0, keepdim=True)
    rows = nearest_rows(F.normalize(train - mean, dim=1), F.normalize(test - mean, dim=1), NEIGHBOURS)
    k = rows.shape[1]
    notes = [f"k was lowered to the {k} training items."] if k < NEIGHBOURS else []
    return Said(target.double()[rows].mean(1), {"k": k, "distance": "euclidean", "centred": True}, notes)


def constant(train: Tensor, target: Tensor, groups: Tensor, test: Tensor, seed: int) -> Said:
    """The mean of the training side, whatever is asked."""
    return Said(target.double().mean().expand(len(test)))


NUMBER_TASKS: dict[str, NumberTask] = {
    "ridge": NumberTask(
        "Ridge regression of standardised features, its penalty chosen from half decades by the squared error of a "
        f"{FOLDS}-fold cross-validation that divides no group (Hoerl and Kennard 1970).",
        ridge,
    ),
    "knn": NumberTask(
        "Mean of the 20 nearest neighbours by Euclidean distance, after the training mean is taken off and vectors are "
        "L2-normalised.",
        knn,
    ),
    CONSTANT: NumberTask("The mean of the training side for everyone: what knowing nothing gives.", constant),
}
"""By name, in the order in which they are shown."""


def judge_numbers(
    task: str,
    features: Tensor,
    target: Tensor,
    groups: Tensor,
    draws: Sequence[Sequence[Split]],
    *,
    encoder: str,
    seed: int,
    fraction: float | None = None,
) -> Evaluation:
    """Ask one side after training on the other, or on several draws of a share of it, over which metrics are averaged.

    Args:
        task: name in ``NUMBER_TASKS``.
        features: (I, D) float32 of every item. target: (I,) finite. groups: (I,) int64.
        draws: for each draw the sides of each fold; a single split is one. The folds of every draw ask about the same
            items, each once, and their answers are put together before they are scored.
        encoder: name of what made the features.
        seed: of folds and bootstrap, the same for every encoder.
        fraction: share of the training groups; ``None`` for the whole training side, which is the one draw.

    Raises:
        UsageError: as the task.
    """
    numbers, episodes, notes = [], [], dict[str, None]()
    settings: dict[str, Any] = {}
    asked = torch.cat([part.test for part in draws[0]])
    truth = target[asked]
    for parts in draws:
        told = []
        for part in parts:
            rows = part.train
            said = NUMBER_TASKS[task].answer(features[rows], target[rows], groups[rows], features[part.test], seed)
            told.append(said.numbers)
            notes.update(dict.fromkeys(said.notes))
            settings = said.settings
        numbers.append(torch.cat(told))
        metrics = defined(regression_scores(numbers[-1], truth))
        answers: list[list[float]] = [[] for _ in range(len(target))]
        for item, number in zip(asked.tolist(), numbers[-1].tolist(), strict=True):
            answers[item] = [number]
        support = parts[0].train.tolist() if fraction is not None and len(parts) == 1 else None
        episodes.append(Episode(seed=seed, support=support, metrics=metrics, answers=answers))
    if len(draws[0]) > 1:
        settings = {**settings, **trained_on(draws[0], groups)}

    def averaged(weights: Tensor) -> dict[str, Tensor]:
        drawn = [regression_scores(each, truth, weights) for each in numbers]
        return {name: torch.stack([one[name] for one in drawn]).mean(0) for name in METRICS}

    bounds = group_intervals(averaged, groups[asked], seed=derive(seed, "bootstrap"))
    return Evaluation(
        encoder=encoder,
        method=task,
        fraction=fraction,
        settings=settings,
        metrics=averages(episodes, bounds),
        confusion=[],
        episodes=episodes,
        notes=list(notes),
    )


def defined(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Those that are numbers: a correlation with what does not vary is none."""
    return {name: value.item() for name, value in values.items() if bool(value.isfinite())}


def averages(episodes: Sequence[Episode], bounds: Mapping[str, tuple[float, float] | None]) -> dict[str, Estimate]:
    """Over all draws, of the metrics that every one of them has.

    Args:
        bounds: of the mean over draws, by metric.
    """
    found = {}
    for name, interval in bounds.items():
        values = [episode.metrics[name] for episode in episodes if name in episode.metrics]
        if len(values) == len(episodes):
            mean, std = summarise(values)
            low, high = interval or (None, None)
            found[name] = Estimate(mean=mean, std=std, low=low, high=high)
    return found
