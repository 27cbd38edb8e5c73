"""The tables of fine-tuning: arms by share of the labels, with intervals and paired differences to the control."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fmsuite.core.evaluation.cases import OVERALL, Cell, FinetuneResults
from fmsuite.core.evaluation.results import Estimate
from fmsuite.core.reports.charts import Look
from fmsuite.core.reports.tuned_wording import better, between, label_name, labelled, scored, signed
from fmsuite.core.reports.wording import plural

DIFFERENCE = "less scratch"


@dataclass(frozen=True)
class Number:
    """A cell of a table.

    Attributes:
        verdict: of a difference, whether it is for the better; ``None`` where that is open, or it is none.
    """

    mean: str
    interval: str = ""
    deviation: str = ""
    best: bool = False
    verdict: bool | None = None


@dataclass(frozen=True)
class ArmRow:
    name: str
    mark: int
    look: Look
    cells: list[Number]


@dataclass(frozen=True)
class TunedTable:
    """Rows are arms, in a group for each fraction of the labels."""

    caption: str
    about: str
    columns: list[str]
    groups: list[tuple[str, list[ArmRow]]]


def labels_of(results: FinetuneResults, metric: str) -> list[str]:
    """``OVERALL`` first, and those labels that the metric has values for."""
    found = {label for cell in results.cells for label in cell.scores.get(metric, {})}
    return [label for label in (OVERALL, *results.labels) if label in found]


def score_table(results: FinetuneResults, name: str, looks: dict[str, tuple[int, Look]]) -> TunedTable:
    """Every arm at every fraction: the mean over labels, its paired difference to the control, and each label."""
    metric, labels = results.metrics[name], labels_of(results, name)
    alone = len(labels) == 1
    against = any(OVERALL in cell.differences.get(name, {}) for cell in results.cells)
    columns = [label_name(label, metric, alone) for label in labels]
    if against:
        columns.insert(1, DIFFERENCE)
    groups = []
    for fraction in sorted(results.fractions, reverse=True):
        cells = _cells_at(results, fraction, name)
        tops = [_top([cell.scores[name].get(label) for cell in cells], metric.higher) for label in labels]
        rows = []
        for cell in cells:
            found = [cell.scores[name].get(label) for label in labels]
            numbers = [_number(results, name, estimate, top) for estimate, top in zip(found, tops, strict=True)]
            if against:
                numbers.insert(1, _difference(results, name, cell.differences.get(name, {}).get(OVERALL)))
            rows.append(ArmRow(cell.arm, *looks[cell.arm], numbers))
        if rows:
            groups.append((_group_title(results, fraction, cells), rows))
    unit = f", {metric.unit}" if metric.unit else ""
    about = f"{metric.title}; {'higher' if metric.higher else 'lower'} is better."
    if any(cell.deviation for _, rows in groups for row in rows for cell in row.cells):
        about += " sd: standard deviation over seeds."
    return TunedTable(f"{metric.short}{unit}", about, columns, groups)


def difference_table(results: FinetuneResults, name: str, looks: dict[str, tuple[int, Look]]) -> TunedTable | None:
    """Paired differences to the control of every label; ``None`` where there is but one column, which the scores have
    already."""
    metric, labels = results.metrics[name], labels_of(results, name)
    if len(labels) < 2:
        return None
    groups = []
    for fraction in sorted(results.fractions, reverse=True):
        cells = [cell for cell in _cells_at(results, fraction, name) if cell.differences.get(name)]
        rows = [
            ArmRow(
                cell.arm,
                *looks[cell.arm],
                [_difference(results, name, cell.differences[name].get(label)) for label in labels],
            )
            for cell in cells
        ]
        if rows:
            groups.append((_group_title(results, fraction, cells), rows))
    unit = f", {metric.unit}" if metric.unit else ""
    caption = f"{metric.short}{unit}: difference to the network from scratch"
    return TunedTable(caption, f"{metric.title}.", [label_name(label, metric, False) for label in labels], groups)


def _cells_at(results: FinetuneResults, fraction: float, metric: str) -> list[Cell]:
    """In the order of the arms, the control last."""
    found = [results.cell(arm.name, fraction) for arm in sorted(results.arms, key=lambda arm: arm.control)]
    return [cell for cell in found if cell is not None and metric in cell.scores]


def _group_title(results: FinetuneResults, fraction: float, cells: Sequence[Cell]) -> str:
    groups = (min(cell.groups[0] for cell in cells), max(cell.groups[1] for cell in cells))
    title = labelled(results, fraction, groups)
    judged = {cell.cases for cell in cells}
    count = f"{min(judged):,}" if len(judged) == 1 else f"{min(judged):,}–{max(judged):,}"
    return f"Trained on {title}; {count} {plural(results.unit)} judged"


def _top(estimates: Sequence[Estimate | None], higher: bool) -> float:
    """The best value; not a number where all are the same, and none is best."""
    values = {estimate.mean for estimate in estimates if estimate is not None and math.isfinite(estimate.mean)}
    return math.nan if len(values) < 2 else max(values) if higher else min(values)


def _number(results: FinetuneResults, name: str, estimate: Estimate | None, top: float) -> Number:
    metric = results.metrics[name]
    if estimate is None or not math.isfinite(estimate.mean):
        return Number("")
    deviation = "" if estimate.std is None else f"sd {scored(estimate.std, metric)}"
    return Number(scored(estimate.mean, metric), between(estimate, metric), deviation, estimate.mean == top)


def _difference(results: FinetuneResults, name: str, estimate: Estimate | None) -> Number:
    metric = results.metrics[name]
    if estimate is None or not math.isfinite(estimate.mean):
        return Number("")
    bounds = between(estimate, metric, signed=True)
    return Number(signed(estimate.mean, metric), bounds, verdict=better(estimate, metric))
