"""Splits by group, given and made, and labels shuffled by group."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from fmsuite.core.evaluation.splits import (
    Split,
    given_split,
    refuse_missing_classes,
    refuse_shared_groups,
    shuffled_labels,
    split_by_group,
)
from fmsuite.errors import UsageError


def _cohort(seed: int, groups: int, classes: int, mixed: bool) -> tuple[torch.Tensor, list[str]]:
    """Groups of 1 to 9 items; of one class each, or of several."""
    random = np.random.default_rng(seed)
    labels: list[int] = []
    names: list[str] = []
    for group in range(groups):
        size = int(random.integers(1, 10))
        labels += random.integers(0, classes, size).tolist() if mixed else [group % classes] * size
        names += [f"patient {group}"] * size
    return torch.tensor(labels), names


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_no_group_is_on_both_sides_and_every_item_on_one(mixed: bool, seed: int) -> None:
    labels, groups = _cohort(seed, 40, 3, mixed)
    split = split_by_group(labels, groups, ["a", "b", "c"], seed)
    train, test = ({groups[n] for n in rows.tolist()} for rows in (split.train, split.test))
    assert not train & test
    assert sorted(torch.cat([split.train, split.test]).tolist()) == list(range(len(labels)))
    assert split.made


@pytest.mark.parametrize("mixed", [False, True])
def test_every_class_keeps_its_share_of_the_test_side(mixed: bool) -> None:
    labels, groups = _cohort(7, 60, 3, mixed)
    split = split_by_group(labels, groups, ["a", "b", "c"], 0)
    share = labels[split.test].bincount(minlength=3) / labels.bincount(minlength=3)
    assert (share - 0.3).abs().max() < 0.05


def test_groups_of_one_item_are_split_to_the_rounded_share() -> None:
    labels = torch.tensor([0] * 10 + [1] * 50 + [2] * 2)
    split = split_by_group(labels, [str(n) for n in range(len(labels))], ["a", "b", "c"], 3)
    assert labels[split.test].bincount(minlength=3).tolist() == [3, 15, 1]


def test_the_split_follows_the_seed() -> None:
    labels, groups = _cohort(1, 40, 3, mixed=False)
    first, again, other = (split_by_group(labels, groups, ["a", "b", "c"], seed).test for seed in (1, 1, 2))
    assert first.tolist() == again.tolist() != other.tolist()


def test_two_groups_of_a_class_go_to_different_sides() -> None:
    labels = torch.tensor([0] * 90 + [0] * 10 + [1, 1])
    groups = ["big"] * 90 + ["small"] * 10 + ["x", "y"]
    split = split_by_group(labels, groups, ["a", "b"], 0)
    assert set(labels[split.test].tolist()) == set(labels[split.train].tolist()) == {0, 1}


def test_a_class_of_one_group_is_refused_by_name() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    with pytest.raises(UsageError, match=r"'b' belong to one group, 'patient 3'.*group_column"):
        split_by_group(labels, ["patient 1", "patient 2", "patient 3", "patient 3"], ["a", "b"], 0)


def test_groups_that_cannot_be_parted_are_refused() -> None:
    # Each class is in two groups, but whichever way they go, one side lacks a class.
    labels = torch.tensor([0, 1, 1, 2, 2, 0])
    with pytest.raises(UsageError, match="No split of the 3 groups"):
        split_by_group(labels, ["p", "p", "q", "q", "r", "r"], ["a", "b", "c"], 0)


def test_a_given_split_is_taken_as_it_is() -> None:
    split = given_split(["train", None, "test", "val", "train"])
    assert split is not None
    assert (split.train.tolist(), split.test.tolist(), split.made) == ([0, 4], [2], False)
    assert given_split([None, None]) is None


def test_a_split_without_one_of_the_sides_names_those_it_has() -> None:
    with pytest.raises(UsageError, match=r"'test'.*the sides are 'holdout', 'train'"):
        given_split(["train", "holdout"])


def test_a_group_on_both_sides_is_named() -> None:
    split = Split(torch.tensor([0, 1]), torch.tensor([2, 3]))
    refuse_shared_groups(split, ["p", "q", "r", "s"])
    with pytest.raises(UsageError, match="both sides of the split: 'q'"):
        refuse_shared_groups(split, ["p", "q", "q", "s"])


def test_a_class_that_a_side_lacks_is_named() -> None:
    split = Split(torch.tensor([0, 1]), torch.tensor([2, 3]))
    refuse_missing_classes(split, torch.tensor([0, 1, 0, 1]), ["a", "b"])
    with pytest.raises(UsageError, match="'test' of the split has no window of 'b'"):
        refuse_missing_classes(split, torch.tensor([0, 1, 0, 0]), ["a", "b"])
    with pytest.raises(UsageError, match="one class, 'a'"):
        refuse_missing_classes(split, torch.zeros(4, dtype=torch.int64), ["a"])


def test_shuffling_moves_whole_groups_of_equal_size() -> None:
    groups = torch.arange(30).repeat_interleave(4)
    labels = (groups % 3).clone()
    shuffled = shuffled_labels(labels, groups, seed=0)
    by_group = shuffled.reshape(30, 4)
    assert (by_group == by_group[:, :1]).all()
    assert shuffled.bincount().tolist() == labels.bincount().tolist()
    assert shuffled.tolist() != labels.tolist()


def test_shuffling_mixes_labels_within_groups_that_hold_several() -> None:
    # Every group holds a a b b in this order: moving blocks alone would change nothing.
    groups = torch.arange(50).repeat_interleave(4)
    labels = torch.tensor([0, 0, 1, 1]).repeat(50)
    shuffled = shuffled_labels(labels, groups, seed=0)
    assert (shuffled.reshape(50, 4).sum(1) == 2).all()
    assert 0.35 < (shuffled == labels).double().mean() < 0.65


def test_shuffled_labels_agree_with_the_true_ones_as_often_as_chance_has_it() -> None:
    """Over all permutations of G groups of one item, an item of class c keeps its label with probability n_c / G."""
    labels = torch.tensor([0] * 12 + [1] * 28)
    groups = torch.arange(40)
    agreement = [(shuffled_labels(labels, groups, 5, number) == labels).double().mean() for number in range(400)]
    expected = (12 / 40) ** 2 + (28 / 40) ** 2
    # Of 400 means of 40 correlated items: a standard deviation below 0.08 each.
    assert abs(float(np.mean(agreement)) - expected) < 4 * 0.08 / np.sqrt(400)


def test_each_number_is_another_shuffle_and_the_same_one_every_time() -> None:
    groups = torch.arange(20)
    labels = groups % 2
    seen = Counter(tuple(shuffled_labels(labels, groups, 0, number).tolist()) for number in (0, 0, 1, 2))
    assert sorted(seen.values()) == [1, 1, 2]


def test_sides_among_some_of_the_items_are_numbered_anew() -> None:
    split = Split(torch.tensor([0, 2, 5]), torch.tensor([1, 6])).among(torch.tensor([1, 2, 4, 5]))
    assert (split.train.tolist(), split.test.tolist()) == ([1, 3], [0])
