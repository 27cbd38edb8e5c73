"""Metrics of classification, each for one set of predictions or for many weightings of it at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fmsuite.errors import FmsuiteError, UsageError

METRICS: dict[str, str] = {
    "balanced_accuracy": "mean over the classes of the share of their members that are predicted right",
    "auroc": "area under the ROC curve; with more than two classes the mean over all pairs (one-vs-one, Hand and Till)",
    "weighted_f1": "F1 of each class, averaged by how many members it has",
    "quadratic_kappa": "Cohen's kappa with quadratic weights: agreement beyond chance, for classes with an order",
    "accuracy": "share of the predictions that are right",
    "macro_f1": "F1 of each class, averaged over the classes that occur or are predicted",
    "macro_precision": "precision of each class, averaged over the classes that occur or are predicted; 0 of a class "
    "that is never predicted",
    "mean_iou": "intersection over union of each class, averaged over the classes that occur or are predicted",
}
"""Name to what it is."""
BY_CLASS: dict[str, str] = {
    "recall": "share of a class's members that are predicted so",
    "precision": "share of what is predicted to be of a class that is",
    "f1": "2 TP / (2 TP + FP + FN) of a class",
    "iou": "intersection over union of a class, TP / (TP + FP + FN)",
}
"""Metrics that every class has, by name."""

_CHUNK_WEIGHTINGS = 128
"""Running sums over that many weightings at once stay in the processor's cache: three times as fast as 1,000."""


@dataclass(frozen=True)
class Tally:
    """Sums over weighted predictions, from which every metric of predicted classes follows.

    Attributes:
        hits: (C, *) float64 weight predicted right in each class; * is nothing, or R weightings.
        true, predicted: (C, *) float64 weight of each class among the targets and among the predictions.
        squared: (*) float64 sum of weight x (predicted - target)^2.
    """

    hits: Tensor
    true: Tensor
    predicted: Tensor
    squared: Tensor

    @classmethod
    def of(cls, predicted: Tensor, target: Tensor, classes: int, weights: Tensor | None = None) -> Tally:
        """
        Args:
            predicted, target: (N,) int64 below ``classes``.
            weights: (N,) or (N, R), floating, not negative; 1 each by default. Summed in their own dtype, which is
                exact for whole numbers below 2^24 in float32.
        """
        if weights is None:
            weights = torch.ones(len(target), dtype=torch.float64)
        right = predicted == target
        squared = (predicted - target).square().to(weights.dtype)
        return cls(
            _sum_by_class(target[right], classes, weights[right]),
            _sum_by_class(target, classes, weights),
            _sum_by_class(predicted, classes, weights),
            (squared @ weights).double(),
        )

    def accuracy(self) -> Tensor:
        return self.hits.sum(0) / self.true.sum(0)

    def balanced_accuracy(self) -> Tensor:
        present = self.true > 0
        recalls = torch.where(present, self.hits / self.true, 0.0)
        return recalls.sum(0) / present.sum(0)

    def weighted_f1(self) -> Tensor:
        either = self.true + self.predicted
        f1 = torch.where(either > 0, 2 * self.hits / either, 0.0)
        return (self.true * f1).sum(0) / self.true.sum(0)

    def by_class(self) -> dict[str, Tensor]:
        """(C, *) of each of ``BY_CLASS``: NaN for a class that neither occurs nor is predicted, which means pass over;
        0 where only one of the two is so, as in scikit-learn with ``zero_division=0``."""
        either = self.true + self.predicted
        there = either > 0
        parts = {"recall": self.true, "precision": self.predicted, "f1": either / 2, "iou": either - self.hits}
        return {
            name: torch.where(there, torch.where(part > 0, self.hits / part, 0.0), torch.nan)
            for name, part in parts.items()
        }

    def values(self) -> dict[str, Tensor]:
        """(*) of each of ``METRICS`` that follows from predicted classes."""
        of_class = self.by_class()
        return {
            "balanced_accuracy": self.balanced_accuracy(),
            "weighted_f1": self.weighted_f1(),
            "quadratic_kappa": self.quadratic_kappa(),
            "accuracy": self.accuracy(),
            "macro_f1": of_class["f1"].nanmean(0),
            "macro_precision": of_class["precision"].nanmean(0),
            "mean_iou": of_class["iou"].nanmean(0),
        }

    def quadratic_kappa(self) -> Tensor:
        codes = torch.arange(len(self.true), dtype=torch.float64, device=self.true.device)
        total = self.true.sum(0)
        # Sum of true_i predicted_j (i - j)^2 / total, multiplied out.
        expected = codes**2 @ (self.true + self.predicted) - 2 * (codes @ self.true) * (codes @ self.predicted) / total
        # Rounding leaves a trace of a chance disagreement that is zero.
        defined = expected > torch.finfo(torch.float64).eps * 8 * len(codes) ** 2 * total
        return torch.where(defined, 1 - self.squared / torch.where(defined, expected, 1.0), 0.0)


def confusion(predicted: Tensor, target: Tensor, classes: int, weights: Tensor | None = None) -> Tensor:
    """Rows truth, columns prediction.

    Args:
        predicted, target: (N,) int64 below ``classes``.
        weights: (N,).

    Returns:
        (classes, classes) int64 counts, or sums of weights in their dtype.
    """
    cells = target * classes + predicted
    return torch.bincount(cells, weights, minlength=classes**2).reshape(classes, classes)


def accuracy(predicted: Tensor, target: Tensor, weights: Tensor | None = None) -> float:
    """The share of the weight of (N,) int64 predictions that equal the target, N >= 1."""
    return _tally(predicted, target, weights).accuracy().item()


def balanced_accuracy(predicted: Tensor, target: Tensor, weights: Tensor | None = None) -> float:
    """The mean over the classes in ``target`` of the share of their members that are predicted right.

    Args:
        predicted, target: (N,) int64, N >= 1.
        weights: (N,); a class of no weight is not in ``target``.
    """
    return _tally(predicted, target, weights).balanced_accuracy().item()


def weighted_f1(predicted: Tensor, target: Tensor, weights: Tensor | None = None) -> float:
    """F1 = 2 TP / (2 TP + FP + FN) of each class, averaged by the weight of the class in ``target``.

    Args:
        predicted, target: (N,) int64, N >= 1. weights: (N,).
    """
    return _tally(predicted, target, weights).weighted_f1().item()


def quadratic_kappa(predicted: Tensor, target: Tensor, weights: Tensor | None = None) -> float:
    """1 - sum (i - j)^2 O_ij / sum (i - j)^2 E_ij, with the confusion matrix O and what chance expects of its margins,
    E_ij = O_i. O_.j / N (Cohen 1968, "Weighted kappa"). Classes that do not occur keep their place in the order.

    0 if ``target`` has one class only, whatever is predicted: nothing can then agree beyond chance. (If all
    predictions are of that class too, the quotient is 0/0.)

    Args:
        predicted, target: (N,) int64, N >= 1. weights: (N,).
    """
    return _tally(predicted, target, weights).quadratic_kappa().item()


def auroc_ovo(scores: Tensor, target: Tensor, weights: Tensor | None = None) -> float:
    """The area under the ROC curve, macro-averaged over pairs of classes.

    A(a|b) is the chance that an item of class a has a higher score for a than an item of class b, ties counting half;
    the mean of A(a|b) over ordered pairs of the classes in ``target`` is returned (Hand and Till 2001, equation 7).
    With two columns it is the plain area under the curve of the second.

    Args:
        scores: (N, C) finite.
        target: (N,) int64 below C.
        weights: (N,); a class of no weight is not in ``target``.

    Raises:
        UsageError: if ``target`` has one class only.
        FmsuiteError: if scores are not finite.
    """
    if weights is None:
        weights = torch.ones(len(target), dtype=torch.float64)
    area = weighted_auroc(scores, target, weights.double()[:, None]).item()
    if area != area:
        raise UsageError(
            "Only one class is among the items that were asked, so no AUROC can be computed.",
            "Give labelled items of at least two classes to the test side.",
        )
    return area


def weighted_auroc(scores: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """``auroc_ovo`` under many weightings.

    Scores are sorted once for each class. With weights divided by the sum over their class, the sum of A(a|b) over
    all b is that over the items i of a of weight_i x (summed weight of the items of other classes below i, and half
    of those level with it): one running sum for each class, not for each pair.

    Args:
        scores: (N, C) finite. target: (N,) int64 below C.
        weights: (N, R) floating, not negative.

    Returns:
        (R,) of the weights' dtype, NaN where fewer than two classes have weight.

    Raises:
        FmsuiteError: if scores are not finite.
    """
    if not bool(scores.isfinite().all()):
        raise FmsuiteError("The classifier gave scores that are not finite.", "Look for extreme values among features.")
    classes = scores.shape[1]
    totals = _sum_by_class(target, classes, weights)
    inverse = torch.where(totals > 0, 1 / totals, 0.0).to(weights.dtype)
    columns = [1] if classes == 2 else target.unique().tolist()
    orders = [_Order.of(scores[:, label], target == label) for label in columns]
    areas = []
    for part, scale in zip(weights.split(_CHUNK_WEIGHTINGS, dim=1), inverse.split(_CHUNK_WEIGHTINGS, dim=1)):
        share = part * scale.index_select(0, target)
        areas.append(torch.stack([order.area(share) for order in orders]).sum(0))
    present = (totals > 0).sum(0)
    pairs = present * (present - 1) / (2 if classes == 2 else 1)
    return torch.where(pairs > 0, torch.cat(areas) / pairs, torch.nan).clamp(0, 1)


@dataclass(frozen=True)
class _Order:
    """Where items of one class lie among the others, in order of the score of that class.

    Attributes:
        own: (M,) items of the class. others: (N - M,) the other items by rising score.
        below, not_above: (M,) how many of ``others`` score less than each of ``own``, and how many no more.
    """

    own: Tensor
    others: Tensor
    below: Tensor
    not_above: Tensor

    @classmethod
    def of(cls, scores: Tensor, member: Tensor) -> _Order:
        own, others = member.nonzero()[:, 0], (~member).nonzero()[:, 0]
        ascending, order = scores[others].sort()
        mine = scores[own].contiguous()
        right = torch.searchsorted(ascending, mine, right=True)
        return cls(own, others[order], torch.searchsorted(ascending, mine), right)

    def area(self, share: Tensor) -> Tensor:
        """(R,) the sum of A(a|b) over b, given (N, R) weights that sum to 1 in each class."""
        running = F.pad(share.index_select(0, self.others).cumsum(0), (0, 0, 1, 0))
        less, no_more = running.index_select(0, self.below), running.index_select(0, self.not_above)
        return (share.index_select(0, self.own) * (less + no_more)).sum(0) / 2


def score(scores: Tensor, predicted: Tensor, target: Tensor, classes: int) -> dict[str, float]:
    """Every metric of ``METRICS``.

    Args:
        scores: (N, classes) finite. predicted, target: (N,) int64 below ``classes``, N >= 1.

    Raises:
        UsageError: if ``target`` has one class only.
        FmsuiteError: if scores are not finite.
    """
    values = {name: value.item() for name, value in Tally.of(predicted, target, classes).values().items()}
    values["auroc"] = auroc_ovo(scores, target)
    return {name: values[name] for name in METRICS}


def class_scores(predicted: Tensor, target: Tensor, names: Sequence[str]) -> dict[str, float]:
    """Every metric of ``BY_CLASS`` of every class, as ``iou/NAME``; none of a class that neither occurs nor is
    predicted.

    Args:
        predicted, target: (N,) int64 below the number of names, N >= 1.
    """
    found = Tally.of(predicted, target, len(names)).by_class()
    pairs = [(f"{metric}/{name}", float(row)) for metric, rows in found.items() for name, row in zip(names, rows)]
    return {key: value for key, value in pairs if value == value}


def _tally(predicted: Tensor, target: Tensor, weights: Tensor | None) -> Tally:
    classes = int(torch.maximum(predicted.max(), target.max())) + 1
    return Tally.of(predicted, target, classes, None if weights is None else weights.double())


def _sum_by_class(label: Tensor, classes: int, weights: Tensor) -> Tensor:
    """(classes, *) float64 sums of (N, *) weights."""
    if weights.ndim == 1:
        return torch.bincount(label, weights.double(), minlength=classes)
    return (F.one_hot(label, classes).to(weights.dtype).T @ weights).double()
