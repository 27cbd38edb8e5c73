"""Visible tokens shared out among modalities: exact counts, moments of the shares, missing modalities."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmsuite.core.data.sample import MaskContext, SampleKey
from fmsuite.core.masking import DirichletMasking, InverseBlockPattern, RandomPattern
from fmsuite.core.masking.dirichlet import share_out
from fmsuite.errors import UsageError


def context(shape, valid=None, seed=0, axes=("group", "y", "x")):
    valid = np.ones(int(np.prod(shape)), dtype=bool) if valid is None else valid
    return MaskContext(axes, shape, valid, np.random.default_rng(seed), SampleKey(0, seed))


def visible_counts(sampler, shape, number):
    """(number, G) visible places of each group."""
    masks = np.stack([sampler(context(shape, seed=seed)) for seed in range(number)])
    return (~masks).reshape(number, shape[0], -1).sum(2)


@pytest.mark.parametrize(("alpha", "groups"), [(1.0, 2), (1.0, 3), (0.3, 2), (5.0, 3)])
def test_shares_have_the_mean_and_variance_of_a_symmetric_dirichlet(alpha, groups):
    number, total = 1000, 12 * 12 * groups // 6
    counts = visible_counts(DirichletMasking(0.8333, alpha), (groups, 12, 12), number)
    assert (counts.sum(1) == total).all()
    shares = counts / total
    mean, variance = 1 / groups, (1 / groups) * (1 - 1 / groups) / (groups * alpha + 1)
    assert np.abs(shares.mean(0) - mean).max() < 5 * np.sqrt(variance / number)
    # Rounding to whole tokens adds at most 1/4 of a token's square.
    assert np.abs(shares.var(0) - variance).max() < 0.16 * variance + 0.25 / total**2


def test_with_two_groups_and_alpha_one_every_division_is_equally_likely():
    counts = visible_counts(DirichletMasking(0.75, 1.0), (2, 4, 4), 1500)[:, 0]
    found = np.bincount(counts, minlength=9) / 1500
    # The outermost numbers have half a bin.
    expected = np.array([1, *[2] * 7, 1]) / 16
    assert np.abs(found - expected).max() < 5 * np.sqrt(0.125 / 1500)


def test_within_a_group_all_places_are_equally_likely():
    masks = np.stack([DirichletMasking(0.75)(context((2, 4, 4), seed=seed)) for seed in range(1500)])
    assert np.abs((~masks).mean(0) - 0.25).max() < 5 * np.sqrt(0.19 / 1500)


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.floats(0.1, 0.95), st.floats(0.05, 10), st.integers(1, 4))
def test_counts_are_exact_and_invalid_tokens_are_never_masked(seed, ratio, alpha, groups):
    random = np.random.default_rng(seed)
    valid = random.random((groups, 30)) < random.choice([0.0, 0.1, 0.9, 1.0], size=(groups, 1))
    mask = DirichletMasking(ratio, alpha)(context((groups, 5, 6), valid.ravel(), seed))
    assert not (mask & ~valid.ravel()).any()
    shown = int((valid.ravel() & ~mask).sum())
    available = int(valid.sum())
    assert shown == min(available, max(1, int(available * (1 - ratio))))


@pytest.mark.parametrize("missing", [0, 1])
def test_where_a_sensor_is_missing_the_other_has_all_visible_tokens(missing):
    valid = np.ones((2, 36), dtype=bool)
    valid[missing] = False
    for seed in range(20):
        mask = DirichletMasking(0.8333)(context((2, 6, 6), valid.ravel(), seed)).reshape(2, 36)
        assert not mask[missing].any()
        assert (~mask[1 - missing]).sum() == 6


def test_it_follows_the_samples_generator_and_nothing_else_and_can_be_sent_to_workers():
    sampler = DirichletMasking(0.75, 0.5, InverseBlockPattern(lowest_aspect=0.7))
    again = pickle.loads(pickle.dumps(sampler))
    masks = [sampler(context((2, 6, 6), seed=seed)) for seed in range(5)]
    assert all(np.array_equal(mask, again(context((2, 6, 6), seed=seed))) for seed, mask in enumerate(masks))
    assert not np.array_equal(masks[0], masks[1])


def test_patterns_repeat_along_time_within_a_sensor():
    sampler = DirichletMasking(0.75, 1.0, RandomPattern(("time",)))
    mask = sampler(context((2, 3, 4, 4), axes=("group", "time", "y", "x"))).reshape(2, 3, 16)
    assert (mask == mask[:, :1]).all()
    assert (~mask[:, 0]).sum() == 8


@settings(max_examples=30)
@given(st.integers(0, 200), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 60)), min_size=1, max_size=5))
def test_whole_numbers_add_up_stay_below_their_limits_and_are_nearest_to_the_shares(total, parts):
    shares = np.array([share for share, _ in parts])
    shares = shares / shares.sum() if shares.sum() > 0 else np.full(len(parts), 1 / len(parts))
    limits = [limit for _, limit in parts]
    total = min(total, sum(limits))
    counts = share_out(total, shares, limits)
    assert sum(counts) == total
    assert all(0 <= count <= limit for count, limit in zip(counts, limits, strict=True))
    if all(total * share + 1 <= limit for share, limit in zip(shares, limits, strict=True)):
        assert all(abs(count - total * share) < 1 for count, share in zip(counts, shares, strict=True))


def test_tokens_without_groups_are_refused():
    with pytest.raises(UsageError, match="these tokens have none"):
        DirichletMasking(0.75)(context((4, 4), axes=("y", "x")))
    with pytest.raises(UsageError, match="leaves no token visible"):
        DirichletMasking(1.0)(context((2, 4, 4)))
