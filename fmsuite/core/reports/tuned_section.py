"""The section of fine-tuning: from its results to what the template writes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fmsuite.core.evaluation.cases import OVERALL, Cell, FinetuneResults
from fmsuite.core.reports.answer import Answer
from fmsuite.core.reports.blocks import Figure, Repeat, SkippedList, repeat_of, skipped_list
from fmsuite.core.reports.charts import Curve, Look, shot_curves
from fmsuite.core.reports.strips import Strip, strips
from fmsuite.core.reports.tuned import Tuned, case_values
from fmsuite.core.reports.tuned_answer import best_cell, tuned_answer
from fmsuite.core.reports.tuned_tables import TunedTable, difference_table, labels_of, score_table
from fmsuite.core.reports.tuned_wording import label_name, labelled, percent, scored
from fmsuite.core.reports.volume_panels import CasePanel, draw_case
from fmsuite.core.reports.wording import plural
from fmsuite.core.training.progress import format_seconds

MOST_CHARTS = 9
HARDEST = 8
RANKS = ("best", "median", "worst")


@dataclass(frozen=True)
class ArmLine:
    name: str
    title: str
    mark: int
    look: Look
    trained: str
    runs: int
    steps: str
    took: str


@dataclass
class TunedSection:
    """One folder of ``finetune``."""

    key: str
    title: str
    folder: str
    answer: Answer
    facts: list[tuple[str, str]]
    split: str
    interval: str
    tables: list[TunedTable]
    more: list[TunedTable]
    curves: list[Figure]
    strips: list[Figure]
    strips_of: str
    panels: list[tuple[str, list[CasePanel]]]
    hard: list[tuple[str, str, list[str]]]
    hard_of: str
    labels: list[str]
    unit: str
    group_unit: str
    arms: list[ArmLine]
    normalisations: list[tuple[str, str]]
    skipped: SkippedList
    repeat: Repeat
    notes: list[str]


def tuned_section(source: Tuned, key: str, keys: Iterator[str]) -> TunedSection:
    """
    Args:
        key: of the section; unique on the page.
        keys: unique keys for its charts and pictures.
    """
    results = source.results
    looks = {arm.name: (number, _look(arm.control)) for number, arm in enumerate(results.arms)}
    best = best_cell(results)
    others = [name for name in results.metrics if name != results.primary]
    primary = score_table(results, results.primary, looks)
    more = [score_table(results, name, looks) for name in others]
    differences = [difference_table(results, name, looks) for name in (results.primary, *others)]
    unit, group = results.unit, results.group_unit
    return TunedSection(
        key=key,
        title=results.title,
        folder=source.folder,
        answer=tuned_answer(results),
        facts=[
            ("encoder", results.encoder),
            ("task", results.task),
            (
                plural(unit),
                f"{len(results.cases):,} of {len({case.group for case in results.cases}):,} {plural(group)}",
            ),
        ],
        split=results.split,
        interval=results.interval,
        tables=[primary],
        more=[table for table in (*more, *differences) if table is not None and table.groups],
        curves=_curves(results, looks, keys),
        strips=[] if best is None else _strips(results, best.fraction, looks, keys),
        strips_of="" if best is None else labelled(results, best.fraction, best.groups),
        panels=_panels(source, keys),
        hard=[] if best is None else _hardest(results, best),
        hard_of="" if best is None else best.arm,
        labels=results.labels,
        unit=unit,
        group_unit=group,
        arms=[_arm_line(results, name, *looks[name]) for name in looks],
        normalisations=list(results.facts.normalisations.items()),
        skipped=skipped_list(source.skipped),
        repeat=repeat_of(results.facts),
        notes=[*results.notes, *source.notes],
    )


def _look(control: bool) -> Look:
    return "control" if control else "encoder"


def _curves(results: FinetuneResults, looks: dict[str, tuple[int, Look]], keys: Iterator[str]) -> list[Figure]:
    """The primary metric against the share of labelled groups: overall and by label."""
    metric = results.metrics[results.primary]
    if len({cell.fraction for cell in results.cells}) < 2:
        return []
    labels = labels_of(results, results.primary)
    unit = f", {metric.unit}" if metric.unit else ""
    figures = []
    for label in labels[:MOST_CHARTS]:
        curves = []
        for arm in results.arms:
            cells = [(fraction, results.cell(arm.name, fraction)) for fraction in sorted(results.fractions)]
            points = [
                (fraction, cell.scores[results.primary][label])
                for fraction, cell in cells
                if cell is not None and label in cell.scores[results.primary]
            ]
            if points:
                x, estimates = zip(*points, strict=True)
                curves.append(
                    Curve(
                        arm.name,
                        x,
                        [estimate.mean for estimate in estimates],
                        [estimate.low for estimate in estimates],
                        [estimate.high for estimate in estimates],
                        *looks[arm.name],
                    )
                )
        heading = label_name(label, metric, len(labels) == 1)
        svg = shot_curves(
            next(keys),
            curves,
            title=f"{metric.short} by share of labelled {plural(results.group_unit)}, {heading}",
            y_label=f"{metric.short}{unit}",
            x_label=f"share of the labelled {plural(results.group_unit)}",
            written=percent,
        )
        figures.append(Figure(svg, heading=heading))
    return figures


def _strips(
    results: FinetuneResults, fraction: float, looks: dict[str, tuple[int, Look]], keys: Iterator[str]
) -> list[Figure]:
    """The primary metric of every case at a fraction: overall and by label."""
    metric = results.metrics[results.primary]
    places: list[int | None] = [None, *range(len(results.labels))] if len(results.labels) > 1 else [None]
    unit = f", {metric.unit}" if metric.unit else ""
    figures = []
    for place in places[:MOST_CHARTS]:
        rows = []
        for arm in sorted(results.arms, key=lambda arm: arm.control):
            runs = [run for run in results.runs if (run.arm, run.fraction) == (arm.name, fraction)]
            values = case_values(runs, results.primary, place)
            if values:
                names = [results.cases[number].id for number in values]
                rows.append(Strip(arm.name, list(values.values()), names, *looks[arm.name]))
        if rows:
            heading = label_name(OVERALL if place is None else results.labels[place], metric, len(places) == 1)
            title = f"{metric.short} of each {results.unit}, {heading}"
            figures.append(
                Figure(strips(next(keys), rows, title=title, x_label=f"{metric.short}{unit}"), heading=heading)
            )
    return figures


def _panels(source: Tuned, keys: Iterator[str]) -> list[tuple[str, list[CasePanel]]]:
    """By arm and fraction: best, median and worst case."""
    results = source.results
    metric = results.metrics[results.primary]
    names = ["background", *results.labels]
    unit = f" {metric.unit}" if metric.unit else ""
    by_place: dict[tuple[str, float], list[CasePanel]] = {}
    for panel in sorted(results.panels, key=lambda panel: RANKS.index(panel.rank)):
        if panel.file not in source.slices:
            continue
        case = results.cases[panel.case].id
        caption = f"{panel.rank.capitalize()}: {case}, {metric.short} {scored(panel.value, metric)}{unit}"
        drawn = draw_case(
            source.slices[panel.file], names, key=next(keys), caption=caption, orientation=source.orientation
        )
        by_place.setdefault((panel.arm, panel.fraction), []).append(drawn)
    order = [arm.name for arm in results.arms]
    places = sorted(by_place, key=lambda place: (-place[1], order.index(place[0])))
    several = len({fraction for _, fraction in places}) > 1 or any(fraction < 1 for _, fraction in places)
    return [
        (f"{arm}, {percent(share)} of the {plural(results.group_unit)}" if several else arm, by_place[arm, share])
        for arm, share in places
    ]


def _hardest(results: FinetuneResults, best: Cell) -> list[tuple[str, str, list[str]]]:
    """The cases on which the best arm does worst: case, group, and the metric overall and for each label."""
    metric = results.metrics[results.primary]
    runs = [run for run in results.runs if (run.arm, run.fraction) == (best.arm, best.fraction)]
    overall = case_values(runs, results.primary, None)
    columns = [overall, *(case_values(runs, results.primary, place) for place in range(len(results.labels)))]
    if len(results.labels) < 2:
        columns = columns[:1]
    order = sorted(overall, key=lambda number: overall[number] if metric.higher else -overall[number])
    return [
        (
            results.cases[number].id,
            results.cases[number].group,
            [scored(column[number], metric) if number in column else "–" for column in columns],
        )
        for number in order[:HARDEST]
    ]


def _arm_line(results: FinetuneResults, name: str, mark: int, look: Look) -> ArmLine:
    arm = next(arm for arm in results.arms if arm.name == name)
    runs = [run for run in results.runs if run.arm == name]
    steps = sorted({run.steps for run in runs})
    shown = "" if not steps else f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,}–{steps[-1]:,}"
    trained = f"{arm.trained:,} of {arm.parameters:,} ({percent(arm.trained / max(arm.parameters, 1))})"
    took = format_seconds(sum(run.seconds for run in runs))
    return ArmLine(name, arm.title, mark, look, trained, len(runs), shown, took)
