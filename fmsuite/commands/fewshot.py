"""``fmsuite fewshot``: slides, patients or scenes classified from a handful of examples, encoders side by side."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fmsuite.commands.cohort import Cohort, find_cohort
from fmsuite.commands.comparison import Compared, Start, leave, open_out, short_names
from fmsuite.commands.embed import STORE_NAME
from fmsuite.commands.fewshot_exhibits import Asked, Illustrator
from fmsuite.commands.group_labels import LabelColumns
from fmsuite.core.data.skipped import SkippedLog
from fmsuite.core.evaluation.classifiers import CLASSIFIERS, Classifier, find_classifier
from fmsuite.core.evaluation.episodes import Draw, allowed_shots, draws
from fmsuite.core.evaluation.fewshot import run
from fmsuite.core.evaluation.results import EncoderFacts, Evaluation, Item, Results
from fmsuite.core.evaluation.statistics import describe
from fmsuite.core.evaluation.store_bags import open_comparable
from fmsuite.core.features import FeatureStore
from fmsuite.core.reports.exhibits import Exhibits
from fmsuite.core.reports.wording import counted
from fmsuite.domains.base import Progress, no_progress
from fmsuite.errors import UsageError

DEFAULT_METHODS = ("simpleshot", "mi_simpleshot", "logistic", "knn", "abmil")
DEFAULT_SHOTS = (1, 2, 4, 8, 16, 32)
ALL = "all"
CURVE = "mi_simpleshot"
"""Whose control has every number of shots."""
KINDS: dict[str, Literal["untrained", "histogram", "means"]] = {
    "untrained": "untrained",
    "histogram": "histogram",
    "band_means": "means",
}
"""Of an encoder, by what its provenance says it is the control by."""
TOO_DEAR = frozenset({"abmil"})
"""Methods that get no control: they are trained anew in every episode."""


def fewshot(
    features: Sequence[Path],
    out: Path,
    *,
    labels: Path | None = None,
    path_column: str | None = None,
    label_column: str | None = None,
    patient_column: str | None = None,
    split_column: str | None = None,
    methods: Sequence[str] = DEFAULT_METHODS,
    shots: Sequence[int] = DEFAULT_SHOTS,
    episodes: int = 100,
    k: int = 5,
    seed: int = 0,
    shuffled: bool = True,
    evidence: int = 6,
    progress: Progress = no_progress,
    command: Sequence[str] = (),
    strict: bool = False,
) -> Compared:
    """Classify the groups of feature stores from a few labelled ones, and leave results, predictions and exhibits.

    Every store is judged by the same draws. Sides called ``train`` and ``test`` are kept to: examples come from the
    one, the whole other is asked. Without sides, examples come from all groups, and those of the patients that gave
    none are asked.

    Args:
        features: stores of one index, a folder that holds one as ``features.zarr`` included.
        out: folder of the results; earlier ones of ``fewshot`` are replaced.
        labels: a CSV whose lines name slides, patients or folders (``tiling.labels.assign_labels``); without it the
            labels in the stores' index are taken.
        path_column, label_column, patient_column, split_column: of the labels file, where they do not have their usual
            names. ``split_column="none"`` ignores sides, wherever they come from.
        methods: names in ``CLASSIFIERS``, or ``all``.
        shots: examples a class; those that the classes do not allow are left out, which the results say.
        episodes: draws for each number of shots.
        k: K of MI-SimpleShot.
        seed: of everything that is random.
        shuffled: judge with shuffled labels too: ``CURVE`` at all shots, the others (save ``TOO_DEAR``) at the most.
        evidence: slides a store to show top tiles and heatmaps of.
        strict: a label that names nothing, a slide without a label and the like is an error.

    Raises:
        UsageError: for wrong names, columns or numbers; for stores that are incomplete or cannot be compared; for
            labels that contradict each other, or a patient on both sides; if there is nothing to tell apart, or no
            number of shots is possible.
        FmsuiteError: if a store is damaged or holds a feature that is not finite.
    """
    start = Start()
    columns = LabelColumns(labels, path_column, label_column, patient_column, split_column)
    classifiers = _classifiers(methods, k)
    if episodes < 1 or evidence < 0:
        raise UsageError(f"{episodes} episodes and evidence of {evidence} cannot be had.", "Ask for 1 episode or more.")
    stores = open_comparable([_store_path(path) for path in features])
    # What is found out before the work begins goes to the folder only if there is work to do.
    found = SkippedLog(None, strict)
    cohort = find_cohort(stores, columns, found)
    plan = _plan(cohort, shots, episodes, seed, shuffled, classifiers)
    skipped = open_out(out, "fewshot", strict)
    for entry in found.entries:
        skipped.add(entry.path, entry.stage, entry.reason)

    names = _names(stores)
    facts = [_encoder_facts(store, name, stores, names) for store, name in zip(stores, names, strict=True)]
    exhibits = Exhibits()
    shown = _illustrator(stores[0], cohort, plan, classifiers, evidence, seed, exhibits)
    sizes: list[Tensor] = []
    work = _judge(stores, facts, cohort, plan, seed, sizes, shown)
    evaluations = list(progress(work, len(stores) * len(plan.jobs), "Few-shot evaluations"))
    results = Results(
        kind="fewshot",
        domain=stores[0].facts.domain,
        unit=cohort.unit,
        title=f"Few-shot classification of {cohort.unit}s",
        classes=cohort.classes,
        items=[
            Item(id=g.id, label=label, group=g.patient, split=g.split, windows=windows)
            for g, label, windows in zip(cohort.groups, cohort.labels, sizes[0].tolist(), strict=True)
        ],
        split=cohort.split_sentence(),
        encoders=facts,
        methods={name: classifier.title for name, classifier in classifiers.items()},
        interval=describe(),
        evaluations=evaluations,
        notes=[*cohort.notes, *plan.notes, *_differing_sizes(sizes, names, cohort.unit)],
        facts=start.facts(
            command, seed, stores[0].facts.index_hash, _inputs(stores, labels), _normalisations(stores, names)
        ),
    )
    return leave(out, results, exhibits, skipped)


@dataclass(frozen=True)
class _Job:
    """One evaluation of each encoder."""

    method: str
    classifier: Classifier
    shots: int
    draws: list[Draw]


@dataclass(frozen=True)
class _Plan:
    """
    Attributes:
        most: the largest number of shots that the classes allow.
        first: the first episode with so many.
        jobs: in the order of the results.
        notes: shots that were left out.
    """

    most: int
    first: Draw
    jobs: list[_Job]
    notes: list[str]


def _store_path(path: Path) -> Path:
    """A folder that ``fmsuite embed`` was given as ``--out`` holds the store."""
    return path / STORE_NAME if path.suffix != ".zarr" and (path / STORE_NAME).is_dir() else path


def _classifiers(methods: Sequence[str], k: int) -> dict[str, Classifier]:
    wanted = list(CLASSIFIERS) if ALL in methods else list(dict.fromkeys(methods))
    if not wanted:
        raise UsageError("No few-shot method was named.", f"Known: {', '.join(CLASSIFIERS)}; {ALL} takes them all.")
    return {name: find_classifier(name, **({"k": k} if name == CURVE else {})) for name in wanted}


def _plan(
    cohort: Cohort, shots: Sequence[int], episodes: int, seed: int, shuffled: bool, classifiers: dict[str, Classifier]
) -> _Plan:
    bags, sides = cohort.without_vectors(), (cohort.train, cohort.test)
    allowed, notes = allowed_shots(bags, shots, *sides, names=cohort.classes, unit=cohort.unit)
    true: dict[int, list[Draw]] = {}
    for count in allowed:
        try:
            true[count] = draws(bags, count, episodes, seed, *sides, names=cohort.classes)
        except UsageError as error:
            if not true:
                raise
            notes.append(f"Shots {count} were left out: {error.message}")
    for count, drawn in true.items():
        if len(drawn) > 1 and len({frozenset(draw.support.tolist()) for draw in drawn}) == 1:
            notes.append(
                f"At {count} shots the examples are the same in every episode, all that the classes have; what still "
                "differs is what a method draws itself."
            )
    most = max(true)
    controls: dict[int, list[Draw]] = {}
    for count in (true if CURVE in classifiers else [most]) if shuffled else ():
        try:
            controls[count] = draws(bags, count, episodes, seed, *sides, shuffled=True, names=cohort.classes)
        except UsageError as error:
            notes.append(f"There is no control with shuffled labels at {count} shots: {error.message}")
    jobs = []
    for name, classifier in classifiers.items():
        jobs += [_Job(name, classifier, count, drawn) for count, drawn in true.items()]
        if name not in TOO_DEAR:
            own = [count for count in controls if name == CURVE or count == most]
            jobs += [_Job(name, classifier, count, controls[count]) for count in own]
    return _Plan(most, true[most][0], jobs, notes)


def _judge(
    stores: Sequence[FeatureStore],
    facts: Sequence[EncoderFacts],
    cohort: Cohort,
    plan: _Plan,
    seed: int,
    sizes: list[Tensor],
    shown: Illustrator,
) -> Iterator[Evaluation]:
    """Store after store, so that the features of one are in memory at a time; ``sizes`` gets those of its bags."""
    for store, encoder in zip(stores, facts, strict=True):
        stored = cohort.of(store)
        sizes.append(stored.bags.sizes)
        for job in plan.jobs:
            yield run(
                stored.bags,
                job.method,
                job.draws,
                encoder=encoder.name,
                shots=job.shots,
                seed=seed,
                classifier=job.classifier,
                names=cohort.classes,
                unit=cohort.unit,
            )
        shown.show(stored, encoder)


def _illustrator(
    store: FeatureStore,
    cohort: Cohort,
    plan: _Plan,
    classifiers: dict[str, Classifier],
    evidence: int,
    seed: int,
    exhibits: Exhibits,
) -> Illustrator:
    asked = torch.ones(len(cohort.groups), dtype=torch.bool)
    if cohort.test is not None:
        asked[:] = False
        asked[cohort.test] = True
    k = int(classifiers[CURVE].settings["k"]) if CURVE in classifiers else None
    who = Asked([group.id for group in cohort.groups], cohort.classes, asked, cohort.unit, plan.first, plan.most, k)
    return Illustrator(store, who, evidence, seed, exhibits)


def _names(stores: Sequence[FeatureStore]) -> list[str]:
    """The encoders' names; stores of one encoder are called by their own."""
    counts = Counter(store.facts.name for store in stores)
    return short_names([store.facts.name if counts[store.facts.name] == 1 else store.path for store in stores])


def _encoder_facts(
    store: FeatureStore, name: str, stores: Sequence[FeatureStore], names: Sequence[str]
) -> EncoderFacts:
    facts = store.facts
    control, of = facts.provenance.get("control"), facts.provenance.get("of")
    owner = next((n for s, n in zip(stores, names, strict=True) if control and s.facts.identity == of), None)
    return EncoderFacts(
        name=name,
        kind=KINDS.get(str(control), "encoder"),
        identity=facts.identity,
        dim=facts.dim,
        pooling=facts.pooling,
        provenance=facts.provenance,
        control_of=owner,
    )


def _normalisations(stores: Sequence[FeatureStore], names: Sequence[str]) -> dict[str, str]:
    """As the stores have it."""
    unknown = "Not known: the store was made by a version that did not keep it."
    return {name: store.facts.normalisation or unknown for store, name in zip(stores, names, strict=True)}


def _differing_sizes(sizes: Sequence[Tensor], names: Sequence[str], unit: str) -> list[str]:
    """Notes on encoders that were given other windows than the first, because some could not be read."""
    notes = []
    for size, name in zip(sizes[1:], names[1:], strict=True):
        count = int((size != sizes[0]).sum())
        if count:
            notes.append(f"{name} has features of more or fewer windows than {names[0]} in {counted(count, unit)}.")
    return notes


def _inputs(stores: Sequence[FeatureStore], labels: Path | None) -> dict[str, str]:
    found = {str(store.path): store.facts.identity for store in stores}
    if labels is not None:
        found[str(labels)] = hashlib.sha256(labels.expanduser().read_bytes()).hexdigest()[:16]
    return found
