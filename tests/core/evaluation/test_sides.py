"""Test sides, folds and fractions: whole groups, nested, alike."""

from __future__ import annotations

import math

import pytest
import torch

from fmsuite.core.evaluation.sides import first_share, fold_sides, spread_order
from fmsuite.errors import UsageError

GROUPS = [f"p{number // 2:02d}" for number in range(60)]
KINDS = torch.nn.functional.one_hot(torch.tensor([number // 2 % 3 == 0 for number in range(60)]).long()).bool()


def test_an_order_has_every_group_once_and_does_not_depend_on_the_items_order():
    order, least = spread_order(GROUPS, KINDS, seed=3)
    assert sorted(order) == sorted(set(GROUPS))
    assert least == 2
    back = torch.arange(59, -1, -1)
    assert spread_order([GROUPS[n] for n in back], KINDS[back], seed=3) == (order, least)
    assert spread_order(GROUPS, KINDS, seed=4)[0] != order


def test_every_first_part_is_alike_to_the_whole():
    order, _ = spread_order(GROUPS, KINDS, seed=0)
    thirds = [int(group[1:]) % 3 == 0 for group in order]
    for length in range(2, 31):
        assert abs(sum(thirds[:length]) - length / 3) <= 1.5


@pytest.mark.parametrize(("fraction", "count"), [(0.01, 2), (0.1, 3), (0.11, 4), (0.5, 15), (1.0, 30)])
def test_a_fraction_is_whole_groups_rounded_up_with_every_class(fraction, count):
    order, least = spread_order(GROUPS, KINDS, seed=1)
    share = first_share(order, fraction, least)
    assert len(share) == count == max(2, math.ceil(round(fraction * 30, 9)))
    assert set(share) <= set(first_share(order, min(1.0, 2 * fraction), least))


def test_folds_hold_every_group_out_once():
    order, _ = spread_order(GROUPS, KINDS, seed=1)
    folds = fold_sides(order, 4)
    assert sorted(group for fold in folds for group in fold) == sorted(set(GROUPS))
    assert {len(fold) for fold in folds} == {7, 8}
    with pytest.raises(UsageError, match="30 groups cannot be cut into 31 folds"):
        fold_sides(order, 31)
