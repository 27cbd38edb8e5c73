"""Who is trained on and who is held out: test sides, folds and nested fractions of groups (patients)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fmsuite.core.evaluation.fractions import group_order
from fmsuite.errors import UsageError


def spread_order(groups: Sequence[str], kinds: Tensor, seed: int, draw: int = 0) -> tuple[list[str], int]:
    """The groups in a random order of which every first part is alike to the whole (``fractions.group_order``).

    Args:
        groups: (N,) name of each item's group; the result does not depend on how they are numbered.
        kinds: (N, C) bool, what each item is of.

    Returns:
        The names, and how many of them it takes to have every kind.
    """
    names = sorted(set(groups))
    code = {name: number for number, name in enumerate(names)}
    order, least = group_order(kinds, torch.tensor([code[group] for group in groups]), seed, draw)
    return [names[number] for number in order], least


def first_share(order: Sequence[str], fraction: float, least: int = 1) -> list[str]:
    """The beginning of an order: a fraction of it, rounded up to whole groups, and at least so many. Of two fractions
    the smaller one's groups are among the larger one's."""
    return list(order[: max(min(least, len(order)), math.ceil(fraction * len(order) - 1e-9))])


def fold_sides(order: Sequence[str], folds: int) -> list[list[str]]:
    """The groups that each fold holds out: every ``folds``-th of the order, so that each group is held out once.

    Raises:
        UsageError: for fewer than two folds, or fewer groups than folds.
    """
    if not 2 <= folds <= len(order):
        raise UsageError(
            f"{len(order)} groups cannot be cut into {folds} folds.", f"Set split.folds from 2 to {len(order)}."
        )
    return [list(order[fold::folds]) for fold in range(folds)]
