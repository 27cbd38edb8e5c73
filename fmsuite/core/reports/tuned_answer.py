"""What fine-tuning came to, in sentences: how good, from how many labels, and how far beyond training from scratch."""

from __future__ import annotations

import math

from fmsuite.core.evaluation.cases import OVERALL, Cell, FinetuneResults
from fmsuite.core.evaluation.results import Estimate
from fmsuite.core.reports.answer import Answer, Finding
from fmsuite.core.reports.tuned_wording import better, between, labelled, scored, signed, vanishes, with_interval
from fmsuite.core.reports.wording import counted, listed, plural


def overall(cell: Cell, metric: str) -> Estimate:
    return cell.scores[metric].get(OVERALL, Estimate(mean=math.nan))


def best_cell(results: FinetuneResults) -> Cell | None:
    """At the largest fraction, the arm with the best primary metric; the control only where nothing else was judged."""
    metric = results.metrics[results.primary]
    control = results.control
    judged = [cell for cell in results.cells if math.isfinite(overall(cell, results.primary).mean)]
    mine = [cell for cell in judged if control is None or cell.arm != control.name] or judged
    if not mine:
        return None
    most = max(cell.fraction for cell in mine)
    sign = 1 if metric.higher else -1
    return max((c for c in mine if c.fraction == most), key=lambda cell: sign * overall(cell, results.primary).mean)


def tuned_answer(results: FinetuneResults) -> Answer:
    """The best arm at the largest fraction, less the network from scratch there and at every other fraction."""
    metric, control = results.metrics[results.primary], results.control
    best = best_cell(results)
    if best is None:
        return Answer("Nothing was judged: no case has a score.")
    estimate = overall(best, results.primary)
    others = [arm for arm in results.arms if not arm.control and arm.name != best.arm]
    headline = (
        f"{best.arm} reaches {_article(metric.short)} {metric.short} of {with_interval(estimate, metric)} "
        f"with {labelled(results, best.fraction, best.groups)}"
    )
    if control is not None and best.arm == control.name:
        return Answer(f"Only the network from scratch was judged. {headline}.", [], _gaps(results))
    less = best.differences.get(results.primary, {}).get(OVERALL)
    if less is not None:
        headline += _beyond(results, less)
    support = [_labels_sentence(results, best)]
    if others:
        names = listed([arm.name for arm in others])
        support.append(f"It is the best of {len(others) + 1} ways of training it (the others: {names}).")
    findings = [finding for cell in _of_arm(results, best.arm) if (finding := _finding(results, cell)) is not None]
    if control is None:
        findings.append(Finding("open", "Nothing says what the same network reaches from scratch: it was not trained."))
    if others:
        text = "The best way of training was picked on the cases that it is judged by, which flatters it a little."
        findings.append(Finding("open", text))
    return Answer(f"{headline}.", [sentence for sentence in support if sentence], [*findings, *_gaps(results)])


def _of_arm(results: FinetuneResults, arm: str) -> list[Cell]:
    """From most labels to fewest."""
    return sorted((cell for cell in results.cells if cell.arm == arm), key=lambda cell: -cell.fraction)


def _article(name: str) -> str:
    return "an" if name[0] in "aeiouAEIO" or name[:2] in ("HD", "NS") else "a"


def _beyond(results: FinetuneResults, less: Estimate) -> str:
    metric = results.metrics[results.primary]
    if vanishes(less.mean, metric):
        return ", level with the same network from scratch"
    word = "above" if less.mean > 0 else "below"
    amount = f"{scored(abs(less.mean), metric)}{f' {metric.unit}' if metric.unit else ''}"
    verdict = better(less, metric)
    unsure = ", a difference that may be chance" if verdict is None else ""
    return f", {amount} {word} the same network from scratch{unsure}"


def _labels_sentence(results: FinetuneResults, best: Cell) -> str:
    metric = results.metrics[results.primary]
    by_label = best.scores[results.primary]
    named = [f"{name} {scored(by_label[name].mean, metric)}" for name in results.labels if name in by_label]
    if len(named) < 2 or len(named) > 6:
        return ""
    return f"By label: {', '.join(named)}."


def _finding(results: FinetuneResults, cell: Cell) -> Finding | None:
    """The paired difference to the control at a fraction."""
    metric = results.metrics[results.primary]
    less = cell.differences.get(results.primary, {}).get(OVERALL)
    control = results.control
    if less is None or control is None:
        return None
    verdict = better(less, metric)
    other = results.cell(control.name, cell.fraction)
    scores = scored(overall(cell, results.primary).mean, metric)
    if other is not None and results.primary in other.scores:
        scores += f" against {scored(overall(other, results.primary).mean, metric)}"
    bounds = between(less, metric, signed=True) or "(no interval)"
    said = f"With {labelled(results, cell.fraction, cell.groups)}: {scores} from scratch"
    said += f", {signed(less.mean, metric)} {bounds}"
    if verdict is None:
        return Finding("open", f"{said}: no clear difference.")
    return Finding("good" if verdict else "bad", f"{said}: {'better' if verdict else 'worse'} on the same cases.")


def _gaps(results: FinetuneResults) -> list[Finding]:
    """What the numbers leave out."""
    failed = {number for run in results.runs for number in run.failed}
    found = []
    if failed:
        units = counted(len(failed), results.unit)
        found.append(Finding("bad", f"{units} could not be judged in some run, which the numbers above leave out."))
    cells = [cell for cell in results.cells if overall(cell, results.primary).low is None]
    if cells:
        few = f"Some numbers have no interval: there are too few {plural(results.group_unit)} for one."
        found.append(Finding("open", few))
    return found
