"""How the report writes numbers and names."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fmsuite.core.evaluation.results import EncoderFacts, Estimate, Evaluation

METHOD_NAMES = {
    "simpleshot": "SimpleShot",
    "mi_simpleshot": "MI-SimpleShot",
    "logistic": "logistic regression",
    "knn": "kNN",
    "abmil": "ABMIL",
    "linear_torch": "linear probe, torch form",
    "linear_sklearn": "linear probe, scikit-learn form",
    "linear": "linear probe",
    "ridge": "ridge regression",
}
METRIC_NAMES = {
    "auroc": "AUROC",
    "weighted_f1": "weighted F1",
    "macro_auroc": "mean AUROC",
    "macro_f1": "macro F1",
    "micro_f1": "micro F1",
    "f1": "F1",
    "iou": "IoU",
    "mean_iou": "mean IoU",
    "map": "mean average precision",
    "micro_map": "average precision of all labels together",
    "r2": "R²",
    "rmse": "RMSE",
    "mae": "mean absolute error",
    "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
}
RETRIEVED = {"acc": "accuracy", "mv": "majority vote", "map": "mAP"}
OF_ONE = {"auroc": "AUROC", "map": "AP", "iou": "IoU", "f1": "F1"}
"""Metrics of one class or finding."""


def decimal(value: float) -> str:
    """Three decimals; a dash for what is not finite."""
    return f"{value:.3f}".replace("-", "−").replace("−0.000", "0.000") if math.isfinite(value) else "–"


def interval(estimate: Estimate) -> str:
    """``(0.887–0.934)``; ``(−0.020 to 0.031)`` where a bound is negative; empty where there is none."""
    if estimate.low is None or estimate.high is None:
        return ""
    between = " to " if min(estimate.low, estimate.high) < 0 else "–"
    return f"({decimal(estimate.low)}{between}{decimal(estimate.high)})"


def estimated(estimate: Estimate) -> str:
    """``0.912 (0.887–0.934)``."""
    return f"{decimal(estimate.mean)} {interval(estimate) or '(no interval)'}"


def method_name(key: str) -> str:
    """As it stands in tables: the usual name of a known method, else the key in words."""
    return METHOD_NAMES.get(key, key.replace("_", " "))


def metric_name(key: str) -> str:
    metric, _, finding = key.partition("/")
    if finding:
        return f"{OF_ONE.get(metric, metric)} of {finding}"
    kind, at, k = key.partition("@")
    if at:
        return f"{RETRIEVED[kind]} at {k}"
    return METRIC_NAMES.get(key, key.replace("_", " "))


def chance_level(metric: str, classes: int) -> float | None:
    """What guessing gives whatever the shares of the classes; ``None`` where it depends on them. Of R2 it is what
    always answering the mean gives."""
    levels = {"auroc": 0.5, "macro_auroc": 0.5, "quadratic_kappa": 0.0, "r2": 0.0}
    return {"balanced_accuracy": 1 / max(classes, 1), **levels}.get(metric)


def counted(count: int, unit: str) -> str:
    """``1 slide``, ``12 slides``."""
    return f"{count} {unit if count == 1 else plural(unit)}"


def plural(unit: str) -> str:
    return f"{unit[:-1]}ies" if unit.endswith("y") else f"{unit}s"


def supervision(shots: int | None, unit: str, folds: int | None = None) -> str:
    """What the classifier was given."""
    if shots is not None:
        return f"from {counted(shots, f'labelled {unit}')} a class"
    return "with the whole training side" if folds is None else f"in {everything(folds)}"


def everything(folds: int | None) -> str:
    """What a classifier is trained on that is given all there is, as in a table's caption."""
    return "whole training side" if folds is None else f"cross-validation by group ({folds} folds)"


def listed(names: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def controlled(facts: EncoderFacts) -> list[str]:
    """The encoders that an untrained one is the control of; where several share it, the provenance names all."""
    several = facts.provenance.get("control_of")
    if isinstance(several, list) and several:
        return [str(name) for name in several]
    return [facts.control_of] if facts.control_of else []


def shots_name(shots: int | None) -> str:
    return "all" if shots is None else str(shots)


def of(evaluation: Evaluation, metric: str) -> Estimate:
    """The metric's estimate, not a number where it was not computed."""
    return evaluation.metrics.get(metric, Estimate(mean=math.nan))


def share(value: float) -> str:
    """A whole percentage; under 1% and over 99% with what distinguishes them from none and all."""
    if 0 < value < 0.01:
        return "<1%"
    return ">99%" if 0.99 < value < 1 else f"{value:.0%}"
