"""Metrics of predicted numbers, for one weighting of the items or for many at once."""

from __future__ import annotations

import torch
from torch import Tensor

from fmsuite.errors import UsageError

METRICS: dict[str, str] = {
    "r2": "coefficient of determination, 1 - squared error / variance of the target",
    "rmse": "root of the mean squared error",
    "mae": "mean absolute error",
    "pearson": "correlation",
    "spearman": "correlation of ranks",
}
"""Name to what it is."""


def regression_scores(predicted: Tensor, target: Tensor, weights: Tensor | None = None) -> dict[str, Tensor]:
    """Every metric of ``METRICS``, in float64.

    Weights that are whole numbers give what each item repeated so often would give. R2 is NaN where the target does not
    vary (scikit-learn says 0 or 1 there), the correlations where one of the two does not.

    Args:
        predicted, target: (N,) finite.
        weights: (N, R), not negative; one for each item if not given.

    Returns:
        (R,) by name, NaN for a weighting without weight; () without weights.

    Raises:
        UsageError: for no items, unlike lengths, or values that are not finite.
    """
    if predicted.shape != target.shape or predicted.dim() != 1 or not len(target):
        raise UsageError(f"Predictions {tuple(predicted.shape)} and targets {tuple(target.shape)} are no equal lists.")
    predicted, target = predicted.double(), target.double()
    if not bool((predicted.isfinite() & target.isfinite()).all()):
        raise UsageError("A prediction or a target is not finite.", "Leave out items without a target.")
    given = torch.ones(len(target), 1, dtype=torch.float64) if weights is None else weights.double()
    total = given.sum(0)
    error = predicted - target
    squared = (error.square() @ given) / total
    centre = (target @ given) / total
    variance = ((target[:, None] - centre).square() * given).sum(0) / total
    varies = _range(target, given) > 0
    found = {
        "r2": torch.where(varies, 1 - squared / torch.where(varies, variance, 1.0), torch.nan),
        "rmse": squared.sqrt(),
        "mae": (error.abs() @ given) / total,
        "pearson": _correlation(predicted[:, None], target[:, None], given),
        "spearman": _correlation(_ranks(predicted, given), _ranks(target, given), given),
    }
    return found if weights is not None else {name: value[0] for name, value in found.items()}


def _range(values: Tensor, weights: Tensor) -> Tensor:
    """(R,) largest less smallest value that has weight; negative without any."""
    column = values[:, None]
    high = torch.where(weights > 0, column, -torch.inf).amax(0)
    return high - torch.where(weights > 0, column, torch.inf).amin(0)


def _correlation(first: Tensor, second: Tensor, weights: Tensor) -> Tensor:
    """(R,) weighted Pearson correlation of (N, 1) or (N, R) values."""
    total = weights.sum(0)
    size = (first.abs().amax(0) * second.abs().amax(0)).square() * total.square()
    first = first - (first * weights).sum(0) / total
    second = second - (second * weights).sum(0) / total
    across = (first * second * weights).sum(0)
    spread = (first.square() * weights).sum(0) * (second.square() * weights).sum(0)
    # Taking the mean off leaves a trace of a spread that is zero.
    defined = spread > 1e-24 * size
    return torch.where(defined, across / torch.where(defined, spread, 1.0).sqrt(), torch.nan)


def _ranks(values: Tensor, weights: Tensor) -> Tensor:
    """(N, R) middle rank of each item when each counts as often as its weight says."""
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    level = torch.zeros(len(count), weights.shape[1], dtype=torch.float64).index_add_(0, place, weights)
    below = level.cumsum(0) - level
    return (below + (level + 1) / 2)[place]
