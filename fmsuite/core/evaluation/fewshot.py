"""Few-shot classification of bags: the engine that judges a classifier over many episodes."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from fmsuite.core.evaluation.bags import Bags
from fmsuite.core.evaluation.classifiers import Classifier, FitWarning, find_classifier
from fmsuite.core.evaluation.episodes import Draw
from fmsuite.core.evaluation.metrics import METRICS, confusion, score
from fmsuite.core.evaluation.results import Episode, Estimate, Evaluation
from fmsuite.core.evaluation.statistics import Scored, bootstrap, summarise
from fmsuite.errors import UsageError


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
        method: name in ``classifiers.CLASSIFIERS``, and in the results.
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
            shown = bags if draw.labels is None else bags.with_labels(draw.labels)
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
