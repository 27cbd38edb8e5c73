"""Metrics of label maps: what was counted in each case, and Dice and IoU of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fmsuite.core.evaluation.intervals import weighted_mean
from fmsuite.core.evaluation.metrics import Tally, confusion


@dataclass(frozen=True)
class CaseCounts:
    """How many samples (pixels, voxels) of each class there are in each case.

    Attributes:
        both: (N, C) float64 labelled and predicted so.
        true, predicted: (N, C) float64.
    """

    both: Tensor
    true: Tensor
    predicted: Tensor

    @classmethod
    def of(cls, matrices: Tensor) -> CaseCounts:
        """From (N, C, C) confusion matrices, rows truth."""
        matrices = matrices.double()
        return cls(matrices.diagonal(dim1=1, dim2=2), matrices.sum(2), matrices.sum(1))

    def dice(self) -> Tensor:
        """(N, C) 2 |A and B| / (|A| + |B|); see ``quotient``."""
        return quotient(2 * self.both, self.true + self.predicted)

    def iou(self) -> Tensor:
        """(N, C) |A and B| / |A or B|; see ``quotient``."""
        return quotient(self.both, self.true + self.predicted - self.both)

    def by_class(self) -> dict[str, Tensor]:
        """(N, C) of each of ``metrics.BY_CLASS``: NaN where a case has a class neither in truth nor in prediction."""
        found = Tally(self.both.T, self.true.T, self.predicted.T, torch.zeros(len(self.both))).by_class()
        return {name: values.T for name, values in found.items()}

    def pooled(self, weights: Tensor | None = None) -> CaseCounts:
        """The counts of all cases together, or of R weightings (N, R): (1, C) or (R, C)."""
        if weights is None:
            weights = torch.ones(len(self.both), 1, dtype=torch.float64)
        across = weights.double().T
        return CaseCounts(across @ self.both, across @ self.true, across @ self.predicted)


def case_confusion(
    predicted: Tensor, target: Tensor, classes: int, valid: Tensor | None = None, ignore_index: int | None = -1
) -> Tensor:
    """(C, C) int64 confusion matrix of one case, rows truth.

    Args:
        predicted, target: integers of one shape; predictions below ``classes``, targets too where they count.
        valid: bool of that shape. ignore_index: the label of what does not count.
    """
    known = torch.ones_like(target, dtype=torch.bool) if valid is None else valid
    if ignore_index is not None:
        known = known & (target != ignore_index)
    return confusion(predicted[known].long(), target[known].long(), classes)


def quotient(overlap: Tensor, size: Tensor) -> Tensor:
    """An overlap measure, by this convention: a class that a case has neither in truth nor in prediction was not asked
    there, and is NaN, which means pass over; a class that is in one of them only is 0. (Counting the first as 1 would
    reward data with many empty cases; leaving predictions of an absent class out would not punish them.)"""
    return torch.where(size > 0, overlap / size, torch.nan)


def mean_over_cases(values: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """The mean over the cases of each class, and the mean of these over the classes.

    Args:
        values: (N, C) of Dice, IoU or a surface distance, NaN where a case has none.
        weights: (N, R) of the cases.

    Returns:
        ``mean`` and ``0``, ``1`` and so on, (R,) each.
    """
    by_class = weighted_mean(values, weights)
    return {"mean": by_class.nanmean(0), **{str(number): row for number, row in enumerate(by_class)}}


def pooled_scores(
    counts: CaseCounts, weights: Tensor, measure: Callable[[CaseCounts], Tensor] = CaseCounts.iou
) -> dict[str, Tensor]:
    """A measure of all cases' samples together (remote sensing's mean IoU), of each class and their mean.

    Args:
        weights: (N, R) of the cases. measure: ``CaseCounts.iou`` or ``CaseCounts.dice``.

    Returns:
        As ``mean_over_cases``.
    """
    by_class = measure(counts.pooled(weights)).T
    return {"mean": by_class.nanmean(0), **{str(number): row for number, row in enumerate(by_class)}}
