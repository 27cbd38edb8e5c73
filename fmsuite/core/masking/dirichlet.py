"""Masks of several modalities (Bachmann et al. 2022, "MultiMAE: Multi-modal Multi-task Masked Autoencoders")."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fmsuite.core.data.sample import Array, MaskContext
from fmsuite.core.masking.patterns import GROUP, Pattern, RandomPattern
from fmsuite.core.masking.places import check_open, kept_count
from fmsuite.errors import UsageError


@dataclass(frozen=True)
class DirichletMasking:
    """Of L available places of all channel groups together ``kept_count(L, ratio)`` stay visible; how many of them each
    group has is drawn from a symmetric Dirichlet distribution (section 3.2).

    Only groups with a valid token take part: where a sensor is missing, all visible places are the others'. Shares are
    rounded to whole places (``share_out``).

    Attributes:
        ratio: share of places to hide, between 0 and 1.
        alpha: concentration. With 1, all divisions are equally likely; with less, one group tends to have most; with
            more, all tend to have as many.
        pattern: which places of one group, on the axes after the group axis.

    Raises:
        UsageError: when called, for another ratio, or tokens without channel groups.
    """

    ratio: float
    alpha: float = 1.0
    pattern: Pattern = field(default_factory=RandomPattern)

    def __call__(self, context: MaskContext) -> Array:
        check_open(self.ratio)
        axes, shape = context.axes, context.shape
        if len(shape) != len(axes) or axes[0] != GROUP:
            raise UsageError(
                "Visible tokens are shared out among channel groups, and these tokens have none.",
                "Put the channels into groups.",
            )
        parts = list(context.valid.reshape(shape[0], -1))
        places = [self.pattern.places(axes[1:], shape[1:], part) for part in parts]
        visible = [0] * len(parts)
        present = [number for number, available in enumerate(places) if available]
        if present:
            shares = context.generator.dirichlet([self.alpha] * len(present))
            total = kept_count(sum(places), self.ratio)
            counts = share_out(total, shares, [places[number] for number in present])
            for number, count in zip(present, counts, strict=True):
                visible[number] = count
        masks = [
            self.pattern(replace(context, axes=axes[1:], shape=shape[1:], valid=part), available - shown)
            for part, available, shown in zip(parts, places, visible, strict=True)
        ]
        return np.concatenate(masks)


def share_out(total: int, shares: Sequence[float] | Array, limits: Sequence[int]) -> list[int]:
    """Whole numbers that add up to a total, in proportion to shares by the method of largest remainders. What a limit
    leaves over goes to the others in the same way.

    Args:
        total: at most the sum of the limits.
        shares: not negative, of sum one.
        limits: the largest number for each.
    """
    given = np.zeros(len(limits), dtype=np.int64)
    most = np.asarray(limits, dtype=np.int64)
    weights = np.asarray(shares, dtype=np.float64)
    while (missing := total - int(given.sum())) > 0:
        open_ = given < most
        # Shares may all be zero where there is still room.
        weight = np.where(open_, weights, 0.0) if weights[open_].sum() > 0 else open_.astype(np.float64)
        wanted = missing * weight / weight.sum()
        whole = np.floor(wanted).astype(np.int64)
        order = np.argsort(-(wanted - whole), kind="stable")
        whole[order[: missing - int(whole.sum())]] += 1
        given = np.minimum(given + np.where(open_, whole, 0), most)
    return [int(number) for number in given]
