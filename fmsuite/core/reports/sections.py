"""The section of a comparison: from results and exhibits to what the templates write."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fmsuite.core.evaluation.metrics import METRICS
from fmsuite.core.evaluation.multilabel import METRICS as MULTILABEL
from fmsuite.core.evaluation.regression import METRICS as REGRESSION
from fmsuite.core.evaluation.results import Results
from fmsuite.core.evaluation.retrieval import METRICS as RETRIEVED
from fmsuite.core.reports.answer import Answer, answer
from fmsuite.core.reports.blocks import (
    Album,
    EvidenceBlock,
    Figure,
    NeighbourRow,
    Repeat,
    SkippedList,
    evidence_block,
    map_figure,
    neighbour_row,
    repeat_of,
    skipped_list,
)
from fmsuite.core.reports.charts import Curve, Look, shot_curves
from fmsuite.core.reports.normalised import spread_figure, spread_tables
from fmsuite.core.reports.shares import share_figures
from fmsuite.core.reports.sources import Comparison
from fmsuite.core.reports.tables import (
    EncoderLine,
    FullTable,
    Hard,
    Judged,
    Matrix,
    ScoreTable,
    class_table,
    encoder_line,
    full_table,
    hardest,
    judged,
    matrix,
    same_setting,
    scale_note,
    score_tables,
)
from fmsuite.core.reports.wording import (
    chance_level,
    method_name,
    metric_name,
    of,
    plural,
    shots_name,
    supervision,
)


@dataclass
class ComparisonSection:
    """One folder of results."""

    key: str
    title: str
    folder: str
    kind: str
    answer: Answer
    split: str
    sideless: str
    unit: str
    interval: str
    scale: str
    tables: list[ScoreTable]
    by_class: ScoreTable | None
    full: FullTable
    metrics: list[tuple[str, str]]
    curves: list[Figure]
    shuffled_curves: bool
    normalised: list[Figure]
    normalised_tables: list[ScoreTable]
    normalisations: list[tuple[str, str]]
    matrices: list[Matrix]
    matrices_of: str
    hard: list[Hard]
    judged: list[Judged]
    encoders: list[EncoderLine]
    methods: list[tuple[str, str, str]]
    maps: list[Figure]
    neighbours: list[NeighbourRow]
    evidence: list[EvidenceBlock]
    skipped: SkippedList
    repeat: Repeat
    notes: list[str]


def comparison_section(source: Comparison, key: str, keys: Iterator[str]) -> ComparisonSection:
    """
    Args:
        key: of the section; unique on the page.
        keys: unique keys for its charts.
    """
    results, exhibits = source.results, source.exhibits
    said = answer(results)
    described = {**METRICS, **MULTILABEL, **REGRESSION, **_retrieved(results)}
    best = said.best
    marks = {encoder.name: number for number, encoder in enumerate(results.encoders)}
    same = same_setting(results, best) if best is not None else []
    album = Album(source.pictures, results.classes)
    neighbours = [neighbour_row(shown, album) for shown in exhibits.neighbours]
    evidence = [evidence_block(shown, album) for shown in exhibits.evidence]
    return ComparisonSection(
        key=key,
        title=results.title,
        folder=source.folder,
        kind=results.kind,
        answer=said,
        split=results.split,
        sideless="drawn" if results.folds is None else "asked once",
        unit=results.unit,
        interval=results.interval,
        scale=scale_note(results),
        tables=score_tables(results, marks),
        by_class=class_table(results, best) if best is not None else None,
        full=full_table(results),
        metrics=[
            (metric_name(name), described[name])
            for name in dict.fromkeys(name for e in results.evaluations for name in e.metrics)
            if name in described
        ],
        curves=[*_curves(results, marks, keys), *share_figures(results, marks, keys)],
        shuffled_curves=any(e.shuffled and e.shots is not None for e in results.evaluations),
        normalised=spread_figure(results, best.method, marks, keys) if best else [],
        normalised_tables=spread_tables(results),
        normalisations=list(results.facts.normalisations.items()),
        matrices=[matrix(e, results.classes) for e in same if e.confusion],
        matrices_of=f"{method_name(best.method)}, {supervision(best.shots, results.unit, results.folds)}"
        if best
        else "",
        hard=hardest(results, best) if best is not None else [],
        judged=judged(results),
        encoders=[encoder_line(encoder) for encoder in results.encoders],
        methods=[(method_name(name), name, sentence) for name, sentence in results.methods.items()],
        maps=[map_figure(shown, results.classes, next(keys)) for shown in exhibits.maps],
        neighbours=neighbours,
        evidence=evidence,
        skipped=skipped_list(source.skipped),
        repeat=repeat_of(results.facts),
        notes=_notes(source, album.notes),
    )


def _curves(results: Results, marks: dict[str, int], keys: Iterator[str]) -> list[Figure]:
    """For each method that was judged at several numbers of shots, a chart with a curve for each encoder."""
    metric = metric_name(results.primary)
    kinds = {encoder.name: encoder.kind for encoder in results.encoders}
    ordered = sorted((e for e in results.evaluations if e.shots), key=lambda e: e.shots or 0)
    figures = []
    for method in dict.fromkeys(e.method for e in results.evaluations):
        curves = []
        for encoder in results.encoders:
            for shuffled in (False, True):
                rows = [
                    (e.shots, of(e, results.primary))
                    for e in ordered
                    if (e.encoder, e.method, e.shuffled) == (encoder.name, method, shuffled)
                ]
                if not rows:
                    continue
                look: Look = "shuffled" if shuffled else "encoder" if kinds[encoder.name] == "encoder" else "control"
                curves.append(
                    Curve(
                        f"{encoder.name}, shuffled" if shuffled else encoder.name,
                        [float(shots or 0) for shots, _ in rows],
                        [estimate.mean for _, estimate in rows],
                        [estimate.low for _, estimate in rows],
                        [estimate.high for _, estimate in rows],
                        marks[encoder.name],
                        look,
                    )
                )
        if curves:
            svg = shot_curves(
                next(keys),
                curves,
                title=f"{metric} by number of labelled {plural(results.unit)}, {method_name(method)}",
                y_label=metric,
                x_label=f"labelled {plural(results.unit)} a class",
                chance=chance_level(results.primary, len(results.classes)),
            )
            figures.append(Figure(svg, heading=method_name(method)))
    return figures


def _retrieved(results: Results) -> dict[str, str]:
    """What ``acc@5`` and the like are."""
    names = dict.fromkeys(name for e in results.evaluations for name in e.metrics if "@" in name)
    found = {}
    for name in names:
        kind, _, k = name.partition("@")
        found[name] = RETRIEVED[f"{kind}@k"].replace("k nearest", f"{k} nearest")
    return found


def _notes(source: Comparison, more: Sequence[str]) -> list[str]:
    """The results' own notes first; a note that several evaluations share stands once, with how many share it."""
    shared: dict[str, list[str]] = {}
    for e in source.results.evaluations:
        for note in e.notes:
            who = f"{e.encoder}, {method_name(e.method)}, shots {shots_name(e.shots)}"
            shared.setdefault(note, []).append(who + (", shuffled" if e.shuffled else ""))
    evaluations = [
        f"{note} ({who[0]})" if len(who) == 1 else f"{note} ({len(who)} evaluations)" for note, who in shared.items()
    ]
    return list(dict.fromkeys([*source.results.notes, *evaluations, *source.exhibits.notes, *source.notes, *more]))
