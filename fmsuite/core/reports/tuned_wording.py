"""How the page writes scores of fine-tuning: with their units, differences with their signs."""

from __future__ import annotations

from fmsuite.core.evaluation.cases import OVERALL, FinetuneResults, Metric
from fmsuite.core.evaluation.results import Estimate
from fmsuite.core.reports.wording import decimal, interval, plural


def scored(value: float, metric: Metric) -> str:
    """Three decimals of a share; two of what has a unit, which a table's caption names."""
    return decimal(value) if not metric.unit else f"{value:.2f}".replace("-", "−").replace("−0.00", "0.00")


def between(estimate: Estimate, metric: Metric, signed: bool = False) -> str:
    """``(0.887–0.934)``; ``(0.010 to 0.032)`` of a difference; empty where there is no interval."""
    if estimate.low is None or estimate.high is None:
        return ""
    if not metric.unit and not signed:
        return interval(estimate)
    word = " to " if signed or min(estimate.low, estimate.high) < 0 else "–"
    return f"({scored(estimate.low, metric)}{word}{scored(estimate.high, metric)})"


def signed(value: float, metric: Metric) -> str:
    written = scored(value, metric)
    return written if value < 0 or vanishes(value, metric) else f"+{written}"


def vanishes(value: float, metric: Metric) -> bool:
    """Whether nothing is left of a difference in the decimals that are written."""
    return not abs(value) >= (0.005 if metric.unit else 0.0005)


def with_interval(estimate: Estimate, metric: Metric) -> str:
    unit = f" {metric.unit}" if metric.unit else ""
    return f"{scored(estimate.mean, metric)}{unit} {between(estimate, metric) or '(no interval)'}"


def better(estimate: Estimate, metric: Metric) -> bool | None:
    """Whether a difference is for the better with its whole interval; ``None`` where it may be neither, or vanishes."""
    if estimate.low is None or estimate.high is None or estimate.low <= 0 <= estimate.high:
        return None
    if vanishes(estimate.mean, metric):
        return None
    return (estimate.low > 0) == metric.higher


def percent(fraction: float) -> str:
    """``10%``, ``0.5%``."""
    return f"{100 * fraction:.3g}%"


def labelled(results: FinetuneResults, fraction: float, groups: tuple[int, int]) -> str:
    """``10% of the patients (8)``, ``all patients (70–71)``."""
    number = f"{groups[0]:,}" if groups[0] == groups[1] else f"{groups[0]:,}–{groups[1]:,}"
    units = plural(results.group_unit)
    return f"all {units} ({number})" if fraction == 1 else f"{percent(fraction)} of the {units} ({number})"


def label_name(label: str, metric: Metric, alone: bool) -> str:
    """A label's heading in tables and charts: what ``OVERALL`` is depends on the metric."""
    if label != OVERALL:
        return label
    return metric.short if alone else "mean of labels"
