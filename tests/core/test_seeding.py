"""Randomness is a function of its key: bijections, uniformity, independence."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fmsuite.core.seeding import derive, generator, permuted, uniform_from_keys


@settings(deadline=None, max_examples=60)
@given(length=st.integers(1, 700), key=st.integers(0, 2**63 - 1))
def test_permuted_visits_every_element_once(length: int, key: int) -> None:
    assert sorted(permuted(i, length, key) for i in range(length)) == list(range(length))


def test_permuted_depends_on_the_key_and_leaves_few_elements_in_place() -> None:
    first = [permuted(i, 1000, 1) for i in range(1000)]
    second = [permuted(i, 1000, 2) for i in range(1000)]
    for order in (first, second):
        # A random permutation has one fixed point on average, Poisson distributed.
        assert sum(i == value for i, value in enumerate(order)) < 8
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 8


def test_permuted_shows_no_correlation_between_neighbours() -> None:
    order = np.array([permuted(i, 5000, 3) for i in range(5000)], dtype=float)
    # The standard error of a correlation of 5000 independent pairs is 0.014.
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.06
    assert abs(np.corrcoef(np.arange(5000), order)[0, 1]) < 0.06


def test_permuted_handles_a_hundred_million_elements_without_an_array() -> None:
    seen = {permuted(i, 100_000_000, 9) for i in range(2000)}
    assert len(seen) == 2000
    assert max(seen) < 100_000_000
    # 2000 draws spread over the range: each tenth of it gets about 200.
    counts = np.histogram(list(seen), bins=10, range=(0, 1e8))[0]
    assert counts.min() > 140


@pytest.mark.parametrize("position", [-1, 5])
def test_permuted_refuses_positions_outside(position: int) -> None:
    with pytest.raises(IndexError):
        permuted(position, 5, 0)


def test_generators_repeat_for_equal_keys_and_differ_otherwise() -> None:
    draws = [
        generator(*key).random(4).tolist() for key in [(0, "view", 1, 2), (0, "view", 2, 1), (0, "mask", 1, 2), (1,)]
    ]
    assert generator(0, "view", 1, 2).random(4).tolist() == draws[0]
    assert len({tuple(draw) for draw in draws}) == 4


def test_keys_are_not_concatenated() -> None:
    assert derive(1, 23) != derive(12, 3)
    assert generator(1, 23).random() != generator(12, 3).random()


def test_derived_seeds_fit_in_63_bits() -> None:
    seeds = [derive("x", i) for i in range(1000)]
    assert min(seeds) >= 0
    assert max(seeds) < 2**63
    assert len(set(seeds)) == 1000


def test_streams_are_the_documented_hash_of_their_key() -> None:
    # A stream that changes between versions would silently change every resumed run.
    digest = hashlib.blake2b(b"7\x1fview\x1f3", digest_size=16).digest()
    expected = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little"))).integers(0, 2**40, 5)
    assert (generator(7, "view", 3).integers(0, 2**40, 5) == expected).all()


def test_uniform_from_keys_is_uniform_and_salted() -> None:
    keys = torch.tensor([derive("k", i) for i in range(20000)])
    first, second = uniform_from_keys(keys, 1), uniform_from_keys(keys, 2)
    assert float(first.min()) >= 0
    assert float(first.max()) < 1
    counts = torch.histc(first, bins=20, min=0, max=1)
    # chi-square with 19 degrees of freedom exceeds 43.8 once in a thousand.
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 43.8
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 0.03


def test_uniform_from_consecutive_keys_is_uniform_too() -> None:
    values = uniform_from_keys(torch.arange(20000), 5)
    counts = torch.histc(values, bins=20, min=0, max=1)
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 43.8
    assert abs(float(torch.corrcoef(torch.stack([values[:-1], values[1:]]))[0, 1])) < 0.03


def test_uniform_from_keys_does_not_depend_on_the_batch() -> None:
    keys = torch.tensor([derive("k", i) for i in range(64)])
    whole = uniform_from_keys(keys, 3)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(uniform_from_keys(keys[order], 3), whole[order])
    assert torch.equal(torch.cat([uniform_from_keys(part, 3) for part in keys.split(5)]), whole)
