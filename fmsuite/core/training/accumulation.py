"""Micro-batches: how a batch is divided, and how much each part counts, so that together they give its result."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fmsuite.core.data.sample import Batch
from fmsuite.core.distributed import all_sum
from fmsuite.core.objectives.base import Objective
from fmsuite.errors import FmsuiteError


def split_batch(batch: Batch, parts: int) -> list[Batch]:
    """Micro-batches of equal size, in order; each has all of the supports.

    Raises:
        FmsuiteError: if the batch cannot be divided so.
    """
    if parts == 1:
        return [batch]
    if len(batch) % parts:
        raise FmsuiteError(f"A batch of {len(batch)} samples cannot be divided into {parts} micro-batches.")
    size = len(batch) // parts
    return [batch[start : start + size] for start in range(0, len(batch), size)]


def shares(objective: Objective, parts: Sequence[Batch], device: torch.device) -> list[Tensor | float]:
    """What each micro-batch's loss is multiplied by; together they are one.

    Equal shares, unless the objective counts its targets (``Objective.target_count``): then each has the share of the
    targets, of all ranks, that are in it, so that every target counts the same, whichever micro-batch it is in.

    Args:
        parts: this rank's micro-batches, on the host.
    """
    equal = 1.0 / len(parts)
    counts = [objective.target_count(part) for part in parts] if len(parts) > 1 else []
    known = [count for count in counts if count is not None]
    if not known:
        return [equal] * len(parts)
    numbers = all_sum(torch.stack(known).to(device, torch.float32))
    total = numbers.sum()
    return list(torch.where(total > 0, numbers / total, equal).unbind())


def batch_statistics(objective: Objective) -> str | None:
    """What of an objective's loss is a statistic of the batch, in words; ``None`` if samples do not know each other."""
    known = objective.batch_statistic
    if known is None and type(objective).check_batch is not Objective.check_batch:
        known = "what compares samples"
    if known is None and any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in objective.modules()):
        known = "batch normalisation"
    return known
