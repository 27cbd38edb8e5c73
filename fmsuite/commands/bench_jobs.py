"""What ``bench`` judges: every encoder and control by every task, with all labels and with few."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fmsuite.commands.contenders import Contender
from fmsuite.commands.labelled_windows import LabelledWindows
from fmsuite.commands.target_items import TargetItems
from fmsuite.core.evaluation.bags import Bags
from fmsuite.core.evaluation.classifiers import find_classifier
from fmsuite.core.evaluation.episodes import allowed_shots, draws
from fmsuite.core.evaluation.fewshot import run
from fmsuite.core.evaluation.findings import FINDINGS_TASKS, judge_findings
from fmsuite.core.evaluation.folds import Folds
from fmsuite.core.evaluation.numbers import CONSTANT, NUMBER_TASKS, judge_numbers
from fmsuite.core.evaluation.results import EncoderFacts, Evaluation
from fmsuite.core.evaluation.retrieval import PRIMARY as FIRST_RETRIEVED
from fmsuite.core.evaluation.retrieval import RETRIEVAL, judge_retrieval
from fmsuite.core.evaluation.retrieval import TITLE as RETRIEVAL_TITLE
from fmsuite.core.evaluation.splits import Split
from fmsuite.core.evaluation.tiles import TASKS, judge
from fmsuite.core.features import FeatureStore
from fmsuite.core.seeding import derive

FEWSHOT = "fewshot"
FEWSHOT_METHOD = "simpleshot"
SHUFFLED_TASKS = ("knn", "linear_sklearn")
"""Tasks that every encoder is also given with shuffled labels."""
LINEAR_TASKS = ("linear_torch", "linear_sklearn", "linear")
"""Tasks whose answer depends on the scale of the features."""
FEW_LABELS = ("linear_sklearn", "linear", "ridge")
"""Tasks that are also given shares of the training groups: 20 neighbours of few would be all of them."""
MOST_CLASSES = 50
"""Of so many, each has figures of its own."""
MEAN = EncoderFacts(name="mean of the training side", kind="constant", identity="mean", dim=0)


@dataclass(frozen=True)
class Job:
    """One evaluation. ``shots`` are those of few-shot draws, ``fraction`` a share of the training groups; ``None`` for
    the whole training side."""

    contender: Contender
    store: FeatureStore
    method: str
    shots: int | None = None
    shuffled: bool = False
    fraction: float | None = None

    @property
    def alone(self) -> bool:
        """By all labels as they are: such a job's classes are looked at one by one."""
        return self.shots is None and self.fraction is None and not self.shuffled


def bags_of(windows: LabelledWindows, features: Tensor) -> Bags:
    return Bags.of_single(features, windows.labels, windows.groups, len(windows.classes))


def shots_of(windows: LabelledWindows, shots: Sequence[int]) -> tuple[list[int], list[str]]:
    """What the classes allow: known before anything is embedded."""
    bags = bags_of(windows, torch.zeros(len(windows), 1))
    return allowed_shots(bags, shots, *few_sides(windows.split), names=windows.classes, unit=windows.unit)


def standardised(features: Tensor, learned: Tensor) -> Tensor:
    """(I, D) minus the mean over the items that are learned from, divided by their standard deviation: channels in
    different units (reflectance, decibels) count alike, and penalties and distances see them."""
    values = features[learned].double()
    mean, std = values.mean(0), values.std(0, correction=0)
    std = torch.where(std > 1e-9 * values.abs().amax(0), std, 1.0)
    return ((features.double() - mean) / std).float()


def few_sides(split: Split | Folds) -> tuple[Tensor | None, Tensor | None]:
    """Who few-shot draws may show and ask: beside folds, every draw asks the groups that gave it no example."""
    return (None, None) if isinstance(split, Folds) else (split.train, split.test)


def class_jobs(
    found: Sequence[Contender],
    stores: Sequence[FeatureStore],
    tasks: Sequence[str],
    shots: Sequence[int],
    controls: bool,
    fractions: Sequence[float] = (),
) -> Iterator[Job]:
    for contender, store in zip(found, stores, strict=True):
        varied = contender.kind == "normalised"
        for task in (name for name in TASKS if name in tasks):
            yield Job(contender, store, task)
            if controls and contender.kind == "encoder" and task in SHUFFLED_TASKS:
                yield Job(contender, store, task, shuffled=True)
            if task in FEW_LABELS and not varied:
                yield from (Job(contender, store, task, fraction=share) for share in fractions)
        if RETRIEVAL in tasks:
            yield Job(contender, store, RETRIEVAL)
        for number in () if varied else shots:
            yield Job(contender, store, FEWSHOT_METHOD, number)


def target_jobs(
    found: Sequence[Contender], stores: Sequence[FeatureStore], tasks: Sequence[str], fractions: Sequence[float]
) -> Iterator[Job]:
    """Of a number or of findings."""
    for contender, store in zip(found, stores, strict=True):
        for task in tasks:
            yield Job(contender, store, task)
            if task in FEW_LABELS and contender.kind != "normalised":
                yield from (Job(contender, store, task, fraction=share) for share in fractions)


def judged(
    jobs: Iterable[Job],
    windows: LabelledWindows,
    episodes: int,
    seed: int,
    keep: bool,
    shares: Mapping[float, Sequence[Sequence[Split]]] | None = None,
) -> Iterator[Evaluation]:
    """
    Args:
        keep: predictions of few-shot draws.
        shares: by share of the training groups, for each draw the sides of each fold.
    """
    split, classes = windows.split, len(windows.classes)
    features, owner = torch.empty(0), None
    for job in jobs:
        name = job.contender.name
        if owner is not job.store:
            features, owner = windows.features(job.store), job.store
            if job.contender.kind == "means":
                features = standardised(features, split.train)
        rescale = job.contender.kind == "histogram" and job.method in LINEAR_TASKS
        drawn = [split.parts] if job.fraction is None or shares is None else shares[job.fraction]
        if isinstance(windows, TargetItems) and windows.kind != "classes":
            yield _judged_target(job, windows, features, drawn, seed, rescale)
            continue
        if job.method == RETRIEVAL:
            yield judge_retrieval(features, windows.labels, windows.groups, split, classes, encoder=name, seed=seed)
            continue
        if job.shots is None:
            yield judge(
                job.method,
                features,
                windows.labels,
                windows.groups,
                split,
                classes,
                encoder=name,
                seed=seed,
                shuffled=job.shuffled,
                rescale=rescale,
                share=job.fraction,
                shown=drawn,
                names=windows.classes if job.alone and classes <= MOST_CLASSES else (),
            )
            continue
        bags = bags_of(windows, features)
        supports = draws(bags, job.shots, episodes, seed, *few_sides(split), names=windows.classes)
        own = derive(seed, "bootstrap")
        evaluation = run(
            bags,
            job.method,
            supports,
            encoder=name,
            shots=job.shots,
            seed=own,
            names=windows.classes,
            unit=windows.unit,
        )
        if not keep:
            for episode in evaluation.episodes:
                episode.predictions = []
        yield evaluation


def _judged_target(
    job: Job, items: TargetItems, features: Tensor, draws: Sequence[Sequence[Split]], seed: int, rescale: bool
) -> Evaluation:
    if items.kind == "number":
        return judge_numbers(
            job.method,
            features,
            items.labels,
            items.groups,
            draws,
            encoder=job.contender.name,
            seed=seed,
            fraction=job.fraction,
        )
    return judge_findings(
        job.method,
        features,
        items.labels,
        items.classes,
        items.groups,
        draws,
        encoder=job.contender.name,
        seed=seed,
        fraction=job.fraction,
        rescale=rescale,
    )


def mean_control(items: TargetItems, seed: int) -> Evaluation:
    """The mean of the training side as an answer for everyone."""
    nothing = torch.zeros(len(items), 1)
    return judge_numbers(
        CONSTANT, nothing, items.labels, items.groups, [items.split.parts], encoder=MEAN.name, seed=seed
    )


def primary_of_classes(evaluations: Sequence[Evaluation]) -> str:
    """The metric that answers the question; where nothing but retrieval was asked for, one of it."""
    only = all(evaluation.method == RETRIEVAL for evaluation in evaluations)
    return FIRST_RETRIEVED if evaluations and only else "balanced_accuracy"


def title(method: str, kind: str = "classes") -> str:
    """One sentence on a method."""
    if kind == "number":
        return NUMBER_TASKS[method].title
    if kind == "findings":
        return FINDINGS_TASKS[method].title
    if method == RETRIEVAL:
        return RETRIEVAL_TITLE
    return TASKS[method].title if method in TASKS else find_classifier(method).title
