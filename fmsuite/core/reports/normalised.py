"""How much scores depend on how raw values are normalised: a chart, a table for each encoder, a sentence."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fmsuite.core.evaluation.normalisations import NORMALISATIONS, TRAINED
from fmsuite.core.evaluation.results import EncoderFacts, Estimate, Evaluation, Results
from fmsuite.core.reports.blocks import Figure
from fmsuite.core.reports.charts import Dots, dot_rows, swatch
from fmsuite.core.reports.tables import ERRORS, Cell, Row, ScoreTable
from fmsuite.core.reports.wording import chance_level, decimal, everything, interval, method_name, metric_name, of


@dataclass(frozen=True)
class Spread:
    """One encoder by one method under every normalisation.

    Attributes:
        scores: by name of the normalisation, as trained first.
    """

    encoder: str
    method: str
    scores: dict[str, Estimate]

    @property
    def highest(self) -> str:
        return max(self.scores, key=lambda name: self.scores[name].mean)

    @property
    def lowest(self) -> str:
        return min(self.scores, key=lambda name: self.scores[name].mean)

    @property
    def width(self) -> float:
        return self.scores[self.highest].mean - self.scores[self.lowest].mean


def spread(results: Results, encoder: str, method: str) -> Spread | None:
    """``None`` where the encoder was judged under one normalisation only."""
    variants = {e.name: e.normalisation for e in results.encoders if e.variant_of == encoder and e.normalisation}
    whole = {e.encoder: of(e, results.primary) for e in results.evaluations if _usual(e) and e.method == method}
    found = {TRAINED: whole[encoder]} if encoder in whole else {}
    found |= {key: whole[name] for name, key in variants.items() if name in whole}
    found = {name: estimate for name, estimate in found.items() if math.isfinite(estimate.mean)}
    return Spread(encoder, method, found) if len(found) > 1 and TRAINED in found else None


def spread_sentences(results: Results, best: Evaluation) -> list[str]:
    """On the encoder that the answer is about, and on encoders whose order is another under a normalisation."""
    if not any(e.kind == "normalised" for e in results.encoders):
        return []
    mine = spread(results, best.encoder, best.method)
    if mine is None:
        return []
    lower = results.primary in ERRORS
    ends = (mine.lowest, mine.highest)
    as_trained = f"; as trained it is {decimal(mine.scores[TRAINED].mean)}" if TRAINED not in ends else ""
    said = [
        f"Its score depends on the normalisation: from {decimal(mine.scores[mine.lowest].mean)} "
        f"({_title(mine.lowest)}) to {decimal(mine.scores[mine.highest].mean)} ({_title(mine.highest)}), a spread of "
        f"{decimal(mine.width)}{as_trained} ({method_name(best.method)})."
    ]
    others = [spread(results, e.name, best.method) for e in _judged(results) if e.name != best.encoder]
    changed = []
    for name in mine.scores:
        ahead = [
            other.encoder
            for other in others
            if other is not None
            and name in other.scores
            and (
                other.scores[name].mean < mine.scores[name].mean
                if lower
                else other.scores[name].mean > mine.scores[name].mean
            )
        ]
        if ahead and name != TRAINED:
            changed.append(f"{_title(name)} ({', '.join(ahead)})")
    if changed:
        said.append(f"Other encoders are ahead of it under: {'; '.join(changed)}.")
    return said


def spread_figure(results: Results, method: str, marks: dict[str, int], keys: Iterator[str]) -> list[Figure]:
    """One chart: a line for each normalisation, a mark with its interval for each encoder; ``method`` is the answer's.

    Args:
        marks: colour and shape of each encoder.
        keys: unique ones, for the chart.
    """
    spreads = [found for e in _judged(results) if (found := spread(results, e.name, method)) is not None]
    if not spreads:
        return []
    names = [name for name in NORMALISATIONS if any(name in each.scores for each in spreads)]
    dots = [Dots(each.encoder, marks[each.encoder], [each.scores.get(name) for name in names]) for each in spreads]
    metric = metric_name(results.primary)
    svg = dot_rows(
        next(keys),
        [_title(name) for name in names],
        dots,
        title=f"{metric} by normalisation, {method_name(method)}",
        x_label=metric,
        chance=chance_level(results.primary, len(results.classes)),
    )
    legend = [(swatch(marks[each.encoder]), f"{each.encoder}: spread {decimal(each.width)}") for each in spreads]
    return [Figure(svg, f"{method_name(method)}, {everything(results.folds)}.", legend)]


def spread_tables(results: Results) -> list[ScoreTable]:
    """For each encoder, normalisations by methods, and how far the highest is from the lowest."""
    metric = metric_name(results.primary)
    tables = []
    for encoder in _judged(results):
        methods = dict.fromkeys(e.method for e in results.evaluations if _usual(e) and e.encoder == encoder.name)
        spreads = {m: found for m in methods if (found := spread(results, encoder.name, m)) is not None}
        if not spreads:
            continue
        lower = results.primary in ERRORS
        rows = []
        for name in NORMALISATIONS:
            if not any(name in each.scores for each in spreads.values()):
                continue
            cells = []
            for each in spreads.values():
                estimate = each.scores.get(name)
                best = each.lowest if lower else each.highest
                cells.append(
                    Cell() if estimate is None else Cell(decimal(estimate.mean), interval(estimate), name == best)
                )
            rows.append(Row(_title(name), cells))
        last = Row("highest less lowest", [Cell(decimal(each.width)) for each in spreads.values()])
        caption = f"{metric} of {encoder.name} by normalisation, {everything(results.folds)}"
        tables.append(
            ScoreTable(
                caption[0].upper() + caption[1:],
                "normalisation",
                [method_name(m) for m in spreads],
                [("Encoders", rows), ("Spread", [last])],
            )
        )
    return tables


def _usual(evaluation: Evaluation) -> bool:
    return not evaluation.shuffled and evaluation.shots is None and evaluation.fraction is None


def _judged(results: Results) -> Sequence[EncoderFacts]:
    return [encoder for encoder in results.encoders if encoder.kind == "encoder"]


def _title(name: str) -> str:
    return NORMALISATIONS[name].title if name in NORMALISATIONS else name
