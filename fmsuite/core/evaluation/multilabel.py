"""Metrics of items that may have several labels."""

from __future__ import annotations

import torch
from torch import Tensor

from fmsuite.core.evaluation.metrics import weighted_auroc
from fmsuite.errors import FmsuiteError, UsageError

METRICS: dict[str, str] = {
    "map": "average precision of each label, averaged over the labels that occur",
    "micro_map": "average precision of all decisions about all labels, ranked together",
    "macro_f1": "F1 of each label at the threshold, averaged over the labels that occur or are predicted",
    "micro_f1": "F1 of all decisions together at the threshold",
    "macro_auroc": "area under the ROC curve of each label, averaged over the labels that some items have and some not",
}
"""Name to what it is."""

_CHUNK_VALUES = 1 << 22


def average_precision(scores: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Precision at each score, weighted by how much recall it adds; equal scores are one step (scikit-learn's
    definition, without interpolation).

    Args:
        scores: (N,) finite. target: (N,) bool. weights: (N, R) float64.

    Returns:
        (R,) float64, NaN where no positive has weight.
    """
    _, step = (-scores).unique(return_inverse=True)
    steps = int(step.max()) + 1
    hits = torch.zeros(steps, weights.shape[1], dtype=torch.float64).index_add_(0, step, weights * target[:, None])
    asked = torch.zeros(steps, weights.shape[1], dtype=torch.float64).index_add_(0, step, weights)
    precision = hits.cumsum(0) / asked.cumsum(0).clamp(min=torch.finfo(torch.float64).tiny)
    total = hits.sum(0)
    return torch.where(total > 0, (precision * hits).sum(0) / total, torch.nan)


def multilabel_scores(
    scores: Tensor,
    target: Tensor,
    threshold: float = 0.5,
    weights: Tensor | None = None,
    known: Tensor | None = None,
) -> dict[str, Tensor]:
    """Every metric of ``METRICS``, and of each label ``map/0``, ``map/1`` and so on, and ``auroc/0`` and so on.

    Args:
        scores: (N, K) finite, probabilities if the threshold is to mean something.
        target: (N, K) bool.
        threshold: a label is predicted from this score on.
        weights: (N, R), not negative; one for each item if not given.
        known: (N, K) bool; what is not known counts in no metric. All by default.

    Returns:
        (R,) float64 by name, NaN where no label allows the metric; () without weights.

    Raises:
        UsageError: for no items or unlike shapes.
        FmsuiteError: if scores are not finite.
    """
    if scores.shape != target.shape or scores.dim() != 2 or not len(scores):
        raise UsageError(f"Scores {tuple(scores.shape)} and labels {tuple(target.shape)} are no equal tables.")
    if not bool(scores.isfinite().all()):
        raise FmsuiteError("The classifier gave scores that are not finite.", "Look for extreme values among features.")
    target = target.bool()
    given = torch.ones(len(scores), 1, dtype=torch.float64) if weights is None else weights.double()
    there = torch.ones_like(target) if known is None else known
    labels = range(scores.shape[1])
    counted = [given * there[:, k, None] for k in labels]
    precisions = torch.stack([average_precision(scores[:, k], target[:, k], counted[k]) for k in labels])
    pairs = [torch.stack([-scores[:, k], scores[:, k]], dim=1) for k in labels]
    areas = torch.stack([weighted_auroc(pairs[k], target[:, k].long(), counted[k]) for k in labels])
    said = (scores >= threshold) & there
    hits, true, predicted = ((mask.double().T @ given) for mask in (said & target, target & there, said))
    either = true + predicted
    f1 = torch.where(either > 0, 2 * hits / either, torch.nan)
    found = {
        "map": precisions.nanmean(0),
        "micro_map": micro_average_precision(scores, target, given, there),
        "macro_f1": f1.nanmean(0),
        "micro_f1": torch.where(either.sum(0) > 0, 2 * hits.sum(0) / either.sum(0), torch.nan),
        "macro_auroc": areas.nanmean(0),
        **{f"map/{k}": precisions[k] for k in labels},
        **{f"auroc/{k}": areas[k] for k in labels},
    }
    return found if weights is not None else {name: value[0] for name, value in found.items()}


def micro_average_precision(scores: Tensor, target: Tensor, weights: Tensor, known: Tensor) -> Tensor:
    """Average precision of all labels' decisions in one ranking.

    Args:
        scores: (N, K) finite. target, known: (N, K) bool. weights: (N, R) float64.

    Returns:
        (R,) float64, NaN where no positive has weight.
    """
    # A few weightings at a time: all decisions under all of them may not fit into memory.
    flat, has = scores.flatten(), target.flatten()
    parts = weights.split(max(1, _CHUNK_VALUES // len(flat)), dim=1)
    counted = ((part[:, None] * known[:, :, None]).flatten(0, 1) for part in parts)
    return torch.cat([average_precision(flat, has, each) for each in counted])
