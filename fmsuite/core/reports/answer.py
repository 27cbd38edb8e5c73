"""What results say, in sentences: who is best, by how much beyond the controls, and how far that can be trusted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from fmsuite.core.evaluation.paired import paired_difference
from fmsuite.core.evaluation.results import EncoderFacts, Estimate, Evaluation, Results
from fmsuite.core.reports.normalised import spread_sentences
from fmsuite.core.reports.wording import (
    chance_level,
    controlled,
    decimal,
    estimated,
    listed,
    method_name,
    metric_name,
    of,
    plural,
    supervision,
)

EQUAL = 0.0005
"""Differences below this vanish in three decimals."""
NEAR_CHANCE = 0.05
"""How far from chance a shuffled control without an interval may lie."""

_ROUNDING = 1e-9

Relation = Literal["overlap", "apart", "unknown"]


@dataclass(frozen=True)
class Finding:
    """One line of support: a fact that strengthens the answer, weakens it, or leaves it open."""

    kind: Literal["good", "bad", "open"]
    text: str


@dataclass(frozen=True)
class Answer:
    """
    Attributes:
        headline: the answer, in one sentence.
        support: the next sentences: intervals, the next encoder, shuffled labels.
        findings: each comparison on a line of its own.
        best: the evaluation that the headline is about; ``None`` where nothing was judged.
    """

    headline: str
    support: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    best: Evaluation | None = None


@dataclass(frozen=True)
class _Rival:
    """Something that the best is held against, with its difference: positive where the best is higher.

    Attributes:
        paired: interval of the difference, both asked about the same items; ``None`` where it cannot be had.
        relation: of the difference to zero; where there is no interval of it, of the two intervals to each other.
    """

    name: str
    evaluation: Evaluation
    estimate: Estimate
    difference: float
    relation: Relation
    paired: tuple[float, float] | None

    @property
    def beaten(self) -> bool:
        return self.difference >= EQUAL

    @property
    def level(self) -> bool:
        return abs(self.difference) < EQUAL


def answer(results: Results) -> Answer:
    """The answer to "which encoder, and by how much".

    The encoders that the user gave are compared where all of them have been judged with most labels (the whole
    training side counts as more than any number of shots), each by its best method there. A control stands against
    the best encoder with its own best method at the same number of labels, which is the hardest comparison.
    """
    mine = [encoder.name for encoder in results.encoders if encoder.kind == "encoder"]
    judged = mine or [encoder.name for encoder in results.encoders]
    metric = results.primary
    shots = _most_labels(results, judged)
    best = _strongest(results, judged, shots)
    if best is None:
        return Answer("Nothing was judged: there are no evaluations with true labels.")
    facts = next(encoder for encoder in results.encoders if encoder.name == best.encoder)
    estimate = of(best, metric)
    controls = _controls(results, facts, best, shots)
    others = [name for name in judged if name != best.encoder]
    next_best = _rival(results, best, others, shots, None)

    reached = (
        f"a {metric_name(metric)} of {estimated(estimate)} {supervision(best.shots, results.unit, results.folds)} "
        f"({method_name(best.method)})"
    )
    if metric_name(metric)[0] in "aeiouAR":
        reached = f"an{reached[1:]}"
    who = f"{best.encoder} reaches {reached}"
    if others:
        who = f"Of {len(judged)} {'encoders' if mine else 'controls'}, {best.encoder} is best, with {reached}"
    if not mine:
        return Answer(f"Only controls were judged. {who}.", _shuffled(results, best)[0], best=best)

    support = [_chance_sentence(results, best), *_interval_sentences(controls), _next_sentence(next_best)]
    shuffled, finding = _shuffled(results, best)
    findings = [_finding(rival, best) for rival in controls]
    missing = _missing(results)
    if missing and controls:
        findings.append(Finding("open", missing))
    elif missing:
        support.insert(1, missing)
    findings += [finding] if finding else []
    findings += _fewest(results, best) + _selection(results, shots, bool(controls))
    sentences = [sentence for sentence in (*support, *shuffled, *spread_sentences(results, best)) if sentence]
    return Answer(f"{who}{_control_clause(controls)}.", sentences, findings, best)


def _most_labels(results: Results, names: Sequence[str]) -> int | None:
    """The largest number of labels at which all the named encoders were judged; the largest of all if there is none."""
    sets = [{e.shots for e in _true(results) if e.encoder == name} for name in names]
    sets = [judged for judged in sets if judged]
    if not sets:
        return None
    common = set.intersection(*sets) or set.union(*sets)
    return max(common, key=lambda shots: math.inf if shots is None else shots)


def _true(results: Results) -> Iterable[Evaluation]:
    """Judged with true labels, and not with a share of them."""
    return (
        e
        for e in results.evaluations
        if not e.shuffled and e.fraction is None and math.isfinite(of(e, results.primary).mean)
    )


def _strongest(results: Results, names: Sequence[str], shots: int | None) -> Evaluation | None:
    found = [e for e in _true(results) if e.encoder in names and e.shots == shots]
    return max(found, key=lambda e: of(e, results.primary).mean, default=None)


def _rival(
    results: Results, best: Evaluation, names: Sequence[str], shots: int | None, called: str | None
) -> _Rival | None:
    evaluation = _strongest(results, names, shots)
    if evaluation is None:
        return None
    mine, its = of(best, results.primary), of(evaluation, results.primary)
    paired = _paired(results, best, evaluation)
    state = relation(mine, its)
    if paired is not None:
        state = "overlap" if paired[0] <= 0 <= paired[1] else "apart"
    return _Rival(called or evaluation.encoder, evaluation, its, mine.mean - its.mean, state, paired)


def _paired(results: Results, one: Evaluation, other: Evaluation) -> tuple[float, float] | None:
    """The interval of their difference, if the metric follows from the predictions and these were kept."""
    sides = []
    for evaluation in (one, other):
        kept = [episode.predictions for episode in evaluation.episodes]
        if results.primary != "balanced_accuracy" or not all(len(row) == len(results.items) for row in kept):
            return None
        sides.append(np.array(kept))
    labels = np.array([item.label for item in results.items])
    _, groups = np.unique([item.group for item in results.items], return_inverse=True)
    return paired_difference(sides[0], sides[1], labels, groups, seed=results.facts.seed)


def relation(one: Estimate, other: Estimate) -> Relation:
    """Whether two intervals have a value in common."""
    if one.low is None or one.high is None or other.low is None or other.high is None:
        return "unknown"
    return "overlap" if one.low <= other.high and other.low <= one.high else "apart"


def _controls(results: Results, facts: EncoderFacts, best: Evaluation, shots: int | None) -> list[_Rival]:
    untrained = [encoder for encoder in results.encoders if encoder.kind == "untrained"]
    own = [encoder for encoder in untrained if facts.name in controlled(encoder)]
    histograms = [encoder for encoder in results.encoders if encoder.kind == "histogram"]
    means = [encoder for encoder in results.encoders if encoder.kind == "means"]
    constants = [encoder for encoder in results.encoders if encoder.kind == "constant"]
    candidates = [
        ("the same network untrained", own),
        ("an untrained network of another encoder", [] if own else untrained),
        (_histogram_name(histograms), histograms),
        ("the means of the channels", means),
        ("the mean of the training side", constants),
    ]
    rivals = [_rival(results, best, [e.name for e in group], shots, called) for called, group in candidates]
    return [rival for rival in rivals if rival is not None]


def _histogram_name(histograms: Sequence[EncoderFacts]) -> str:
    name = histograms[0].name if histograms else ""
    return f"the {name}" if "histogram" in name.lower() else "the histogram"


def _missing(results: Results) -> str:
    kinds = {encoder.kind for encoder in results.encoders}
    absent = [
        name for kind, name in (("untrained", "untrained network"), ("histogram", "histogram")) if kind not in kinds
    ]
    if not absent:
        return ""
    if len(absent) == 2:
        return (
            "Neither an untrained network nor a histogram was judged beside it, so nothing says how much of this "
            "the training gave."
        )
    return f"No {absent[0]} was judged beside it."


def _control_clause(controls: Sequence[_Rival]) -> str:
    if not controls:
        return ""
    beaten = [f"{decimal(rival.difference)} above {rival.name}" for rival in controls if rival.beaten]
    level = [f"level with {rival.name}" for rival in controls if rival.level]
    lost = [f"{decimal(-rival.difference)} below {rival.name}" for rival in controls if not rival.beaten | rival.level]
    if not level + lost:
        return f", {listed(beaten)}"
    failed = [rival.name for rival in controls if not rival.beaten]
    return f", but does NOT beat {' or '.join(failed)}: it is {listed(lost + level + beaten)}"


def _chance_sentence(results: Results, best: Evaluation) -> str:
    """A sentence if the best may be guessing, else nothing."""
    estimate, chance = of(best, results.primary), chance_level(results.primary, len(results.classes))
    if chance is None:
        return ""
    if estimate.mean < chance + EQUAL:
        return f"It is NOT above chance, which is {decimal(chance)}."
    if estimate.low is not None and estimate.low <= chance:
        return f"Its interval reaches down to chance, which is {decimal(chance)}, so it may be guessing."
    return ""


def _interval_sentences(controls: Sequence[_Rival]) -> list[str]:
    """What the intervals say about each difference, controls of one kind together."""
    sentences: list[str] = []
    for state, paired, said in (
        ("apart", True, "On the same items, the interval of its difference from {names} excludes zero."),
        (
            "overlap",
            True,
            "On the same items, the interval of its difference from {names} holds zero: it may be chance.",
        ),
        ("apart", False, "Its interval lies wholly above {whose}."),
        ("overlap", False, "{it} overlaps {whose}, so {what} may be chance."),
        ("unknown", False, "There are no intervals to say whether {what} may be chance."),
    ):
        beaten = [rival for rival in controls if rival.beaten and (rival.paired is not None) == paired]
        names = [rival.name for rival in beaten if rival.relation == state]
        if names:
            whose = f"{'those' if len(names) > 1 else 'that'} of {listed(names)}"
            what = "these differences" if len(names) > 1 else "this difference"
            it = "It" if sentences else "Its interval"
            each = f"each of {listed(names)}" if len(names) > 1 else names[0]
            sentences.append(said.format(whose=whose, what=what, it=it, names=each))
    for rival in controls:
        if rival.difference <= -EQUAL and rival.paired is not None:
            sure = rival.relation == "apart"
            sentences.append(
                f"On the same items, the interval of the difference from {rival.name} "
                + ("excludes zero." if sure else f"holds zero, so {rival.name} may be better by chance.")
            )
        elif rival.difference <= -EQUAL:
            said = {
                "overlap": f"The intervals of the two overlap, so {rival.name} may be better by chance.",
                "apart": f"The interval of {rival.name} lies wholly above it.",
                "unknown": f"There are no intervals to say whether {rival.name} is better by chance.",
            }[rival.relation]
            sentences.append(said)
    return sentences


def _next_sentence(rival: _Rival | None) -> str:
    if rival is None:
        return ""
    said = {
        "overlap": "the intervals overlap, so the order of the two may be chance",
        "apart": "the intervals do not overlap",
        "unknown": "there are no intervals to say whether the order could be chance",
    }[rival.relation]
    if rival.paired is not None:
        ending = "so the order of the two may be chance" if rival.relation == "overlap" else "which excludes zero"
        said = f"on the same items it is {decimal(rival.difference)} {_bounds(rival.paired)} behind, {ending}"
    return f"The next encoder, {rival.name}, reaches {estimated(rival.estimate)}; {said}."


def _bounds(interval: tuple[float, float]) -> str:
    return f"({decimal(interval[0])} to {decimal(interval[1])})"


def _finding(rival: _Rival, best: Evaluation) -> Finding:
    how = "" if rival.evaluation.method == best.method else f" with {method_name(rival.evaluation.method)}"
    name = f"{rival.name[0].upper()}{rival.name[1:]}" if rival.evaluation.encoder != rival.name else rival.name
    who = name if rival.evaluation.encoder.lower() in name.lower() else f"{name} ({rival.evaluation.encoder})"
    if rival.level:
        where = "level"
    else:
        where = f"{decimal(abs(rival.difference))} {'lower' if rival.beaten else 'higher'}"
    said = {"overlap": "the intervals overlap", "apart": "the intervals do not overlap", "unknown": "no intervals"}
    compared = said[rival.relation]
    if rival.paired is not None:
        low, high = rival.paired if rival.beaten or rival.level else (-rival.paired[1], -rival.paired[0])
        compared = f"on the same items the difference is within {_bounds((low, high))}"
    kind: Literal["good", "bad", "open"] = "good" if rival.relation == "apart" else "open"
    if not rival.beaten:
        kind = "bad"
    return Finding(kind, f"{who}: {estimated(rival.estimate)}{how}, {where}; {compared}.")


def _shuffled(results: Results, best: Evaluation) -> tuple[list[str], Finding | None]:
    """A sentence on the control with shuffled labels that is closest to the best evaluation, and a line on all."""
    rows = [e for e in results.evaluations if e.shuffled and math.isfinite(of(e, results.primary).mean)]
    chance = chance_level(results.primary, len(results.classes))
    if not rows:
        return ["No control with shuffled labels was run."], None
    if chance is None:
        return [f"{metric_name(results.primary)} has no fixed level of chance to hold shuffled labels against."], None
    nearest = max(
        rows,
        key=lambda e: (e.encoder == best.encoder, e.method == best.method, e.shots == best.shots),
    )
    estimate = of(nearest, results.primary)
    same = (nearest.encoder, nearest.method, nearest.shots) == (best.encoder, best.method, best.shots)
    which = "it" if same else f"{nearest.encoder} ({method_name(nearest.method)})"
    where = chance_of(estimate, chance)
    said = {
        "at": f"With shuffled labels {which} is at chance: {estimated(estimate)}, where chance is {decimal(chance)}.",
        "above": f"With shuffled labels {which} is NOT at chance but above it: {estimated(estimate)} instead of "
        f"{decimal(chance)}. Until that is explained, labels may leak and no number here should be trusted.",
        "below": f"With shuffled labels {which} is NOT at chance but below it: {estimated(estimate)} instead of "
        f"{decimal(chance)}. A leak would lift it; few or uneven groups can lower it.",
    }[where]
    off = sum(chance_of(of(e, results.primary), chance) == "above" for e in rows)
    if len(rows) == 1:
        return [said], None
    kind: Literal["good", "bad", "open"] = "good" if off == 0 else "bad" if where == "above" else "open"
    text = f"Shuffled labels, all {len(rows)} rows: {off or 'none'} above chance"
    bounded = [of(e, results.primary) for e in rows]
    if off and all(e.low is not None for e in bounded):
        text += f" (intervals miss it upwards in about {sum(map(_missed, rows)):.1g} rows by luck)"
    return [said], Finding(kind, f"{text}.")


def _missed(shuffled: Evaluation) -> float:
    """How often an interval lies above what it should hold: on the whole training side it is a 99% interval over
    shuffles (``tiles.SHUFFLED_INTERVAL``), in few-shot draws the 95% of ``statistics.bootstrap``."""
    return 0.005 if shuffled.shots is None else 0.025


def chance_of(estimate: Estimate, chance: float) -> Literal["at", "above", "below"]:
    """Where an estimate lies: at chance if its interval holds it; without an interval, if it is within
    ``NEAR_CHANCE``."""
    low = estimate.mean - NEAR_CHANCE if estimate.low is None else estimate.low
    high = estimate.mean + NEAR_CHANCE if estimate.high is None else estimate.high
    # A classifier that always gives one answer has an interval without width, at chance to the last few digits.
    if low > chance + _ROUNDING:
        return "above"
    return "below" if high < chance - _ROUNDING else "at"


def _fewest(results: Results, best: Evaluation) -> list[Finding]:
    """The same encoder and method with the fewest labels."""
    few = [e for e in _true(results) if e.encoder == best.encoder and e.shots is not None]
    few = [e for e in few if e.method == best.method] or few
    if not few:
        return []
    least = min(e.shots for e in few if e.shots is not None)
    e = max((e for e in few if e.shots == least), key=lambda e: of(e, results.primary).mean)
    if e is best:
        return []
    how = "" if e.method == best.method else f" ({method_name(e.method)})"
    text = f"{supervision(e.shots, results.unit)} it reaches {estimated(of(e, results.primary))}{how}."
    return [Finding("open", text[0].upper() + text[1:])]


def _selection(results: Results, shots: int | None, controls: bool) -> list[Finding]:
    mine = {encoder.name for encoder in results.encoders if encoder.kind == "encoder"}
    rows = [e for e in _true(results) if e.encoder in mine and e.shots == shots]
    if len(rows) < 2:
        return []
    text = f"It is the highest of {len(rows)} rows scored on the same {plural(results.unit)}, which favours it a little"
    return [Finding("open", text + ("; the controls are given by their own best method." if controls else "."))]
