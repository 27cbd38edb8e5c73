from __future__ import annotations

from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fmsuite.core.evaluation.bags import Bags
from fmsuite.core.evaluation.episodes import Draw, allowed_shots, draws
from fmsuite.errors import UsageError


def labelled(labels: list[int], groups: list[int], classes: int | None = None) -> Bags:
    target = torch.tensor(labels)
    return Bags.of_single(torch.zeros(len(labels), 1), target, torch.tensor(groups), classes or int(target.max()) + 1)


@st.composite
def cohorts(draw: st.DrawFn) -> tuple[Bags, torch.Tensor, torch.Tensor]:
    """Bags in groups of any labels, and a split of the groups."""
    classes = draw(st.integers(2, 4))
    groups = draw(st.lists(st.integers(0, 12), min_size=16, max_size=40))
    labels = draw(st.lists(st.integers(0, classes - 1), min_size=len(groups), max_size=len(groups)))
    bags = labelled(labels, groups, classes)
    tested = torch.isin(bags.groups, torch.tensor(draw(st.lists(st.integers(0, 12), min_size=1, max_size=6))))
    return bags, (~tested).nonzero().flatten(), tested.nonzero().flatten()


def same(one: list[Draw], other: list[Draw]) -> bool:
    return all(
        a.seed == b.seed
        and torch.equal(a.support, b.support)
        and torch.equal(a.queries, b.queries)
        and (b.labels is None if a.labels is None else torch.equal(a.labels, b.labels))
        for a, b in zip(one, other, strict=True)
    )


@settings(max_examples=60, deadline=None)
@given(cohort=cohorts(), with_sides=st.booleans(), shuffled=st.booleans(), shots=st.integers(1, 3))
def test_every_draw_keeps_its_promises(cohort: tuple, with_sides: bool, shuffled: bool, shots: int) -> None:
    bags, train, test = cohort
    sides = (train, test) if with_sides else (None, None)
    pool = train if with_sides else torch.arange(len(bags))
    try:
        found = draws(bags, shots, 4, 7, *sides, shuffled=shuffled)
    except UsageError:
        assume(False)
    for draw in found:
        labels = bags.labels if draw.labels is None else draw.labels
        assert labels[draw.support].tolist() == [c for c in range(bags.classes) for _ in range(shots)]
        assert len(draw.support.unique()) == len(draw.support)
        assert set(draw.support.tolist()) <= set(pool.tolist())
        shown = set(bags.groups[draw.support].tolist())
        assert not shown & set(bags.groups[draw.queries].tolist())
        if with_sides:
            assert draw.queries.tolist() == test.tolist()
        else:
            assert draw.queries.tolist() == [n for n, g in enumerate(bags.groups.tolist()) if g not in shown]
        assert len(labels[draw.queries].unique()) > 1
        assert (draw.labels is not None) == shuffled
        for side in (train, test) if with_sides else (pool,):
            assert torch.equal(labels[side].sort().values, bags.labels[side].sort().values)
    with suppress(UsageError):
        draws(bags, shots, 2, 8, *sides)
    assert same(found, draws(bags, shots, 4, 7, *sides, shuffled=shuffled))
    assert same(found[:2], draws(bags, shots, 2, 7, *sides, shuffled=shuffled))


@pytest.fixture
def cohort() -> Bags:
    """20 patients with 3 slides each, a class each."""
    return labelled([n // 3 % 2 for n in range(60)], [n // 3 for n in range(60)])


def test_another_seed_draws_others(cohort: Bags) -> None:
    assert not same(draws(cohort, 4, 5, 0), draws(cohort, 4, 5, 1))
    assert len({draw.seed for draw in draws(cohort, 1, 300, 0)}) == 300


def test_neither_features_nor_the_global_generators_are_looked_at(cohort: Bags) -> None:
    before = draws(cohort, 4, 5, 0, shuffled=True)
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    other = Bags.of_single(torch.randn(60, 9), cohort.labels, cohort.groups, 2)
    assert same(before, draws(other, 4, 5, 0, shuffled=True))


def test_more_shots_extend_the_examples_of_fewer(cohort: Bags) -> None:
    for few, many in zip(draws(cohort, 2, 20, 0), draws(cohort, 8, 20, 0), strict=True):
        if few.attempt == many.attempt == 0:
            assert set(few.support.tolist()) <= set(many.support.tolist())
            assert few.seed == many.seed


def test_every_bag_is_drawn_about_equally_often(cohort: Bags) -> None:
    counts = torch.bincount(torch.cat([draw.support for draw in draws(cohort, 3, 2000, 0)]), minlength=60)
    # 2000 draws of 3 of 30: 200 each, standard deviation 13.4.
    assert bool(((counts - 200).abs() < 5 * 13.4).all())


def test_shuffled_labels_differ_from_episode_to_episode(cohort: Bags) -> None:
    found = draws(cohort, 2, 50, 0, shuffled=True)
    labels = torch.stack([draw.labels for draw in found if draw.labels is not None])
    assert len(labels.unique(dim=0)) == 50
    agreement = (labels == cohort.labels).double().mean(1)
    # Of 20 patients in two classes of 10: mean 1/2, standard deviation 1 / sqrt(20 - 1) of one shuffle.
    assert abs(float(agreement.mean()) - 0.5) < 4 / np.sqrt(19 * 50)
    assert bool((labels.reshape(50, 20, 3) == labels.reshape(50, 20, 3)[:, :, :1]).all())


def test_a_draw_that_leaves_nothing_of_a_class_is_made_again() -> None:
    # 8 of each class's 10 slides leave another patient's pair only if all other patients are used up.
    bags = labelled([0] * 10 + [1] * 10, [n // 2 for n in range(20)])
    found = draws(bags, 8, 30, 0)
    assert max(draw.attempt for draw in found) > 0
    assert all(set(bags.labels[draw.queries].tolist()) == {0, 1} for draw in found)


def test_a_class_of_one_patient_is_drawn_but_not_asked() -> None:
    bags = labelled([0, 0, 0, 1, 1, 1, 2, 2], [0, 1, 2, 3, 4, 5, 6, 6])
    for draw in draws(bags, 1, 20, 0):
        assert set(bags.labels[draw.queries].tolist()) == {0, 1}
        assert 6 not in bags.groups[draw.queries].tolist()


def test_shots_end_where_a_class_would_not_be_left_to_be_asked(cohort: Bags) -> None:
    allowed, notes = allowed_shots(cohort, [8, 1, 2, 27, 28, 64], names=["benign", "malignant"], unit="slide")
    assert allowed == [1, 2, 8, 27]
    assert notes == [
        "Shots 28, 64 were left out: class 'benign' has 30 slides to draw examples from, and 3 slides must be left to "
        "be asked."
    ]
    assert draws(cohort, 27, 3, 0)
    train, test = torch.arange(30), torch.arange(30, 60)
    assert allowed_shots(cohort, [15, 16], train, test)[0] == [15]
    assert allowed_shots(cohort, [1, 4]) == ([1, 4], [])


def test_a_class_with_a_single_bag_allows_one_shot() -> None:
    bags = labelled([0, 0, 0, 1, 1, 1, 2], list(range(7)))
    allowed, notes = allowed_shots(bags, [1, 2], names=["a", "b", "c"], unit="slide")
    assert allowed == [1]
    assert notes == ["Shots 2 were left out: class 'c' has 1 slide to draw examples from."]
    assert all(6 in draw.support for draw in draws(bags, 1, 5, 0))


def test_what_cannot_be_drawn_is_refused(cohort: Bags) -> None:
    with pytest.raises(UsageError, match="31 shots"):
        draws(cohort, 31, 1, 0)
    with pytest.raises(UsageError, match="class 'b' has 1 bag"):
        allowed_shots(labelled([0, 0, 0, 1], [0, 1, 2, 3]), [2], names=["a", "b"])
    with pytest.raises(UsageError, match="at least 1"):
        allowed_shots(cohort, [0, 1])
    with pytest.raises(UsageError, match="at least one shot"):
        draws(cohort, 1, 0, 0)
    with pytest.raises(UsageError, match="only one is given"):
        draws(cohort, 1, 1, 0, train=torch.arange(30))
    with pytest.raises(UsageError, match="with bag 0"):
        draws(cohort, 1, 1, 0, torch.arange(31), torch.cat([torch.tensor([1]), torch.arange(31, 60)]))
    with pytest.raises(UsageError, match="Nothing of class 'b' can be asked"):
        draws(labelled([0, 0, 0, 1], [0, 1, 2, 3]), 1, 1, 0, names=["a", "b"])
    with pytest.raises(UsageError, match="Nothing of class 0 can be asked"):
        draws(cohort, 1, 1, 0, torch.arange(57), torch.arange(57, 60))
    with pytest.raises(UsageError, match="fewer than two classes are left"):
        draws(labelled([0, 1, 0, 1], [0, 0, 1, 1]), 2, 1, 0)
