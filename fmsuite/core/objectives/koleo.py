"""The KoLeo regulariser: features of a batch spread out over the sphere."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fmsuite.core.distributed import gather_rows
from fmsuite.errors import UsageError

EPSILON = 1e-8
CLOSEST = 1e-6
"""Nearer neighbours than this are copies of one image; they do not push each other, for any push would be noise."""


def koleo(features: Tensor, usable: Tensor | None = None) -> Tensor:
    """-mean_i log min_{j != i} ||x_i - x_j|| of the L2-normalised features (Sablayrolles et al. 2019, equation 3;
    Oquab et al. 2023, section 4), over the rows of all ranks, so that their number changes nothing.

    Args:
        features: (B, D) of this rank, before the head.
        usable: (B,) bool, rows that count; ``None`` means all.

    Returns:
        A scalar; zero where fewer than two rows are usable.

    Raises:
        UsageError: if the global batch is a single sample.
    """
    with torch.autocast(features.device.type, enabled=False):
        rows = gather_rows(functional.normalize(features.to(torch.float32), dim=-1, eps=EPSILON))
        if len(rows) < 2:
            raise UsageError("KoLeo compares samples of a batch, and this one holds a single sample.", "Use more.")
        flags = torch.ones(len(features), device=rows.device) if usable is None else usable.to(torch.float32)
        counted = gather_rows(flags) > 0
        with torch.no_grad():
            similarity = rows @ rows.T
            similarity.fill_diagonal_(float("-inf"))
            similarity[:, ~counted] = float("-inf")
            neighbour = similarity.argmax(1)
        distance = functional.pairwise_distance(rows, rows[neighbour], p=2, eps=EPSILON)
        force = -torch.log(distance.clamp(min=CLOSEST) + EPSILON)
        counted = counted & (counted.sum() > 1)
        return torch.where(counted, force, 0.0).sum() / counted.sum().clamp(min=1)
