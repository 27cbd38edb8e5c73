"""Who is trained on: test sides, folds and nested fractions of groups (patients)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fmsuite.core.seeding import generator
from fmsuite.errors import UsageError


def spread_order(groups: Sequence[str], strata: Mapping[str, str], *key: int | str) -> list[str]:
    """The groups in a random order whose every beginning has the strata in their shares, as far as it can.

    First comes one group of each stratum, so that no class is missing where there are as many groups as classes; then
    each stratum's groups are spread evenly over the rest.

    Args:
        groups: names, in any order; the result does not depend on it.
        strata: of each group, its class; one for all where there is nothing to be alike.
        key: of the draw.
    """
    drawn = generator(*key, "order of groups")
    members: dict[str, list[str]] = {}
    for group in sorted(groups):
        members.setdefault(strata[group], []).append(group)
    places = []
    for stratum in sorted(members):
        own = members[stratum]
        for place, number in enumerate(drawn.permutation(len(own))):
            share = 0.0 if place == 0 else (place + 0.5) / len(own)
            places.append((share, drawn.random(), own[number]))
    return [group for _, _, group in sorted(places)]


def first_share(order: Sequence[str], fraction: float, least: int = 1) -> list[str]:
    """The beginning of an order that is nearest to a fraction of it, at least so many; of two orders that are equal,
    the smaller fraction's is part of the larger one's."""
    return list(order[: max(min(least, len(order)), round(fraction * len(order)))])


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
