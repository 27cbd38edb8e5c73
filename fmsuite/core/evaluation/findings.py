"""Findings, of which an item may have several or none, predicted from frozen features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fmsuite.core.evaluation.intervals import group_intervals
from fmsuite.core.evaluation.knn import nearest_rows
from fmsuite.core.evaluation.linear import fit_linear
from fmsuite.core.evaluation.multilabel import multilabel_scores
from fmsuite.core.evaluation.numbers import averages, defined
from fmsuite.core.evaluation.results import Episode, Evaluation
from fmsuite.core.evaluation.splits import Split, trained_on
from fmsuite.core.evaluation.tiles import RESCALED
from fmsuite.core.seeding import derive

NEIGHBOURS = 20
PRIMARY = "macro_auroc"
OVERALL = ("macro_auroc", "map", "micro_map", "macro_f1", "micro_f1")


@dataclass(frozen=True)
class Told:
    """What a task says about the items it was asked.

    Attributes:
        scores: (Q, K) float64 from 0 to 1.
        settings: the options as used.
        notes: what was clamped or went wrong, in sentences.
    """

    scores: Tensor
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class FindingsTask:
    """A task.

    Attributes:
        title: one sentence on what it is.
        answer: ``answer(train, target, test, names)`` of (N, D) training features with (N, K) findings, 0, 1 or NaN,
            and (Q, D) features to be asked.
    """

    title: str
    answer: Callable[[Tensor, Tensor, Tensor, Sequence[str]], Told]


def linear(train: Tensor, target: Tensor, test: Tensor, names: Sequence[str]) -> Told:
    """A logistic regression for each finding; see ``linear.fit_linear``, form ``squared``."""
    scores, notes, strength = [], [], None
    for number, name in enumerate(names):
        known = ~target[:, number].isnan()
        labels = target[known, number].long()
        if len(labels.unique()) < 2:
            scores.append(_share(target[:, number]).expand(len(test)))
            notes.append(f"Of '{name}' the items shown are all alike or unknown: its share is the answer for everyone.")
            continue
        probe = fit_linear(train[known], labels, 2, form="squared")
        strength = probe.strength
        scores.append(probe.scores(test)[:, 1])
        if not probe.converged:
            notes.append(f"The linear probe of '{name}' had not converged after {probe.iterations} iterations.")
    return Told(torch.stack(scores, dim=1), {"form": "squared", "strength": strength}, notes)


def knn(train: Tensor, target: Tensor, test: Tensor, names: Sequence[str]) -> Told:
    """The share of each finding among the 20 nearest items of which it is known."""
    mean = train.mean(0, keepdim=True)
    support, queries = F.normalize(train - mean, dim=1), F.normalize(test - mean, dim=1)
    scores = torch.zeros(len(test), len(names), dtype=torch.float64)
    known, notes = ~target.isnan(), []
    # Findings that are known of the same items have the same neighbours.
    patterns, of_finding = known.T.unique(dim=0, return_inverse=True)
    for number, pattern in enumerate(patterns):
        columns = (of_finding == number).nonzero().flatten()
        if not pattern.any():
            scores[:, columns] = 0.5
            notes += [f"Of '{names[column]}' nothing is known of the items shown." for column in columns.tolist()]
            continue
        rows = nearest_rows(support[pattern], queries, NEIGHBOURS)
        scores[:, columns] = target[pattern][:, columns].double()[rows].mean(1)
        if rows.shape[1] < NEIGHBOURS:
            notes.append(f"k was lowered to the {rows.shape[1]} items of which findings are known.")
    return Told(scores, {"k": NEIGHBOURS, "distance": "euclidean", "centred": True}, notes)


FINDINGS_TASKS: dict[str, FindingsTask] = {
    "linear": FindingsTask(
        "For each finding a logistic regression on the features as they are, summed cross-entropy + "
        "(lambda/2)||W||^2, lambda = 100/(features x 2) (UNI's scikit-learn form, Chen et al. 2024), of the items of "
        "which it is known.",
        linear,
    ),
    "knn": FindingsTask(
        "For each finding its share among the 20 nearest items of which it is known, by Euclidean distance after the "
        "training mean is taken off and vectors are L2-normalised.",
        knn,
    ),
}
"""By name, in the order in which they are shown."""


def judge_findings(
    task: str,
    features: Tensor,
    target: Tensor,
    names: Sequence[str],
    groups: Tensor,
    draws: Sequence[Sequence[Split]],
    *,
    encoder: str,
    seed: int,
    fraction: float | None = None,
    rescale: bool = False,
) -> Evaluation:
    """Ask one side after training on the other, or on several draws of a share of it, over which metrics are averaged.

    Metrics are those of ``multilabel.METRICS``, and ``auroc/NAME`` and ``map/NAME`` of each finding. An item counts for
    the findings that are known of it.

    Args:
        task: name in ``FINDINGS_TASKS``.
        features: (I, D) float32 of every item. target: (I, K) 0, 1, or NaN for unknown. groups: (I,) int64.
        names: of the K findings.
        draws, encoder, seed, fraction: as of ``numbers.judge_numbers``.
        rescale: as of ``tiles.judge``.
    """
    asked = torch.cat([part.test for part in draws[0]])
    truth, known = target[asked] > 0.5, ~target[asked].isnan()
    called = {f"{metric}/{k}": f"{metric}/{name}" for metric in ("auroc", "map") for k, name in enumerate(names)}
    called = {**{name: name for name in OVERALL}, **called}
    told, episodes, notes = [], [], dict[str, None]()
    settings: dict[str, Any] = {}
    for parts in draws:
        said = []
        for part in parts:
            train, test = features[part.train], features[part.test]
            if rescale and (size := train.double().square().mean().sqrt().item()) > 0:
                train, test = train / size, test / size
                notes[RESCALED] = None
            answer = FINDINGS_TASKS[task].answer(train, target[part.train], test, names)
            said.append(answer.scores)
            notes.update(dict.fromkeys(answer.notes))
            settings = answer.settings
        told.append(torch.cat(said))
        values = multilabel_scores(told[-1], truth, known=known)
        answers: list[list[float]] = [[] for _ in range(len(target))]
        for item, scores in zip(asked.tolist(), told[-1].tolist(), strict=True):
            answers[item] = scores
        metrics = defined({name: values[key] for key, name in called.items()})
        support = parts[0].train.tolist() if fraction is not None and len(parts) == 1 else None
        episodes.append(Episode(seed=seed, support=support, metrics=metrics, answers=answers))
    if len(draws[0]) > 1:
        settings = {**settings, **trained_on(draws[0], groups)}

    def averaged(weights: Tensor) -> dict[str, Tensor]:
        drawn = [multilabel_scores(each, truth, weights=weights, known=known) for each in told]
        return {name: torch.stack([one[key] for one in drawn]).mean(0) for key, name in called.items()}

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


def _share(values: Tensor) -> Tensor:
    """() of the known ones; a half if there are none."""
    return torch.nan_to_num(values.double().nanmean(), nan=0.5)
