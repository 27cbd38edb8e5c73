"""Losses of supervised tasks. What is not valid counts nowhere, and means are over the batch of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fmsuite.core.distributed import gather_rows, mean_over

DenseLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From logits (B, K, *size), targets and their validity (B, *size) to a scalar."""


def counted(target: Tensor, valid: Tensor | None = None, ignore_index: int | None = -1) -> Tensor:
    """Which labels count: bool of the target's shape.

    Args:
        target: integers. valid: bool of its shape; ``None`` means all.
        ignore_index: the label of what is not to be learned from.
    """
    known = torch.ones_like(target, dtype=torch.bool) if valid is None else valid
    return known if ignore_index is None else known & (target != ignore_index)


def cross_entropy(logits: Tensor, target: Tensor, valid: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean over what is valid of -log softmax at the label.

    Args:
        logits: (B, K, *size).
        target: (B, *size) integers, from 0 to K - 1 where valid.
        valid: (B, *size) bool.
        label_smoothing: share of the target that is spread over all classes.

    Returns:
        Scalar float32; zero where nothing is valid.
    """
    safe = torch.where(valid, target.long(), 0)
    losses = F.cross_entropy(logits.float(), safe, reduction="none", label_smoothing=label_smoothing)
    return mean_over(losses, valid)


def bce(logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Mean binary cross-entropy of independent labels.

    Args:
        logits: of any shape.
        target: of that shape, from 0 to 1 where valid. valid: bool of that shape.
    """
    safe = torch.where(valid, target.float(), 0.0)
    return mean_over(F.binary_cross_entropy_with_logits(logits.float(), safe, reduction="none"), valid)


def regression(
    values: Tensor, target: Tensor, valid: Tensor, kind: Literal["mse", "l1", "huber"] = "mse", delta: float = 1.0
) -> Tensor:
    """Mean squared or absolute error, or Huber's with its corner at ``delta``, over what is valid; of any shape."""
    safe = torch.where(valid, target.float(), 0.0)
    values = values.float()
    if kind == "mse":
        losses = F.mse_loss(values, safe, reduction="none")
    elif kind == "l1":
        losses = F.l1_loss(values, safe, reduction="none")
    else:
        losses = F.huber_loss(values, safe, reduction="none", delta=delta)
    return mean_over(losses, valid)


def dice_loss(
    logits: Tensor,
    target: Tensor,
    valid: Tensor,
    *,
    activation: Literal["softmax", "sigmoid"] = "softmax",
    background: bool = True,
    batch: bool = False,
    smooth: float = 1e-5,
) -> Tensor:
    """Soft Dice: the mean over classes of ``1 - (2 sum p g + s) / (sum p + sum g + s)`` (Milletari et al. 2016 have
    squares in the denominator, which this has not; MONAI's ``DiceLoss`` is this one).

    A class that is neither in the target nor predicted costs nothing. Without ``batch`` sums are over each sample, and
    the loss is the mean over the samples that have something valid; with it sums are over the samples of all ranks.

    Args:
        logits: (B, K, *size).
        target: (B, *size) integers from 0 to K - 1 where valid, or (B, K, *size) from 0 to 1.
        valid: (B, *size) bool.
        activation: ``sigmoid`` for classes that overlap.
        background: count class 0; a single class always counts.
        batch: sums over the batch.
        smooth: s.

    Returns:
        Scalar float32.
    """
    logits = logits.float()
    inside = valid[:, None].float()
    shares = (logits.softmax(1) if activation == "softmax" else logits.sigmoid()) * inside
    if target.dim() == valid.dim():
        safe = torch.where(valid, target.long(), 0)
        truth = torch.zeros_like(shares).scatter_(1, safe[:, None], 1.0) * inside
    else:
        truth = torch.where(valid[:, None], target.float(), 0.0)
    first = 0 if background or logits.shape[1] == 1 else 1
    both, sizes = (values[:, first:].flatten(2).sum(2) for values in (shares * truth, shares + truth))
    if batch:
        # Every rank's sums: Dice of the global batch is not the mean of the ranks'.
        both, sizes = (gather_rows(values.sum(0, keepdim=True)).sum(0, keepdim=True) for values in (both, sizes))
        return (1 - (2 * both + smooth) / (sizes + smooth)).mean()
    scores = 1 - (2 * both + smooth) / (sizes + smooth)
    return mean_over(scores.mean(1), valid.flatten(1).any(1))


def dice_ce(
    logits: Tensor,
    target: Tensor,
    valid: Tensor,
    *,
    dice_weight: float = 1.0,
    ce_weight: float = 1.0,
    background: bool = True,
    batch: bool = False,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The weighted sum of ``dice_loss`` (softmax) and ``cross_entropy``, which always counts class 0."""
    dice = dice_loss(logits, target, valid, background=background, batch=batch)
    return dice_weight * dice + ce_weight * cross_entropy(logits, target, valid, label_smoothing)


def deep_weights(outputs: int) -> tuple[float, ...]:
    """1, 1/2, 1/4 and so on, divided by their sum: the weights of outputs from fine to coarse (Isensee et al. 2021)."""
    raw = [0.5**number for number in range(outputs)]
    return tuple(weight / sum(raw) for weight in raw)


def deep_supervision(
    outputs: Sequence[Tensor], target: Tensor, valid: Tensor, loss: DenseLoss, weights: Sequence[float] | None = None
) -> Tensor:
    """The weighted sum of a loss at several resolutions.

    A coarser output is compared with the label at the centre of each of its cells.

    Args:
        outputs: (B, K, *shape) each, the first of the target's size; all cover the same area.
        target: (B, *size) integers. valid: (B, *size) bool.
        loss: of one resolution.
        weights: of each output; ``deep_weights`` if not given.
    """
    if weights is None:
        weights = deep_weights(len(outputs))
    total = torch.zeros((), device=target.device)
    for output, weight in zip(outputs, weights, strict=True):
        shape = tuple(output.shape[2:])
        total = total + weight * loss(output, at_centres(target, shape), at_centres(valid, shape))
    return total


def at_centres(values: Tensor, shape: Sequence[int]) -> Tensor:
    """(B, *size) values at the centres of ``shape`` equal cells along each axis, in their own dtype."""
    for axis, cells in enumerate(shape, start=1):
        length = values.shape[axis]
        if length != cells:
            centres = (torch.arange(cells, device=values.device, dtype=torch.float64) + 0.5) * (length / cells)
            values = values.index_select(axis, centres.floor().long().clamp(max=length - 1))
    return values
