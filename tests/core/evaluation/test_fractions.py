"""Shares of the training groups: whole groups, nested, with every kind, and alike to the whole."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from fmsuite.core.evaluation.fractions import DRAWS, bins_of, check_fractions, group_order, nested_shares
from fmsuite.errors import UsageError

SHARES = (0.02, 0.1, 0.5)


def cohort() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """200 groups of 1 to 4 items, one of three classes each, the last one rare; the first items are not trained on."""
    random = np.random.default_rng(0)
    groups = np.repeat(np.arange(200), random.integers(1, 5, 200))
    classes = np.where(np.arange(200) % 50 == 7, 2, np.arange(200) % 4 == 0)[groups]
    kinds = np.eye(3, dtype=bool)[classes]
    return torch.from_numpy(kinds), torch.from_numpy(groups), torch.arange(20, len(groups))


def test_shares_are_whole_groups_nested_and_of_the_asked_number() -> None:
    kinds, groups, side = cohort()
    found = nested_shares(kinds, groups, side, SHARES, seed=1)
    total = len(groups[side].unique())
    for share, draws in found.items():
        assert len(draws) == DRAWS
        for items in draws:
            chosen = groups[items].unique()
            assert len(chosen) == max(3, int(np.ceil(share * total)))
            assert torch.equal(items, side[torch.isin(groups[side], chosen)])
            assert kinds[items].any(0).all()
    for small, large in pairwise(SHARES):
        for less, more in zip(found[small], found[large], strict=True):
            assert torch.isin(less, more).all()
    assert len({tuple(items.tolist()) for items in found[0.1]}) == DRAWS
    again = nested_shares(kinds, groups, side, SHARES[1:2], seed=1)
    assert all(torch.equal(a, b) for a, b in zip(again[0.1], found[0.1], strict=True))


def test_classes_keep_their_shares() -> None:
    kinds, groups, side = cohort()
    of_group = torch.stack([kinds[groups == group][0] for group in range(200)])
    whole = of_group[groups[side].unique()].double().mean(0)
    for items in nested_shares(kinds, groups, side, [0.5], seed=0, draws=20)[0.5]:
        part = of_group[groups[items].unique()].double().mean(0)
        assert (part - whole).abs().max() < 0.02


def test_a_kind_that_only_mixed_groups_have_is_there_from_the_start() -> None:
    """Items of a group may be of several kinds, and of none."""
    kinds = torch.zeros(60, 3, dtype=torch.bool)
    kinds[::2, 0] = True
    kinds[[10, 40], 1] = True
    kinds[40, 2] = True
    groups = torch.arange(60) // 2
    for draw in range(5):
        order, least = group_order(kinds, groups, 0, draw)
        assert sorted(order) == list(range(30))
        assert order[0] == 20
        assert least == 1


def test_bins_hold_equal_numbers_and_ties_stay_together() -> None:
    values = torch.arange(100.0)[torch.randperm(100, generator=torch.Generator().manual_seed(0))]
    assert torch.bincount(bins_of(values)).tolist() == [20] * 5
    assert bins_of(torch.tensor([1.0, 2.0, 2.0, 2.0, 2.0, 9.0]), 2).tolist() == [0, 1, 1, 1, 1, 1]
    assert bins_of(torch.full((4,), 3.0)).tolist() == [0] * 4


def test_fractions_are_checked_and_everything_is_no_share() -> None:
    assert check_fractions([1.0, 0.1, 0.01, 0.1]) == [0.01, 0.1]
    for wrong in (0.0, -0.1, 1.5):
        with pytest.raises(UsageError, match="share of"):
            check_fractions([wrong])
