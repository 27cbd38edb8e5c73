"""Turns and mirror images."""

from __future__ import annotations

import numpy as np
import pytest

from fmsuite.core.data.sample import ArraySample
from fmsuite.tiling.symmetry import turned


def sample(height: int, width: int) -> ArraySample:
    values = np.arange(2 * height * width).reshape(2, height, width)
    return ArraySample(values, values[:1] % 3 > 0, spacing=(1.0, 2.0), maps={"layer": values[0]})


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("quarters", range(4))
def test_every_part_moves_as_a_square_of_coordinates_does(quarters: int, mirrored: bool) -> None:
    before = sample(3, 3)
    after = turned(before, quarters, mirrored)
    for row in range(3):
        for column in range(3):
            y, x = row, column
            for _ in range(quarters):
                y, x = 2 - x, y
            x = 2 - x if mirrored else x
            np.testing.assert_array_equal(after.values[:, y, x], before.values[:, row, column])
            assert after.valid is not None
            assert before.valid is not None
            assert after.valid[0, y, x] == before.valid[0, row, column]
            assert after.maps["layer"][y, x] == before.maps["layer"][row, column]
    assert after.spacing == ((2.0, 1.0) if quarters % 2 else (1.0, 2.0))


def test_a_rectangle_keeps_its_shape() -> None:
    seen = {
        turned(sample(2, 3), quarters, mirrored).values.tobytes() for quarters in range(4) for mirrored in (False, True)
    }
    assert len(seen) == 4
    assert turned(sample(2, 3), 1, False).spacing == (1.0, 2.0)
