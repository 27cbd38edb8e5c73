"""The report's tables, as plain values that the templates write."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from fmsuite.core.evaluation.metrics import BY_CLASS
from fmsuite.core.evaluation.results import EncoderFacts, Evaluation, Results
from fmsuite.core.evaluation.retrieval import RETRIEVAL
from fmsuite.core.reports.wording import (
    chance_level,
    controlled,
    decimal,
    everything,
    interval,
    listed,
    method_name,
    metric_name,
    of,
    plural,
    share,
    shots_name,
)

HARDEST = 8


@dataclass(frozen=True)
class Cell:
    """A number with its interval; ``best`` is the highest of several in its column among true labels."""

    mean: str = ""
    interval: str = ""
    best: bool = False


@dataclass(frozen=True)
class Row:
    """An encoder's numbers; ``mark`` and ``look`` tie it to its curve."""

    name: str
    cells: list[Cell]
    mark: int | None = None
    look: str = "solid"


@dataclass(frozen=True)
class ScoreTable:
    """
    Attributes:
        corner: heading of the first column.
        groups: title and rows; controls stand in groups of their own.
    """

    caption: str
    corner: str
    columns: list[str]
    groups: list[tuple[str, list[Row]]]


BESIDE = {
    "balanced_accuracy": ("auroc", "macro_f1"),
    "r2": ("mae", "rmse", "pearson"),
    "macro_auroc": ("map", "micro_map"),
}
"""Metrics that have a table of their own beside the primary one."""
RETRIEVED = ("acc@1", "acc@5", "mv@5", "map@20")
"""Of retrieval's metrics, those that have a column."""
ERRORS = ("mae", "rmse")
"""Metrics of which less is better."""
FINDING_METRICS = {"auroc": "AUROC", "map": "average precision"}

GROUPS = (
    ("Encoders", ("encoder",), False),
    ("Controls", ("untrained", "histogram", "means", "constant"), False),
    ("Controls with shuffled labels", ("encoder", "untrained", "histogram", "means"), True),
)


def score_tables(results: Results, marks: dict[str, int]) -> list[ScoreTable]:
    """The primary metric: encoders by methods for the whole training side, then for each method encoders by shots.

    Args:
        marks: colour and shape of each encoder in the curves.
    """
    metric = metric_name(results.primary)
    methods = list(dict.fromkeys(e.method for e in results.evaluations))
    whole = [
        m
        for m in methods
        if any(e.method == m and e.shots is None and results.primary in e.metrics for e in results.evaluations)
    ]
    tables = []
    if whole:
        columns: list[Column] = [(method_name(m), m, None, None, results.primary) for m in whole]
        tables.append(_table(results, f"{metric}, {everything(results.folds)}", "encoder", columns, marks))
        for other in BESIDE.get(results.primary, ()):
            columns = [(method_name(m), m, None, None, other) for m in whole]
            caption = f"{metric_name(other)}, {everything(results.folds)}"
            tables.append(_table(results, caption, "encoder", columns, marks, higher=other not in ERRORS))
        tables += _finding_tables(results, whole, marks)
    if RETRIEVAL in methods:
        there = {name for e in results.evaluations if e.method == RETRIEVAL for name in e.metrics}
        names = [name for name in RETRIEVED if name in there]
        columns = [(metric_name(name), RETRIEVAL, None, None, name) for name in names]
        tables.append(_table(results, f"retrieval, {everything(results.folds)}", "encoder", columns, marks))
    for method in methods:
        shots = sorted({e.shots for e in results.evaluations if e.method == method and e.shots is not None})
        if shots:
            caption = f"{metric}, {method_name(method)}, by labelled {plural(results.unit)} a class"
            columns = [(str(k), method, k, None, results.primary) for k in shots]
            tables.append(_table(results, caption, "encoder", columns, marks))
        shares = sorted({e.fraction for e in results.evaluations if e.method == method and e.fraction is not None})
        if shares:
            caption = f"{metric}, {method_name(method)}, by share of the training groups"
            columns = [(share(part), method, None, part, results.primary) for part in shares]
            columns.append(("100%", method, None, None, results.primary))
            tables.append(_table(results, caption, "encoder", columns, marks))
    return tables


def _finding_tables(results: Results, methods: Sequence[str], marks: dict[str, int]) -> list[ScoreTable]:
    """Each finding by the first method: areas under the curve, and average precisions."""
    if results.target != "findings":
        return []
    tables = []
    for metric in ("auroc", "map"):
        columns = [
            (name, methods[0], None, None, f"{metric}/{name}")
            for name in results.classes
            if any(f"{metric}/{name}" in e.metrics for e in results.evaluations)
        ]
        if columns:
            said = f"{method_name(methods[0])}, {everything(results.folds)}"
            caption = f"{FINDING_METRICS[metric]} of each finding, {said}"
            tables.append(_table(results, caption, "encoder", columns, marks))
    return tables


Column = tuple[str, str, int | None, float | None, str]
"""Heading, method, shots, share of the training groups, metric."""


def _table(
    results: Results,
    caption: str,
    corner: str,
    columns: Sequence[Column],
    marks: dict[str, int],
    higher: bool = True,
) -> ScoreTable:
    """
    Args:
        higher: more of the metric is better.
    """
    found = {(e.encoder, e.method, e.shots, e.fraction, e.shuffled): e for e in results.evaluations}
    tops = []
    shown = {encoder.name for encoder in results.encoders if encoder.kind != "normalised"}
    for _, method, shots, part, metric in columns:
        rest = (method, shots, part, False)
        means = [of(e, metric).mean for key, e in found.items() if key[1:] == rest and key[0] in shown]
        finite = [mean for mean in means if math.isfinite(mean)]
        tops.append((max(finite) if higher else min(finite)) if len(finite) > 1 else math.nan)
    groups = []
    for title, kinds, shuffled in GROUPS:
        rows = []
        for encoder in results.encoders:
            estimates = [
                of(found[key], metric) if (key := (encoder.name, method, shots, part, shuffled)) in found else None
                for _, method, shots, part, metric in columns
            ]
            if encoder.kind in kinds and any(estimates):
                cells = [
                    Cell()
                    if estimate is None
                    else Cell(
                        decimal(estimate.mean),
                        interval(estimate),
                        not shuffled and math.isfinite(top) and decimal(estimate.mean) == decimal(top),
                    )
                    for estimate, top in zip(estimates, tops, strict=True)
                ]
                look = "solid" if encoder.kind == "encoder" else "hollow"
                rows.append(Row(encoder.name, cells, None if shuffled else marks.get(encoder.name), look))
        if rows:
            groups.append((title, rows))
    return ScoreTable(caption[0].upper() + caption[1:], corner, [name for name, *_ in columns], groups)


@dataclass(frozen=True)
class FullRow:
    encoder: str
    method: str
    shots: str
    shuffled: bool
    episodes: int
    cells: list[tuple[str, str, str]]


@dataclass(frozen=True)
class FullTable:
    """Every evaluation: for each metric the mean, the interval and the standard deviation over episodes."""

    metrics: list[str]
    rows: list[FullRow]


def class_table(results: Results, best: Evaluation) -> ScoreTable | None:
    """Each class by the answer's evaluation."""
    rows = []
    for name in results.classes if results.target == "classes" else ():
        estimates = [best.metrics.get(f"{metric}/{name}") for metric in BY_CLASS]
        if any(estimates):
            cells = [Cell() if e is None else Cell(decimal(e.mean), interval(e)) for e in estimates]
            rows.append(Row(name, cells))
    if not rows:
        return None
    caption = f"Each class, {best.encoder}, {method_name(best.method)}, {everything(results.folds)}"
    return ScoreTable(caption, "class", [metric_name(metric) for metric in BY_CLASS], [("Encoders", rows)])


def full_table(results: Results) -> FullTable:
    """Without the metrics of single classes, of which ``class_table`` and the files tell."""
    names = list(dict.fromkeys(name for e in results.evaluations for name in e.metrics))
    if results.target == "classes":
        names = [name for name in names if "/" not in name]
    rows = []
    for e in results.evaluations:
        cells = []
        for name in names:
            estimate = of(e, name)
            deviation = "" if estimate.std is None else f"sd {decimal(estimate.std)}"
            cells.append((decimal(estimate.mean), interval(estimate), deviation))
        shots = shots_name(e.shots) if e.fraction is None else f"{share(e.fraction)} of groups"
        rows.append(FullRow(e.encoder, method_name(e.method), shots, e.shuffled, len(e.episodes), cells))
    return FullTable([metric_name(name) for name in names], rows)


@dataclass(frozen=True)
class Share:
    """A cell of a confusion matrix: ``shade`` from 0 to 1 is its share of the row."""

    count: str
    share: str
    shade: float


@dataclass(frozen=True)
class Matrix:
    caption: str
    classes: list[str]
    rows: list[list[Share]]


def matrix(evaluation: Evaluation, classes: Sequence[str]) -> Matrix:
    """A confusion matrix with shares of each row (the true class)."""
    rows = []
    for counts in evaluation.confusion:
        total = sum(counts)
        shades = [count / total if total else 0.0 for count in counts]
        rows.append([Share(f"{count:,}", share(part) if total else "–", part) for count, part in zip(counts, shades)])
    return Matrix(evaluation.encoder, list(classes), rows)


def same_setting(results: Results, best: Evaluation) -> list[Evaluation]:
    """The evaluations of every encoder with the method and shots of the best, with true labels."""
    order = {encoder.name: number for number, encoder in enumerate(results.encoders)}
    setting = (False, best.method, best.shots, best.fraction)
    varied = {encoder.name for encoder in results.encoders if encoder.kind == "normalised"}
    found = [e for e in results.evaluations if (e.shuffled, e.method, e.shots, e.fraction) == setting]
    found = [e for e in found if e.encoder not in varied]
    return sorted(found, key=lambda e: order[e.encoder])


@dataclass(frozen=True)
class Hard:
    """An item that is often wrong."""

    item: str
    group: str
    true: str
    mostly: str
    wrong: int
    asked: int


def hardest(results: Results, evaluation: Evaluation, most: int = HARDEST) -> list[Hard]:
    """The items that are wrong in most of the episodes in which they were asked, and at least once."""
    asked: Counter[int] = Counter()
    wrong: dict[int, Counter[int]] = {}
    for episode in evaluation.episodes:
        for number, predicted in enumerate(episode.predictions):
            if predicted >= 0:
                asked[number] += 1
                if predicted != results.items[number].label:
                    wrong.setdefault(number, Counter())[predicted] += 1
    order = sorted(wrong, key=lambda number: (-wrong[number].total() / asked[number], -asked[number], number))
    return [
        Hard(
            results.items[number].id,
            results.items[number].group,
            results.classes[results.items[number].label],
            results.classes[wrong[number].most_common(1)[0][0]],
            wrong[number].total(),
            asked[number],
        )
        for number in order[:most]
    ]


@dataclass(frozen=True)
class Judged:
    """Who was judged: a line for each class and side."""

    classes: str
    split: str
    items: int
    groups: int
    windows: int


def judged(results: Results) -> list[Judged]:
    lines: dict[tuple[int, str], list] = {}
    for item in results.items:
        there = [code for code, value in enumerate(item.findings) if value] or [len(results.classes)]
        for label in there if results.target == "findings" else [item.label]:
            lines.setdefault((label, item.split or ""), []).append(item)
    names = {"classes": results.classes, "number": ["all"], "findings": [*results.classes, "none known to be there"]}
    return [
        Judged(
            names[results.target][label],
            split,
            len(items),
            len({item.group for item in items}),
            sum(item.windows for item in items),
        )
        for (label, split), items in sorted(lines.items())
    ]


@dataclass
class EncoderLine:
    name: str
    kind: str
    dim: int
    pooling: str
    identity: str
    provenance: list[tuple[str, str]] = field(default_factory=list)


KINDS = {
    "encoder": "encoder",
    "untrained": "control: untrained",
    "histogram": "control: histogram",
    "means": "control: means of the channels",
    "constant": "control: one answer for all",
    "normalised": "normalised otherwise",
}


def encoder_line(facts: EncoderFacts) -> EncoderLine:
    kind = KINDS[facts.kind] + (f", of {listed(owners)}" if (owners := controlled(facts)) else "")
    if facts.variant_of:
        kind = f"{facts.variant_of}, {KINDS[facts.kind]}"
    provenance = [(str(key), str(value)) for key, value in facts.provenance.items() if value not in (None, "", [], {})]
    if facts.kind == "normalised":
        provenance = []
    return EncoderLine(facts.name, kind, facts.dim, facts.pooling or "–", facts.identity, provenance)


def scale_note(results: Results) -> str:
    """What the numbers can lie between, for the tables' foot."""
    chance = chance_level(results.primary, len(results.classes))
    name = metric_name(results.primary)
    level = "" if chance is None else f" Chance is {decimal(chance)}."
    if results.target == "number":
        level = " Always answering the mean gives 0. Errors are in the unit of the number."
    return f"{name[0].upper()}{name[1:]}: 1 is perfect.{level}"
