"""From what was said of each held-out case to metrics with intervals, and to differences between ways to train."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fmsuite.core.evaluation.cases import DENSE, OVERALL, Metric, TaskName
from fmsuite.core.evaluation.intervals import Statistic, group_intervals, weighted_mean
from fmsuite.core.evaluation.metrics import BY_CLASS, Tally, weighted_auroc
from fmsuite.core.evaluation.multilabel import average_precision, micro_average_precision
from fmsuite.core.evaluation.regression import regression_scores
from fmsuite.core.evaluation.results import Estimate
from fmsuite.core.evaluation.segmentation import CaseCounts, case_confusion
from fmsuite.core.evaluation.statistics import summarise
from fmsuite.core.evaluation.surface import surface_distances
from fmsuite.errors import FmsuiteError

POOLED_SHORT = {"recall": "recall", "precision": "precision", "f1": "F1", "iou": "IoU"}
"""Metrics of a segmentation that are of all cases' samples together, as in remote sensing."""
COUNTS = ("samples/both", "samples/true", "samples/predicted")
"""Of each case and label, how many samples are labelled and predicted so, labelled so, and predicted so."""

Key = tuple[str, str]
"""Metric and label."""
Values = Callable[[Tensor], dict[Key, Tensor]]
"""From (N, R) weights of the cases to (R,) values; NaN where a weighting leaves one undefined."""


def kept_of(metrics: Sequence[str]) -> tuple[str, ...]:
    """What ``segmentation_scores`` gives for these metrics."""
    return (*metrics, *(COUNTS if set(POOLED_SHORT) & set(metrics) else ()))


def metrics_of(task: TaskName, asked: Sequence[str], tolerance: float, unit: str) -> dict[str, Metric]:
    """What a task is judged by; the first answers the question.

    Args:
        asked: of a segmentation.
        tolerance, unit: of surface distances.
    """
    if task in DENSE:
        known = {
            "dice": Metric(title="overlap, 2 |A and B| / (|A| + |B|), of each case and label", short="Dice"),
            "nsd": Metric(
                title=f"share of both surfaces that lies within {tolerance:g} {unit} of the other, of each case and "
                "label (normalised surface distance)",
                short="NSD",
            ),
            "hd95": Metric(
                title="95th percentile of the distances between the surfaces, the larger of both directions; where one "
                "of the two is empty, the diagonal of the case",
                short="HD95",
                higher=False,
                unit=unit,
            ),
        }
        known |= {
            name: Metric(title=f"{title}, of all cases' samples together", short=POOLED_SHORT[name], by_case=False)
            for name, title in BY_CLASS.items()
        }
        return {name: known[name] for name in known if name in asked}
    if task == "classification":
        return {
            "auroc": Metric(
                title="area under the ROC curve; with more than two classes the mean over all pairs",
                short="AUROC",
                by_case=False,
            ),
            "balanced_accuracy": Metric(
                title="mean over the classes of the share that is predicted right", short="balanced acc.", by_case=False
            ),
            "accuracy": Metric(title="share of the cases that are predicted right", short="accuracy", by_case=False),
            "macro_f1": Metric(
                title="F1 of each class, averaged over the classes that occur or are predicted",
                short="macro F1",
                by_case=False,
            ),
        }
    if task == "multilabel":
        return {
            "auroc": Metric(title="area under the ROC curve of each label", short="AUROC", by_case=False),
            "average_precision": Metric(
                title="precision at each score, weighted by how much recall it adds, of each label",
                short="AP",
                by_case=False,
            ),
            "micro_average_precision": Metric(
                title="average precision of all decisions about all labels, ranked together",
                short="micro AP",
                by_case=False,
            ),
        }
    return {
        "r2": Metric(title="1 - squared error / variance of the target", short="R2", by_case=False),
        "mae": Metric(title="mean absolute error", short="MAE", higher=False, by_case=False),
        "rmse": Metric(title="root of the mean squared error", short="RMSE", higher=False, by_case=False),
    }


def segmentation_scores(
    predicted: np.ndarray,
    truth: np.ndarray,
    spacing: Sequence[float],
    classes: int,
    metrics: Sequence[str],
    tolerance: float,
    ignore_index: int | None = -1,
    first: int = 1,
) -> dict[str, list[float | None]]:
    """One case on its own grid: by metric a value for each class from ``first`` on, ``None`` where a class is neither
    in truth nor in prediction. Where one of ``POOLED_SHORT`` is asked for, also ``COUNTS``.

    Args:
        predicted, truth: integers of one shape.
        spacing: physical length of a sample along each axis.
        tolerance: of the normalised surface distance, in the unit of ``spacing``.
        ignore_index: the truth's value of what does not count; surfaces do not see it either.
        first: 1 where class 0 is the background, 0 where it is a class as the others are.

    Raises:
        FmsuiteError: if the truth has a value that is no class.
    """
    known = np.ones(truth.shape, dtype=bool) if ignore_index is None else truth != ignore_index
    labels = np.unique(truth[known])
    if len(labels) and not 0 <= labels[0] <= labels[-1] < classes:
        bad = labels[0] if labels[0] < 0 else labels[-1]
        raise FmsuiteError(
            f"The label map has the value {bad}, but there are {classes} classes, counted from 0.",
            "Name all of them in task.classes, or set task.ignore_index.",
        )
    found: dict[str, list[float | None]] = {name: [] for name in metrics}
    matrix = case_confusion(
        torch.from_numpy(predicted.astype(np.int64)),
        torch.from_numpy(truth.astype(np.int64)),
        classes,
        ignore_index=ignore_index,
    )
    counts = CaseCounts.of(matrix[None])
    dice = counts.dice()[0].tolist()
    pooled = {name: rows[0].tolist() for name, rows in counts.by_class().items() if name in metrics}
    surfaces = bool({"nsd", "hd95"} & set(metrics))
    diagonal = math.hypot(*(length * step for length, step in zip(truth.shape, spacing, strict=True)))
    for label in range(first, classes):
        values = {"dice": dice[label], **{name: of_class[label] for name, of_class in pooled.items()}}
        if surfaces:
            distances = surface_distances((predicted == label) & known, (truth == label) & known, spacing)
            # Who misses a structure is as far off as can be, and finitely so.
            values |= {"nsd": distances.normalised(tolerance), "hd95": min(distances.hausdorff(95.0), diagonal)}
            if distances.absent:
                values["hd95"] = math.nan
        for name in metrics:
            value = values[name]
            found[name].append(None if math.isnan(value) else float(value))
    if pooled:
        for name, numbers in zip(COUNTS, (counts.both, counts.true, counts.predicted), strict=True):
            found[name] = numbers[0, first:].tolist()
    return found


def mean_values(scores: Mapping[str, Tensor], labels: Sequence[str]) -> Values:
    """Metrics that every case has: the mean over the cases of each label, and the mean of these.

    Args:
        scores: by metric (N, L) float64, NaN where a case has none.
    """

    def values(weights: Tensor) -> dict[Key, Tensor]:
        found: dict[Key, Tensor] = {}
        for metric, table in scores.items():
            by_label = weighted_mean(table, weights)
            found[metric, OVERALL] = by_label.nanmean(0)
            if len(labels) > 1:
                found |= {(metric, label): row for label, row in zip(labels, by_label, strict=True)}
        return found

    return values


def pooled_values(counts: CaseCounts, metrics: Sequence[str], labels: Sequence[str]) -> Values:
    """Metrics of all cases' samples together: of each label, and the mean over the labels that occur or are predicted.

    Args:
        counts: (N, L) of the cases and labels.
        metrics: of ``POOLED_SHORT``.
    """

    def values(weights: Tensor) -> dict[Key, Tensor]:
        found: dict[Key, Tensor] = {}
        of_label = counts.pooled(weights).by_class()
        for metric in metrics:
            rows = of_label[metric].T
            found[metric, OVERALL] = rows.nanmean(0)
            if len(labels) > 1:
                found |= {(metric, label): row for label, row in zip(labels, rows, strict=True)}
        return found

    return values


def together(*parts: Values) -> Values:
    """The values of all."""
    return lambda weights: {key: value for part in parts for key, value in part(weights).items()}


def class_values(probabilities: Tensor, truth: Tensor) -> Values:
    """Of a classification.

    Args:
        probabilities: (N, K). truth: (N,) int64.
    """

    def values(weights: Tensor) -> dict[Key, Tensor]:
        tally = Tally.of(probabilities.argmax(1), truth, probabilities.shape[1], weights)
        return {
            ("auroc", OVERALL): weighted_auroc(probabilities, truth, weights),
            ("balanced_accuracy", OVERALL): tally.balanced_accuracy(),
            ("accuracy", OVERALL): tally.accuracy(),
            ("macro_f1", OVERALL): tally.values()["macro_f1"],
        }

    return values


def label_values(probabilities: Tensor, truth: Tensor, labels: Sequence[str]) -> Values:
    """Of a multilabel task: each label by the cases of which it is known.

    Args:
        probabilities, truth: (N, K), the truth below 0 where it is not known.
    """

    def values(weights: Tensor) -> dict[Key, Tensor]:
        found: dict[Key, Tensor] = {}
        nothing = torch.full((weights.shape[1],), torch.nan, dtype=torch.float64)
        for metric in ("auroc", "average_precision"):
            of_label = []
            for column in range(len(labels)):
                known = truth[:, column] >= 0
                score, has = probabilities[known, column].double(), truth[known, column] > 0
                if not len(score) or bool(has.all()) or not bool(has.any()):
                    of_label.append(nothing)
                elif metric == "auroc":
                    of_label.append(weighted_auroc(torch.stack([-score, score], 1), has.long(), weights[known]))
                else:
                    of_label.append(average_precision(score, has, weights[known].double()))
            found[metric, OVERALL] = torch.stack(of_label).nanmean(0)
            if len(labels) > 1:
                found |= {(metric, label): row for label, row in zip(labels, of_label, strict=True)}
        if len(labels) > 1:
            decisions = probabilities.double(), truth > 0, weights.double(), truth >= 0
            found["micro_average_precision", OVERALL] = micro_average_precision(*decisions)
        return found

    return values


def number_values(predicted: Tensor, truth: Tensor, labels: Sequence[str]) -> Values:
    """Of a regression: each number by the cases of which it is known. Errors of several numbers have units of their
    own and no mean.

    Args:
        predicted, truth: (N, D), the truth NaN where it is not known.
    """

    def values(weights: Tensor) -> dict[Key, Tensor]:
        found: dict[Key, Tensor] = {}
        nothing = torch.full((weights.shape[1],), torch.nan, dtype=torch.float64)
        by_label = []
        for column in range(len(labels)):
            known = truth[:, column].isfinite()
            if not bool(known.any()):
                by_label.append({"r2": nothing, "mae": nothing, "rmse": nothing})
                continue
            by_label.append(regression_scores(predicted[known, column], truth[known, column], weights[known]))
        found["r2", OVERALL] = torch.stack([scores["r2"] for scores in by_label]).nanmean(0)
        if len(labels) == 1:
            found |= {(metric, OVERALL): by_label[0][metric] for metric in ("mae", "rmse")}
        else:
            for label, scores in zip(labels, by_label, strict=True):
                found |= {(metric, label): scores[metric] for metric in ("r2", "mae", "rmse")}
        return found

    return values


def estimates(
    seeds: Sequence[Values],
    groups: Tensor,
    replicates: int,
    confidence: float,
    seed: int,
    less: Sequence[Values] = (),
) -> dict[str, dict[str, Estimate]]:
    """The mean over seeds of every value, with its deviation over seeds and its interval over groups; values that are
    undefined are left out.

    Args:
        seeds: of each seed, on the same cases.
        groups: (N,) int64 of the cases.
        seed: of the draws.
        less: of each seed of another way, which is taken off: both see the same draws, so that the interval is a
            paired one.
    """

    def statistic(weights: Tensor) -> dict[str, Tensor]:
        found = _mean([values(weights) for values in seeds])
        if less:
            other = _mean([values(weights) for values in less])
            found = {key: value - other[key] for key, value in found.items() if key in other}
        return {"\0".join(key): value for key, value in found.items()}

    flat = torch.ones(len(groups), 1, dtype=torch.float64)
    whole = statistic(flat)
    bounds: Statistic = statistic
    intervals = group_intervals(bounds, groups, replicates, confidence, seed=seed)
    pairs = list(zip(seeds, less, strict=False)) if len(seeds) == len(less) else []
    single = [values(flat) for values in seeds]
    if less:
        others = [values(flat) for _, values in pairs]
        single = [{k: v - other[k] for k, v in own.items() if k in other} for own, other in zip(single, others)]
    found: dict[str, dict[str, Estimate]] = {}
    for name, value in whole.items():
        metric, label = name.split("\0")
        if not bool(value.isfinite().all()):
            continue
        low, high = intervals[name] or (None, None)
        each = [float(own[metric, label]) for own in single if (metric, label) in own]
        std = summarise(each)[1] if len(each) == len(seeds) and all(map(math.isfinite, each)) else None
        found.setdefault(metric, {})[label] = Estimate(mean=float(value), std=std, low=low, high=high)
    return found


def _mean(of_seeds: Sequence[dict[Key, Tensor]]) -> dict[Key, Tensor]:
    return {key: torch.stack([values[key] for values in of_seeds]).mean(0) for key in of_seeds[0]}
