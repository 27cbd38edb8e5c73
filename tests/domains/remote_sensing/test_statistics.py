from __future__ import annotations

import numpy as np
import pytest

from fmsuite.core.data.sample import ArraySample
from fmsuite.core.inputs import Quantification
from fmsuite.domains.remote_sensing.statistics import BandStatistics


def test_statistics_equal_numpys_over_valid_pixels():
    random = np.random.default_rng(0)
    values = random.integers(0, 5000, size=(4, 3, 20, 20)).astype(np.uint16)
    valid = random.random((4, 3, 20, 20)) < 0.7
    found = (
        BandStatistics([Quantification(scale=1e-4, offset=-0.1, clip=(0.0, 0.3))] * 3)
        .add_all(map(ArraySample, values, valid))
        .summary((0, 100))
    )
    for band, (mean, std) in enumerate(found):
        physical = (values[:, band][valid[:, band]] * 1e-4 - 0.1).clip(0.0, 0.3)
        assert mean == pytest.approx(physical.mean())
        assert std == pytest.approx(physical.std())


def test_a_few_wild_values_do_not_move_the_statistics():
    values = np.random.default_rng(0).normal(10, 1, size=(1, 200, 200))
    calm = BandStatistics([Quantification()]).add_all([ArraySample(values)]).summary((0.5, 99.5))[0]
    values[0, 0, :100] = 1e6
    wild = BandStatistics([Quantification()]).add_all([ArraySample(values)]).summary((0.5, 99.5))[0]
    plain = BandStatistics([Quantification()]).add_all([ArraySample(values)]).summary((0, 100))[0]
    assert wild == pytest.approx(calm, rel=0.05)
    assert plain[1] > 1000


def test_empty_and_constant_bands_can_be_divided_by():
    sample = ArraySample(np.full((2, 8, 8), 0.3, np.float32), np.stack([np.ones((8, 8), bool), np.zeros((8, 8), bool)]))
    (mean, std), empty = BandStatistics([Quantification()] * 2).add_all([sample]).summary((0.5, 99.5))
    assert (mean, std) == (pytest.approx(0.3), 1.0)
    assert empty == (0.0, 1.0)
