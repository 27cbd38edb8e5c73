from __future__ import annotations

import math

import pytest
import torch

from fmsuite.core.evaluation.rank import collapse_warning, feature_std, rankme


def test_equal_singular_values_give_their_number() -> None:
    assert rankme(torch.eye(7)) == pytest.approx(7, rel=1e-4)
    assert rankme(torch.eye(7, 20) * 1e4) == pytest.approx(7, rel=1e-4)


def test_one_direction_gives_one() -> None:
    rank_one = torch.arange(1.0, 9)[:, None] * torch.tensor([[1.0, -2.0, 0.5]])
    assert rankme(rank_one) == pytest.approx(1, abs=1e-4)
    assert rankme(torch.zeros(4, 3)) == pytest.approx(1, abs=1e-4)


def test_known_singular_values_give_the_exponential_of_their_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(30, 4, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(10, 4, generator=generator, dtype=torch.float64)).Q
    singular = torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64)
    share = [0.5, 0.25, 0.125, 0.125]
    expected = math.exp(-sum(p * math.log(p) for p in share))
    assert rankme(left @ torch.diag(singular) @ right.T) == pytest.approx(expected, rel=1e-4)


def test_spread_is_one_for_an_isotropic_cloud_and_zero_for_one_direction() -> None:
    cloud = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0))
    assert feature_std(cloud) == pytest.approx(1, abs=0.01)
    assert feature_std(torch.arange(1.0, 9)[:, None] * torch.ones(1, 16)) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((30.0, 0.5, 32.0, 0.6), None),
        ((30.0, 0.5), None),
        ((30.0, 1e-5), "same way"),
        ((30.0, 0.05, 32.0, 0.6), "spread of features fell"),
        ((15.0, 0.5, 32.0, 0.6), None),
        ((7.5, 0.5, 32.0, 0.6), "RankMe fell to 7.5"),
        ((1.2, 0.5), "single direction"),
        ((1.2, 0.5, 1.2, 0.5), None),
    ],
)
def test_collapse_is_judged_by_floors_and_by_the_start(values: tuple, words: str | None) -> None:
    warning = collapse_warning(*values)
    assert warning is None if words is None else words in str(warning)
