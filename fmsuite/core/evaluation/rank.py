"""How many dimensions features use, how much they vary, and when that amounts to a collapse."""

from __future__ import annotations

import math

import torch
from torch import Tensor

RANK_FLOOR = 1.5
"""A RankMe below this is a collapse whatever it was before, if the features lie around the origin at all."""
RANK_SHARE = 0.25
"""Share of its starting value below which RankMe is reported; healthy runs lose some of it in their first steps."""
STD_FLOOR = 1e-3
"""A feature spread below this is a collapse whatever it was before."""
STD_SHARE = 0.1
"""Share of its starting value below which the spread is reported."""


def rankme(features: Tensor, eps: float = 1e-7) -> float:
    """The effective rank: the exponential of the entropy of the normalised singular values.

    With singular values s and p_k = s_k / sum(s) + eps: exp(-sum p_k log p_k) (Garrido et al. 2023, "RankMe",
    equations 1 and 2). Between 1 and min(N, D). Features are not centred, as in the paper.

    Args:
        features: (N, D), any floating dtype; computed in float64.
    """
    singular = torch.linalg.svdvals(features.detach().to("cpu", torch.float64))
    share = singular / singular.sum().clamp(min=torch.finfo(torch.float64).tiny) + eps
    return math.exp(-(share * share.log()).sum().item())


def feature_std(features: Tensor) -> float:
    """Spread of directions: the standard deviation of each dimension of the L2-normalised features, averaged, times
    sqrt(D). 0 if all features point the same way, 1 for an isotropic cloud (Chen and He 2021, "SimSiam", section 4.1).

    Args:
        features: (N, D) with N >= 2.
    """
    unit = torch.nn.functional.normalize(features.detach().to(torch.float64), dim=1)
    return (unit.std(dim=0, correction=0).mean() * math.sqrt(features.shape[1])).item()


def collapse_warning(
    rank: float, std: float, start_rank: float | None = None, start_std: float | None = None
) -> str | None:
    """A sentence if features have collapsed, else ``None``.

    Args:
        rank, std: RankMe and feature spread now.
        start_rank, start_std: the same before training; ``None`` leaves only the absolute thresholds.
    """
    if std < STD_FLOOR:
        return f"all features point the same way (spread {std:.2g}, below {STD_FLOOR:g})"
    if start_std is not None and std < STD_SHARE * start_std:
        return f"the spread of features fell to {std:.2g}, below {STD_SHARE:.0%} of the {start_std:.2g} at the start"
    if start_rank is not None and rank < RANK_SHARE * start_rank:
        return f"RankMe fell to {rank:.1f}, below {RANK_SHARE:.0%} of the {start_rank:.1f} at the start"
    if rank < RANK_FLOOR and (start_rank is None or start_rank >= RANK_FLOOR):
        return f"features lie along a single direction (RankMe {rank:.2f}, below {RANK_FLOOR:g})"
    return None
